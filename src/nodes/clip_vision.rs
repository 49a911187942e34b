//! Pictures as conditioning: CLIP's picture encoder.

use std::sync::Arc;

use super::loaders::model_file;
use super::{Inputs, Node, NodeCtx, NodeError, NodeOutput, Schema, Value};
use crate::graph::Input;
use crate::image::resample::{self, Method, ResampleError, Resize};
use crate::models::ModelFile;
use crate::models::clip_vision::ClipVision;
use crate::tensor::HostTensor;

/// Mean and standard deviation of the pictures that CLIP was trained on, a channel each.
const MEAN: [f32; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
const STD: [f32; 3] = [0.268_629_54, 0.261_302_6, 0.275_777_1];

/// What travels on a `CLIP_VISION` link.
pub struct VisionHandle(Arc<ModelFile>);

impl VisionHandle {
    /// The encoder in a file.
    ///
    /// # Errors
    /// If there is none.
    pub fn of(file: Arc<ModelFile>) -> Result<Self, NodeError> {
        file.network::<ClipVision>()?;
        Ok(Self(file))
    }
}

/// The nodes.
pub(super) fn nodes() -> Vec<Box<dyn Node>> {
    vec![Box::new(ClipVisionLoader), Box::new(ClipVisionEncode)]
}

/// `CLIPVisionLoader`.
pub struct ClipVisionLoader;

impl Node for ClipVisionLoader {
    fn schema(&self) -> Schema {
        Schema::new("CLIPVisionLoader", "loaders")
            .display("Load CLIP Vision")
            .describe("Loads a picture encoder: CLIP's ViT-L, or OpenCLIP's ViT-H or ViT-bigG.")
            .input(Input::model_file("clip_name", "clip_vision").bare())
            .output("CLIP_VISION")
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let file = model_file(ctx.services, "clip_vision", inputs.string("clip_name")?)?;
        Ok(NodeOutput::one(Value::object("CLIP_VISION", VisionHandle::of(file)?)))
    }
}

/// `CLIPVisionEncode`.
pub struct ClipVisionEncode;

impl Node for ClipVisionEncode {
    fn schema(&self) -> Schema {
        Schema::new("CLIPVisionEncode", "conditioning")
            .display("CLIP Vision Encode")
            .describe("Encodes a picture, whole or the square in its centre.")
            .input(Input::link("clip_vision", "CLIP_VISION").bare())
            .input(Input::link("image", "IMAGE").bare())
            .input(Input::combo("crop", &["center", "none"]).bare())
            .output("CLIP_VISION_OUTPUT")
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let image = inputs.object::<HostTensor>("image")?;
        let encoder = inputs.object::<VisionHandle>("clip_vision")?.0.network::<ClipVision>()?;
        if image.shape().len() != 4 || image.is_empty() || image.dim(3) < 3 {
            let what = format!("has shape {:?}; it must be a picture", image.shape());
            return Err(NodeError::input("image", &what));
        }
        let is_cropped = inputs.string("crop")? == "center";
        let prepared = prepared(&image, encoder.side(), is_cropped)
            .map_err(|e| NodeError::input("image", &format!("can't be resized: {e}")))?;
        Ok(NodeOutput::one(Value::object("CLIP_VISION_OUTPUT", encoder.encode(&prepared)?)))
    }
}

/// Pictures `[B, H, W, C]` as the encoder takes them: `[B, 3, side, side]`, normalised.
fn prepared(image: &HostTensor, side: usize, is_cropped: bool) -> Result<HostTensor, ResampleError> {
    let (b, h, w, c) = (image.dim(0), image.dim(1), image.dim(2), image.dim(3));
    let planes = HostTensor::from_fn(&[b, 3, h, w], |i| {
        let (picture, channel, place) = (i / (3 * h * w), i / (h * w) % 3, i % (h * w));
        image.data()[(picture * h * w + place) * c + channel]
    });
    let resized = match (h == side && w == side, is_cropped) {
        (true, _) => planes,
        (false, true) => {
            let scale = side as f64 / h.min(w) as f64;
            let scaled = |length: usize| (scale * length as f64).round_ties_even() as usize;
            resample::upscale(&planes, Resize::to(scaled(w), scaled(h), Method::BicubicAntialias))?
        }
        (false, false) => resample::upscale(&planes, Resize::to(side, side, Method::BicubicAntialias))?,
    };
    let (rows, columns) = (resized.dim(2), resized.dim(3));
    let (top, left) = (rows.saturating_sub(side) / 2, columns.saturating_sub(side) / 2);
    Ok(HostTensor::from_fn(&[b, 3, side, side], |i| {
        let (plane, y, x) = (i / (side * side), i / side % side, i % side);
        let value = resized.data()[(plane * rows + top + y) * columns + left + x];
        let rounded = (255.0 * value).clamp(0.0, 255.0).round_ties_even() / 255.0;
        (rounded - MEAN[plane % 3]) / STD[plane % 3]
    }))
}

#[cfg(test)]
#[path = "clip_vision_tests.rs"]
mod tests;
