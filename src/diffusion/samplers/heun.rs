//! Predictor-corrector steps of second and third order: Heun, Heun++ and DPM-2.
//!
//! Sources: Karras et al., 2022 (Heun, DPM-Solver-2 in sigma); the weights of
//! Heun++ are those published with the sampler: shares of the step proportional
//! to the noise levels relative to the first one.

use super::{Run, Stochastic, lincomb, slope, toward};
use crate::diffusion::DiffusionError;
use crate::diffusion::Field;

/// Heun: the mean of the slopes at both ends of the step.
pub(super) fn heun(run: &mut Run<'_>, mut x: Field) -> Result<Field, DiffusionError> {
    for i in 0..run.steps() {
        let (from, to) = (run.sigma(i), run.sigma(i + 1));
        let denoised = run.denoise(&x, from)?;
        run.report(i, &x, &denoised)?;
        if to == 0.0 {
            x = denoised;
            continue;
        }
        let d = slope(&x, &denoised, from)?;
        let h = to - from;
        let ahead = lincomb(&[(1.0, &x), (h, &d)])?;
        let d2 = slope(&ahead, &run.denoise(&ahead, to)?, to)?;
        x = lincomb(&[(1.0, &x), (h / 2.0, &d), (h / 2.0, &d2)])?;
    }
    Ok(x)
}

/// Heun++: up to three slopes, weighted by their noise levels.
pub(super) fn heunpp2(run: &mut Run<'_>, mut x: Field) -> Result<Field, DiffusionError> {
    let n = run.steps();
    let last = run.sigma(n);
    for i in 0..n {
        let (from, to) = (run.sigma(i), run.sigma(i + 1));
        let denoised = run.denoise(&x, from)?;
        run.report(i, &x, &denoised)?;
        let h = to - from;
        if to == last {
            x = toward(&x, &denoised, from, to)?;
            continue;
        }
        let d = slope(&x, &denoised, from)?;
        let x2 = lincomb(&[(1.0, &x), (h, &d)])?;
        let d2 = slope(&x2, &run.denoise(&x2, to)?, to)?;
        let next = run.sigma(i + 2);
        let first = run.sigma(0);
        if next == last {
            let w2 = to / (2.0 * first);
            x = lincomb(&[(1.0, &x), (h * (1.0 - w2), &d), (h * w2, &d2)])?;
            continue;
        }
        let x3 = lincomb(&[(1.0, &x2), (next - to, &d2)])?;
        let d3 = slope(&x3, &run.denoise(&x3, next)?, next)?;
        let (w2, w3) = (to / (3.0 * first), next / (3.0 * first));
        x = lincomb(&[(1.0, &x), (h * (1.0 - w2 - w3), &d), (h * w2, &d2), (h * w3, &d3)])?;
    }
    Ok(x)
}

/// DPM-2: the slope at the geometric middle of the step, optionally ancestral.
pub(super) fn dpm_2(run: &mut Run<'_>, mut x: Field, opt: Stochastic) -> Result<Field, DiffusionError> {
    for i in 0..run.steps() {
        let (from, to) = (run.sigma(i), run.sigma(i + 1));
        let denoised = run.denoise(&x, from)?;
        run.report(i, &x, &denoised)?;
        let step = run.space().ancestral(from, to, opt.eta);
        if step.down == 0.0 {
            x = denoised;
            continue;
        }
        let mid = (from * step.down).sqrt();
        let x2 = toward(&x, &denoised, from, mid)?;
        let d2 = slope(&x2, &run.denoise(&x2, mid)?, mid)?;
        x = lincomb(&[(1.0, &x), (step.down - from, &d2)])?;
        x = run.renoise(x, &step, opt, from, to)?;
    }
    Ok(x)
}
