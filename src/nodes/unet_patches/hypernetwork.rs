//! Hypernetworks on a model: other inputs for the keys and values of every attention.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::graph::Input;
use crate::models::hypernetwork::Hypernetwork;
use crate::models::layers::Ops;
use crate::models::unet::hooks::{HookCall, UnetHook, key_of};
use crate::models::{ModelError, ModelFile};
use crate::nodes::loaders::model_file;
use crate::nodes::{Inputs, Node, NodeCtx, NodeError, NodeOutput, Schema};
use crate::tensor::Tensor;

/// The node.
pub(super) fn nodes() -> Vec<Box<dyn Node>> {
    vec![Box::new(HypernetworkLoader)]
}

/// `HypernetworkLoader`.
pub struct HypernetworkLoader;

impl Node for HypernetworkLoader {
    fn schema(&self) -> Schema {
        Schema::new("HypernetworkLoader", "loaders")
            .module("comfy_extras.nodes_hypernetwork")
            .describe("Lets a hypernetwork change what a model's attentions look at. Can be chained.")
            .input(Input::link("model", "MODEL").bare())
            .input(Input::model_file("hypernetwork_name", "hypernetworks").bare())
            .input(Input::float("strength", 1.0, -10.0, 10.0).opt("step", 0.01))
            .output("MODEL")
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let file = model_file(ctx.services, "hypernetworks", inputs.string("hypernetwork_name")?)?;
        file.network::<Hypernetwork>()?;
        let strength = inputs.float("strength")? as f32;
        let hook = Hook { file, strength, id: NEXT_ID.fetch_add(1, Ordering::Relaxed) };
        Ok(NodeOutput::many(super::attach(inputs, Arc::new(hook))?))
    }
}

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

struct Hook {
    file: Arc<ModelFile>,
    strength: f32,
    /// No other hook has it.
    id: u64,
}

impl UnetHook for Hook {
    fn key(&self, _: &HookCall<'_>) -> Option<u64> {
        Some(key_of("hypernetwork", self.id))
    }

    fn changes_sources(&self) -> Option<u64> {
        Some(self.id)
    }

    fn sources(&self, ops: Ops<'_>, sources: [&Tensor; 2]) -> Result<Option<[Tensor; 2]>, ModelError> {
        self.file.network::<Hypernetwork>()?.apply(ops, sources, self.strength)
    }
}
