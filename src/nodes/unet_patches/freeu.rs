//! FreeU: stronger backbone features and weaker low frequencies on the skip
//! connections of the two lowest levels.
//!
//! Source: Si et al., "FreeU: Free lunch in diffusion U-Net", 2023. Version 2
//! scales the backbone by place, as its mean over channels says.

use std::sync::Arc;

use super::attach;
use crate::diffusion::ModelHandle;
use crate::graph::Input;
use crate::models::ModelError;
use crate::models::unet::hooks::{HookCall, Joined, UnetHook, key_of};
use crate::nodes::pure::PureNode;
use crate::nodes::sd_model::SdModel;
use crate::nodes::{Inputs, Node, NodeError, Schema, Value};
use crate::tensor::{ScaleHalf, Tensor};

/// The nodes.
pub(super) fn nodes() -> Vec<Box<dyn Node>> {
    vec![
        PureNode::boxed(|| schema("FreeU", 1.1, 1.2), |inputs| patch(inputs, false)),
        PureNode::boxed(|| schema("FreeU_V2", 1.3, 1.4), |inputs| patch(inputs, true)),
    ]
}

fn schema(class: &'static str, b1: f64, b2: f64) -> Schema {
    let factor = |name, default| Input::float(name, default, 0.0, 10.0).opt("step", 0.01);
    Schema::new(class, "model_patches/unet")
        .module("comfy_extras.nodes_freelunch")
        .describe("Strengthens the UNet's backbone and weakens the coarse part of its skip connections.")
        .input(Input::link("model", "MODEL").bare())
        .input(factor("b1", b1))
        .input(factor("b2", b2))
        .input(factor("s1", 0.9))
        .input(factor("s2", 0.2))
        .output("MODEL")
}

fn patch(inputs: &Inputs, is_by_place: bool) -> Result<Vec<Value>, NodeError> {
    let factor = |name| inputs.float(name).map(|v| v as f32);
    let width = SdModel::of(&*inputs.object::<ModelHandle>("model")?)?.file().unet()?.config().model_channels;
    let levels = [(4 * width, factor("b1")?, factor("s1")?), (2 * width, factor("b2")?, factor("s2")?)];
    attach(inputs, Arc::new(FreeU { levels, is_by_place }))
}

struct FreeU {
    /// Channels of a level, factor on its backbone, factor on its skips' low frequencies.
    levels: [(usize, f32, f32); 2],
    is_by_place: bool,
}

impl UnetHook for FreeU {
    fn key(&self, _: &HookCall<'_>) -> Option<u64> {
        let levels = self.levels.map(|(width, backbone, low)| (width, backbone.to_bits(), low.to_bits()));
        Some(key_of("freeu", (levels, self.is_by_place)))
    }

    fn way_up(&self, call: &HookCall<'_>, h: &Tensor, skip: &Tensor) -> Result<Joined, ModelError> {
        let Some(&(_, backbone, low)) = self.levels.iter().find(|level| level.0 == h.shape().c) else {
            return Ok(Joined::default());
        };
        let strengthened = ScaleHalf { x: h, factor: backbone, is_by_place: self.is_by_place };
        let (h, skip) = (call.ops.scale_half(&strengthened)?, call.ops.scale_low_band(skip, low)?);
        Ok(Joined { h: Some(h), skip: Some(skip) })
    }
}
