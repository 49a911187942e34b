//! Smaller feature maps below one stage for the first part of the sampling, so
//! that large pictures get one composition instead of several.

use std::sync::Arc;

use super::attach;
use crate::diffusion::ModelHandle;
use crate::graph::Input;
use crate::models::ModelError;
use crate::models::unet::hooks::{HookCall, Joined, UnetHook, key_of};
use crate::nodes::pure::PureNode;
use crate::nodes::shapes::{method, newer, round, unknown};
use crate::nodes::string::choice;
use crate::nodes::{Inputs, Node, NodeError, Schema, Value};
use crate::tensor::{Filter, Tensor};

const METHODS: [&str; 5] = ["bicubic", "nearest-exact", "bilinear", "area", "bislerp"];

/// The node.
pub(super) fn nodes() -> Vec<Box<dyn Node>> {
    vec![PureNode::boxed(schema, patch)]
}

fn schema() -> Schema {
    let share = |name, default| Input::float(name, default, 0.0, 1.0).opt("step", 0.001);
    let schema = Schema::new("PatchModelAddDownscale", "model_patches/unet")
        .display("PatchModelAddDownscale (Kohya Deep Shrink)")
        .module("comfy_extras.nodes_model_downscale")
        .describe("Shrinks the feature maps below a block for a part of the sampling, for large pictures.")
        .input(Input::link("model", "MODEL"))
        .input(Input::int("block_number", 3, 1, 32).opt("step", 1))
        .input(Input::float("downscale_factor", 2.0, 0.1, 9.0).opt("step", 0.001))
        .input(share("start_percent", 0.0))
        .input(share("end_percent", 0.35))
        .input(Input::boolean("downscale_after_skip").opt("default", true))
        .input(choice("downscale_method", &METHODS))
        .input(choice("upscale_method", &METHODS))
        .output("MODEL");
    newer(schema, false)
}

fn patch(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let model = inputs.object::<ModelHandle>("model")?;
    let sampling = model.0.sampling();
    let hook = Downscale {
        block: inputs.size("block_number")?,
        factor: inputs.float("downscale_factor")?,
        start: sampling.percent_to_sigma(inputs.float("start_percent")?),
        end: sampling.percent_to_sigma(inputs.float("end_percent")?),
        is_after_skip: inputs.boolean("downscale_after_skip")?,
        down: filter(inputs, "downscale_method")?,
        up: filter(inputs, "upscale_method")?,
    };
    attach(inputs, Arc::new(hook))
}

fn filter(inputs: &Inputs, name: &str) -> Result<Filter, NodeError> {
    let filter = method(inputs, name)?.filter();
    filter.ok_or_else(|| unknown(name, inputs.string(name).unwrap_or_default()))
}

struct Downscale {
    block: usize,
    factor: f64,
    /// Used from this sigma …
    start: f64,
    /// … down to this one.
    end: f64,
    is_after_skip: bool,
    down: Filter,
    up: Filter,
}

impl Downscale {
    fn is_active(&self, call: &HookCall<'_>) -> bool {
        let sigma = f64::from(call.sigma);
        sigma <= self.start && sigma >= self.end
    }
}

impl UnetHook for Downscale {
    fn key(&self, call: &HookCall<'_>) -> Option<u64> {
        let what = (self.block, self.factor.to_bits(), self.is_after_skip, self.down, self.up);
        Some(key_of("downscale", self.is_active(call).then_some(what)))
    }

    fn way_down(
        &self,
        call: &HookCall<'_>,
        block: usize,
        is_after_skip: bool,
        h: &Tensor,
    ) -> Result<Option<Tensor>, ModelError> {
        if block != self.block || is_after_skip != self.is_after_skip || !self.is_active(call) {
            return Ok(None);
        }
        let side = |n: usize| round(n as f64 * (1.0 / self.factor)).max(1);
        let size = (side(h.shape().h), side(h.shape().w));
        call.ops.resize(h, self.down, size).map(Some)
    }

    fn way_up(&self, call: &HookCall<'_>, h: &Tensor, skip: &Tensor) -> Result<Joined, ModelError> {
        let (have, want) = (h.shape(), skip.shape());
        if have.h == want.h {
            return Ok(Joined::default());
        }
        Ok(Joined { h: Some(call.ops.resize(h, self.up, (want.h, want.w))?), skip: None })
    }
}
