//! AVX-512 leaf: elementary functions and the epilogue.

use super::epilogue::{Activation, C_COLUMNS, Finish, FinishBlock, SKIP};
use super::polynomial::{ERFCX, ERFCX_SCALE, EXP2};
use half::bf16;
use std::arch::x86_64::*;
use std::f32::consts::LOG2_E;

/// Exponents below this count as this: nothing that follows can tell, and a
/// denormal result would cost a microcode assist of some 150 cycles.
pub(super) const LOWEST: f32 = -100.0;

/// 2^x with relative error below 8e-8; at least 2^[`LOWEST`], ∞ far above, NaN for NaN.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub(super) fn exp2(x: __m512) -> __m512 {
    let x = _mm512_max_ps(_mm512_set1_ps(LOWEST), x);
    // VREDUCEPS, imm 0b0000_0001: x − floor(x).
    let fraction = _mm512_reduce_ps::<1>(x);
    let mut value = _mm512_set1_ps(EXP2[5]);
    for c in [EXP2[4], EXP2[3], EXP2[2], EXP2[1], EXP2[0]] {
        value = _mm512_fmadd_ps(value, fraction, _mm512_set1_ps(c));
    }
    _mm512_scalef_ps(value, x)
}

/// 1/x to about 1e-7 for finite x that are not denormal.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
fn reciprocal(x: __m512) -> __m512 {
    let rough = _mm512_rcp14_ps(x);
    let error = _mm512_fnmadd_ps(x, rough, _mm512_set1_ps(2.0));
    _mm512_mul_ps(rough, error)
}

/// x · sigmoid(slope · x).
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
fn sigmoid_linear(x: __m512, slope: f32) -> __m512 {
    // Capped so that the reciprocal's Newton step never sees infinity. The
    // operand order keeps a NaN.
    let exponent = _mm512_mul_ps(x, _mm512_set1_ps(-slope * LOG2_E));
    let exponent = _mm512_min_ps(_mm512_set1_ps(120.0), exponent);
    _mm512_mul_ps(x, reciprocal(_mm512_add_ps(_mm512_set1_ps(1.0), exp2(exponent))))
}

/// x · Φ(x) through erfc(z) = exp(−z²) · g(1 / (1 + z·scale)), which keeps the
/// relative accuracy of the negative tail.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
fn gelu(x: __m512) -> __m512 {
    let one = _mm512_set1_ps(1.0);
    let magnitude = _mm512_abs_ps(x);
    let t = reciprocal(_mm512_fmadd_ps(magnitude, _mm512_set1_ps(ERFCX_SCALE), one));
    let mut g = _mm512_set1_ps(ERFCX[6]);
    for c in [ERFCX[5], ERFCX[4], ERFCX[3], ERFCX[2], ERFCX[1], ERFCX[0]] {
        g = _mm512_fmadd_ps(g, t, _mm512_set1_ps(c));
    }
    let square = _mm512_mul_ps(x, x);
    let tail = exp2(_mm512_mul_ps(square, _mm512_set1_ps(-0.5 * LOG2_E)));
    let lower = _mm512_mul_ps(_mm512_mul_ps(g, t), tail);
    let is_negative = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(x, _mm512_setzero_ps());
    let phi = _mm512_mask_mov_ps(_mm512_sub_ps(one, lower), is_negative, lower);
    _mm512_mul_ps(x, phi)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
fn widen(values: __m256i) -> __m512 {
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(values)))
}

/// 16 bf16 values, of which `mask` are read.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn load_bf16(from: *const bf16, mask: __mmask16) -> __m512 {
    // SAFETY: only masked values are touched; the caller vouches for them.
    widen(unsafe { _mm256_maskz_loadu_epi16(mask, from.cast()) })
}

/// Bias plus group bias of 16 columns from `column` on.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn biases(f: &Finish, group: usize, column: usize, mask: __mmask16) -> __m512 {
    let mut sum = _mm512_setzero_ps();
    // SAFETY: masked columns lie inside both arrays (checked by Finish::new).
    unsafe {
        if !f.bias.is_null() {
            sum = _mm512_maskz_loadu_ps(mask, f.bias.wrapping_add(column));
        }
        if !f.group_bias.is_null() && column < f.columns {
            let at = group * f.columns + column;
            let extra = if f.group_bias_is_f32 {
                _mm512_maskz_loadu_ps(mask, f.group_bias.cast::<f32>().wrapping_add(at))
            } else {
                load_bf16(f.group_bias.cast::<bf16>().wrapping_add(at), mask)
            };
            sum = _mm512_add_ps(sum, extra);
        }
    }
    sum
}

/// Adds the residual to 16 values and writes them.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn emit(f: &Finish, row: usize, column: usize, mask: __mmask16, value: __m512) {
    let mut value = _mm512_mul_ps(value, _mm512_set1_ps(f.scale));
    // SAFETY: masked columns of this row lie inside residual and output.
    unsafe {
        if !f.residual.is_null() {
            let from = f.residual.wrapping_add(row * f.residual_stride + column);
            value = _mm512_add_ps(value, load_bf16(from, mask));
        }
        let at = row * f.out_stride + column;
        if f.out_is_f32 {
            _mm512_mask_storeu_ps(f.out.cast::<f32>().wrapping_add(at), mask, value);
        } else {
            let rounded: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(value));
            _mm256_mask_storeu_epi16(f.out.cast::<i16>().wrapping_add(at), mask, rounded);
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
fn activate<const ACTIVATION: u8>(x: __m512) -> __m512 {
    match ACTIVATION {
        SILU => sigmoid_linear(x, 1.0),
        QUICK_GELU => sigmoid_linear(x, 1.702),
        GELU => gelu(x),
        RELU => _mm512_max_ps(_mm512_setzero_ps(), x),
        LEAKY_RELU => _mm512_max_ps(_mm512_mul_ps(_mm512_set1_ps(0.2), x), x),
        _ => x,
    }
}

const NONE: u8 = 0;
const SILU: u8 = 1;
const GELU: u8 = 2;
const QUICK_GELU: u8 = 3;
const RELU: u8 = 4;
const LEAKY_RELU: u8 = 5;

fn mask16(count: usize) -> __mmask16 {
    if count >= 16 { 0xffff } else { (1u16 << count) - 1 }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn finish_plain<const ACTIVATION: u8>(f: &Finish, block: &FinishBlock) {
    let (first, count) = (block.columns.start, block.columns.len());
    let masks = [mask16(count), mask16(count.saturating_sub(16))];
    let mut group = usize::MAX;
    let mut bias = [_mm512_setzero_ps(); 2];
    for (i, &row) in block.rows.iter().enumerate() {
        if row == SKIP {
            continue;
        }
        let row = row as usize;
        // SAFETY: rows, columns and sums are the caller's to vouch for.
        unsafe {
            if group == usize::MAX || row / f.group_rows != group {
                group = row / f.group_rows;
                bias = [biases(f, group, first, masks[0]), biases(f, group, first + 16, masks[1])];
            }
            for half in 0..2 {
                let sums = _mm512_loadu_ps(block.sums.add(i * C_COLUMNS + 16 * half));
                let value = activate::<ACTIVATION>(_mm512_add_ps(sums, bias[half]));
                if masks[half] != 0 {
                    emit(f, row, first + 16 * half, masks[half], value);
                }
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn finish_geglu(f: &Finish, block: &FinishBlock) {
    let first = block.columns.start;
    let mask = mask16(block.columns.len());
    let mut group = usize::MAX;
    let mut bias = [_mm512_setzero_ps(); 2];
    for (i, &row) in block.rows.iter().enumerate() {
        if row == SKIP {
            continue;
        }
        let row = row as usize;
        // SAFETY: rows, columns and sums are the caller's to vouch for.
        unsafe {
            if group == usize::MAX || row / f.group_rows != group {
                group = row / f.group_rows;
                bias = [biases(f, group, first, mask), biases(f, group, f.gate_offset + first, mask)];
            }
            let a = _mm512_add_ps(_mm512_loadu_ps(block.sums.add(i * C_COLUMNS)), bias[0]);
            let b = _mm512_add_ps(_mm512_loadu_ps(block.sums.add(i * C_COLUMNS + 16)), bias[1]);
            emit(f, row, first, mask, _mm512_mul_ps(a, gelu(b)));
        }
    }
}

/// [`Finish::run`] on AVX-512.
///
/// # Safety
///
/// As there.
pub(super) unsafe fn finish(f: &Finish, block: &FinishBlock) {
    // SAFETY: passed on from the caller.
    unsafe {
        match f.activation {
            Activation::None => finish_plain::<NONE>(f, block),
            Activation::Silu => finish_plain::<SILU>(f, block),
            Activation::Gelu => finish_plain::<GELU>(f, block),
            Activation::QuickGelu => finish_plain::<QUICK_GELU>(f, block),
            Activation::Relu => finish_plain::<RELU>(f, block),
            Activation::LeakyRelu => finish_plain::<LEAKY_RELU>(f, block),
            Activation::Geglu => finish_geglu(f, block),
        }
    }
}
