//! UNet forwards: raw prediction, denoised prediction, activations of named modules.

use std::collections::BTreeMap;
use std::sync::Arc;

use kiln::diffusion::ModelHandle;
use kiln::models::unet::UnetInput;
use kiln::models::unet::vector::sinusoids;
use kiln::nodes::Value;
use kiln::nodes::loaders::VaeHandle;
use kiln::tensor::{HostLayout, HostTensor, Tensor};
use serde_json::{Value as Json, json};

use crate::Group;
use crate::bench::Bench;
use crate::compare::{self, Measure};
use crate::report::Outcome;

/// Measured between implementations of the reference: 3e-6; standard deviation of the output 0.6.
const TOLERANCE: f64 = 2e-5;
/// Activations grow with depth; relative to their spread they keep the output's tolerance.
const ACTIVATIONS: Measure = Measure::RelativeToStd(TOLERANCE / 0.6);

pub fn compare(group: &Group, name: &str, case: &Json, bench: &Bench) -> Result<Outcome, Outcome> {
    let prompt = json!({
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": checkpoint(group)}},
    });
    let ran = bench.run(prompt.as_object().unwrap_or(&serde_json::Map::new()), &[("4", 0), ("4", 2)])?;
    let value = |i: usize| ran.values.get(i).and_then(|v| v.first());
    let model = value(0).and_then(Value::downcast::<ModelHandle>);
    let part = value(1).and_then(Value::downcast::<VaeHandle>);
    let (Some(model), Some(part)) = (model, part) else {
        return Err(Outcome::Fail("the loader gave no model".to_owned()));
    };
    let unet = part.file.unet().map_err(|e| Outcome::Fail(e.to_string()))?;
    let sigma = case["sigma"].as_f64().ok_or_else(|| Outcome::Fail("no sigma".to_owned()))? as f32;
    let forward = Forward { group, name, bench, sigma };
    forward.compare(&model, &unet).map_err(Outcome::Fail)
}

/// The checkpoint that the group's workflows load; SD1.5 in groups without.
fn checkpoint(group: &Group) -> &str {
    let cases = group.json["cases"].as_object().into_iter().flatten();
    let nodes = cases.flat_map(|(_, case)| case["workflow"].as_object().into_iter().flatten());
    nodes.filter_map(|(_, n)| n["inputs"]["ckpt_name"].as_str()).next().unwrap_or("synth-sd15.safetensors")
}

struct Forward<'a> {
    group: &'a Group,
    name: &'a str,
    bench: &'a Bench,
    sigma: f32,
}

impl Forward<'_> {
    fn recorded(&self, part: &str) -> Result<HostTensor, String> {
        self.group.tensors.need(&format!("{}.{part}", self.name))
    }

    fn compare(&self, model: &ModelHandle, unet: &kiln::models::unet::Unet) -> Result<Outcome, String> {
        let sampling = model.0.sampling();
        let (x, xc, timesteps) = (self.recorded("x")?, self.recorded("xc")?, self.recorded("timestep")?);
        if timesteps.data().iter().any(|t| *t != sampling.timestep(self.sigma)) {
            let ours = sampling.timestep(self.sigma);
            return Err(format!("timestep {ours}, recorded {:?}", timesteps.data()));
        }
        let context = self.recorded("context").or_else(|_| self.group.tensors.need("context"))?;
        let context = unet.context(&[Arc::new(context)]).map_err(|e| e.to_string())?;

        let mut seen: BTreeMap<String, HostTensor> = BTreeMap::new();
        let backend = self.bench.services().models.placement().diffusion.clone();
        let mut probe = |module: &str, t: &Tensor| {
            let s = t.shape();
            let mut out = HostTensor::zeros(&[s.n, s.c, s.h, s.w]);
            if backend.download(t, HostLayout::Nchw, out.data_mut()).is_ok() {
                seen.insert(module.to_owned(), out);
            }
        };
        let vector = self.recorded("y").ok();
        if let Some(recorded) = &vector {
            self.check_sizes(recorded)?;
        }
        let vector = vector.as_ref();
        let input = UnetInput { x: &xc, timesteps: timesteps.data(), context: &context, vector };
        let output = unet.forward(&input, Some(&mut probe)).map_err(|e| e.to_string())?;

        let golden = self.recorded("eps").or_else(|_| self.recorded("model_output"))?;
        let mut outcome = compare::tensors(&output, &golden, Measure::Absolute(TOLERANCE));
        let denoised = sampling.calculate_denoised(self.sigma, &output, &x);
        // The prediction is x - sigma·eps: its error is sigma times that of eps.
        let scaled = Measure::Absolute(TOLERANCE * f64::from(self.sigma.max(1.0)));
        outcome = outcome.and(compare::tensors(&denoised, &self.recorded("denoised")?, scaled));
        let mut compared = 0;
        for (module, ours) in &seen {
            let Ok(recorded) = self.recorded(&format!("act.{module}")) else { continue };
            outcome = outcome.and(compare::tensors(&as_recorded(ours, &recorded), &recorded, ACTIVATIONS));
            compared += 1;
        }
        if let Outcome::Compared { detail, .. } = &mut outcome {
            *detail += &format!(" {compared} activations");
        }
        Ok(outcome)
    }
}

/// Height, width, crop and target size that the recorded vector was made of.
const SIZES: [f32; 6] = [768.0, 1024.0, 8.0, 16.0, 1152.0, 896.0];

impl Forward<'_> {
    /// The sinusoids of the recorded vector are ours. A frequency may be off in its last bit (2⁻²⁴), which the
    /// largest size (1152) turns into an angle of 7e-5.
    fn check_sizes(&self, recorded: &HostTensor) -> Result<(), String> {
        let ours = sinusoids(&SIZES);
        let theirs = recorded.row(0).get(recorded.row_len() - ours.len()..).ok_or("the vector is short")?;
        let worst = ours.iter().zip(theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        if worst <= 7e-5 { Ok(()) } else { Err(format!("the vector of sizes is off by {worst:e}")) }
    }
}

/// Token activations are recorded as `[B, S, C]`, vectors as `[B, C]`, feature maps as `[B, C, h, w]`.
fn as_recorded(ours: &HostTensor, recorded: &HostTensor) -> HostTensor {
    let (n, c, s) = (ours.dim(0), ours.dim(1), ours.dim(2) * ours.dim(3));
    match recorded.shape().len() {
        3 => HostTensor::from_fn(&[n, s, c], |i| ours.data()[(i / (s * c) * c + i % c) * s + i / c % s]),
        _ => ours.clone().reshape(recorded.shape()).unwrap_or_else(|| ours.clone()),
    }
}
