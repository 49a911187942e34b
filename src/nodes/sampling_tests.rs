//! Sampler nodes against ComfyUI's results with a closed-form denoiser (tolerance as in
//! `diffusion::golden`: `max|a − b| / std` below 1e-4).

use std::sync::Arc;

use serde_json::{Value as Json, json};

use super::*;
use crate::diffusion::golden::{Group, Toy, distance, entry, report};
use crate::diffusion::samplers::SAMPLERS;
use crate::diffusion::{Conditioning, Latent, ModelHandle};
use crate::tensor::HostTensor;

/// Counts progress calls; may ask to stop after some.
#[derive(Default)]
struct Sink {
    calls: std::sync::atomic::AtomicU64,
    stop_after: Option<u64>,
}

impl ProgressSink for Sink {
    fn progress(&self, _: &str, value: u64, max: u64, preview: Option<PreviewFrame>) {
        assert!(value >= 1 && max >= 1 && preview.is_none());
        self.calls.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    }
    fn picture(&self, _: &str, _: &HostTensor) {}
    fn is_interrupted(&self) -> bool {
        let calls = self.calls.load(std::sync::atomic::Ordering::Relaxed);
        self.stop_after.is_some_and(|n| calls >= n)
    }
}

fn services() -> Services {
    Services {
        folders: Arc::default(),
        models: super::file_tests::no_models(),
        save_metadata: true,
        png_level: 1,
        preview: PreviewMethod::None,
    }
}

/// Runs nodes by class.
struct Bench {
    nodes: Vec<Box<dyn Node>>,
    services: Services,
    sink: Sink,
}

impl Bench {
    fn new(sink: Sink) -> Self {
        Self { nodes: registry(), services: services(), sink }
    }

    fn run(&self, class: &str, inputs: &[(&str, Value)]) -> Result<Vec<Value>, NodeError> {
        let node = self.nodes.iter().find(|n| n.schema().class == class).unwrap();
        let mut given = Inputs::default();
        inputs.iter().for_each(|(name, value)| given.insert(*name, value.clone()));
        let prompt = json!({});
        let mut ctx = NodeCtx {
            services: &self.services,
            node_id: "1",
            prompt: &prompt,
            extra_pnginfo: None,
            sink: &self.sink,
        };
        node.execute(&mut ctx, &given).map(|output| output.values)
    }

    fn one(&self, class: &str, inputs: &[(&str, Value)]) -> Value {
        self.run(class, inputs).unwrap().remove(0)
    }
}

fn model(name: &str) -> Value {
    Value::object("MODEL", Toy::named(name))
}

fn cond(s: f32) -> Value {
    Value::object::<Conditioning>("CONDITIONING", vec![entry(s)])
}

fn literal(value: impl Into<Json>) -> Value {
    Value::Json(value.into())
}

fn samples(value: &Value) -> HostTensor {
    value.downcast::<Latent>().unwrap().samples.clone()
}

/// One case of `sampler_nodes_toy`: both outputs of SamplerCustom.
fn sampler_node_case(bench: &Bench, case: &Json, group: &Group) -> Vec<Value> {
    let model = model(case["model"].as_str().unwrap());
    let mut settings: Vec<(&str, Value)> = vec![("model", model.clone())];
    let given = case["inputs"].as_object().unwrap();
    settings.extend(given.iter().map(|(name, value)| (name.as_str(), literal(value.clone()))));
    let sampler = bench.one(case["node"].as_str().unwrap(), &settings);
    let schedule = [
        ("model", model.clone()),
        ("scheduler", literal(case["scheduler"][0].clone())),
        ("steps", literal(case["scheduler"][1].clone())),
        ("denoise", literal(1.0)),
    ];
    let sigmas = bench.one("BasicScheduler", &schedule);
    let inputs = [
        ("model", model),
        ("add_noise", literal(case["add_noise"].clone())),
        ("noise_seed", literal(case["seed"].clone())),
        ("cfg", literal(case["cfg"].clone())),
        ("positive", cond(1.0)),
        ("negative", cond(-1.0)),
        ("sampler", sampler),
        ("sigmas", sigmas),
        ("latent_image", Value::object("LATENT", Latent::new(group.tensor("latent_in").clone()))),
    ];
    bench.run("SamplerCustom", &inputs).unwrap()
}

#[test]
fn every_sampler_node() {
    let group = Group::load("sampler_nodes_toy");
    let bench = Bench::new(Sink::default());
    let mut results = Vec::new();
    for (name, case) in &group.cases {
        let out = sampler_node_case(&bench, case, &group);
        // Without noise the start is far outside what the denoiser maps smoothly.
        let tolerance = if name == "select_nonoise" { 5e-4 } else { 1e-4 };
        for (value, slot) in out.iter().zip(["output", "denoised_output"]) {
            let label = format!("{name}.{slot}");
            results.push((label.clone(), distance(&samples(value), group.tensor(&label)), tolerance));
        }
    }
    assert_eq!(results.len(), 42);
    report("sampler_nodes_toy", &results);
}

fn ksampler_inputs(sampler: &str) -> Vec<(&str, Value)> {
    vec![
        ("model", model("eps")),
        ("seed", literal(1234)),
        ("steps", literal(5)),
        ("cfg", literal(3.0)),
        ("sampler_name", literal(sampler)),
        ("scheduler", literal("normal")),
        ("positive", cond(1.0)),
        ("negative", cond(-1.0)),
        ("latent_image", Value::object("LATENT", Latent::new(HostTensor::zeros(&[2, 4, 6, 5])))),
        ("denoise", literal(1.0)),
    ]
}

#[test]
fn ksampler_gives_the_recorded_latent() {
    let group = Group::load("samplers_toy");
    let bench = Bench::new(Sink::default());
    let results: Vec<_> = SAMPLERS
        .iter()
        .map(|name| {
            let label = format!("{name}.normal5");
            let out = bench.one("KSampler", &ksampler_inputs(name));
            let distance = distance(&samples(&out), group.tensor(&label));
            (label, distance, 1e-4)
        })
        .collect();
    report("KSampler", &results);
}

#[test]
fn two_advanced_ksamplers_make_one_run() {
    let bench = Bench::new(Sink::default());
    let whole = samples(&bench.one("KSampler", &ksampler_inputs("dpmpp_2m_cfg_pp")));
    let half = |latent: Value, start: u64, end: u64, adds: &str, leaves: &str| {
        let mut inputs = ksampler_inputs("euler");
        inputs.retain(|(name, _)| !matches!(*name, "seed" | "latent_image" | "denoise"));
        inputs.extend([
            ("noise_seed", literal(1234)),
            ("latent_image", latent),
            ("start_at_step", literal(start)),
            ("end_at_step", literal(end)),
            ("add_noise", literal(adds)),
            ("return_with_leftover_noise", literal(leaves)),
        ]);
        bench.one("KSamplerAdvanced", &inputs)
    };
    let empty = Value::object("LATENT", Latent::new(HostTensor::zeros(&[2, 4, 6, 5])));
    let first = half(empty, 0, 3, "enable", "enable");
    let both = samples(&half(first, 3, 10_000, "disable", "disable"));
    let once = samples(&bench.one("KSampler", &ksampler_inputs("euler")));
    // Scaling to a link and back rounds once.
    assert!(distance(&both, &once) < 1e-5);
    assert!(distance(&whole, &once) > 1e-2, "different samplers differ");
}

#[test]
fn interruption_ends_the_run_at_once() {
    let bench = Bench::new(Sink { stop_after: Some(2), ..Sink::default() });
    let error = bench.run("KSampler", &ksampler_inputs("euler")).unwrap_err();
    assert!(matches!(error, NodeError::Interrupted), "{error}");
    assert_eq!(bench.sink.calls.load(std::sync::atomic::Ordering::Relaxed), 2);
}

#[test]
fn advanced_chain_of_objects_equals_ksampler() {
    let bench = Bench::new(Sink::default());
    let guider =
        [("model", model("eps")), ("positive", cond(1.0)), ("negative", cond(-1.0)), ("cfg", literal(3.0))];
    let schedule = [
        ("model", model("eps")),
        ("scheduler", literal("normal")),
        ("steps", literal(5)),
        ("denoise", literal(1.0)),
    ];
    let inputs = [
        ("noise", bench.one("RandomNoise", &[("noise_seed", literal(1234))])),
        ("guider", bench.one("CFGGuider", &guider)),
        ("sampler", bench.one("KSamplerSelect", &[("sampler_name", literal("euler_ancestral"))])),
        ("sigmas", bench.one("BasicScheduler", &schedule)),
        ("latent_image", Value::object("LATENT", Latent::new(HostTensor::zeros(&[2, 4, 6, 5])))),
    ];
    let out = bench.run("SamplerCustomAdvanced", &inputs).unwrap();
    let direct = samples(&bench.one("KSampler", &ksampler_inputs("euler_ancestral")));
    assert_eq!(samples(&out[0]), direct);
}

#[test]
fn wrong_shapes_are_errors_not_panics() {
    let bench = Bench::new(Sink::default());
    let flat = Value::object("LATENT", Latent::new(HostTensor::zeros(&[3, 5])));
    let mut inputs = ksampler_inputs("euler");
    inputs.retain(|(name, _)| *name != "latent_image");
    inputs.push(("latent_image", flat));
    assert!(bench.run("KSampler", &inputs).is_err());

    let wide = Value::object::<Conditioning>(
        "CONDITIONING",
        vec![crate::diffusion::CondEntry::new(Arc::new(HostTensor::zeros(&[1, 2, 3])))],
    );
    let pair = [("conditioning_to", cond(1.0)), ("conditioning_from", wide)];
    assert!(bench.run("ConditioningConcat", &pair).is_err());
    let _: Arc<ModelHandle> = model("eps").downcast().unwrap();
}
