//! unCLIP: Stable Diffusion 2.1 steered by encoded pictures.

use std::sync::Arc;

use super::clip_vision::VisionHandle;
use super::loaders::{ClipHandle, VaeHandle, model_file};
use super::pure::PureNode;
use super::sd_model::SdModel;
use super::{Inputs, Node, NodeCtx, NodeError, NodeOutput, Schema, Value};
use crate::diffusion::noise::Generator;
use crate::diffusion::{Conditioning, DenoiseItem, ModelHandle};
use crate::graph::Input;
use crate::models::clip_vision::VisionOutput;
use crate::models::detect::Family;
use crate::models::unet::noise_augmentation::NoiseAugmentor;
use crate::models::{ModelError, ModelFile};

/// Name of a conditioning's pictures: `Vec<UnclipPicture>`.
const PICTURES: &str = "unclip_conditioning";
/// Noise on the sum of several pictures.
const MERGED_NOISE: f64 = 0.05;
/// The reference draws this noise from the run's seed less ten.
const SEED_OFFSET: u64 = 10;

/// A picture that a conditioning steers towards.
#[derive(Clone)]
struct UnclipPicture {
    output: Arc<VisionOutput>,
    strength: f64,
    noise: f64,
}

/// The nodes.
pub(super) fn nodes() -> Vec<Box<dyn Node>> {
    vec![Box::new(UnclipCheckpointLoader), PureNode::boxed(conditioning_schema, conditioning)]
}

/// `unCLIPCheckpointLoader`.
pub struct UnclipCheckpointLoader;

impl Node for UnclipCheckpointLoader {
    fn schema(&self) -> Schema {
        Schema::new("unCLIPCheckpointLoader", "loaders")
            .describe("Loads a checkpoint that pictures can steer, with its picture encoder.")
            .input(Input::model_file("ckpt_name", "checkpoints").bare())
            .output("MODEL")
            .output("CLIP")
            .output("VAE")
            .output("CLIP_VISION")
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let file = model_file(ctx.services, "checkpoints", inputs.string("ckpt_name")?)?;
        let model = SdModel::new(file.clone())?;
        let clip = ClipHandle::of(std::slice::from_ref(&file))?;
        // As in the reference, a checkpoint of another family gives null.
        let vision = match file.family()? {
            Family::Sd2Unclip => Value::object("CLIP_VISION", VisionHandle::of(file.clone())?),
            _ => Value::Json(serde_json::Value::Null),
        };
        Ok(NodeOutput::many(vec![
            Value::object("MODEL", ModelHandle(Arc::new(model))),
            Value::object("CLIP", clip),
            Value::object("VAE", VaeHandle::new(file)),
            vision,
        ]))
    }
}

fn conditioning_schema() -> Schema {
    Schema::new("unCLIPConditioning", "conditioning")
        .describe("Steers an unCLIP model towards an encoded picture. Can be chained.")
        .input(Input::link("conditioning", "CONDITIONING").bare())
        .input(Input::link("clip_vision_output", "CLIP_VISION_OUTPUT").bare())
        .input(Input::float("strength", 1.0, -10.0, 10.0).opt("step", 0.01))
        .input(Input::float("noise_augmentation", 0.0, 0.0, 1.0).opt("step", 0.01))
        .output("CONDITIONING")
}

fn conditioning(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let given = inputs.object::<Conditioning>("conditioning")?;
    let (strength, noise) = (inputs.float("strength")?, inputs.float("noise_augmentation")?);
    if strength == 0.0 {
        return Ok(vec![Value::shared("CONDITIONING", given)]);
    }
    let output = inputs.object::<VisionOutput>("clip_vision_output")?;
    let mut conds = (*given).clone();
    for cond in &mut conds {
        let mut pictures =
            cond.extra.get::<Vec<UnclipPicture>>(PICTURES).map_or_else(Vec::new, |p| (*p).clone());
        pictures.push(UnclipPicture { output: output.clone(), strength, noise });
        cond.extra.insert(PICTURES, pictures);
    }
    Ok(vec![Value::object("CONDITIONING", conds)])
}

/// The vector of `width` values that an unCLIP model is told: zeros without a picture.
pub(super) fn vector(width: usize, file: &ModelFile, item: &DenoiseItem<'_>) -> Result<Vec<f32>, ModelError> {
    let Some(pictures) = item.cond.extra.get::<Vec<UnclipPicture>>(PICTURES) else {
        return Ok(vec![0.0; width]);
    };
    let augmentor = file.network::<NoiseAugmentor>()?;
    if 2 * augmentor.width() != width {
        let what = "values of a picture's embedding and its noise level";
        return Err(ModelError::Input { what, expected: width, found: 2 * augmentor.width() });
    }
    merged(&augmentor, &pictures, item.run.seed.wrapping_sub(SEED_OFFSET))
}

/// One picture with its noise; or the weighted sum of several, each with its noise, with noise of its own.
fn merged(augmentor: &NoiseAugmentor, pictures: &[UnclipPicture], seed: u64) -> Result<Vec<f32>, ModelError> {
    let width = augmentor.width();
    let mut sum = vec![0.0f32; 2 * width];
    let mut count = 0;
    // Every picture gets the same noise; that of the sum is what comes after it.
    let mut generator = Generator::new(seed);
    for picture in pictures {
        for embedding in picture.output.image_embeds.data().chunks(picture.output.image_embeds.dim(1).max(1))
        {
            generator = Generator::new(seed);
            let noise = generator.randn(&[1, width]);
            let level = NoiseAugmentor::level(picture.noise);
            let noisy = augmentor.augment(embedding, level, noise.data())?;
            let weight = picture.strength as f32;
            sum.iter_mut().zip(&noisy).for_each(|(sum, value)| *sum += value * weight);
            count += 1;
        }
    }
    if count < 2 {
        return Ok(sum);
    }
    let noise = generator.randn(&[1, width]);
    augmentor.augment(&sum[..width], NoiseAugmentor::level(MERGED_NOISE), noise.data())
}

#[cfg(test)]
#[path = "unclip_tests.rs"]
mod tests;
