//! Perturbed-attention guidance: away from a prediction whose middle block
//! passes the values through in place of self-attention.
//!
//! Source: Ahn et al., "Self-rectifying diffusion sampling with
//! perturbed-attention guidance", 2024.

use std::sync::Arc;

use crate::diffusion::guidance_patch::{GuidancePatch, PatchContext, Predictions};
use crate::diffusion::regions::evaluate;
use crate::diffusion::{DiffusionError, Field, ModelHandle};
use crate::graph::Input;
use crate::models::ModelError;
use crate::models::unet::hooks::{HookCall, SelfAttention, Site, UnetHook, key_of};
use crate::nodes::pure::PureNode;
use crate::nodes::sd_model::SdModel;
use crate::nodes::shapes::newer_unnamed;
use crate::nodes::{Inputs, Node, NodeError, Schema, Value};
use crate::tensor::{Cols, Tensor};

/// The node.
pub(super) fn nodes() -> Vec<Box<dyn Node>> {
    vec![PureNode::boxed(schema, patch)]
}

fn schema() -> Schema {
    let schema = Schema::new("PerturbedAttentionGuidance", "model_patches/unet")
        .module("comfy_extras.nodes_pag")
        .describe("Guides away from a prediction without self-attention in the middle block.")
        .input(Input::link("model", "MODEL"))
        .input(Input::float("scale", 3.0, 0.0, 100.0).opt("step", 0.01).opt("round", 0.01))
        .output("MODEL");
    newer_unnamed(schema, false)
}

fn patch(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let model = inputs.object::<ModelHandle>("model")?;
    SdModel::of(&model)?;
    let patch = PerturbedAttention { scale: inputs.float("scale")? as f32 };
    Ok(vec![Value::object("MODEL", model.with_patch(Arc::new(patch)))])
}

#[derive(Clone)]
struct PerturbedAttention {
    scale: f32,
}

impl GuidancePatch for PerturbedAttention {
    fn fresh(&self) -> Box<dyn GuidancePatch> {
        Box::new(self.clone())
    }

    fn after(
        &mut self,
        ctx: &PatchContext<'_>,
        preds: &Predictions,
        guided: Field,
    ) -> Result<Field, DiffusionError> {
        let (Some(model), Some(positive)) =
            (ctx.model.network().downcast_ref::<SdModel>(), ctx.sides.first())
        else {
            return Ok(guided);
        };
        if self.scale == 0.0 {
            return Ok(guided);
        }
        let perturbed = model.with_hook(Arc::new(ValuesOnly));
        let out = evaluate(&perturbed, &[Some(positive)], ctx.x, ctx.sigma)?;
        let Some(weak) = out.first() else { return Ok(guided) };
        guided.plus(self.scale.into(), (&preds.cond, weak))
    }
}

/// Every token attends to itself alone in the middle block.
pub(super) struct ValuesOnly;

impl UnetHook for ValuesOnly {
    fn key(&self, _: &HookCall<'_>) -> Option<u64> {
        Some(key_of("values only", ()))
    }

    fn self_attention(
        &self,
        call: &HookCall<'_>,
        site: Site<'_>,
        attention: &SelfAttention<'_>,
    ) -> Result<Option<Tensor>, ModelError> {
        if !site.is_middle() {
            return Ok(None);
        }
        let c = attention.qkv.shape().c / 3;
        call.ops.columns(Cols::range(attention.qkv, 2 * c, c)).map(Some)
    }
}
