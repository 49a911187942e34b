//! Schedules: KSampler's by name, nodes that make or edit sigmas, tables and lookups.

use kiln::diffusion::sample::Sigmas;
use kiln::diffusion::schedule::{ModelSampling, ksampler_sigmas};
use kiln::nodes::Value;
use serde_json::{Map, Value as Json, json};

use super::toy::{self, number, text, whole};
use crate::Group;
use crate::bench::Bench;
use crate::compare::{self, Measure};
use crate::report::{Outcome, Report};

/// The last bits of exp, log and pow; a step to the next entry of a sigma table is a hundred times as much.
const TOLERANCE: Measure = Measure::RelativeEach(1e-5);

pub fn run(group: &Group, bench: &Bench, report: &mut Report) {
    let mut case = |name: String, run: &dyn Fn() -> Result<Outcome, Outcome>| {
        if report.wants(&group.name, &name) {
            report.case(&group.name, &name, run().unwrap_or_else(|outcome| outcome));
        }
    };
    let list = |key: &str| group.json[key].as_array().into_iter().flatten();
    for entry in list("ksampler") {
        let word = |key: &str| entry[key].as_str().and_then(|s| s.split(' ').next()).unwrap_or_default();
        let (model, sampler, scheduler) = (word("model"), word("sampler"), word("scheduler"));
        let name = format!("{model}.{sampler}.{scheduler}{}_d{}", entry["steps"], entry["denoise"]);
        case(name, &|| ksampler(entry, sampler));
    }
    for (place, entry) in list("nodes").enumerate() {
        case(format!("{}.{place}", entry["node"].as_str().unwrap_or_default()), &|| node(entry, bench));
    }
    for (key, recorded) in group.json["model_sampling"].as_object().into_iter().flatten() {
        case(format!("model_sampling.{key}"), &|| table(key, recorded));
    }
}

/// A recorded number; `"NaN"` stands for itself.
fn float(value: &Json) -> Option<f64> {
    value.as_f64().or_else(|| (value == "NaN").then_some(f64::NAN))
}

fn floats(value: &Json) -> Result<Vec<f32>, Outcome> {
    let list = value.as_array().map(|list| list.iter().map(|v| float(v).map(|v| v as f32)).collect());
    list.flatten().ok_or_else(|| Outcome::Fail(format!("not a list of numbers: {value}")))
}

fn ksampler(entry: &Json, sampler: &str) -> Result<Outcome, Outcome> {
    let model = toy::sampling(text(entry, "model")?)?;
    let (steps, denoise) = (whole(entry, "steps")? as usize, number(entry, "denoise")?);
    let sigmas = ksampler_sigmas(&model, sampler, text(entry, "scheduler")?, steps, denoise);
    let sigmas = sigmas.map_err(|e| Outcome::Fail(e.to_string()))?;
    Ok(compare::values(&sigmas, &floats(&entry["sigmas"])?, TOLERANCE))
}

/// Runs a node on its recorded inputs; `model` names noise levels, `sigmas` lists values.
fn node(entry: &Json, bench: &Bench) -> Result<Outcome, Outcome> {
    let mut prompt = Map::new();
    let mut inputs = entry["inputs"].as_object().cloned().unwrap_or_default();
    if let Some(name) = inputs.get("model").and_then(Json::as_str) {
        let model = toy::model(toy::sampling(name)?);
        prompt.insert("model".to_owned(), bench.give("model", Value::object("MODEL", model)));
        inputs.insert("model".to_owned(), json!(["model", 0]));
    }
    if let Some(list) = inputs.get("sigmas") {
        let sigmas = Sigmas(floats(list)?);
        prompt.insert("sigmas".to_owned(), bench.give("sigmas", Value::object("SIGMAS", sigmas)));
        inputs.insert("sigmas".to_owned(), json!(["sigmas", 0]));
    }
    prompt.insert("node".to_owned(), json!({"class_type": text(entry, "node")?, "inputs": inputs}));
    let recorded = entry["outputs"].as_array().ok_or_else(|| Outcome::Fail("no outputs".to_owned()))?;
    let links: Vec<_> = (0..recorded.len()).map(|slot| ("node", slot)).collect();
    let ran = bench.run(&prompt, &links)?;
    let compared = ran.values.iter().zip(recorded).map(|(values, recorded)| {
        let value = values.first().ok_or_else(|| Outcome::Fail("no output".to_owned()))?;
        match value.downcast::<Sigmas>() {
            Some(sigmas) => Ok(compare::values(&sigmas.0, &floats(recorded)?, TOLERANCE)),
            None => {
                let not = || Outcome::Fail(format!("{} is not a number", value.describe()));
                let ours = value.json().and_then(Json::as_f64).ok_or_else(not)? as f32;
                let recorded = float(recorded).ok_or_else(not)? as f32;
                Ok(compare::values(&[ours], &[recorded], TOLERANCE))
            }
        }
    });
    let outcomes = compared.collect::<Result<Vec<_>, Outcome>>()?;
    Outcome::worst(outcomes).ok_or_else(|| Outcome::Fail("no outputs".to_owned()))
}

/// Sigma tables, and lookups as pairs of argument and result.
fn table(key: &str, recorded: &Json) -> Result<Outcome, Outcome> {
    let eps = toy::sampling("sd15_eps")?;
    let lookup: fn(&ModelSampling, f64) -> f32 = match key {
        "sigmas_eps" => return Ok(compare::values(eps.sigmas(), &floats(recorded)?, TOLERANCE)),
        "sigmas_zsnr" => {
            return Ok(compare::values(toy::sampling("v_zsnr")?.sigmas(), &floats(recorded)?, TOLERANCE));
        }
        "percent_to_sigma" => |model, percent| model.percent_to_sigma(percent) as f32,
        "timestep" => |model, sigma| model.timestep(sigma as f32),
        "sigma" => |model, timestep| model.sigma(timestep as f32),
        _ => return Ok(Outcome::Skip("an unknown table".to_owned())),
    };
    let pairs = recorded.as_array().into_iter().flatten();
    let pairs: Option<Vec<_>> = pairs.map(|p| Some((float(&p[0])?, float(&p[1])? as f32))).collect();
    let pairs = pairs.ok_or_else(|| Outcome::Fail("not a list of pairs".to_owned()))?;
    let (ours, golden): (Vec<_>, Vec<_>) = pairs.into_iter().map(|(x, y)| (lookup(&eps, x), y)).unzip();
    Ok(compare::values(&ours, &golden, TOLERANCE))
}
