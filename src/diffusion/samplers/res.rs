//! RES multistep: a second-order exponential integrator with refined weights,
//! optionally ancestral and in CFG++ form.
//!
//! Source: Zhang et al., "The refined exponential solver", 2023.

use super::{Run, Stochastic, lincomb, slope, toward};
use crate::diffusion::DiffusionError;
use crate::diffusion::Field;

/// Runs RES multistep.
pub(super) fn res_multistep(
    run: &mut Run<'_>,
    mut x: Field,
    opt: Stochastic,
    cfg_pp: bool,
) -> Result<Field, DiffusionError> {
    let mut previous: Option<(Field, f64)> = None;
    for i in 0..run.steps() {
        let (from, to) = (run.sigma(i), run.sigma(i + 1));
        let (denoised, uncond) = if cfg_pp {
            run.predict(&x, from).map(|(d, u)| (d, Some(u)))?
        } else {
            (run.denoise(&x, from)?, None)
        };
        run.report(i, &x, &denoised)?;
        let (down, up) = super::snr::split_variance(from, to, opt.eta);
        x = match (&previous, &uncond) {
            (Some((old, old_down)), _) if down > 0.0 => {
                let h = (from / down).ln();
                // Distance of the previous prediction in units of this step.
                let c2 = (old_down / run.sigma(i - 1)).ln() / h;
                let (b1, b2) = weights(h, c2);
                let k = (-h).exp();
                match &uncond {
                    None => lincomb(&[(k, &x), (h * b1, &denoised), (h * b2, old)])?,
                    Some(u) => lincomb(&[(k, &x), (k, &denoised), (h * b1 - k, u), (h * b2, old)])?,
                }
            }
            (_, Some(u)) => lincomb(&[(1.0, &denoised), (down, &slope(&x, u, from)?)])?,
            (_, None) => toward(&x, &denoised, from, down)?,
        };
        if to > 0.0 && up > 0.0 {
            let noise = run.noise_like(&x, from, to)?;
            x = lincomb(&[(1.0, &x), (opt.s_noise * up, &noise)])?;
        }
        previous = Some((uncond.unwrap_or(denoised), down));
    }
    Ok(x)
}

/// Weights of the current and the previous prediction for a step `h` in log-SNR.
fn weights(h: f64, c2: f64) -> (f64, f64) {
    let phi_1 = (-h).exp_m1() / -h;
    let phi_2 = (phi_1 - 1.0) / -h;
    let finite = |v: f64| if v.is_nan() { 0.0 } else { v };
    (finite(phi_1 - phi_2 / c2), finite(phi_2 / c2))
}
