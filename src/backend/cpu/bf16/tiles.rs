//! The block driver: a block of rows times a range of weight panels.
//!
//! Loop order, outermost first: k-chunk → panel (32 columns) → k-segment → pair
//! of row tiles. A chunk's part of the row block stays in the second-level cache
//! for all panels (most products have one chunk); a panel's segment is read from
//! memory once and from the cache for every further pair. While a pair runs, its share of the next segment is
//! prefetched, so that weights arrive at memory speed behind the products. The
//! epilogue of a block runs one block late: its vector instructions then fill
//! the time in which the next block's tile products drain.

use super::Tier;
use super::block::{BLOCK, BlockArgs, TILE, TILE_BYTES, multiply_block};
use super::epilogue::{C_COLUMNS, Finish, FinishBlock};
use super::memory::{Scratch, Slot};
use super::pack::PackedB;
use std::ops::Range;

/// Bytes of operands that a core keeps close: half of a 2 MiB second level.
pub(super) const NEAR_BYTES: usize = 1 << 20;
/// Longest segment of a panel that is kept near, in k-steps (256 KiB).
const SEGMENT_STEPS: usize = 128;
/// f32 sums of one block.
const BLOCK_SUMS: usize = BLOCK * C_COLUMNS;

/// The A operand of a block of rows.
#[derive(Clone, Copy)]
pub(super) struct RowBlock<'a> {
    /// What the offsets count from.
    pub base: *const u8,
    /// Bytes from one row of a tile to the next.
    pub row_stride: usize,
    /// Byte offset of each tile's first row.
    pub tiles: &'a [usize],
    /// Byte offset of each k-step.
    pub k_offsets: &'a [u32],
    /// Output row of each tile row (16 a tile), or
    /// [`SKIP`](super::epilogue::SKIP).
    pub rows: &'a [u32],
}

/// f32 sums of a task's blocks: of two in flight, of all pairs of a panel whose
/// k is segmented, or of all panels if k comes in chunks.
pub(super) struct Sums {
    scratch: Scratch,
    is_chunked: bool,
}

impl Sums {
    /// Room for a row block of `tiles` tiles and `panels` panels.
    pub fn new(tiles: usize, panels: usize, chunks: usize) -> Sums {
        let pairs = tiles.div_ceil(2);
        let is_chunked = chunks > 1;
        let blocks = if is_chunked { pairs * panels } else { pairs.max(2) };
        let scratch = Scratch::take(Slot::Accumulators, blocks * BLOCK_SUMS * size_of::<f32>());
        Sums { scratch, is_chunked }
    }
}

/// One product's share of k: all of it, or one of several chunks in turn.
pub(super) struct Chunk<'a> {
    /// The chunk's operand: its k-steps count from the chunk's first.
    pub a: RowBlock<'a>,
    /// k-steps of the weights.
    pub k: Range<usize>,
}

/// One block whose sums wait for their epilogue.
struct Pending {
    slot: usize,
    pair: usize,
    panel: usize,
}

/// Multiplies one chunk of a row block by a range of panels, and finishes the
/// results after the last chunk.
///
/// # Safety
///
/// The tier is available and the thread holds its tile session; every tile row
/// and k-step of `a` is readable; no other task writes these rows and columns.
/// Chunks come in order with the same `sums`, rows and panels.
pub(super) unsafe fn multiply(
    tier: Tier,
    chunk: &Chunk,
    b: &PackedB,
    panels: Range<usize>,
    sums: &mut Sums,
    finish: &Finish,
) {
    let a = &chunk.a;
    let pairs = a.tiles.len().div_ceil(2);
    let segment = segment_steps(pairs, chunk.k.len());
    let is_kept = segment < chunk.k.len();
    let is_chunked = sums.is_chunked;
    let sums = sums.scratch.as_mut_slice::<f32>();
    let mut pending: Option<Pending> = None;
    let mut count = 0;
    for panel in panels.clone() {
        for first_step in chunk.k.clone().step_by(segment) {
            let k = first_step..(first_step + segment).min(chunk.k.end);
            let is_last = k.end == b.k_steps();
            let ahead = Ahead::new(b, (panel, &k), (&panels, &chunk.k), pairs);
            for pair in 0..pairs {
                let slot = match (is_chunked, is_kept) {
                    (true, _) => (panel - panels.start) * pairs + pair,
                    (false, true) => pair,
                    (false, false) => count % 2,
                };
                count += 1;
                let first = k.start - chunk.k.start;
                let args = block_args(a, first..k.end - chunk.k.start, pair, &mut sums[slot * BLOCK_SUMS..]);
                let args = BlockArgs {
                    b: b.tiles_at(panel, k.start).as_ptr(),
                    accumulate: usize::from(k.start > 0),
                    column_tiles: b.tiles_in(panel),
                    ..ahead.apply(pair, args)
                };
                // SAFETY: operands from the caller; the slot's sums are ours.
                unsafe { multiply_block(tier, &args) };
                if is_last {
                    let done = pending.replace(Pending { slot, pair, panel });
                    // SAFETY: passed on from the caller.
                    unsafe { finish_block(tier, a, b, (sums, done), finish) };
                }
            }
        }
    }
    // SAFETY: passed on from the caller.
    unsafe { finish_block(tier, a, b, (sums, pending), finish) };
}

/// k-steps to run before the next pair of row tiles.
fn segment_steps(pairs: usize, steps: usize) -> usize {
    if pairs < 4 || steps <= SEGMENT_STEPS + SEGMENT_STEPS / 4 {
        return steps;
    }
    steps.div_ceil(steps.div_ceil(SEGMENT_STEPS))
}

/// A block's arguments but for B.
fn block_args(a: &RowBlock, k: Range<usize>, pair: usize, sums: &mut [f32]) -> BlockArgs {
    let tiles = &a.tiles[2 * pair..a.tiles.len().min(2 * pair + 2)];
    let first = a.base.wrapping_add(tiles[0]);
    BlockArgs {
        a: [first, tiles.get(1).map_or(first, |&t| a.base.wrapping_add(t))],
        row_stride: a.row_stride,
        k_offsets: a.k_offsets[k.clone()].as_ptr(),
        k_steps: k.len(),
        b: std::ptr::null(),
        c: sums[..BLOCK_SUMS].as_mut_ptr(),
        c_stride: C_COLUMNS * size_of::<f32>(),
        prefetch: std::ptr::null(),
        accumulate: 0,
        prefetch_lines: 0,
        row_tiles: tiles.len(),
        column_tiles: 0,
    }
}

/// # Safety
///
/// As [`multiply`].
unsafe fn finish_block(
    tier: Tier,
    a: &RowBlock,
    b: &PackedB,
    (sums, done): (&[f32], Option<Pending>),
    finish: &Finish,
) {
    let Some(done) = done else { return };
    let rows = &a.rows[done.pair * BLOCK..a.rows.len().min((done.pair + 1) * BLOCK)];
    let (first, width) = b.columns_in(done.panel);
    let block = FinishBlock {
        sums: sums[done.slot * BLOCK_SUMS..][..BLOCK_SUMS].as_ptr(),
        rows,
        columns: first..first + width,
    };
    // SAFETY: sums hold 32 rows; rows and columns are the caller's.
    unsafe { finish.run(tier, &block) };
}

/// The weights that come after the current segment, to be fetched behind it.
struct Ahead {
    start: *const u8,
    bytes: usize,
    lines: usize,
    share: usize,
}

impl Ahead {
    /// What follows segment `k` of `panel` in the order of [`multiply`].
    fn new(
        b: &PackedB,
        (panel, k): (usize, &Range<usize>),
        (panels, chunk): (&Range<usize>, &Range<usize>),
        pairs: usize,
    ) -> Ahead {
        let (next_panel, next_step) = if k.end < chunk.end {
            (panel, k.end)
        } else if panel + 1 < panels.end {
            (panel + 1, chunk.start)
        } else {
            (panels.start, chunk.end)
        };
        if next_step >= b.k_steps() || b.size_bytes() <= NEAR_BYTES / 2 {
            return Ahead { start: std::ptr::null(), bytes: 0, lines: 0, share: 0 };
        }
        let steps = k.len().min(b.k_steps() - next_step);
        let bytes = steps * b.tiles_in(next_panel) * TILE_BYTES;
        let lines = match pairs {
            0..4 => 32,
            4..16 => 8,
            _ => 2,
        };
        Ahead { start: b.tiles_at(next_panel, next_step).as_ptr(), bytes, lines, share: k.len() * lines * 64 }
    }

    fn apply(&self, pair: usize, args: BlockArgs) -> BlockArgs {
        let from = pair * self.share;
        if from >= self.bytes {
            return args;
        }
        BlockArgs { prefetch: self.start.wrapping_add(from), prefetch_lines: self.lines, ..args }
    }
}

/// Offset tables in scratch memory: tiles, rows, k-steps.
pub(super) struct Tables {
    scratch: Scratch,
    tiles: usize,
    k_steps: usize,
}

impl Tables {
    /// Room for `tiles` row tiles and `k_steps` steps.
    pub fn new(tiles: usize, k_steps: usize) -> Tables {
        let bytes = tiles * (size_of::<usize>() + TILE * size_of::<u32>()) + k_steps * size_of::<u32>();
        Tables { scratch: Scratch::take(Slot::Tables, bytes), tiles, k_steps }
    }

    /// Tile offsets, output rows, k-step offsets; contents are stale.
    pub fn split(&mut self) -> (&mut [usize], &mut [u32], &mut [u32]) {
        let bytes = self.scratch.as_mut_slice::<u8>();
        let (tiles, rest) = bytes.split_at_mut(self.tiles * size_of::<usize>());
        let (rows, rest) = rest.split_at_mut(self.tiles * TILE * size_of::<u32>());
        let k_offsets = &mut rest[..self.k_steps * size_of::<u32>()];
        (bytemuck::cast_slice_mut(tiles), bytemuck::cast_slice_mut(rows), bytemuck::cast_slice_mut(k_offsets))
    }
}
