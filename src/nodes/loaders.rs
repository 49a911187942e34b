//! Loaders: checkpoint and VAE files to handles on links.

use std::sync::Arc;

use super::sd_model::SdModel;
use super::{Inputs, Node, NodeCtx, NodeError, NodeOutput, Schema, Services, Value};
use crate::diffusion::ModelHandle;
use crate::files::ModelPath;
use crate::graph::Input;
use crate::models::{ModelError, ModelFile, ModelSource};

/// What travels on a `CLIP` link.
#[derive(Clone)]
pub struct ClipHandle {
    /// The file that holds the encoder.
    pub file: Arc<ModelFile>,
    /// Layers left out at the end ("clip skip").
    pub skip_last: usize,
}

/// What travels on a `VAE` link.
#[derive(Clone)]
pub struct VaeHandle {
    /// The file that holds the autoencoder.
    pub file: Arc<ModelFile>,
}

impl From<ModelError> for NodeError {
    fn from(e: ModelError) -> Self {
        let kind = if e.is_out_of_memory() { "OutOfMemoryError" } else { "ModelError" };
        NodeError::failed(kind, e)
    }
}

fn model_file(services: &Services, folder: &str, name: &str) -> Result<Arc<ModelFile>, NodeError> {
    let path =
        services.folders.model_path(folder, name).map_err(|e| NodeError::failed("FileNotFoundError", e))?;
    let source = match path {
        ModelPath::File(path) => ModelSource::File(path),
        ModelPath::Embedded { name, bytes } => ModelSource::Embedded { name, bytes },
    };
    Ok(services.models.file(source))
}

/// The loaders.
pub fn nodes() -> Vec<Box<dyn Node>> {
    vec![Box::new(CheckpointLoaderSimple), Box::new(VaeLoader)]
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
        let clip = ClipHandle { file: file.clone(), skip_last: 0 };
        Ok(NodeOutput::many(vec![
            Value::object("MODEL", ModelHandle(Arc::new(model))),
            Value::object("CLIP", clip),
            Value::object("VAE", VaeHandle { file }),
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
            .input(Input::model_file("vae_name", "vae"))
            .output("VAE")
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let file = model_file(ctx.services, "vae", inputs.string("vae_name")?)?;
        file.vae()?;
        Ok(NodeOutput::one(Value::object("VAE", VaeHandle { file })))
    }
}
