//! SA-Solver: stochastic Adams predictor-corrector in half log-SNR.
//!
//! The process between two noise levels is
//! `x(t) = σt/σs·exp(−τ²h)·x(s) + αt·(1+τ²)∫ exp(−(1+τ²)(λt−λ))·x0(λ) dλ + noise`;
//! the prediction `x0(λ)` is replaced by the Lagrange interpolant of the last
//! predictions. `τ` is `eta` inside a range of noise levels and 0 outside.
//!
//! Source: Xue et al., "SA-Solver: Stochastic Adams solver for fast sampling of
//! diffusion models", 2023.

use std::collections::VecDeque;

use super::polynomial::quadrature_weights;
use super::{Run, lincomb};
use crate::diffusion::DiffusionError;
use crate::diffusion::Field;

/// Settings of SA-Solver.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SaSolverOptions {
    /// Stochasticity `τ` inside the range.
    pub eta: f64,
    /// Noise levels `[start, end]` between which `τ = eta`; `None`: 20 % to 80 % of the sampling.
    pub range: Option<(f64, f64)>,
    /// Factor on the noise.
    pub s_noise: f64,
    /// Highest order of the predictor.
    pub predictor_order: usize,
    /// Highest order of the corrector; 0 leaves it out.
    pub corrector_order: usize,
    /// Evaluates the model once more after each correction.
    pub use_pece: bool,
    /// The paper's simplified weights wherever the order is two.
    pub simple_order_2: bool,
}

impl Default for SaSolverOptions {
    fn default() -> Self {
        Self {
            eta: 1.0,
            range: None,
            s_noise: 1.0,
            predictor_order: 3,
            corrector_order: 4,
            use_pece: false,
            simple_order_2: false,
        }
    }
}

/// The step that led to the current noise level.
struct Last {
    tau: f64,
    h: f64,
    noise: Option<Field>,
}

/// Runs SA-Solver.
pub(super) fn sa_solver(
    run: &mut Run<'_>,
    mut x: Field,
    opt: SaSolverOptions,
) -> Result<Field, DiffusionError> {
    let n = run.steps();
    if n == 0 {
        return Ok(x);
    }
    let (start, end) = opt
        .range
        .unwrap_or_else(|| (run.sampling().percent_to_sigma(0.2), run.sampling().percent_to_sigma(0.8)));
    run.bound_first_sigma();
    let space = run.space();
    let sigmas: Vec<f64> = (0..=n).map(|i| run.sigma(i)).collect();
    let lambdas: Vec<f64> = sigmas.iter().map(|&s| space.lambda(s)).collect();
    let ends_clean = sigmas[n] == 0.0;
    let keep = opt.predictor_order.max(opt.corrector_order).max(1);
    let mut predictions: VecDeque<Field> = VecDeque::new();
    let mut last = Last { tau: 0.0, h: 0.0, noise: None };
    let mut predicted = x.clone();
    for i in 0..n {
        let denoised = run.denoise(&predicted, sigmas[i])?;
        run.report(i, &predicted, &denoised)?;
        predictions.push_front(denoised);
        predictions.truncate(keep);

        let to = sigmas[i + 1];
        let mut predictor = opt.predictor_order.max(1).min(predictions.len());
        let mut corrector = opt.corrector_order.min(predictions.len());
        if i == 0 || (to == 0.0 && !opt.use_pece) {
            corrector = 0;
        }
        if ends_clean {
            predictor = predictor.min(n - 1 - i);
            corrector = corrector.min(n - i);
        }
        if corrector == 0 {
            x = predicted;
        } else {
            let alpha = space.alpha(sigmas[i]);
            let nodes: Vec<f64> = (0..corrector).map(|k| lambdas[i - k]).collect();
            let span = Span { from: lambdas[i - 1], to: lambdas[i], mul: 1.0 + last.tau.powi(2) };
            let w = span.weights(&nodes, opt.simple_order_2, true);
            let decay = sigmas[i] / sigmas[i - 1] * (-last.tau.powi(2) * last.h).exp();
            x = step(decay, &x, alpha, &w, &predictions, last.noise.as_ref())?;
            if opt.use_pece {
                let again = run.denoise(&x, sigmas[i])?;
                predictions[0] = again;
            }
        }
        if to == 0.0 {
            return Ok(predictions.swap_remove_front(0).unwrap_or(x));
        }
        let tau = if start >= to && to >= end { opt.eta } else { 0.0 };
        let h = lambdas[i + 1] - lambdas[i];
        let nodes: Vec<f64> = (0..predictor).map(|k| lambdas[i - k]).collect();
        let span = Span { from: lambdas[i], to: lambdas[i + 1], mul: 1.0 + tau * tau };
        let w = span.weights(&nodes, opt.simple_order_2, false);
        let noise = if tau > 0.0 && opt.s_noise > 0.0 {
            let scale = to * (-(-2.0 * tau * tau * h).exp_m1()).sqrt() * opt.s_noise;
            Some(lincomb(&[(scale, &run.noise_like(&x, sigmas[i], to)?)])?)
        } else {
            None
        };
        let decay = to / sigmas[i] * (-tau * tau * h).exp();
        predicted = step(decay, &x, space.alpha(to), &w, &predictions, noise.as_ref())?;
        last = Last { tau, h, noise };
    }
    Ok(predicted)
}

fn step(
    decay: f64,
    x: &Field,
    alpha: f64,
    weights: &[f64],
    predictions: &VecDeque<Field>,
    noise: Option<&Field>,
) -> Result<Field, DiffusionError> {
    let mut terms = vec![(decay, x)];
    terms.extend(weights.iter().zip(predictions).map(|(w, p)| (alpha * w, p)));
    terms.extend(noise.map(|n| (1.0, n)));
    lincomb(&terms)
}

/// A step in half log-SNR with the factor `1 + τ²`.
struct Span {
    from: f64,
    to: f64,
    mul: f64,
}

impl Span {
    /// Factors (without `alpha`) of the predictions at `nodes`, newest first.
    fn weights(&self, nodes: &[f64], simple_order_2: bool, is_corrector: bool) -> Vec<f64> {
        let h = self.to - self.from;
        let total = -(-self.mul * h).exp_m1();
        if simple_order_2 && nodes.len() == 2 {
            return if is_corrector {
                let newest = 0.5 * self.mul * h;
                vec![newest, total - newest]
            } else {
                let older = 0.5 * self.mul * h * h / (nodes[1] - self.from);
                vec![total - older, older]
            };
        }
        // Moments of u = λ − λt against mul·exp(mul·u) over [−h, 0], by parts.
        let decay = (-self.mul * h).exp();
        let mut moments = vec![total];
        for k in 1..nodes.len() {
            let below = moments[k - 1];
            moments.push(-(-h).powi(k as i32) * decay - k as f64 / self.mul * below);
        }
        let shifted: Vec<f64> = nodes.iter().map(|n| n - self.to).collect();
        quadrature_weights(&shifted, &moments)
    }
}
