//! PyTorch's CPU random number generator, bit for bit.
//!
//! ComfyUI draws every initial noise from it, whatever the device, so a seed
//! means the same picture everywhere. Facts reproduced here:
//!
//! * Only the low 32 bits of the seed reach the engine.
//! * Uniform numbers keep as many low bits of the engine's word as the type
//!   has significand bits (f32: 24 of one word; f64: 53 of two).
//! * Normal numbers: a tensor of 16 or more elements is first filled with
//!   uniforms and transformed in blocks of 16 (Box-Muller pairs element `i`
//!   with `i + 8`); if the length is no multiple of 16 the *last 16* elements
//!   are drawn and transformed once more. Shorter tensors go one element at a
//!   time through a double-precision Box-Muller whose second value is kept for
//!   the next call.
//!
//! Sources: G. Box and M. Muller, "A note on the generation of random normal
//! deviates", 1958, for the transform; the order of draws is PyTorch's
//! observable behaviour.

use half::{bf16, f16};

use super::mt19937::Mt19937;
use super::vector_math::{self, LANES, Lanes};
use crate::tensor::HostTensor;

/// Elements of one Box-Muller block.
const BLOCK: usize = 2 * LANES;

/// A seeded stream of random numbers, the same as `torch.Generator("cpu")`.
///
/// Drawing changes the state: consecutive draws from one generator are what an
/// ancestral sampler sees.
#[derive(Clone)]
pub struct Generator {
    engine: Mt19937,
    /// Second value of the last double-precision Box-Muller pair.
    spare_normal: Option<f64>,
}

impl Generator {
    /// A generator as `manual_seed(seed)` leaves it; the high 32 bits of the
    /// seed have no effect.
    pub fn new(seed: u64) -> Self {
        Self { engine: Mt19937::new(seed as u32), spare_normal: None }
    }

    /// `torch.randn(shape)` in f32.
    pub fn randn(&mut self, shape: &[usize]) -> HostTensor {
        let mut out = HostTensor::zeros(shape);
        self.fill_normal(out.data_mut());
        out
    }

    /// `torch.rand(shape)` in f32: uniform in `[0, 1)`.
    pub fn rand(&mut self, shape: &[usize]) -> HostTensor {
        HostTensor::from_fn(shape, |_| self.uniform_f32())
    }

    /// `torch.randn(n, dtype=float64)`.
    pub fn randn_f64(&mut self, n: usize) -> Vec<f64> {
        let mut out = vec![0.0; n];
        self.fill_normal(&mut out);
        out
    }

    /// `torch.rand(n, dtype=float64)`.
    pub fn rand_f64(&mut self, n: usize) -> Vec<f64> {
        (0..n).map(|_| self.uniform_f64()).collect()
    }

    /// `torch.randn(n, dtype=float16)`.
    pub fn randn_f16(&mut self, n: usize) -> Vec<f16> {
        let mut out = vec![f16::ZERO; n];
        self.fill_normal_rounded(&mut out, f16::from_f32);
        out
    }

    /// `torch.randn(n, dtype=bfloat16)`.
    pub fn randn_bf16(&mut self, n: usize) -> Vec<bf16> {
        let mut out = vec![bf16::ZERO; n];
        self.fill_normal_rounded(&mut out, bf16::from_f32);
        out
    }

    /// `torch.randint(low, high, (n,))`: integers in `low..high`.
    ///
    /// An empty range (where PyTorch raises) gives `low`.
    pub fn randint(&mut self, low: i64, high: i64, n: usize) -> Vec<i64> {
        // The span of any non-empty i64 range fits u64.
        let span = if high > low { high.wrapping_sub(low) as u64 } else { 1 };
        (0..n).map(|_| low.wrapping_add((self.integer(span) % span) as i64)).collect()
    }

    /// One word where the modulo's bias is small enough, two for wide spans.
    fn integer(&mut self, span: u64) -> u64 {
        if span >= 1 << 28 { self.next_u64() } else { u64::from(self.engine.next_u32()) }
    }

    fn next_u64(&mut self) -> u64 {
        let high = u64::from(self.engine.next_u32());
        high << 32 | u64::from(self.engine.next_u32())
    }

    fn uniform_f32(&mut self) -> f32 {
        let kept = self.engine.next_u32() & ((1 << f32::MANTISSA_DIGITS) - 1);
        kept as f32 / (1u32 << f32::MANTISSA_DIGITS) as f32
    }

    fn uniform_f64(&mut self) -> f64 {
        let kept = self.next_u64() & ((1 << f64::MANTISSA_DIGITS) - 1);
        kept as f64 / (1u64 << f64::MANTISSA_DIGITS) as f64
    }

    /// One normal number by the double-precision path of short tensors.
    fn next_normal(&mut self) -> f64 {
        if let Some(spare) = self.spare_normal.take() {
            return spare;
        }
        let turn = self.uniform_f64();
        let level = self.uniform_f64();
        let radius = (-2.0 * (-level).ln_1p()).sqrt();
        let theta = 2.0 * std::f64::consts::PI * turn;
        self.spare_normal = Some(radius * theta.sin());
        radius * theta.cos()
    }

    fn fill_normal<T: NormalElement>(&mut self, out: &mut [T]) {
        if out.len() < BLOCK {
            out.iter_mut().for_each(|slot| *slot = T::from_f64(self.next_normal()));
            return;
        }
        out.iter_mut().for_each(|slot| *slot = T::uniform(self));
        let (blocks, rest) = out.as_chunks_mut();
        let has_rest = !rest.is_empty();
        blocks.iter_mut().for_each(T::transform_block);
        if let Some(tail) = out.last_chunk_mut().filter(|_| has_rest) {
            tail.iter_mut().for_each(|slot| *slot = T::uniform(self));
            T::transform_block(tail);
        }
    }

    /// The 16-bit types: every block draws its own f32 uniforms and rounds the
    /// f32 results, so a length that is no multiple of 16 consumes fewer
    /// uniforms than in f32.
    fn fill_normal_rounded<T: Copy>(&mut self, out: &mut [T], round: fn(f32) -> T) {
        if out.len() < BLOCK {
            out.iter_mut().for_each(|slot| *slot = round(self.next_normal() as f32));
            return;
        }
        let (blocks, rest) = out.as_chunks_mut::<BLOCK>();
        let has_rest = !rest.is_empty();
        blocks.iter_mut().for_each(|block| *block = self.normal_block().map(round));
        if let Some(tail) = out.last_chunk_mut().filter(|_| has_rest) {
            *tail = self.normal_block().map(round);
        }
    }

    fn normal_block(&mut self) -> [f32; BLOCK] {
        let mut block = std::array::from_fn(|_| self.uniform_f32());
        f32::transform_block(&mut block);
        block
    }
}

/// What filling with normals needs of an element type.
trait NormalElement: Copy {
    fn from_f64(value: f64) -> Self;
    fn uniform(generator: &mut Generator) -> Self;
    /// Turns 16 uniforms into 16 normals, pairing element `i` with `i + 8`: the
    /// radius is made from one minus the first, the angle from the second.
    fn transform_block(block: &mut [Self; BLOCK]);
}

impl NormalElement for f32 {
    fn from_f64(value: f64) -> Self {
        value as f32
    }

    fn uniform(generator: &mut Generator) -> Self {
        generator.uniform_f32()
    }

    fn transform_block(block: &mut [Self; BLOCK]) {
        let level: Lanes = std::array::from_fn(|i| 1.0 - block[i]);
        let angle: Lanes = std::array::from_fn(|i| 2.0 * std::f32::consts::PI * block[i + LANES]);
        let radius = vector_math::ln(level).map(|l| (-2.0 * l).sqrt());
        let (sin, cos) = vector_math::sin_cos(angle);
        for i in 0..LANES {
            block[i] = radius[i] * cos[i];
            block[i + LANES] = radius[i] * sin[i];
        }
    }
}

impl NormalElement for f64 {
    fn from_f64(value: f64) -> Self {
        value
    }

    fn uniform(generator: &mut Generator) -> Self {
        generator.uniform_f64()
    }

    fn transform_block(block: &mut [Self; BLOCK]) {
        let (first, second) = block.split_at_mut(BLOCK / 2);
        for (a, b) in first.iter_mut().zip(second) {
            let radius = (-2.0 * (1.0 - *a).ln()).sqrt();
            let theta = 2.0 * std::f64::consts::PI * *b;
            (*a, *b) = (radius * theta.cos(), radius * theta.sin());
        }
    }
}
