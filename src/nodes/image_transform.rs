//! Pictures: cutting, turning, mirroring, joining, padding, compositing.

use super::image::{bare, pixels, with_channels};
use super::plane::{self, Paste, Planes, paste_masked, to_nchw, to_nhwc};
use super::shapes::{
    self, concat_batch, filled, image, image_output, mask, mask_opt, newer, repeat_to, resize_images,
    resize_masks, tensor,
};
use super::{Inputs, Node, NodeCtx, NodeError, NodeOutput, Schema, Value};
use crate::graph::Input;
use crate::image::{Method, Resize};
use crate::tensor::HostTensor;

const MODULE: &str = "comfy_extras.nodes_images";

/// The picture nodes that move pixels about.
pub(super) fn nodes() -> Vec<Box<dyn Node>> {
    vec![
        Box::new(ImageCrop),
        Box::new(ImageRotate),
        Box::new(ImageFlip),
        Box::new(ImageStitch),
        Box::new(ResizeAndPadImage),
        Box::new(ImageCompositeMasked),
        Box::new(JoinImageWithAlpha),
        Box::new(SplitImageWithAlpha),
    ]
}

/// `ImageCrop`.
pub struct ImageCrop;

impl Node for ImageCrop {
    fn schema(&self) -> Schema {
        Schema::new("ImageCrop", "image/transform")
            .display("Image Crop")
            .module(MODULE)
            .describe("Cuts a rectangle out of pictures.")
            .input(bare("image"))
            .input(pixels("width", 512, 1))
            .input(pixels("height", 512, 1))
            .input(pixels("x", 0, 0))
            .input(pixels("y", 0, 0))
            .output("IMAGE")
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (picture, [b, h, w, c]) = image(inputs, "image")?;
        let (x, y) = (inputs.size("x")?.min(w - 1), inputs.size("y")?.min(h - 1));
        let (width, height) = (inputs.size("width")?.clamp(1, w - x), inputs.size("height")?.clamp(1, h - y));
        let data = Planes::of_images([b, h, w, c]).crop(picture.data(), [y, x], [height, width]);
        image_output(tensor(&[b, height, width, c], data)?)
    }
}

/// `ImageRotate`.
pub struct ImageRotate;

impl Node for ImageRotate {
    fn schema(&self) -> Schema {
        Schema::new("ImageRotate", "image/transform")
            .module(MODULE)
            .describe("Turns pictures by quarter turns, clockwise.")
            .input(bare("image"))
            .input(Input::combo("rotation", &["none", "90 degrees", "180 degrees", "270 degrees"]).bare())
            .output("IMAGE")
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (x, dims) = image(inputs, "image")?;
        let quarters = plane::quarters(inputs.string("rotation")?);
        let (data, [h, w]) = Planes::of_images(dims).rotate(x.data(), quarters);
        image_output(tensor(&[dims[0], h, w, dims[3]], data)?)
    }
}

/// `ImageFlip`.
pub struct ImageFlip;

impl Node for ImageFlip {
    fn schema(&self) -> Schema {
        Schema::new("ImageFlip", "image/transform")
            .module(MODULE)
            .describe("Mirrors pictures.")
            .input(bare("image"))
            .input(Input::combo("flip_method", &["x-axis: vertically", "y-axis: horizontally"]).bare())
            .output("IMAGE")
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (x, dims) = image(inputs, "image")?;
        let vertically = inputs.string("flip_method")?.starts_with('x');
        image_output(tensor(&dims, Planes::of_images(dims).flip(x.data(), vertically))?)
    }
}

/// `ImageStitch`.
pub struct ImageStitch;

/// A colour of the spacing; grey ones also fill what sticks out.
fn named_color(name: &str) -> Result<[f32; 3], NodeError> {
    match name {
        "white" => Ok([1.0; 3]),
        "black" => Ok([0.0; 3]),
        "red" => Ok([1.0, 0.0, 0.0]),
        "green" => Ok([0.0, 1.0, 0.0]),
        "blue" => Ok([0.0, 0.0, 1.0]),
        other => Err(shapes::unknown("spacing_color", other)),
    }
}

/// The last picture repeated until there are `count`.
fn extend_last(x: &HostTensor, count: usize) -> Result<HostTensor, NodeError> {
    let batch = x.dim(0);
    if batch >= count {
        return Ok(x.clone());
    }
    concat_batch(&[x, &repeat_to(&x.rows(batch - 1, 1), count - batch)?])
}

/// In the middle of `h × w` pixels of one value.
fn centered(x: &HostTensor, h: usize, w: usize, value: f32) -> Result<HostTensor, NodeError> {
    let (b, old_h, old_w, c) = (x.dim(0), x.dim(1), x.dim(2), x.dim(3));
    if (old_h, old_w) == (h, w) {
        return Ok(x.clone());
    }
    let (top, left) = ((h - old_h) / 2, (w - old_w) / 2);
    let mut out = filled(&[b, h, w, c], value)?;
    for (n, row) in x.data().chunks_exact(old_w * c).enumerate() {
        let at = ((n / old_h * h + top + n % old_h) * w + left) * c;
        out.data_mut()[at..at + row.len()].copy_from_slice(row);
    }
    Ok(out)
}

/// Joins `[B, H, W, C]` tensors along the width, or along the height.
fn join(parts: &[&HostTensor], along_width: bool) -> Result<HostTensor, NodeError> {
    let Some(first) = parts.first() else { return Ok(HostTensor::default()) };
    let (b, c) = (first.dim(0), first.dim(3));
    let shape = if along_width {
        [b, first.dim(1), parts.iter().map(|p| p.dim(2)).sum(), c]
    } else {
        [b, parts.iter().map(|p| p.dim(1)).sum(), first.dim(2), c]
    };
    shapes::check_size(&shape)?;
    let (blocks, run): (usize, fn(&HostTensor) -> usize) =
        if along_width { (b * first.dim(1), |p| p.dim(2) * p.dim(3)) } else { (b, HostTensor::row_len) };
    let pieces = (0..blocks).flat_map(|i| parts.iter().map(move |p| &p.data()[i * run(p)..(i + 1) * run(p)]));
    tensor(&shape, pieces.flatten().copied().collect())
}

impl Node for ImageStitch {
    fn schema(&self) -> Schema {
        Schema::new("ImageStitch", "image/transform")
            .display("Image Stitch")
            .module(MODULE)
            .describe("Puts a second picture next to the first, with a coloured gap if wanted.")
            .input(bare("image1"))
            .input(Input::combo("direction", &["right", "down", "left", "up"]).opt("default", "right"))
            .input(Input::boolean("match_image_size").opt("default", true))
            .input(Input::int("spacing_width", 0, 0, 1024).opt("step", 2))
            .input(
                Input::combo("spacing_color", &["white", "black", "red", "green", "blue"])
                    .opt("default", "white"),
            )
            .input(bare("image2").optional())
            .output("IMAGE")
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (first, [b1, h1, w1, c1]) = image(inputs, "image1")?;
        if inputs.object_opt::<HostTensor>("image2")?.is_none() {
            return Ok(NodeOutput::one(Value::shared("IMAGE", first)));
        }
        let (second, [b2, h2, w2, c2]) = image(inputs, "image2")?;
        let direction = inputs.string("direction")?;
        let sideways = matches!(direction, "left" | "right");
        let color = named_color(inputs.string("spacing_color")?)?;
        let (count, channels) = (b1.max(b2), c1.max(c2));
        let mut first = extend_last(&first, count)?;
        let mut second = extend_last(&second, count)?;
        if inputs.boolean("match_image_size")? {
            let aspect = w2 as f64 / h2 as f64;
            let (width, height) = if sideways {
                ((h1 as f64 * aspect) as usize, h1)
            } else {
                (w1, (w1 as f64 / aspect) as usize)
            };
            second = resize_images(&second, Resize::to(width, height, Method::Lanczos))?;
        } else {
            let is_grey = color[0] == color[1] && color[1] == color[2];
            let fill = if is_grey { color[0] } else { 0.0 };
            let (h, w) = (h1.max(h2), w1.max(w2));
            let size = |x: &HostTensor| if sideways { (h, x.dim(2)) } else { (x.dim(1), w) };
            let ((fh, fw), (sh, sw)) = (size(&first), size(&second));
            (first, second) = (centered(&first, fh, fw, fill)?, centered(&second, sh, sw, fill)?);
        }
        let (first, second) = (with_channels(&first, channels)?, with_channels(&second, channels)?);
        let mut parts =
            if matches!(direction, "left" | "up") { vec![&second, &first] } else { vec![&first, &second] };
        let gap = inputs.size("spacing_width")?.next_multiple_of(2);
        let (gap_h, gap_w) = if sideways { (first.dim(1), gap) } else { (gap, first.dim(2)) };
        let spacing = HostTensor::from_fn(&[count, gap_h, gap_w, channels], |i| {
            color.get(i % channels).copied().unwrap_or(1.0)
        });
        if gap > 0 {
            parts.insert(1, &spacing);
        }
        image_output(join(&parts, sideways)?)
    }
}

/// `ResizeAndPadImage`.
pub struct ResizeAndPadImage;

impl Node for ResizeAndPadImage {
    fn schema(&self) -> Schema {
        let methods = ["area", "bicubic", "nearest-exact", "bilinear", "lanczos"];
        Schema::new("ResizeAndPadImage", "image/transform")
            .module(MODULE)
            .describe("Fits pictures into a size and fills the rest with black or white.")
            .input(bare("image"))
            .input(pixels("target_width", 512, 1))
            .input(pixels("target_height", 512, 1))
            .input(Input::combo("padding_color", &["white", "black"]).bare())
            .input(Input::combo("interpolation", &methods).bare())
            .output("IMAGE")
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (x, [_, h, w, _]) = image(inputs, "image")?;
        let (width, height) = (inputs.size("target_width")?, inputs.size("target_height")?);
        let factor = (width as f64 / w as f64).min(height as f64 / h as f64);
        let (new_w, new_h) = ((w as f64 * factor) as usize, (h as f64 * factor) as usize);
        let method = shapes::method(inputs, "interpolation")?;
        let resized = resize_images(&x, Resize::to(new_w, new_h, method))?;
        let fill = if inputs.string("padding_color")? == "black" { 0.0 } else { 1.0 };
        image_output(centered(&resized, height, width, fill)?)
    }
}

/// `ImageCompositeMasked`.
pub struct ImageCompositeMasked;

impl Node for ImageCompositeMasked {
    fn schema(&self) -> Schema {
        Schema::new("ImageCompositeMasked", "image")
            .module("comfy_extras.nodes_mask")
            .describe("Pastes one picture into another through a mask.")
            .input(bare("destination"))
            .input(bare("source"))
            .input(pixels("x", 0, 0))
            .input(pixels("y", 0, 0))
            .input(Input::boolean("resize_source").opt("default", false))
            .input(Input::link("mask", "MASK").bare().optional())
            .output("IMAGE")
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (destination, [_, _, _, c]) = image(inputs, "destination")?;
        let (source, _) = image(inputs, "source")?;
        let source = to_nchw(&with_channels(&source, c)?)?;
        let mask = mask_opt(inputs, "mask")?;
        let paste = Paste {
            source: &source,
            mask: mask.as_ref(),
            x: inputs.size("x")?,
            y: inputs.size("y")?,
            unit: 1,
            resize_source: inputs.boolean("resize_source")?,
        };
        image_output(to_nhwc(&paste_masked(&to_nchw(&destination)?, &paste)?)?)
    }
}

const COMPOSITING: &str = "comfy_extras.nodes_compositing";

/// `JoinImageWithAlpha`.
pub struct JoinImageWithAlpha;

impl Node for JoinImageWithAlpha {
    fn schema(&self) -> Schema {
        let schema = Schema::new("JoinImageWithAlpha", "mask/compositing")
            .display("Join Image with Alpha")
            .module(COMPOSITING)
            .describe("Makes masks the (inverted) alpha channel of pictures.")
            .input(Input::link("image", "IMAGE"))
            .input(Input::link("alpha", "MASK"))
            .output("IMAGE");
        newer(schema, false)
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (x, [b, h, w, c]) = image(inputs, "image")?;
        let (alpha, [masks, ..]) = mask(inputs, "alpha")?;
        let count = b.min(masks);
        let alpha = resize_masks(&alpha, h, w)?;
        shapes::check_size(&[count, h, w, 4])?;
        let pixels = x.data().chunks_exact(c).zip(alpha.data()).take(count * h * w);
        let data: Vec<f32> = pixels
            .flat_map(|(p, a)| p.iter().copied().take(3).chain([1.0 - a]).collect::<Vec<_>>())
            .collect();
        image_output(tensor(&[count, h, w, c.min(3) + 1], data)?)
    }
}

/// `SplitImageWithAlpha`.
pub struct SplitImageWithAlpha;

impl Node for SplitImageWithAlpha {
    fn schema(&self) -> Schema {
        let schema = Schema::new("SplitImageWithAlpha", "mask/compositing")
            .display("Split Image with Alpha")
            .module(COMPOSITING)
            .describe("Takes pictures and their (inverted) alpha channel apart.")
            .input(Input::link("image", "IMAGE"))
            .output("IMAGE")
            .output("MASK");
        newer(schema, false)
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (x, [b, h, w, c]) = image(inputs, "image")?;
        let picture = with_channels(&x, c.min(3))?;
        let alpha = x.data().chunks_exact(c).map(|p| 1.0 - p.get(3).copied().unwrap_or(1.0));
        let alpha = tensor(&[b, h, w], alpha.collect())?;
        Ok(NodeOutput::many(vec![Value::object("IMAGE", picture), Value::object("MASK", alpha)]))
    }
}
