//! An engine with folders of its own and a tiny SD1 model, and prompts that fail in it.

#![allow(dead_code, reason = "every test uses its part of this")]

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kiln::backend::{self, Device, DeviceOptions};
use kiln::engine::{Engine, EngineConfig, Submission};
use kiln::files::{FolderOptions, Folders};
use kiln::models::{ModelStore, tiny};
use kiln::nodes::{self, PreviewMethod, Services};
use kiln::tensor::DType;
use kiln::weights::OpenOptions;
use serde_json::{Value as Json, json};

/// A server's engine with folders of its own.
pub struct Bench {
    pub base: tempfile::TempDir,
    engine: Arc<Engine>,
}

impl Bench {
    pub fn new() -> Self {
        Self::with_limit(None)
    }

    /// An engine whose device has so many bytes for activations.
    pub fn with_limit(memory_limit: Option<usize>) -> Self {
        let base = tempfile::tempdir().unwrap();
        for folder in [
            "checkpoints",
            "controlnet",
            "diffusion_models",
            "loras",
            "text_encoders",
            "upscale_models",
            "vae",
        ] {
            std::fs::create_dir_all(base.path().join("models").join(folder)).unwrap();
        }
        let options =
            DeviceOptions { device: Device::Cpu, threads: Some(1), memory_limit, ..DeviceOptions::default() };
        let placement = backend::open(options).unwrap();
        let options = FolderOptions { base: base.path().to_owned(), ..FolderOptions::default() };
        let services = Services {
            folders: Arc::new(Folders::open(&options).unwrap()),
            models: Arc::new(ModelStore::new(placement, OpenOptions::default())),
            save_metadata: false,
            png_level: 1,
            preview: PreviewMethod::None,
        };
        let engine = Engine::new(EngineConfig::new(services, nodes::registry()));
        let bench = Self { base, engine };
        bench.write("sd1", "checkpoints/good.safetensors");
        bench
    }

    pub fn path(&self, file: &str) -> std::path::PathBuf {
        self.base.path().join("models").join(file)
    }

    pub fn write(&self, family: &str, file: &str) {
        tiny::write(family, &self.path(file), DType::F16).unwrap().unwrap();
    }

    /// A file with one tensor of that name.
    pub fn write_named(&self, tensor: &str, file: &str) {
        let header = format!(r#"{{"{tensor}":{{"dtype":"F16","shape":[1],"data_offsets":[0,2]}}}}"#);
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.bytes().chain([0, 0]));
        std::fs::write(self.path(file), bytes).unwrap();
    }

    /// The message of a prompt's error, or that it ran.
    pub fn run(&self, prompt: Json) -> Result<(), String> {
        let entry = self.entry(prompt)?;
        match error_of(&entry) {
            Some(error) => Err(error["exception_message"].as_str().unwrap_or_default().to_owned()),
            None => Ok(()),
        }
    }

    /// The history entry of a prompt; the refusal if it isn't accepted.
    pub fn entry(&self, prompt: Json) -> Result<Json, String> {
        let accepted = self
            .engine
            .submit(Submission { prompt, ..Submission::default() })
            .map_err(|refused| format!("{} {}", refused.error, refused.node_errors))?;
        loop {
            if let Some(entry) = self.engine.history_one(&accepted.prompt_id).get(&accepted.prompt_id) {
                return Ok(entry.clone());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// The first picture that a prompt saves.
    pub fn picture(&self, prompt: Json) -> image::RgbImage {
        let entry = self.entry(prompt).expect("a prompt that is accepted");
        assert!(error_of(&entry).is_none(), "{}", entry["status"]);
        let outputs = entry["outputs"].as_object().into_iter().flatten();
        let mut images = outputs.flat_map(|(_, o)| o["images"].as_array().into_iter().flatten());
        let name = images.find_map(|i| i["filename"].as_str()).expect("a saved picture");
        image::open(self.base.path().join("output").join(name)).unwrap().into_rgb8()
    }

    /// The prompt fails with a message that has all of `parts`, and the next one works.
    pub fn fails(&self, prompt: Json, parts: &[&str]) {
        let message = self.run(prompt).expect_err("an error");
        for part in parts {
            assert!(message.contains(part), "no {part:?} in: {message}");
        }
        self.run(txt2img("good.safetensors")).expect("the next prompt works");
    }
}

/// What a history entry says of the error that ended the prompt.
pub fn error_of(entry: &Json) -> Option<&Json> {
    let mut messages = entry["status"]["messages"].as_array()?.iter().map(|m| &m[1]);
    messages.find(|m| m.get("exception_message").is_some())
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.engine.shutdown();
    }
}

pub fn txt2img(checkpoint: &str) -> Json {
    json!({
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": checkpoint}},
        "2": {"class_type": "EmptyLatentImage", "inputs": {"width": 32, "height": 32, "batch_size": 1}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "a", "clip": ["1", 1]}},
        "4": {"class_type": "KSampler", "inputs": {"model": ["1", 0], "positive": ["3", 0], "negative": ["3", 0],
            "latent_image": ["2", 0], "seed": 1, "steps": 1, "cfg": 2.0, "sampler_name": "euler",
            "scheduler": "normal", "denoise": 1.0}},
        "5": {"class_type": "VAEDecode", "inputs": {"samples": ["4", 0], "vae": ["1", 2]}},
        "6": {"class_type": "SaveImage", "inputs": {"images": ["5", 0], "filename_prefix": "x"}},
    })
}

/// Sets every element of one f16 tensor of a file to NaN.
pub fn spoil(path: &Path, tensor: &str) {
    fill(path, tensor, 0x7e00);
}

/// Sets every element of one f16 tensor of a file to the bits of an f16.
pub fn fill(path: &Path, tensor: &str, bits: u16) {
    let mut bytes = std::fs::read(path).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let json: Json = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    assert!(
        json.get(tensor).is_some(),
        "no {tensor}, but {:?}",
        json.as_object().map(|j| j.keys().take(9).collect::<Vec<_>>())
    );
    let offset = |i: usize| json[tensor]["data_offsets"][i].as_u64().unwrap() as usize + 8 + header;
    for half in bytes[offset(0)..offset(1)].chunks_exact_mut(2) {
        half.copy_from_slice(&bits.to_le_bytes());
    }
    std::fs::write(path, bytes).unwrap();
}
