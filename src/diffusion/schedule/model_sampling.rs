//! What a diffusion model's numbers mean: its noise levels and its output.
//!
//! Samplers work in one convention, x = clean + sigma * noise, and want a
//! *denoised* prediction. A model was trained with some table of noise levels
//! ([`Axis`]), expects a timestep rather than a sigma, and predicts the noise,
//! the clean picture, or a mixture ([`Prediction`]). [`ModelSampling`] converts
//! both ways; a new family is a new constructor, seldom a new variant.
//!
//! All tables are f32, computed in f64 where ComfyUI does so; conversions are
//! f32, so a schedule agrees to the last bits.
//!
//! Sources: J. Ho et al., "Denoising diffusion probabilistic models", 2020
//! (betas); T. Karras et al., "Elucidating the design space of diffusion-based
//! generative models", 2022 (sigma convention, EDM); T. Salimans and J. Ho,
//! "Progressive distillation", 2022 (v); S. Lin et al., "Common diffusion noise
//! schedules and sample steps are flawed", 2023 (zero terminal SNR); X. Liu et
//! al., "Flow straight and fast", 2022, and P. Esser et al., "Scaling rectified
//! flow transformers", 2024 (flow and its shift); S. Luo et al., "Latent
//! consistency models", 2023.

use crate::diffusion::PredictionFactors;
use crate::tensor::HostTensor;

/// What `percent_to_sigma` answers for "before the first step" where sigmas
/// have no upper bound.
const ABOVE_ALL_SIGMAS: f64 = 999_999_999.9;

/// Cumulative alpha at the last step after the zero-SNR rescale: not zero,
/// because sigma would be infinite.
const ZERO_SNR_ALPHA: f64 = 4.897_345_189_085_343_5e-8;

/// Deviation of the data in a consistency model's boundary condition; its input
/// is scaled as for any other discrete model.
const CONSISTENCY_SIGMA_DATA: f32 = 0.5;

/// What the network's output stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prediction {
    /// The noise.
    Eps,
    /// Velocity: noise and clean picture mixed by their signal shares.
    V,
    /// The clean picture.
    X0,
    /// The clean picture after EDM's skip connection.
    Edm,
    /// The velocity of a rectified flow from the picture to noise.
    Flow,
    /// The same, between levels that are noise over picture rather than the share of noise.
    FlowRatio,
    /// The noise, with the consistency model's boundary condition.
    Lcm,
    /// The clean picture, from an input that is not scaled.
    ImageToImage,
}

/// The betas of a discrete training process, linear in their square root.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Betas {
    /// First beta.
    pub start: f64,
    /// Last beta.
    pub end: f64,
    /// Number of training steps.
    pub steps: usize,
    /// Whether the table is rescaled so that the last step is pure noise.
    pub has_zero_terminal_snr: bool,
}

impl Default for Betas {
    /// Stable Diffusion 1, 2 and XL.
    fn default() -> Self {
        Self { start: 0.00085, end: 0.012, steps: 1000, has_zero_terminal_snr: false }
    }
}

/// How timesteps and sigmas belong together.
#[derive(Clone, Debug, PartialEq)]
enum Axis {
    /// A timestep is an index into the table; every `stride`-th training step
    /// is in it (1, except for distilled models).
    Discrete { log_sigmas: Vec<f32>, stride: usize },
    /// Rectified flow: sigma is the share of noise, shifted time.
    Flow { shift: f64, multiplier: f32 },
    /// Rectified flow with an exponential shift; the timestep is sigma itself.
    ExponentialFlow { mu: f64 },
    /// EDM: the timestep is a quarter of log sigma.
    LogSigma,
    /// Continuous v-prediction: the timestep is the mixing angle over pi/2.
    Angle,
    /// The timestep is the share of noise, sigma / (sigma + 1).
    Share,
}

/// A model's noise levels and output convention.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSampling {
    prediction: Prediction,
    axis: Axis,
    /// Ascending.
    sigmas: Vec<f32>,
    sigma_data: f32,
}

impl ModelSampling {
    /// Standard deviation of the data in EDM's skip connection.
    pub const EDM_DATA: f32 = 0.5;

    /// A model trained on discrete steps (Stable Diffusion and relatives).
    pub fn discrete(prediction: Prediction, betas: Betas) -> Self {
        let (log_sigmas, sigmas) = rounded_tables(&discrete_sigmas(betas));
        Self { prediction, axis: Axis::Discrete { log_sigmas, stride: 1 }, sigmas, sigma_data: 1.0 }
    }

    /// A consistency model distilled to `kept` of the training steps (LCM
    /// keeps 50 of 1000): its schedule knows only those.
    pub fn distilled(betas: Betas, kept: usize) -> Self {
        let all = discrete_sigmas(betas);
        let stride = (all.len() / kept.max(1)).max(1);
        let mut valid: Vec<f64> = all.iter().rev().step_by(stride).take(kept.max(1)).copied().collect();
        valid.reverse();
        let (log_sigmas, sigmas) = rounded_tables(&valid);
        let axis = Axis::Discrete { log_sigmas, stride };
        Self { prediction: Prediction::Lcm, axis, sigmas, sigma_data: 1.0 }
    }

    /// Rectified flow (SD3, AuraFlow): sigma = shift·t / (1 + (shift - 1)·t)
    /// for t = 1/1000 … 1; the network is told sigma·`multiplier`.
    pub fn flow(shift: f64, multiplier: f32) -> Self {
        let sigmas =
            (1..=1000).map(|i| time_shift(shift, i as f32 / 1000.0 * multiplier / multiplier)).collect();
        Self { prediction: Prediction::Flow, axis: Axis::Flow { shift, multiplier }, sigmas, sigma_data: 1.0 }
    }

    /// Rectified flow with Flux's exponential shift:
    /// sigma = e^mu / (e^mu + 1/t - 1) for t = 1/10000 … 1.
    pub fn exponential_flow(mu: f64) -> Self {
        let sigmas = (1..=10_000).map(|i| exponential_time_shift(mu, i as f32 / 10_000.0)).collect();
        Self { prediction: Prediction::Flow, axis: Axis::ExponentialFlow { mu }, sigmas, sigma_data: 1.0 }
    }

    /// A continuous range of sigmas, spaced evenly in their logarithm (EDM). The ends may be the wrong way round:
    /// schedules that follow the table then rise.
    pub fn continuous_edm(prediction: Prediction, sigma_min: f64, sigma_max: f64, sigma_data: f32) -> Self {
        Self { prediction, axis: Axis::LogSigma, sigmas: log_spaced(sigma_min, sigma_max), sigma_data }
    }

    /// Rectified flow told in a continuous range of sigmas, noise over picture (Cosmos).
    pub fn continuous_flow(sigma_min: f64, sigma_max: f64) -> Self {
        let (prediction, sigmas) = (Prediction::FlowRatio, log_spaced(sigma_min, sigma_max));
        Self { prediction, axis: Axis::Share, sigmas, sigma_data: 1.0 }
    }

    /// A continuous range of sigmas whose timestep is the mixing angle.
    pub fn continuous_v(prediction: Prediction, sigma_min: f64, sigma_max: f64) -> Self {
        Self { prediction, axis: Axis::Angle, sigmas: log_spaced(sigma_min, sigma_max), sigma_data: 1.0 }
    }

    /// What the network's output stands for.
    pub fn prediction(&self) -> Prediction {
        self.prediction
    }

    /// Whether clean picture and noise are mixed to a constant sum (flow)
    /// rather than added: such a sampler's noise shares are sigma and 1 - sigma.
    pub fn is_flow(&self) -> bool {
        self.prediction == Prediction::Flow
    }

    /// The table of noise levels, ascending.
    pub fn sigmas(&self) -> &[f32] {
        &self.sigmas
    }

    /// The lowest noise level of the table.
    pub fn sigma_min(&self) -> f32 {
        self.sigmas.first().copied().unwrap_or(0.0)
    }

    /// The highest noise level of the table.
    pub fn sigma_max(&self) -> f32 {
        self.sigmas.last().copied().unwrap_or(0.0)
    }

    /// The timestep the network is told for `sigma`; on a discrete axis that of
    /// the entry nearest in log sigma, an integer.
    pub fn timestep(&self, sigma: f32) -> f32 {
        match &self.axis {
            Axis::Discrete { log_sigmas, stride } => {
                (nearest(log_sigmas, sigma.ln()) * stride + (stride - 1)) as f32
            }
            Axis::Flow { multiplier, .. } => sigma * multiplier,
            Axis::ExponentialFlow { .. } => sigma,
            Axis::LogSigma => 0.25 * sigma.ln(),
            Axis::Angle => sigma.atan() / std::f32::consts::FRAC_PI_2,
            Axis::Share => sigma / (sigma + 1.0),
        }
    }

    /// The noise level of a timestep; on a discrete axis log sigma is
    /// interpolated between entries and the ends are kept beyond them.
    pub fn sigma(&self, timestep: f32) -> f32 {
        match &self.axis {
            Axis::Discrete { log_sigmas, stride } => {
                let place = (timestep - (stride - 1) as f32) / *stride as f32;
                interpolate(log_sigmas, place).exp()
            }
            Axis::Flow { shift, multiplier } => time_shift(*shift, timestep / multiplier),
            Axis::ExponentialFlow { mu } => exponential_time_shift(*mu, timestep),
            Axis::LogSigma => (timestep / 0.25).exp(),
            Axis::Angle => (timestep * std::f32::consts::FRAC_PI_2).tan(),
            Axis::Share => {
                let max = self.sigma_max();
                if timestep >= max / (max + 1.0) { max } else { timestep / (1.0 - timestep) }
            }
        }
    }

    /// The noise level when `percent` (0..1) of the timesteps are done, as used
    /// by start and end percentages. At or below 0 it is above every sigma
    /// (1 for a flow), at or above 1 it is 0.
    pub fn percent_to_sigma(&self, percent: f64) -> f64 {
        let is_bounded = matches!(self.axis, Axis::Flow { .. } | Axis::ExponentialFlow { .. });
        if percent <= 0.0 {
            return if is_bounded { 1.0 } else { ABOVE_ALL_SIGMAS };
        }
        if percent >= 1.0 {
            return 0.0;
        }
        let left = 1.0 - percent;
        match &self.axis {
            Axis::Discrete { log_sigmas, stride } => {
                let last = log_sigmas.len() * stride - 1;
                f64::from(self.sigma((left * last as f64) as f32))
            }
            Axis::Flow { shift, .. } => {
                if *shift == 1.0 {
                    left
                } else {
                    shift * left / (1.0 + (shift - 1.0) * left)
                }
            }
            Axis::ExponentialFlow { mu } => {
                let weight = mu.exp();
                weight / (weight + 1.0 / left - 1.0)
            }
            Axis::LogSigma | Axis::Angle | Axis::Share => {
                let (low, high) = (f64::from(self.sigma_min()).ln(), f64::from(self.sigma_max()).ln());
                (low + (high - low) * left).exp()
            }
        }
    }

    /// `percent_to_sigma`, but with the table's own ends at exactly 0 and 1
    /// (the SamplingPercentToSigma node's "actual" sigma).
    pub fn percent_to_actual_sigma(&self, percent: f64) -> f64 {
        if percent == 0.0 {
            f64::from(self.sigma_max())
        } else if percent == 1.0 {
            f64::from(self.sigma_min())
        } else {
            self.percent_to_sigma(percent)
        }
    }

    /// What the network is fed at `sigma`: x scaled to the training variance.
    pub fn calculate_input(&self, sigma: f32, x: &HostTensor) -> HostTensor {
        match self.prediction {
            Prediction::Flow | Prediction::ImageToImage => x.clone(),
            Prediction::FlowRatio => {
                let share = sigma / (sigma + 1.0);
                x.map(|v| v * (1.0 - share))
            }
            _ => {
                let scale = (sigma * sigma + self.sigma_data * self.sigma_data).sqrt();
                x.map(|v| v / scale)
            }
        }
    }

    /// The denoised prediction from the network's `output` for `x` at `sigma`.
    pub fn calculate_denoised(&self, sigma: f32, output: &HostTensor, x: &HostTensor) -> HostTensor {
        let data = self.sigma_data;
        let total = sigma * sigma + data * data;
        match self.prediction {
            Prediction::Eps | Prediction::Flow => x.zip(output, |x, out| x - out * sigma),
            Prediction::FlowRatio => {
                let share = sigma / (sigma + 1.0);
                x.zip(output, |x, out| x * (1.0 - share) - out * share)
            }
            Prediction::V => {
                let root = total.sqrt();
                x.zip(output, |x, out| x * (data * data) / total - out * sigma * data / root)
            }
            Prediction::Edm => {
                let root = total.sqrt();
                x.zip(output, |x, out| x * (data * data) / total + out * sigma * data / root)
            }
            Prediction::X0 | Prediction::ImageToImage => output.clone(),
            Prediction::Lcm => {
                let (skip, out_share) = self.consistency_shares(sigma);
                x.zip(output, |x, out| out_share * (x - out * sigma) + skip * x)
            }
        }
    }

    /// The factor on x that [`calculate_input`](Self::calculate_input) applies at `sigma`.
    pub fn input_factor(&self, sigma: f32) -> f32 {
        match self.prediction {
            Prediction::Flow | Prediction::ImageToImage => 1.0,
            Prediction::FlowRatio => 1.0 - sigma / (sigma + 1.0),
            _ => 1.0 / (sigma * sigma + self.sigma_data * self.sigma_data).sqrt(),
        }
    }

    /// [`calculate_denoised`](Self::calculate_denoised) at `sigma` as factors of x and of the network's output.
    pub fn prediction_factors(&self, sigma: f32) -> PredictionFactors {
        let data = self.sigma_data;
        let total = sigma * sigma + data * data;
        let (skip, scale) = match self.prediction {
            Prediction::Eps | Prediction::Flow => (1.0, -sigma),
            Prediction::FlowRatio => {
                let share = sigma / (sigma + 1.0);
                (1.0 - share, -share)
            }
            Prediction::V => (data * data / total, -sigma * data / total.sqrt()),
            Prediction::Edm => (data * data / total, sigma * data / total.sqrt()),
            Prediction::X0 | Prediction::ImageToImage => (0.0, 1.0),
            Prediction::Lcm => {
                let (skip, out_share) = self.consistency_shares(sigma);
                (out_share + skip, -out_share * sigma)
            }
        };
        PredictionFactors { skip, scale }
    }

    /// Shares of x and of the prediction in a consistency model's.
    fn consistency_shares(&self, sigma: f32) -> (f32, f32) {
        let data = CONSISTENCY_SIGMA_DATA;
        let scaled = self.timestep(sigma) * 10.0;
        let total = scaled * scaled + data * data;
        (data * data / total, scaled / total.sqrt())
    }

    /// The factors of noise and latent in [`noise_scaling`](Self::noise_scaling) below the highest noise level.
    pub fn noise_factors(&self, sigma: f32) -> (f32, f32) {
        if self.is_flow() { (sigma, 1.0 - sigma) } else { (sigma, 1.0) }
    }

    /// The sampler's start: `latent` with `noise` of level `sigma` on it.
    ///
    /// `is_max_denoise` says that the run starts at (or above) the highest noise
    /// level: the variance of the data is then counted in, because the network
    /// never saw pure noise with a picture under it.
    pub fn noise_scaling(
        &self,
        sigma: f32,
        noise: &HostTensor,
        latent: &HostTensor,
        is_max_denoise: bool,
    ) -> HostTensor {
        if self.is_flow() {
            return noise.zip(latent, |n, l| sigma * n + (1.0 - sigma) * l);
        }
        let keeps_variance = is_max_denoise && self.prediction != Prediction::FlowRatio;
        let scale = if keeps_variance { (1.0 + sigma * sigma).sqrt() } else { sigma };
        noise.zip(latent, |n, l| n * scale + l)
    }

    /// Whether a run from `sigma` starts at the highest noise level: within
    /// 1e-5 of it (relative) or above.
    pub fn is_max_denoise(&self, sigma: f32) -> bool {
        let (max, sigma) = (f64::from(self.sigma_max()), f64::from(sigma));
        sigma > max || (max - sigma).abs() <= 1e-5 * max.abs().max(sigma.abs())
    }

    /// Undoes the mixture's damping of the latent when sampling stops at
    /// `sigma`: a flow keeps a share of 1 - sigma, others keep all of it.
    pub fn inverse_noise_scaling(&self, sigma: f32, latent: &HostTensor) -> HostTensor {
        if self.is_flow() { latent.map(|v| v / (1.0 - sigma)) } else { latent.clone() }
    }
}

/// sqrt((1 - a)/a) with a the running product of 1 - beta.
fn discrete_sigmas(betas: Betas) -> Vec<f64> {
    let (first, last) = (betas.start.sqrt(), betas.end.sqrt());
    let intervals = betas.steps.saturating_sub(1).max(1) as f64;
    let mut product = 1.0;
    let alphas = (0..betas.steps).map(|i| {
        let root = first + (last - first) * i as f64 / intervals;
        product *= 1.0 - root * root;
        product
    });
    let mut sigmas: Vec<f64> = alphas.map(|a| ((1.0 - a) / a).sqrt()).collect();
    if betas.has_zero_terminal_snr {
        rescale_to_zero_terminal_snr(&mut sigmas);
    }
    sigmas
}

/// Shifts and scales sqrt(alpha) so that its last value is 0 and its first is
/// kept (Lin et al., algorithm 1).
fn rescale_to_zero_terminal_snr(sigmas: &mut [f64]) {
    let mut roots: Vec<f64> = sigmas.iter().map(|s| (1.0 / (s * s + 1.0)).sqrt()).collect();
    let (Some(&first), Some(&last)) = (roots.first(), roots.last()) else { return };
    let scale = first / (first - last);
    roots.iter_mut().for_each(|r| *r = (*r - last) * scale);
    let end = sigmas.len() - 1;
    for (i, (sigma, root)) in sigmas.iter_mut().zip(roots).enumerate() {
        let alpha = if i == end { ZERO_SNR_ALPHA } else { root * root };
        *sigma = ((1.0 - alpha) / alpha).sqrt();
    }
}

/// Log sigmas and sigmas, both rounded from f64.
fn rounded_tables(sigmas: &[f64]) -> (Vec<f32>, Vec<f32>) {
    (sigmas.iter().map(|s| s.ln() as f32).collect(), sigmas.iter().map(|&s| s as f32).collect())
}

fn log_spaced(sigma_min: f64, sigma_max: f64) -> Vec<f32> {
    let ends = (sigma_min.ln() as f32, sigma_max.ln() as f32);
    super::linspace(ends.0, ends.1, 1000).into_iter().map(f32::exp).collect()
}

/// Both factors are rounded from f64: near 1 a last bit of sigma is much of what is left.
fn time_shift(shift: f64, t: f32) -> f32 {
    if shift == 1.0 { t } else { shift as f32 * t / (1.0 + (shift - 1.0) as f32 * t) }
}

/// A number over a tensor is the number times the reciprocal, in the reference.
fn exponential_time_shift(mu: f64, t: f32) -> f32 {
    let weight = mu.exp() as f32;
    (weight + (1.0 / t - 1.0)).recip() * weight
}

/// Index of the entry nearest to `value`, the first of equals.
fn nearest(entries: &[f32], value: f32) -> usize {
    let mut best = (0, f32::INFINITY);
    for (i, entry) in entries.iter().enumerate() {
        let distance = (value - entry).abs();
        if distance < best.1 {
            best = (i, distance);
        }
    }
    best.0
}

/// Linear interpolation at a fractional index, clamped to the ends.
fn interpolate(entries: &[f32], place: f32) -> f32 {
    let last = entries.len().saturating_sub(1);
    let place = place.clamp(0.0, last as f32);
    let (low, high) = (place.floor() as usize, place.ceil() as usize);
    let weight = place.fract();
    let entry = |i: usize| entries.get(i).copied().unwrap_or(f32::NAN);
    (1.0 - weight) * entry(low) + weight * entry(high)
}
