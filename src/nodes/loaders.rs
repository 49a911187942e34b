//! Loaders: checkpoint and VAE files to handles on links.

use std::sync::Arc;

use super::sd_model::SdModel;
use super::tiny_vae::{self, TinyVae};
use super::{Inputs, Node, NodeCtx, NodeError, NodeOutput, Schema, Services, Value};
use crate::diffusion::ModelHandle;
use crate::files::ModelPath;
use crate::graph::{FileList, Input};
use crate::models::clip::ClipText;
use crate::models::detect::ClipVariant;
use crate::models::patch::Patches;
use crate::models::text::TextKind;
use crate::models::vae::Autoencoder;
use crate::models::{ModelError, ModelFile, ModelSource, Precision};

/// What travels on a `CLIP` link.
#[derive(Clone)]
pub struct ClipHandle {
    /// The encoders, in the order in which their outputs are joined.
    pub parts: Vec<ClipPart>,
    /// The layer whose state is taken, from the end: -1 is the last ("clip skip"). `None`: the family's own.
    pub layer: Option<i64>,
}

/// One text encoder of a `CLIP` link.
#[derive(Clone)]
pub struct ClipPart {
    /// The file that holds it.
    pub file: Arc<ModelFile>,
    /// Which of the file's encoders it is.
    pub variant: ClipVariant,
    /// Patches of its weights.
    pub patches: Patches,
}

impl ClipPart {
    /// The encoder under its patches.
    pub fn encoder(&self) -> Result<Arc<ClipText>, ModelError> {
        self.file.patched_clip(self.variant, &self.patches)
    }
}

impl ClipHandle {
    /// All text encoders of these files.
    pub fn of(files: &[Arc<ModelFile>]) -> Result<Self, NodeError> {
        let mut parts = Vec::new();
        for file in files {
            let variants = file.clip_variants()?;
            parts.extend(variants.into_iter().map(|variant| ClipPart {
                file: file.clone(),
                variant,
                patches: Patches::default(),
            }));
        }
        parts.sort_by_key(|part| part.variant);
        Ok(Self { parts, layer: None })
    }

    /// The family that the encoders are of together.
    pub fn kind(&self) -> Result<TextKind, NodeError> {
        let variants: Vec<_> = self.parts.iter().map(|part| part.variant).collect();
        TextKind::of(&variants).ok_or_else(|| {
            let names: Vec<_> = variants.iter().map(|v| v.key()).collect();
            let what = match names.is_empty() {
                true => "the model file holds no text encoder; load one with CLIPLoader".to_owned(),
                false => format!("no model family has the text encoders {}", names.join(" and ")),
            };
            NodeError::failed("ValueError", what)
        })
    }
}

/// What travels on a `VAE` link.
#[derive(Clone)]
pub struct VaeHandle {
    /// The file that holds the autoencoder, or a tiny one's decoder.
    pub file: Arc<ModelFile>,
    /// What a tiny autoencoder needs besides.
    pub tiny: Option<TinyVae>,
}

impl VaeHandle {
    /// The autoencoder in a file.
    pub fn new(file: Arc<ModelFile>) -> Self {
        Self { file, tiny: None }
    }

    /// The autoencoder, loaded.
    pub fn open(&self) -> Result<Arc<dyn Autoencoder>, ModelError> {
        match &self.tiny {
            Some(tiny) => Ok(Arc::new(tiny.open(&self.file)?)),
            None => Ok(self.file.vae()?),
        }
    }
}

impl From<ModelError> for NodeError {
    fn from(e: ModelError) -> Self {
        let kind = if e.is_out_of_memory() { "OutOfMemoryError" } else { "ModelError" };
        NodeError::failed(kind, e)
    }
}

fn model_source(services: &Services, folder: &str, name: &str) -> Result<ModelSource, NodeError> {
    let path =
        services.folders.model_path(folder, name).map_err(|e| NodeError::failed("FileNotFoundError", e))?;
    Ok(match path {
        ModelPath::File(path) => ModelSource::File(path),
        ModelPath::Embedded { name, bytes } => ModelSource::Embedded { name, bytes },
    })
}

pub(super) fn model_file(services: &Services, folder: &str, name: &str) -> Result<Arc<ModelFile>, NodeError> {
    Ok(services.models.file(model_source(services, folder, name)?))
}

/// The loaders.
pub fn nodes() -> Vec<Box<dyn Node>> {
    vec![
        Box::new(CheckpointLoaderSimple),
        Box::new(VaeLoader),
        Box::new(UnetLoader),
        Box::new(ClipLoader),
        Box::new(DualClipLoader),
    ]
}

/// `CheckpointLoaderSimple`.
pub struct CheckpointLoaderSimple;

impl Node for CheckpointLoaderSimple {
    fn schema(&self) -> Schema {
        Schema::new("CheckpointLoaderSimple", "loaders")
            .display("Load Checkpoint")
            .describe("Loads a checkpoint file: diffusion model, text encoder and VAE.")
            .input(Input::model_file("ckpt_name", "checkpoints"))
            .output("MODEL")
            .output("CLIP")
            .output("VAE")
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let file = model_file(ctx.services, "checkpoints", inputs.string("ckpt_name")?)?;
        let model = SdModel::new(file.clone())?;
        let clip = ClipHandle::of(std::slice::from_ref(&file))?;
        Ok(NodeOutput::many(vec![
            Value::object("MODEL", ModelHandle(Arc::new(model))),
            Value::object("CLIP", clip),
            Value::object("VAE", VaeHandle::new(file)),
        ]))
    }
}

/// `VAELoader`.
pub struct VaeLoader;

impl Node for VaeLoader {
    fn schema(&self) -> Schema {
        Schema::new("VAELoader", "loaders")
            .display("Load VAE")
            .describe("Loads a separate VAE file.")
            .input(Input::files("vae_name", FileList::Vaes).bare())
            .output("VAE")
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let name = inputs.string("vae_name")?;
        let vae = match tiny_vae::named(ctx.services, name) {
            Some(tiny) => tiny?,
            None => VaeHandle::new(model_file(ctx.services, "vae", name)?),
        };
        vae.open()?;
        Ok(NodeOutput::one(Value::object("VAE", vae)))
    }
}

/// Precisions of `UNETLoader`, as ComfyUI names them. The fast one differs in speed only.
const WEIGHT_TYPES: [(&str, Precision); 4] = [
    ("default", Precision::Stored),
    ("fp8_e4m3fn", Precision::F8E4M3),
    ("fp8_e4m3fn_fast", Precision::F8E4M3),
    ("fp8_e5m2", Precision::F8E5M2),
];

/// `UNETLoader`.
pub struct UnetLoader;

impl Node for UnetLoader {
    fn schema(&self) -> Schema {
        Schema::new("UNETLoader", "advanced/loaders")
            .display("Load Diffusion Model")
            .describe("Loads a diffusion model alone; text encoder and VAE come from other loaders.")
            .input(Input::model_file("unet_name", "diffusion_models").bare())
            .input(Input::combo("weight_dtype", &WEIGHT_TYPES.map(|(name, _)| name)).bare())
            .output("MODEL")
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let source = model_source(ctx.services, "diffusion_models", inputs.string("unet_name")?)?;
        let wanted = inputs.string("weight_dtype")?;
        let precision = WEIGHT_TYPES.iter().find(|(name, _)| *name == wanted).map(|(_, p)| *p);
        let file = ctx.services.models.file_in(source, precision.unwrap_or_default());
        let model = SdModel::new(file)?;
        Ok(NodeOutput::one(Value::object("MODEL", ModelHandle(Arc::new(model)))))
    }
}

/// The input `device`: where text encoders run is the server's choice here.
fn device_input() -> Input {
    Input::combo("device", &["default", "cpu"]).opt("advanced", true).optional()
}

/// The encoders of these files as one `CLIP`; `runs` is the only `type` that this version knows.
fn clip_of(ctx: &NodeCtx<'_>, inputs: &Inputs, names: &[&str], runs: &str) -> Result<NodeOutput, NodeError> {
    let kind = inputs.string("type")?;
    if kind != runs {
        let what = format!("is {kind}, a family that this version does not run; it runs {runs}");
        return Err(NodeError::input("type", &what));
    }
    let files = names.iter().map(|name| model_file(ctx.services, "text_encoders", inputs.string(name)?));
    let files = files.collect::<Result<Vec<_>, _>>()?;
    for file in &files {
        if file.clip_variants()?.is_empty() {
            return Err(file.is_not("a text encoder").into());
        }
    }
    let clip = ClipHandle::of(&files)?;
    clip.kind()?;
    Ok(NodeOutput::one(Value::object("CLIP", clip)))
}

/// `CLIPLoader`.
pub struct ClipLoader;

impl Node for ClipLoader {
    fn schema(&self) -> Schema {
        const TYPES: &[&str] = &[
            "stable_diffusion",
            "stable_cascade",
            "sd3",
            "stable_audio",
            "mochi",
            "ltxv",
            "pixart",
            "cosmos",
            "lumina2",
            "wan",
            "hidream",
            "chroma",
            "ace",
            "omnigen2",
            "qwen_image",
            "hunyuan_image",
        ];
        Schema::new("CLIPLoader", "advanced/loaders")
            .display("Load CLIP")
            .describe("Loads one text encoder: CLIP-L for SD 1.x, OpenCLIP-H for 2.x, OpenCLIP-bigG for the refiner.")
            .input(Input::model_file("clip_name", "text_encoders").bare())
            .input(Input::combo("type", TYPES).bare())
            .input(device_input())
            .output("CLIP")
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        clip_of(ctx, inputs, &["clip_name"], "stable_diffusion")
    }
}

/// `DualCLIPLoader`.
pub struct DualClipLoader;

impl Node for DualClipLoader {
    fn schema(&self) -> Schema {
        const TYPES: &[&str] = &["sdxl", "sd3", "flux", "hunyuan_video", "hidream", "hunyuan_image"];
        Schema::new("DualCLIPLoader", "advanced/loaders")
            .describe("Loads the two text encoders of SDXL, CLIP-L and OpenCLIP-bigG, in any order.")
            .input(Input::model_file("clip_name1", "text_encoders").bare())
            .input(Input::model_file("clip_name2", "text_encoders").bare())
            .input(Input::combo("type", TYPES).bare())
            .input(device_input())
            .output("CLIP")
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        clip_of(ctx, inputs, &["clip_name1", "clip_name2"], "sdxl")
    }
}
