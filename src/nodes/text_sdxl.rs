//! Text to conditioning with the sizes that SDXL models are told.

use super::loaders::ClipHandle;
use super::text::{encode, tokenize};
use super::{Inputs, Node, NodeCtx, NodeError, NodeOutput, Schema, Value};
use crate::diffusion::{CondEntry, Conditioning};
use crate::graph::Input;
use crate::models::detect::ClipVariant;

/// Largest side of a picture.
const MAX_SIDE: u64 = 16384;

/// The SDXL text nodes.
pub(super) fn nodes() -> Vec<Box<dyn Node>> {
    vec![Box::new(ClipTextEncodeSdxl), Box::new(ClipTextEncodeSdxlRefiner)]
}

fn text(name: &'static str) -> Input {
    Input::string(name).opt("multiline", true).opt("dynamicPrompts", true)
}

fn side(name: &'static str, default: i64) -> Input {
    Input::int(name, default, 0, MAX_SIDE)
}

fn output(mut entry: CondEntry, inputs: &Inputs, numbers: &[(&str, &str)]) -> Result<NodeOutput, NodeError> {
    for (field, input) in numbers {
        entry.extra.insert(field, inputs.float(input)?);
    }
    Ok(NodeOutput::one(Value::object("CONDITIONING", Conditioning::from(vec![entry]))))
}

/// A text for each of SDXL's encoders; the shorter one is filled up with empty chunks.
pub(super) fn encode_two(
    ctx: &NodeCtx<'_>,
    clip: &ClipHandle,
    text_l: &str,
    text_g: &str,
) -> Result<CondEntry, NodeError> {
    let text_of = |variant| if variant == ClipVariant::L { text_l } else { text_g };
    let mut longest = 0;
    for part in &clip.parts {
        longest = tokenize(ctx.services, text_of(part.variant), part)?.len().max(longest);
    }
    encode(clip, |part| {
        let mut chunks = tokenize(ctx.services, text_of(part.variant), part)?;
        while chunks.len() < longest {
            chunks.extend(tokenize(ctx.services, "", part)?);
        }
        Ok(chunks)
    })
}

/// `CLIPTextEncodeSDXL`.
pub struct ClipTextEncodeSdxl;

impl Node for ClipTextEncodeSdxl {
    fn schema(&self) -> Schema {
        let schema = Schema::new("CLIPTextEncodeSDXL", "advanced/conditioning")
            .module("comfy_extras.nodes_clip_sdxl")
            .describe("Encodes a text for each of SDXL's encoders, with the sizes that the model is told.")
            .input(Input::link("clip", "CLIP"))
            .input(side("width", 1024))
            .input(side("height", 1024))
            .input(side("crop_w", 0))
            .input(side("crop_h", 0))
            .input(side("target_width", 1024))
            .input(side("target_height", 1024))
            .input(text("text_g"))
            .input(text("text_l"))
            .output("CONDITIONING");
        super::shapes::newer_unnamed(schema, false)
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let clip = inputs.object::<ClipHandle>("clip")?;
        let entry = encode_two(ctx, &clip, inputs.string("text_l")?, inputs.string("text_g")?)?;
        let fields = ["width", "height", "crop_w", "crop_h", "target_width", "target_height"];
        output(entry, inputs, &fields.map(|f| (f, f)))
    }
}

/// `CLIPTextEncodeSDXLRefiner`.
pub struct ClipTextEncodeSdxlRefiner;

impl Node for ClipTextEncodeSdxlRefiner {
    fn schema(&self) -> Schema {
        let schema = Schema::new("CLIPTextEncodeSDXLRefiner", "advanced/conditioning")
            .module("comfy_extras.nodes_clip_sdxl")
            .describe("Encodes a text for SDXL's refiner, with the aesthetic score and size that it is told.")
            .input(Input::float("ascore", 6.0, 0.0, 1000.0).opt("step", 0.01))
            .input(side("width", 1024))
            .input(side("height", 1024))
            .input(text("text"))
            .input(Input::link("clip", "CLIP"))
            .output("CONDITIONING");
        super::shapes::newer_unnamed(schema, false)
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let clip = inputs.object::<ClipHandle>("clip")?;
        let prompt = inputs.string("text")?;
        let entry = encode(&clip, |part| tokenize(ctx.services, prompt, part))?;
        output(entry, inputs, &[("aesthetic_score", "ascore"), ("width", "width"), ("height", "height")])
    }
}
