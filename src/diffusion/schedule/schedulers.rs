//! The nine schedulers a KSampler offers: which sigmas to visit.
//!
//! Every function returns descending sigmas and, unless said otherwise, a
//! final 0. Arithmetic is f32 or f64 exactly where ComfyUI's is; the odd cases
//! (one step, more steps than the table has entries) give what ComfyUI gives.
//!
//! Sources: T. Karras et al., "Elucidating the design space of diffusion-based
//! generative models", 2022 (`karras`); J. Song et al., "Denoising diffusion
//! implicit models", 2020 (`ddim_uniform`); T. Lee et al., "Beta sampling is
//! all you need", 2024 (`beta`); Genmo's Mochi and Lightricks' LTX-Video
//! (`linear_quadratic`); A. Sabour et al., "Align your steps", 2024, theorem
//! 3.1 (`kl_optimal`).

use super::quantile::BetaPlaces;
use super::{ModelSampling, ScheduleError, exponential_sigmas, karras_sigmas, linspace};

/// Scheduler names in the order clients see them.
pub const SCHEDULERS: &[&str] = &[
    "simple",
    "sgm_uniform",
    "karras",
    "exponential",
    "ddim_uniform",
    "beta",
    "normal",
    "linear_quadratic",
    "kl_optimal",
];

/// Samplers that are given one more step and never see the last but one sigma.
const PENULTIMATE_DROPPED: &[&str] = &["dpm_2", "dpm_2_ancestral", "uni_pc", "uni_pc_bh2"];

/// Smallest sigma that counts as different from zero.
const ZERO_TOLERANCE: f32 = 1e-5;

/// The sigmas of a named scheduler for `steps` steps of `model`.
///
/// No steps give no sigmas.
///
/// # Errors
/// [`ScheduleError::Unknown`] if `scheduler` is not one of [`SCHEDULERS`].
pub fn calculate_sigmas(
    model: &ModelSampling,
    scheduler: &str,
    steps: usize,
) -> Result<Vec<f32>, ScheduleError> {
    if !SCHEDULERS.contains(&scheduler) {
        return Err(ScheduleError::Unknown { name: scheduler.to_owned() });
    }
    if steps == 0 {
        return Ok(Vec::new());
    }
    let (sigma_min, sigma_max) = (f64::from(model.sigma_min()), f64::from(model.sigma_max()));
    Ok(match scheduler {
        "simple" => simple(model, steps),
        "sgm_uniform" => uniform_timesteps(model, steps, true),
        "karras" => karras_sigmas(steps, sigma_min, sigma_max, 7.0),
        "exponential" => exponential_sigmas(steps, sigma_min, sigma_max),
        "ddim_uniform" => ddim_uniform(model, steps),
        "beta" => beta_sigmas(model, steps, 0.6, 0.6)?,
        "linear_quadratic" => linear_quadratic(model, steps),
        "kl_optimal" => kl_optimal(steps, sigma_min, sigma_max),
        _ => uniform_timesteps(model, steps, false),
    })
}

/// The sigmas of a KSampler run: [`calculate_sigmas`] with `denoise` and the
/// sampler's peculiarity applied.
///
/// Below 1 (precisely: up to 0.9999) `denoise` computes a schedule of
/// `steps / denoise` steps and keeps its last `steps + 1` sigmas; 0 or less
/// gives no sigmas at all, and the latent should be returned as it is.
///
/// # Errors
/// As [`calculate_sigmas`].
pub fn ksampler_sigmas(
    model: &ModelSampling,
    sampler: &str,
    scheduler: &str,
    steps: usize,
    denoise: f64,
) -> Result<Vec<f32>, ScheduleError> {
    let schedule = |steps: usize| {
        if !PENULTIMATE_DROPPED.contains(&sampler) {
            return calculate_sigmas(model, scheduler, steps);
        }
        let mut sigmas = calculate_sigmas(model, scheduler, steps + 1)?;
        if sigmas.len() >= 2 {
            sigmas.remove(sigmas.len() - 2);
        }
        Ok(sigmas)
    };
    if denoise > 0.9999 {
        return schedule(steps);
    }
    if denoise <= 0.0 {
        return Ok(Vec::new());
    }
    let sigmas = schedule((steps as f64 / denoise) as usize)?;
    Ok(last_steps(&sigmas, steps))
}

/// The BasicScheduler node: as [`ksampler_sigmas`], without a sampler's
/// peculiarity and with every `denoise` below 1 counting.
///
/// # Errors
/// As [`calculate_sigmas`].
pub fn basic_scheduler(
    model: &ModelSampling,
    scheduler: &str,
    steps: usize,
    denoise: f64,
) -> Result<Vec<f32>, ScheduleError> {
    if denoise <= 0.0 {
        return Ok(Vec::new());
    }
    let total = if denoise < 1.0 { (steps as f64 / denoise) as usize } else { steps };
    Ok(last_steps(&calculate_sigmas(model, scheduler, total)?, steps))
}

/// The last `steps + 1` sigmas, or all if there are fewer.
pub(super) fn last_steps(sigmas: &[f32], steps: usize) -> Vec<f32> {
    sigmas[sigmas.len().saturating_sub(steps.saturating_add(1))..].to_vec()
}

/// Evenly spaced table entries from the top.
fn simple(model: &ModelSampling, steps: usize) -> Vec<f32> {
    let table = model.sigmas();
    let stride = table.len() as f64 / steps as f64;
    let entries = (0..steps).filter_map(|i| table.iter().rev().nth((i as f64 * stride) as usize));
    entries.copied().chain([0.0]).collect()
}

/// Every `len / steps`-th table entry from index 1 up, then reversed: more
/// steps than asked for if the division has a remainder.
fn ddim_uniform(model: &ModelSampling, steps: usize) -> Vec<f32> {
    let table = model.sigmas();
    let starts_at_zero = table.get(1).is_some_and(|s| s.abs() <= ZERO_TOLERANCE);
    let steps = if starts_at_zero { steps + 1 } else { steps };
    let stride = (table.len() / steps).max(1);
    let mut sigmas = if starts_at_zero { Vec::new() } else { vec![0.0] };
    sigmas.extend(table.iter().skip(1).step_by(stride));
    sigmas.reverse();
    sigmas
}

/// Evenly spaced timesteps from the highest to the lowest noise level
/// (`normal`), or stopping one short of the lowest (`sgm_uniform`).
fn uniform_timesteps(model: &ModelSampling, steps: usize, stops_short: bool) -> Vec<f32> {
    let start = model.timestep(model.sigma_max());
    let end = model.timestep(model.sigma_min());
    let ends_at_zero = !stops_short && model.sigma(end).abs() <= ZERO_TOLERANCE;
    let points = if stops_short || ends_at_zero { steps + 1 } else { steps };
    let mut timesteps = linspace(start, end, points);
    if stops_short {
        timesteps.pop();
    }
    let mut sigmas: Vec<f32> = timesteps.into_iter().map(|t| model.sigma(t)).collect();
    if !ends_at_zero {
        sigmas.push(0.0);
    }
    sigmas
}

/// Timesteps at quantiles of a Beta(`alpha`, `beta`) distribution, rounded to
/// table entries (half to even); entries hit twice in a row are taken once.
///
/// # Errors
/// [`ScheduleError::BetaShape`] unless both parameters are positive.
pub fn beta_sigmas(
    model: &ModelSampling,
    steps: usize,
    alpha: f64,
    beta: f64,
) -> Result<Vec<f32>, ScheduleError> {
    if !(alpha > 0.0 && beta > 0.0) {
        return Err(ScheduleError::BetaShape { alpha, beta });
    }
    let quantiles = BetaPlaces::new(alpha, beta, model.sigmas().len().saturating_sub(1));
    // numpy.linspace's order of operations: the step first, then its multiple.
    let step = 1.0 / steps as f64;
    let mut places: Vec<usize> = (0..steps).map(|i| quantiles.place(1.0 - i as f64 * step)).collect();
    places.dedup();
    let entries = places.into_iter().filter_map(|place| model.sigmas().get(place));
    Ok(entries.copied().chain([0.0]).collect())
}

/// Half the steps fall linearly by 2.5 % in all, the other half quadratically
/// to zero.
fn linear_quadratic(model: &ModelSampling, steps: usize) -> Vec<f32> {
    const LINEAR_FALL: f64 = 0.025;
    let top = model.sigma_max();
    if steps == 1 {
        return vec![top, 0.0];
    }
    let linear_steps = steps / 2;
    let (n, linear, quadratic) = (steps as f64, linear_steps as f64, (steps - linear_steps) as f64);
    let difference = linear - LINEAR_FALL * n;
    let square = difference / (linear * (quadratic * quadratic));
    let slope = LINEAR_FALL / linear - 2.0 * difference / (quadratic * quadratic);
    let constant = square * (linear * linear);
    let fallen = |i: usize| {
        let x = i as f64;
        if i < linear_steps { x * LINEAR_FALL / linear } else { square * (x * x) + slope * x + constant }
    };
    (0..steps).map(|i| (1.0 - fallen(i)) as f32 * top).chain([0.0]).collect()
}

/// Even steps of the angle atan(sigma). With one step the first sigma is 0/0.
fn kl_optimal(steps: usize, sigma_min: f64, sigma_max: f64) -> Vec<f32> {
    let (low, high) = (sigma_min.atan() as f32, sigma_max.atan() as f32);
    let angle = |i: usize| {
        let done = i as f32 / (steps - 1) as f32;
        done * low + (1.0 - done) * high
    };
    (0..steps).map(|i| angle(i).tan()).chain([0.0]).collect()
}
