//! Every tier against f64 sums of the same bf16 inputs.
//!
//! Tolerance: an output is one bf16 rounding (2⁻⁹ relative, 2⁻⁸ with the
//! activation's own rounding on a boundary) away from its f32 value, and the
//! f32 sum of K products of magnitude ≤ s is off by at most a few 2⁻²⁴·√K·s;
//! `expect_close` takes 2⁻⁸·|ref| + 2⁻¹⁸·(Σ|a·b| + 1).

mod attention;
mod conv;
mod gemm;
mod speed;

use half::bf16;

/// A small xorshift generator: tests need no more.
pub(super) struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Uniform in −1 … 1.
    pub fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub fn bf16s(&mut self, len: usize) -> Vec<bf16> {
        (0..len).map(|_| bf16::from_f32(self.unit())).collect()
    }

    pub fn f32s(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.unit()).collect()
    }
}

/// A reference value with the magnitude of its sum.
#[derive(Clone, Copy, Default)]
pub(super) struct Expected {
    pub value: f64,
    pub magnitude: f64,
}

pub(super) fn expect_close(got: f32, expected: Expected, is_f32: bool, place: &dyn std::fmt::Display) {
    let rounding = if is_f32 { 1.0 / (1 << 17) as f64 } else { 1.0 / 256.0 };
    let limit = rounding * expected.value.abs() + (expected.magnitude + 1.0) / (1 << 18) as f64;
    let error = (f64::from(got) - expected.value).abs();
    assert!(error <= limit, "{place}: got {got}, expected {}, error {error} > {limit}", expected.value);
}

/// Φ(x): erf's Taylor series near 0, erfc's continued fraction in the tails.
pub(super) fn normal_cdf(x: f64) -> f64 {
    let z = x.abs() / 2f64.sqrt();
    let upper = if z < 2.5 {
        let (mut term, mut sum, mut n) = (z, z, 0.0);
        while term.abs() > 1e-17 {
            n += 1.0;
            term *= -z * z / n;
            sum += term / (2.0 * n + 1.0);
        }
        0.5 - sum / std::f64::consts::PI.sqrt()
    } else {
        let fraction = (1..80).rev().fold(z, |tail, n| z + f64::from(n) / 2.0 / tail);
        (-z * z).exp() / std::f64::consts::PI.sqrt() / fraction / 2.0
    };
    if x < 0.0 { upper } else { 1.0 - upper }
}
