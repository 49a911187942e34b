//! `C[M, N] = epilogue(A[M, K] · B)`.
//!
//! Rows of A are copied into an L2-resident block of scratch memory whose row
//! stride is an odd number of cache lines (32 rows at a power-of-two stride
//! would fall into a few cache sets), with K padded by zeros. The copy also
//! joins two inputs whose columns are concatenated.
//!
//! Work is split over row blocks while there are enough of them; otherwise the
//! threads share the rows and divide the panels, so that each reads only its
//! part of the weights.

use super::block::{K_STEP, TILE, TileSession};
use super::epilogue::{Epilogue, Finish, Output, Rows, SKIP};
use super::memory::{Scratch, Slot};
use super::pack::PackedB;
use super::tiles::{NEAR_BYTES, RowBlock, Tables, multiply};
use super::{KernelError, Tier};
use half::bf16;
use rayon::prelude::*;
use std::ops::Range;

/// A row-major input matrix, or two whose columns follow each other.
#[derive(Clone, Copy)]
pub struct GemmInput<'a> {
    /// Rows of both parts.
    pub rows: usize,
    /// First columns.
    pub first: Rows<'a>,
    /// How many of K's columns `first` has; the rest comes from `second`.
    pub first_columns: usize,
    /// Last columns, if K exceeds `first_columns`.
    pub second: Option<Rows<'a>>,
}

impl<'a> GemmInput<'a> {
    /// A dense `[rows, k]` matrix.
    pub fn dense(data: &'a [bf16], rows: usize, k: usize) -> GemmInput<'a> {
        GemmInput { rows, first: Rows { data, stride: k }, first_columns: k, second: None }
    }

    fn check(&self, k: usize) -> Result<(), KernelError> {
        let part = |what, rows: Rows, columns: usize| {
            KernelError::check(what, rows.stride >= columns || self.rows <= 1, rows.stride, columns)?;
            let needed = if self.rows == 0 { 0 } else { (self.rows - 1) * rows.stride + columns };
            KernelError::check(what, rows.data.len() >= needed, rows.data.len(), needed)
        };
        part("first input", self.first, self.first_columns)?;
        match self.second {
            None => KernelError::check("input columns", self.first_columns == k, self.first_columns, k),
            Some(second) => {
                KernelError::check("input columns", self.first_columns < k, self.first_columns, k)?;
                part("second input", second, k - self.first_columns)
            }
        }
    }

    /// Copies a row to scratch memory, zero-padded.
    fn copy_row(&self, row: usize, k: usize, to: &mut [bf16]) {
        let first = &self.first.data[row * self.first.stride..][..self.first_columns];
        to[..first.len()].copy_from_slice(first);
        if let Some(second) = self.second {
            let count = k - first.len();
            to[first.len()..k].copy_from_slice(&second.data[row * second.stride..][..count]);
        }
        to[k..].fill(bf16::ZERO);
    }
}

/// One thread's part of a product.
struct Part {
    rows: Range<usize>,
    panels: Range<usize>,
}

/// Matrix product with packed weights on the current rayon pool.
///
/// # Errors
///
/// If a slice is too short for its shape, a stride too small, or the epilogue
/// does not fit the weights.
pub fn gemm(
    tier: Tier,
    a: &GemmInput,
    b: &PackedB,
    epilogue: &Epilogue,
    out: Output,
) -> Result<(), KernelError> {
    a.check(b.depth())?;
    let finish = Finish::new(epilogue, b, a.rows, out)?;
    if a.rows == 0 {
        return Ok(());
    }
    if a.rows >= SKIP as usize {
        return Err(KernelError::TooManyRows { rows: a.rows });
    }
    let tier = tier.or_available();
    let parts = split(a.rows, b);
    run_parts(parts, |part| {
        let _session = TileSession::new(tier);
        // SAFETY: the tier is available and its session held; parts do not
        // overlap in rows × panels.
        unsafe { multiply_rows(tier, a, b, part, &finish) };
    });
    Ok(())
}

/// A grid of row blocks × panel groups.
pub(super) struct Grid {
    pub row_blocks: usize,
    pub block_rows: usize,
    pub panel_groups: usize,
    pub group_panels: usize,
}

/// Row blocks that fit the near cache; panels divided if blocks are too few.
fn split(rows: usize, b: &PackedB) -> (Grid, usize, usize) {
    let threads = rayon::current_num_threads();
    let row_bytes = row_stride(b.depth());
    let limit = (NEAR_BYTES / row_bytes).clamp(64, 1024) / 32 * 32;
    let blocks = rows.div_ceil(limit);
    let blocks = if blocks >= 2 * threads { blocks.next_multiple_of(threads) } else { blocks };
    let block_rows = rows.div_ceil(blocks).next_multiple_of(32);
    let groups = if blocks >= 2 * threads { 1 } else { threads.min(b.panels()) };
    let grid = Grid {
        row_blocks: rows.div_ceil(block_rows),
        block_rows,
        panel_groups: groups,
        group_panels: b.panels().div_ceil(groups),
    };
    (grid, rows, b.panels())
}

/// Runs every part of the grid, in parallel if the pool has more threads.
fn run_parts((grid, rows, panels): (Grid, usize, usize), work: impl Fn(Part) + Sync) {
    let part = |i: usize| {
        let (block, group) = (i / grid.panel_groups, i % grid.panel_groups);
        let first_row = block * grid.block_rows;
        let first_panel = group * grid.group_panels;
        Part {
            rows: first_row..(first_row + grid.block_rows).min(rows),
            panels: first_panel.min(panels)..(first_panel + grid.group_panels).min(panels),
        }
    };
    let count = grid.row_blocks * grid.panel_groups;
    if rayon::current_num_threads() == 1 || count == 1 {
        (0..count).for_each(|i| work(part(i)));
    } else {
        (0..count).into_par_iter().with_max_len(1).for_each(|i| work(part(i)));
    }
}

/// Bytes of a copied row: padded to k-steps, an odd number of cache lines.
fn row_stride(k: usize) -> usize {
    let lines = k.div_ceil(K_STEP);
    64 * (lines | 1)
}

/// # Safety
///
/// As [`multiply`].
unsafe fn multiply_rows(tier: Tier, a: &GemmInput, b: &PackedB, part: Part, finish: &Finish) {
    let (k, steps) = (b.depth(), b.k_steps());
    let stride = row_stride(k);
    let count = part.rows.len();
    let tiles = count.div_ceil(TILE);
    let mut copy = Scratch::take(Slot::Rows, tiles * TILE * stride);
    let copy = copy.as_mut_slice::<bf16>();
    let width = stride / size_of::<bf16>();
    for (to, row) in copy.chunks_exact_mut(width).zip(part.rows.clone()) {
        a.copy_row(row, k, &mut to[..steps * K_STEP]);
    }
    let mut tables = Tables::new(tiles, steps);
    let (offsets, rows, k_offsets) = tables.split();
    offsets.iter_mut().enumerate().for_each(|(tile, to)| *to = tile * TILE * stride);
    k_offsets.iter_mut().zip(0..).for_each(|(to, step)| *to = step * 64);
    for (to, i) in rows.iter_mut().zip(0..) {
        *to = if i < count { (part.rows.start + i) as u32 } else { SKIP };
    }
    let block = RowBlock { base: copy.as_ptr().cast(), row_stride: stride, tiles: offsets, k_offsets, rows };
    // SAFETY: tiles and steps lie inside the copy; the rest is the caller's.
    unsafe { multiply(tier, &block, b, part.panels, finish) };
}
