//! The whole pipeline on the SIMT layer: the demo model from prompt to picture, memory, graphs, failures.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kiln::backend::cuda::{self, CudaBackend, Element, Gpu, Shared};
use kiln::backend::{self, Device, DeviceOptions};
use kiln::driver::simt::{SimtDriver, SimtOptions};
use kiln::driver::toolchain::SimtVariant;
use kiln::driver::{Capability, Driver};
use kiln::engine::{Engine, EngineConfig, FreeRequest, Submission};
use kiln::files::{DEMO_BYTES, DEMO_CHECKPOINT, FolderOptions, Folders};
use kiln::models::unet::UnetInput;
use kiln::models::{ModelSource, ModelStore};
use kiln::nodes::{self, PreviewMethod, Services};
use kiln::tensor::{HostTensor, Placement};
use kiln::weights::OpenOptions;
use serde_json::{Value as Json, json};

use crate::library;

/// The demo model's backends on a SIMT driver of their own.
pub fn simt() -> (Arc<SimtDriver>, Placement) {
    simt_in(SimtOptions::default(), Element::F16, Element::BF16)
}

/// The same on another device, with all but the VAE in one type, and the VAE in another.
fn simt_in(options: SimtOptions, element: Element, vae: Element) -> (Arc<SimtDriver>, Placement) {
    let driver = Arc::new(SimtDriver::open(&library(SimtVariant::Fast), options).unwrap());
    let shared = Shared::new(Arc::new(Gpu::new(driver.clone()).unwrap()), None);
    let backend = |element| Arc::new(CudaBackend::new(shared.clone(), element));
    let (nets, vae) = (backend(element), backend(vae));
    (driver, Placement { diffusion: nets.clone(), text: nets, vae })
}

pub fn cpu() -> Placement {
    backend::open(DeviceOptions { device: Device::Cpu, ..DeviceOptions::default() }).unwrap()
}

/// An engine that writes below `folder`.
pub fn engine(placement: Placement, folder: &Path) -> Arc<Engine> {
    let folders =
        Folders::open(&FolderOptions { base: folder.to_owned(), ..FolderOptions::default() }).unwrap();
    let services = Services {
        folders: Arc::new(folders),
        models: Arc::new(ModelStore::new(placement, OpenOptions::default())),
        save_metadata: false,
        png_level: 1,
        preview: PreviewMethod::None,
    };
    Engine::new(EngineConfig::new(services, nodes::registry()))
}

pub fn workflow(size: usize, steps: usize, seed: u64) -> Json {
    json!({
        "3": {"class_type": "KSampler", "inputs": {"model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0],
            "latent_image": ["5", 0], "seed": seed, "steps": steps, "cfg": 7.0, "sampler_name": "euler",
            "scheduler": "normal", "denoise": 1.0}},
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": DEMO_CHECKPOINT}},
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": size, "height": size, "batch_size": 1}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a red circle on a blue background", "clip": ["4", 1]}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["4", 1]}},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "simt"}},
    })
}

/// Runs a prompt to its end; the history entry.
pub fn run(engine: &Engine, prompt: Json) -> Json {
    let accepted = engine.submit(Submission { prompt, ..Submission::default() }).expect("a valid prompt");
    let until = Instant::now() + Duration::from_secs(300);
    loop {
        let entry = engine.history_one(&accepted.prompt_id);
        if let Some(entry) = entry.get(&accepted.prompt_id) {
            return entry.clone();
        }
        assert!(Instant::now() < until, "the prompt does not end");
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub fn status(entry: &Json) -> &str {
    entry["status"]["status_str"].as_str().unwrap_or("?")
}

/// The pixels of the picture that a history entry names.
pub fn picture(entry: &Json, folder: &Path) -> Vec<u8> {
    assert_eq!(status(entry), "success", "{}", entry["status"]);
    let name = entry["outputs"]["9"]["images"][0]["filename"].as_str().unwrap();
    let png = std::fs::read(folder.join("output").join(name)).unwrap();
    image::load_from_memory(&png).unwrap().to_rgb8().into_raw()
}

pub fn psnr(a: &[u8], b: &[u8]) -> f64 {
    assert_eq!(a.len(), b.len());
    let sum: f64 = a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum();
    10.0 * (255.0f64.powi(2) / (sum / a.len() as f64).max(1e-12)).log10()
}

/// f16 UNet and text encoder, bf16 VAE, against f32 throughout: 40 dB is an error of 2.5/255 (rms). Eight bits of
/// mantissa in the VAE alone cost about 49.
#[test]
fn the_demo_picture_is_that_of_the_cpu() {
    let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (driver, placement) = simt();
    let engine_on_simt = engine(placement, ours.path());
    let prompt = workflow(64, 6, 1);
    let on_simt = picture(&run(&engine_on_simt, prompt.clone()), ours.path());
    let on_cpu = picture(&run(&engine(cpu(), theirs.path()), prompt), theirs.path());
    let db = psnr(&on_simt, &on_cpu);
    println!("{db:.1} dB");
    assert!(db >= 40.0, "{db:.1} dB");
    let counts = driver.instruments().counts();
    assert!(counts.graph_launches >= 4, "steps replay a graph: {counts:?}");

    // Every byte that the driver has given is one of a class.
    let (_, memory) = engine_on_simt.device();
    assert_eq!(memory.held() as u64, counts.bytes_in_use, "{memory:?}");
    assert!(memory.weights > 1 << 20 && memory.workspace > 0 && memory.cached > 0, "{memory:?}");

    // /free gives everything back, models and caches.
    assert!(counts.bytes_in_use > 1 << 20, "{counts:?}");
    engine_on_simt.free(FreeRequest { unload_models: true, free_memory: true });
    let until = Instant::now() + Duration::from_secs(10);
    while driver.instruments().counts().bytes_in_use > 0 && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(2));
    }
    assert_eq!(driver.instruments().counts().bytes_in_use, 0, "device memory after /free");
    assert_eq!(engine_on_simt.device().1.held(), 0, "what is held after /free");
    let again = picture(&run(&engine_on_simt, workflow(64, 6, 1)), ours.path());
    assert_eq!(again, on_simt, "the same picture after /free");
    engine_on_simt.shutdown();
}

/// The kernels of Hopper in their places: at 128², the network's middle levels and the decoder are large enough for each.
#[test]
fn the_demo_picture_of_a_hopper_device_is_that_of_the_cpu() {
    let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let capability = Capability { major: 9, minor: 0 };
    let options = SimtOptions { capability, ..SimtOptions::default() };
    let (driver, placement) = simt_in(options, Element::F16, Element::BF16);
    let engine_on_hopper = engine(placement, ours.path());
    let prompt = workflow(128, 3, 1);
    let on_hopper = picture(&run(&engine_on_hopper, prompt.clone()), ours.path());
    assert!(driver.instruments().counts().graph_launches > 0, "steps replay a graph");
    let on_cpu = picture(&run(&engine(cpu(), theirs.path()), prompt), theirs.path());
    let db = psnr(&on_hopper, &on_cpu);
    assert!(db >= 40.0, "{db:.1} dB");
    // What is traced is launched one by one.
    driver.instruments().set_tracing(true);
    picture(&run(&engine_on_hopper, workflow(128, 1, 2)), ours.path());
    let launched: BTreeSet<String> =
        driver.instruments().take_trace().into_iter().map(|launch| launch.kernel).collect();
    println!("{db:.1} dB; {launched:?}");
    // In f16 the network, in bf16 the decoder.
    let f16 = ["gemm_sm90_", "conv_sm90_", "groupnorm_cluster_"].map(|family| (family, "_f16"));
    let bf16 =
        ["gemm_sm90_", "conv_sm90_", "groupnorm_cluster_", "attention_sm90_"].map(|family| (family, "_bf16"));
    for (family, element) in f16.into_iter().chain(bf16) {
        let is_launched = launched.iter().any(|name| name.starts_with(family) && name.ends_with(element));
        assert!(is_launched, "no {family}…{element} among {launched:?}");
    }
}

/// All in f32: of the 12,288 values of the picture at most one in a thousand is another one, by 1, where a value lay on
/// the edge between two.
#[test]
fn in_f32_the_picture_is_that_of_the_cpu() {
    let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let prompt = workflow(64, 6, 1);
    let on_simt = engine(simt_in(SimtOptions::default(), Element::F32, Element::F32).1, ours.path());
    let on_simt = picture(&run(&on_simt, prompt.clone()), ours.path());
    let on_cpu = picture(&run(&engine(cpu(), theirs.path()), prompt), theirs.path());
    let apart: Vec<u8> =
        on_simt.iter().zip(&on_cpu).map(|(a, b)| a.abs_diff(*b)).filter(|d| *d > 0).collect();
    println!("{} of {} values differ", apart.len(), on_cpu.len());
    assert!(apart.len() * 1000 <= on_cpu.len() && apart.iter().all(|d| *d == 1), "{apart:?}");
}

/// Hooks inside the network and guidance that asks it again, as on the CPU.
#[test]
fn a_patched_model_draws_what_it_draws_on_the_cpu() {
    let mut prompt = workflow(128, 2, 3);
    let patches = json!({
        "20": {"class_type": "HyperTile", "inputs": {"model": ["4", 0], "tile_size": 32, "swap_size": 1,
            "max_depth": 1, "scale_depth": false}},
        "21": {"class_type": "FreeU", "inputs": {"model": ["20", 0], "b1": 1.1, "b2": 1.2, "s1": 0.9, "s2": 0.2}},
        "22": {"class_type": "PerturbedAttentionGuidance", "inputs": {"model": ["21", 0], "scale": 1.0}},
        "23": {"class_type": "SelfAttentionGuidance", "inputs": {"model": ["22", 0], "scale": 0.5, "blur_sigma": 2.0}},
    });
    prompt.as_object_mut().unwrap().extend(patches.as_object().unwrap().clone());
    let plain = prompt.clone();
    prompt["3"]["inputs"]["model"] = json!(["23", 0]);
    let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let on_cpu = engine(cpu(), theirs.path());
    let patched = picture(&run(&on_cpu, prompt.clone()), theirs.path());
    let unpatched = picture(&run(&on_cpu, plain), theirs.path());
    let change = psnr(&patched, &unpatched);
    let on_simt = picture(&run(&engine(simt().1, ours.path()), prompt), ours.path());
    let db = psnr(&on_simt, &patched);
    println!("{db:.1} dB to the CPU; the patches make {change:.1} dB");
    assert!(db >= 35.0 && change < 30.0, "{db:.1} dB, {change:.1} dB");
}

/// From the third call on: one graph, no memory from the driver, and the host waits for the result only, if it asks
/// for it.
#[test]
fn a_steady_step_is_one_graph_without_allocation() {
    let (driver, placement) = simt();
    let store = ModelStore::new(placement, OpenOptions::default());
    let file = store.file(ModelSource::Embedded { name: DEMO_CHECKPOINT, bytes: DEMO_BYTES });
    let unet = file.unet().unwrap();
    let cond = Arc::new(HostTensor::full(&[1, 77, unet.config().context_dim], 0.1));
    let context = unet.context(&[cond.clone(), cond]).unwrap();
    let x = HostTensor::full(&[2, unet.config().in_channels, 8, 8], 0.25);
    let step = |t: f32| {
        let input = UnetInput { x: &x, timesteps: &[t; 2], context: &context, vector: None };
        unet.forward(&input, None).unwrap()
    };
    let plain = step(500.0);
    let before = driver.instruments().counts();
    let captured = step(500.0);
    let launches = driver.instruments().counts().launches - before.launches;
    assert!(launches <= 350, "{launches} launches of a UNet forward");
    step(300.0);
    let before = driver.instruments().counts();
    let replayed = step(500.0);
    let after = driver.instruments().counts();
    assert_eq!(plain.data(), captured.data(), "captured work gives the same bits");
    assert_eq!(plain.data(), replayed.data(), "replayed work gives the same bits");
    assert_eq!(after.allocations, before.allocations, "allocations of a steady step");
    assert_eq!(after.graph_launches - before.graph_launches, 1);
    assert_eq!(after.syncs - before.syncs, 1, "the host waits for the download only");
}

/// Every allocation of the demo workflow without models on the device. That each of them fails once must not be seen.
/// For every n the n-th fails, and once more on the retry: an error of that prompt alone, and the next one runs.
#[test]
fn an_allocation_that_fails_harms_one_prompt_at_most() {
    // The allocations are shared out: an engine with a device of its own each.
    const PARTS: u32 = 2;
    std::thread::scope(|scope| {
        for part in 0..PARTS {
            scope.spawn(move || fail_allocations(part, PARTS));
        }
    });
}

/// An engine on a device where allocations fail.
struct Short {
    driver: Arc<SimtDriver>,
    engine: Arc<Engine>,
    folder: tempfile::TempDir,
    /// The picture when none fails.
    good: Vec<u8>,
}

impl Short {
    /// Leaves no model on the device, and of all results those of the nodes of `known`, which has run before.
    fn prepare(&self, known: Option<&Json>) {
        if let Some(known) = known {
            assert_eq!(status(&run(&self.engine, known.clone())), "success");
        }
        self.engine.free(FreeRequest { unload_models: true, free_memory: known.is_none() });
    }

    /// The allocations of `prompt`.
    fn allocations(&self, known: Option<&Json>, prompt: &Json) -> u32 {
        self.prepare(known);
        let before = self.driver.instruments().counts().allocations;
        assert_eq!(status(&run(&self.engine, prompt.clone())), "success");
        (self.driver.instruments().counts().allocations - before) as u32
    }

    /// Runs `prompt` as often as it has allocations, one of `parts` of the times, and each time another one fails for
    /// good. Returns how many runs ended with an error and how many with the picture.
    fn fail_each(&self, known: Option<&Json>, prompt: &Json, (part, parts): (u32, u32)) -> (usize, usize) {
        let (mut errors, mut pictures) = (0, 0);
        for n in (0..self.allocations(known, prompt)).filter(|n| n % parts == part) {
            self.prepare(known);
            self.driver.instruments().fail_allocations(n, 2);
            let entry = run(&self.engine, prompt.clone());
            assert!(self.driver.instruments().cancel_failures(), "allocation {n} was asked for");
            if status(&entry) == "error" {
                let text = entry["status"].to_string();
                assert!(text.contains("out of memory"), "allocation {n}: {text}");
                errors += 1;
            } else {
                let db = psnr(&picture(&entry, self.folder.path()), &self.good);
                assert!(db > 30.0, "allocation {n}: {db:.1} dB");
                pictures += 1;
            }
        }
        (errors, pictures)
    }
}

/// In three parts, so that no run repeats what the runs before it did: texts, latent, picture.
fn fail_allocations(part: u32, parts: u32) {
    let folder = tempfile::tempdir().unwrap();
    let (driver, placement) = simt();
    let prompt = workflow(16, 1, 1);
    let mut latent = prompt.clone();
    latent["9"] =
        json!({"class_type": "SaveLatent", "inputs": {"samples": ["3", 0], "filename_prefix": "x"}});
    latent.as_object_mut().unwrap().remove("8");
    let mut texts = latent.clone();
    texts.as_object_mut().unwrap().retain(|id, _| ["4", "6", "7"].contains(&id.as_str()));
    for id in ["6", "7"] {
        texts[format!("1{id}")] = json!({"class_type": "PreviewAny", "inputs": {"source": [id, 0]}});
    }
    let engine = engine(placement, folder.path());
    let good = picture(&run(&engine, prompt.clone()), folder.path());
    let short = Short { driver, engine, folder, good };
    let cold_picture = || {
        short.prepare(None);
        picture(&run(&short.engine, prompt.clone()), short.folder.path())
    };
    short.driver.instruments().fail_first_tries();
    assert_eq!(cold_picture(), short.good, "every allocation fails once");
    short.driver.instruments().cancel_failures();

    let share = (part, parts);
    let of_texts = short.fail_each(None, &texts, share);
    let of_latent = short.fail_each(Some(&texts), &latent, share);
    let of_picture = short.fail_each(Some(&latent), &prompt, share);
    println!("errors and pictures: texts {of_texts:?}, latent {of_latent:?}, picture {of_picture:?}");
    assert!(of_texts.0 > 20 && of_texts.1 == 0);
    assert!(of_latent.0 > 100 && of_latent.1 == 0);
    // A decoder that is short of memory works in tiles.
    assert!(of_picture.0 == 0 && of_picture.1 > 50);
    assert_eq!(cold_picture(), short.good, "after all failures");
    short.engine.shutdown();
}

/// A model that no prompt works with goes when another's weights find no room.
#[test]
fn an_allocation_that_fails_evicts_idle_models() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoints = folder.path().join("models/checkpoints");
    std::fs::create_dir_all(&checkpoints).unwrap();
    std::fs::write(checkpoints.join("other.safetensors"), DEMO_BYTES).unwrap();
    let (driver, placement) = simt();
    let engine = engine(placement, folder.path());
    let prompt = |name: &str| {
        let mut prompt = workflow(16, 1, 1);
        prompt["4"]["inputs"]["ckpt_name"] = json!(name);
        prompt
    };
    let weights = || engine.device().1.weights;
    let good = picture(&run(&engine, prompt(DEMO_CHECKPOINT)), folder.path());
    let of_one = weights();
    // The text encoder's first weight finds the device full.
    driver.instruments().fail_allocations(0, 1);
    assert_eq!(picture(&run(&engine, prompt("other.safetensors")), folder.path()), good);
    assert!(driver.instruments().cancel_failures());
    assert_eq!(weights(), of_one, "the first model is gone");
    assert_eq!(picture(&run(&engine, prompt(DEMO_CHECKPOINT)), folder.path()), good);
    assert_eq!(weights(), 2 * of_one, "without a failure both stay");
    engine.shutdown();
}

#[test]
fn a_gpu_that_is_not_there_is_a_clear_error() {
    let options = DeviceOptions { device: Device::Cuda, ordinal: 99, ..DeviceOptions::default() };
    let error = cuda::open_driver(&options).err().expect("no such GPU").to_string();
    assert!(error.contains("CUDA"), "{error}");
}
