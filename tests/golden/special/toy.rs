//! The closed-form denoiser that stands in for a network, so that only the
//! arithmetic around it is compared.

use std::sync::Arc;

use kiln::diffusion::schedule::{Betas, ModelSampling, Prediction};
use kiln::diffusion::{CondEntry, DenoiseItem, DiffusionError, Field, LatentFormat, Model, ModelHandle};
use kiln::tensor::HostTensor;
use serde_json::Value as Json;

use crate::Group;
use crate::report::Outcome;

/// `denoised = x - sigma·e(x, s)`, with `s` the mean of the conditioning.
struct Toy {
    sampling: ModelSampling,
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

/// The denoiser with these noise levels.
pub fn model(sampling: ModelSampling) -> ModelHandle {
    ModelHandle(Arc::new(Toy { sampling }))
}

/// Noise levels by the names that the groups use.
pub fn sampling(name: &str) -> Result<ModelSampling, Outcome> {
    let zero_snr = Betas { has_zero_terminal_snr: true, ..Betas::default() };
    Ok(match name {
        "eps" | "sd15_eps" => ModelSampling::discrete(Prediction::Eps, Betas::default()),
        "sd_v" => ModelSampling::discrete(Prediction::V, Betas::default()),
        "v_zsnr" => ModelSampling::discrete(Prediction::V, zero_snr),
        _ => match name.strip_prefix("flow_shift").and_then(|shift| shift.parse().ok()) {
            Some(shift) => ModelSampling::flow(shift, 1000.0),
            None => return Err(Outcome::Fail(format!("unknown model {name}"))),
        },
    })
}

/// A conditioning whose every value is `s`.
pub fn entry(s: f32) -> CondEntry {
    CondEntry::new(Arc::new(HostTensor::full(&[1, 1, 1], s)))
}

/// Reads a text of a case.
pub fn text<'a>(case: &'a Json, key: &str) -> Result<&'a str, Outcome> {
    case[key].as_str().ok_or_else(|| Outcome::Fail(format!("no text {key:?} in the case")))
}

/// Reads a number of a case.
pub fn number(case: &Json, key: &str) -> Result<f64, Outcome> {
    case[key].as_f64().ok_or_else(|| Outcome::Fail(format!("no number {key:?} in the case")))
}

/// Reads a count or seed of a case.
pub fn whole(case: &Json, key: &str) -> Result<u64, Outcome> {
    case[key].as_u64().ok_or_else(|| Outcome::Fail(format!("no whole number {key:?} in the case")))
}

/// A recorded tensor.
pub fn tensor(group: &Group, name: &str) -> Result<HostTensor, Outcome> {
    group.tensors.need(name).map_err(Outcome::Fail)
}
