//! One output, many threads: a row-major matrix cut into disjoint tiles.
//!
//! Output tiles of a matrix product are 2-D blocks of a row-major tensor, so
//! they interleave in memory and can't be split with `chunks_mut`. This is the
//! one place where threads share a mutable slice; its interface is safe,
//! because [`tiles_mut`] cuts a grid whose cells can't overlap.

use std::marker::PhantomData;

/// A rectangle of a row-major matrix.
pub struct TileMut<'a, T> {
    start: *mut T,
    stride: usize,
    /// First row, in the matrix.
    pub row: usize,
    /// Number of rows.
    pub rows: usize,
    /// First column, in the matrix.
    pub column: usize,
    /// Number of columns.
    pub columns: usize,
    _borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: a tile is an exclusive borrow of its elements, as `&mut [T]` is.
unsafe impl<T: Send> Send for TileMut<'_, T> {}

impl<T> TileMut<'_, T> {
    /// Columns `column..column + len` (relative to the tile) of row `row`.
    #[inline(always)]
    pub fn row_mut(&mut self, row: usize, column: usize, len: usize) -> &mut [T] {
        assert!(row < self.rows && column <= self.columns && len <= self.columns - column);
        // SAFETY: inside the tile (just checked), which `tiles_mut` has checked
        // to lie inside the matrix; tiles are disjoint.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(row * self.stride + column), len) }
    }
}

/// Cuts a matrix of `width` columns into the grid between the given borders.
///
/// # Panics
/// If borders don't increase or exceed the matrix: a bug in the caller.
pub fn tiles_mut<'a, T>(
    matrix: &'a mut [T],
    width: usize,
    rows: &[usize],
    columns: &[usize],
) -> Vec<TileMut<'a, T>> {
    assert!(rows.is_sorted() && columns.is_sorted());
    assert!(columns.last().is_none_or(|&c| c <= width));
    assert!(rows.last().is_none_or(|&r| r.checked_mul(width).is_some_and(|n| n <= matrix.len())));
    let start = matrix.as_mut_ptr();
    let mut tiles = Vec::with_capacity(rows.len() * columns.len());
    for r in rows.windows(2) {
        for c in columns.windows(2) {
            tiles.push(TileMut {
                // SAFETY: row and column lie inside the matrix (checked above).
                start: unsafe { start.add(r[0] * width + c[0]) },
                stride: width,
                row: r[0],
                rows: r[1] - r[0],
                column: c[0],
                columns: c[1] - c[0],
                _borrow: PhantomData,
            });
        }
    }
    tiles
}
