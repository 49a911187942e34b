//! Pictures: making, resizing, batches, outpainting frames.

use std::sync::Arc;

use super::latent::{list_items, list_size};
use super::shapes::{
    self, MAX_SIDE, concat_batch, filled, image, image_output, newer, newer_unnamed, repeat_batch,
    resize_images, round, tensor,
};
use super::{Inputs, Node, NodeCtx, NodeError, NodeOutput, Schema, Value};
use crate::graph::Input;
use crate::image::{Crop, Method, Resize};
use crate::tensor::HostTensor;

const IMAGES_MODULE: &str = "comfy_extras.nodes_images";

/// The picture nodes that make, resize and batch.
pub(super) fn nodes() -> Vec<Box<dyn Node>> {
    vec![
        Box::new(EmptyImage),
        Box::new(ImageScale),
        Box::new(ImageScaleBy),
        Box::new(ImageScaleToTotalPixels),
        Box::new(ImageScaleToMaxDimension),
        Box::new(ImageInvert),
        Box::new(ImageBatch),
        Box::new(ImageFromBatch),
        Box::new(RepeatImageBatch),
        Box::new(RebatchImages),
        Box::new(ImagePadForOutpaint),
        Box::new(GetImageSize),
    ]
}

pub(super) fn bare(name: &'static str) -> Input {
    Input::link(name, "IMAGE").bare()
}

/// A length in pixels.
pub(super) fn pixels(name: &'static str, default: i64, min: i64) -> Input {
    Input::int(name, default, min, MAX_SIDE).opt("step", 1)
}

const METHODS: [&str; 5] = ["nearest-exact", "bilinear", "area", "bicubic", "lanczos"];

/// `EmptyImage`.
pub struct EmptyImage;

impl Node for EmptyImage {
    fn schema(&self) -> Schema {
        Schema::new("EmptyImage", "image")
            .describe("Pictures of one colour.")
            .input(pixels("width", 512, 1))
            .input(pixels("height", 512, 1))
            .input(Input::int("batch_size", 1, 1, 4096))
            .input(Input::int("color", 0, 0, 0xff_ffff).opt("step", 1).opt("display", "color"))
            .output("IMAGE")
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let shape = [inputs.size("batch_size")?, inputs.size("height")?, inputs.size("width")?, 3];
        let mut out = filled(&shape, 0.0)?;
        let color = inputs.int("color")?;
        let channel = |shift: u32| (f64::from((color >> shift) as u8) / 255.0) as f32;
        let pixel = [channel(16), channel(8), channel(0)];
        out.data_mut().chunks_exact_mut(3).for_each(|p| p.copy_from_slice(&pixel));
        image_output(out)
    }
}

/// `ImageScale`.
pub struct ImageScale;

impl Node for ImageScale {
    fn schema(&self) -> Schema {
        Schema::new("ImageScale", "image/upscaling")
            .display("Upscale Image")
            .describe("Resizes pictures; 0 for one side keeps the aspect ratio.")
            .input(bare("image"))
            .input(Input::combo("upscale_method", &METHODS).bare())
            .input(pixels("width", 512, 0))
            .input(pixels("height", 512, 0))
            .input(Input::combo("crop", &["disabled", "center"]).bare())
            .output("IMAGE")
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (x, [_, h, w, _]) = image(inputs, "image")?;
        let (mut width, mut height) = (inputs.size("width")?, inputs.size("height")?);
        if width == 0 && height == 0 {
            return Ok(NodeOutput::one(Value::shared("IMAGE", x)));
        }
        if width == 0 {
            width = round(w as f64 * height as f64 / h as f64).max(1);
        } else if height == 0 {
            height = round(h as f64 * width as f64 / w as f64).max(1);
        }
        let method = shapes::method(inputs, "upscale_method")?;
        image_output(resize_images(&x, Resize { width, height, method, crop: shapes::crop(inputs)? })?)
    }
}

/// Resizes the input `image` without cropping.
fn scale_to(
    inputs: &Inputs,
    x: &Arc<HostTensor>,
    width: usize,
    height: usize,
) -> Result<NodeOutput, NodeError> {
    let method = shapes::method(inputs, "upscale_method")?;
    image_output(resize_images(x, Resize::to(width, height, method))?)
}

/// `ImageScaleBy`.
pub struct ImageScaleBy;

impl Node for ImageScaleBy {
    fn schema(&self) -> Schema {
        Schema::new("ImageScaleBy", "image/upscaling")
            .display("Upscale Image By")
            .describe("Resizes pictures by a factor.")
            .input(bare("image"))
            .input(Input::combo("upscale_method", &METHODS).bare())
            .input(Input::float("scale_by", 1.0, 0.01, 8.0).opt("step", 0.01))
            .output("IMAGE")
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (x, [_, h, w, _]) = image(inputs, "image")?;
        let factor = inputs.float("scale_by")?;
        scale_to(inputs, &x, round(w as f64 * factor), round(h as f64 * factor))
    }
}

/// `ImageScaleToTotalPixels`.
pub struct ImageScaleToTotalPixels;

impl Node for ImageScaleToTotalPixels {
    fn schema(&self) -> Schema {
        let schema = Schema::new("ImageScaleToTotalPixels", "image/upscaling")
            .module("comfy_extras.nodes_post_processing")
            .describe("Resizes pictures to a number of megapixels (of 1024² pixels).")
            .input(Input::link("image", "IMAGE"))
            .input(Input::combo("upscale_method", &METHODS).opt("multiselect", false))
            .input(Input::float("megapixels", 1.0, 0.01, 16.0).opt("step", 0.01))
            .output("IMAGE");
        newer_unnamed(schema, false)
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (x, [_, h, w, _]) = image(inputs, "image")?;
        let total = (inputs.float("megapixels")? * 1024.0 * 1024.0).trunc();
        let factor = (total / (w as f64 * h as f64)).sqrt();
        scale_to(inputs, &x, round(w as f64 * factor), round(h as f64 * factor))
    }
}

/// `ImageScaleToMaxDimension`.
pub struct ImageScaleToMaxDimension;

impl Node for ImageScaleToMaxDimension {
    fn schema(&self) -> Schema {
        // The reference lists bilinear twice; clients compare lists.
        let methods = ["area", "lanczos", "bilinear", "nearest-exact", "bilinear", "bicubic"];
        Schema::new("ImageScaleToMaxDimension", "image/upscaling")
            .module(IMAGES_MODULE)
            .describe("Resizes pictures so that the longer side has a given length.")
            .input(bare("image"))
            .input(Input::combo("upscale_method", &methods).bare())
            .input(pixels("largest_size", 512, 0))
            .output("IMAGE")
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (x, [_, h, w, _]) = image(inputs, "image")?;
        let longer = inputs.size("largest_size")?;
        let shorter = |short: usize, long: usize| round(short as f64 / long as f64 * longer as f64);
        match w.cmp(&h) {
            std::cmp::Ordering::Less => scale_to(inputs, &x, shorter(w, h), longer),
            std::cmp::Ordering::Greater => scale_to(inputs, &x, longer, shorter(h, w)),
            std::cmp::Ordering::Equal => scale_to(inputs, &x, longer, longer),
        }
    }
}

/// `ImageInvert`.
pub struct ImageInvert;

impl Node for ImageInvert {
    fn schema(&self) -> Schema {
        Schema::new("ImageInvert", "image")
            .display("Invert Image")
            .describe("The negative of pictures.")
            .input(bare("image"))
            .output("IMAGE")
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        image_output(inputs.object::<HostTensor>("image")?.map(|v| 1.0 - v))
    }
}

/// With `channels` channels: extra ones are opaque alpha, superfluous ones go.
pub(super) fn with_channels(x: &HostTensor, channels: usize) -> Result<HostTensor, NodeError> {
    let (b, h, w, c) = (x.dim(0), x.dim(1), x.dim(2), x.dim(3));
    if c == channels {
        return Ok(x.clone());
    }
    shapes::check_size(&[b, h, w, channels])?;
    let pixels = x.data().chunks_exact(c.max(1));
    let data = pixels.flat_map(|p| (0..channels).map(|i| p.get(i).copied().unwrap_or(1.0)));
    tensor(&[b, h, w, channels], data.collect())
}

/// `ImageBatch`.
pub struct ImageBatch;

impl Node for ImageBatch {
    fn schema(&self) -> Schema {
        Schema::new("ImageBatch", "image")
            .display("Batch Images")
            .describe("Joins two batches of pictures; the second is resized to the first.")
            .input(bare("image1"))
            .input(bare("image2"))
            .output("IMAGE")
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (first, [_, h, w, c1]) = image(inputs, "image1")?;
        let (second, [_, _, _, c2]) = image(inputs, "image2")?;
        let channels = c1.max(c2);
        let first = with_channels(&first, channels)?;
        let mut second = with_channels(&second, channels)?;
        if (second.dim(1), second.dim(2)) != (h, w) {
            let to = Resize { width: w, height: h, method: Method::Bilinear, crop: Crop::Center };
            second = resize_images(&second, to)?;
        }
        image_output(concat_batch(&[&first, &second])?)
    }
}

/// `ImageFromBatch`.
pub struct ImageFromBatch;

impl Node for ImageFromBatch {
    fn schema(&self) -> Schema {
        Schema::new("ImageFromBatch", "image/batch")
            .module(IMAGES_MODULE)
            .describe("Takes some pictures out of a batch.")
            .input(bare("image"))
            .input(Input::int("batch_index", 0, 0, 4095))
            .input(Input::int("length", 1, 1, 4096))
            .output("IMAGE")
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (x, [b, ..]) = image(inputs, "image")?;
        let start = inputs.size("batch_index")?.min(b - 1);
        image_output(x.rows(start, inputs.size("length")?.min(b - start)))
    }
}

/// `RepeatImageBatch`.
pub struct RepeatImageBatch;

impl Node for RepeatImageBatch {
    fn schema(&self) -> Schema {
        Schema::new("RepeatImageBatch", "image/batch")
            .module(IMAGES_MODULE)
            .describe("Repeats a batch of pictures.")
            .input(bare("image"))
            .input(Input::int("amount", 1, 1, 4096))
            .output("IMAGE")
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (x, _) = image(inputs, "image")?;
        image_output(repeat_batch(&x, inputs.size("amount")?)?)
    }
}

/// `RebatchImages`.
pub struct RebatchImages;

impl Node for RebatchImages {
    fn schema(&self) -> Schema {
        let mut schema = Schema::new("RebatchImages", "image/batch")
            .display("Rebatch Images")
            .module("comfy_extras.nodes_rebatch")
            .describe("Re-cuts a list of pictures into batches of a given size.")
            .input(Input::link("images", "IMAGE"))
            .input(Input::int("batch_size", 1, 1, 4096))
            .output("IMAGE")
            .list();
        schema.input_is_list = true;
        newer(schema, false)
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let size = list_size(inputs, "batch_size")?;
        let mut singles = Vec::new();
        for item in list_items(inputs, "images") {
            let x = item
                .downcast::<HostTensor>()
                .ok_or_else(|| NodeError::input("images", "holds something else"))?;
            singles.extend((0..x.dim(0)).map(|i| x.rows(i, 1)));
        }
        let batches = singles.chunks(size).map(|chunk| concat_batch(&chunk.iter().collect::<Vec<_>>()));
        let values = batches.map(|batch| Ok(Value::object("IMAGE", batch?)));
        Ok(NodeOutput::one(Value::List(values.collect::<Result<_, NodeError>>()?)))
    }
}

/// `ImagePadForOutpaint`.
pub struct ImagePadForOutpaint;

impl Node for ImagePadForOutpaint {
    fn schema(&self) -> Schema {
        let border = |name| Input::int(name, 0, 0, MAX_SIDE).opt("step", 8);
        Schema::new("ImagePadForOutpaint", "image")
            .display("Pad Image for Outpainting")
            .describe("Puts a grey frame around pictures and gives its mask, soft towards the picture.")
            .input(bare("image"))
            .input(border("left"))
            .input(border("top"))
            .input(border("right"))
            .input(border("bottom"))
            .input(pixels("feathering", 40, 0))
            .output("IMAGE")
            .output("MASK")
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (x, [b, h, w, c]) = image(inputs, "image")?;
        let (left, top) = (inputs.size("left")?, inputs.size("top")?);
        let (right, bottom) = (inputs.size("right")?, inputs.size("bottom")?);
        let (new_h, new_w) = (h + top + bottom, w + left + right);
        let mut picture = filled(&[b, new_h, new_w, c], 0.5)?;
        for (n, row) in x.data().chunks_exact(w * c).enumerate() {
            let at = ((n / h * new_h + top + n % h) * new_w + left) * c;
            picture.data_mut()[at..at + w * c].copy_from_slice(row);
        }
        let mut mask = filled(&[1, new_h, new_w], 1.0)?;
        let feather = inputs.size("feathering")?;
        let is_soft = feather > 0 && feather * 2 < h && feather * 2 < w;
        for y in 0..h {
            for x in 0..w {
                // Distance to the nearest side that has been extended.
                let sides = [(top, y), (bottom, h - y), (left, x), (right, w - x)];
                let near = sides.iter().filter(|(border, _)| *border != 0).map(|&(_, d)| d).min();
                let value = match near {
                    Some(d) if is_soft && d < feather => ((feather - d) as f64 / feather as f64).powi(2),
                    _ => 0.0,
                };
                mask.data_mut()[(top + y) * new_w + left + x] = value as f32;
            }
        }
        Ok(NodeOutput::many(vec![Value::object("IMAGE", picture), Value::object("MASK", mask)]))
    }
}

/// `GetImageSize`.
pub struct GetImageSize;

impl Node for GetImageSize {
    fn schema(&self) -> Schema {
        Schema::new("GetImageSize", "image")
            .display("Get Image Size")
            .module(IMAGES_MODULE)
            .describe("Width, height and number of pictures.")
            .input(bare("image"))
            .input(Input::hidden("unique_id", "UNIQUE_ID"))
            .named_output("INT", "width")
            .named_output("INT", "height")
            .named_output("INT", "batch_size")
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (_, [b, h, w, _]) = image(inputs, "image")?;
        // Clients show it on the node, in exactly these words.
        ctx.sink.text(ctx.node_id, &format!("width: {w}, height: {h}\n batch size: {b}"));
        Ok(NodeOutput::many([w, h, b].map(|n| Value::Json(n.into())).into()))
    }
}
