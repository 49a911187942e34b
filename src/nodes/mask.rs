//! Masks: one value a pixel, `[B, H, W]`.

use rayon::prelude::*;

use super::shapes::{self, MAX_SIDE, image, mask, mask_output, tensor, unknown};
use super::{Inputs, Node, NodeCtx, NodeError, NodeOutput, Schema, Value};
use crate::graph::Input;
use crate::tensor::HostTensor;

const MODULE: &str = "comfy_extras.nodes_mask";

/// The mask nodes.
pub(super) fn nodes() -> Vec<Box<dyn Node>> {
    vec![
        Box::new(SolidMask),
        Box::new(InvertMask),
        Box::new(MaskToImage),
        Box::new(ImageToMask),
        Box::new(ImageColorToMask),
        Box::new(CropMask),
        Box::new(MaskComposite),
        Box::new(FeatherMask),
        Box::new(GrowMask),
        Box::new(ThresholdMask),
    ]
}

fn side(name: &'static str, default: i64, min: i64) -> Input {
    Input::int(name, default, min, MAX_SIDE).opt("step", 1)
}

fn bare_mask(name: &'static str) -> Input {
    Input::link(name, "MASK").bare()
}

/// `SolidMask`.
pub struct SolidMask;

impl Node for SolidMask {
    fn schema(&self) -> Schema {
        Schema::new("SolidMask", "mask")
            .module(MODULE)
            .describe("A mask of one value.")
            .input(Input::float("value", 1.0, 0.0, 1.0).opt("step", 0.01))
            .input(side("width", 512, 1))
            .input(side("height", 512, 1))
            .output("MASK")
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let shape = [1, inputs.size("height")?, inputs.size("width")?];
        mask_output(shapes::filled(&shape, inputs.float("value")? as f32)?)
    }
}

/// `InvertMask`.
pub struct InvertMask;

impl Node for InvertMask {
    fn schema(&self) -> Schema {
        Schema::new("InvertMask", "mask")
            .module(MODULE)
            .describe("One minus the mask.")
            .input(bare_mask("mask"))
            .output("MASK")
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        mask_output(inputs.object::<HostTensor>("mask")?.map(|v| 1.0 - v))
    }
}

/// `MaskToImage`.
pub struct MaskToImage;

/// Each mask value three times: `[B, H, W]` → `[B, H, W, 3]`.
pub(super) fn to_grey(x: &HostTensor, [b, h, w]: [usize; 3]) -> Result<HostTensor, NodeError> {
    shapes::check_size(&[b, h, w, 3])?;
    tensor(&[b, h, w, 3], x.data().iter().flat_map(|&v| [v; 3]).collect())
}

impl Node for MaskToImage {
    fn schema(&self) -> Schema {
        Schema::new("MaskToImage", "mask")
            .display("Convert Mask to Image")
            .module(MODULE)
            .describe("Shows a mask as a grey picture.")
            .input(bare_mask("mask"))
            .output("IMAGE")
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (x, dims) = mask(inputs, "mask")?;
        shapes::image_output(to_grey(&x, dims)?)
    }
}

/// `ImageToMask`.
pub struct ImageToMask;

impl Node for ImageToMask {
    fn schema(&self) -> Schema {
        Schema::new("ImageToMask", "mask")
            .display("Convert Image to Mask")
            .module(MODULE)
            .describe("One channel of a picture as a mask.")
            .input(Input::link("image", "IMAGE").bare())
            .input(Input::combo("channel", &["red", "green", "blue", "alpha"]).bare())
            .output("MASK")
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (x, [b, h, w, c]) = image(inputs, "image")?;
        let name = inputs.string("channel")?;
        let channels = ["red", "green", "blue", "alpha"];
        let index = channels.iter().position(|c| *c == name).ok_or_else(|| unknown("channel", name))?;
        if index >= c {
            return Err(NodeError::input("image", &format!("has {c} channels and therefore no {name}")));
        }
        mask_output(tensor(&[b, h, w], x.data().iter().skip(index).step_by(c).copied().collect())?)
    }
}

/// `ImageColorToMask`.
pub struct ImageColorToMask;

impl Node for ImageColorToMask {
    fn schema(&self) -> Schema {
        Schema::new("ImageColorToMask", "mask")
            .module(MODULE)
            .describe("A mask of the pixels that have exactly one colour (at 8 bits a channel).")
            .input(Input::link("image", "IMAGE").bare())
            .input(Input::int("color", 0, 0, 0xff_ffff).opt("step", 1).opt("display", "color"))
            .output("MASK")
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (x, [b, h, w, c]) = image(inputs, "image")?;
        let color = inputs.int("color")?;
        if c < 3 {
            return Err(NodeError::input("image", &format!("has {c} channels; three are needed")));
        }
        let byte = |v: f32| (v.clamp(0.0, 1.0) * 255.0).round_ties_even() as i64;
        let is_color = |p: &[f32]| (byte(p[0]) << 16) + (byte(p[1]) << 8) + byte(p[2]) == color;
        let data = x.data().chunks_exact(c).map(|p| f32::from(u8::from(is_color(p))));
        mask_output(tensor(&[b, h, w], data.collect())?)
    }
}

/// `CropMask`.
pub struct CropMask;

impl Node for CropMask {
    fn schema(&self) -> Schema {
        Schema::new("CropMask", "mask")
            .module(MODULE)
            .describe("Cuts a rectangle out of a mask.")
            .input(bare_mask("mask"))
            .input(side("x", 0, 0))
            .input(side("y", 0, 0))
            .input(side("width", 512, 1))
            .input(side("height", 512, 1))
            .output("MASK")
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (mask, [b, h, w]) = mask(inputs, "mask")?;
        let (x, y) = (inputs.size("x")?, inputs.size("y")?);
        let width = inputs.size("width")?.min(w.saturating_sub(x));
        let height = inputs.size("height")?.min(h.saturating_sub(y));
        if width == 0 || height == 0 {
            let what = format!("is {w}x{h}: nothing of it lies at x {x}, y {y}");
            return Err(NodeError::input("mask", &what));
        }
        let rows = (0..b).flat_map(|n| (y..y + height).map(move |row| (n * h + row) * w + x));
        mask_output(tensor(
            &[b, height, width],
            rows.flat_map(|at| &mask.data()[at..at + width]).copied().collect(),
        )?)
    }
}

/// `MaskComposite`.
pub struct MaskComposite;

impl Node for MaskComposite {
    fn schema(&self) -> Schema {
        Schema::new("MaskComposite", "mask")
            .module(MODULE)
            .describe("Combines two masks, the second one placed at x, y.")
            .input(bare_mask("destination"))
            .input(bare_mask("source"))
            .input(side("x", 0, 0))
            .input(side("y", 0, 0))
            .input(Input::combo("operation", &["multiply", "add", "subtract", "and", "or", "xor"]).bare())
            .output("MASK")
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (mut out, [b, h, w]) = mask(inputs, "destination")?;
        let (source, [sb, sh, sw]) = mask(inputs, "source")?;
        let (x, y) = (inputs.size("x")?, inputs.size("y")?);
        let name = inputs.string("operation")?;
        let is_set = |v: f32| v.round_ties_even() != 0.0;
        let combine = |d: f32, s: f32| match name {
            "multiply" => d * s,
            "add" => d + s,
            "subtract" => d - s,
            "and" => f32::from(u8::from(is_set(d) && is_set(s))),
            "or" => f32::from(u8::from(is_set(d) || is_set(s))),
            _ => f32::from(u8::from(is_set(d) != is_set(s))),
        };
        if sb != b && sb != 1 {
            return Err(NodeError::input(
                "source",
                &format!("has {sb} masks, destination {b}; one or as many are needed"),
            ));
        }
        let (width, height) = (sw.min(w.saturating_sub(x)), sh.min(h.saturating_sub(y)));
        for n in 0..b {
            for row in 0..height {
                let from = &source.data()[((n % sb) * sh + row) * sw..][..width];
                let to = &mut out.data_mut()[(n * h + y + row) * w + x.min(w)..][..width];
                to.iter_mut().zip(from).for_each(|(d, &s)| *d = combine(*d, s));
            }
        }
        mask_output(out.map(|v| v.clamp(0.0, 1.0)))
    }
}

/// `FeatherMask`.
pub struct FeatherMask;

impl Node for FeatherMask {
    fn schema(&self) -> Schema {
        Schema::new("FeatherMask", "mask")
            .module(MODULE)
            .describe("Fades the borders of a mask.")
            .input(bare_mask("mask"))
            .input(side("left", 0, 0))
            .input(side("top", 0, 0))
            .input(side("right", 0, 0))
            .input(side("bottom", 0, 0))
            .output("MASK")
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (mut out, [_, h, w]) = mask(inputs, "mask")?;
        let (left, right) = (inputs.size("left")?.min(w), inputs.size("right")?.min(w));
        let (top, bottom) = (inputs.size("top")?.min(h), inputs.size("bottom")?.min(h));
        let across = ramp(w, left, right);
        let down = ramp(h, top, bottom);
        for (i, row) in out.data_mut().chunks_exact_mut(w).enumerate() {
            row.iter_mut().zip(&across).for_each(|(v, f)| *v = *v * f.0 * f.1);
            let (near, far) = down[i % h];
            row.iter_mut().for_each(|v| *v = *v * near * far);
        }
        mask_output(out)
    }
}

/// Fade-in and fade-out factor of every position of an axis.
///
/// The reference counts the far end backwards from index −0, which is the
/// *first* position: its weakest factor lands there, and the last position
/// gets the second weakest.
fn ramp(length: usize, near: usize, far: usize) -> Vec<(f32, f32)> {
    let mut factors = vec![(1.0, 1.0); length];
    for (i, factor) in factors.iter_mut().enumerate().take(near) {
        factor.0 = ((i + 1) as f64 / near as f64) as f32;
    }
    for i in 0..far {
        factors[(length - i) % length].1 = ((i + 1) as f64 / far as f64) as f32;
    }
    factors
}

/// `GrowMask`.
pub struct GrowMask;

impl Node for GrowMask {
    fn schema(&self) -> Schema {
        Schema::new("GrowMask", "mask")
            .module(MODULE)
            .describe("Grows a mask by so many pixels, or shrinks it.")
            .input(bare_mask("mask"))
            .input(side("expand", 0, -MAX_SIDE))
            .input(Input::boolean("tapered_corners").opt("default", true))
            .output("MASK")
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (mut out, [_, h, w]) = mask(inputs, "mask")?;
        let expand = inputs.int("expand")?;
        let corners = !inputs.boolean("tapered_corners")?;
        let pick: fn(f32, f32) -> f32 = if expand < 0 { f32::min } else { f32::max };
        // More steps than the longer side change nothing any more.
        for _ in 0..expand.unsigned_abs().min(h.max(w) as u64) {
            ctx.check_interrupt()?;
            let before = out.clone();
            let planes =
                out.data_mut().par_chunks_exact_mut(h * w).zip(before.data().par_chunks_exact(h * w));
            planes.for_each(|(to, from)| grow_once(from, to, [h, w], corners, pick));
        }
        mask_output(out)
    }
}

/// One step: each pixel becomes the largest (or smallest) of its neighbourhood.
fn grow_once(from: &[f32], to: &mut [f32], [h, w]: [usize; 2], corners: bool, pick: fn(f32, f32) -> f32) {
    for y in 0..h {
        for x in 0..w {
            let mut value = from[y * w + x];
            for ny in y.saturating_sub(1)..(y + 2).min(h) {
                for nx in x.saturating_sub(1)..(x + 2).min(w) {
                    if corners || ny == y || nx == x {
                        value = pick(value, from[ny * w + nx]);
                    }
                }
            }
            to[y * w + x] = value;
        }
    }
}

/// `ThresholdMask`.
pub struct ThresholdMask;

impl Node for ThresholdMask {
    fn schema(&self) -> Schema {
        Schema::new("ThresholdMask", "mask")
            .module(MODULE)
            .describe("A mask of the places above a value.")
            .input(bare_mask("mask"))
            .input(Input::float("value", 0.5, 0.0, 1.0).opt("step", 0.01))
            .output("MASK")
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let mask = inputs.object::<HostTensor>("mask")?;
        let value = inputs.float("value")? as f32;
        let out = mask.map(|v| f32::from(u8::from(v > value)));
        Ok(NodeOutput::one(Value::object("MASK", out)))
    }
}
