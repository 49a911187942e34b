//! From options to services: what `serve`, `run`, `demo` and `bench` share.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result};

use super::device::DeviceArgs;
use crate::backend;
use crate::diffusion::noise::prepare_noise;
use crate::files::{DEMO_BYTES, DEMO_CHECKPOINT, FolderOptions, Folders};
use crate::image::{Bitmap, PngCompression, encode_png};
use crate::models::unet::UnetInput;
use crate::models::{ModelSource, ModelStore};
use crate::nodes::text::weighted_tokens;
use crate::nodes::{PreviewMethod, Services};
use crate::tensor::{HostTensor, Placement};
use crate::tokenizer::{self, NoEmbeddings, TokenizerOptions};
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

/// Services over folders and a device.
pub fn services(args: &RuntimeArgs, folders: &FolderOptions) -> Result<Services> {
    let folders = Folders::open(folders).context("setting up the folders")?;
    let models = ModelStore::new(backend::open(args.device.options())?, OpenOptions { mmap: !args.no_mmap });
    Ok(Services {
        folders: Arc::new(folders),
        models: Arc::new(models),
        save_metadata: true,
        png_level: PNG_LEVEL,
        preview: PreviewMethod::default(),
    })
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

/// Runs the built-in model once at its smallest, encodes a picture, and unloads it.
///
/// The first prompt then finds the code pages in memory and the tokenizer's
/// tables built, and a machine on which the backend doesn't work says so at start.
pub fn warm_up(placement: Placement) {
    let began = std::time::Instant::now();
    match forward_once(placement.clone()) {
        Ok(()) => tracing::debug!(elapsed = ?began.elapsed(), "warm"),
        Err(error) => tracing::error!(%error, "the built-in model does not run: prompts will fail too"),
    }
    placement.trim();
}

fn forward_once(placement: Placement) -> Result<()> {
    let store = ModelStore::new(placement, OpenOptions::default());
    let file = store.file(ModelSource::Embedded { name: DEMO_CHECKPOINT, bytes: DEMO_BYTES });
    let chunks = tokenizer::tokenize("a red circle", &TokenizerOptions::sd1(), &NoEmbeddings);
    let cond = Arc::new(file.clip()?.encode(&weighted_tokens(chunks), 0)?.cond);
    let unet = file.unet()?;
    let context = unet.context(&[cond])?;
    let x = prepare_noise(&[1, unet.config().in_channels, 16, 16], 0, None);
    let latent = unet.forward(&UnetInput { x: &x, timesteps: &[500.0], context: &context }, None)?;
    let picture = file.vae()?.decode_raw(&latent)?;
    let pixels = HostTensor::zeros(&[1, picture.dim(2), picture.dim(3), 3]);
    encode_png(&Bitmap::from_images(&pixels, 0)?, PngCompression::Fast, &[])?;
    Ok(())
}
