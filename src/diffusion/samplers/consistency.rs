//! Samplers that jump to the prediction and add noise again: DDPM and LCM.
//!
//! Sources: Ho et al., "Denoising diffusion probabilistic models", 2020; Luo et
//! al., "Latent consistency models", 2023.

use super::{Run, lincomb, slope};
use crate::diffusion::DiffusionError;
use crate::tensor::HostTensor;

/// Ancestral DDPM steps between arbitrary noise levels.
pub(super) fn ddpm(run: &mut Run<'_>, mut x: HostTensor) -> Result<HostTensor, DiffusionError> {
    for i in 0..run.steps() {
        let (from, to) = (run.sigma(i), run.sigma(i + 1));
        let denoised = run.denoise(&x, from)?;
        run.report(i, &x, &denoised)?;
        let eps = slope(&x, &denoised, from);
        // Cumulative products of the variance-preserving process at both ends.
        let (cum, cum_next) = (1.0 / (1.0 + from * from), 1.0 / (1.0 + to * to));
        let alpha = cum / cum_next;
        let mean = (1.0 / alpha).sqrt();
        let of_eps = -mean * (1.0 - alpha) / (1.0 - cum).sqrt();
        if to > 0.0 {
            let spread = ((1.0 - alpha) * (1.0 - cum_next) / (1.0 - cum)).sqrt();
            let back = (1.0 + to * to).sqrt();
            let noise = run.noise_like(&x, from, to)?;
            x = lincomb(&[(back * mean * cum.sqrt(), &x), (back * of_eps, &eps), (back * spread, &noise)]);
        } else {
            x = lincomb(&[(mean * cum.sqrt(), &x), (of_eps, &eps)]);
        }
    }
    Ok(x)
}

/// LCM: the prediction, noised again to the next level.
pub(super) fn lcm(run: &mut Run<'_>, mut x: HostTensor) -> Result<HostTensor, DiffusionError> {
    for i in 0..run.steps() {
        let (from, to) = (run.sigma(i), run.sigma(i + 1));
        let denoised = run.denoise(&x, from)?;
        run.report(i, &x, &denoised)?;
        x = denoised;
        if to > 0.0 {
            let noise = run.noise_like(&x, from, to)?;
            let keep = run.space().alpha(to);
            x = lincomb(&[(to, &noise), (keep, &x)]);
        }
    }
    Ok(x)
}
