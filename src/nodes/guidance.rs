//! Changes to the guidance step, attached to a model.

use std::sync::Arc;

use super::latent_math::LatentOperation;
use super::pure::PureNode;
use super::shapes::{newer, newer_unnamed};
use super::{Inputs, Node, NodeError, Schema, Value};
use crate::diffusion::guidance_patch::BuiltinPatch;
use crate::diffusion::{Conditioning, DiffusionError, ModelHandle};
use crate::graph::Input;

/// The guidance nodes.
pub(super) fn nodes() -> Vec<Box<dyn Node>> {
    vec![
        PureNode::boxed(rescale_cfg_schema, rescale_cfg),
        PureNode::boxed(renorm_cfg_schema, renorm_cfg),
        PureNode::boxed(cfg_zero_star_schema, |inputs| attach(inputs, BuiltinPatch::CfgZeroStar)),
        PureNode::boxed(cfg_norm_schema, cfg_norm),
        PureNode::boxed(tcfg_schema, |inputs| attach(inputs, BuiltinPatch::TangentialDamping)),
        PureNode::boxed(epsilon_scaling_schema, epsilon_scaling),
        PureNode::boxed(fresca_schema, fresca),
        PureNode::boxed(apg_schema, apg),
        PureNode::boxed(differential_diffusion_schema, differential_diffusion),
        PureNode::boxed(perp_neg_schema, perp_neg),
        PureNode::boxed(latent_operation_schema, latent_operation),
    ]
}

fn schema(class: &'static str, category: &'static str, module: &'static str) -> Schema {
    Schema::new(class, category).module(module).input(Input::link("model", "MODEL"))
}

/// The input `model` with one more patch.
fn attach(inputs: &Inputs, patch: BuiltinPatch) -> Result<Vec<Value>, NodeError> {
    let model = inputs.object::<ModelHandle>("model")?;
    Ok(vec![Value::object("MODEL", model.with_patch(Arc::new(patch)))])
}

fn single(inputs: &Inputs, name: &str) -> Result<f32, NodeError> {
    inputs.float(name).map(|v| v as f32)
}

fn rescale_cfg_schema() -> Schema {
    Schema::new("RescaleCFG", "advanced/model")
        .module("comfy_extras.nodes_model_advanced")
        .describe("Scales the guided prediction back to the deviation of the unguided one.")
        .input(Input::link("model", "MODEL").bare())
        .input(Input::float("multiplier", 0.7, 0.0, 1.0).opt("step", 0.01))
        .output("MODEL")
}

fn rescale_cfg(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    attach(inputs, BuiltinPatch::RescaleCfg { multiplier: single(inputs, "multiplier")? })
}

fn renorm_cfg_schema() -> Schema {
    let number = |name, default| Input::float(name, default, 0.0, 100.0).opt("step", 0.01);
    let schema = schema("RenormCFG", "advanced/model", "comfy_extras.nodes_lumina2")
        .describe(
            "Limits the guided prediction's norm to that of the positive one; no guidance from a sigma up.",
        )
        .input(number("cfg_trunc", 100.0).opt("default", 100))
        .input(number("renorm_cfg", 1.0))
        .output("MODEL");
    newer_unnamed(schema, false)
}

fn renorm_cfg(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let (truncation, limit) = (single(inputs, "cfg_trunc")?, inputs.float("renorm_cfg")?);
    attach(inputs, BuiltinPatch::RenormCfg { truncation, limit })
}

fn cfg_zero_star_schema() -> Schema {
    let schema = schema("CFGZeroStar", "advanced/guidance", "comfy_extras.nodes_cfg")
        .describe("Scales the negative side to fit the positive one best before guiding.")
        .named_output("MODEL", "patched_model");
    newer_unnamed(schema, false)
}

fn cfg_norm_schema() -> Schema {
    let schema = schema("CFGNorm", "advanced/guidance", "comfy_extras.nodes_cfg")
        .describe("Limits the guided prediction's norm to that of the positive one.")
        .input(Input::float("strength", 1.0, 0.0, 100.0).opt("step", 0.01))
        .named_output("MODEL", "patched_model");
    newer_unnamed(schema, true)
}

fn cfg_norm(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    attach(inputs, BuiltinPatch::CfgNorm { strength: single(inputs, "strength")? })
}

fn tcfg_schema() -> Schema {
    let schema = schema("TCFG", "advanced/guidance", "comfy_extras.nodes_tcfg")
        .display("Tangential Damping CFG")
        .describe("Keeps of the negative side what lies along the main direction of both sides.")
        .named_output("MODEL", "patched_model");
    newer(schema, false)
}

fn epsilon_scaling_schema() -> Schema {
    let factor = Input::float("scaling_factor", 1.005, 0.5, 1.5).opt("step", 0.001);
    let schema = schema("Epsilon Scaling", "model_patches/unet", "comfy_extras.nodes_eps")
        .describe("Divides the predicted noise by a factor.")
        .input(factor.opt("display", "number"))
        .output("MODEL");
    newer_unnamed(schema, false)
}

fn epsilon_scaling(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let factor = single(inputs, "scaling_factor")?;
    if factor == 0.0 {
        return Err(NodeError::input("scaling_factor", "must not be 0"));
    }
    attach(inputs, BuiltinPatch::EpsilonScaling { factor })
}

fn fresca_schema() -> Schema {
    let scale = |name, default| Input::float(name, default, 0.0, 10.0).opt("step", 0.01);
    let schema = schema("FreSca", "_for_testing", "comfy_extras.nodes_fresca")
        .describe("Scales guidance by frequency: large forms and details apart.")
        .input(scale("scale_low", 1.0))
        .input(scale("scale_high", 1.25))
        .input(Input::int("freq_cutoff", 20, 1, 10_000).opt("step", 1))
        .output("MODEL");
    newer(schema, true)
}

fn fresca(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let patch = BuiltinPatch::FreSca {
        low: single(inputs, "scale_low")?,
        high: single(inputs, "scale_high")?,
        cutoff: inputs.size("freq_cutoff")?,
    };
    attach(inputs, patch)
}

fn apg_schema() -> Schema {
    let schema = schema("APG", "sampling/custom_sampling", "comfy_extras.nodes_apg")
        .display("Adaptive Projected Guidance")
        .describe("Limits guidance and damps its part along the positive prediction.")
        .input(Input::float("eta", 1.0, -10.0, 10.0).opt("step", 0.01))
        .input(Input::float("norm_threshold", 5.0, 0.0, 50.0).opt("step", 0.1))
        .input(Input::float("momentum", 0.0, -5.0, 1.0).opt("step", 0.01))
        .output("MODEL");
    newer(schema, false)
}

fn apg(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let patch = BuiltinPatch::Apg {
        eta: single(inputs, "eta")?,
        norm_threshold: single(inputs, "norm_threshold")?,
        momentum: single(inputs, "momentum")?,
        state: None,
    };
    attach(inputs, patch)
}

fn differential_diffusion_schema() -> Schema {
    let strength = Input::float("strength", 1.0, 0.0, 1.0).opt("step", 0.01);
    let module = "comfy_extras.nodes_differential_diffusion";
    let schema = schema("DifferentialDiffusion", "_for_testing", module)
        .display("Differential Diffusion")
        .describe("Reads the noise mask as a strength for every place.")
        .input(strength.optional())
        .output("MODEL");
    newer(schema, true)
}

fn differential_diffusion(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let strength = if inputs.get("strength").is_some() { single(inputs, "strength")? } else { 1.0 };
    attach(inputs, BuiltinPatch::DifferentialDiffusion { strength })
}

fn perp_neg_schema() -> Schema {
    let schema = schema("PerpNeg", "_for_testing", "comfy_extras.nodes_perpneg")
        .display("Perp-Neg (DEPRECATED by PerpNegGuider)")
        .describe("The negative prompt counts only as far as it is perpendicular to the positive one.")
        .input(Input::link("empty_conditioning", "CONDITIONING"))
        .input(Input::float("neg_scale", 1.0, 0.0, 100.0).opt("step", 0.01))
        .output("MODEL");
    newer(schema, true).flag("deprecated", true)
}

fn perp_neg(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let patch = BuiltinPatch::PerpNeg {
        empty: inputs.object::<Conditioning>("empty_conditioning")?,
        negative_scale: inputs.float("neg_scale")?,
    };
    attach(inputs, patch)
}

fn latent_operation_schema() -> Schema {
    let class = "LatentApplyOperationCFG";
    let schema = schema(class, "latent/advanced/operations", "comfy_extras.nodes_latent")
        .describe("Runs a latent operation on the guidance direction of every step.")
        .input(Input::link("operation", "LATENT_OPERATION"))
        .output("MODEL");
    newer_unnamed(schema, true)
}

fn latent_operation(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let operation = *inputs.object::<LatentOperation>("operation")?;
    let apply = move |x: &_| operation.apply(x).map_err(DiffusionError::model);
    attach(inputs, BuiltinPatch::LatentOperation(Arc::new(apply)))
}
