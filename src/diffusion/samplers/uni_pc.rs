//! UniPC: a unified predictor-corrector of order up to three.
//!
//! The method is stated for variance-preserving processes, so the latent is
//! divided by `sqrt(1 + sigma²)` on the way in and out; there `alpha` and
//! `sigma_vp` are the cosine and sine of the same angle and `lambda = −ln sigma`.
//!
//! Source: Zhao et al., "UniPC", 2023 (data prediction, B(h) variants 1 and 2).

use super::{Run, lincomb};
use crate::diffusion::DiffusionError;
use crate::diffusion::Field;

/// Stand-in for a final sigma of 0, which has no finite log-SNR.
const LAST_SIGMA: f64 = 0.001;
/// Highest order.
const MAX_ORDER: usize = 3;

/// The function `B(h)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BVariant {
    /// `B(h) = h`.
    Bh1,
    /// `B(h) = exp(h) − 1`.
    Bh2,
}

/// A model prediction and where it was made.
struct Point {
    sigma: f64,
    denoised: Field,
}

/// Runs UniPC.
pub(super) fn uni_pc(run: &mut Run<'_>, x: Field, variant: BVariant) -> Result<Field, DiffusionError> {
    let steps = run.steps();
    if steps == 0 {
        return Ok(x);
    }
    run.bound_last_sigma(LAST_SIGMA);
    let sigmas: Vec<f64> = (0..=steps).map(|i| run.sigma(i)).collect();
    let max_order = MAX_ORDER.min(steps - 1);
    let mut x = lincomb(&[(alpha(sigmas[0]), &x)])?;
    let mut points: Vec<Point> = Vec::new();
    for i in 0..steps {
        if i == 0 {
            let denoised = predict(run, &x, sigmas[0])?;
            points.push(Point { sigma: sigmas[0], denoised });
        } else {
            // The last round makes two steps: the final one needs no model call of its own.
            let last = if i >= max_order && i == steps - 1 { i + 1 } else { i };
            for (target, &sigma) in sigmas.iter().enumerate().take(last + 1).skip(i) {
                let order = i.min(max_order).min(steps + 1 - target);
                let update = Update::new(&points, sigma, order, variant);
                x = if target < steps {
                    let (next, denoised) = update.predict_and_correct(run, &x)?;
                    points.push(Point { sigma, denoised });
                    next
                } else {
                    update.predict(&x)?
                };
            }
        }
        if let Some(point) = points.last() {
            run.report(i, &x, &point.denoised)?;
        }
    }
    lincomb(&[(1.0 / alpha(sigmas[steps]), &x)])
}

// The three marginals are computed in f32: at small sigmas `1 − alpha²` keeps few
// digits, and those are part of the result.

fn log_alpha(sigma: f64) -> f32 {
    let sigma = sigma as f32;
    0.5 * (1.0 / (sigma * sigma + 1.0)).ln()
}

fn alpha(sigma: f64) -> f64 {
    f64::from(log_alpha(sigma).exp())
}

fn sigma_vp(sigma: f64) -> f64 {
    f64::from((1.0 - (2.0 * log_alpha(sigma)).exp()).sqrt())
}

fn lambda(sigma: f64) -> f64 {
    let log_alpha = log_alpha(sigma);
    f64::from(log_alpha - 0.5 * (1.0 - (2.0 * log_alpha).exp()).ln())
}

fn predict(run: &mut Run<'_>, x: &Field, sigma: f64) -> Result<Field, DiffusionError> {
    run.denoise(&lincomb(&[(1.0 / alpha(sigma), x)])?, sigma)
}

/// One step of a given order to `sigma`.
struct Update<'a> {
    sigma: f64,
    /// Predictions used, newest first.
    points: Vec<&'a Point>,
    /// Their distances from the newest one in units of the step; then 1 for the target.
    ratios: Vec<f64>,
    /// `exp(−h) − 1`.
    h_phi_1: f64,
    b_h: f64,
    /// Right-hand sides of the order conditions.
    b: Vec<f64>,
}

impl<'a> Update<'a> {
    fn new(points: &'a [Point], sigma: f64, order: usize, variant: BVariant) -> Self {
        let points: Vec<&Point> = points.iter().rev().take(order.max(1)).collect();
        let newest = lambda(points[0].sigma);
        let h = lambda(sigma) - newest;
        let mut ratios: Vec<f64> = points.iter().skip(1).map(|p| (lambda(p.sigma) - newest) / h).collect();
        ratios.push(1.0);
        let hh = -h;
        let h_phi_1 = hh.exp_m1();
        let b_h = match variant {
            BVariant::Bh1 => hh,
            BVariant::Bh2 => h_phi_1,
        };
        let (mut phi, mut factorial) = (h_phi_1 / hh - 1.0, 1.0);
        let mut b = Vec::with_capacity(ratios.len());
        for k in 1..=ratios.len() {
            b.push(phi * factorial / b_h);
            factorial *= (k + 1) as f64;
            phi = phi / hh - 1.0 / factorial;
        }
        Self { sigma, points, ratios, h_phi_1, b_h, b }
    }

    /// `x` after the step with the given weights of the difference quotients and,
    /// for the corrector, of the prediction at the target.
    fn advance(
        &self,
        x: &Field,
        weights: &[f64],
        target: Option<(f64, &Field)>,
    ) -> Result<Field, DiffusionError> {
        let alpha_t = alpha(self.sigma);
        let newest = self.points[0];
        let ratio = sigma_vp(self.sigma) / sigma_vp(newest.sigma);
        let c = -alpha_t * self.b_h;
        let mut of_newest = -alpha_t * self.h_phi_1;
        let mut terms = vec![(ratio, x)];
        for ((w, r), point) in weights.iter().zip(&self.ratios).zip(&self.points[1..]) {
            terms.push((c * w / r, &point.denoised));
            of_newest -= c * w / r;
        }
        if let Some((w, denoised)) = target {
            terms.push((c * w, denoised));
            of_newest -= c * w;
        }
        terms.push((of_newest, &newest.denoised));
        lincomb(&terms)
    }

    fn predict(&self, x: &Field) -> Result<Field, DiffusionError> {
        let weights = match self.ratios.len() {
            1 => Vec::new(),
            2 => vec![0.5],
            n => solve_vandermonde(&self.ratios[..n - 1], &self.b[..n - 1]),
        };
        self.advance(x, &weights, None)
    }

    fn predict_and_correct(&self, run: &mut Run<'_>, x: &Field) -> Result<(Field, Field), DiffusionError> {
        let predicted = self.predict(x)?;
        let denoised = predict(run, &predicted, self.sigma)?;
        let weights = match self.ratios.len() {
            1 => vec![0.5],
            _ => solve_vandermonde(&self.ratios, &self.b),
        };
        let (of_target, of_points) = weights.split_last().map_or((0.0, &[][..]), |(w, rest)| (*w, rest));
        let corrected = self.advance(x, of_points, Some((of_target, &denoised)))?;
        Ok((corrected, denoised))
    }
}

/// Solves `Σ_j r_j^i·w_j = b_i` for `i = 0..n`: every weight is the product of the
/// Lagrange polynomial's coefficients with the right-hand sides.
fn solve_vandermonde(ratios: &[f64], b: &[f64]) -> Vec<f64> {
    super::polynomial::quadrature_weights(ratios, b)
}
