//! Latents: making, resizing, batches and masks.

use super::shapes::{
    self, MAX_SIDE, check_size, concat_batch, latent, latent_output, mask, newer, newer_unnamed,
    repeat_batch, repeat_to, round,
};
use super::{Inputs, Node, NodeCtx, NodeError, NodeOutput, Schema, Value};
use crate::diffusion::Latent;
use crate::graph::Input;
use crate::image::{Crop, Method, Resize, upscale, upscale_masks};
use crate::tensor::HostTensor;

/// Pixels to a latent cell, in each direction.
const CELL: usize = 8;

/// The latent nodes that need no arithmetic.
pub(super) fn nodes() -> Vec<Box<dyn Node>> {
    vec![
        Box::new(EmptyLatentImage),
        Box::new(EmptySd3LatentImage),
        Box::new(LatentUpscale),
        Box::new(LatentUpscaleBy),
        Box::new(LatentFromBatch),
        Box::new(RepeatLatentBatch),
        Box::new(LatentBatch),
        Box::new(RebatchLatents),
        Box::new(LatentBatchSeedBehavior),
        Box::new(SetLatentNoiseMask),
    ]
}

fn bare(name: &'static str) -> Input {
    Input::link(name, "LATENT").bare()
}

fn empty(inputs: &Inputs, channels: usize) -> Result<NodeOutput, NodeError> {
    let (width, height) = (inputs.size("width")?, inputs.size("height")?);
    let shape = [inputs.size("batch_size")?, channels, height / CELL, width / CELL];
    latent_output(Latent::new(shapes::filled(&shape, 0.0)?))
}

/// `EmptyLatentImage`.
pub struct EmptyLatentImage;

impl Node for EmptyLatentImage {
    fn schema(&self) -> Schema {
        Schema::new("EmptyLatentImage", "latent")
            .display("Empty Latent Image")
            .describe("A batch of empty latents for pictures of this size.")
            .input(Input::int("width", 512, 16, MAX_SIDE).opt("step", 8))
            .input(Input::int("height", 512, 16, MAX_SIDE).opt("step", 8))
            .input(Input::int("batch_size", 1, 1, 4096))
            .output("LATENT")
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        empty(inputs, 4)
    }
}

/// `EmptySD3LatentImage`.
pub struct EmptySd3LatentImage;

impl Node for EmptySd3LatentImage {
    fn schema(&self) -> Schema {
        let schema = Schema::new("EmptySD3LatentImage", "latent/sd3")
            .module("comfy_extras.nodes_sd3")
            .describe("A batch of empty 16-channel latents for pictures of this size.")
            .input(Input::int("width", 1024, 16, MAX_SIDE).opt("step", 16))
            .input(Input::int("height", 1024, 16, MAX_SIDE).opt("step", 16))
            .input(Input::int("batch_size", 1, 1, 4096))
            .output("LATENT");
        newer_unnamed(schema, false)
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        empty(inputs, 16)
    }
}

const METHODS: [&str; 5] = ["nearest-exact", "bilinear", "area", "bicubic", "bislerp"];

/// `LatentUpscale`.
pub struct LatentUpscale;

impl Node for LatentUpscale {
    fn schema(&self) -> Schema {
        Schema::new("LatentUpscale", "latent")
            .display("Upscale Latent")
            .describe("Resizes a latent to a picture size; 0 for one side keeps the aspect ratio.")
            .input(bare("samples"))
            .input(Input::combo("upscale_method", &METHODS).bare())
            .input(Input::int("width", 512, 0, MAX_SIDE).opt("step", 8))
            .input(Input::int("height", 512, 0, MAX_SIDE).opt("step", 8))
            .input(Input::combo("crop", &["disabled", "center"]).bare())
            .output("LATENT")
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (x, [_, _, h, w]) = latent(inputs, "samples")?;
        let (mut width, mut height) = (inputs.size("width")?, inputs.size("height")?);
        if width == 0 && height == 0 {
            return latent_output(Latent::clone(&x));
        }
        if width == 0 {
            height = height.max(64);
            width = round(w as f64 * height as f64 / h as f64);
        } else if height == 0 {
            width = width.max(64);
            height = round(h as f64 * width as f64 / w as f64);
        }
        let (width, height) = (width.max(64), height.max(64));
        let method = shapes::method(inputs, "upscale_method")?;
        let to = Resize { width: width / CELL, height: height / CELL, method, crop: shapes::crop(inputs)? };
        latent_output(x.with_samples(upscale(&x.samples, to)?))
    }
}

/// `LatentUpscaleBy`.
pub struct LatentUpscaleBy;

impl Node for LatentUpscaleBy {
    fn schema(&self) -> Schema {
        Schema::new("LatentUpscaleBy", "latent")
            .display("Upscale Latent By")
            .describe("Resizes a latent by a factor.")
            .input(bare("samples"))
            .input(Input::combo("upscale_method", &METHODS).bare())
            .input(Input::float("scale_by", 1.5, 0.01, 8.0).opt("step", 0.01))
            .output("LATENT")
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (x, [_, _, h, w]) = latent(inputs, "samples")?;
        let factor = inputs.float("scale_by")?;
        let method = shapes::method(inputs, "upscale_method")?;
        let to = Resize::to(round(w as f64 * factor), round(h as f64 * factor), method);
        latent_output(x.with_samples(upscale(&x.samples, to)?))
    }
}

/// `LatentFromBatch`.
pub struct LatentFromBatch;

impl Node for LatentFromBatch {
    fn schema(&self) -> Schema {
        Schema::new("LatentFromBatch", "latent/batch")
            .display("Latent From Batch")
            .describe("Takes some latents out of a batch. They keep the noise of their old places.")
            .input(bare("samples"))
            .input(Input::int("batch_index", 0, 0, 63))
            .input(Input::int("length", 1, 1, 64))
            .output("LATENT")
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (x, [b, ..]) = latent(inputs, "samples")?;
        let start = inputs.size("batch_index")?.min(b - 1);
        let length = inputs.size("length")?.min(b - start);
        let noise_mask = match &x.noise_mask {
            Some(masks) if masks.dim(0) > 1 => {
                Some(repeat_to(masks, masks.dim(0).max(b))?.rows(start, length))
            }
            other => other.clone(),
        };
        let places = match &x.batch_index {
            Some(places) => places.iter().copied().skip(start).take(length).collect(),
            None => (start..start + length).collect(),
        };
        latent_output(Latent {
            samples: x.samples.rows(start, length),
            noise_mask,
            batch_index: Some(places),
        })
    }
}

/// `RepeatLatentBatch`.
pub struct RepeatLatentBatch;

impl Node for RepeatLatentBatch {
    fn schema(&self) -> Schema {
        Schema::new("RepeatLatentBatch", "latent/batch")
            .display("Repeat Latent Batch")
            .describe("Repeats a batch of latents.")
            .input(bare("samples"))
            .input(Input::int("amount", 1, 1, 64))
            .output("LATENT")
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (x, [b, ..]) = latent(inputs, "samples")?;
        let amount = inputs.size("amount")?;
        let noise_mask = match &x.noise_mask {
            Some(masks) if masks.dim(0) > 1 => {
                Some(repeat_batch(&repeat_to(masks, masks.dim(0).max(b))?, amount)?)
            }
            other => other.clone(),
        };
        // Each repetition continues the numbering, so that noise differs.
        let batch_index = x.batch_index.as_ref().map(|places| {
            let (low, high) = (places.iter().min().copied(), places.iter().max().copied());
            let offset = high.unwrap_or(0) - low.unwrap_or(0) + 1;
            (0..amount).flat_map(|i| places.iter().map(move |place| place + i * offset)).collect()
        });
        latent_output(Latent { samples: repeat_batch(&x.samples, amount)?, noise_mask, batch_index })
    }
}

fn places(x: &Latent) -> Vec<usize> {
    x.batch_index.clone().unwrap_or_else(|| (0..x.samples.dim(0)).collect())
}

/// `LatentBatch`.
pub struct LatentBatch;

impl Node for LatentBatch {
    fn schema(&self) -> Schema {
        let schema = Schema::new("LatentBatch", "latent/batch")
            .module("comfy_extras.nodes_latent")
            .describe("Joins two batches of latents; the second is resized to the first.")
            .input(Input::link("samples1", "LATENT"))
            .input(Input::link("samples2", "LATENT"))
            .output("LATENT");
        newer_unnamed(schema, false)
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (first, like) = latent(inputs, "samples1")?;
        let (second, _) = latent(inputs, "samples2")?;
        let fitted = shapes::fit_latent(&second.samples, like, Method::Bilinear)?;
        let samples = concat_batch(&[&first.samples, &fitted])?;
        let batch_index = [places(&first), places(&second)].concat();
        latent_output(Latent {
            samples,
            noise_mask: first.noise_mask.clone(),
            batch_index: Some(batch_index),
        })
    }
}

/// `LatentBatchSeedBehavior`.
pub struct LatentBatchSeedBehavior;

impl Node for LatentBatchSeedBehavior {
    fn schema(&self) -> Schema {
        let behaviors = Input::combo("seed_behavior", &["random", "fixed"]).opt("default", "fixed");
        let schema = Schema::new("LatentBatchSeedBehavior", "latent/advanced")
            .module("comfy_extras.nodes_latent")
            .describe("Whether the latents of a batch get different noise or all the same.")
            .input(Input::link("samples", "LATENT"))
            .input(behaviors.opt("multiselect", false))
            .output("LATENT");
        newer_unnamed(schema, false)
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (x, [b, ..]) = latent(inputs, "samples")?;
        let batch_index = match inputs.string("seed_behavior")? {
            "fixed" => {
                let first = x.batch_index.as_ref().and_then(|places| places.first().copied());
                Some(vec![first.unwrap_or(0); b])
            }
            _ => None,
        };
        latent_output(Latent { batch_index, ..Latent::clone(&x) })
    }
}

/// `SetLatentNoiseMask`.
pub struct SetLatentNoiseMask;

impl Node for SetLatentNoiseMask {
    fn schema(&self) -> Schema {
        Schema::new("SetLatentNoiseMask", "latent/inpaint")
            .display("Set Latent Noise Mask")
            .describe("Only the masked part of the latent will be sampled.")
            .input(bare("samples"))
            .input(Input::link("mask", "MASK").bare())
            .output("LATENT")
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (x, _) = latent(inputs, "samples")?;
        let (mask, [b, h, w]) = mask(inputs, "mask")?;
        let mask = shapes::tensor(&[b, 1, h, w], mask.into_data())?;
        latent_output(Latent { noise_mask: Some(mask), ..Latent::clone(&x) })
    }
}

/// `RebatchLatents`.
pub struct RebatchLatents;

/// Samples of one size with a pixel mask and a place each.
struct Batch {
    samples: HostTensor,
    masks: HostTensor,
    places: Vec<usize>,
}

impl Batch {
    /// `processed`: number of samples before this one, for the places.
    fn new(x: &Latent, processed: usize) -> Result<Self, NodeError> {
        let (b, h, w) = (x.samples.dim(0), x.samples.dim(2) * CELL, x.samples.dim(3) * CELL);
        let masks = match &x.noise_mask {
            None => shapes::filled(&[b, h, w], 1.0)?,
            Some(mask) => {
                let rank = mask.shape().len();
                let (mh, mw) = (mask.dim(rank.saturating_sub(2)), mask.dim(rank.saturating_sub(1)));
                let count = mask.len() / (mh * mw).max(1);
                let planes = shapes::tensor(&[count, mh, mw], mask.data().to_vec())?;
                upscale_masks(
                    &planes,
                    Resize { width: w, height: h, method: Method::Bilinear, crop: Crop::Disabled },
                )?
            }
        };
        let places = match &x.batch_index {
            Some(places) => places.clone(),
            None => (processed..processed + b).collect(),
        };
        Ok(Self { samples: x.samples.clone(), masks: repeat_to(&masks, b)?, places })
    }

    fn append(&mut self, other: &Self) -> Result<(), NodeError> {
        self.samples = concat_batch(&[&self.samples, &other.samples])?;
        self.masks = concat_batch(&[&self.masks, &other.masks])?;
        self.places.extend(&other.places);
        Ok(())
    }

    /// Cut into latents of at most `size` samples.
    fn cut(&self, size: usize) -> Result<Vec<Latent>, NodeError> {
        let total = self.samples.dim(0);
        (0..total)
            .step_by(size)
            .map(|start| {
                let count = size.min(total - start);
                let masks = self.masks.rows(start, count);
                let noise_mask = if masks.data().iter().all(|&v| v == 1.0) {
                    None
                } else {
                    let shape = [count, 1, masks.dim(1), masks.dim(2)];
                    Some(shapes::tensor(&shape, masks.into_data())?)
                };
                let batch_index = Some(self.places.iter().copied().skip(start).take(count).collect());
                Ok(Latent { samples: self.samples.rows(start, count), noise_mask, batch_index })
            })
            .collect()
    }
}

impl Node for RebatchLatents {
    fn schema(&self) -> Schema {
        let mut schema = Schema::new("RebatchLatents", "latent/batch")
            .display("Rebatch Latents")
            .module("comfy_extras.nodes_rebatch")
            .describe("Re-cuts a list of latents into batches of a given size.")
            .input(Input::link("latents", "LATENT"))
            .input(Input::int("batch_size", 1, 1, 4096))
            .output("LATENT")
            .list();
        schema.input_is_list = true;
        newer(schema, false)
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let size = list_size(inputs, "batch_size")?;
        let mut done = Vec::new();
        let mut current: Option<Batch> = None;
        let mut processed = 0;
        for item in list_items(inputs, "latents") {
            let x = item
                .downcast::<Latent>()
                .ok_or_else(|| NodeError::input("latents", "holds something else"))?;
            check_size(x.samples.shape())?;
            let next = Batch::new(&x, processed)?;
            processed += next.places.len();
            match &mut current {
                Some(batch) if batch.samples.shape()[1..] == next.samples.shape()[1..] => {
                    batch.append(&next)?
                }
                _ => done.extend(current.replace(next)),
            }
        }
        done.extend(current);
        let latents = done.iter().map(|batch| batch.cut(size)).collect::<Result<Vec<_>, _>>()?;
        let values = latents.into_iter().flatten().map(|x| Value::object("LATENT", x));
        Ok(NodeOutput::one(Value::List(values.collect())))
    }
}

/// The items of an input of a node that takes its inputs as lists.
pub(super) fn list_items<'a>(inputs: &'a Inputs, name: &str) -> &'a [Value] {
    match inputs.get(name) {
        Some(Value::List(items)) => items,
        Some(single) => std::slice::from_ref(single),
        None => &[],
    }
}

/// The first item of a list input, as a positive size.
pub(super) fn list_size(inputs: &Inputs, name: &str) -> Result<usize, NodeError> {
    let mut first = Inputs::default();
    if let Some(value) = list_items(inputs, name).first() {
        first.insert(name, value.clone());
    }
    Ok(first.size(name)?.max(1))
}
