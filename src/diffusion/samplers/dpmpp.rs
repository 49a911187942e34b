//! DPM-Solver++ without stochastic integrals: 2S (single step, optionally
//! ancestral) and 2M (multistep), each also in CFG++ form.
//!
//! Source: Lu et al., "DPM-Solver++", 2022, in the half log-SNR variable;
//! Chung et al., "CFG++", 2024.

use super::{Run, Stochastic, lincomb, toward};
use crate::diffusion::DiffusionError;
use crate::diffusion::Field;

/// Stand-in for the middle of a flow model's first step, whose start has no
/// signal at all and hence no finite log-SNR.
const FLOW_FIRST_MID: f64 = 0.9999;

/// Second-order single-step solver; the middle lies halfway in log-SNR.
pub(super) fn two_s(run: &mut Run<'_>, mut x: Field, opt: Stochastic) -> Result<Field, DiffusionError> {
    let space = run.space();
    for i in 0..run.steps() {
        let (from, to) = (run.sigma(i), run.sigma(i + 1));
        let denoised = run.denoise(&x, from)?;
        run.report(i, &x, &denoised)?;
        let step = space.ancestral(from, to, opt.eta);
        if step.down == 0.0 {
            // all that the step to `to` leaves is noise, if anything
            x = if to > 0.0 { run.renoise(denoised, &step, opt, from, to)? } else { denoised };
            continue;
        }
        let mid = if space == super::SnrSpace::Flow && from == 1.0 {
            FLOW_FIRST_MID
        } else {
            space.sigma((space.lambda(from) + space.lambda(step.down)) / 2.0)
        };
        let x2 = toward(&x, &denoised, from, mid)?;
        let denoised_2 = run.denoise(&x2, mid)?;
        x = toward(&x, &denoised_2, from, step.down)?;
        x = run.renoise(x, &step, opt, from, to)?;
    }
    Ok(x)
}

/// 2S ancestral with the guidance direction added outside the solver (CFG++).
pub(super) fn two_s_cfg_pp(
    run: &mut Run<'_>,
    mut x: Field,
    opt: Stochastic,
) -> Result<Field, DiffusionError> {
    for i in 0..run.steps() {
        let (from, to) = (run.sigma(i), run.sigma(i + 1));
        let (denoised, uncond) = run.predict(&x, from)?;
        run.report(i, &x, &denoised)?;
        let (down, up) = super::snr::split_variance(from, to, opt.eta);
        x = if down == 0.0 {
            denoised
        } else {
            let mid = (from * down).sqrt();
            let k = mid / from;
            // k·(x + denoised − uncond) + (1 − k)·denoised
            let x2 = lincomb(&[(k, &x), (1.0, &denoised), (-k, &uncond)])?;
            let (denoised_2, uncond_2) = run.predict(&x2, mid)?;
            let k = down / from;
            lincomb(&[(k, &x), (k, &denoised), (-k, &uncond_2), (1.0 - k, &denoised_2)])?
        };
        if to > 0.0 {
            let noise = run.noise_like(&x, from, to)?;
            x = lincomb(&[(1.0, &x), (opt.s_noise * up, &noise)])?;
        }
    }
    Ok(x)
}

/// Second-order multistep solver.
pub(super) fn two_m(run: &mut Run<'_>, mut x: Field) -> Result<Field, DiffusionError> {
    let mut previous: Option<Field> = None;
    for i in 0..run.steps() {
        let (from, to) = (run.sigma(i), run.sigma(i + 1));
        let denoised = run.denoise(&x, from)?;
        run.report(i, &x, &denoised)?;
        x = match &previous {
            Some(old) if to > 0.0 => {
                let k = to / from;
                let r = (run.sigma(i - 1) / from).ln() / (from / to).ln();
                let c = 1.0 / (2.0 * r);
                lincomb(&[(k, &x), ((1.0 - k) * (1.0 + c), &denoised), (-(1.0 - k) * c, old)])?
            }
            _ => toward(&x, &denoised, from, to)?,
        };
        previous = Some(denoised);
    }
    Ok(x)
}

/// 2M in CFG++ form: history and decay act on the unconditional prediction.
pub(super) fn two_m_cfg_pp(run: &mut Run<'_>, mut x: Field) -> Result<Field, DiffusionError> {
    let mut previous: Option<Field> = None;
    for i in 0..run.steps() {
        let (from, to) = (run.sigma(i), run.sigma(i + 1));
        let (denoised, uncond) = run.predict(&x, from)?;
        run.report(i, &x, &denoised)?;
        let k = to / from;
        x = match &previous {
            Some(old) if to > 0.0 => {
                let r = (run.sigma(i - 1) / from).ln() / (from / to).ln();
                let c = (1.0 - k) / (2.0 * r);
                lincomb(&[(k, &x), (1.0 + c, &denoised), (-k, &uncond), (-c, old)])?
            }
            _ => lincomb(&[(k, &x), (1.0, &denoised), (-k, &uncond)])?,
        };
        previous = Some(uncond);
    }
    Ok(x)
}
