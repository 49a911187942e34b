//! Every sampler by name: schedules, masks, cfg 1, zero-SNR, flow, step ranges.

use std::sync::Arc;

use serde_json::Value as Json;

use super::{Group, Toy, distance, entry, report};
use crate::diffusion::noise::prepare_noise;
use crate::diffusion::sample::{Observer, SampleRequest, Step, sample, schedule_range};
use crate::diffusion::samplers::Sampler;
use crate::diffusion::schedule::ksampler_sigmas;
use crate::diffusion::{DiffusionError, Guidance, Guider};
use crate::tensor::HostTensor;

#[derive(Default)]
struct Count(usize);

impl Observer for Count {
    fn step(&mut self, _: &Step<'_>) -> Result<(), DiffusionError> {
        self.0 += 1;
        Ok(())
    }
}

/// Runs one case as KSamplerAdvanced would; gives the latent and the callback count.
fn run(case: &Json, group: &Group) -> (HostTensor, usize) {
    let text = |key: &str| case[key].as_str().unwrap();
    let model = Toy::named(text("model"));
    let latent = match case["use_latent"].as_bool() {
        Some(true) => group.tensor("latent_in").clone(),
        _ => HostTensor::zeros(&[2, 4, 6, 5]),
    };
    let seed = case["seed"].as_u64().unwrap();
    let indices: Option<Vec<usize>> = serde_json::from_value(case["batch_index"].clone()).unwrap();
    let noise = match case["disable_noise"].as_bool() {
        Some(true) => HostTensor::zeros(latent.shape()),
        _ => prepare_noise(latent.shape(), seed, indices.as_deref()),
    };
    let steps = case["steps"].as_u64().unwrap() as usize;
    let denoise = case["denoise"].as_f64().unwrap_or(1.0);
    let name = text("sampler");
    let sigmas = ksampler_sigmas(model.0.sampling(), name, text("scheduler"), steps, denoise).unwrap();
    let start = case["start_step"].as_u64().unwrap_or(0) as usize;
    let end = case["last_step"].as_u64().unwrap_or(10_000) as usize;
    let force = case["force_full_denoise"].as_bool().unwrap_or(false);
    let Some(sigmas) = schedule_range(&sigmas, start, end, force) else {
        return (latent, 0);
    };
    let guidance = Guidance::Cfg {
        positive: Arc::new(vec![entry(1.0)]),
        negative: Arc::new(vec![entry(-1.0)]),
        scale: case["cfg"].as_f64().unwrap(),
    };
    let request = SampleRequest {
        guider: &Guider { model, guidance },
        sampler: &Sampler::by_name(name).unwrap(),
        sigmas: &sigmas,
        noise: &noise,
        latent: &latent,
        mask: case["mask"].as_bool().unwrap_or(false).then(|| group.tensor("mask")),
        seed,
    };
    let mut count = Count::default();
    let out = sample(&request, &mut count).unwrap();
    (out.samples, count.0)
}

#[test]
fn every_sampler_in_every_case() {
    let group = Group::load("samplers_toy");
    let mut results = Vec::new();
    let mut miscounted = Vec::new();
    for (name, case) in &group.cases {
        let (samples, callbacks) = run(case, &group);
        if callbacks as u64 != case["callbacks"].as_u64().unwrap() {
            miscounted.push(format!("{name}: {callbacks} callbacks, not {}", case["callbacks"]));
        }
        // Zero-SNR cases start at sigma 4518 and carry its rounding errors.
        let tolerance = if name.ends_with(".vz") { 5e-4 } else { 1e-4 };
        results.push((name.clone(), distance(&samples, group.tensor(name)), tolerance));
    }
    assert_eq!(results.len(), 315);
    eprintln!("{}", miscounted.join("\n"));
    report("samplers_toy", &results);
    assert!(miscounted.is_empty());
}
