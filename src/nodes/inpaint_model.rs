//! Conditioning for UNets that see a picture beside the latents: inpainting models and InstructPix2Pix.

use std::sync::Arc;

use super::loaders::VaeHandle;
use super::model_inputs::{CONCAT_LATENT, CONCAT_MASK};
use super::vae::{crop_to_multiple, encode, grey_out};
use super::{Inputs, Node, NodeCtx, NodeError, NodeOutput, Schema, Value, shapes};
use crate::diffusion::{Conditioning, Latent};
use crate::graph::Input;
use crate::image::resample::{self, Method, Resize};
use crate::tensor::HostTensor;

/// The nodes of this file.
pub(super) fn nodes() -> Vec<Box<dyn Node>> {
    vec![Box::new(InpaintModelConditioning), Box::new(InstructPixToPixConditioning)]
}

/// Both conditionings with the given tensors beside the latents, then the latent.
fn outputs(inputs: &Inputs, extras: &[(&str, HostTensor)], latent: Latent) -> Result<NodeOutput, NodeError> {
    let mut values = Vec::new();
    let shared: Vec<_> = extras.iter().map(|(name, x)| (*name, Arc::new(x.clone()))).collect();
    for side in ["positive", "negative"] {
        let mut conds = (*inputs.object::<Conditioning>(side)?).clone();
        for cond in &mut conds {
            shared.iter().for_each(|(name, x)| cond.extra.insert(name, x.clone()));
        }
        values.push(Value::object("CONDITIONING", conds));
    }
    values.push(Value::object("LATENT", latent));
    Ok(NodeOutput::many(values))
}

/// `InpaintModelConditioning`.
pub struct InpaintModelConditioning;

impl Node for InpaintModelConditioning {
    fn schema(&self) -> Schema {
        Schema::new("InpaintModelConditioning", "conditioning/inpaint")
            .describe("For inpainting models: the masked picture and the mask as further inputs, and a latent to start from.")
            .input(Input::link("positive", "CONDITIONING").bare())
            .input(Input::link("negative", "CONDITIONING").bare())
            .input(Input::link("vae", "VAE").bare())
            .input(Input::link("pixels", "IMAGE").bare())
            .input(Input::link("mask", "MASK").bare())
            .input(Input::boolean("noise_mask").opt("default", true))
            .named_output("CONDITIONING", "positive")
            .named_output("CONDITIONING", "negative")
            .named_output("LATENT", "latent")
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (picture, [_, h, w, _]) = shapes::image(inputs, "pixels")?;
        let (mask, [masks, _, _]) = shapes::mask(inputs, "mask")?;
        let vae = inputs.object::<VaeHandle>("vae")?.open()?;
        let unit = vae.downscale();
        let mask = resample::upscale_masks(&mask, Resize::to(w, h, Method::Bilinear))
            .map_err(|e| NodeError::failed("ValueError", e))?;
        // The crop treats the mask as a one-channel picture.
        let mask = crop_to_multiple(&mask.reshape(&[masks, h, w, 1]).unwrap_or_default(), unit)?;
        let whole = crop_to_multiple(&picture, unit)?;
        let mut pixels = whole.clone();
        grey_out(&mut pixels, &mask);
        let concat = encode(ctx, &*vae, &pixels, None)?;
        let samples = encode(ctx, &*vae, &whole, None)?;
        let planes = [masks, 1, mask.dim(1), mask.dim(2)];
        let mask = mask.reshape(&planes).unwrap_or_default();
        let noise_mask = inputs.boolean("noise_mask")?.then(|| mask.clone());
        let latent = Latent { noise_mask, ..Latent::new(samples) };
        outputs(inputs, &[(CONCAT_LATENT, concat), (CONCAT_MASK, mask)], latent)
    }
}

/// `InstructPixToPixConditioning`.
pub struct InstructPixToPixConditioning;

impl Node for InstructPixToPixConditioning {
    fn schema(&self) -> Schema {
        let schema = Schema::new("InstructPixToPixConditioning", "conditioning/instructpix2pix")
            .module("comfy_extras.nodes_ip2p")
            .describe("For InstructPix2Pix models: the picture to edit as a further input, and an empty latent of its size.")
            .input(Input::link("positive", "CONDITIONING"))
            .input(Input::link("negative", "CONDITIONING"))
            .input(Input::link("vae", "VAE"))
            .input(Input::link("pixels", "IMAGE"))
            .named_output("CONDITIONING", "positive")
            .named_output("CONDITIONING", "negative")
            .named_output("LATENT", "latent");
        shapes::newer_unnamed(schema, false)
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (picture, _) = shapes::image(inputs, "pixels")?;
        let vae = inputs.object::<VaeHandle>("vae")?.open()?;
        let concat = encode(ctx, &*vae, &crop_to_multiple(&picture, vae.downscale())?, None)?;
        let latent = Latent::new(HostTensor::zeros(concat.shape()));
        outputs(inputs, &[(CONCAT_LATENT, concat)], latent)
    }
}
