//! Samplers with the closed-form denoiser, as KSampler and KSamplerAdvanced run them.

use std::sync::Arc;

use kiln::diffusion::noise::prepare_noise;
use kiln::diffusion::sample::{Observer, SampleRequest, Step, sample, schedule_range};
use kiln::diffusion::samplers::Sampler;
use kiln::diffusion::schedule::ksampler_sigmas;
use kiln::diffusion::{DiffusionError, Guidance, Guider};
use kiln::tensor::HostTensor;
use serde_json::Value as Json;

use super::toy::{self, entry, number, tensor, text, whole};
use crate::Group;
use crate::compare::{self, Measure};
use crate::report::Outcome;

#[derive(Default)]
struct Count(u64);

impl Observer for Count {
    fn step(&mut self, _: &Step<'_>) -> Result<(), DiffusionError> {
        self.0 += 1;
        Ok(())
    }
}

pub fn compare(group: &Group, name: &str, case: &Json) -> Result<Outcome, Outcome> {
    let golden = tensor(group, name)?;
    let (samples, callbacks) = run(group, case, golden.shape())?;
    if case["callbacks"].as_u64().is_some_and(|recorded| recorded != callbacks) {
        return Err(Outcome::Fail(format!("{callbacks} callbacks, recorded {}", case["callbacks"])));
    }
    Ok(compare::tensors(&samples, &golden, tolerance(text(case, "model")?)))
}

/// A float64 denoiser moves the reference by 3e-6 (median) to 1.5e-5; runs
/// with zero terminal SNR start at sigma 4518 and move by up to 4e-5.
fn tolerance(model: &str) -> Measure {
    Measure::RelativeToStd(if model == "v_zsnr" { 5e-4 } else { 1e-4 })
}

/// The latent and how often the sampler reported a step.
fn run(group: &Group, case: &Json, shape: &[usize]) -> Result<(HostTensor, u64), Outcome> {
    let flag = |key: &str| case[key].as_bool().unwrap_or(false);
    let model = toy::model(toy::sampling(text(case, "model")?)?);
    let latent = if flag("use_latent") { tensor(group, "latent_in")? } else { HostTensor::zeros(shape) };
    let seed = whole(case, "seed")?;
    let indices: Option<Vec<usize>> = serde_json::from_value(case["batch_index"].clone()).unwrap_or_default();
    let noise = match flag("disable_noise") {
        true => HostTensor::zeros(latent.shape()),
        false => prepare_noise(latent.shape(), seed, indices.as_deref()),
    };
    let (name, steps) = (text(case, "sampler")?, whole(case, "steps")? as usize);
    let denoise = case["denoise"].as_f64().unwrap_or(1.0);
    let sigmas = ksampler_sigmas(model.0.sampling(), name, text(case, "scheduler")?, steps, denoise)
        .map_err(|e| Outcome::Fail(e.to_string()))?;
    let start = case["start_step"].as_u64().unwrap_or(0) as usize;
    let end = case["last_step"].as_u64().map_or(usize::MAX, |end| end as usize);
    let Some(sigmas) = schedule_range(&sigmas, start, end, flag("force_full_denoise")) else {
        return Ok((latent, 0));
    };
    let guidance = Guidance::Cfg {
        positive: Arc::new(vec![entry(1.0)]),
        negative: Arc::new(vec![entry(-1.0)]),
        scale: number(case, "cfg")?,
    };
    let mask = if flag("mask") { Some(tensor(group, "mask")?) } else { None };
    let request = SampleRequest {
        guider: &Guider { model, guidance },
        sampler: &Sampler::by_name(name).ok_or_else(|| Outcome::Fail(format!("no sampler {name}")))?,
        sigmas: &sigmas,
        noise: &noise,
        latent: &latent,
        mask: mask.as_ref(),
        seed,
    };
    let mut count = Count::default();
    let out = sample(&request, &mut count).map_err(|e| Outcome::Fail(e.to_string()))?;
    Ok((out.samples, count.0))
}
