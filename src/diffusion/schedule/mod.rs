//! Noise schedules: from a step count to the sigmas a sampler visits.
//!
//! * [`ModelSampling`]: a model's noise levels, timesteps and output convention.
//! * [`calculate_sigmas`], [`ksampler_sigmas`], [`SCHEDULERS`]: the nine named
//!   schedulers.
//! * [`karras_sigmas`] and friends: schedules from explicit numbers.
//! * [`split_sigmas`] and friends: editing finished schedules.
//!
//! All are pure functions; a schedule is a `Vec<f32>` of descending sigmas.

mod custom;
mod edit;
mod gits;
mod model_sampling;
mod quantile;
mod schedulers;
mod tables;

#[cfg(test)]
mod tests;

pub use custom::{
    AlignYourSteps, align_your_steps_sigmas, exponential_sigmas, gits_sigmas, karras_sigmas, laplace_sigmas,
    optimal_sigmas, polyexponential_sigmas, sd_turbo_sigmas, vp_sigmas,
};
pub use edit::{
    Spacing, extend_intermediate_sigmas, flip_sigmas, set_first_sigma, split_sigmas, split_sigmas_denoise,
};
pub use model_sampling::{Betas, ModelSampling, Prediction};
pub use schedulers::{SCHEDULERS, basic_scheduler, beta_sigmas, calculate_sigmas, ksampler_sigmas};

use thiserror::Error;

/// Why a schedule cannot be made.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum ScheduleError {
    /// No scheduler has this name.
    #[error("there is no scheduler \"{name}\"; use one of {SCHEDULERS:?}")]
    Unknown {
        /// The name asked for.
        name: String,
    },
    /// The Beta distribution does not exist.
    #[error("a beta schedule needs alpha and beta above 0, not alpha {alpha} and beta {beta}")]
    BetaShape {
        /// First shape parameter.
        alpha: f64,
        /// Second shape parameter.
        beta: f64,
    },
}

/// `count` even points from `start` to `end` inclusive; a single one is
/// `start`. Counted from the nearer end with a fused multiply-add, as PyTorch
/// does: both ends are exact and no last bit differs.
fn linspace(start: f32, end: f32, count: usize) -> Vec<f32> {
    let step = (end - start) / count.saturating_sub(1).max(1) as f32;
    let point = |i: usize| {
        if i < count / 2 || count == 1 {
            step.mul_add(i as f32, start)
        } else {
            (-step).mul_add((count - 1 - i) as f32, end)
        }
    };
    (0..count).map(point).collect()
}
