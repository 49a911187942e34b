//! Attention when the scores are known to be moderate: one pass, no maximum.
//!
//! Softmax subtracts a row's maximum only to keep 2^x in range. By
//! Cauchy–Schwarz a score is at most `c·|q|·|k|`; where that bound stays below
//! [`LIMIT`] bits for a whole block of queries, 2^x neither overflows nor
//! underflows f32 or bf16 (same exponents) and the quotient `Σ2^x v / Σ2^x` is
//! the same number to the same relative precision. Above it, each query's scores
//! are lowered by what its bound exceeds [`LIMIT`] by: nothing can overflow, and
//! a row whose largest score turns out far below its bound is seen by its sum
//! ([`LEAST_SUM`]) and left to the path with a running maximum. What falls away: the pass
//! for the maximum, the rescaling of the sums, and the wait for a whole block of
//! scores, so that tile products and exponentials can overlap:
//!
//! ```text
//! chunk c (32 keys):  tiles    S(c+1) = Q·Kᵀ      one panel of O += P·V of the last block
//!                     vectors  P(c) = 2^(S(c)·scale), row sums
//! ```

use super::attention::{HeadTask, tiles_in};
use super::block::{BLOCK, BlockArgs, K_STEP, TILE, TILE_BYTES, multiply_block};
use super::softmax::{ChunkBlock, RowSums, exp_chunk};
use half::bf16;
use std::ops::Range;

/// Largest bound, in bits, under which 2^±x and sums of it times values are
/// away from the ends of the exponent range (2^±126).
pub(super) const LIMIT: f32 = 96.0;
/// Exponents below this count as this.
#[cfg(target_arch = "x86_64")]
pub(super) const FLOOR: f32 = -120.0;
/// Smallest sum of a lowered row, 2⁻⁸⁰: 2^[`FLOOR`] is nothing beside it.
pub(super) const LEAST_SUM: f32 = 1.0 / (1u128 << 80) as f32;
/// Chunks whose probabilities are multiplied by V at a time.
const BLOCK_CHUNKS: usize = 8;
/// Bytes from one row of probabilities to the next.
const P_STRIDE: usize = BLOCK_CHUNKS * K_STEP * size_of::<bf16>();
/// Bytes from one row of a chunk's scores to the next.
const S_STRIDE: usize = BLOCK * size_of::<f32>();
/// Bytes of the two score chunks and the two probability blocks.
pub(super) const STREAM_BYTES: usize = 2 * BLOCK * (S_STRIDE + P_STRIDE);

/// One query block's buffers for [`stream`].
pub(super) struct StreamBuffers<'a> {
    /// Queries, zero-padded to k-steps.
    pub queries: *const bf16,
    /// [`STREAM_BYTES`] of working memory.
    pub work: *mut u8,
    /// The output's sums so far.
    pub sums: *mut f32,
    /// Bits to subtract from each row's scores, if their bound asks for it.
    pub offsets: Option<&'a [f32; BLOCK]>,
}

/// Multiplies finished blocks of probabilities by V, a panel at a time.
struct Products<'a> {
    head: &'a HeadTask<'a>,
    values: *const u8,
    args: BlockArgs,
    /// The block of chunks at hand, relative to the first chunk.
    first_chunk: usize,
    chunks: usize,
    next_panel: usize,
    accumulate: bool,
}

/// Adds the keys `chunks` (in units of 32) to a block of queries.
///
/// # Safety
///
/// The thread holds the tier's session; `packed` are the head's keys and
/// values; the buffers are valid and exclusive; sums hold earlier keys' results
/// unless `is_first`.
pub(super) unsafe fn stream(
    head: &HeadTask,
    rows: Range<usize>,
    chunks: Range<usize>,
    (keys, values): (*const u8, *const u8),
    at: &StreamBuffers,
    (row_sums, is_first): (&mut RowSums, bool),
) {
    let depth = head.depth_steps();
    let query_stride = depth * K_STEP * size_of::<bf16>();
    let queries = at.queries.cast::<u8>();
    let score_args = BlockArgs {
        a: [queries, queries.wrapping_add(TILE * query_stride)],
        row_stride: query_stride,
        k_offsets: super::attention::K_OFFSETS.as_ptr(),
        k_steps: depth,
        b: keys,
        c: at.work.cast(),
        c_stride: S_STRIDE,
        prefetch: std::ptr::null(),
        accumulate: 0,
        prefetch_lines: 0,
        row_tiles: rows.len().div_ceil(TILE),
        column_tiles: 2,
    };
    let scores = |chunk: usize| at.work.wrapping_add(chunk % 2 * BLOCK * S_STRIDE).cast::<f32>();
    let probabilities = |chunk: usize| {
        let block = chunk / BLOCK_CHUNKS % 2;
        at.work.wrapping_add(2 * BLOCK * S_STRIDE + block * BLOCK * P_STRIDE)
    };
    let multiply_keys = |chunk: usize| {
        let b = keys.wrapping_add((chunks.start + chunk) * 2 * depth * TILE_BYTES);
        // SAFETY: operands are the packed keys and our buffers.
        unsafe { multiply_block(head.tier, &BlockArgs { b, c: scores(chunk), ..score_args }) };
    };
    let mut products = Products::new(head, values, score_args, (at.sums, is_first));
    multiply_keys(0);
    for chunk in 0..chunks.len() {
        if chunk + 1 < chunks.len() {
            multiply_keys(chunk + 1);
        }
        let first_key = (chunks.start + chunk) * K_STEP;
        let block = ChunkBlock {
            scores: scores(chunk),
            to: probabilities(chunk).wrapping_add(chunk % BLOCK_CHUNKS * K_STEP * size_of::<bf16>()).cast(),
            stride: P_STRIDE,
            rows: 0..rows.len().min(TILE),
            keys: (head.call.keys - first_key).min(K_STEP),
            causal: head.call.is_causal.then_some(rows.start as isize + 1 - first_key as isize),
            scale: head.scale_bits(),
            offsets: at.offsets,
        };
        // Tile work before each half: one half's instructions fit the reorder
        // buffer, so both tile bursts run behind exponentials.
        // SAFETY: the chunk's scores are complete; its probabilities are ours.
        unsafe {
            exp_chunk(head.tier, &block, row_sums);
            products.advance(chunks.start, BLOCK_CHUNKS);
            if rows.len() > TILE {
                exp_chunk(head.tier, &ChunkBlock { rows: TILE..rows.len(), ..block }, row_sums);
            }
        }
        let in_block = chunk % BLOCK_CHUNKS + 1;
        if in_block == BLOCK_CHUNKS || chunk + 1 == chunks.len() {
            // SAFETY: passed on from the caller.
            unsafe { products.advance(chunks.start, 1) };
            products.begin(probabilities(chunk), chunk + 1 - in_block, in_block);
        }
    }
    // SAFETY: passed on from the caller.
    unsafe { products.advance(chunks.start, 1) };
}

impl<'a> Products<'a> {
    fn new(
        head: &'a HeadTask<'a>,
        values: *const u8,
        args: BlockArgs,
        (sums, is_first): (*mut f32, bool),
    ) -> Products<'a> {
        let panels = head.value_tiles().div_ceil(2);
        let args =
            BlockArgs { row_stride: P_STRIDE, c: sums, c_stride: panels * BLOCK * size_of::<f32>(), ..args };
        Products { head, values, args, first_chunk: 0, chunks: 0, next_panel: panels, accumulate: !is_first }
    }

    /// Takes up a block of probabilities; the last one must be done.
    fn begin(&mut self, probabilities: *mut u8, first_chunk: usize, chunks: usize) {
        let first = probabilities.cast_const();
        self.args.a = [first, first.wrapping_add(TILE * P_STRIDE)];
        self.args.k_steps = chunks;
        self.args.accumulate = usize::from(self.accumulate);
        self.accumulate = true;
        (self.first_chunk, self.chunks, self.next_panel) = (first_chunk, chunks, 0);
    }

    /// Multiplies the share of panels that is due in one of `slots` chunks.
    ///
    /// # Safety
    ///
    /// As [`stream`].
    unsafe fn advance(&mut self, base_chunk: usize, slots: usize) {
        let tiles = self.head.value_tiles();
        let panels = tiles.div_ceil(2);
        let end = panels.min(self.next_panel + panels.div_ceil(slots));
        for panel in self.next_panel..end {
            let column_tiles = tiles_in(panel, tiles);
            let step = base_chunk + self.first_chunk;
            let at_tile = 2 * panel * self.head.key_steps() + step * column_tiles;
            let args = BlockArgs {
                b: self.values.wrapping_add(at_tile * TILE_BYTES),
                c: self.args.c.wrapping_add(panel * BLOCK),
                column_tiles,
                ..self.args
            };
            // SAFETY: operands are probabilities, packed values and the sums.
            unsafe { multiply_block(self.head.tier, &args) };
        }
        self.next_panel = end;
    }
}
