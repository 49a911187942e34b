//! The workflow zoo: every `*.json` of this folder, in API format, on the CPU and on the simulated GPU; those of
//! `adapters` and `demo`, on the demo model, on the simulated GPU.
//!
//! A workflow names models `tiny-NAME.safetensors`: the harness writes the tiny model NAME (`kiln synth --tiny`)
//! into the folder of the loader that names it; a `model_path` `…/tiny-NAME` is written as a folder of the diffusers
//! library. Other names are files of `tests/data/pytorch`. Pictures to load are `zoo.png` and `zoo_masked.png` (a
//! hole in its alpha channel). On the simulated GPU a picture must be the CPU's but for rounding.
//!
//! `cargo test --release --test workflows -- FILTER`; with `KILN_TEST_DEVICE=cuda` the GPU of this machine takes the
//! place of the simulated one.

#[path = "../adapters/files.rs"]
#[allow(dead_code, reason = "made for the adapters' tests")]
mod files;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kiln::backend::cuda::{CudaBackend, Element, Gpu, Shared};
use kiln::backend::{self, Device, DeviceOptions};
use kiln::driver::simt::{SimtDriver, SimtOptions};
use kiln::driver::toolchain::{SimtVariant, build_simt};
use kiln::engine::{Engine, EngineConfig, Submission};
use kiln::files::{DEMO_CHECKPOINT, FolderOptions, Folders};
use kiln::models::{ModelStore, tiny};
use kiln::nodes::{self, PreviewMethod, Services};
use kiln::tensor::{DType, Placement};
use kiln::weights::OpenOptions;
use kiln::weights::synth::{self, Manifest};
use libtest_mimic::{Arguments, Failed, Trial};
use serde_json::Value as Json;

/// Inputs that name a model file: the folder that it is in.
const FOLDERS: &[(&str, &str)] = &[
    ("ckpt_name", "checkpoints"),
    ("unet_name", "diffusion_models"),
    ("clip_name", "text_encoders"),
    ("clip_name1", "text_encoders"),
    ("clip_name2", "text_encoders"),
    ("vae_name", "vae"),
    ("hypernetwork_name", "hypernetworks"),
];

/// f16 UNet and text encoder and bf16 VAE of random weights, against f32 throughout: an error of 8/255 (rms).
const LEAST_DB: f64 = 30.0;
/// Workflows with a hard threshold on a drawn picture: there a rounding moves whole pixels. On the CPU alone.
const THRESHOLDED: &[&str] = &["demo/edges_as_mask"];
/// Longest that a workflow may take.
const PATIENCE: Duration = Duration::from_secs(300);

fn main() {
    let mut trials = Vec::new();
    for folder in ["", "adapters/", "demo/"] {
        for path in workflows(folder) {
            let name = format!("{folder}{}", path.file_stem().unwrap_or_default().to_string_lossy());
            // On the CPU `tests/adapters` and `tests/workflow_zoo.rs` look closer at those of the folders.
            if folder.is_empty() {
                let path = path.clone();
                trials.push(Trial::test(format!("cpu/{name}"), move || runs_on_the_cpu(&path)));
            }
            if !THRESHOLDED.contains(&name.as_str()) {
                trials.push(Trial::test(format!("gpu/{name}"), move || is_the_same_on_a_gpu(&path)));
            }
        }
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

fn workflows(folder: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/workflows").join(folder);
    let entries = std::fs::read_dir(folder).expect("the folder of workflows").flatten();
    let mut paths: Vec<_> = entries.map(|e| e.path()).collect();
    paths.retain(|path| path.extension().is_some_and(|e| e == "json"));
    paths.sort();
    paths
}

fn cpu() -> Placement {
    let options = DeviceOptions { device: Device::Cpu, threads: Some(1), ..DeviceOptions::default() };
    backend::open(options).expect("a CPU backend")
}

fn gpu() -> Placement {
    match std::env::var("KILN_TEST_DEVICE").as_deref() {
        Ok("cuda") => {
            backend::open(DeviceOptions { device: Device::Cuda, ..DeviceOptions::default() }).expect("a GPU")
        }
        _ => simt(),
    }
}

fn simt() -> Placement {
    let library = kiln::driver::simt::built_library(SimtVariant::Fast).unwrap_or_else(|| {
        let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
        let out = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("simt");
        build_simt(&kernels, &[], &out, SimtVariant::Fast).expect("the kernels compile")
    });
    let driver = Arc::new(SimtDriver::open(&library, SimtOptions::default()).expect("the simulated driver"));
    let shared = Shared::new(Arc::new(Gpu::new(driver).expect("a simulated GPU")), None);
    let backend = |element| Arc::new(CudaBackend::new(shared.clone(), element));
    let (f16, bf16) = (backend(Element::F16), backend(Element::BF16));
    Placement { diffusion: f16.clone(), text: f16, vae: bf16 }
}

fn runs_on_the_cpu(workflow: &Path) -> Result<(), Failed> {
    for picture in run(workflow, cpu())? {
        let (low, high) = picture.iter().fold((255, 0), |(l, h), v| (*v.min(&l), *v.max(&h)));
        if high - low < 16 {
            return Err(format!("a picture is flat: {low} to {high}").into());
        }
    }
    Ok(())
}

fn is_the_same_on_a_gpu(workflow: &Path) -> Result<(), Failed> {
    let (ours, theirs) = (run(workflow, gpu())?, run(workflow, cpu())?);
    if ours.len() != theirs.len() {
        return Err(format!("{} pictures, {} on the CPU", ours.len(), theirs.len()).into());
    }
    for (ours, theirs) in ours.iter().zip(&theirs) {
        let db = psnr(ours, theirs);
        println!("{}: {db:.1} dB", workflow.display());
        if db < LEAST_DB {
            return Err(format!("{db:.1} dB, {LEAST_DB} are needed").into());
        }
    }
    Ok(())
}

/// The pictures that a workflow saves, as bytes.
fn run(workflow: &Path, placement: Placement) -> Result<Vec<Vec<u8>>, Failed> {
    let base = tempfile::tempdir()?;
    let prompt: Json = serde_json::from_str(&std::fs::read_to_string(workflow)?)?;
    provide(&prompt, base.path())?;
    let folders = Folders::open(&FolderOptions { base: base.path().to_owned(), ..FolderOptions::default() })?;
    let services = Services {
        folders: Arc::new(folders),
        models: Arc::new(ModelStore::new(placement, OpenOptions::default())),
        save_metadata: false,
        png_level: 1,
        preview: PreviewMethod::None,
    };
    let engine = Engine::new(EngineConfig::new(services, nodes::registry()));
    let entry = finished(&engine, prompt);
    engine.shutdown();
    let entry = entry?;
    let outputs = entry["outputs"].as_object().into_iter().flatten();
    let images = outputs.flat_map(|(_, o)| o["images"].as_array().into_iter().flatten());
    let mut pictures = Vec::new();
    for image in images.filter(|image| image["type"] == "output") {
        let name = image["filename"].as_str().ok_or("a picture without a name")?;
        if !name.ends_with(".png") {
            continue;
        }
        let folder = base.path().join("output").join(image["subfolder"].as_str().unwrap_or_default());
        let png = std::fs::read(folder.join(name))?;
        pictures.push(image::load_from_memory(&png)?.to_rgb8().into_raw());
    }
    if pictures.is_empty() { Err("no picture was saved".into()) } else { Ok(pictures) }
}

/// Runs a prompt to its end; the history entry.
fn finished(engine: &Engine, prompt: Json) -> Result<Json, Failed> {
    let accepted = engine
        .submit(Submission { prompt, ..Submission::default() })
        .map_err(|refused| format!("refused: {} {}", refused.error, refused.node_errors))?;
    let until = Instant::now() + PATIENCE;
    while Instant::now() < until {
        if let Some(entry) = engine.history_one(&accepted.prompt_id).get(&accepted.prompt_id) {
            let is_good = entry["status"]["status_str"] == "success";
            return if is_good { Ok(entry.clone()) } else { Err(entry["status"].to_string().into()) };
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Err("the prompt does not end".into())
}

/// Writes the file of an adapter.
type Writer = fn(&Path);

/// Writes the models and pictures that a prompt names below `base`.
fn provide(prompt: &Json, base: &Path) -> Result<(), Failed> {
    let mut wanted = BTreeSet::new();
    for node in prompt.as_object().into_iter().flat_map(|p| p.values()) {
        for (input, folder) in FOLDERS {
            wanted.extend(node["inputs"][input].as_str().map(|file| (*folder, file)));
        }
    }
    let models = base.join("models");
    for (folder, file) in wanted {
        match file {
            DEMO_CHECKPOINT => continue,
            "taesd" => {
                for name in ["taesd_encoder", "taesd_decoder"] {
                    let path = models.join(format!("vae_approx/{name}.safetensors"));
                    std::fs::create_dir_all(models.join("vae_approx"))?;
                    let shapes = Manifest::built_in(name).ok_or("no TAESD")?;
                    synth::write(&shapes, &path, DType::F16, &[], |_, _| {})?;
                }
                continue;
            }
            _ => {}
        }
        let name = file.strip_prefix("tiny-").and_then(|n| n.strip_suffix(".safetensors"));
        let path = base.join("models").join(folder).join(file);
        std::fs::create_dir_all(path.parent().ok_or("a path without a folder")?)?;
        let recorded = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/pytorch").join(file);
        if recorded.is_file() {
            std::fs::copy(recorded, path)?;
            continue;
        }
        let name = name.ok_or_else(|| format!("{file} is not tiny-NAME.safetensors"))?;
        tiny::write(name, &path, DType::F16).ok_or_else(|| format!("no tiny model {name}"))??;
    }
    let adapters: [(&str, Writer); 7] = [
        ("loras/tiny-lora", files::lora),
        ("loras/tiny-loha", files::loha),
        ("controlnet/tiny-controlnet", |path| files::control_files::of_demo(path, None)),
        ("controlnet/tiny-control-diffusers", |path| {
            let standard = path.with_extension("whole");
            files::control_files::of_demo(&standard, None);
            files::control_files::as_diffusers(&standard, path);
        }),
        ("controlnet/tiny-control-lora", |path| {
            files::control_files::lora(&files::control_files::demo(), path)
        }),
        ("upscale_models/tiny-esrgan", files::esrgan),
        ("upscale_models/tiny-compact", files::compact),
    ];
    for (file, write) in adapters {
        let name = file.rsplit('/').next().unwrap_or(file);
        if prompt.to_string().contains(name) {
            write(&models.join(format!("{file}.safetensors")));
        }
    }
    for node in prompt.as_object().into_iter().flat_map(|p| p.values()) {
        let Some(folder) = node["inputs"]["model_path"].as_str() else { continue };
        let name = folder.rsplit_once("tiny-").ok_or("a folder that is not tiny-NAME")?.1;
        std::fs::create_dir_all(&models)?;
        let whole = models.join("whole.safetensors");
        tiny::write(name, &whole, DType::F16).ok_or_else(|| format!("no tiny model {name}"))??;
        files::pipeline_files::write(&whole, &models.join("diffusers").join(folder));
    }
    // A textual inversion of two tokens for CLIP-L of the tiny models.
    if prompt.to_string().contains("embedding:zoo") {
        let shapes = Manifest::from_json(r#"{"emb_params": [2, 32]}"#)?;
        let folder = base.join("models/embeddings");
        std::fs::create_dir_all(&folder)?;
        synth::write(&shapes, &folder.join("zoo.safetensors"), DType::F16, &[], |_, _| {})?;
    }
    let input = base.join("input");
    std::fs::create_dir_all(&input)?;
    let colour = |x: u32, y: u32| [(x * 3) as u8, (y * 3) as u8, (x ^ y) as u8];
    image::RgbImage::from_fn(64, 64, |x, y| image::Rgb(colour(x, y))).save(input.join("zoo.png"))?;
    let masked = image::RgbaImage::from_fn(80, 64, |x, y| {
        let [r, g, b] = colour(x, y);
        let is_hole = (24..56).contains(&x) && (16..48).contains(&y);
        image::Rgba([r, g, b, if is_hole { 0 } else { 255 }])
    });
    masked.save(input.join("zoo_masked.png"))?;
    // What the demo model's workflows load.
    Ok(masked.save(input.join("picture.png"))?)
}

fn psnr(a: &[u8], b: &[u8]) -> f64 {
    if a.len() != b.len() {
        return 0.0;
    }
    let sum: f64 = a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum();
    10.0 * (255.0f64.powi(2) / (sum / a.len() as f64).max(1e-12)).log10()
}
