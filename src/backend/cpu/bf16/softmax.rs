//! The online softmax of attention: state, and the seam to the tiers.

use super::Tier;
use super::block::BLOCK;
use half::bf16;
use std::ops::Range;

/// Running maximum (in base 2) and sum of each query row of a block.
#[derive(Clone, Copy)]
pub(super) struct State {
    pub max: [f32; BLOCK],
    pub sum: [f32; BLOCK],
}

impl State {
    /// No key seen yet.
    pub const START: State = State { max: [f32::NEG_INFINITY; BLOCK], sum: [0.0; BLOCK] };
}

/// A block of scores that turns into probabilities in place: row r's bf16
/// probabilities overwrite the first half of its f32 scores.
pub(super) struct SoftmaxBlock {
    pub scores: *mut f32,
    /// Bytes from one row to the next.
    pub stride: usize,
    pub rows: usize,
    /// Keys of the block; probabilities up to the next multiple of 32 are zero.
    pub keys: usize,
    /// With causal masking, keys that row 0 sees (negative if the block lies
    /// ahead of it); each further row sees one more.
    pub causal: Option<isize>,
    /// Factor on the scores, log₂e included.
    pub scale: f32,
}

impl SoftmaxBlock {
    /// Keys that a row sees.
    #[inline(always)]
    pub fn limit(&self, row: usize) -> usize {
        match self.causal {
            None => self.keys,
            Some(first) => (first + row as isize).clamp(0, self.keys as isize) as usize,
        }
    }
}

/// Scores → probabilities; updates the state and scales `sums`' rows
/// (`columns` wide, 0 if there are none yet) by the change of the maximum.
///
/// # Safety
///
/// The tier is available; the block's rows are valid up to a multiple of 32
/// keys, the sums for its rows and columns.
#[inline(always)]
pub(super) unsafe fn softmax_block(
    tier: Tier,
    block: &SoftmaxBlock,
    state: &mut State,
    (sums, columns): (*mut f32, usize),
) {
    match tier {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: passed on from the caller.
        Tier::Amx | Tier::Avx512Bf16 => unsafe {
            super::avx512_softmax::softmax_block(block, state, (sums, columns));
        },
        // SAFETY: passed on from the caller.
        _ => unsafe { softmax_portable(block, state, (sums, columns)) },
    }
}

/// Σx².
pub(super) fn squared_norm(tier: Tier, values: &[bf16]) -> f32 {
    match tier {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the tier is available.
        Tier::Amx | Tier::Avx512Bf16 => unsafe { super::avx512_softmax::squared_norm(values) },
        _ => values.iter().map(|v| v.to_f32() * v.to_f32()).sum(),
    }
}

/// Sums of a row's probabilities, in 16 lanes.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct RowSums(pub [[f32; 16]; BLOCK]);

impl RowSums {
    /// The lanes' total for each row.
    pub fn totals(&self, tier: Tier) -> [f32; BLOCK] {
        match tier {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the tier is available.
            Tier::Amx | Tier::Avx512Bf16 => unsafe { super::avx512_softmax::row_totals(self) },
            _ => self.0.map(|lanes| lanes.iter().sum()),
        }
    }
}

/// A chunk of 32 keys' scores whose exponentials need no maximum.
pub(super) struct ChunkBlock<'a> {
    /// 32 scores a row, rows dense.
    pub scores: *const f32,
    /// 32 probabilities a row.
    pub to: *mut bf16,
    /// Bytes from one row of probabilities to the next.
    pub stride: usize,
    /// Rows to take.
    pub rows: Range<usize>,
    /// Keys that exist; probabilities behind them are zero.
    pub keys: usize,
    /// As in [`SoftmaxBlock`].
    pub causal: Option<isize>,
    /// Factor on the scores, log₂e included.
    pub scale: f32,
    /// Bits to subtract from each row's scaled scores, if any needs it.
    pub offsets: Option<&'a [f32; BLOCK]>,
}

impl ChunkBlock<'_> {
    /// Keys that a row sees.
    #[inline(always)]
    pub fn limit(&self, row: usize) -> usize {
        match self.causal {
            None => self.keys,
            Some(first) => (first + row as isize).clamp(0, self.keys as isize) as usize,
        }
    }
}

/// `to = 2^(scores · scale − offset)`; adds to the row sums.
///
/// # Safety
///
/// The tier is available; scores and probabilities are valid for the rows.
#[inline(always)]
pub(super) unsafe fn exp_chunk(tier: Tier, block: &ChunkBlock, sums: &mut RowSums) {
    match tier {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: passed on from the caller.
        Tier::Amx | Tier::Avx512Bf16 => unsafe { super::avx512_softmax::exp_chunk(block, sums) },
        // SAFETY: passed on from the caller.
        _ => unsafe { exp_chunk_portable(block, sums) },
    }
}

/// # Safety
///
/// As [`exp_chunk`].
unsafe fn exp_chunk_portable(block: &ChunkBlock, sums: &mut RowSums) {
    for row in block.rows.clone() {
        let limit = block.limit(row);
        for i in 0..BLOCK {
            // SAFETY: inside the row of scores and of probabilities.
            unsafe {
                let offset = block.offsets.map_or(0.0, |offsets| offsets[row]);
                let score = *block.scores.add(row * BLOCK + i) * block.scale - offset;
                let p = if i < limit { score.exp2() } else { 0.0 };
                sums.0[row][i % 16] += p;
                *block.to.cast::<u8>().add(row * block.stride).cast::<bf16>().add(i) = bf16::from_f32(p);
            }
        }
    }
}

/// Divides rows of sums by their totals and rounds them into the output.
///
/// # Safety
///
/// `from` and `to` are valid for `rows` rows of `columns` values at their
/// strides (in values); `to` is exclusive.
pub(super) unsafe fn normalize(
    tier: Tier,
    totals: &[f32; BLOCK],
    [rows, columns]: [usize; 2],
    (from, from_stride): (*const f32, usize),
    (to, to_stride): (*mut bf16, usize),
) {
    for (row, sum) in totals.iter().enumerate().take(rows) {
        let factor = 1.0 / sum;
        // SAFETY: the caller's promise.
        let (from, to) = unsafe {
            (
                std::slice::from_raw_parts(from.add(row * from_stride), columns),
                std::slice::from_raw_parts_mut(to.add(row * to_stride), columns),
            )
        };
        match tier {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the tier is available.
            Tier::Amx | Tier::Avx512Bf16 => unsafe { super::avx512_softmax::scale_row(from, factor, to) },
            _ => {
                for (to, from) in to.iter_mut().zip(from) {
                    *to = bf16::from_f32(from * factor);
                }
            }
        }
    }
}

/// # Safety
///
/// As [`softmax_block`].
unsafe fn softmax_portable(block: &SoftmaxBlock, state: &mut State, (sums, columns): (*mut f32, usize)) {
    let padded = block.keys.next_multiple_of(BLOCK);
    for row in 0..block.rows {
        let start = block.scores.cast::<u8>().wrapping_add(row * block.stride);
        let limit = block.limit(row);
        let mut max = state.max[row];
        for i in 0..limit {
            // SAFETY: inside the row.
            max = max.max(unsafe { *start.cast::<f32>().add(i) } * block.scale);
        }
        let shrink = if limit == 0 { 1.0 } else { (state.max[row] - max).exp2() };
        let mut sum = 0.0;
        for i in 0..padded {
            // SAFETY: inside the row; the write lies at or before the read.
            unsafe {
                let score = *start.cast::<f32>().add(i);
                let p = if i < limit { (score * block.scale - max).exp2() } else { 0.0 };
                sum += p;
                *start.cast::<bf16>().add(i) = bf16::from_f32(p);
            }
        }
        state.max[row] = max;
        state.sum[row] = state.sum[row] * shrink + sum;
        for column in 0..columns {
            // SAFETY: inside the sums.
            unsafe { *sums.add(row * columns + column) *= shrink };
        }
    }
}
