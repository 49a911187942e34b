//! Enlarging pictures by a network, in tiles.

use std::sync::Arc;

use super::loaders::model_file;
use super::{Inputs, Node, NodeCtx, NodeError, NodeOutput, Schema, Value};
use crate::graph::Input;
use crate::models::upscale::Upscaler;
use crate::models::vae::tiled::{self, Scale, Tiling};
use crate::models::{ModelError, ModelFile};
use crate::tensor::HostTensor;

const MODULE: &str = "comfy_extras.nodes_upscale_model";
/// Tiles in pixels of the input.
const TILING: Tiling = Tiling { tile: 512, overlap: 32 };
/// Smaller tiles are not tried when memory is short.
const SMALLEST_TILE: usize = 128;

/// What travels on an `UPSCALE_MODEL` link.
pub struct UpscaleHandle(Arc<ModelFile>);

/// The upscaling nodes.
pub(super) fn nodes() -> Vec<Box<dyn Node>> {
    vec![Box::new(UpscaleModelLoader), Box::new(ImageUpscaleWithModel)]
}

fn flags(schema: Schema) -> Schema {
    schema.flag("deprecated", false).flag("experimental", false).flag("api_node", false)
}

/// `UpscaleModelLoader`.
pub struct UpscaleModelLoader;

impl Node for UpscaleModelLoader {
    fn schema(&self) -> Schema {
        let schema = Schema::new("UpscaleModelLoader", "loaders")
            .display("Load Upscale Model")
            .module(MODULE)
            .describe("Loads a network that enlarges pictures: ESRGAN, RealESRGAN or a compact one.")
            .input(Input::model_file("model_name", "upscale_models"))
            .output("UPSCALE_MODEL");
        flags(schema)
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let file = model_file(ctx.services, "upscale_models", inputs.string("model_name")?)?;
        file.network::<Upscaler>()?;
        Ok(NodeOutput::one(Value::object("UPSCALE_MODEL", UpscaleHandle(file))))
    }
}

/// `ImageUpscaleWithModel`.
pub struct ImageUpscaleWithModel;

impl Node for ImageUpscaleWithModel {
    fn schema(&self) -> Schema {
        let schema = Schema::new("ImageUpscaleWithModel", "image/upscaling")
            .display("Upscale Image (using Model)")
            .module(MODULE)
            .describe("Enlarges pictures by a network, as many times as the network was trained for.")
            .input(Input::link("upscale_model", "UPSCALE_MODEL"))
            .input(Input::link("image", "IMAGE"))
            .output("IMAGE");
        flags(schema)
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let image = inputs.object::<HostTensor>("image")?;
        let upscaler = inputs.object::<UpscaleHandle>("upscale_model")?.0.network::<Upscaler>()?;
        let (b, h, w, c) = (image.dim(0), image.dim(1), image.dim(2), image.dim(3));
        if image.shape().len() != 4 || image.is_empty() {
            return Err(NodeError::input(
                "image",
                &format!("has shape {:?}; it must be a picture", image.shape()),
            ));
        }
        let planes = swapped(&image, (b, h * w, c), &[b, c, h, w]);
        let out = in_tiles(ctx, &upscaler, &planes)?;
        let (c, h, w) = (out.dim(1), out.dim(2), out.dim(3));
        let picture = swapped(&out, (b, c, h * w), &[b, h, w, c]).map(|v| v.clamp(0.0, 1.0));
        Ok(NodeOutput::one(Value::object("IMAGE", picture)))
    }
}

/// `[outer, a, b]` to `[outer, b, a]`, as `shape`.
fn swapped(x: &HostTensor, (_, a, b): (usize, usize, usize), shape: &[usize]) -> HostTensor {
    HostTensor::from_fn(shape, |i| {
        let (n, k, j) = (i / (a * b), i / a % b, i % a);
        x.data()[(n * a + j) * b + k]
    })
}

/// Tiles become smaller as long as memory runs out.
fn in_tiles(ctx: &NodeCtx<'_>, upscaler: &Upscaler, x: &HostTensor) -> Result<HostTensor, NodeError> {
    let mut tiling = TILING;
    loop {
        let mut is_interrupted = false;
        let progress = |done: usize, total: usize| {
            ctx.progress(done as u64, total as u64, None).map_err(|_| {
                is_interrupted = true;
                ModelError::File("interrupted".into())
            })
        };
        let scale = Scale::Up(upscaler.scale());
        let result = tiled::run_once(x, tiling, scale, |tile| upscaler.forward(tile), progress);
        match result {
            _ if is_interrupted => return Err(NodeError::Interrupted),
            Err(e) if e.is_out_of_memory() && tiling.tile / 2 >= SMALLEST_TILE => {
                tiling.tile /= 2;
                tracing::warn!("{e}: enlarging in tiles of {} pixels", tiling.tile);
                ctx.services.models.trim();
            }
            result => return Ok(result?),
        }
    }
}
