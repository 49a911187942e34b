//! `--trace`: names, shapes and times of every launch.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value as Json, json};

use crate::{empty, has_simt, kiln, run, text};

/// What the shape of a kernel must begin with: one of an earlier launch would be told by that.
const SHAPES: &[(&str, &[&str])] = &[
    ("activate", &["activate"]),
    ("attention", &["attention"]),
    ("axpby", &["axpby"]),
    ("band", &["scale_bands"]),
    ("blend", &["blend"]),
    ("blur", &["blur"]),
    ("bislerp", &["bislerp"]),
    ("combine", &["combine"]),
    ("ceiling", &["ceiling"]),
    ("concat", &["concat"]),
    ("conv", &["conv", "convert"]),
    ("embed", &["embed"]),
    ("gemm", &["linear"]),
    ("groupnorm", &["group_norm"]),
    ("guide", &["guide"]),
    ("layernorm", &["layer_norm"]),
    ("lincomb", &["lincomb"]),
    ("mean_by_place", &["mean_by_place"]),
    ("merge", &["merge"]),
    ("pack", &["pack"]),
    ("philox", &["philox"]),
    ("preview", &["preview"]),
    ("reduce", &["reduce"]),
    ("resize", &["resize"]),
    ("split_k", &["linear", "conv"]),
    ("swap", &["swap"]),
    ("timestep", &["timestep_embedding"]),
    ("window", &["window"]),
];

/// The launches of a trace file, after what all of them must have.
fn launches(path: &Path) -> Vec<Json> {
    let file = std::fs::read_to_string(path).expect("a trace");
    let all: Vec<Json> = serde_json::from_str(&file).expect("JSON");
    assert_eq!(all[0]["ph"], "M", "the device comes first");
    assert!(all[0]["args"]["name"].as_str().is_some_and(|name| name.starts_with("SIMT layer")), "{}", all[0]);
    let events = all[1..].to_vec();
    let mut end = 0.0;
    for event in &events {
        let number = |name: &str| event[name].as_f64().unwrap_or(f64::NAN);
        let (kernel, shape) = (event["name"].as_str().unwrap(), event["args"]["shape"].as_str().unwrap());
        assert_eq!(event["ph"], "X", "{event}");
        assert!(shape.contains(|c: char| c.is_ascii_digit()), "no shape in {event}");
        if let Some((_, known)) = SHAPES.iter().find(|(prefix, _)| kernel.starts_with(prefix)) {
            assert!(known.iter().any(|word| shape.starts_with(word)), "the shape of another launch: {event}");
        }
        assert!(number("dur") > 0.0 && number("dur") < 60e6, "{event}");
        assert!(number("ts") >= end - 0.01, "launches are in order and do not overlap: {event} after {end}");
        end = number("ts") + number("dur");
        assert!(event["args"]["grid"].as_array().is_some_and(|grid| grid.len() == 3), "{event}");
    }
    events
}

fn shapes<'a>(events: &'a [Json], kernel: &str) -> Vec<&'a str> {
    let of_kernel = events.iter().filter(|e| e["name"].as_str().is_some_and(|name| name.starts_with(kernel)));
    of_kernel.map(|e| e["args"]["shape"].as_str().unwrap()).collect()
}

#[test]
fn every_launch_of_a_check_has_its_shape_and_time() {
    if !has_simt() {
        return;
    }
    let file = empty("trace-check").join("trace.json");
    let said = run(&["check", "--device", "simt", "--quick", "--trace", text(&file)]);
    assert_eq!(said.code, Some(0), "{}{}", said.out, said.err);
    let events = launches(&file);
    let (sum, _) = said.out.trim_end().rsplit('\n').next().unwrap().split_once(" cases, 0 failed").unwrap();
    let cases: usize = sum.parse().unwrap();
    assert!(cases > 200 && events.len() >= cases, "{} launches of {cases} cases", events.len());
    for (known, _) in SHAPES.iter().filter(|(known, _)| *known != "ceiling") {
        assert!(!shapes(&events, known).is_empty(), "no launch of {known}: has it another name now?");
    }
    assert!(shapes(&events, "gemm").contains(&"linear 3x5x7"), "{:?}", shapes(&events, "gemm"));
}

/// A launcher that names no shape would leave that of the launch before it in the trace.
#[test]
fn every_launcher_names_its_shape() {
    let launchers = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/backend/cuda/launch");
    let mut count = 0;
    for file in std::fs::read_dir(launchers).unwrap().flatten() {
        let source = std::fs::read_to_string(file.path()).unwrap();
        // What is queued by the caller of the file is named there.
        for function in source.split("\npub fn ").skip(1).filter(|text| text.contains("gpu: &Gpu")) {
            let body = function.split("\n}\n").next().unwrap_or_default();
            if body.contains("gpu.launch(") {
                count += 1;
                let name = function.split('(').next().unwrap_or_default();
                assert!(body.contains("gpu.label("), "{}: {name} names no shape", file.path().display());
            }
        }
    }
    assert!(count >= 30, "only {count} launchers were found");
}

#[test]
fn a_benchmark_traces_each_layer_once_more_without_its_graphs() {
    if !has_simt() {
        return;
    }
    let folder = empty("trace-bench");
    let (table, file) = (folder.join("layers.csv"), folder.join("trace.json"));
    let rows = "stage,op,dims,M,N,K,count_per_forward,GFLOP_each,min_MB_each
unet,gemm,,24,16,40,1,0.00003,0.004
unet,layer_norm,\"(2, 7, 64)\",,,,2,0,0.004
";
    std::fs::write(&table, rows).unwrap();
    let args = ["bench", "kernels", "--device", "simt", "--layers", text(&table), "--trace", text(&file)];
    let said = run(&args);
    assert_eq!(said.code, Some(0), "{}{}", said.out, said.err);
    let events = launches(&file);
    assert_eq!(events.len(), 2, "one launch of each layer: {events:?}");
    assert_eq!(shapes(&events, "gemm"), ["linear 24x16x40"]);
    assert_eq!(shapes(&events, "layernorm"), ["layer_norm 14x64"]);
}

#[test]
fn a_workflow_is_traced_kernel_by_kernel() {
    if !has_simt() {
        return;
    }
    let folder = empty("trace-run");
    let (workflow, file) = (folder.join("workflow.json"), folder.join("trace.json"));
    let prompt = json!({
        "3": {"class_type": "KSampler", "inputs": {"seed": 1, "steps": 3, "cfg": 5.0, "sampler_name": "euler",
            "scheduler": "normal", "denoise": 1.0, "model": ["4", 0], "positive": ["6", 0], "negative": ["6", 0],
            "latent_image": ["5", 0]}},
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "demo-sd.safetensors"}},
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 32, "height": 32, "batch_size": 1}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a red circle", "clip": ["4", 1]}},
        "8": {"class_type": "SaveLatent", "inputs": {"samples": ["3", 0], "filename_prefix": "x"}},
    });
    std::fs::write(&workflow, prompt.to_string()).unwrap();
    let out = folder.join("out");
    let args = ["run", text(&workflow), "--device", "simt", "--out", text(&out), "--trace", text(&file)];
    let said = run(&args);
    assert_eq!(said.code, Some(0), "{}{}", said.out, said.err);
    let events = launches(&file);
    // Three steps run the same kernels on the same shapes: none of them hides in a graph.
    let convs = shapes(&events, "conv_sm80");
    let first =
        convs.iter().find(|shape| shape.contains("2x4x4x4 ->")).expect("the UNet's first convolution");
    assert_eq!(convs.iter().filter(|shape| *shape == first).count(), 3, "{convs:?}");
    for kernel in ["embed", "attention", "groupnorm", "layernorm", "gemm", "timestep"] {
        assert!(!shapes(&events, kernel).is_empty(), "no {kernel}");
    }
}

#[test]
fn a_server_is_traced_until_it_ends() {
    if !has_simt() {
        return;
    }
    let folder = empty("trace-serve");
    let file = folder.join("trace.json");
    let args = ["serve", "--device", "simt", "--port", "0", "--base-directory", text(&folder)];
    let mut command = kiln(&[&args[..], &["--trace", text(&file)]].concat());
    let mut child =
        command.env("KILN_LOG", "info,kiln::cli::setup=debug").stderr(Stdio::piped()).spawn().unwrap();
    let mut log = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
    // The trial prompt has run by then.
    let is_up = log.any(|line| line.contains("listening on"));
    let ended = Command::new("kill").arg(child.id().to_string()).status().unwrap();
    let code = child.wait().unwrap().code();
    assert!(is_up && ended.success(), "{:?}", log.collect::<Vec<_>>());
    assert_eq!(code, Some(0));
    let events = launches(&file);
    assert!(shapes(&events, "attention").iter().any(|shape| shape.contains("queries")), "{events:?}");
}

/// The table and the trace of a model come from different runs: the trace does not slow down what is measured.
#[test]
fn the_benchmark_of_a_model_writes_json_and_a_trace() {
    if !has_simt() {
        return;
    }
    let folder = empty("trace-model");
    let (model, file) = (folder.join("tiny.safetensors"), folder.join("trace.json"));
    let said = run(&["synth", "--tiny", "sd1", text(&model)]);
    assert_eq!(said.code, Some(0), "{}", said.err);
    let args =
        ["bench", "model", "--checkpoint", text(&model), "--size", "32", "--no-vae", "--json", "--launches"];
    let said = run(&[&args[..], &["--device", "simt", "--trace", text(&file)]].concat());
    assert_eq!(said.code, Some(0), "{}{}", said.out, said.err);
    let body: Json = serde_json::from_str(&said.out).expect("JSON");
    let stages = body["stages"].as_array().unwrap();
    let names: Vec<_> = stages.iter().map(|stage| stage["stage"].as_str().unwrap()).collect();
    assert_eq!(names, ["text, one prompt", "cfg step 32", "sampling 32"]);
    let events = launches(&file);
    let (stages, sampling) = stages.split_at(2);
    // Twenty steps, and the host waits for the latent and for the last prediction.
    assert_eq!((&sampling[0]["steps"], &sampling[0]["syncs"]), (&Json::from(20), &Json::from(2)));
    assert!(sampling[0]["ms_per_step"].as_f64() > Some(0.0), "{sampling:?}");
    for stage in stages {
        assert!(
            stage["ms"].as_f64().is_some_and(|ms| ms > 0.0) && stage["flops"].as_f64() > Some(0.0),
            "{stage}"
        );
        let kernels = stage["kernels"].as_array().unwrap();
        assert!(kernels.len() > 5, "{stage}");
        for kernel in kernels {
            let same = |e: &&Json| e["name"] == kernel["kernel"] && e["args"]["shape"] == kernel["shape"];
            assert!(
                events.iter().filter(same).count() as u64 >= kernel["count"].as_u64().unwrap(),
                "{kernel}"
            );
        }
    }
    let said = run(&[&args[..8], &["--cpu", "--threads", "1"]].concat());
    assert_eq!(said.code, Some(0), "{}{}", said.out, said.err);
    let body: Json = serde_json::from_str(&said.out).expect("JSON");
    assert_eq!(body["stages"].as_array().map(Vec::len), Some(2), "{body}");
    assert!(body["stages"][1]["cpu_s"].as_f64().is_some_and(|s| s > 0.0), "{body}");
}

#[test]
fn a_trace_that_cannot_be_is_refused_before_any_work() {
    let folder = empty("trace-refused");
    let missing = folder.join("no/such/folder/trace.json");
    let said = run(&["check", "--device", "simt", "--quick", "--trace", text(&missing)]);
    assert_eq!((said.code, said.out.as_str()), (Some(1), ""), "{}", said.err);
    assert!(said.err.contains("trace.json can't be written: No such file"), "{}", said.err);
    let file = folder.join("trace.json");
    for args in [
        &["serve", "--cpu", "--port", "0", "--trace", text(&file)][..],
        &["bench", "model", "--cpu", "--arch", "nothing", "--trace", text(&file)],
    ] {
        let said = run(args);
        assert_eq!(said.code, Some(1), "{}{}", said.out, said.err);
    }
}
