//! ER-SDE: extended reverse-time SDE solvers of up to third order.
//!
//! Source: Cui et al., "Elucidating the solution space of extended reverse-time
//! SDE for diffusion models", 2023. The method works in `v = sigma / alpha`;
//! a *noise scaler* `phi(v)` says how much noise a step replaces.

use super::{Run, lincomb};
use crate::diffusion::DiffusionError;
use crate::diffusion::Field;

/// Points of the Riemann sums that stand for the integrals of the scaler.
const POINTS: usize = 200;

/// The function `phi` of ER-SDE.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum NoiseScaler {
    /// The paper's best: `v·(exp(v^0.3) + 10)`.
    Extended,
    /// Powers `v^(1 + eta)`: 1 is the reverse-time SDE, 0 the ODE.
    Power(f64),
}

impl NoiseScaler {
    fn phi(self, v: f64) -> f64 {
        match self {
            NoiseScaler::Extended => v * (v.powf(0.3).exp() + 10.0),
            NoiseScaler::Power(eta) => v.powf(1.0 + eta),
        }
    }
}

/// Settings of ER-SDE.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ErSdeOptions {
    /// The noise scaler.
    pub scaler: NoiseScaler,
    /// Highest order, 1 to 3.
    pub max_stage: usize,
    /// Factor on the noise.
    pub s_noise: f64,
}

impl Default for ErSdeOptions {
    fn default() -> Self {
        Self { scaler: NoiseScaler::Extended, max_stage: 3, s_noise: 1.0 }
    }
}

/// Runs ER-SDE.
pub(super) fn er_sde(run: &mut Run<'_>, mut x: Field, opt: ErSdeOptions) -> Result<Field, DiffusionError> {
    run.bound_first_sigma();
    let space = run.space();
    let v: Vec<f64> = (0..=run.steps()).map(|i| run.sigma(i) / space.alpha(run.sigma(i))).collect();
    let phi = |v| opt.scaler.phi(v);
    let mut old: Option<Field> = None;
    let mut old_slope: Option<Field> = None;
    for i in 0..run.steps() {
        let (from, to) = (run.sigma(i), run.sigma(i + 1));
        let denoised = run.denoise(&x, from)?;
        run.report(i, &x, &denoised)?;
        if to == 0.0 {
            x = denoised;
            continue;
        }
        let alpha = space.alpha(to);
        let r = phi(v[i + 1]) / phi(v[i]);
        let keep = alpha / space.alpha(from) * r;
        let mut next = lincomb(&[(keep, &x), (alpha * (1.0 - r), &denoised)])?;
        if let Some(previous) = old.as_ref().filter(|_| opt.max_stage >= 2) {
            let dv = v[i + 1] - v[i];
            let (sum, sum_u) = scaler_sums(v[i], v[i + 1], phi);
            let k = 1.0 / (v[i] - v[i - 1]);
            let slope = lincomb(&[(k, &denoised), (-k, previous)])?;
            next = lincomb(&[(1.0, &next), (alpha * (dv + sum * phi(v[i + 1])), &slope)])?;
            if let Some(before) = old_slope.as_ref().filter(|_| opt.max_stage >= 3) {
                let c = alpha * (dv * dv / 2.0 + sum_u * phi(v[i + 1])) * 2.0 / (v[i] - v[i - 2]);
                next = lincomb(&[(1.0, &next), (c, &slope), (-c, before)])?;
            }
            old_slope = Some(slope);
        }
        let variance = v[i + 1].powi(2) - (v[i] * r).powi(2);
        if opt.s_noise > 0.0 {
            let noise = run.noise_like(&x, from, to)?;
            next = lincomb(&[(1.0, &next), (alpha * opt.s_noise * variance.max(0.0).sqrt(), &noise)])?;
        }
        x = next;
        old = Some(denoised);
    }
    Ok(x)
}

/// Riemann sums over `[to, from]` of `1/phi(v)` and `(v − from)/phi(v)`.
fn scaler_sums(from: f64, to: f64, phi: impl Fn(f64) -> f64) -> (f64, f64) {
    let width = (from - to) / POINTS as f64;
    let (mut sum, mut sum_u) = (0.0, 0.0);
    for k in 0..POINTS {
        let v = to + k as f64 * width;
        let inverse = width / phi(v);
        sum += inverse;
        sum_u += (v - from) * inverse;
    }
    (sum, sum_u)
}
