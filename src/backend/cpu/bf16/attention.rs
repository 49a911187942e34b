//! Attention with online softmax: `softmax(scale · Q Kᵀ) V` per sample and head.
//!
//! A task takes one head (or a part of its queries): it packs the head's keys
//! and values to tile order in its own scratch memory, then walks blocks of 32
//! queries over blocks of keys:
//!
//! ```text
//! S = Q · Kᵀ           tiles, 32 × BLOCK_KEYS sums in f32
//! m', P, l, α          row maximum, P = 2^(S·c − m'), row sum, α = 2^(m − m')
//! O = α · O + P · V    tiles, O in f32, P in bf16 written over S
//! ```
//!
//! and divides O by l at the end (Milakov & Gimelshein 2018; Dao et al. 2022).
//! P is at most 1 and rounded to bf16, as O's other factor is; m, l and O are
//! f32. Keys and values that exceed the second-level cache are shared by eight
//! query blocks at a time.

use super::attention_stream::{LEAST_SUM, LIMIT, STREAM_BYTES, StreamBuffers, stream};
use super::block::{BLOCK, BlockArgs, K_STEP, TILE, TILE_BYTES, TileSession, multiply_block};
use super::memory::{Scratch, Slot};
use super::pack::interleave_pairs;
use super::parallel::run_tasks;
use super::softmax::{RowSums, SoftmaxBlock, State, normalize, softmax_block, squared_norm};
use super::tiles::NEAR_BYTES;
use super::{KernelError, Tier};
use half::bf16;
use std::ops::Range;

/// Keys of a block of scores.
const BLOCK_KEYS: usize = 256;
/// Query blocks that share a block of keys read from far memory.
const FAR_GROUP: usize = 8;

/// Heads inside the rows of a matrix: head h of token s of sample b starts at
/// `(b · tokens + s) · stride + offset + h · head_dim`.
#[derive(Clone, Copy)]
pub struct Heads<'a> {
    /// Values.
    pub data: &'a [bf16],
    /// Values from one token to the next.
    pub stride: usize,
    /// Column of the first head, e.g. inside a fused QKV matrix.
    pub offset: usize,
}

/// The operands of an attention call.
#[derive(Clone, Copy)]
pub struct Attention<'a> {
    /// Samples.
    pub batch: usize,
    /// Heads of a sample.
    pub heads: usize,
    /// Values of a head.
    pub head_dim: usize,
    /// Queries of a sample.
    pub queries: usize,
    /// Keys (and values) of a sample.
    pub keys: usize,
    /// Queries.
    pub q: Heads<'a>,
    /// Keys.
    pub k: Heads<'a>,
    /// Values.
    pub v: Heads<'a>,
    /// Factor on the scores, positive.
    pub scale: f32,
    /// Query i sees keys 0 ..= i only.
    pub is_causal: bool,
}

impl Attention<'_> {
    fn check(&self, out: &[bf16], out_stride: usize) -> Result<(), KernelError> {
        let width = self.heads * self.head_dim;
        let part = |what, heads: Heads, tokens: usize| {
            let rows = self.batch * tokens;
            let used = heads.offset + width;
            KernelError::check(what, heads.stride >= used || rows <= 1, heads.stride, used)?;
            let needed = if rows == 0 { 0 } else { (rows - 1) * heads.stride + used };
            KernelError::check(what, heads.data.len() >= needed, heads.data.len(), needed)
        };
        part("attention queries", self.q, self.queries)?;
        part("attention keys", self.k, self.keys)?;
        part("attention values", self.v, self.keys)?;
        part("attention output", Heads { data: out, stride: out_stride, offset: 0 }, self.queries)?;
        KernelError::check("attention head size", self.head_dim > 0, self.head_dim, 1)?;
        let limit = K_OFFSETS.len() * K_STEP;
        KernelError::check("attention head size limit", self.head_dim <= limit, limit, self.head_dim)?;
        KernelError::check("attention keys", self.keys > 0, self.keys, 1)?;
        if self.scale > 0.0 { Ok(()) } else { Err(KernelError::Scale { scale: self.scale }) }
    }
}

/// An output that tasks write disjoint heads and queries of.
#[derive(Clone, Copy)]
struct SharedOutput {
    data: *mut bf16,
    stride: usize,
}

// SAFETY: tasks write disjoint parts of the exclusive slice it came from.
unsafe impl Send for SharedOutput {}
// SAFETY: as above.
unsafe impl Sync for SharedOutput {}

/// Attention on the current rayon pool, into `[batch, queries, heads · head_dim]`
/// rows `out_stride` values apart.
///
/// # Errors
///
/// If a slice or stride is too small, there are no keys, or the scale is not
/// positive.
pub fn attention(
    tier: Tier,
    call: &Attention,
    out: &mut [bf16],
    out_stride: usize,
) -> Result<(), KernelError> {
    if call.queries == 0 || call.batch == 0 || call.heads == 0 {
        return Ok(());
    }
    call.check(out, out_stride)?;
    let tier = tier.or_available();
    let out = SharedOutput { data: out.as_mut_ptr(), stride: out_stride };
    let heads = call.batch * call.heads;
    let threads = rayon::current_num_threads();
    let is_even = heads.is_multiple_of(threads) || heads >= 4 * threads;
    let parts = if is_even { 1 } else { threads.min(call.queries.div_ceil(BLOCK)) };
    let width = call.queries.div_ceil(parts).next_multiple_of(BLOCK);
    run_tasks(heads * parts, |i| {
        let first = (i % parts * width).min(call.queries);
        let queries = first..(first + width).min(call.queries);
        let (head, mut keys, mut values) = HeadTask::new(tier, call, i / parts);
        let packed = (keys.as_mut_slice().as_ptr(), values.as_mut_slice().as_ptr());
        let _session = TileSession::new(tier);
        // SAFETY: the tier is available and its session held; heads and query
        // ranges do not overlap.
        unsafe { head.run(queries, packed, out) };
    });
    Ok(())
}

/// One head of one sample.
pub(super) struct HeadTask<'a> {
    pub tier: Tier,
    pub call: &'a Attention<'a>,
    sample: usize,
    head: usize,
    /// Largest |k|² of the head.
    key_norm: f32,
}

/// Column tiles of a panel of `tiles` tiles in all.
pub(super) fn tiles_in(panel: usize, tiles: usize) -> usize {
    (tiles - 2 * panel).min(2)
}

impl<'a> HeadTask<'a> {
    fn new(tier: Tier, call: &'a Attention<'a>, index: usize) -> (HeadTask<'a>, Scratch, Scratch) {
        let key_tiles = 2 * call.keys.div_ceil(K_STEP) * call.head_dim.div_ceil(K_STEP);
        let value_tiles = call.keys.div_ceil(K_STEP) * call.head_dim.div_ceil(TILE);
        let mut keys = Scratch::take(Slot::Keys, key_tiles * TILE_BYTES);
        let mut values = Scratch::take(Slot::Values, value_tiles * TILE_BYTES);
        let (sample, head) = (index / call.heads, index % call.heads);
        let mut head = HeadTask { tier, call, sample, head, key_norm: 0.0 };
        head.key_norm = head.largest_norm(call.k, call.keys, 0..call.keys);
        head.pack_keys(keys.as_mut_slice());
        head.pack_values(bytemuck::cast_slice_mut(values.as_mut_slice::<bf16>()));
        (head, keys, values)
    }

    pub(super) fn depth_steps(&self) -> usize {
        self.call.head_dim.div_ceil(K_STEP)
    }

    pub(super) fn value_tiles(&self) -> usize {
        self.call.head_dim.div_ceil(TILE)
    }

    pub(super) fn key_steps(&self) -> usize {
        self.call.keys.div_ceil(K_STEP)
    }

    fn row(&self, from: Heads<'a>, tokens: usize, token: usize) -> &'a [bf16] {
        let start =
            (self.sample * tokens + token) * from.stride + from.offset + self.head * self.call.head_dim;
        &from.data[start..start + self.call.head_dim]
    }

    /// The scale with log₂e: scores in bits.
    pub(super) fn scale_bits(&self) -> f32 {
        self.call.scale * std::f32::consts::LOG2_E
    }

    /// Largest squared norm of some tokens' vectors; NaN if one has NaN.
    fn largest_norm(&self, from: Heads<'a>, tokens: usize, range: Range<usize>) -> f32 {
        let mut largest = 0f32;
        for token in range {
            let norm = squared_norm(self.tier, self.row(from, tokens, token));
            largest = if norm <= largest { largest } else { norm };
        }
        largest
    }

    /// Keys as the B operand of Q·Kᵀ: panels of 32 keys, steps over the depth.
    fn pack_keys(&self, out: &mut [bf16]) {
        let steps = self.depth_steps();
        let tile_values = TILE_BYTES / size_of::<bf16>();
        let tiles = 2 * self.key_steps();
        let mut stage = [bf16::ZERO; TILE * K_STEP];
        for tile in 0..tiles {
            for step in 0..steps {
                for (r, to) in stage.chunks_exact_mut(K_STEP).enumerate() {
                    let token = tile * TILE + r;
                    let columns = step * K_STEP..((step + 1) * K_STEP).min(self.call.head_dim);
                    let used = if token < self.call.keys { columns.len() } else { 0 };
                    if used > 0 {
                        to[..used].copy_from_slice(&self.row(self.call.k, self.call.keys, token)[columns]);
                    }
                    to[used..].fill(bf16::ZERO);
                }
                let at = (tile / 2 * steps + step) * 2 + tile % 2;
                interleave_pairs(&stage, &mut out[at * tile_values..][..tile_values]);
            }
        }
    }

    /// Values as the B operand of P·V: panels of 32 columns, steps over keys.
    fn pack_values(&self, out: &mut [[[bf16; 2]; TILE]]) {
        let tiles = self.value_tiles();
        let steps = self.key_steps();
        for pair in 0..steps * TILE {
            let row = |token: usize| {
                let is_real = token < self.call.keys;
                if is_real { self.row(self.call.v, self.call.keys, token) } else { &[] }
            };
            let (low, high) = (row(2 * pair), row(2 * pair + 1));
            for tile in 0..tiles {
                let (panel, step) = (tile / 2, pair / TILE);
                let at = 2 * panel * steps + step * tiles_in(panel, tiles) + tile % 2;
                let to = &mut out[at * TILE + pair % TILE];
                for (column, to) in (tile * TILE..).zip(to) {
                    let get = |row: &[bf16]| row.get(column).copied().unwrap_or(bf16::ZERO);
                    *to = [get(low), get(high)];
                }
            }
        }
    }

    /// # Safety
    ///
    /// The thread holds the tier's session; `packed` are this head's keys and
    /// values; no other task has these queries of this head.
    unsafe fn run(&self, queries: Range<usize>, packed: (*const u8, *const u8), out: SharedOutput) {
        let far = (self.depth_steps() * 2 + self.value_tiles()) * self.key_steps() * TILE_BYTES;
        let group = if far > NEAR_BYTES { FAR_GROUP } else { 1 };
        let layout = Layout::new(self.call.head_dim, group);
        let mut scratch = Scratch::take(Slot::Scores, layout.bytes);
        let base = scratch.as_mut_slice::<u8>().as_mut_ptr();
        let mut is_loose = false;
        for first in queries.clone().step_by(group * BLOCK) {
            let blocks = (queries.end - first).div_ceil(BLOCK).min(group);
            let end = queries.end.min(first + blocks * BLOCK);
            let block = &|i: usize| first + i * BLOCK..(first + (i + 1) * BLOCK).min(end);
            for i in 0..blocks {
                // SAFETY: the layout has room for `group` blocks.
                unsafe { self.copy_queries(block(i), layout.queries(base, i)) };
            }
            let last_key = if self.call.is_causal { end.min(self.call.keys) } else { self.call.keys };
            let pass = Pass { layout: &layout, base, packed, last_key, is_far: group > 1 };
            // SAFETY: passed on from the caller.
            unsafe {
                // A head whose bound was too loose once is not tried again.
                is_loose = is_loose || !self.run_bounded(&pass, blocks, block);
                if is_loose {
                    self.run_online(&pass, blocks, block);
                }
            }
            for i in 0..blocks {
                let rows = block(i);
                // SAFETY: the layout has totals for `group` blocks.
                let totals = unsafe { &*layout.totals(base, i) };
                let start = self.sample * self.call.queries + rows.start;
                let to = out.data.wrapping_add(start * out.stride + self.head * self.call.head_dim);
                let size = [rows.len(), self.call.head_dim];
                let from = (layout.sums(base, i).cast_const(), layout.sum_columns);
                // SAFETY: the sums are complete; the output rows are ours.
                unsafe { normalize(self.tier, totals, size, from, (to, out.stride)) };
            }
        }
    }

    /// Bits by which each query's score bound exceeds the limit, rounded up.
    fn offsets(&self, rows: Range<usize>) -> [f32; BLOCK] {
        let mut offsets = [0.0; BLOCK];
        for (query, offset) in rows.zip(&mut offsets) {
            let norm = squared_norm(self.tier, self.row(self.call.q, self.call.queries, query));
            let excess = self.scale_bits() * (self.key_norm * norm).sqrt() - LIMIT;
            *offset = if excess <= 0.0 { 0.0 } else { excess.ceil() };
        }
        offsets
    }

    /// All keys for a group of query blocks without a running maximum; whether
    /// the sums came out in range.
    ///
    /// # Safety
    ///
    /// As [`HeadTask::run`].
    unsafe fn run_bounded(&self, pass: &Pass, blocks: usize, block: impl Fn(usize) -> Range<usize>) -> bool {
        let mut offsets = [[0.0; BLOCK]; FAR_GROUP];
        for (i, offsets) in offsets[..blocks].iter_mut().enumerate() {
            *offsets = self.offsets(block(i));
            if !offsets.iter().all(|offset| offset.is_finite()) {
                return false;
            }
            // SAFETY: the layout has row sums for `group` blocks.
            unsafe { pass.layout.row_sums(pass.base, i).write_bytes(0, 1) };
        }
        let chunks = pass.last_key.div_ceil(K_STEP);
        let stretch = if pass.is_far { BLOCK_KEYS / K_STEP } else { chunks };
        for first in (0..chunks).step_by(stretch) {
            for (i, offsets) in offsets[..blocks].iter().enumerate() {
                let at = StreamBuffers {
                    queries: pass.layout.queries(pass.base, i).cast_const(),
                    work: pass.layout.scores(pass.base).cast(),
                    sums: pass.layout.sums(pass.base, i),
                    offsets: offsets.iter().any(|&offset| offset > 0.0).then_some(offsets),
                };
                let range = first..(first + stretch).min(chunks);
                // SAFETY: passed on from the caller; buffers are the layout's.
                unsafe {
                    let sums = &mut *pass.layout.row_sums(pass.base, i);
                    stream(self, block(i), range, pass.packed, &at, (sums, first == 0));
                }
            }
        }
        let mut is_in_range = true;
        for (i, offsets) in offsets[..blocks].iter().enumerate() {
            // SAFETY: as above.
            let totals = unsafe { &mut *pass.layout.totals(pass.base, i) };
            // SAFETY: as above.
            *totals = unsafe { (*pass.layout.row_sums(pass.base, i)).totals(self.tier) };
            let rows = block(i).len();
            is_in_range &= offsets.iter().zip(&totals[..rows]).all(|(&o, &t)| o == 0.0 || t >= LEAST_SUM);
        }
        is_in_range
    }

    /// All keys for a group of query blocks, with the running maximum.
    ///
    /// # Safety
    ///
    /// As [`HeadTask::run`].
    unsafe fn run_online(&self, pass: &Pass, blocks: usize, block: impl Fn(usize) -> Range<usize>) {
        let mut states = [State::START; FAR_GROUP];
        for key in (0..pass.last_key).step_by(BLOCK_KEYS) {
            let keys = key..(key + BLOCK_KEYS).min(self.call.keys);
            for (i, state) in states[..blocks].iter_mut().enumerate() {
                let at = Buffers {
                    queries: pass.layout.queries(pass.base, i),
                    scores: pass.layout.scores(pass.base),
                    sums: pass.layout.sums(pass.base, i),
                };
                // SAFETY: passed on from the caller; buffers are the layout's.
                unsafe { self.step(block(i), keys.clone(), &at, (pass.packed, state)) };
            }
        }
        for (i, state) in states[..blocks].iter().enumerate() {
            // SAFETY: the layout has totals for `group` blocks.
            unsafe { *pass.layout.totals(pass.base, i) = state.sum };
        }
    }

    /// Copies 32 queries, zero-padded.
    ///
    /// # Safety
    ///
    /// `to` has room for 32 rows of the padded depth.
    unsafe fn copy_queries(&self, rows: Range<usize>, to: *mut bf16) {
        let width = self.depth_steps() * K_STEP;
        // SAFETY: the caller's promise.
        let to = unsafe { std::slice::from_raw_parts_mut(to, BLOCK * width) };
        for (i, to) in to.chunks_exact_mut(width).enumerate() {
            let used = if i < rows.len() { self.call.head_dim } else { 0 };
            if used > 0 {
                to[..used].copy_from_slice(self.row(self.call.q, self.call.queries, rows.start + i));
            }
            to[used..].fill(bf16::ZERO);
        }
    }

    /// One block of queries against one block of keys.
    ///
    /// # Safety
    ///
    /// As [`HeadTask::run`]; the buffers are the layout's.
    unsafe fn step(
        &self,
        rows: Range<usize>,
        keys: Range<usize>,
        at: &Buffers,
        ((packed_keys, packed_values), state): ((*const u8, *const u8), &mut State),
    ) {
        let row_tiles = rows.len().div_ceil(TILE);
        let depth = self.depth_steps();
        let query_stride = depth * K_STEP * size_of::<bf16>();
        let scores = BlockArgs {
            a: [at.queries.cast(), at.queries.cast::<u8>().wrapping_add(TILE * query_stride).cast_const()],
            row_stride: query_stride,
            k_offsets: K_OFFSETS.as_ptr(),
            k_steps: depth,
            b: packed_keys,
            c: at.scores,
            c_stride: SCORE_STRIDE,
            prefetch: std::ptr::null(),
            accumulate: 0,
            prefetch_lines: 0,
            row_tiles,
            column_tiles: 2,
        };
        for panel in keys.start / BLOCK..keys.end.div_ceil(BLOCK) {
            let b = packed_keys.wrapping_add(panel * 2 * depth * TILE_BYTES);
            let c = at.scores.wrapping_add(panel * BLOCK - keys.start);
            // SAFETY: operands are the packed keys and the block's buffers.
            unsafe { multiply_block(self.tier, &BlockArgs { b, c, ..scores }) };
        }
        let block = SoftmaxBlock {
            scores: at.scores,
            stride: SCORE_STRIDE,
            rows: rows.len(),
            keys: keys.len(),
            causal: self.call.is_causal.then_some(rows.start as isize + 1 - keys.start as isize),
            scale: self.scale_bits(),
        };
        let tiles = self.value_tiles();
        let sum_columns = tiles.div_ceil(2) * BLOCK;
        let is_first = keys.start == 0;
        // SAFETY: scores of these rows are complete; sums have that stride.
        unsafe { softmax_block(self.tier, &block, state, (at.sums, if is_first { 0 } else { sum_columns })) };
        let probabilities = at.scores.cast::<u8>().cast_const();
        let step = keys.start / K_STEP;
        for panel in 0..tiles.div_ceil(2) {
            let column_tiles = tiles_in(panel, tiles);
            let at_tile = 2 * panel * self.key_steps() + step * column_tiles;
            let args = BlockArgs {
                a: [probabilities, probabilities.wrapping_add(TILE * SCORE_STRIDE)],
                row_stride: SCORE_STRIDE,
                k_steps: keys.len().div_ceil(K_STEP),
                b: packed_values.wrapping_add(at_tile * TILE_BYTES),
                c: at.sums.wrapping_add(panel * BLOCK),
                c_stride: sum_columns * size_of::<f32>(),
                accumulate: usize::from(!is_first),
                column_tiles,
                ..scores
            };
            // SAFETY: operands are the probabilities, packed values and sums.
            unsafe { multiply_block(self.tier, &args) };
        }
    }
}

/// Bytes from one row of scores (or of the probabilities over them) to the next.
const SCORE_STRIDE: usize = BLOCK_KEYS * size_of::<f32>();

/// Bytes of scores and probabilities on either path.
const WORK_BYTES: usize =
    if BLOCK * SCORE_STRIDE > STREAM_BYTES { BLOCK * SCORE_STRIDE } else { STREAM_BYTES };

/// Offsets of consecutive k-steps in a row of values.
pub(super) static K_OFFSETS: [u32; 64] = {
    let mut offsets = [0; 64];
    let mut step = 0;
    while step < 64 {
        offsets[step] = step as u32 * 64;
        step += 1;
    }
    offsets
};

/// What a pass over the keys works with.
struct Pass<'a> {
    layout: &'a Layout,
    base: *mut u8,
    packed: (*const u8, *const u8),
    last_key: usize,
    is_far: bool,
}

/// One query block's scratch.
struct Buffers {
    queries: *mut bf16,
    scores: *mut f32,
    sums: *mut f32,
}

/// Where scores, queries and sums lie in scratch memory.
struct Layout {
    query_bytes: usize,
    sum_columns: usize,
    group: usize,
    bytes: usize,
}

impl Layout {
    fn new(head_dim: usize, group: usize) -> Layout {
        let query_bytes = BLOCK * head_dim.next_multiple_of(K_STEP) * size_of::<bf16>();
        let sum_columns = head_dim.next_multiple_of(BLOCK);
        let sum_bytes = BLOCK * sum_columns * size_of::<f32>();
        let row_bytes = size_of::<RowSums>() + BLOCK * size_of::<f32>();
        let bytes = WORK_BYTES + group * (query_bytes + sum_bytes + row_bytes);
        Layout { query_bytes, sum_columns, group, bytes }
    }

    fn scores(&self, base: *mut u8) -> *mut f32 {
        base.cast()
    }

    fn queries(&self, base: *mut u8, block: usize) -> *mut bf16 {
        base.wrapping_add(WORK_BYTES + block * self.query_bytes).cast()
    }

    fn sums(&self, base: *mut u8, block: usize) -> *mut f32 {
        let start = WORK_BYTES + self.group * self.query_bytes;
        base.wrapping_add(start + block * BLOCK * self.sum_columns * size_of::<f32>()).cast()
    }

    fn row_sums(&self, base: *mut u8, block: usize) -> *mut RowSums {
        self.sums(base, self.group).cast::<RowSums>().wrapping_add(block)
    }

    fn totals(&self, base: *mut u8, block: usize) -> *mut [f32; BLOCK] {
        self.row_sums(base, self.group).cast::<[f32; BLOCK]>().wrapping_add(block)
    }
}
