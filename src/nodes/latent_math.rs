//! Latents: arithmetic, turning, cutting, pasting, operations.

use std::sync::Arc;

use super::plane::{self, Paste, Planes};
use super::shapes::{
    MAX_SIDE, broadcast, fit_latent, latent, latent_output, mask_opt, newer_unnamed, repeat_to, tensor,
    unknown,
};
use super::{Inputs, Node, NodeCtx, NodeError, NodeOutput, Schema, Value};
use crate::diffusion::Latent;
use crate::graph::Input;
use crate::image::Method;
use crate::tensor::HostTensor;

/// Pixels to a latent cell, in each direction.
const CELL: usize = 8;
const MODULE: &str = "comfy_extras.nodes_latent";

/// The latent nodes that compute.
pub(super) fn nodes() -> Vec<Box<dyn Node>> {
    vec![
        Box::new(LatentFlip),
        Box::new(LatentRotate),
        Box::new(LatentCrop),
        Box::new(LatentComposite),
        Box::new(LatentCompositeMasked),
        Box::new(LatentBlend),
        Box::new(LatentAdd),
        Box::new(LatentSubtract),
        Box::new(LatentMultiply),
        Box::new(LatentInterpolate),
        Box::new(LatentConcat),
        Box::new(LatentCut),
        Box::new(LatentApplyOperation),
        Box::new(LatentOperationTonemapReinhard),
        Box::new(LatentOperationSharpen),
    ]
}

fn bare(name: &'static str) -> Input {
    Input::link(name, "LATENT").bare()
}

fn cells(name: &'static str, default: i64, min: i64) -> Input {
    Input::int(name, default, min, MAX_SIDE).opt("step", 8)
}

/// `LatentFlip`.
pub struct LatentFlip;

impl Node for LatentFlip {
    fn schema(&self) -> Schema {
        Schema::new("LatentFlip", "latent/transform")
            .display("Flip Latent")
            .describe("Mirrors a latent.")
            .input(bare("samples"))
            .input(Input::combo("flip_method", &["x-axis: vertically", "y-axis: horizontally"]).bare())
            .output("LATENT")
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (x, dims) = latent(inputs, "samples")?;
        let vertically = inputs.string("flip_method")?.starts_with('x');
        let data = Planes::of_latents(dims).flip(x.samples.data(), vertically);
        latent_output(x.with_samples(tensor(&dims, data)?))
    }
}

/// `LatentRotate`.
pub struct LatentRotate;

impl Node for LatentRotate {
    fn schema(&self) -> Schema {
        Schema::new("LatentRotate", "latent/transform")
            .display("Rotate Latent")
            .describe("Turns a latent by quarter turns, clockwise.")
            .input(bare("samples"))
            .input(Input::combo("rotation", &["none", "90 degrees", "180 degrees", "270 degrees"]).bare())
            .output("LATENT")
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (x, dims) = latent(inputs, "samples")?;
        let quarters = plane::quarters(inputs.string("rotation")?);
        let (data, [h, w]) = Planes::of_latents(dims).rotate(x.samples.data(), quarters);
        latent_output(x.with_samples(tensor(&[dims[0], dims[1], h, w], data)?))
    }
}

/// `LatentCrop`.
pub struct LatentCrop;

impl Node for LatentCrop {
    fn schema(&self) -> Schema {
        Schema::new("LatentCrop", "latent/transform")
            .display("Crop Latent")
            .describe("Cuts a rectangle out of a latent.")
            .input(bare("samples"))
            .input(cells("width", 512, 64))
            .input(cells("height", 512, 64))
            .input(cells("x", 0, 0))
            .input(cells("y", 0, 0))
            .output("LATENT")
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (x, [b, c, h, w]) = latent(inputs, "samples")?;
        // At least eight cells stay inside.
        let left = (inputs.size("x")? / CELL).min(w.saturating_sub(8));
        let top = (inputs.size("y")? / CELL).min(h.saturating_sub(8));
        let width = (inputs.size("width")? / CELL).clamp(1, w - left);
        let height = (inputs.size("height")? / CELL).clamp(1, h - top);
        let data = Planes::of_latents([b, c, h, w]).crop(x.samples.data(), [top, left], [height, width]);
        latent_output(x.with_samples(tensor(&[b, c, height, width], data)?))
    }
}

/// `LatentComposite`.
pub struct LatentComposite;

impl Node for LatentComposite {
    fn schema(&self) -> Schema {
        Schema::new("LatentComposite", "latent")
            .display("Latent Composite")
            .describe("Pastes one latent into another, with soft edges if wanted.")
            .input(bare("samples_to"))
            .input(bare("samples_from"))
            .input(cells("x", 0, 0))
            .input(cells("y", 0, 0))
            .input(cells("feather", 0, 0))
            .output("LATENT")
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (to, [_, _, h, w]) = latent(inputs, "samples_to")?;
        let (from, [_, _, fh, fw]) = latent(inputs, "samples_from")?;
        let (x, y, feather) = (inputs.size("x")?, inputs.size("y")?, inputs.size("feather")? / CELL);
        let (left, top) = (x / CELL, y / CELL);
        // The part that lies inside; edges are softened where they lie inside, too.
        let (width, height) = (fw.min(w.saturating_sub(left)), fh.min(h.saturating_sub(top)));
        let across = edge_weights(width, feather, left != 0, left + width < w);
        let down = edge_weights(height, feather, top != 0, top + height < h);
        let weight = |i: usize| {
            let (row, column) = (i / fw.max(1), i % fw.max(1));
            down.get(row).unwrap_or(&0.0) * across.get(column).unwrap_or(&0.0)
        };
        let mask = HostTensor::from_fn(&[1, fh, fw], weight);
        let paste = Paste {
            source: &from.samples,
            mask: (feather > 0).then_some(&mask),
            x,
            y,
            unit: CELL,
            resize_source: false,
        };
        latent_output(to.with_samples(plane::paste_masked(&to.samples, &paste)?))
    }
}

/// Weights that rise from the soft ends of an axis over `feather` cells.
fn edge_weights(length: usize, feather: usize, is_start_soft: bool, is_end_soft: bool) -> Vec<f32> {
    let mut weights = vec![1.0f32; length];
    for t in 0..feather.min(length) {
        let factor = ((1.0 / feather as f64) * (t + 1) as f64) as f32;
        if is_start_soft {
            weights[t] *= factor;
        }
        if is_end_soft {
            weights[length - 1 - t] *= factor;
        }
    }
    weights
}

/// `LatentCompositeMasked`.
pub struct LatentCompositeMasked;

impl Node for LatentCompositeMasked {
    fn schema(&self) -> Schema {
        Schema::new("LatentCompositeMasked", "latent")
            .module("comfy_extras.nodes_mask")
            .describe("Pastes one latent into another through a mask.")
            .input(bare("destination"))
            .input(bare("source"))
            .input(cells("x", 0, 0))
            .input(cells("y", 0, 0))
            .input(Input::boolean("resize_source").opt("default", false))
            .input(Input::link("mask", "MASK").bare().optional())
            .output("LATENT")
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (to, _) = latent(inputs, "destination")?;
        let (from, _) = latent(inputs, "source")?;
        let mask = mask_opt(inputs, "mask")?;
        let paste = Paste {
            source: &from.samples,
            mask: mask.as_ref(),
            x: inputs.size("x")?,
            y: inputs.size("y")?,
            unit: CELL,
            resize_source: inputs.boolean("resize_source")?,
        };
        latent_output(to.with_samples(plane::paste_masked(&to.samples, &paste)?))
    }
}

/// `LatentBlend`.
pub struct LatentBlend;

impl Node for LatentBlend {
    fn schema(&self) -> Schema {
        Schema::new("LatentBlend", "_for_testing")
            .display("Latent Blend")
            .describe("Mixes two latents; the second is resized to the first.")
            .input(bare("samples1"))
            .input(bare("samples2"))
            .input(Input::float("blend_factor", 0.5, 0.0, 1.0).opt("step", 0.01))
            .output("LATENT")
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let factor = inputs.float("blend_factor")?;
        let (a, b) = (factor as f32, (1.0 - factor) as f32);
        let (first, like) = latent(inputs, "samples1")?;
        let (second, _) = latent(inputs, "samples2")?;
        same_channels(&second, like)?;
        let second = fit_latent(&second.samples, like, Method::Bicubic)?;
        let (samples, second) = broadcast(&first.samples, &second, "samples2")?;
        latent_output(first.with_samples(samples.zip(&second, |x, y| x * a + y * b)))
    }
}

/// Combines two latents value by value, the second made to fit the first.
fn pairwise(inputs: &Inputs, f: impl Fn(f32, f32) -> f32) -> Result<NodeOutput, NodeError> {
    let (first, second) = fitted_pair(inputs)?;
    latent_output(first.with_samples(first.samples.zip(&second, f)))
}

/// `samples1`, and `samples2` in its shape.
fn fitted_pair(inputs: &Inputs) -> Result<(Arc<Latent>, HostTensor), NodeError> {
    let (first, like) = latent(inputs, "samples1")?;
    let (second, _) = latent(inputs, "samples2")?;
    same_channels(&second, like)?;
    let fitted = repeat_to(&fit_latent(&second.samples, like, Method::Bilinear)?, like[0])?;
    Ok((first, fitted))
}

/// Whether `samples2` has as many channels as `samples1`.
fn same_channels(second: &Latent, like: [usize; 4]) -> Result<(), NodeError> {
    let channels = second.samples.dim(1);
    if channels == like[1] {
        return Ok(());
    }
    let what = format!("has {channels} channels, samples1 {}: they must agree", like[1]);
    Err(NodeError::input("samples2", &what))
}

fn two_latents(class: &'static str, description: &'static str) -> Schema {
    Schema::new(class, "latent/advanced")
        .module(MODULE)
        .describe(description)
        .input(Input::link("samples1", "LATENT"))
        .input(Input::link("samples2", "LATENT"))
}

/// `LatentAdd`.
pub struct LatentAdd;

impl Node for LatentAdd {
    fn schema(&self) -> Schema {
        newer_unnamed(two_latents("LatentAdd", "The sum of two latents.").output("LATENT"), false)
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        pairwise(inputs, |x, y| x + y)
    }
}

/// `LatentSubtract`.
pub struct LatentSubtract;

impl Node for LatentSubtract {
    fn schema(&self) -> Schema {
        newer_unnamed(two_latents("LatentSubtract", "The difference of two latents.").output("LATENT"), false)
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        pairwise(inputs, |x, y| x - y)
    }
}

/// `LatentMultiply`.
pub struct LatentMultiply;

impl Node for LatentMultiply {
    fn schema(&self) -> Schema {
        let schema = Schema::new("LatentMultiply", "latent/advanced")
            .module(MODULE)
            .describe("A latent times a number.")
            .input(Input::link("samples", "LATENT"))
            .input(Input::float("multiplier", 1.0, -10.0, 10.0).opt("step", 0.01))
            .output("LATENT");
        newer_unnamed(schema, false)
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (x, _) = latent(inputs, "samples")?;
        let factor = inputs.float("multiplier")? as f32;
        latent_output(x.with_samples(x.samples.map(|v| v * factor)))
    }
}

/// Length of the channel vector of every cell: `[B, C, h, w]` → B·h·w values.
fn lengths(x: &HostTensor) -> Vec<f32> {
    let (c, cells) = (x.dim(1), x.dim(2) * x.dim(3));
    let sample = |n: usize| (0..cells).map(move |i| (n, i));
    (0..x.dim(0))
        .flat_map(sample)
        .map(|(n, i)| (0..c).map(|k| x.row(n)[k * cells + i].powi(2)).sum::<f32>().sqrt())
        .collect()
}

/// Every value with its cell's entry in a list such as that of [`lengths`].
fn with_cells(x: &HostTensor, cells: &[f32], f: impl Fn(f32, f32) -> f32) -> HostTensor {
    let (c, plane) = (x.dim(1), x.dim(2) * x.dim(3));
    let data = x.data();
    HostTensor::from_fn(x.shape(), |i| f(data[i], cells[i / (c * plane) * plane + i % plane]))
}

/// Direction of every cell's channel vector; zero where there is none.
fn directions(x: &HostTensor, lengths: &[f32]) -> HostTensor {
    with_cells(x, lengths, |v, length| if length == 0.0 { 0.0 } else { v / length })
}

/// `LatentInterpolate`.
pub struct LatentInterpolate;

impl Node for LatentInterpolate {
    fn schema(&self) -> Schema {
        let schema =
            two_latents("LatentInterpolate", "A mix of two latents that keeps the length of their vectors.")
                .input(Input::float("ratio", 1.0, 0.0, 1.0).opt("step", 0.01))
                .output("LATENT");
        newer_unnamed(schema, false)
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (first, second) = fitted_pair(inputs)?;
        let ratio = inputs.float("ratio")?;
        let (a, b) = (ratio as f32, (1.0 - ratio) as f32);
        let (m1, m2) = (lengths(&first.samples), lengths(&second));
        let mixed = directions(&first.samples, &m1).zip(&directions(&second, &m2), |x, y| x * a + y * b);
        let length: Vec<f32> = m1.iter().zip(&m2).map(|(x, y)| x * a + y * b).collect();
        let direction = directions(&mixed, &lengths(&mixed));
        latent_output(first.with_samples(with_cells(&direction, &length, |v, m| v * m)))
    }
}

/// The axis of `[B, C, h, w]` that a combo value names, with `-` stripped. The axis before the rows is time in a
/// video's latent; here it is the channels.
fn axis(name: &str) -> Result<usize, NodeError> {
    match name.trim_start_matches('-') {
        "x" => Ok(3),
        "y" => Ok(2),
        "t" => Ok(1),
        other => Err(unknown("dim", other)),
    }
}

/// `LatentConcat`.
pub struct LatentConcat;

impl Node for LatentConcat {
    fn schema(&self) -> Schema {
        let dims = Input::combo("dim", &["x", "-x", "y", "-y", "t", "-t"]).opt("multiselect", false);
        let schema = two_latents("LatentConcat", "Joins two latents side by side or above each other.");
        newer_unnamed(schema.input(dims).output("LATENT"), false)
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (first, dims) = latent(inputs, "samples1")?;
        let (second, _) = latent(inputs, "samples2")?;
        let name = inputs.string("dim")?;
        let axis = axis(name)?;
        let second = repeat_to(&second.samples, dims[0])?;
        let (before, after) =
            if name.starts_with('-') { (&second, &first.samples) } else { (&first.samples, &second) };
        let other: Vec<usize> = (0..4).filter(|&i| i != axis).collect();
        if other.iter().any(|&i| before.dim(i) != after.dim(i)) {
            let what =
                format!("has shape {:?}, which cannot be joined to {dims:?} along {name}", second.shape());
            return Err(NodeError::input("samples2", &what));
        }
        let mut shape = dims;
        shape[axis] = before.dim(axis) + after.dim(axis);
        let run = |x: &HostTensor| x.shape()[axis..].iter().product::<usize>();
        let pairs = before.data().chunks_exact(run(before)).zip(after.data().chunks_exact(run(after)));
        let data = pairs.flat_map(|(a, b)| a.iter().chain(b)).copied().collect();
        latent_output(first.with_samples(tensor(&shape, data)?))
    }
}

/// `LatentCut`.
pub struct LatentCut;

impl Node for LatentCut {
    fn schema(&self) -> Schema {
        let schema = Schema::new("LatentCut", "latent/advanced")
            .module(MODULE)
            .describe("Cuts a strip out of a latent; a negative index counts from the end.")
            .input(Input::link("samples", "LATENT"))
            .input(Input::combo("dim", &["x", "y", "t"]).opt("multiselect", false))
            .input(Input::int("index", 0, -MAX_SIDE, MAX_SIDE).opt("step", 1))
            .input(Input::int("amount", 1, 1, MAX_SIDE).opt("step", 1))
            .output("LATENT");
        newer_unnamed(schema, false)
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (x, dims) = latent(inputs, "samples")?;
        let axis = axis(inputs.string("dim")?)?;
        let length = dims[axis];
        let index = inputs.int("index")?.clamp(-(length as i64), length as i64 - 1);
        let start = index.rem_euclid(length as i64) as usize;
        let amount = inputs.size("amount")?.min(length - start);
        let mut shape = dims;
        shape[axis] = amount;
        let inner: usize = dims[axis + 1..].iter().product();
        let slices = x.samples.data().chunks_exact(length * inner);
        let data = slices.flat_map(|slice| &slice[start * inner..][..amount * inner]).copied().collect();
        latent_output(x.with_samples(tensor(&shape, data)?))
    }
}

/// What travels on a `LATENT_OPERATION` link.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum LatentOperation {
    /// Compresses long channel vectors (E. Reinhard et al., "Photographic tone
    /// reproduction for digital images", 2002).
    TonemapReinhard {
        /// Scales the length that counts as bright.
        multiplier: f32,
    },
    /// Unsharp masking of the directions of channel vectors.
    Sharpen {
        /// Radius of the filter in cells.
        radius: usize,
        /// Width of the Gaussian in radii.
        sigma: f32,
        /// Strength.
        alpha: f32,
    },
}

impl LatentOperation {
    /// The operation on `[B, C, h, w]`.
    ///
    /// # Errors
    /// [`NodeError`] if a filter is larger than the latent.
    pub fn apply(&self, x: &HostTensor) -> Result<HostTensor, NodeError> {
        match *self {
            Self::TonemapReinhard { multiplier } => Ok(tonemap(x, multiplier)),
            Self::Sharpen { radius, sigma, alpha } => {
                let (c, h, w) = (x.dim(1), x.dim(2), x.dim(3));
                let length: Vec<f32> = lengths(x).iter().map(|m| m + 1e-6).collect();
                let direction = with_cells(x, &length, |v, m| v / m);
                let planes = Planes::of_latents([x.dim(0), c, h, w]);
                let sharp =
                    plane::convolve(direction.data(), planes, &plane::sharpener(radius, sigma, alpha))?;
                Ok(with_cells(&tensor(x.shape(), sharp)?, &length, |v, m| v * m))
            }
        }
    }
}

fn tonemap(x: &HostTensor, multiplier: f32) -> HostTensor {
    let length: Vec<f32> = lengths(x).iter().map(|m| m + 1e-10).collect();
    let direction = with_cells(x, &length, |v, m| v / m);
    let cells = x.dim(2) * x.dim(3);
    let mapped: Vec<f32> = length
        .chunks_exact(cells.max(1))
        .flat_map(|sample| {
            let count = sample.len() as f64;
            let mean = sample.iter().map(|&v| f64::from(v)).sum::<f64>() / count;
            let squares = sample.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>();
            let std = (squares / (count - 1.0)).sqrt() as f32;
            let top = (std * 5.0 + mean as f32) * multiplier;
            sample.iter().map(move |m| {
                let scaled = m * (1.0 / top);
                scaled / (scaled + 1.0) * top
            })
        })
        .collect();
    with_cells(&direction, &mapped, |v, m| v * m)
}

/// `LatentApplyOperation`.
pub struct LatentApplyOperation;

impl Node for LatentApplyOperation {
    fn schema(&self) -> Schema {
        let schema = Schema::new("LatentApplyOperation", "latent/advanced/operations")
            .module(MODULE)
            .describe("Runs a latent operation on a latent.")
            .input(Input::link("samples", "LATENT"))
            .input(Input::link("operation", "LATENT_OPERATION"))
            .output("LATENT");
        newer_unnamed(schema, true)
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (x, _) = latent(inputs, "samples")?;
        let operation = inputs.object::<LatentOperation>("operation")?;
        latent_output(x.with_samples(operation.apply(&x.samples)?))
    }
}

fn operation(operation: LatentOperation) -> Result<NodeOutput, NodeError> {
    Ok(NodeOutput::one(Value::object("LATENT_OPERATION", operation)))
}

/// `LatentOperationTonemapReinhard`.
pub struct LatentOperationTonemapReinhard;

impl Node for LatentOperationTonemapReinhard {
    fn schema(&self) -> Schema {
        let schema = Schema::new("LatentOperationTonemapReinhard", "latent/advanced/operations")
            .module(MODULE)
            .describe("An operation that compresses long channel vectors.")
            .input(Input::float("multiplier", 1.0, 0.0, 100.0).opt("step", 0.01))
            .output("LATENT_OPERATION");
        newer_unnamed(schema, true)
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        operation(LatentOperation::TonemapReinhard { multiplier: inputs.float("multiplier")? as f32 })
    }
}

/// `LatentOperationSharpen`.
pub struct LatentOperationSharpen;

impl Node for LatentOperationSharpen {
    fn schema(&self) -> Schema {
        let schema = Schema::new("LatentOperationSharpen", "latent/advanced/operations")
            .module(MODULE)
            .describe("An operation that sharpens a latent.")
            .input(Input::int("sharpen_radius", 9, 1, 31).opt("step", 1))
            .input(Input::float("sigma", 1.0, 0.1, 10.0).opt("step", 0.1))
            .input(Input::float("alpha", 0.1, 0.0, 5.0).opt("step", 0.01))
            .output("LATENT_OPERATION");
        newer_unnamed(schema, true)
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        operation(LatentOperation::Sharpen {
            radius: inputs.size("sharpen_radius")?,
            sigma: inputs.float("sigma")? as f32,
            alpha: inputs.float("alpha")? as f32,
        })
    }
}
