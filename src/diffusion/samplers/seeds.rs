//! SEEDS: exponential SDE solvers with two or three stages.
//!
//! Every stage sees the noise of the earlier ones, decayed, plus noise of its own.
//!
//! Source: Gonzalez et al., "SEEDS: Exponential SDE solvers for fast
//! high-quality sampling from diffusion models", 2023.

use super::{Run, SnrSpace, Stochastic, lincomb};
use crate::diffusion::DiffusionError;
use crate::diffusion::Field;

/// A point inside the step: its place and the factors of the exponential integrator.
struct Stage {
    sigma: f64,
    alpha: f64,
    /// Factor on the latent at the start of the step.
    keep: f64,
    /// `1 − exp(−h(1+eta))` over the part of the step up to here.
    gain: f64,
    /// The part's length times `1 + eta`.
    h_eta: f64,
    /// `exp(−2·h·eta)` over the part.
    decay: f64,
}

impl Stage {
    fn at(space: SnrSpace, from: f64, to: f64, fraction: f64, eta: f64) -> Self {
        let (start, end) = (space.lambda(from), space.lambda(to));
        let part = fraction * (end - start);
        let sigma = if fraction == 1.0 { to } else { space.sigma(start + part) };
        let h_eta = part * (1.0 + eta);
        Self {
            sigma,
            alpha: space.alpha(sigma),
            keep: sigma / from * (-part * eta).exp(),
            gain: -(-h_eta).exp_m1(),
            h_eta,
            decay: (-2.0 * part * eta).exp(),
        }
    }

    /// Second-order weight: `1 − gain / h_eta`.
    fn phi_2(&self) -> f64 {
        1.0 - self.gain / self.h_eta
    }
}

/// Two stages, the first after the fraction `r` of the step.
pub(super) fn seeds_2(
    run: &mut Run<'_>,
    mut x: Field,
    opt: Stochastic,
    r: f64,
) -> Result<Field, DiffusionError> {
    run.bound_first_sigma();
    let space = run.space();
    let fac = 1.0 / (2.0 * r);
    for i in 0..run.steps() {
        let (from, to) = (run.sigma(i), run.sigma(i + 1));
        let denoised = run.denoise(&x, from)?;
        run.report(i, &x, &denoised)?;
        if to == 0.0 {
            x = denoised;
            continue;
        }
        let a = Stage::at(space, from, to, r, opt.eta);
        let end = Stage::at(space, from, to, 1.0, opt.eta);
        let noises = if opt.is_active() {
            vec![run.noise_like(&x, from, a.sigma)?, run.noise_like(&x, a.sigma, to)?]
        } else {
            vec![]
        };
        let own = (1.0 - a.decay).sqrt();
        let carried = (a.decay - end.decay).sqrt();

        let mut terms = vec![(a.keep, &x), (a.alpha * a.gain, &denoised)];
        add_noise(&mut terms, &noises, &[own], a.sigma * opt.s_noise);
        let x2 = lincomb(&terms)?;
        let denoised_2 = run.denoise(&x2, a.sigma)?;

        let gain = end.alpha * end.gain;
        let mut terms = vec![(end.keep, &x), (gain * (1.0 - fac), &denoised), (gain * fac, &denoised_2)];
        add_noise(&mut terms, &noises, &[carried, own], to * opt.s_noise);
        x = lincomb(&terms)?;
    }
    Ok(x)
}

/// Three stages, after one third and two thirds of the step.
pub(super) fn seeds_3(run: &mut Run<'_>, mut x: Field, opt: Stochastic) -> Result<Field, DiffusionError> {
    run.bound_first_sigma();
    let space = run.space();
    let (r1, r2) = (1.0 / 3.0, 2.0 / 3.0);
    for i in 0..run.steps() {
        let (from, to) = (run.sigma(i), run.sigma(i + 1));
        let denoised = run.denoise(&x, from)?;
        run.report(i, &x, &denoised)?;
        if to == 0.0 {
            x = denoised;
            continue;
        }
        let a = Stage::at(space, from, to, r1, opt.eta);
        let b = Stage::at(space, from, to, r2, opt.eta);
        let end = Stage::at(space, from, to, 1.0, opt.eta);
        let noises = if opt.is_active() {
            vec![
                run.noise_like(&x, from, a.sigma)?,
                run.noise_like(&x, a.sigma, b.sigma)?,
                run.noise_like(&x, b.sigma, to)?,
            ]
        } else {
            vec![]
        };
        let n1 = (1.0 - a.decay).sqrt();
        let n2 = (a.decay - b.decay).sqrt();
        let n3 = (b.decay - end.decay).sqrt();

        let mut terms = vec![(a.keep, &x), (a.alpha * a.gain, &denoised)];
        add_noise(&mut terms, &noises, &[n1], a.sigma * opt.s_noise);
        let x2 = lincomb(&terms)?;
        let denoised_2 = run.denoise(&x2, a.sigma)?;

        let c = r2 / r1 * b.alpha * b.phi_2();
        let mut terms = vec![(b.keep, &x), (b.alpha * b.gain - c, &denoised), (c, &denoised_2)];
        add_noise(&mut terms, &noises, &[n2, n1], b.sigma * opt.s_noise);
        let x3 = lincomb(&terms)?;
        let denoised_3 = run.denoise(&x3, b.sigma)?;

        let c = end.alpha * end.phi_2() / r2;
        let mut terms = vec![(end.keep, &x), (end.alpha * end.gain - c, &denoised), (c, &denoised_3)];
        add_noise(&mut terms, &noises, &[n3, n2, n1], to * opt.s_noise);
        x = lincomb(&terms)?;
    }
    Ok(x)
}

/// Appends `scale · factor · noise` for as many noises as there are factors.
fn add_noise<'a>(terms: &mut Vec<(f64, &'a Field)>, noises: &'a [Field], factors: &[f64], scale: f64) {
    terms.extend(factors.iter().zip(noises).map(|(f, n)| (scale * f, n)));
}
