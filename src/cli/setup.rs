//! From options to services: what `serve`, `run`, `demo` and `bench` share.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value as Json, json};

use super::device::DeviceArgs;
use super::trace::{Trace, TraceArgs};
use crate::backend::{self, Device, cuda};
use crate::engine::{Engine, EngineConfig, EventKind, Submission};
use crate::files::{DEMO_CHECKPOINT, FolderOptions, Folders};
use crate::models::ModelStore;
use crate::nodes::{PreviewMethod, Services};
use crate::tensor::Placement;
use crate::weights::OpenOptions;

/// PNG compression of outputs: fast, a few per cent larger than the slow levels.
const PNG_LEVEL: u8 = 1;

/// Options of every command that runs models.
#[derive(clap::Args, Clone, Debug)]
pub struct RuntimeArgs {
    /// Folder that holds models, input, output, temp and user; the current one if not given.
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub base_directory: PathBuf,
    /// ComfyUI's extra_model_paths.yaml; may be given several times.
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub extra_model_paths_config: Vec<PathBuf>,
    /// Device, precision, threads.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Reads model files into memory instead of mapping them.
    #[arg(long, alias = "disable-mmap")]
    pub no_mmap: bool,
}

impl Default for RuntimeArgs {
    fn default() -> Self {
        Self {
            base_directory: PathBuf::from("."),
            extra_model_paths_config: Vec::new(),
            device: DeviceArgs::default(),
            no_mmap: false,
        }
    }
}

impl RuntimeArgs {
    /// The folder part.
    pub fn folders(&self) -> FolderOptions {
        FolderOptions {
            base: self.base_directory.clone(),
            extra_model_paths: self.extra_model_paths_config.clone(),
            ..FolderOptions::default()
        }
    }
}

/// The device, with its launches traced if that is asked for.
fn open(args: &RuntimeArgs, trace: &TraceArgs) -> Result<(Placement, Option<Trace>)> {
    let options = args.device.options();
    if trace.trace.is_some() && options.device == Device::Cpu {
        bail!("--trace records the kernels of a GPU or of --device simt, and this runs on the CPU");
    }
    let Some(file) = trace.create()? else { return Ok((backend::open(options)?, None)) };
    let driver = cuda::open_driver(&options).context("--trace records the kernels of a GPU")?;
    let placement = cuda::open_on(driver.clone(), &options, || backend::cpu_backend(&options))?;
    Ok((placement, Some(file.start(driver))))
}

/// Services over folders and a device; the trace lasts until it is finished.
pub fn services(
    args: &RuntimeArgs,
    folders: &FolderOptions,
    trace: &TraceArgs,
) -> Result<(Services, Option<Trace>)> {
    let folders = Folders::open(folders).context("setting up the folders")?;
    let (placement, trace) = open(args, trace)?;
    let models = ModelStore::new(placement, OpenOptions { mmap: !args.no_mmap });
    let services = Services {
        folders: Arc::new(folders),
        models: Arc::new(models),
        save_metadata: true,
        png_level: PNG_LEVEL,
        preview: PreviewMethod::default(),
    };
    Ok((services, trace))
}

/// Folders that write below `output` only: what commands without a server use.
pub fn local_folders(args: &RuntimeArgs, output: &Path, scratch: &Path) -> FolderOptions {
    let has_input = args.base_directory.join("input").is_dir();
    FolderOptions {
        input: (!has_input).then(|| scratch.join("input")),
        output: Some(output.to_owned()),
        temp: Some(scratch.to_owned()),
        user: Some(scratch.join("user")),
        ..args.folders()
    }
}

/// Runs a prompt on the built-in model at its smallest, with a scratch folder and an engine of its own.
///
/// The first prompt then finds the code pages in memory and the tokenizer's
/// tables built, and a machine on which the backend doesn't work says so at start.
pub fn warm_up(placement: Placement) {
    let began = std::time::Instant::now();
    match run_smallest(placement.clone()) {
        Ok(()) => tracing::debug!(elapsed = ?began.elapsed(), "warm"),
        Err(error) => {
            tracing::error!(error = format!("{error:#}"), "the trial prompt failed: others may too")
        }
    }
    placement.trim();
}

fn run_smallest(placement: Placement) -> Result<()> {
    let scratch = tempfile::tempdir().context("making a scratch folder")?;
    let folders = FolderOptions { base: scratch.path().to_owned(), ..FolderOptions::default() };
    let services = Services {
        folders: Arc::new(Folders::open(&folders)?),
        models: Arc::new(ModelStore::new(placement, OpenOptions::default())),
        save_metadata: true,
        png_level: PNG_LEVEL,
        preview: PreviewMethod::None,
    };
    let config =
        EngineConfig { event_capacity: 1024, ..EngineConfig::new(services, crate::nodes::registry()) };
    let engine = Engine::new(config);
    let mut events = engine.subscribe();
    engine.submit(Submission { prompt: smallest_prompt(), ..Submission::default() })?;
    loop {
        match &events.blocking_recv().context("waiting for the end of the prompt")?.kind {
            EventKind::ExecutionSuccess { .. } => break,
            EventKind::ExecutionError(error) => {
                bail!("{}: {}", error.node_type, error.exception_message.trim())
            }
            _ => {}
        }
    }
    engine.shutdown();
    Ok(())
}

/// Text to picture, 64×64, one step.
fn smallest_prompt() -> Json {
    json!({
        "3": {"class_type": "KSampler", "inputs": {
            "seed": 0, "steps": 1, "cfg": 7.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0,
            "model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}},
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": DEMO_CHECKPOINT}},
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a red circle", "clip": ["4", 1]}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["4", 1]}},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
        "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "trial", "images": ["8", 0]}},
    })
}
