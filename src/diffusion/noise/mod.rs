//! Random numbers with the values ComfyUI gets: "same seed, same picture".
//!
//! * [`Generator`]: PyTorch's CPU generator (initial noise, ancestral steps).
//! * [`prepare_noise`]: the initial noise of a sampling run.
//! * [`BrownianNoise`]: increments of one Brownian path (SDE samplers).
//! * [`SeedSequence`]: NumPy's seed hashing.
//!
//! Noise is drawn on the host, so that every backend starts from the same numbers.
//! Two exceptions depend on the device, as their names say: [`GpuBrownianNoise`] of
//! the `_gpu` samplers, and what samplers draw under `--gpu-noise`.

mod brownian;
mod generator;
mod mt19937;
mod seed_sequence;
// The coefficients are written as published; f32 rounds them as PyTorch's compiler does.
#[allow(clippy::excessive_precision)]
mod vector_math;

#[cfg(test)]
mod tests;

pub use brownian::{BrownianError, BrownianNoise, BrownianTree, GpuBrownianNoise};
pub use generator::Generator;
pub use mt19937::Mt19937;
pub use seed_sequence::SeedSequence;

use crate::tensor::HostTensor;

/// The initial noise of a KSampler run for a latent of `shape` (`[B, C, h, w]`).
///
/// Without `batch_index` the whole batch is one draw. With it (a latent that
/// was cut out of a batch remembers the places its samples had), samples are
/// drawn one at a time from the same generator up to the largest index and the
/// wanted ones are picked, in the order of `batch_index`; duplicates are fine.
/// The result then has `batch_index.len()` samples, whatever `shape[0]` says.
pub fn prepare_noise(shape: &[usize], seed: u64, batch_index: Option<&[usize]>) -> HostTensor {
    let mut generator = Generator::new(seed);
    let Some(wanted) = batch_index else {
        return generator.randn(shape);
    };
    let Some((_, sample_shape)) = shape.split_first() else {
        return generator.randn(shape);
    };
    let mut one = vec![1];
    one.extend_from_slice(sample_shape);
    let count = wanted.iter().max().map_or(0, |&last| last + 1);
    let sample_len: usize = sample_shape.iter().product();
    let mut out_shape = one.clone();
    out_shape[0] = wanted.len();
    let mut out = HostTensor::zeros(&out_shape);
    if sample_len == 0 {
        return out;
    }
    for index in 0..count {
        let sample = generator.randn(&one);
        for (slot, &place) in out.data_mut().chunks_exact_mut(sample_len).zip(wanted) {
            if place == index {
                slot.copy_from_slice(sample.data());
            }
        }
    }
    out
}
