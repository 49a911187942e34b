//! Workflows with adapters on the demo model: they run, they change the picture, and bad input harms one prompt only.
//!
//! On the CPU; with `KILN_TEST_DEVICE=cuda` on the GPU of this machine.

mod control_forms;
mod files;
mod lora;
mod lora_forms;
mod pipelines;
mod pytorch;
mod saved;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use files::{control_files, pipeline_files};
use kiln::backend::{self, Device, DeviceOptions};
use kiln::engine::{Engine, EngineConfig, Submission};
use kiln::files::{FolderOptions, Folders};
use kiln::models::ModelStore;
use kiln::nodes::{self, PreviewMethod, Services};
use kiln::weights::OpenOptions;
use serde_json::{Value as Json, json};

struct Bench {
    engine: Arc<Engine>,
    folder: tempfile::TempDir,
}

/// Device that `KILN_TEST_DEVICE` names.
fn device() -> Device {
    match std::env::var("KILN_TEST_DEVICE").as_deref() {
        Err(_) | Ok("cpu") => Device::Cpu,
        Ok("cuda") => Device::Cuda,
        Ok(other) => panic!("KILN_TEST_DEVICE is '{other}': cpu or cuda"),
    }
}

impl Bench {
    fn new() -> Self {
        Self::on(device())
    }

    fn on(device: Device) -> Self {
        let folder = tempfile::tempdir().unwrap();
        files::write_all(&folder.path().join("models"));
        let options = FolderOptions { base: folder.path().to_owned(), ..FolderOptions::default() };
        let device = DeviceOptions { device, ..DeviceOptions::default() };
        let services = Services {
            folders: Arc::new(Folders::open(&options).unwrap()),
            models: Arc::new(ModelStore::new(backend::open(device).unwrap(), OpenOptions::default())),
            save_metadata: false,
            png_level: 1,
            preview: PreviewMethod::None,
        };
        let engine = Engine::new(EngineConfig::new(services, nodes::registry()));
        Self { engine, folder }
    }

    fn run(&self, prompt: Json) -> Json {
        let submission = Submission { prompt, ..Submission::default() };
        let accepted = match self.engine.submit(submission) {
            Ok(accepted) => accepted,
            Err(refused) => panic!("refused: {} {}", refused.error, refused.node_errors),
        };
        let until = Instant::now() + Duration::from_secs(300);
        loop {
            let history = self.engine.history_one(&accepted.prompt_id);
            if let Some(entry) = history.get(&accepted.prompt_id) {
                return entry.clone();
            }
            assert!(Instant::now() < until, "the prompt does not end");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn picture(&self, prompt: Json) -> image::RgbImage {
        picture(&self.run(prompt), self.folder.path())
    }

    /// The message of the error that ends a prompt.
    fn error(&self, prompt: Json) -> String {
        let entry = self.run(prompt);
        assert_eq!(entry["status"]["status_str"], "error", "{}", entry["status"]);
        let messages = entry["status"]["messages"].as_array().unwrap();
        let error = messages.iter().find(|m| m[0] == "execution_error").unwrap();
        error[1]["exception_message"].as_str().unwrap().to_owned()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.engine.shutdown();
    }
}

fn picture(entry: &Json, folder: &Path) -> image::RgbImage {
    assert_eq!(entry["status"]["status_str"], "success", "{}", entry["status"]);
    let name = entry["outputs"]["9"]["images"][0]["filename"].as_str().unwrap();
    image::open(folder.join("output").join(name)).unwrap().to_rgb8()
}

/// Mean difference of 8-bit values.
fn distance(a: &image::RgbImage, b: &image::RgbImage) -> f64 {
    assert_eq!(a.dimensions(), b.dimensions());
    let sum: f64 = a.as_raw().iter().zip(b.as_raw()).map(|(a, b)| f64::from(a.abs_diff(*b))).sum();
    sum / a.as_raw().len() as f64
}

fn with(mut prompt: Json, node: &str, input: &str, value: Json) -> Json {
    prompt[node]["inputs"][input] = value;
    prompt
}

#[test]
fn the_zoo_runs_and_adapters_change_the_picture() {
    let bench = Bench::new();
    let plain = bench.picture(files::workflow("txt2img"));
    let lora = bench.picture(files::workflow("lora-stack"));
    let control = bench.picture(files::workflow("controlnet-stack"));
    println!("LoRA {:.2}, ControlNet {:.2}", distance(&plain, &lora), distance(&plain, &control));
    assert!(distance(&plain, &lora) > 1.0 && distance(&plain, &control) > 1.0);

    // At strength 0 nothing changes, bit for bit.
    let mut none = files::workflow("lora-stack");
    for (node, inputs) in
        [("10", ["strength_model", "strength_clip"]), ("11", ["strength_model", "strength_clip"])]
    {
        for input in inputs {
            none[node]["inputs"][input] = json!(0.0);
        }
    }
    none["12"]["inputs"]["strength_model"] = json!(0.0);
    assert_eq!(bench.picture(none), plain);
    let none = with(files::workflow("controlnet-stack"), "22", "strength", json!(0.0));
    assert_eq!(bench.picture(with(none, "23", "strength", json!(0.0))), plain);
    // Outside its range a net does nothing.
    let late = with(files::workflow("controlnet-stack"), "22", "end_percent", json!(0.0));
    assert_eq!(bench.picture(with(late, "23", "start_percent", json!(1.0))), plain);

    assert_eq!(bench.picture(files::workflow("upscale-chain")).dimensions(), (128, 128));
    let compact =
        with(files::workflow("upscale-chain"), "30", "model_name", json!("tiny-compact.safetensors"));
    assert_eq!(bench.picture(compact).dimensions(), (64, 64));
    assert_eq!(bench.picture(files::workflow("hires-fix")).dimensions(), (96, 96));
    assert_eq!(bench.picture(files::workflow("tiny-vae")).dimensions(), (64, 64));
    assert_eq!(bench.picture(files::workflow("txt2img")), plain, "patches left the model as it was");
}

/// Every adapter gives the CPU's picture on a GPU, but for the rounding of f16.
#[test]
fn a_gpu_gives_the_same_pictures() {
    if device() == Device::Cpu {
        println!("skipped: KILN_TEST_DEVICE names no GPU");
        return;
    }
    let (gpu, cpu) = (Bench::new(), Bench::on(Device::Cpu));
    for name in ["txt2img", "lora-stack", "controlnet-stack", "upscale-chain", "hires-fix", "tiny-vae"] {
        let apart = distance(&gpu.picture(files::workflow(name)), &cpu.picture(files::workflow(name)));
        println!("{name}: {apart:.3} of 255 apart on average");
        assert!(apart < 2.0, "{name}: {apart:.3}");
    }
}

#[test]
fn files_for_another_family_end_one_prompt_with_a_clear_error() {
    let bench = Bench::new();
    let plain = bench.picture(files::workflow("txt2img"));
    let lora = with(files::workflow("lora-stack"), "10", "lora_name", json!("foreign-lora.safetensors"));
    let error = bench.error(lora);
    assert!(error.contains("foreign-lora.safetensors") && error.contains("another family"), "{error}");
    let net = json!("foreign-controlnet.safetensors");
    let error = bench.error(with(files::workflow("controlnet-stack"), "21", "control_net_name", net));
    assert!(error.contains("ControlNet") && error.contains("family"), "{error}");
    assert_eq!(bench.picture(files::workflow("txt2img")), plain, "the next prompt works");
}

#[test]
fn files_in_the_wrong_folder_are_named() {
    let bench = Bench::new();
    let models = bench.folder.path().join("models");
    std::fs::copy(models.join("loras/tiny-lora.safetensors"), models.join("controlnet/lora.safetensors"))
        .unwrap();
    std::fs::copy(models.join("loras/tiny-lora.safetensors"), models.join("upscale_models/lora.safetensors"))
        .unwrap();
    let net = json!("lora.safetensors");
    let error = bench.error(with(files::workflow("controlnet-stack"), "21", "control_net_name", net.clone()));
    assert!(error.contains("is a LoRA") && error.contains("LoraLoader"), "{error}");
    let error = bench.error(with(files::workflow("upscale-chain"), "30", "model_name", net));
    assert!(error.contains("is a LoRA"), "{error}");
}

#[test]
fn odd_pictures_are_taken() {
    let bench = Bench::new();
    // A hint of one pixel, and one of another shape and batch.
    for (width, height, batch) in [(1, 1, 1), (37, 150, 3)] {
        let mut prompt = files::workflow("controlnet-stack");
        prompt["20"]["inputs"] = json!({"width": width, "height": height, "batch_size": batch, "color": 255});
        assert_eq!(bench.picture(prompt).dimensions(), (64, 64));
    }
    // One pixel enlarged, and tiles that overlap.
    let mut prompt = files::workflow("upscale-chain");
    prompt["31"]["inputs"]["image"] = json!(["60", 0]);
    for (side, expected) in [(1, 2), (530, 1060)] {
        prompt["60"] = json!({"class_type": "EmptyImage",
            "inputs": {"width": side, "height": 1, "batch_size": 1, "color": 8421504}});
        assert_eq!(bench.picture(prompt.clone()).dimensions(), (expected, 2));
    }
}
