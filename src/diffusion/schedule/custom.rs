//! Schedules made from numbers alone: the custom-sampling scheduler nodes.
//!
//! Sources: k-diffusion's `get_sigmas_*` family of schedules; T. Karras et al.,
//! 2022 (Karras); Y. Song et al., "Score-based generative modeling through
//! stochastic differential equations", 2020 (VP); T. Hang et al., "Improved
//! noise schedule for diffusion training", 2024 (Laplace); A. Sauer et al.,
//! "Adversarial diffusion distillation", 2023 (SD-Turbo); A. Sabour et al.,
//! "Align your steps", 2024; D. Chen et al., "On the trajectory regularity of
//! ODE-based diffusion sampling", 2024 (GITS).

use super::gits::{MOST, gits_schedule};
use super::schedulers::last_steps;
use super::tables::{AYS_SD1, AYS_SDXL, AYS_SVD, OPTIMAL_CHROMA, OPTIMAL_FLUX, OPTIMAL_WAN};
use super::{ModelSampling, linspace};

/// Steps even in sigma^(1/`rho`), then 0. `rho` 0 gives what a division by zero
/// gives.
pub fn karras_sigmas(steps: usize, sigma_min: f64, sigma_max: f64, rho: f64) -> Vec<f32> {
    let (low, high) = (sigma_min.powf(1.0 / rho), sigma_max.powf(1.0 / rho));
    let (fall, high) = ((low - high) as f32, high as f32);
    let ramp = linspace(0.0, 1.0, steps).into_iter();
    ramp.map(|t| (high + t * fall).powf(rho as f32)).chain([0.0]).collect()
}

/// Steps even in log sigma, then 0.
pub fn exponential_sigmas(steps: usize, sigma_min: f64, sigma_max: f64) -> Vec<f32> {
    let ramp = linspace(sigma_max.ln() as f32, sigma_min.ln() as f32, steps).into_iter();
    ramp.map(f32::exp).chain([0.0]).collect()
}

/// Log sigma falls with the `rho`-th power of the remaining share, then 0.
pub fn polyexponential_sigmas(steps: usize, sigma_min: f64, sigma_max: f64, rho: f64) -> Vec<f32> {
    let (low, high) = (sigma_min.ln(), sigma_max.ln());
    let (span, low) = ((high - low) as f32, low as f32);
    let ramp = linspace(1.0, 0.0, steps).into_iter();
    ramp.map(|t| (t.powf(rho as f32) * span + low).exp()).chain([0.0]).collect()
}

/// Log sigma at even quantiles of a Laplace(`mu`, `beta`) distribution, clamped
/// to the range; no 0 at the end.
pub fn laplace_sigmas(steps: usize, sigma_min: f64, sigma_max: f64, mu: f64, beta: f64) -> Vec<f32> {
    // Keeps the logarithm finite at the two ends.
    const EPSILON: f32 = 1e-5;
    let (mu, beta) = (mu as f32, beta as f32);
    let (low, high) = (sigma_min as f32, sigma_max as f32);
    let sigma = |t: f32| {
        let off_centre = 0.5 - t;
        let sign = if off_centre == 0.0 { 0.0 } else { off_centre.signum() };
        (mu - beta * sign * (1.0 - 2.0 * off_centre.abs() + EPSILON).ln()).exp()
    };
    // Like the tensor clamp, an inverted range yields its upper end.
    linspace(0.0, 1.0, steps).into_iter().map(|t| sigma(t).max(low).min(high)).collect()
}

/// The variance-preserving SDE's sigmas at even times from 1 to `eps_s`, then 0.
pub fn vp_sigmas(steps: usize, beta_d: f64, beta_min: f64, eps_s: f64) -> Vec<f32> {
    let (beta_d, beta_min) = (beta_d as f32, beta_min as f32);
    let sigma = |t: f32| (beta_d * (t * t) / 2.0 + beta_min * t).exp_m1().sqrt();
    linspace(1.0, eps_s as f32, steps).into_iter().map(sigma).chain([0.0]).collect()
}

/// SD-Turbo: timesteps 999, 899, … 99, entered according to `denoise`, then 0.
/// There are at most ten steps.
pub fn sd_turbo_sigmas(model: &ModelSampling, steps: usize, denoise: f64) -> Vec<f32> {
    let skipped = 10usize.saturating_sub((10.0 * denoise) as usize);
    let timesteps = (1..=10).rev().map(|i| (i * 100 - 1) as f32);
    timesteps.skip(skipped).take(steps).map(|t| model.sigma(t)).chain([0.0]).collect()
}

/// Models with a published Align-Your-Steps table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AlignYourSteps {
    /// Stable Diffusion 1.5.
    Sd1,
    /// Stable Diffusion XL.
    Sdxl,
    /// Stable Video Diffusion.
    Svd,
}

impl AlignYourSteps {
    /// The table of a node's `model_type`: `SD1`, `SDXL` or `SVD`.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "SD1" => Some(Self::Sd1),
            "SDXL" => Some(Self::Sdxl),
            "SVD" => Some(Self::Svd),
            _ => None,
        }
    }

    fn table(self) -> &'static [f64] {
        match self {
            Self::Sd1 => &AYS_SD1,
            Self::Sdxl => &AYS_SDXL,
            Self::Svd => &AYS_SVD,
        }
    }
}

/// Align Your Steps: a ten-step table, interpolated in log sigma for other
/// step counts; the last sigma is replaced by 0.
pub fn align_your_steps_sigmas(kind: AlignYourSteps, steps: usize, denoise: f64) -> Vec<f32> {
    let Some(total) = denoised_steps(steps, denoise) else { return Vec::new() };
    let table = kind.table();
    if steps + 1 == table.len() {
        return finish_table(table, total);
    }
    finish_table(&log_interpolate(table, steps + 1), total)
}

/// Optimal steps of a flow model (`FLUX`, `Wan` or `Chroma`): a table, interpolated in log sigma for other step
/// counts; the last sigma is replaced by 0. `None` for another name.
pub fn optimal_sigmas(model: &str, steps: usize, denoise: f64) -> Option<Vec<f32>> {
    let table: &[f64] = match model {
        "FLUX" => &OPTIMAL_FLUX,
        "Wan" => &OPTIMAL_WAN,
        "Chroma" => &OPTIMAL_CHROMA,
        _ => return None,
    };
    let Some(total) = denoised_steps(steps, denoise) else { return Some(Vec::new()) };
    if steps + 1 == table.len() {
        return Some(finish_table(table, total));
    }
    Some(finish_table(&log_interpolate(table, steps + 1), total))
}

/// GITS: tables for 2 to 20 steps by coefficient (0.80 to 1.50 in steps of
/// 0.05, taken to two decimals); beyond 20 steps the longest is interpolated in
/// log sigma. `None` for a coefficient without a table or fewer than 2 steps.
pub fn gits_sigmas(coefficient: f64, steps: usize, denoise: f64) -> Option<Vec<f32>> {
    let Some(total) = denoised_steps(steps, denoise) else { return Some(Vec::new()) };
    if steps <= MOST {
        return Some(finish_table(&gits_schedule(coefficient, steps)?, total));
    }
    Some(finish_table(&log_interpolate(&gits_schedule(coefficient, MOST)?, steps + 1), total))
}

/// Steps left by `denoise`, half to even; `None` if there is nothing to do.
fn denoised_steps(steps: usize, denoise: f64) -> Option<usize> {
    if denoise >= 1.0 {
        return Some(steps);
    }
    (denoise > 0.0).then(|| (steps as f64 * denoise).round_ties_even() as usize)
}

fn finish_table(sigmas: &[f64], total: usize) -> Vec<f32> {
    let rounded: Vec<f32> = sigmas.iter().map(|&s| s as f32).collect();
    let mut kept = last_steps(&rounded, total);
    if let Some(last) = kept.last_mut() {
        *last = 0.0;
    }
    kept
}

/// Resamples a descending table to `count` points, linear in log sigma.
fn log_interpolate(table: &[f64], count: usize) -> Vec<f64> {
    let intervals = table.len().saturating_sub(1);
    let at = |i: usize| {
        let place = i as f64 / count.saturating_sub(1).max(1) as f64 * intervals as f64;
        let low = (place as usize).min(intervals.saturating_sub(1));
        let weight = place - low as f64;
        match (table.get(low), table.get(low + 1)) {
            (Some(a), Some(b)) => (a.ln() + weight * (b.ln() - a.ln())).exp(),
            _ => f64::NAN,
        }
    };
    (0..count).map(at).collect()
}
