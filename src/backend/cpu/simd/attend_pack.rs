//! Operands of [`super::attend`] in tile order.
//!
//! Tiles are as tall as the register tile, lower than a vector is long. So rows
//! of a tile are written as whole vectors, each overwriting what the one before
//! wrote too much; buffers need a vector of [`SLACK`] at the end.

use super::product::PANEL;
use super::{Block, Kernel, Simd};

/// Values behind the end of a packed operand that may be overwritten.
pub const SLACK: usize = 16;

/// First channel and height of each tile of `d` channels: evenly high, at most `rows`.
#[inline(always)]
pub fn channel_tiles(d: usize, rows: usize) -> impl Iterator<Item = (usize, usize)> {
    let tiles = d.div_ceil(rows);
    let (base, longer) = (d / tiles, d % tiles);
    (0..tiles).map(move |t| (t * base + t.min(longer), base + usize::from(t < longer)))
}

/// Keys `[key][D]` to `[tile][D][rows]`.
pub struct PackKeys<'a> {
    /// Rows of `d` values.
    pub from: &'a [f32],
    /// Channels.
    pub d: usize,
    /// Whole tiles and [`SLACK`].
    pub to: &'a mut [f32],
}

impl Kernel for PackKeys<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (d, keys) = (self.d, self.from.len() / self.d);
        assert!(self.to.len() >= keys.next_multiple_of(S::ROWS) * d + SLACK);
        for key in (0..keys).step_by(S::ROWS) {
            for i in (0..d).step_by(S::LANES) {
                // SAFETY: the block lies inside rows key.. and columns i..; the
                // last vector ends at most SLACK behind the tiles.
                unsafe {
                    S::transpose(Block {
                        from: self.from.as_ptr().add(key * d + i),
                        stride: d,
                        rows: (keys - key).min(S::ROWS),
                        columns: (d - i).min(S::LANES),
                        factor: 1.0,
                        to: self.to.as_mut_ptr().add(key * d + i * S::ROWS),
                        to_stride: S::ROWS,
                    });
                }
            }
        }
    }
}

/// Values `[key][D]` to `[tile][key][channels]`.
pub struct PackValues<'a> {
    /// Rows of `d` values, and [`SLACK`].
    pub from: &'a [f32],
    /// Channels.
    pub d: usize,
    /// Number of rows.
    pub keys: usize,
    /// As many values, and [`SLACK`].
    pub to: &'a mut [f32],
}

impl Kernel for PackValues<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (d, keys) = (self.d, self.keys);
        assert!(self.from.len() >= keys * d + SLACK && self.to.len() >= keys * d + SLACK);
        for (channel, rows) in channel_tiles(d, S::ROWS) {
            for key in 0..keys {
                // SAFETY: both end at most SLACK behind the last value.
                unsafe {
                    let v = S::load(self.from.as_ptr().add(key * d + channel));
                    S::store(self.to.as_mut_ptr().add(channel * keys + key * rows), v);
                }
            }
        }
    }
}

/// Up to 32 queries `[query][D]` to `[D][32]`, scaled; missing ones are zero.
pub struct PackQueries<'a> {
    /// Rows of `d` values.
    pub from: &'a [f32],
    /// Channels.
    pub d: usize,
    /// Multiplies every value.
    pub factor: f32,
    /// `d × 32` values.
    pub to: &'a mut [f32],
}

impl Kernel for PackQueries<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (d, count) = (self.d, self.from.len() / self.d);
        assert!(count <= PANEL && self.to.len() >= d * PANEL);
        for query in (0..PANEL).step_by(S::LANES) {
            for i in (0..d).step_by(S::LANES) {
                let rows = count.saturating_sub(query).min(S::LANES);
                // SAFETY: the block lies inside the rows (no pointer is used if
                // there are none); query + lanes ≤ 32.
                unsafe {
                    S::transpose(Block {
                        from: self.from.as_ptr().wrapping_add(query * d + i),
                        stride: d,
                        rows,
                        columns: (d - i).min(S::LANES),
                        factor: self.factor,
                        to: self.to.as_mut_ptr().add(i * PANEL + query),
                        to_stride: PANEL,
                    });
                }
            }
        }
    }
}

/// A result `[D][32]` to 32 rows of `d`, `d` rounded up to [`SLACK`] apart.
pub struct UnpackResult<'a> {
    /// `d × 32` values.
    pub from: &'a [f32],
    /// Channels.
    pub d: usize,
    /// Rows.
    pub to: &'a mut [f32],
}

impl Kernel for UnpackResult<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (d, stride) = (self.d, self.d.next_multiple_of(SLACK));
        assert!(self.from.len() >= d * PANEL && self.to.len() >= PANEL * stride);
        for i in (0..d).step_by(S::LANES) {
            for query in (0..PANEL).step_by(S::LANES) {
                // SAFETY: rows i.. and columns query.. of `from`; a written vector
                // ends inside its row, which is a multiple of the lanes long.
                unsafe {
                    S::transpose(Block {
                        from: self.from.as_ptr().add(i * PANEL + query),
                        stride: PANEL,
                        rows: (d - i).min(S::LANES),
                        columns: S::LANES,
                        factor: 1.0,
                        to: self.to.as_mut_ptr().add(query * stride + i),
                        to_stride: stride,
                    });
                }
            }
        }
    }
}
