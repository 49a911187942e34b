//! Samplers that jump to the prediction and add noise again: DDPM and LCM.
//!
//! Sources: Ho et al., "Denoising diffusion probabilistic models", 2020; Luo et
//! al., "Latent consistency models", 2023.

use std::fmt;
use std::sync::Arc;

use super::{Run, lincomb, slope};
use crate::diffusion::DiffusionError;
use crate::diffusion::Field;
use crate::diffusion::noise::Generator;
use crate::tensor::HostTensor;

/// Ancestral DDPM steps between arbitrary noise levels.
pub(super) fn ddpm(run: &mut Run<'_>, mut x: Field) -> Result<Field, DiffusionError> {
    for i in 0..run.steps() {
        let (from, to) = (run.sigma(i), run.sigma(i + 1));
        let denoised = run.denoise(&x, from)?;
        run.report(i, &x, &denoised)?;
        let eps = slope(&x, &denoised, from)?;
        // Cumulative products of the variance-preserving process at both ends.
        let (cum, cum_next) = (1.0 / (1.0 + from * from), 1.0 / (1.0 + to * to));
        let alpha = cum / cum_next;
        let mean = (1.0 / alpha).sqrt();
        let of_eps = -mean * (1.0 - alpha) / (1.0 - cum).sqrt();
        if to > 0.0 {
            let spread = ((1.0 - alpha) * (1.0 - cum_next) / (1.0 - cum)).sqrt();
            let back = (1.0 + to * to).sqrt();
            let noise = run.noise_like(&x, from, to)?;
            x = lincomb(&[(back * mean * cum.sqrt(), &x), (back * of_eps, &eps), (back * spread, &noise)])?;
        } else {
            x = lincomb(&[(mean * cum.sqrt(), &x), (of_eps, &eps)])?;
        }
    }
    Ok(x)
}

/// LCM: the prediction, noised again to the next level.
pub(super) fn lcm(run: &mut Run<'_>, mut x: Field) -> Result<Field, DiffusionError> {
    for i in 0..run.steps() {
        let (from, to) = (run.sigma(i), run.sigma(i + 1));
        let denoised = run.denoise(&x, from)?;
        run.report(i, &x, &denoised)?;
        x = denoised;
        if to > 0.0 {
            let noise = run.noise_like(&x, from, to)?;
            let keep = run.space().alpha(to);
            x = lincomb(&[(to, &noise), (keep, &x)])?;
        }
    }
    Ok(x)
}

/// Resizes a latent `[B, C, h, w]` to a height and width.
#[derive(Clone)]
pub struct Resizer(pub Arc<ResizeFn>);

/// What a [`Resizer`] does.
pub type ResizeFn = dyn Fn(&HostTensor, usize, usize) -> Result<HostTensor, DiffusionError> + Send + Sync;

impl fmt::Debug for Resizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Resizer")
    }
}

/// Settings of LCM with enlargement.
#[derive(Clone, Debug)]
pub struct LcmUpscaleOptions {
    /// Factor on both sides after the last enlargement.
    pub scale: f64,
    /// Number of enlargements; `None`: half the steps.
    pub steps: Option<usize>,
    /// The interpolation.
    pub resizer: Resizer,
    /// Whether the reference's interpolation leaves the result of more than one
    /// sample in NHWC memory order. Noise is then drawn in that order, one value
    /// at a time.
    pub is_channels_last: bool,
}

/// LCM whose predictions grow to the final size over the first steps.
pub(super) fn lcm_upscale(
    run: &mut Run<'_>,
    mut x: Field,
    opt: &LcmUpscaleOptions,
) -> Result<Field, DiffusionError> {
    let sigmas = run.steps() + 1;
    let growths = opt.steps.map_or_else(|| (sigmas / 2).max(1), |n| n.min(sigmas));
    let (height, width) = (x.dim(2), x.dim(3));
    // Noise continues the generator of the initial noise.
    let mut generator = Generator::new(run.seed());
    generator.randn(x.shape());
    for i in 0..run.steps() {
        let (from, to) = (run.sigma(i), run.sigma(i + 1));
        let denoised = run.denoise(&x, from)?;
        run.report(i, &x, &denoised)?;
        x = denoised;
        if i < growths {
            let factor = 1.0 + (opt.scale - 1.0) * (i + 1) as f64 / growths as f64;
            let side = |n: usize| (n as f64 * factor).round_ties_even() as usize;
            // In host memory from here on.
            x = (opt.resizer.0)(&*x.to_host()?, side(height), side(width))?.into();
        }
        if to > 0.0 {
            let noise = if opt.is_channels_last && growths > 0 && x.dim(0) > 1 {
                channels_last_noise(&mut generator, &x).into()
            } else {
                generator.randn(x.shape()).into()
            };
            x = lincomb(&[(1.0, &x), (to, &noise)])?;
        }
    }
    Ok(x)
}

/// Noise for a tensor whose memory order is NHWC.
fn channels_last_noise(generator: &mut Generator, x: &Field) -> HostTensor {
    let (channels, plane) = (x.dim(1), x.dim(2) * x.dim(3));
    let mut noise = HostTensor::zeros(x.shape());
    for sample in noise.data_mut().chunks_exact_mut((channels * plane).max(1)) {
        for place in 0..plane {
            for channel in 0..channels {
                let value = generator.randn(&[1]);
                sample[channel * plane + place] = value.data().first().copied().unwrap_or_default();
            }
        }
    }
    noise
}
