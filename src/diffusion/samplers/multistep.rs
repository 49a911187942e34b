//! Multistep methods on the slope: LMS, iPNDM, iPNDM-v and DEIS.
//!
//! Sources: Liu et al., "PNDM", 2022, and Zhang and Chen, "Fast sampling of
//! diffusion models with exponential integrator" (DEIS, iPNDM), 2023; LMS
//! integrates the Lagrange interpolant of the last slopes over sigma.

use std::collections::VecDeque;

use super::polynomial::{adams_weights, lagrange};
use super::{Run, lincomb, slope};
use crate::diffusion::DiffusionError;
use crate::diffusion::Field;

/// Adams-Bashforth weights for equal steps, newest slope first.
const ADAMS_BASHFORTH: [&[f64]; 4] = [
    &[1.0],
    &[3.0 / 2.0, -1.0 / 2.0],
    &[23.0 / 12.0, -16.0 / 12.0, 5.0 / 12.0],
    &[55.0 / 24.0, -59.0 / 24.0, 37.0 / 24.0, -9.0 / 24.0],
];

/// Runs a multistep method: `weights(sigmas, i, order)` gives the factors of the
/// newest `order` slopes (newest first) for the step after sigma `i`.
fn multistep(
    run: &mut Run<'_>,
    mut x: Field,
    max_order: usize,
    mut weights: impl FnMut(&[f64], usize, usize) -> Vec<f64>,
) -> Result<Field, DiffusionError> {
    let sigmas: Vec<f64> = (0..=run.steps()).map(|i| run.sigma(i)).collect();
    let mut slopes: VecDeque<Field> = VecDeque::with_capacity(max_order + 1);
    for i in 0..run.steps() {
        let denoised = run.denoise(&x, sigmas[i])?;
        run.report(i, &x, &denoised)?;
        slopes.push_front(slope(&x, &denoised, sigmas[i])?);
        slopes.truncate(max_order);
        if sigmas[i + 1] == 0.0 {
            x = denoised;
            continue;
        }
        let factors = weights(&sigmas, i, slopes.len());
        let mut terms = vec![(1.0, &x)];
        terms.extend(factors.into_iter().zip(&slopes));
        x = lincomb(&terms)?;
    }
    Ok(x)
}

/// Linear multistep in sigma.
pub(super) fn lms(run: &mut Run<'_>, x: Field, order: usize) -> Result<Field, DiffusionError> {
    multistep(run, x, order.max(1), |sigmas, i, order| {
        let nodes: Vec<f64> = (0..order).map(|k| sigmas[i - k]).collect();
        adams_weights(&nodes, sigmas[i], sigmas[i + 1])
    })
}

/// Adams-Bashforth weights of equal steps, whatever the steps are.
pub(super) fn ipndm(run: &mut Run<'_>, x: Field) -> Result<Field, DiffusionError> {
    multistep(run, x, 4, |sigmas, i, order| {
        let h = sigmas[i + 1] - sigmas[i];
        ADAMS_BASHFORTH[order - 1].iter().map(|w| w * h).collect()
    })
}

/// iPNDM for unequal steps.
pub(super) fn ipndm_v(run: &mut Run<'_>, x: Field) -> Result<Field, DiffusionError> {
    multistep(run, x, 4, |sigmas, i, order| {
        let h: Vec<f64> = (0..order).map(|k| sigmas[i + 1 - k] - sigmas[i - k]).collect();
        variable_step_weights(&h).iter().map(|w| w * h[0]).collect()
    })
}

/// Weights of iPNDM-v for steps `h` (newest first), per unit of the newest step.
///
/// The second-order weights are those of a variable-step Adams-Bashforth method.
/// The higher orders' corrections `third` and `fourth` differ from its divided
/// differences, as in the published implementation, whose results these are.
fn variable_step_weights(h: &[f64]) -> Vec<f64> {
    let (h0, h1) = match *h {
        [h0, h1, ..] => (h0, h1),
        _ => return vec![1.0],
    };
    let second = h0 / h1;
    let mut w = vec![(2.0 + second) / 2.0, -second / 2.0];
    let Some(&h2) = h.get(2) else { return w };
    let third = (1.0 - h0 / (3.0 * (h0 + h1)) * (h0 * (h0 + h1)) / (h1 * (h1 + h2))) / 2.0;
    let r12 = h1 / h2;
    w[0] += third;
    w[1] -= (1.0 + r12) * third;
    w.push(third * r12);
    let Some(&h3) = h.get(3) else { return w };
    let fourth = ((1.0 - h0 / (3.0 * (h0 + h1))) / 2.0
        + (1.0 - h0 / (2.0 * (h0 + h1))) * h0 / (6.0 * (h0 + h1 + h2)))
        * (h0 * (h0 + h1) * (h0 + h1 + h2))
        / (h1 * (h1 + h2) * (h1 + h2 + h3));
    let r123 = h1 * (h1 + h2) / (h2 * (h2 + h3));
    w[0] += fourth;
    w[1] -= (1.0 + r12 + r123) * fourth;
    w[2] += (r12 + r123 * (1.0 + h2 / h3)) * fourth;
    w.push(-fourth * r123 * h1 / h2);
    w
}

/// DEIS with tabulated coefficients ("tAB"), order 3.
pub(super) fn deis(run: &mut Run<'_>, x: Field) -> Result<Field, DiffusionError> {
    let time = VpTime::new();
    multistep(run, x, 3, |sigmas, i, order| {
        if order == 1 {
            return vec![sigmas[i + 1] - sigmas[i]];
        }
        let nodes: Vec<f64> = (0..order).map(|k| time.of_sigma(sigmas[i - k])).collect();
        time.weights(&nodes, nodes[0], time.of_sigma(sigmas[i + 1]))
    })
}

/// The time axis of a variance-preserving process with linear beta, on which
/// DEIS interpolates. Times are computed in f32: `beta_min` is the difference of
/// nearly equal numbers, and its rounding is part of the result.
struct VpTime {
    beta_min: f32,
    beta_slope: f32,
}

impl VpTime {
    /// Noise levels at the ends of the axis and the time at its low end.
    const SIGMA_MIN: f32 = 0.002;
    const SIGMA_MAX: f32 = 80.0;
    const EPSILON: f32 = 1e-3;
    /// Points of the Riemann sum that stands for the integral.
    const POINTS: usize = 10_000;

    fn new() -> Self {
        let log_variance = |s: f32| (s * s + 1.0).ln();
        let (low, high) = (log_variance(Self::SIGMA_MIN), log_variance(Self::SIGMA_MAX));
        let beta_slope = 2.0 * (low / Self::EPSILON - high) / (Self::EPSILON - 1.0);
        Self { beta_min: high - 0.5 * beta_slope, beta_slope }
    }

    fn of_sigma(&self, sigma: f64) -> f64 {
        let sigma = sigma as f32;
        let log_variance = (sigma * sigma + 1.0).ln();
        let root = (self.beta_min * self.beta_min + 2.0 * self.beta_slope * log_variance).sqrt();
        f64::from((root - self.beta_min) / self.beta_slope)
    }

    /// d sigma / d time.
    fn sigma_rate(&self, t: f64) -> f64 {
        let (slope, min) = (f64::from(self.beta_slope), f64::from(self.beta_min));
        let log_alpha = -0.5 * slope * t * t - min * t;
        let rate = -slope * t - min;
        let alpha = log_alpha.exp();
        -0.5 * rate / (alpha * (1.0 - alpha)).sqrt()
    }

    /// Factors of the slopes at times `nodes` for the step `from → to`.
    fn weights(&self, nodes: &[f64], from: f64, to: f64) -> Vec<f64> {
        let bases: Vec<Vec<f64>> = (0..nodes.len()).map(|j| lagrange(nodes, j)).collect();
        let mut sums = vec![0.0; nodes.len()];
        for k in 0..Self::POINTS {
            let t = from + (to - from) * k as f64 / (Self::POINTS - 1) as f64;
            let rate = self.sigma_rate(t);
            for (sum, poly) in sums.iter_mut().zip(&bases) {
                *sum += rate * poly.iter().rev().fold(0.0, |acc, c| acc * t + c);
            }
        }
        let width = (to - from) / Self::POINTS as f64;
        sums.into_iter().map(|s| s * width).collect()
    }
}
