//! DPM-Solver++ for the reverse-time SDE: SDE (single step), 2M SDE and 3M SDE.
//!
//! `eta` scales the stochastic part. Noise comes from one Brownian path, so a
//! run does not change when the same path is cut into other steps.
//!
//! Source: Lu et al., "DPM-Solver++", 2022 (SDE variants, section 5), in the
//! half log-SNR variable; the third-order form extrapolates with divided
//! differences of the last three predictions.

use super::snr::split_variance;
use super::{Run, SolverType, Stochastic, lincomb};
use crate::diffusion::DiffusionError;
use crate::diffusion::Field;

/// Two model calls a step, the first after the fraction `r` of it.
pub(super) fn single_step(
    run: &mut Run<'_>,
    mut x: Field,
    opt: Stochastic,
    r: f64,
) -> Result<Field, DiffusionError> {
    if run.steps() == 0 {
        return Ok(x);
    }
    run.use_brownian_noise(&x)?;
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
        let (lambda_s, lambda_t) = (space.lambda(from), space.lambda(to));
        // In f32: a Brownian path is rough, and the inner sigma's last bit moves its value.
        let (start, end) = (lambda_s as f32, lambda_t as f32);
        let lambda_mid = f64::from(start + r as f32 * (end - start));
        let mid = f64::from(space.sigma(lambda_mid) as f32);
        let leg = |lambda_end: f64, sigma_end: f64| {
            let (down, up) = split_variance((-lambda_s).exp(), (-lambda_end).exp(), opt.eta);
            let decay = (-(-down.ln() - lambda_s)).exp();
            let (alpha_s, alpha) = (space.alpha(from), space.alpha(sigma_end));
            (alpha / alpha_s * decay, alpha * (1.0 - decay), alpha * up * opt.s_noise)
        };
        let (keep, gain, spread) = leg(lambda_mid, mid);
        let mut x2 = lincomb(&[(keep, &x), (gain, &denoised)])?;
        if opt.is_active() {
            let noise = run.noise_like(&x, from, mid)?;
            x2 = lincomb(&[(1.0, &x2), (spread, &noise)])?;
        }
        let denoised_2 = run.denoise(&x2, mid)?;
        let (keep, gain, spread) = leg(lambda_t, to);
        x = lincomb(&[(keep, &x), (gain * (1.0 - fac), &denoised), (gain * fac, &denoised_2)])?;
        if opt.is_active() {
            let noise = run.noise_like(&x, from, to)?;
            x = lincomb(&[(1.0, &x), (spread, &noise)])?;
        }
    }
    Ok(x)
}

/// Second-order multistep.
pub(super) fn two_m(
    run: &mut Run<'_>,
    mut x: Field,
    opt: Stochastic,
    solver: SolverType,
) -> Result<Field, DiffusionError> {
    if run.steps() == 0 {
        return Ok(x);
    }
    run.use_brownian_noise(&x)?;
    run.bound_first_sigma();
    let mut previous: Option<(Field, f64)> = None;
    for i in 0..run.steps() {
        let denoised = run.denoise(&x, run.sigma(i))?;
        run.report(i, &x, &denoised)?;
        let Some(step) = Step::at(run, i, opt) else {
            x = denoised;
            continue;
        };
        let mut drift = vec![(step.keep, &x), (step.gain, &denoised)];
        if let Some((old, h_old)) = &previous {
            let c = match solver {
                SolverType::Heun => step.alpha * (1.0 - step.gain_fraction / step.h_eta),
                SolverType::Midpoint => 0.5 * step.gain,
            };
            let c = c * step.h / h_old;
            drift.extend([(c, &denoised), (-c, old)]);
        }
        x = lincomb(&drift)?;
        x = step.add_noise(run, x, opt)?;
        previous = Some((denoised, step.h));
    }
    Ok(x)
}

/// Third-order multistep.
pub(super) fn three_m(run: &mut Run<'_>, mut x: Field, opt: Stochastic) -> Result<Field, DiffusionError> {
    if run.steps() == 0 {
        return Ok(x);
    }
    run.use_brownian_noise(&x)?;
    run.bound_first_sigma();
    let mut history: Vec<(Field, f64)> = Vec::new();
    for i in 0..run.steps() {
        let denoised = run.denoise(&x, run.sigma(i))?;
        run.report(i, &x, &denoised)?;
        let Some(step) = Step::at(run, i, opt) else {
            x = denoised;
            continue;
        };
        let phi_2 = 1.0 - step.gain_fraction / step.h_eta;
        let phi_3 = phi_2 / step.h_eta - 0.5;
        let (a2, a3) = (step.alpha * phi_2, step.alpha * phi_3);
        let mut drift = vec![(step.keep, &x), (step.gain, &denoised)];
        match history.as_slice() {
            [.., (d2, h2), (d1, h1)] => {
                // First and second divided differences of the predictions in log-SNR.
                let (r0, r1) = (h1 / step.h, h2 / step.h);
                let (p, q) = (r0 / (r0 + r1), 1.0 / (r0 + r1));
                let first = a2 * (1.0 + p) - a3 * q;
                let second = a3 * q - a2 * p;
                drift.extend([(first / r0, &denoised), (-first / r0 + second / r1, d1), (-second / r1, d2)]);
            }
            [(d1, h1)] => {
                let c = a2 * step.h / h1;
                drift.extend([(c, &denoised), (-c, d1)]);
            }
            [] => {}
        }
        x = lincomb(&drift)?;
        x = step.add_noise(run, x, opt)?;
        if history.len() == 2 {
            history.remove(0);
        }
        history.push((denoised, step.h));
    }
    Ok(x)
}

/// One multistep SDE step in log-SNR.
struct Step {
    from: f64,
    to: f64,
    alpha: f64,
    h: f64,
    h_eta: f64,
    keep: f64,
    gain: f64,
    gain_fraction: f64,
}

impl Step {
    /// The step after sigma `i`, unless it ends at 0.
    fn at(run: &Run<'_>, i: usize, opt: Stochastic) -> Option<Self> {
        let (from, to) = (run.sigma(i), run.sigma(i + 1));
        if to == 0.0 {
            return None;
        }
        let space = run.space();
        let h = space.lambda(to) - space.lambda(from);
        let h_eta = h * (opt.eta + 1.0);
        let alpha = space.alpha(to);
        let gain_fraction = -(-h_eta).exp_m1();
        let keep = to / from * (-h * opt.eta).exp();
        Some(Self { from, to, alpha, h, h_eta, keep, gain: alpha * gain_fraction, gain_fraction })
    }

    fn add_noise(&self, run: &mut Run<'_>, x: Field, opt: Stochastic) -> Result<Field, DiffusionError> {
        if !opt.is_active() {
            return Ok(x);
        }
        let noise = run.noise_like(&x, self.from, self.to)?;
        let spread = self.to * (-(-2.0 * self.h * opt.eta).exp_m1()).sqrt() * opt.s_noise;
        lincomb(&[(1.0, &x), (spread, &noise)])
    }
}
