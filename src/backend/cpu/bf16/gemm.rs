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

use super::block::{BLOCK, K_STEP, TILE, TileSession};
use super::epilogue::{Epilogue, Finish, Output, Rows, SKIP};
use super::memory::{Scratch, Slot};
use super::pack::PackedB;
use super::parallel::{even_blocks, run_grid};
use super::tiles::{Chunk, RowBlock, Sums, Tables, multiply};
use super::{KernelError, Tier};
use half::bf16;
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

    /// Copies columns `k` of a row to scratch memory, zero-padded.
    fn copy_row(&self, row: usize, k: Range<usize>, to: &mut [bf16]) {
        let split = self.first_columns.clamp(k.start, k.end);
        let (head, rest) = to.split_at_mut(split - k.start);
        let (tail, padding) = rest.split_at_mut(k.end - split);
        if !head.is_empty() {
            head.copy_from_slice(&self.first.data[row * self.first.stride..][k.start..split]);
        }
        if let Some(second) = self.second.filter(|_| !tail.is_empty()) {
            let columns = split - self.first_columns..k.end - self.first_columns;
            tail.copy_from_slice(&second.data[row * second.stride..][columns]);
        }
        padding.fill(bf16::ZERO);
    }
}

/// Bytes of a copied row block: a quarter of a 2 MiB second level, which leaves
/// room for a panel, the next one and the output.
const NEAR_ROWS: usize = 512 << 10;

/// One thread's part of a product.
struct Part {
    rows: Range<usize>,
    panels: Range<usize>,
    chunk_steps: usize,
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
    let chunk_steps = chunk_steps(b.k_steps());
    let block_rows = block_rows(a.rows, row_stride(chunk_steps));
    run_grid(a.rows.div_ceil(block_rows), b.panels(), |block, panels| {
        let first = block * block_rows;
        let rows = first..(first + block_rows).min(a.rows);
        let _session = TileSession::new(tier);
        // SAFETY: the tier is available and its session held; the grid's parts
        // do not overlap in rows × panels.
        unsafe { multiply_rows(tier, a, b, Part { rows, panels, chunk_steps }, &finish) };
    });
    Ok(())
}

/// Rows of a block: what fits near, in equal blocks for all threads.
fn block_rows(rows: usize, row_bytes: usize) -> usize {
    let limit = (NEAR_ROWS / row_bytes).clamp(128, 512);
    let blocks = even_blocks(rows.div_ceil(limit));
    rows.div_ceil(blocks).next_multiple_of(BLOCK)
}

/// k-steps of a chunk: long sums come in even parts, so that many rows fit near.
fn chunk_steps(steps: usize) -> usize {
    const LONGEST: usize = 80;
    steps.div_ceil(steps.div_ceil(LONGEST))
}

/// Bytes of a copied row: an odd number of cache lines.
fn row_stride(steps: usize) -> usize {
    64 * (steps | 1)
}

/// # Safety
///
/// As [`multiply`].
unsafe fn multiply_rows(tier: Tier, a: &GemmInput, b: &PackedB, part: Part, finish: &Finish) {
    let stride = row_stride(part.chunk_steps);
    let count = part.rows.len();
    let tile_count = count.div_ceil(TILE);
    let mut copy = Scratch::take(Slot::Rows, tile_count * TILE * stride);
    let copy = copy.as_mut_slice::<bf16>();
    let mut tables = Tables::new(tile_count, part.chunk_steps);
    let (tiles, rows, k_offsets) = tables.split();
    tiles.iter_mut().enumerate().for_each(|(tile, to)| *to = tile * TILE * stride);
    k_offsets.iter_mut().zip(0..).for_each(|(to, step)| *to = step * 64);
    for (i, to) in rows.iter_mut().enumerate() {
        *to = if i < count { (part.rows.start + i) as u32 } else { SKIP };
    }
    let chunks = b.k_steps().div_ceil(part.chunk_steps);
    let mut sums = Sums::new(tile_count, part.panels.len(), chunks);
    for first_step in (0..b.k_steps()).step_by(part.chunk_steps) {
        let k = first_step..(first_step + part.chunk_steps).min(b.k_steps());
        let columns = k.start * K_STEP..(k.end * K_STEP).min(b.depth());
        for (to, row) in copy.chunks_exact_mut(stride / size_of::<bf16>()).zip(part.rows.clone()) {
            a.copy_row(row, columns.clone(), &mut to[..k.len() * K_STEP]);
        }
        let a = RowBlock { base: copy.as_ptr().cast(), row_stride: stride, tiles, k_offsets, rows };
        let chunk = Chunk { a, k };
        // SAFETY: tiles and steps lie inside the copy; the rest is the caller's.
        unsafe { multiply(tier, &chunk, b, part.panels.clone(), &mut sums, finish) };
    }
}
