//! AVX-512 leaf: the softmax of attention.
//!
//! For head dim 40 this, not the tile products, is what attention costs: 16
//! scores take one pass for the maximum and about twelve instructions for the
//! exponential, against 56 tile cycles for 256 scores.

use super::attention_stream::FLOOR;
use super::avx512_epilogue::LOWEST;
use super::block::BLOCK;
use super::polynomial::{EXP2_CENTRED, EXP2_SHORT};
use super::softmax::{ChunkBlock, RowSums, SoftmaxBlock, State};
use half::bf16;
use std::arch::x86_64::*;

/// 2^x to 2.6e-6, at least 2^[`LOWEST`]: rounded to bf16 right after.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
fn exp2_short(x: __m512) -> __m512 {
    let x = _mm512_max_ps(_mm512_set1_ps(LOWEST), x);
    let fraction = _mm512_reduce_ps::<1>(x);
    let mut value = _mm512_set1_ps(EXP2_SHORT[4]);
    for c in [EXP2_SHORT[3], EXP2_SHORT[2], EXP2_SHORT[1], EXP2_SHORT[0]] {
        value = _mm512_fmadd_ps(value, fraction, _mm512_set1_ps(c));
    }
    _mm512_scalef_ps(value, x)
}

/// Lanes of vector `i` below `limit`.
#[inline(always)]
fn lanes(limit: usize, i: usize) -> __mmask16 {
    let count = limit.saturating_sub(16 * i).min(16);
    ((1u32 << count) - 1) as __mmask16
}

/// Largest score of a row's first `limit`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn row_max(row: *const f32, limit: usize) -> f32 {
    let lowest = _mm512_set1_ps(f32::NEG_INFINITY);
    let mut max = [lowest; 4];
    let whole = limit / 64;
    // SAFETY: the caller vouches for `limit` values; the rest is masked.
    unsafe {
        for i in 0..whole {
            for (j, max) in max.iter_mut().enumerate() {
                *max = _mm512_max_ps(_mm512_loadu_ps(row.add(64 * i + 16 * j)), *max);
            }
        }
        for (j, max) in max.iter_mut().enumerate() {
            let mask = lanes(limit, 4 * whole + j);
            let rest = _mm512_mask_loadu_ps(lowest, mask, row.wrapping_add(64 * whole + 16 * j));
            *max = _mm512_max_ps(rest, *max);
        }
    }
    _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(max[0], max[1]), _mm512_max_ps(max[2], max[3])))
}

/// Probabilities of a row, written over it; returns their sum.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn row_probabilities(row: *mut f32, (limit, padded): (usize, usize), scale: f32, max: f32) -> f32 {
    let (scale, offset) = (_mm512_set1_ps(scale), _mm512_set1_ps(-max));
    let mut sums = [_mm512_setzero_ps(); 2];
    let whole = limit / 32;
    // SAFETY: the caller vouches for `padded` values, a multiple of 32; vector
    // pair i is written at half the offset it was read from.
    unsafe {
        for i in 0..whole {
            let low = exp2_short(_mm512_fmadd_ps(_mm512_loadu_ps(row.add(32 * i)), scale, offset));
            let high = exp2_short(_mm512_fmadd_ps(_mm512_loadu_ps(row.add(32 * i + 16)), scale, offset));
            sums[0] = _mm512_add_ps(sums[0], low);
            sums[1] = _mm512_add_ps(sums[1], high);
            store_pair(row.add(16 * i), low, high);
        }
        for i in whole..padded / 32 {
            let masked = |j: usize| (lanes(limit, 2 * i + j), row.add(32 * i + 16 * j));
            let ((mask_low, low), (mask_high, high)) = (masked(0), masked(1));
            let low = exp2_short(_mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask_low, low), scale, offset));
            let high = exp2_short(_mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask_high, high), scale, offset));
            let low = _mm512_maskz_mov_ps(mask_low, low);
            let high = _mm512_maskz_mov_ps(mask_high, high);
            sums[0] = _mm512_add_ps(sums[0], low);
            sums[1] = _mm512_add_ps(sums[1], high);
            store_pair(row.add(16 * i), low, high);
        }
    }
    _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]))
}

/// 32 values as bf16.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn store_pair(to: *mut f32, low: __m512, high: __m512) {
    // SAFETY: the caller vouches for 64 bytes.
    unsafe {
        let rounded: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(high, low));
        _mm512_storeu_si512(to.cast(), rounded);
    }
}

/// [`softmax_block`](super::softmax::softmax_block) on AVX-512.
///
/// # Safety
///
/// As there.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub(super) unsafe fn softmax_block(
    block: &SoftmaxBlock,
    state: &mut State,
    (sums, columns): (*mut f32, usize),
) {
    let padded = block.keys.next_multiple_of(32);
    for row in 0..block.rows {
        let scores = block.scores.cast::<u8>().wrapping_add(row * block.stride).cast::<f32>();
        let limit = block.limit(row);
        let old = state.max[row];
        // SAFETY: rows are valid for `padded` values, sums for `columns`.
        unsafe {
            let largest = row_max(scores, limit) * block.scale;
            let max = largest.max(old);
            let sum = row_probabilities(scores, (limit, padded), block.scale, max);
            if max == old {
                state.sum[row] += sum;
                continue;
            }
            let shrink = (old - max).exp2();
            state.max[row] = max;
            state.sum[row] = state.sum[row] * shrink + sum;
            let factor = _mm512_set1_ps(shrink);
            let sums = sums.wrapping_add(row * columns);
            for column in (0..columns).step_by(16) {
                let at = sums.add(column);
                _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), factor));
            }
        }
    }
}

/// 2^x to 2.6e-6 for |x| below 126: the integer part of x goes straight into
/// the exponent bits. Nine instructions where reduce and scale take eleven.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
fn exp2_bounded<const HAS_OFFSET: bool>(score: __m512, scale: __m512, offset: __m512) -> __m512 {
    // 1.5·2²³: adding it leaves the nearest integer in the low mantissa bits.
    let shift = _mm512_set1_ps(12_582_912.0);
    let (shifted, fraction) = if HAS_OFFSET {
        let x = _mm512_fmsub_ps(score, scale, offset);
        let x = _mm512_max_ps(_mm512_set1_ps(FLOOR), x);
        let shifted = _mm512_add_ps(x, shift);
        (shifted, _mm512_sub_ps(x, _mm512_sub_ps(shifted, shift)))
    } else {
        let shifted = _mm512_fmadd_ps(score, scale, shift);
        (shifted, _mm512_fmsub_ps(score, scale, _mm512_sub_ps(shifted, shift)))
    };
    let mut value = _mm512_set1_ps(EXP2_CENTRED[4]);
    for c in [EXP2_CENTRED[3], EXP2_CENTRED[2], EXP2_CENTRED[1], EXP2_CENTRED[0]] {
        value = _mm512_fmadd_ps(value, fraction, _mm512_set1_ps(c));
    }
    let exponent = _mm512_slli_epi32::<23>(_mm512_castps_si512(shifted));
    _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(value), exponent))
}

/// [`exp_chunk`](super::softmax::exp_chunk) on AVX-512.
///
/// # Safety
///
/// As there.
pub(super) unsafe fn exp_chunk(block: &ChunkBlock, sums: &mut RowSums) {
    // SAFETY: passed on from the caller.
    unsafe {
        match block.offsets {
            None => exp_rows::<false>(block, &[0.0; BLOCK], sums),
            Some(offsets) => exp_rows::<true>(block, offsets, sums),
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn exp_rows<const HAS_OFFSET: bool>(block: &ChunkBlock, offsets: &[f32; BLOCK], sums: &mut RowSums) {
    let scale = _mm512_set1_ps(block.scale);
    let is_whole = block.keys == 32 && block.causal.is_none();
    for (row, sums) in block.rows.clone().zip(&mut sums.0[block.rows.clone()]) {
        // SAFETY: rows of 32 scores and 32 probabilities, 16 lanes of sums.
        unsafe {
            let from = block.scores.add(32 * row);
            let offset = _mm512_set1_ps(offsets[row]);
            let mut low = exp2_bounded::<HAS_OFFSET>(_mm512_loadu_ps(from), scale, offset);
            let mut high = exp2_bounded::<HAS_OFFSET>(_mm512_loadu_ps(from.add(16)), scale, offset);
            if !is_whole {
                let limit = block.limit(row);
                low = _mm512_maskz_mov_ps(lanes(limit, 0), low);
                high = _mm512_maskz_mov_ps(lanes(limit, 1), high);
            }
            let sum = _mm512_add_ps(_mm512_loadu_ps(sums.as_ptr()), _mm512_add_ps(low, high));
            _mm512_storeu_ps(sums.as_mut_ptr(), sum);
            store_pair(block.to.cast::<u8>().add(row * block.stride).cast(), low, high);
        }
    }
}

/// Each row's total.
///
/// # Safety
///
/// The CPU has AVX-512.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub(super) unsafe fn row_totals(sums: &RowSums) -> [f32; BLOCK] {
    let mut totals = [0.0; BLOCK];
    for (total, lanes) in totals.iter_mut().zip(&sums.0) {
        // SAFETY: 16 lanes.
        *total = _mm512_reduce_add_ps(unsafe { _mm512_loadu_ps(lanes.as_ptr()) });
    }
    totals
}

/// Σx².
///
/// # Safety
///
/// The CPU has AVX-512 with BW, VL and BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub(super) unsafe fn squared_norm(values: &[bf16]) -> f32 {
    let mut sum = _mm512_setzero_ps();
    for values in values.chunks(32) {
        let mask = ((1u64 << values.len()) - 1) as __mmask32;
        // SAFETY: only the masked values, inside the slice, are read.
        unsafe {
            let pairs = _mm512_maskz_loadu_epi16(mask, values.as_ptr().cast());
            let pairs: __m512bh = std::mem::transmute(pairs);
            sum = _mm512_dpbf16_ps(sum, pairs, pairs);
        }
    }
    _mm512_reduce_add_ps(sum)
}

/// Rounds a row times a factor.
///
/// # Safety
///
/// The CPU has AVX-512 with BW, VL and BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub(super) unsafe fn scale_row(from: &[f32], factor: f32, to: &mut [bf16]) {
    let factor = _mm512_set1_ps(factor);
    for (from, to) in from.chunks(16).zip(to.chunks_mut(16)) {
        let mask = lanes(from.len().min(to.len()), 0);
        // SAFETY: only the masked values, inside both slices, are touched.
        unsafe {
            let value = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, from.as_ptr()), factor);
            let rounded: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(value));
            _mm256_mask_storeu_epi16(to.as_mut_ptr().cast(), mask, rounded);
        }
    }
}
