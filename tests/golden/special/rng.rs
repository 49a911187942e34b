//! Random numbers: initial noise, ancestral draws, Brownian increments, uniforms, integers, seeds.

use kiln::diffusion::noise::{BrownianNoise, BrownianTree, Generator, SeedSequence, prepare_noise};
use kiln::tensor::HostTensor;
use serde_json::{Value as Json, json};

use super::toy::{tensor, text, whole};
use crate::Group;
use crate::compare::{self, Measure};
use crate::report::{Outcome, Report};

/// One ulp of log, cos and sin.
const NOISE: Measure = Measure::Absolute(2e-6);
/// Sums over the levels of the tree.
const BROWNIAN: Measure = Measure::Absolute(1e-5);

pub fn run(group: &Group, report: &mut Report) {
    for entry in group.json.as_array().into_iter().flatten() {
        let name = entry["tensor"].as_str().or(entry["kind"].as_str()).unwrap_or_default();
        if report.wants(&group.name, name) {
            report.case(&group.name, name, compare(group, entry).unwrap_or_else(|outcome| outcome));
        }
    }
}

fn compare(group: &Group, entry: &Json) -> Result<Outcome, Outcome> {
    let (kind, seed) = (text(entry, "kind")?, whole(entry, "seed")?);
    if kind.starts_with("numpy.random.SeedSequence") {
        return Ok(seed_sequence(entry, seed));
    }
    let name = text(entry, "tensor")?;
    let golden = tensor(group, name)?;
    let shape: Option<Vec<usize>> = serde_json::from_value(entry["shape"].clone()).unwrap_or_default();
    let shape = shape.unwrap_or_else(|| golden.shape().to_vec());
    let mut generator = Generator::new(seed);
    let (ours, measure) = if kind.starts_with("prepare_noise") {
        let indices: Option<Vec<usize>> =
            serde_json::from_value(entry["batch_index"].clone()).unwrap_or_default();
        let noise = prepare_noise(&shape, seed, indices.as_deref());
        return Ok(compare::tensors(&noise, &golden, NOISE));
    } else if kind.starts_with("ancestral noise sampler") {
        // Stacked along the first axis: one draw each.
        let one: Vec<usize> = shape.get(1..).unwrap_or_default().to_vec();
        ((0..golden.dim(0)).flat_map(|_| generator.randn(&one).into_data()).collect(), NOISE)
    } else if kind.starts_with("brownian tree noise") {
        (brownian(entry, &shape, seed)?, BROWNIAN)
    } else if kind.starts_with("torchsde.BrownianTree") {
        (brownian_tree(entry, &golden, seed)?, BROWNIAN)
    } else {
        return torch(group, kind, name, &mut generator);
    };
    Ok(compare::values(&ours, golden.data(), measure))
}

fn brownian(entry: &Json, shape: &[usize], seed: u64) -> Result<Vec<f32>, Outcome> {
    let sigma = |key: &str| entry[key].as_f64().map(|v| v as f32);
    let (Some(low), Some(high)) = (sigma("sigma_min"), sigma("sigma_max")) else {
        return Err(Outcome::Fail("no range of sigmas".to_owned()));
    };
    let queries: Vec<(f32, f32)> =
        serde_json::from_value(entry["queries"].clone()).map_err(|e| Outcome::Fail(e.to_string()))?;
    let mut path = BrownianNoise::new(shape, low, high, seed).map_err(|e| Outcome::Fail(e.to_string()))?;
    Ok(queries.iter().flat_map(|&(from, to)| path.sample(from, to).into_data()).collect())
}

/// W(p) - W(0) on 0..1.
fn brownian_tree(entry: &Json, golden: &HostTensor, seed: u64) -> Result<Vec<f32>, Outcome> {
    let points: Vec<f32> =
        serde_json::from_value(entry["points"].clone()).map_err(|e| Outcome::Fail(e.to_string()))?;
    let size = golden.len() / points.len().max(1);
    let mut tree = BrownianTree::new(size, 0.0, 1.0, seed).map_err(|e| Outcome::Fail(e.to_string()))?;
    Ok(points.iter().flat_map(|&point| tree.increment(0.0, point)).collect())
}

/// `torch.NAME(arguments)` with a count of values, a range or a type.
fn torch(group: &Group, kind: &str, name: &str, generator: &mut Generator) -> Result<Outcome, Outcome> {
    let unknown = || Outcome::Fail(format!("unknown kind {kind}"));
    let raw = group.tensors.raw(name).ok_or_else(unknown)?;
    let (function, arguments) = kind.trim_end_matches(')').split_once('(').ok_or_else(unknown)?;
    let golden = raw.to_f32();
    let n = golden.len();
    Ok(match function {
        "torch.rand" => compare::values(generator.rand(&[n]).data(), &golden, Measure::Absolute(0.0)),
        "torch.randint" => {
            let mut bounds = arguments.split(',').map_while(|a| a.trim().parse::<i64>().ok());
            let (low, high) = bounds.next().zip(bounds.next()).ok_or_else(unknown)?;
            let ours = generator.randint(low, high, n);
            let (golden, _) = raw.bytes.as_chunks::<8>();
            let differ = ours.iter().zip(golden).filter(|(a, b)| **a != i64::from_le_bytes(**b)).count();
            compare::exact(differ, "integers that differ", String::new())
        }
        "torch.randn" if arguments.contains("float64") => {
            let (golden, _) = raw.bytes.as_chunks::<8>();
            let pairs = generator.randn_f64(n).into_iter().zip(golden);
            let error = pairs.map(|(a, b)| (a - f64::from_le_bytes(*b)).abs()).fold(0.0, f64::max);
            // The C library may round the last of 53 bits otherwise.
            Outcome::Compared { error, tolerance: 1e-14, measure: "absolute", detail: String::new() }
        }
        "torch.randn" if arguments.contains("float16") => {
            let ours: Vec<f32> = generator.randn_f16(n).into_iter().map(f32::from).collect();
            compare::values(&ours, &golden, NOISE)
        }
        "torch.randn" => compare::values(generator.randn(&[n]).data(), &golden, NOISE),
        _ => return Err(unknown()),
    })
}

fn seed_sequence(entry: &Json, seed: u64) -> Outcome {
    let ours = json!(SeedSequence::new(seed, &[], 4).generate(4));
    let children = (0..2).map(|key| SeedSequence::new(seed, &[key], 4).generate(2));
    let children = json!(children.collect::<Vec<_>>());
    let differ = usize::from(ours != entry["generate_state_4"]) + usize::from(children != entry["spawn2"]);
    compare::exact(differ, "states that differ", String::new())
}
