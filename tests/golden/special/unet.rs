//! UNet forwards: raw prediction, denoised prediction, activations of named modules.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use kiln::diffusion::schedule::{Betas, ModelSampling, Prediction};
use kiln::models::ModelSource;
use kiln::models::unet::{Unet, UnetInput};
use kiln::tensor::{HostLayout, HostTensor, Tensor};
use serde_json::Value as Json;

use crate::Group;
use crate::compare::{self, Measure};
use crate::report::{Outcome, Report};
use crate::workflow::{Bench, model_folder};

/// Measured between implementations of the reference: 3e-6; standard deviation of the output 0.6.
const TOLERANCE: Measure = Measure::Absolute(2e-5);

pub fn run(group: &Group, bench: &Bench, report: &mut Report) {
    let cases = group.json["cases"].as_object().into_iter().flatten();
    for (name, case) in cases.filter(|(name, _)| report.wants(&group.name, name)).collect::<Vec<_>>() {
        let outcome = forward(group, name, case, bench).unwrap_or_else(Outcome::Fail);
        report.case(&group.name, name, outcome);
    }
}

fn forward(group: &Group, name: &str, case: &Json, bench: &Bench) -> Result<Outcome, String> {
    let golden = |part: &str| group.tensors.get(part).ok_or_else(|| format!("no recorded tensor {part}"));
    let of_case = |part: &str| golden(&format!("{name}.{part}"));
    bench.provide_models("synth-sd15");
    let path = model_folder().join("checkpoints/synth-sd15.safetensors");
    let unet = load(&path, bench)?;
    let context = Arc::new(golden("context")?);
    let context = unet.context(&[context]).map_err(|e| e.to_string())?;
    let (xc, timesteps) = (of_case("xc")?, of_case("timestep")?);

    let mut seen: BTreeMap<String, HostTensor> = BTreeMap::new();
    let backend = bench.services().models.backend().clone();
    let mut probe = |module: &str, t: &Tensor| {
        let s = t.shape();
        let mut out = HostTensor::zeros(&[s.n, s.c, s.h, s.w]);
        if backend.download(t, HostLayout::Nchw, out.data_mut()).is_ok() {
            seen.insert(module.to_owned(), out);
        }
    };
    let input = UnetInput { x: &xc, timesteps: timesteps.data(), context: &context };
    let eps = unet.forward(&input, Some(&mut probe)).map_err(|e| e.to_string())?;

    let mut outcome = compare::tensors(&eps, &of_case("eps")?, TOLERANCE);
    let sigma = case["sigma"].as_f64().ok_or("no sigma")? as f32;
    let sampling = ModelSampling::discrete(Prediction::Eps, Betas::default());
    let denoised = sampling.calculate_denoised(sigma, &eps, &of_case("x")?);
    // The prediction is x - sigma·eps: its error is sigma times that of eps.
    let scaled = Measure::Absolute(2e-5 * f64::from(sigma.max(1.0)));
    outcome = outcome.and(compare::tensors(&denoised, &of_case("denoised")?, scaled));
    let mut compared = 0;
    for (module, ours) in &seen {
        let Ok(recorded) = of_case(&format!("act.{module}")) else { continue };
        // Activations grow with depth; relative to their spread they keep the output's tolerance.
        let ours = as_recorded(ours, &recorded);
        outcome = outcome.and(compare::tensors(&ours, &recorded, Measure::RelativeToStd(3.4e-5)));
        compared += 1;
    }
    println!("      {name}: {compared} activations compared");
    Ok(outcome)
}

/// Token activations are recorded as `[B, S, C]`, feature maps as `[B, C, h, w]`.
fn as_recorded(ours: &HostTensor, recorded: &HostTensor) -> HostTensor {
    let (n, c, s) = (ours.dim(0), ours.dim(1), ours.dim(2) * ours.dim(3));
    if recorded.shape().len() != 3 {
        return ours.clone();
    }
    HostTensor::from_fn(&[n, s, c], |i| ours.data()[(i / (s * c) * c + i % c) * s + i / c % s])
}

fn load(path: &Path, bench: &Bench) -> Result<Arc<Unet>, String> {
    bench.services().models.file(ModelSource::File(path.to_owned())).unet().map_err(|e| e.to_string())
}
