//! Every op against a naive reference in f64, on every instruction set this
//! CPU has and in both storage types; outputs are poisoned with NaN first.

mod attention;
mod memory;
mod norm;
mod product;
mod simple;

use std::borrow::Cow;

use half::{bf16, f16};

use super::simd::Isa;
use super::{CpuBackend, CpuOptions};
use crate::tensor::*;

/// A small deterministic generator (SplitMix64).
struct Rng(u64);

impl Rng {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in [-1, 1).
    fn value(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.value()).collect()
    }

    /// Uniform in `low..=high`.
    fn range(&mut self, low: usize, high: usize) -> usize {
        low + (self.bits() % (high - low + 1) as u64) as usize
    }
}

/// Every instruction set in both storage types.
fn backends() -> Vec<CpuBackend> {
    let mut all = Vec::new();
    for isa in Isa::available() {
        for bf16 in [false, true] {
            let options = CpuOptions { threads: Some(2), bf16, memory_limit: None };
            all.push(CpuBackend::with_isa(options, isa).unwrap());
        }
    }
    all
}

impl CpuBackend {
    /// An activation with these NHWC values, rounded to the storage type.
    fn put(&self, shape: Shape, values: &[f32]) -> Tensor {
        let mut t = self.alloc(shape).unwrap();
        self.upload(values, HostLayout::Nhwc, &mut t).unwrap();
        t
    }

    /// An activation of random values.
    fn random(&self, shape: Shape, rng: &mut Rng) -> Tensor {
        self.put(shape, &rng.values(shape.len()))
    }

    /// An output full of NaN.
    fn poisoned(&self, shape: Shape) -> Tensor {
        self.put(shape, &vec![f32::NAN; shape.len()])
    }

    /// The NHWC values of an activation.
    fn get(&self, t: &Tensor) -> Vec<f32> {
        let mut out = vec![f32::NAN; t.shape().len()];
        self.download(t, HostLayout::Nhwc, &mut out).unwrap();
        out
    }

    /// What the products make of weights: bf16 instructions take bf16.
    fn seen(&self, weights: &[f32]) -> Vec<f32> {
        let round = |&w: &f32| if self.exec.tier.is_some() { bf16::from_f32(w).to_f32() } else { w };
        weights.iter().map(round).collect()
    }

    /// Fails unless every value is within `tolerance·max|reference|` in f32;
    /// in bf16 results are rounded to 8 bits, at worst by 2⁻⁸ of the value.
    fn check(&self, what: &str, found: &Tensor, reference: &[f64], tolerance: f64) {
        self.check_with(what, found, reference, if self.is_bf16 { 1.0 / 250.0 } else { tolerance });
    }

    fn check_with(&self, what: &str, found: &Tensor, reference: &[f64], tolerance: f64) {
        let found = self.get(found);
        assert_eq!(found.len(), reference.len());
        let top = reference.iter().fold(1e-3, |m: f64, v| m.max(v.abs()));
        for (i, (&f, &r)) in found.iter().zip(reference).enumerate() {
            let error = (f64::from(f) - r).abs();
            let name = self.info().name;
            assert!(
                error <= tolerance * top,
                "{name}: {what}[{i}] is {f}, not {r} (error {error:e}, top {top})"
            );
        }
    }
}

/// A stored weight with its bytes.
struct Stored {
    dtype: DType,
    shape: Vec<usize>,
    bytes: Vec<u8>,
    /// What the bytes mean.
    values: Vec<f32>,
}

impl Stored {
    fn new(dtype: DType, shape: &[usize], values: &[f32]) -> Self {
        let (mut bytes, mut exact) = (Vec::new(), Vec::new());
        for &v in values {
            match dtype {
                DType::F16 => {
                    bytes.extend(f16::from_f32(v).to_le_bytes());
                    exact.push(f16::from_f32(v).to_f32());
                }
                DType::BF16 => {
                    bytes.extend(bf16::from_f32(v).to_le_bytes());
                    exact.push(bf16::from_f32(v).to_f32());
                }
                DType::F64 => {
                    bytes.extend(f64::from(v).to_le_bytes());
                    exact.push(v);
                }
                DType::F8E5M2 => {
                    let upper = f16::from_f32(v).to_bits() & 0xff00;
                    bytes.push((upper >> 8) as u8);
                    exact.push(f16::from_bits(upper).to_f32());
                }
                _ => {
                    bytes.extend(v.to_le_bytes());
                    exact.push(v);
                }
            }
        }
        Self { dtype, shape: shape.to_vec(), bytes, values: exact }
    }

    /// Random values of about 1/√fan-in.
    fn random(dtype: DType, shape: &[usize], rng: &mut Rng) -> Self {
        let fan_in: usize = shape.iter().skip(1).product();
        let scale = (fan_in.max(1) as f32).sqrt().recip();
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.value() * scale).collect();
        Self::new(dtype, shape, &values)
    }

    fn raw(&self) -> RawTensor<'_> {
        RawTensor { dtype: self.dtype, shape: &self.shape, bytes: Cow::Borrowed(&self.bytes) }
    }
}

/// erf by its series (|x| < 3) or continued fraction.
fn erf(x: f64) -> f64 {
    let a = x.abs();
    let value = if a < 3.0 {
        let (mut term, mut sum) = (a, a);
        for n in 1..80 {
            term *= -a * a / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        sum * 2.0 / std::f64::consts::PI.sqrt()
    } else {
        let tail = (1..60).rev().fold(0.0, |f, n| f64::from(n) / 2.0 / (a + f));
        1.0 - (-a * a).exp() / std::f64::consts::PI.sqrt() / (a + tail)
    };
    value.copysign(x)
}

fn activation(act: Activation, x: f64) -> f64 {
    match act {
        Activation::None => x,
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::Gelu => x * 0.5 * (1.0 + erf(x / 2f64.sqrt())),
        Activation::QuickGelu => x / (1.0 + (-1.702 * x).exp()),
        Activation::Relu => x.max(0.0),
        Activation::LeakyRelu => x.max(f64::from(0.2f32) * x),
    }
}

const ACTIVATIONS: [Activation; 6] = [
    Activation::None,
    Activation::Silu,
    Activation::Gelu,
    Activation::QuickGelu,
    Activation::Relu,
    Activation::LeakyRelu,
];
