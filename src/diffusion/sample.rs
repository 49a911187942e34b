//! The sampling loop: from noise and a latent to a finished latent.
//!
//! This is what KSampler and SamplerCustom do around a sampler: scaling of latent
//! and noise to the model's conventions, the inpainting wrapper, and the way back.
//!
//! If the model has a [device](super::Model::device), the latent goes there once and comes back once; in between
//! the host queues work, at most two model calls ahead.

use std::sync::Arc;

use super::guidance::Guider;
use super::inpaint::{Inpaint, one_channel, prepare_mask};
use super::noise::{Generator, prepare_noise};
use super::samplers::{Guided, Run, RunSetup, Sampler};
use super::{DiffusionError, Field, Latent, RunInputs};
use crate::tensor::{Backend, HostTensor};

/// A schedule on a `SIGMAS` link.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sigmas(pub Vec<f32>);

/// Initial noise on a `NOISE` link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoiseSource {
    /// Gaussian noise from a seed.
    Seeded(u64),
    /// No noise.
    Zero,
}

impl NoiseSource {
    /// The seed that samplers draw their own noise from.
    pub fn seed(self) -> u64 {
        match self {
            NoiseSource::Seeded(seed) => seed,
            NoiseSource::Zero => 0,
        }
    }

    /// Noise for a latent.
    pub fn generate(self, latent: &Latent) -> HostTensor {
        let shape = latent.samples.shape();
        match self {
            NoiseSource::Seeded(seed) => prepare_noise(shape, seed, latent.batch_index.as_deref()),
            NoiseSource::Zero => HostTensor::zeros(shape),
        }
    }
}

/// Everything a run needs.
#[derive(Clone, Copy)]
pub struct SampleRequest<'a> {
    /// Model and guidance.
    pub guider: &'a Guider,
    /// The sampler.
    pub sampler: &'a Sampler,
    /// Sigmas to visit; empty gives the latent back.
    pub sigmas: &'a [f32],
    /// Initial noise, shaped like `latent`; zeros to continue a run.
    pub noise: &'a HostTensor,
    /// The latent to start from, as on a link (unscaled).
    pub latent: &'a HostTensor,
    /// Where to sample, at any size.
    pub mask: Option<&'a HostTensor>,
    /// Seed of noise that samplers draw on the way.
    pub seed: u64,
}

/// A step that was made.
pub struct Step<'a> {
    /// Number of the step, from 0. A sampler may report more or fewer than `total`.
    pub step: usize,
    /// Number of steps of the schedule.
    pub total: usize,
    /// The current latent, in the model's scale.
    pub x: &'a Field,
    /// The denoised prediction, in the model's scale. On a device it may not be computed yet: looking at it waits.
    pub denoised: &'a Field,
}

/// Whoever watches a run. An error ends the run with that error.
pub trait Observer {
    /// A step was made.
    fn step(&mut self, step: &Step<'_>) -> Result<(), DiffusionError> {
        let _ = step;
        Ok(())
    }

    /// The model is about to be called.
    fn before_model_call(&mut self) -> Result<(), DiffusionError> {
        Ok(())
    }
}

/// Nobody watches.
impl Observer for () {}

/// A finished run.
#[derive(Clone, Debug)]
pub struct Sampled {
    /// The latent, as on a link (unscaled).
    pub samples: HostTensor,
    /// The last denoised prediction, as on a link; `None` if no step was reported.
    pub denoised: Option<HostTensor>,
}

/// Only asks whether to go on.
struct Quiet<'a>(&'a mut dyn Observer);

impl Observer for Quiet<'_> {
    fn before_model_call(&mut self) -> Result<(), DiffusionError> {
        self.0.before_model_call()
    }
}

/// Runs a sampler.
///
/// # Errors
/// [`DiffusionError::Shape`] if noise and latent do not fit, whatever the model
/// returns, and whatever the observer returns (at once).
pub fn sample(request: &SampleRequest<'_>, observer: &mut dyn Observer) -> Result<Sampled, DiffusionError> {
    if request.sigmas.is_empty() {
        return Ok(Sampled { samples: request.latent.clone(), denoised: None });
    }
    if request.noise.shape() != request.latent.shape() {
        let (got, want) = (request.noise.shape().to_vec(), request.latent.shape().to_vec());
        return Err(DiffusionError::Shape { what: "noise", got, want });
    }
    let Some(device) = request.guider.model.0.device() else {
        return sample_on(None, request, observer);
    };
    let sampled = sample_on(Some(&device), request, observer)?;
    let is_finite = |x: &HostTensor| x.data().iter().all(|v| v.is_finite());
    if is_finite(&sampled.samples) && sampled.denoised.as_ref().is_none_or(is_finite) {
        return Ok(sampled);
    }
    // On the device nobody looks at a step's numbers: where they ceased to be some is found in host memory.
    sample_on(None, request, &mut Quiet(observer))
}

fn sample_on(
    device: Option<&Arc<dyn Backend>>,
    request: &SampleRequest<'_>,
    observer: &mut dyn Observer,
) -> Result<Sampled, DiffusionError> {
    let SampleRequest { guider, sampler, sigmas, noise, latent, seed, .. } = *request;
    let first = sigmas.first().copied().unwrap_or_default();
    let sampling = guider.model.0.sampling();
    let original = if latent.is_zero() { latent.clone() } else { guider.model.latent_in(latent) };
    let mask = request.mask.map(|mask| prepare_mask(mask, latent.shape())).transpose()?;
    let inpaint = mask.as_ref().map(|mask| inpaint(device, request, mask, &original)).transpose()?;
    let start = sampling.noise_scaling(first, noise, &original, sampling.is_max_denoise(first));
    let run = RunInputs { latent: Some(Arc::new(original)), mask: mask.clone().map(Arc::new), seed };
    let mut prepared = guider.prepare(latent.shape(), run)?;

    let watch = std::cell::RefCell::new(observer);
    let mut model = |x: &Field, sigma: f32| -> Result<Guided, DiffusionError> {
        watch.borrow_mut().before_model_call()?;
        x.pace()?;
        let (Some(inpaint), Some(mask)) = (&inpaint, &mask) else {
            return prepared.predict(x, sigma, sampler.needs_uncond());
        };
        if x.shape() != mask.shape() {
            let (got, want) = (mask.shape().to_vec(), x.shape().to_vec());
            return Err(DiffusionError::Shape { what: "noise mask", got, want });
        }
        let changed = prepared.mask_at(mask, sigma, sigmas).map(|mask| mask_on(device, mask)).transpose()?;
        let mask = changed.as_ref().unwrap_or(&inpaint.mask);
        let x = inpaint.before(x, mask, sigma, sampling)?;
        let mut guided = prepared.predict(&x, sigma, sampler.needs_uncond())?;
        guided.denoised = inpaint.after(&guided.denoised, mask)?;
        Ok(guided)
    };
    let mut last_denoised = None;
    let total = sigmas.len() - 1;
    let mut report = |step: usize, x: &Field, denoised: &Field| {
        last_denoised = Some(denoised.clone());
        watch.borrow_mut().step(&Step { step, total, x, denoised })
    };
    let noise_device = sampler.noise_device;
    let setup = RunSetup { sigmas, sampling, seed, noise_device, model: &mut model, report: &mut report };
    let mut run = Run::new(setup);
    let x = sampler.sample(&mut run, Field::on(device, start)?)?;
    let x = sampling.inverse_noise_scaling(run.last_sigma(), &*x.to_host()?);
    let out = |t: &HostTensor| guider.model.latent_out(t);
    let denoised = last_denoised.map(Field::into_host).transpose()?;
    Ok(Sampled { samples: out(&x), denoised: denoised.as_ref().map(out) })
}

/// What a run under `mask` keeps, where the run is.
fn inpaint(
    device: Option<&Arc<dyn Backend>>,
    request: &SampleRequest<'_>,
    mask: &HostTensor,
    original: &HostTensor,
) -> Result<Inpaint, DiffusionError> {
    let noise = match request.sampler.fresh_inpaint_noise {
        true => Generator::new(request.seed.wrapping_add(1)).randn(request.noise.shape()),
        false => request.noise.clone(),
    };
    Ok(Inpaint {
        mask: mask_on(device, mask.clone())?,
        original: Field::on(device, original.clone())?,
        noise: Field::on(device, noise)?,
    })
}

/// A mask where the run is.
fn mask_on(device: Option<&Arc<dyn Backend>>, mask: HostTensor) -> Result<Field, DiffusionError> {
    Field::on(device, if device.is_some() { one_channel(&mask) } else { mask })
}

/// The part of a schedule that KSamplerAdvanced runs.
///
/// `None` means that there is nothing to do and the latent comes back as it is.
pub fn schedule_range(
    sigmas: &[f32],
    start_step: usize,
    end_step: usize,
    is_fully_denoised: bool,
) -> Option<Vec<f32>> {
    let mut sigmas = sigmas.to_vec();
    if end_step < sigmas.len().saturating_sub(1) {
        sigmas.truncate(end_step + 1);
        if let Some(last) = sigmas.last_mut().filter(|_| is_fully_denoised) {
            *last = 0.0;
        }
    }
    if start_step < sigmas.len().saturating_sub(1) { Some(sigmas.split_off(start_step)) } else { None }
}
