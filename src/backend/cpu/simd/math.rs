//! Exponentials and the activations on vectors.
//!
//! Own minimax fits (Chebyshev nodes, 40 digits). Errors measured by the tests
//! over the whole range: SiLU within 4e-7 of the value, GELU within 1e-7·|x|.

use std::f32::consts::{LN_2, LOG2_E};

use super::Simd;

/// 1.5·2²³: adding it rounds to an integer, which then stands in the low bits.
const MAGIC: f32 = 12_582_912.0;
/// ln 2, split so that the high part times an 8-bit integer is exact.
const LN2_HIGH: f32 = 355.0 / 512.0;
const LN2_LOW: f32 = -2.121_944_4e-4;

/// 2^f on [-½, ½], constant term first; relative error 2e-9.
const EXP2: [f32; 7] =
    [1.0, LN_2, 0.240_226_5, 0.055_503_27, 0.009_618_057, 0.001_340_042_8, 0.000_154_614_45];
/// e^f on [-½ln2, ½ln2] as 1 + f + f²·P(f), constant term of P first; error 8e-9.
const EXP: [f32; 5] = [0.5, 0.166_665_77, 0.041_666_555, 0.008_363_173, 0.001_392_617_6];
/// log2(½·erfc(x/√2)) in |x|, fitted on [0, 5.5], error 2.3e-7; falls ever
/// more steeply beyond.
const LOG2_TAIL: [f32; 11] = [
    -0.999_999_77,
    -1.151_114_2,
    -0.459_150_73,
    -0.052_628_42,
    0.007_195_864_4,
    -0.000_186_524_33,
    -0.000_196_205_78,
    5.374_281e-5,
    -7.287_818e-6,
    5.331_618e-7,
    -1.672_228_8e-8,
];

/// Polynomial with constant term first.
///
/// # Safety
/// The CPU must have the instructions of `S`; so for all functions here.
#[inline(always)]
unsafe fn poly<S: Simd, const N: usize>(x: S::V, c: &[f32; N]) -> S::V {
    // SAFETY: see the function's contract.
    unsafe {
        let mut acc = S::splat(c[N - 1]);
        for i in (0..N - 1).rev() {
            acc = S::fma(acc, x, S::splat(c[i]));
        }
        acc
    }
}

/// x within [low, high]; NaN stays NaN.
///
/// # Safety
/// As [`poly`].
#[inline(always)]
unsafe fn clamp<S: Simd>(x: S::V, low: f32, high: f32) -> S::V {
    // SAFETY: see the function's contract.
    unsafe { S::min(S::splat(high), S::max(S::splat(low), x)) }
}

/// 2^x for x ≤ 127; below -126 it stays at 2^-126.
///
/// # Safety
/// As [`poly`].
#[inline(always)]
pub unsafe fn exp2<S: Simd>(x: S::V) -> S::V {
    // SAFETY: see the function's contract.
    unsafe { exp2_in_range::<S>(S::max(S::splat(-126.0), x)) }
}

/// 2^x for -126 ≤ x ≤ 127.
///
/// # Safety
/// As [`poly`].
#[inline(always)]
pub unsafe fn exp2_in_range<S: Simd>(x: S::V) -> S::V {
    // SAFETY: see the function's contract.
    unsafe {
        let magic = S::add(x, S::splat(MAGIC));
        let f = S::sub(x, S::sub(magic, S::splat(MAGIC)));
        S::scale_by_power(poly::<S, 7>(f, &EXP2), magic)
    }
}

/// e^x for x clamped to [-87.33, 86]: result and reciprocal are normal numbers.
///
/// # Safety
/// As [`poly`].
#[inline(always)]
pub unsafe fn exp<S: Simd>(x: S::V) -> S::V {
    // SAFETY: see the function's contract.
    unsafe {
        let x = clamp::<S>(x, -87.33, 86.0);
        let magic = S::fma(x, S::splat(LOG2_E), S::splat(MAGIC));
        let n = S::sub(magic, S::splat(MAGIC));
        let f = S::fma(n, S::splat(-LN2_HIGH), x);
        let f = S::fma(n, S::splat(-LN2_LOW), f);
        let p = poly::<S, 5>(f, &EXP);
        let e = S::add(S::fma(S::mul(f, f), p, f), S::splat(1.0));
        S::scale_by_power(e, magic)
    }
}

/// x·σ(a·x).
///
/// # Safety
/// As [`poly`].
#[inline(always)]
unsafe fn swish<S: Simd>(x: S::V, a: f32) -> S::V {
    // SAFETY: see the function's contract.
    unsafe {
        let e = exp::<S>(S::mul(x, S::splat(-a)));
        S::mul(x, S::recip(S::add(S::splat(1.0), e)))
    }
}

/// x·σ(x).
///
/// # Safety
/// As [`poly`].
#[inline(always)]
pub unsafe fn silu<S: Simd>(x: S::V) -> S::V {
    // SAFETY: see the function's contract.
    unsafe { swish::<S>(x, 1.0) }
}

/// x·σ(1.702·x).
///
/// # Safety
/// As [`poly`].
#[inline(always)]
pub unsafe fn quick_gelu<S: Simd>(x: S::V) -> S::V {
    // SAFETY: see the function's contract.
    unsafe { swish::<S>(x, 1.702) }
}

/// The larger of x and 0; NaN stays NaN.
///
/// # Safety
/// As [`poly`].
#[inline(always)]
pub unsafe fn relu<S: Simd>(x: S::V) -> S::V {
    // SAFETY: see the function's contract.
    unsafe { S::max(S::splat(0.0), x) }
}

/// The larger of x and 0.2·x; NaN stays NaN.
///
/// # Safety
/// As [`poly`].
#[inline(always)]
pub unsafe fn leaky_relu<S: Simd>(x: S::V) -> S::V {
    // SAFETY: see the function's contract.
    unsafe { S::max(S::mul(S::splat(0.2), x), x) }
}

/// x·Φ(x), exact form: `max(x, 0) − |x|·½erfc(|x|/√2)`, which doesn't cancel
/// for negative x as `1 + erf` does.
///
/// # Safety
/// As [`poly`].
#[inline(always)]
pub unsafe fn gelu<S: Simd>(x: S::V) -> S::V {
    // SAFETY: see the function's contract.
    unsafe {
        let a = S::min(S::splat(16.0), S::abs(x));
        let tail = exp2::<S>(poly::<S, 11>(a, &LOG2_TAIL));
        S::fma(S::sub(S::splat(0.0), a), tail, S::max(S::splat(0.0), x))
    }
}
