//! DPM-Solver of order 1 to 3: a fixed number of model calls (`dpm_fast`) or a
//! step size found by error control (`dpm_adaptive`).
//!
//! Time is `t = −ln sigma`; the noise prediction is `eps = (x − denoised)/sigma`.
//! Both end at the schedule's last positive sigma, not at 0.
//!
//! Source: Lu et al., "DPM-Solver", 2022 (algorithms 1 to 3 and the adaptive
//! scheme); the controller is the PID form of Söderlind, 2003.

use super::snr::split_variance;
use super::{Run, lincomb};
use crate::diffusion::DiffusionError;
use crate::diffusion::Field;

/// How near to the end, in log-SNR, counts as there.
const END_TOLERANCE: f64 = 1e-5;

/// Settings of the adaptive solver.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdaptiveOptions {
    /// 2 or 3.
    pub order: usize,
    /// Relative error allowed a step.
    pub rtol: f64,
    /// Absolute error allowed a step.
    pub atol: f64,
    /// First step in log-SNR.
    pub h_init: f64,
    /// Proportional coefficient of the controller.
    pub pcoeff: f64,
    /// Integral coefficient.
    pub icoeff: f64,
    /// Derivative coefficient.
    pub dcoeff: f64,
    /// A step is kept if the proposed factor reaches this.
    pub accept_safety: f64,
    /// Stochasticity.
    pub eta: f64,
    /// Factor on the noise.
    pub s_noise: f64,
}

impl Default for AdaptiveOptions {
    fn default() -> Self {
        Self {
            order: 3,
            rtol: 0.05,
            atol: 0.0078,
            h_init: 0.05,
            pcoeff: 0.0,
            icoeff: 1.0,
            dcoeff: 0.0,
            accept_safety: 0.81,
            eta: 0.0,
            s_noise: 1.0,
        }
    }
}

/// The first and the last positive sigma of the schedule.
fn ends(run: &Run<'_>) -> (f64, f64) {
    let n = run.steps();
    let last = run.sigma(n);
    (run.sigma(0), if last == 0.0 { run.sigma(n - 1) } else { last })
}

fn eps(run: &mut Run<'_>, x: &Field, t: f64) -> Result<Field, DiffusionError> {
    let sigma = (-t).exp();
    let denoised = run.denoise(x, sigma)?;
    super::slope(x, &denoised, sigma)
}

/// A step from `t` over `h`, starting from the noise prediction `e` there.
struct Leg<'a> {
    x: &'a Field,
    e: &'a Field,
    t: f64,
    h: f64,
}

impl Leg<'_> {
    fn sigma_at(&self, part: f64) -> f64 {
        (-(self.t + part * self.h)).exp()
    }

    /// First order, to the fraction `part` of the step.
    fn first(&self, part: f64) -> Result<Field, DiffusionError> {
        let c = -self.sigma_at(part) * (part * self.h).exp_m1();
        lincomb(&[(1.0, self.x), (c, self.e)])
    }

    /// Noise prediction at the fraction `part`, reached with first order.
    fn inner(&self, run: &mut Run<'_>, part: f64) -> Result<Field, DiffusionError> {
        eps(run, &self.first(part)?, self.t + part * self.h)
    }

    /// Second order with the prediction `e1` at the fraction `r1`.
    fn second(&self, e1: &Field, r1: f64) -> Result<Field, DiffusionError> {
        let c = -self.sigma_at(1.0) * self.h.exp_m1();
        let k = c / (2.0 * r1);
        lincomb(&[(1.0, self.x), (c - k, self.e), (k, e1)])
    }

    /// Third order with the prediction `e1` at one third; makes one more model call.
    fn third(&self, run: &mut Run<'_>, e1: &Field) -> Result<Field, DiffusionError> {
        let (r1, r2) = (1.0 / 3.0, 2.0 / 3.0);
        let phi = |z: f64| z.exp_m1() / z - 1.0;
        let sigma = self.sigma_at(r2);
        let c = -sigma * (r2 * self.h).exp_m1();
        let k = -sigma * (r2 / r1) * phi(r2 * self.h);
        let u2 = lincomb(&[(1.0, self.x), (c - k, self.e), (k, e1)])?;
        let e2 = eps(run, &u2, self.t + r2 * self.h)?;
        let sigma = self.sigma_at(1.0);
        let c = -sigma * self.h.exp_m1();
        let k = -sigma / r2 * phi(self.h);
        lincomb(&[(1.0, self.x), (c - k, self.e), (k, &e2)])
    }
}

/// As many model calls as the schedule has steps, in as few third-order steps as
/// that allows.
pub(super) fn fast(run: &mut Run<'_>, mut x: Field) -> Result<Field, DiffusionError> {
    let calls = run.steps();
    if calls == 0 {
        return Ok(x);
    }
    let (first, last) = ends(run);
    let (start, end) = (-first.ln(), -last.ln());
    let legs = calls / 3 + 1;
    let mut orders = vec![3; legs - 1];
    match calls % 3 {
        0 => {
            orders.truncate(legs - 2);
            orders.extend([2, 1]);
        }
        rest => orders.push(rest),
    }
    for (i, order) in orders.into_iter().enumerate() {
        let at = |k: usize| start + (end - start) * k as f64 / legs as f64;
        let t = at(i);
        let h = at(i + 1) - t;
        let sigma = (-t).exp();
        let denoised = run.denoise(&x, sigma)?;
        let e = super::slope(&x, &denoised, sigma)?;
        run.report(i, &x, &denoised)?;
        let leg = Leg { x: &x, e: &e, t, h };
        x = match order {
            1 => leg.first(1.0)?,
            2 => leg.second(&leg.inner(run, 0.5)?, 0.5)?,
            _ => {
                let e1 = leg.inner(run, 1.0 / 3.0)?;
                leg.third(run, &e1)?
            }
        };
    }
    Ok(x)
}

/// Step size control from the last three errors.
struct PidController {
    h: f64,
    b: [f64; 3],
    accept_safety: f64,
    inverse_errors: Option<[f64; 3]>,
}

impl PidController {
    fn new(opt: &AdaptiveOptions) -> Self {
        let order = if opt.eta > 0.0 { 1.5 } else { opt.order as f64 };
        let b = [
            (opt.pcoeff + opt.icoeff + opt.dcoeff) / order,
            -(opt.pcoeff + 2.0 * opt.dcoeff) / order,
            opt.dcoeff / order,
        ];
        Self { h: opt.h_init.abs(), b, accept_safety: opt.accept_safety, inverse_errors: None }
    }

    /// Sets the next step size from this step's error; says whether the step is kept.
    fn propose(&mut self, error: f64) -> bool {
        let inverse = 1.0 / (error + 1e-8);
        let errors = self.inverse_errors.get_or_insert([inverse; 3]);
        errors[0] = inverse;
        let raw: f64 = errors.iter().zip(self.b).map(|(e, b)| e.powf(b)).product();
        let factor = 1.0 + (raw - 1.0).atan();
        let accept = factor >= self.accept_safety;
        if accept {
            errors[2] = errors[1];
            errors[1] = errors[0];
        }
        self.h *= factor;
        accept
    }
}

/// Root mean square of the difference in units of the allowed error.
fn error_norm(
    low: &Field,
    high: &Field,
    before: &Field,
    opt: &AdaptiveOptions,
) -> Result<f64, DiffusionError> {
    let sum = Field::error_sum(low, high, before, (opt.atol, opt.rtol))?;
    let count: usize = low.shape().iter().product();
    Ok((sum / count.max(1) as f64).sqrt())
}

/// Steps as large as the error bound allows.
pub(super) fn adaptive(
    run: &mut Run<'_>,
    mut x: Field,
    opt: AdaptiveOptions,
) -> Result<Field, DiffusionError> {
    if run.steps() == 0 {
        return Ok(x);
    }
    if !matches!(opt.order, 2 | 3) {
        let what = format!("order must be 2 or 3, not {}", opt.order);
        return Err(DiffusionError::Sampler { sampler: "dpm_adaptive", what });
    }
    let (first, last) = ends(run);
    let (mut s, end) = (-first.ln(), -last.ln());
    let mut pid = PidController::new(&opt);
    let mut before = x.clone();
    let mut attempt = 0;
    while s < end - END_TOLERANCE {
        if !(pid.h.is_finite() && s + pid.h > s) {
            let what = format!("the step size became {} at t = {s}; allow a larger error", pid.h);
            return Err(DiffusionError::Sampler { sampler: "dpm_adaptive", what });
        }
        let t = end.min(s + pid.h);
        let (target, up) = if opt.eta > 0.0 {
            let (down, _) = split_variance((-s).exp(), (-t).exp(), opt.eta);
            let target = end.min(-down.ln());
            (target, ((-2.0 * t).exp() - (-2.0 * target).exp()).max(0.0).sqrt())
        } else {
            (t, 0.0)
        };
        let sigma = (-s).exp();
        let denoised = run.denoise(&x, sigma)?;
        let e = super::slope(&x, &denoised, sigma)?;
        let leg = Leg { x: &x, e: &e, t: s, h: target - s };
        let (low, high) = if opt.order == 2 {
            let e1 = leg.inner(run, 0.5)?;
            (leg.first(1.0)?, leg.second(&e1, 0.5)?)
        } else {
            let e1 = leg.inner(run, 1.0 / 3.0)?;
            (leg.second(&e1, 1.0 / 3.0)?, leg.third(run, &e1)?)
        };
        let error = error_norm(&low, &high, &before, &opt)?;
        if pid.propose(error) {
            before = low;
            x = high;
            if opt.eta > 0.0 {
                let noise = run.noise_like(&x, (-s).exp(), (-t).exp())?;
                x = lincomb(&[(1.0, &x), (up * opt.s_noise, &noise)])?;
            }
            s = t;
        }
        run.report(attempt, &x, &denoised)?;
        attempt += 1;
    }
    Ok(x)
}
