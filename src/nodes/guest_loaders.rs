//! Loaders of model files that no node of kiln uses yet.
//!
//! They open their files, check that these are what they should be, and hand
//! them on. ComfyUI's own page (up to 1.27, at least) makes a table of loader
//! classes at start and can't create *any* loader node while one of them is
//! missing, these three among them.

use std::sync::Arc;

use super::loaders::CheckpointLoaderSimple;
use super::{Inputs, Node, NodeCtx, NodeError, NodeOutput, Schema, Value};
use crate::files::ModelPath;
use crate::graph::Input;
use crate::weights::WeightsFile;

/// The loaders.
pub fn nodes() -> Vec<Box<dyn Node>> {
    vec![Box::new(ImageOnlyCheckpointLoader), Box::new(StyleModelLoader), Box::new(GligenLoader)]
}

/// Opens a model file that must hold a tensor whose name contains `mark`.
fn open(ctx: &NodeCtx<'_>, folder: &str, name: &str, mark: &str) -> Result<Arc<WeightsFile>, NodeError> {
    let path = ctx.services.folders.model_path(folder, name);
    let file = match path.map_err(|e| NodeError::failed("FileNotFoundError", e))? {
        ModelPath::File(path) => WeightsFile::open(&path),
        ModelPath::Embedded { name, bytes } => WeightsFile::from_static(bytes, name),
    };
    let file = file.map_err(|e| NodeError::failed("ModelError", e))?;
    if !file.names().any(|tensor| tensor.contains(mark)) {
        let message = format!("{name} in {folder} holds no tensor '{mark}': it is no such model");
        return Err(NodeError::failed("ModelError", message));
    }
    Ok(file)
}

/// `ImageOnlyCheckpointLoader`: a checkpoint's diffusion model and VAE. The image encoder in the middle is null,
/// as in ComfyUI for a checkpoint that has none.
pub struct ImageOnlyCheckpointLoader;

impl Node for ImageOnlyCheckpointLoader {
    fn schema(&self) -> Schema {
        Schema::new("ImageOnlyCheckpointLoader", "loaders/video_models")
            .display("Image Only Checkpoint Loader (img2vid model)")
            .module("comfy_extras.nodes_video_model")
            .describe("Loads the diffusion model and VAE of a checkpoint without text encoder.")
            .input(Input::model_file("ckpt_name", "checkpoints"))
            .output("MODEL")
            .output("CLIP_VISION")
            .output("VAE")
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let mut output = CheckpointLoaderSimple.execute(ctx, inputs)?;
        if let Some(clip) = output.values.get_mut(1) {
            *clip = Value::Json(serde_json::Value::Null);
        }
        Ok(output)
    }
}

/// `StyleModelLoader`.
pub struct StyleModelLoader;

impl Node for StyleModelLoader {
    fn schema(&self) -> Schema {
        Schema::new("StyleModelLoader", "loaders")
            .display("Load Style Model")
            .describe("Opens a style model's file; nothing here applies it yet.")
            .input(Input::model_file("style_model_name", "style_models").bare())
            .output("STYLE_MODEL")
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let file = open(ctx, "style_models", inputs.string("style_model_name")?, "style_embedding")?;
        Ok(NodeOutput::one(Value::shared("STYLE_MODEL", file)))
    }
}

/// `GLIGENLoader`.
pub struct GligenLoader;

impl Node for GligenLoader {
    fn schema(&self) -> Schema {
        Schema::new("GLIGENLoader", "loaders")
            .display("GLIGENLoader")
            .describe("Opens a GLIGEN file; nothing here applies it yet.")
            .input(Input::model_file("gligen_name", "gligen").bare())
            .output("GLIGEN")
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let file = open(ctx, "gligen", inputs.string("gligen_name")?, "position_net")?;
        Ok(NodeOutput::one(Value::shared("GLIGEN", file)))
    }
}

#[cfg(test)]
mod tests {
    use crate::nodes::registry;

    #[test]
    fn the_page_finds_its_loaders() {
        let known: Vec<&str> = registry().iter().map(|node| node.schema().class).collect();
        for class in
            ["CheckpointLoaderSimple", "ImageOnlyCheckpointLoader", "StyleModelLoader", "GLIGENLoader"]
        {
            assert!(known.contains(&class), "{class}");
        }
    }
}
