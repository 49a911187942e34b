//! Nodes made for Flux, SD3 and edit models.
//!
//! Workflows mix them with other nodes, and what only marks a conditioning works
//! on any model (the models here ignore the mark, as in the reference). What needs a
//! text encoder of those families says so: T5-XXL is not supported.

use std::sync::Arc;

use super::loaders::ClipHandle;
use super::pure::PureNode;
use super::shapes::newer_unnamed;
use super::string::choice;
use super::{Inputs, Node, NodeError, Schema, Value};
use crate::diffusion::{CondEntry, Conditioning, Latent};
use crate::graph::{FileList, Input};
use crate::tensor::HostTensor;

/// Guidance scale that a distilled model is told, as an extra of a conditioning.
pub const GUIDANCE: &str = "guidance";
/// Latents that an edit model looks at, as an extra of a conditioning.
pub const REFERENCE_LATENTS: &str = "reference_latents";

const FLUX: &str = "comfy_extras.nodes_flux";
const FLUX_CATEGORY: &str = "advanced/conditioning/flux";
const SD3: &str = "comfy_extras.nodes_sd3";

/// The nodes.
pub(super) fn nodes() -> Vec<Box<dyn Node>> {
    vec![
        PureNode::boxed(flux_guidance_schema, flux_guidance),
        PureNode::boxed(flux_disable_guidance_schema, flux_disable_guidance),
        PureNode::boxed(reference_latent_schema, reference_latent),
        PureNode::boxed(flux_text_schema, |inputs| needs_t5(inputs, "Flux")),
        PureNode::boxed(sd3_text_schema, |inputs| needs_t5(inputs, "Stable Diffusion 3")),
        PureNode::boxed(triple_clip_schema, triple_clip),
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

fn needs_t5(inputs: &Inputs, family: &str) -> Result<Vec<Value>, NodeError> {
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
