//! One sampling run as a sampler sees it: sigmas, the guided model, noise, progress.

use super::snr::Ancestral;
use super::{NoiseDevice, SnrSpace, Stochastic, lincomb};
use crate::diffusion::noise::{BrownianNoise, Generator, GpuBrownianNoise};
use crate::diffusion::schedule::ModelSampling;
use crate::diffusion::{DiffusionError, Field};
use crate::tensor::HostTensor;

/// Share of the sampling at which a flow model's first sigma is taken where its
/// log-SNR must be finite.
const FIRST_SIGMA_PERCENT: f64 = 1e-4;

/// What the guided model predicts.
pub struct Guided {
    /// The denoised latent with guidance applied.
    pub denoised: Field,
    /// The unconditional prediction; `None` if it was not computed, which counts as zeros.
    pub uncond: Option<Field>,
}

/// Where fresh noise comes from.
enum NoiseStream {
    /// Consecutive draws of one generator.
    Draws(Box<Generator>),
    /// Increments of one Brownian path.
    Brownian(BrownianNoise),
    /// The same, of a GPU's generator.
    GpuBrownian(GpuBrownianNoise),
}

/// The guided model as a function of latent and sigma.
pub type GuidedModel<'a> = dyn FnMut(&Field, f32) -> Result<Guided, DiffusionError> + 'a;

/// Progress report: step number, latent, denoised prediction. An error ends the run.
pub type Report<'a> = dyn FnMut(usize, &Field, &Field) -> Result<(), DiffusionError> + 'a;

/// What a run is made of.
pub struct RunSetup<'a> {
    /// Sigmas to visit.
    pub sigmas: &'a [f32],
    /// The model's noise levels.
    pub sampling: &'a ModelSampling,
    /// Seed of all noise drawn on the way.
    pub seed: u64,
    /// Where the noise of an SDE method is drawn.
    pub noise_device: NoiseDevice,
    /// The guided model.
    pub model: &'a mut GuidedModel<'a>,
    /// Progress.
    pub report: &'a mut Report<'a>,
}

/// A run in progress.
pub struct Run<'a> {
    sigmas: Vec<f32>,
    sampling: &'a ModelSampling,
    seed: u64,
    noise_device: NoiseDevice,
    model: &'a mut GuidedModel<'a>,
    report: &'a mut Report<'a>,
    noise: NoiseStream,
    /// How far the device's generator is used up, if it draws the noise.
    gpu_offset: u64,
}

impl<'a> Run<'a> {
    /// Starts a run.
    pub fn new(setup: RunSetup<'a>) -> Self {
        Self {
            sigmas: setup.sigmas.to_vec(),
            sampling: setup.sampling,
            seed: setup.seed,
            noise_device: setup.noise_device,
            model: setup.model,
            report: setup.report,
            noise: NoiseStream::Draws(Box::new(Generator::new(setup.seed))),
            gpu_offset: 0,
        }
    }

    /// Number of steps: sigmas less one.
    pub(super) fn steps(&self) -> usize {
        self.sigmas.len().saturating_sub(1)
    }

    /// Sigma number `i`; 0 beyond the end.
    pub(super) fn sigma(&self, i: usize) -> f64 {
        self.sigmas.get(i).map_or(0.0, |&s| f64::from(s))
    }

    /// Seed of all noise drawn on the way.
    pub(super) fn seed(&self) -> u64 {
        self.seed
    }

    /// The model's noise levels.
    pub(super) fn sampling(&self) -> &ModelSampling {
        self.sampling
    }

    /// How signal and noise are mixed.
    pub(super) fn space(&self) -> SnrSpace {
        if self.sampling.is_flow() { SnrSpace::Flow } else { SnrSpace::VarianceExploding }
    }

    /// Lowers a flow model's first sigma a little if it is 1, where there is no
    /// signal and the log-SNR is infinite.
    pub(super) fn bound_first_sigma(&mut self) {
        if self.space() == SnrSpace::Flow
            && self.sigmas.len() > 1
            && let Some(first) = self.sigmas.first_mut().filter(|s| **s >= 1.0)
        {
            *first = self.sampling.percent_to_sigma(FIRST_SIGMA_PERCENT) as f32;
        }
    }

    /// Where the run ends: the last sigma, 0 without any.
    pub fn last_sigma(&self) -> f32 {
        self.sigmas.last().copied().unwrap_or(0.0)
    }

    /// Replaces a last sigma of 0, also for the scaling after the run.
    pub(super) fn bound_last_sigma(&mut self, sigma: f64) {
        if let Some(last) = self.sigmas.last_mut().filter(|s| **s == 0.0) {
            *last = sigma as f32;
        }
    }

    /// The guided prediction at `sigma`.
    pub(super) fn denoise(&mut self, x: &Field, sigma: f64) -> Result<Field, DiffusionError> {
        Ok((self.model)(x, sigma as f32)?.denoised)
    }

    /// The guided and the unconditional prediction at `sigma`.
    pub(super) fn predict(&mut self, x: &Field, sigma: f64) -> Result<(Field, Field), DiffusionError> {
        let guided = (self.model)(x, sigma as f32)?;
        let uncond = guided.uncond.unwrap_or_else(|| HostTensor::zeros(x.shape()).into());
        Ok((guided.denoised, uncond))
    }

    /// Reports step `i` (from 0).
    pub(super) fn report(&mut self, i: usize, x: &Field, denoised: &Field) -> Result<(), DiffusionError> {
        (self.report)(i, x, denoised)
    }

    /// Takes noise from a Brownian path over the schedule from now on.
    pub(super) fn use_brownian_noise(&mut self, x: &Field) -> Result<(), DiffusionError> {
        let positive = self.sigmas.iter().copied().filter(|s| *s > 0.0);
        let (low, high) = positive.fold((f32::INFINITY, 0.0), |(l, h), s| (s.min(l), s.max(h)));
        self.noise = match (self.noise_device, x.on_device()) {
            (NoiseDevice::Gpu, Some(_)) => {
                NoiseStream::GpuBrownian(GpuBrownianNoise::new(x, low, high, self.seed)?)
            }
            _ => NoiseStream::Brownian(BrownianNoise::new(x.shape(), low, high, self.seed)?),
        };
        Ok(())
    }

    /// Noise of unit variance for the step `from → to`, shaped like `x`.
    pub(super) fn noise_like(&mut self, x: &Field, from: f64, to: f64) -> Result<Field, DiffusionError> {
        if matches!(self.noise, NoiseStream::Draws(_))
            && x.draws_noise()
            && let Some((noise, offset)) = x.gpu_noise(self.seed, self.gpu_offset)?
        {
            self.gpu_offset = offset;
            return Ok(noise);
        }
        let noise = match &mut self.noise {
            NoiseStream::Draws(generator) => Field::from(generator.randn(x.shape())),
            NoiseStream::Brownian(path) => path.sample(from as f32, to as f32).into(),
            NoiseStream::GpuBrownian(path) => path.sample(from as f32, to as f32)?,
        };
        if noise.shape() != x.shape() {
            return Err(DiffusionError::Shape {
                what: "noise of a step",
                got: noise.shape().to_vec(),
                want: x.shape().to_vec(),
            });
        }
        noise.beside(x)
    }

    /// Finishes an ancestral step: rescaling and fresh noise.
    pub(super) fn renoise(
        &mut self,
        x: Field,
        step: &Ancestral,
        opt: Stochastic,
        from: f64,
        to: f64,
    ) -> Result<Field, DiffusionError> {
        if opt.eta == 0.0 {
            return Ok(x);
        }
        let noise = self.noise_like(&x, from, to)?;
        lincomb(&[(step.rescale, &x), (opt.s_noise * step.up, &noise)])
    }
}
