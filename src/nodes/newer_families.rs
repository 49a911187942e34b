//! Nodes made for Flux, SD3 and edit models.
//!
//! Workflows mix them with other nodes, and what only marks a conditioning works
//! on any model (the models here ignore the mark, as in the reference). What needs a
//! text encoder of those families says so: T5-XXL is not supported. In ComfyUI, too, encoding for Flux
//! fails with any text encoder that is not Flux's.

use std::sync::Arc;

use super::loaders::ClipHandle;
use super::pure::PureNode;
use super::shapes::{image, newer_unnamed, resize_images};
use super::string::choice;
use super::text_sdxl::encode_two;
use super::{Inputs, Node, NodeCtx, NodeError, NodeOutput, Schema, Value};
use crate::diffusion::{CondEntry, Conditioning, Latent};
use crate::graph::{FileList, Input};
use crate::image::{Crop, Method, Resize};
use crate::models::text::TextKind;
use crate::tensor::HostTensor;

/// Guidance scale that a distilled model is told, as an extra of a conditioning.
pub const GUIDANCE: &str = "guidance";
/// Latents that an edit model looks at, as an extra of a conditioning.
pub const REFERENCE_LATENTS: &str = "reference_latents";

/// How they are told apart, as an extra of a conditioning.
pub const REFERENCE_METHOD: &str = "reference_latents_method";

/// Widths and heights that Flux Kontext was trained with.
const KONTEXT_SIZES: [(usize, usize); 17] = [
    (672, 1568),
    (688, 1504),
    (720, 1456),
    (752, 1392),
    (800, 1328),
    (832, 1248),
    (880, 1184),
    (944, 1104),
    (1024, 1024),
    (1104, 944),
    (1184, 880),
    (1248, 832),
    (1328, 800),
    (1392, 752),
    (1456, 720),
    (1504, 688),
    (1568, 672),
];

const FLUX: &str = "comfy_extras.nodes_flux";
const FLUX_CATEGORY: &str = "advanced/conditioning/flux";
const SD3: &str = "comfy_extras.nodes_sd3";

/// The nodes.
pub(super) fn nodes() -> Vec<Box<dyn Node>> {
    vec![
        PureNode::boxed(flux_guidance_schema, flux_guidance),
        PureNode::boxed(flux_disable_guidance_schema, flux_disable_guidance),
        PureNode::boxed(reference_latent_schema, reference_latent),
        PureNode::boxed(flux_text_schema, |inputs| needs_t5_encoder(inputs, "Flux")),
        Box::new(ClipTextEncodeSd3),
        PureNode::boxed(triple_clip_schema, triple_clip),
        PureNode::boxed(tokenizer_schema, |inputs| {
            Ok(vec![Value::shared("CLIP", inputs.object::<ClipHandle>("clip")?)])
        }),
        PureNode::boxed(kontext_scale_schema, kontext_scale),
        PureNode::boxed(reference_method_schema, reference_method),
    ]
}

fn schema(class: &'static str, category: &'static str, module: &'static str, about: &'static str) -> Schema {
    newer_unnamed(Schema::new(class, category).module(module).describe(about), false)
}

/// Every entry of the input `conditioning`, changed.
fn change(inputs: &Inputs, f: impl Fn(&mut CondEntry)) -> Result<Vec<Value>, NodeError> {
    let mut conds = (*inputs.object::<Conditioning>("conditioning")?).clone();
    conds.iter_mut().for_each(f);
    Ok(vec![Value::object("CONDITIONING", conds)])
}

fn guidance() -> Input {
    Input::float("guidance", 3.5, 0.0, 100.0).opt("step", 0.1)
}

fn prompt(name: &'static str) -> Input {
    Input::string(name).opt("multiline", true).opt("dynamicPrompts", true)
}

fn flux_guidance_schema() -> Schema {
    schema("FluxGuidance", FLUX_CATEGORY, FLUX, "Sets the guidance that a distilled model is told.")
        .input(Input::link("conditioning", "CONDITIONING"))
        .input(guidance())
        .output("CONDITIONING")
}

fn flux_guidance(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let guidance = inputs.float("guidance")?;
    change(inputs, |entry| entry.extra.insert(GUIDANCE, guidance))
}

fn flux_disable_guidance_schema() -> Schema {
    schema("FluxDisableGuidance", FLUX_CATEGORY, FLUX, "Removes the guidance that a distilled model is told.")
        .input(Input::link("conditioning", "CONDITIONING"))
        .output("CONDITIONING")
}

fn flux_disable_guidance(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    change(inputs, |entry| entry.extra.remove(GUIDANCE))
}

fn reference_latent_schema() -> Schema {
    let (category, module) = ("advanced/conditioning/edit_models", "comfy_extras.nodes_edit_model");
    schema("ReferenceLatent", category, module, "Adds a latent that an edit model looks at.")
        .input(Input::link("conditioning", "CONDITIONING"))
        .input(Input::link("latent", "LATENT").optional())
        .output("CONDITIONING")
}

fn reference_latent(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let latent = inputs.object_opt::<Latent>("latent")?;
    change(inputs, |entry| {
        let Some(latent) = &latent else { return };
        let earlier = entry.extra.get::<Vec<Arc<HostTensor>>>(REFERENCE_LATENTS);
        let mut all = earlier.map(|list| list.to_vec()).unwrap_or_default();
        all.push(Arc::new(latent.samples.clone()));
        entry.extra.insert(REFERENCE_LATENTS, all);
    })
}

fn reference_method_schema() -> Schema {
    let about = "How an edit model tells several latents that it looks at apart.";
    let schema = Schema::new("FluxKontextMultiReferenceLatentMethod", FLUX_CATEGORY);
    newer_unnamed(schema.module(FLUX).describe(about), true)
        .input(Input::link("conditioning", "CONDITIONING"))
        .input(choice("reference_latents_method", &["offset", "index", "uxo/uno"]))
        .output("CONDITIONING")
}

fn reference_method(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let method = inputs.string("reference_latents_method")?.to_owned();
    change(inputs, |entry| entry.extra.insert(REFERENCE_METHOD, method.clone()))
}

fn kontext_scale_schema() -> Schema {
    let about = "Resizes and crops a picture to the nearest of the sizes that Flux Kontext was trained with.";
    schema("FluxKontextImageScale", FLUX_CATEGORY, FLUX, about)
        .input(Input::link("image", "IMAGE"))
        .output("IMAGE")
}

fn kontext_scale(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let (x, [_, h, w, _]) = image(inputs, "image")?;
    let aspect = w as f64 / h as f64;
    let distance = |(w, h): &(usize, usize)| (aspect - *w as f64 / *h as f64).abs();
    let nearest = KONTEXT_SIZES.iter().min_by(|a, b| distance(a).total_cmp(&distance(b)));
    let (width, height) = nearest.copied().unwrap_or((1024, 1024));
    let to = Resize { width, height, method: Method::Lanczos, crop: Crop::Center };
    Ok(vec![Value::object("IMAGE", resize_images(&x, to)?)])
}

/// Tells T5 tokenizers how much to pad; other encoders pay no heed, as in the reference.
fn tokenizer_schema() -> Schema {
    let length = |name| Input::int(name, 0, 0, 10_000).opt("step", 1);
    let about = "How T5 text encoders pad their tokens; no effect on the encoders of the families here.";
    let schema = Schema::new("T5TokenizerOptions", "_for_testing/conditioning");
    newer_unnamed(schema.module("comfy_extras.nodes_cond").describe(about), true)
        .input(Input::link("clip", "CLIP"))
        .input(length("min_padding"))
        .input(length("min_length"))
        .output("CLIP")
}

fn flux_text_schema() -> Schema {
    schema("CLIPTextEncodeFlux", FLUX_CATEGORY, FLUX, "Encodes two texts for Flux; needs its text encoders.")
        .input(Input::link("clip", "CLIP"))
        .input(prompt("clip_l"))
        .input(prompt("t5xxl"))
        .input(guidance())
        .output("CONDITIONING")
}

fn sd3_text_schema() -> Schema {
    let about = "Encodes three texts for Stable Diffusion 3; needs its text encoders.";
    schema("CLIPTextEncodeSD3", "advanced/conditioning", SD3, about)
        .input(Input::link("clip", "CLIP"))
        .input(prompt("clip_l"))
        .input(prompt("clip_g"))
        .input(prompt("t5xxl"))
        .input(choice("empty_padding", &["none", "empty_prompt"]))
        .output("CONDITIONING")
}

/// `CLIPTextEncodeSD3`. As in ComfyUI, SDXL's two encoders will do where nothing is for T5-XXL.
struct ClipTextEncodeSd3;

impl Node for ClipTextEncodeSd3 {
    fn schema(&self) -> Schema {
        sd3_text_schema()
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let clip = inputs.object::<ClipHandle>("clip")?;
        let needs_t5 = !inputs.string("t5xxl")?.is_empty() || inputs.string("empty_padding")? != "none";
        if needs_t5 || clip.kind()? != TextKind::Sdxl {
            return needs_t5_encoder(inputs, "Stable Diffusion 3").map(NodeOutput::many);
        }
        let entry = encode_two(ctx, &clip, inputs.string("clip_l")?, inputs.string("clip_g")?)?;
        Ok(NodeOutput::one(Value::object("CONDITIONING", Conditioning::from(vec![entry]))))
    }
}

fn needs_t5_encoder(inputs: &Inputs, family: &str) -> Result<Vec<Value>, NodeError> {
    inputs.object::<ClipHandle>("clip")?;
    let what = format!(
        "is no text encoder of {family}: it has no T5-XXL, and that family is not supported; use CLIPTextEncode"
    );
    Err(NodeError::input("clip", &what))
}

fn triple_clip_schema() -> Schema {
    let file = |name| {
        let list = FileList::Models { folder: "text_encoders", extra: Vec::new() };
        Input::files(name, list).opt("multiselect", false)
    };
    let about = "Loads the three text encoders of Stable Diffusion 3.";
    schema("TripleCLIPLoader", "advanced/loaders", SD3, about)
        .input(file("clip_name1"))
        .input(file("clip_name2"))
        .input(file("clip_name3"))
        .output("CLIP")
}

fn triple_clip(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let name = inputs.string("clip_name1")?;
    let message = format!(
        "{name}: three text encoders are Stable Diffusion 3's (CLIP-L, CLIP-G and T5-XXL), a family that is not supported"
    );
    Err(NodeError::failed("ModelError", message))
}
