//! Golden tests: ComfyUI's results with a closed-form denoiser in place of the
//! network, so that only the arithmetic around it is compared.
//!
//! Tolerance: `max|a − b| / std` of the reference below 1e-4. Replacing the
//! reference's denoiser by an f64 one moves its results by 3e-6 (median) to
//! 1.5e-5 (worst), zero-terminal-SNR cases by up to 4e-5.

mod conditions;
mod samplers;

use std::collections::HashMap;
use std::path::Path;

use serde_json::{Map, Value as Json};

use super::model::{DenoiseItem, Model, ModelHandle};
use super::schedule::{Betas, ModelSampling, Prediction};
use super::{CondEntry, DiffusionError, Field, LatentFormat};
use crate::tensor::HostTensor;

/// One golden group: cases and tensors.
pub(crate) struct Group {
    pub(crate) cases: Map<String, Json>,
    tensors: HashMap<String, HostTensor>,
}

impl Group {
    pub(crate) fn load(name: &str) -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden");
        let text = std::fs::read_to_string(folder.join(format!("{name}.json"))).unwrap();
        let mut json: Json = serde_json::from_str(&text).unwrap();
        let Json::Object(cases) = json["cases"].take() else { panic!("{name}: no cases") };
        let bytes = std::fs::read(folder.join(format!("{name}.safetensors"))).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let tensors = file.iter().map(|(key, view)| {
            let values = view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
            (key.to_owned(), HostTensor::new(view.shape(), values.collect()).unwrap())
        });
        Self { cases, tensors: tensors.collect() }
    }

    pub(crate) fn tensor(&self, name: &str) -> &HostTensor {
        self.tensors.get(name).unwrap_or_else(|| panic!("no tensor {name}"))
    }
}

/// `max|a − b| / std(reference)`; infinite if the shapes differ or a NaN is on one side only.
pub(crate) fn distance(got: &HostTensor, reference: &HostTensor) -> f64 {
    if got.shape() != reference.shape() {
        return f64::INFINITY;
    }
    let n = reference.len() as f64;
    let values = || reference.data().iter().map(|v| f64::from(*v));
    let mean = values().sum::<f64>() / n;
    let std = (values().map(|v| (v - mean).powi(2)).sum::<f64>() / n).sqrt();
    let worst = got.data().iter().zip(values()).fold(0.0, |worst: f64, (g, r)| {
        let d = (f64::from(*g) - r).abs();
        if d.is_nan() { f64::INFINITY } else { worst.max(d) }
    });
    worst / std
}

/// The closed-form denoiser: `x − sigma·e(x, s)` with `s` the mean of the conditioning.
pub(crate) struct Toy {
    sampling: ModelSampling,
}

impl Toy {
    fn handle(sampling: ModelSampling) -> ModelHandle {
        ModelHandle(std::sync::Arc::new(Self { sampling }))
    }

    pub(crate) fn named(name: &str) -> ModelHandle {
        let zsnr = Betas { has_zero_terminal_snr: true, ..Betas::default() };
        Self::handle(match name {
            "eps" => ModelSampling::discrete(Prediction::Eps, Betas::default()),
            "v_zsnr" => ModelSampling::discrete(Prediction::V, zsnr),
            "flow_shift3" => ModelSampling::flow(3.0, 1000.0),
            _ => panic!("unknown toy model {name}"),
        })
    }
}

impl Model for Toy {
    fn network(&self) -> &dyn std::any::Any {
        self
    }

    fn denoise(&self, items: &[DenoiseItem<'_>], sigma: f32) -> Result<Vec<Field>, DiffusionError> {
        let root = if self.sampling.is_flow() { 1.0 } else { (sigma * sigma + 1.0).sqrt() };
        let one = |item: &DenoiseItem<'_>| {
            let cond = item.cond.cond.data();
            let s = cond.iter().sum::<f32>() / cond.len() as f32;
            let denoised = item.x.to_host()?.map(|x| {
                let xs = x / root;
                let e = 0.8 * xs + 0.2 * (2.0 * xs + 0.5 * s).tanh() + 0.05 * s;
                x - sigma * e
            });
            Ok(denoised.into())
        };
        items.iter().map(one).collect()
    }

    fn sampling(&self) -> &ModelSampling {
        &self.sampling
    }

    fn latent_format(&self) -> LatentFormat {
        LatentFormat::Scaled(0.18215)
    }
}

/// A conditioning whose every value is `s`.
pub(crate) fn entry(s: f32) -> CondEntry {
    CondEntry::new(std::sync::Arc::new(HostTensor::full(&[1, 1, 1], s)))
}

/// Fails with every case beyond its tolerance by name.
pub(crate) fn report(name: &str, results: &[(String, f64, f64)]) {
    let worst = results.iter().fold(0.0, |w: f64, r| w.max(r.1));
    eprintln!("{name}: {} cases, worst {worst:.1e}", results.len());
    let failed: Vec<String> = results
        .iter()
        .filter(|(_, distance, tolerance)| distance.is_nan() || distance > tolerance)
        .map(|(case, distance, tolerance)| format!("{case}: {distance:.2e} > {tolerance:.0e}"))
        .collect();
    assert!(
        failed.is_empty(),
        "{} of {} cases of {name} differ:\n{}",
        failed.len(),
        results.len(),
        failed.join("\n")
    );
}
