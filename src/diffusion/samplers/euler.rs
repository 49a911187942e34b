//! First-order steps: Euler, Euler ancestral, their CFG++ forms, and gradient
//! estimation.
//!
//! Sources: Karras et al., "Elucidating the design space of diffusion-based
//! generative models", 2022 (Euler); Chung et al., "CFG++", 2024; Permenter and
//! Yuan, "Interpreting and improving diffusion models from an optimization
//! perspective", 2023 (gradient estimation).

use super::{Run, Stochastic, lincomb, slope, toward};
use crate::diffusion::DiffusionError;
use crate::diffusion::Field;

/// Euler steps; with `eta > 0` each is split into a longer step and fresh noise.
pub(super) fn euler(run: &mut Run<'_>, mut x: Field, opt: Stochastic) -> Result<Field, DiffusionError> {
    for i in 0..run.steps() {
        let (from, to) = (run.sigma(i), run.sigma(i + 1));
        let denoised = run.denoise(&x, from)?;
        run.report(i, &x, &denoised)?;
        let step = run.space().ancestral(from, to, opt.eta);
        if step.down == 0.0 {
            x = denoised;
            continue;
        }
        x = toward(&x, &denoised, from, step.down)?;
        x = run.renoise(x, &step, opt, from, to)?;
    }
    Ok(x)
}

/// CFG++: the direction comes from the unconditional prediction, the target from
/// the guided one.
pub(super) fn euler_cfg_pp(
    run: &mut Run<'_>,
    mut x: Field,
    opt: Stochastic,
) -> Result<Field, DiffusionError> {
    let space = run.space();
    for i in 0..run.steps() {
        let (from, to) = (run.sigma(i), run.sigma(i + 1));
        let (denoised, uncond) = run.predict(&x, from)?;
        run.report(i, &x, &denoised)?;
        if to == 0.0 {
            x = denoised;
            continue;
        }
        let (alpha_s, alpha_t) = (space.alpha(from), space.alpha(to));
        let (down, up) = super::snr::split_variance(from / alpha_s, to / alpha_t, opt.eta);
        let ratio = alpha_t * down / from;
        x = lincomb(&[(ratio, &x), (alpha_t, &denoised), (-ratio * alpha_s, &uncond)])?;
        if opt.is_active() {
            let noise = run.noise_like(&x, from, to)?;
            x = lincomb(&[(1.0, &x), (alpha_t * opt.s_noise * up, &noise)])?;
        }
    }
    Ok(x)
}

/// The alternative CFG++ form: Euler along `x − 2·denoised + uncond`.
pub(super) fn euler_cfg_pp_alternative(run: &mut Run<'_>, mut x: Field) -> Result<Field, DiffusionError> {
    for i in 0..run.steps() {
        let (from, to) = (run.sigma(i), run.sigma(i + 1));
        let (denoised, uncond) = run.predict(&x, from)?;
        run.report(i, &x, &denoised)?;
        let k = (to - from) / from;
        x = lincomb(&[(1.0 + k, &x), (-2.0 * k, &denoised), (k, &uncond)])?;
    }
    Ok(x)
}

/// Euler with the direction extrapolated from the previous one by `gamma`.
pub(super) fn gradient_estimation(
    run: &mut Run<'_>,
    mut x: Field,
    gamma: f64,
    cfg_pp: bool,
) -> Result<Field, DiffusionError> {
    let mut previous: Option<Field> = None;
    for i in 0..run.steps() {
        let (from, to) = (run.sigma(i), run.sigma(i + 1));
        let (denoised, uncond) = if cfg_pp {
            run.predict(&x, from).map(|(d, u)| (d, Some(u)))?
        } else {
            (run.denoise(&x, from)?, None)
        };
        let d = slope(&x, uncond.as_ref().unwrap_or(&denoised), from)?;
        run.report(i, &x, &denoised)?;
        if to == 0.0 {
            x = denoised;
        } else {
            x = match cfg_pp {
                true => lincomb(&[(1.0, &denoised), (to, &d)])?,
                false => lincomb(&[(1.0, &x), (to - from, &d)])?,
            };
            if let Some(old) = &previous {
                let k = (gamma - 1.0) * (to - from);
                x = lincomb(&[(1.0, &x), (k, &d), (-k, old)])?;
            }
        }
        previous = Some(d);
    }
    Ok(x)
}
