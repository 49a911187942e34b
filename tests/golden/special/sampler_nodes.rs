//! Nodes that make a sampler, through SamplerCustom with the closed-form denoiser.

use kiln::diffusion::{Conditioning, Latent};
use kiln::nodes::Value;
use serde_json::{Value as Json, json};

use super::toy::{self, entry, number, tensor, text, whole};
use crate::Group;
use crate::bench::Bench;
use crate::compare::{self, Measure};
use crate::report::Outcome;

/// The outputs of SamplerCustom.
const OUTPUTS: [&str; 2] = ["output", "denoised_output"];

pub fn compare(group: &Group, name: &str, case: &Json, bench: &Bench) -> Result<Outcome, Outcome> {
    let prompt = prompt(group, case, bench)?;
    let prompt = prompt.as_object().ok_or_else(|| Outcome::Fail("no prompt".to_owned()))?;
    let ran = bench.run(prompt, &[("run", 0), ("run", 1)])?;
    // A float64 denoiser moves the reference by 3e-6 (median) to 1.5e-5, and by
    // 1.2e-4 where the run starts without noise.
    let measure = Measure::RelativeToStd(if case["add_noise"] == true { 1e-4 } else { 5e-4 });
    let mut outcomes = Vec::new();
    for (part, values) in OUTPUTS.iter().zip(&ran.values) {
        let latent = values.first().and_then(Value::downcast::<Latent>);
        let latent = latent.ok_or_else(|| Outcome::Fail(format!("{part} is not a latent")))?;
        let golden = tensor(group, &format!("{name}.{part}"))?;
        outcomes.push(compare::tensors(&latent.samples, &golden, measure));
    }
    Outcome::worst(outcomes).ok_or_else(|| Outcome::Fail("no outputs".to_owned()))
}

fn prompt(group: &Group, case: &Json, bench: &Bench) -> Result<Json, Outcome> {
    let model = toy::model(toy::sampling(text(case, "model")?)?);
    let side = |s| Value::object("CONDITIONING", Conditioning::from(vec![entry(s)]));
    let latent = Latent::new(tensor(group, "latent_in")?);
    let scheduler = json!({
        "model": ["model", 0],
        "scheduler": case["scheduler"][0],
        "steps": case["scheduler"][1],
        "denoise": 1.0,
    });
    let run = json!({
        "model": ["model", 0],
        "add_noise": case["add_noise"],
        "noise_seed": whole(case, "seed")?,
        "cfg": number(case, "cfg")?,
        "positive": ["positive", 0],
        "negative": ["negative", 0],
        "sampler": ["sampler", 0],
        "sigmas": ["sigmas", 0],
        "latent_image": ["latent", 0],
    });
    let class = text(case, "node")?;
    let mut inputs = case["inputs"].clone();
    if bench.takes(class, "model") {
        inputs["model"] = json!(["model", 0]);
    }
    Ok(json!({
        "model": bench.give("model", Value::object("MODEL", model)),
        "positive": bench.give("positive", side(1.0)),
        "negative": bench.give("negative", side(-1.0)),
        "latent": bench.give("latent", Value::object("LATENT", latent)),
        "sampler": {"class_type": class, "inputs": inputs},
        "sigmas": {"class_type": "BasicScheduler", "inputs": scheduler},
        "run": {"class_type": "SamplerCustom", "inputs": run},
    }))
}
