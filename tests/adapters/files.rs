//! Tiny adapters for the demo model, made of its own layers: every name and shape is the model's.

use std::path::Path;

use kiln::backend::{self, Device, DeviceOptions};
use kiln::files::{DEMO_BYTES, DEMO_CHECKPOINT};
use kiln::models::lora::Target;
use kiln::models::{ModelFile, ModelSource, ModelStore};
use kiln::tensor::DType;
use kiln::weights::synth::{self, Manifest};
use kiln::weights::{OpenOptions, WeightsFile};
use serde_json::{Map, Value as Json, json};

#[path = "control_files.rs"]
pub mod control_files;
#[path = "pipeline_files.rs"]
pub mod pipeline_files;

/// The demo checkpoint on a CPU backend.
pub fn demo() -> std::sync::Arc<ModelFile> {
    let options = DeviceOptions { device: Device::Cpu, ..DeviceOptions::default() };
    let store = ModelStore::new(backend::open(options).unwrap(), OpenOptions::default());
    store.file(ModelSource::Embedded { name: DEMO_CHECKPOINT, bytes: DEMO_BYTES })
}

pub fn write(path: &Path, tensors: Map<String, Json>, metadata: &[(&str, &str)]) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let manifest = Manifest::from_json(&Json::Object(tensors).to_string()).unwrap();
    let metadata: Vec<_> = metadata.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
    synth::write(&manifest, path, DType::F16, &metadata, |_, _| {}).unwrap();
}

/// Rows and columns of the matrices in the demo checkpoint by patch name.
fn matrices() -> Vec<(Target, [u64; 2])> {
    let file = demo();
    let stored = WeightsFile::from_static(DEMO_BYTES, DEMO_CHECKPOINT).unwrap();
    let shape = |name: &str| {
        let inside = ["model.diffusion_model.", "cond_stage_model.transformer.text_model."];
        let name =
            name.trim_start_matches("diffusion_model.").trim_start_matches("clip_l.transformer.text_model.");
        let info = inside.iter().find_map(|prefix| stored.info(&format!("{prefix}{name}")))?;
        let &[rows, columns] = info.shape else { return None };
        Some([rows as u64, columns as u64])
    };
    let mut targets = file.unet_targets().unwrap();
    for variant in file.clip_variants().unwrap() {
        targets.extend(file.clip_targets(variant, false).unwrap());
    }
    targets.into_iter().filter_map(|target| Some((target.clone(), shape(&target.name)?))).collect()
}

/// A kohya LoRA of rank 4 for every matrix.
pub fn lora(path: &Path) {
    let mut tensors = Map::new();
    for (target, [rows, columns]) in matrices() {
        let layer = target.aliases.iter().find(|alias| alias.starts_with("lora_")).unwrap();
        tensors.insert(format!("{layer}.lora_down.weight"), json!([4, columns]));
        tensors.insert(format!("{layer}.lora_up.weight"), json!({"shape": [rows, 4], "scale": 0.3}));
        tensors.insert(format!("{layer}.alpha"), json!({"shape": [], "shift": 4.0}));
    }
    assert!(tensors.len() > 100, "{} tensors", tensors.len());
    write(path, tensors, &[]);
}

/// A LoHa of rank 2 for the self-attentions of the UNet.
pub fn loha(path: &Path) {
    let mut tensors = Map::new();
    for (target, [rows, columns]) in matrices().into_iter().filter(|(t, _)| t.name.contains("attn1.to_")) {
        let layer = &target.aliases[0];
        for n in [1, 2] {
            tensors.insert(format!("{layer}.hada_w{n}_a"), json!({"shape": [rows, 2], "scale": 0.7}));
            tensors.insert(format!("{layer}.hada_w{n}_b"), json!({"shape": [2, columns], "scale": 0.7}));
        }
    }
    assert!(!tensors.is_empty());
    write(path, tensors, &[]);
}

/// An ESRGAN of one block that enlarges four times.
pub fn esrgan(path: &Path) {
    let mut tensors = Map::new();
    let mut conv = |name: &str, cout: u64, cin: u64| {
        tensors.insert(format!("{name}.weight"), json!([cout, cin, 3, 3]));
        tensors.insert(format!("{name}.bias"), json!([cout]));
    };
    conv("conv_first", 16, 3);
    for rdb in 1..=3 {
        for i in 1..=5 {
            conv(&format!("body.0.rdb{rdb}.conv{i}"), if i == 5 { 16 } else { 8 }, 16 + 8 * (i - 1));
        }
    }
    for name in ["conv_body", "conv_up1", "conv_up2", "conv_hr"] {
        conv(name, 16, 16);
    }
    conv("conv_last", 3, 16);
    write(path, tensors, &[]);
}

/// A compact upscaler that doubles.
pub fn compact(path: &Path) {
    let mut tensors = Map::new();
    for (at, cout, cin) in [(0u64, 16u64, 3u64), (2, 16, 16), (4, 12, 16)] {
        tensors.insert(format!("body.{at}.weight"), json!([cout, cin, 3, 3]));
        tensors.insert(format!("body.{at}.bias"), json!([cout]));
        if at < 4 {
            tensors.insert(format!("body.{}.weight", at + 1), json!({"shape": [16], "shift": 0.25}));
        }
    }
    write(path, tensors, &[]);
}

/// All of them below a `models` folder, with TAESD.
pub fn write_all(models: &Path) {
    lora(&models.join("loras/tiny-lora.safetensors"));
    loha(&models.join("loras/tiny-loha.safetensors"));
    control_files::of_demo(&models.join("controlnet/tiny-controlnet.safetensors"), None);
    control_files::of_demo(&models.join("controlnet/foreign-controlnet.safetensors"), Some(64));
    let nets = models.join("controlnet");
    let whole = nets.join("tiny-controlnet.safetensors");
    control_files::as_diffusers(&whole, &nets.join("tiny-control-diffusers.safetensors"));
    control_files::lora(&control_files::demo(), &nets.join("tiny-control-lora.safetensors"));
    esrgan(&models.join("upscale_models/tiny-esrgan.safetensors"));
    compact(&models.join("upscale_models/tiny-compact.safetensors"));
    for name in ["taesd_encoder", "taesd_decoder"] {
        let path = models.join(format!("vae_approx/{name}.safetensors"));
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        synth::write(&Manifest::built_in(name).unwrap(), &path, DType::F16, &[], |_, _| {}).unwrap();
    }
    let manifest = Manifest::built_in("sd15-lora").unwrap();
    let path = models.join("loras/foreign-lora.safetensors");
    synth::write(&manifest, &path, DType::F16, &[], |_, _| {}).unwrap();
}

/// A workflow of the zoo.
pub fn workflow(name: &str) -> Json {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/workflows/adapters/{name}.json"));
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}
