//! Porter-Duff compositing of pictures with masks as (inverted) alpha.
//!
//! T. Porter, T. Duff, "Compositing digital images", 1984, and the blend modes
//! of the SVG compositing specification, on premultiplied values. `OVERLAY`
//! is the reference's own variant.

use super::shapes::{self, image, mask, newer, resize_images, tensor, unknown};
use super::{Inputs, Node, NodeCtx, NodeError, NodeOutput, Schema, Value};
use crate::graph::Input;
use crate::image::{Crop, Method, Resize};
use crate::tensor::HostTensor;

/// Alpha below which a result has no colour.
const TRANSPARENT: f32 = 1e-5;

const MODES: [&str; 18] = [
    "ADD", "CLEAR", "DARKEN", "DST", "DST_ATOP", "DST_IN", "DST_OUT", "DST_OVER", "LIGHTEN", "MULTIPLY",
    "OVERLAY", "SCREEN", "SRC", "SRC_ATOP", "SRC_IN", "SRC_OUT", "SRC_OVER", "XOR",
];

/// The compositing nodes.
pub(super) fn nodes() -> Vec<Box<dyn Node>> {
    vec![Box::new(PorterDuffImageComposite)]
}

/// Alpha of the result, from the alphas of source and destination.
fn alpha(mode: &str, sa: f32, da: f32) -> f32 {
    match mode {
        "ADD" => (sa + da).clamp(0.0, 1.0),
        "CLEAR" => 0.0,
        "DARKEN" | "LIGHTEN" | "OVERLAY" | "SCREEN" => sa + da - sa * da,
        "DST" | "SRC_ATOP" => da,
        "SRC" | "DST_ATOP" => sa,
        "DST_IN" | "SRC_IN" | "MULTIPLY" => sa * da,
        "DST_OUT" => (1.0 - sa) * da,
        "SRC_OUT" => (1.0 - da) * sa,
        "DST_OVER" => da + (1.0 - da) * sa,
        "SRC_OVER" => sa + (1.0 - sa) * da,
        _ => (1.0 - da) * sa + (1.0 - sa) * da,
    }
}

/// One premultiplied colour value of the result.
fn color(mode: &str, (s, sa): (f32, f32), (d, da): (f32, f32)) -> f32 {
    match mode {
        "ADD" => (s + d).clamp(0.0, 1.0),
        "CLEAR" => 0.0,
        "DARKEN" => (1.0 - da) * s + (1.0 - sa) * d + s.min(d),
        "LIGHTEN" => (1.0 - da) * s + (1.0 - sa) * d + s.max(d),
        "MULTIPLY" => s * d,
        "OVERLAY" if 2.0 * d < da => 2.0 * s * d,
        "OVERLAY" => sa * da - 2.0 * (da - s) * (sa - d),
        "SCREEN" => s + d - s * d,
        "DST" => d,
        "SRC" => s,
        "DST_ATOP" => sa * d + (1.0 - da) * s,
        "SRC_ATOP" => da * s + (1.0 - sa) * d,
        "DST_IN" => d * sa,
        "SRC_IN" => s * da,
        "DST_OUT" => (1.0 - sa) * d,
        "SRC_OUT" => (1.0 - da) * s,
        "DST_OVER" => d + (1.0 - da) * s,
        "SRC_OVER" => s + (1.0 - sa) * d,
        _ => (1.0 - da) * s + (1.0 - sa) * d,
    }
}

/// `PorterDuffImageComposite`.
pub struct PorterDuffImageComposite;

/// Pictures (or masks as one-channel pictures) in another size.
fn fit(x: &HostTensor, height: usize, width: usize) -> Result<HostTensor, NodeError> {
    if (x.dim(1), x.dim(2)) == (height, width) {
        return Ok(x.clone());
    }
    resize_images(x, Resize { width, height, method: Method::Bicubic, crop: Crop::Center })
}

/// A mask input as one-channel pictures.
fn mask_picture(inputs: &Inputs, name: &str) -> Result<HostTensor, NodeError> {
    let (x, [b, h, w]) = mask(inputs, name)?;
    tensor(&[b, h, w, 1], x.into_data())
}

impl Node for PorterDuffImageComposite {
    fn schema(&self) -> Schema {
        let schema = Schema::new("PorterDuffImageComposite", "mask/compositing")
            .display("Porter-Duff Image Composite")
            .module("comfy_extras.nodes_compositing")
            .describe("Composites two pictures whose masks say where they are transparent.")
            .input(Input::link("source", "IMAGE"))
            .input(Input::link("source_alpha", "MASK"))
            .input(Input::link("destination", "IMAGE"))
            .input(Input::link("destination_alpha", "MASK"))
            .input(Input::combo("mode", &MODES).opt("default", "DST").opt("multiselect", false))
            .output("IMAGE")
            .output("MASK");
        newer(schema, false)
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let mode = inputs.string("mode")?;
        if !MODES.contains(&mode) {
            return Err(unknown("mode", mode));
        }
        let (destination, [db, h, w, c]) = image(inputs, "destination")?;
        let (source, [sb, _, _, sc]) = image(inputs, "source")?;
        if c != sc {
            let what = format!("has {sc} channels, destination {c}: they must agree");
            return Err(NodeError::input("source", &what));
        }
        let source = fit(&source, h, w)?;
        let source_mask = fit(&mask_picture(inputs, "source_alpha")?, h, w)?;
        let destination_mask = fit(&mask_picture(inputs, "destination_alpha")?, h, w)?;
        let batch = [sb, db, source_mask.dim(0), destination_mask.dim(0)].into_iter().min().unwrap_or(1);
        shapes::check_size(&[batch, h, w, c])?;
        let mut picture = Vec::with_capacity(batch * h * w * c);
        let mut masks = Vec::with_capacity(batch * h * w);
        let alphas = source_mask.data().iter().zip(destination_mask.data()).take(batch * h * w);
        let pixels = source.data().chunks_exact(c).zip(destination.data().chunks_exact(c));
        for ((sm, dm), (s, d)) in alphas.zip(pixels) {
            let (sa, da) = (1.0 - sm, 1.0 - dm);
            let out = alpha(mode, sa, da);
            masks.push(1.0 - out);
            picture.extend(s.iter().zip(d).map(|(s, d)| {
                let value = color(mode, (s * sa, sa), (d * da, da));
                if out > TRANSPARENT { (value / out).clamp(0.0, 1.0) } else { 0.0 }
            }));
        }
        Ok(NodeOutput::many(vec![
            Value::object("IMAGE", tensor(&[batch, h, w, c], picture)?),
            Value::object("MASK", tensor(&[batch, h, w], masks)?),
        ]))
    }
}
