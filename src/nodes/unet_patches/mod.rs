//! Changes to the inside of the UNet, attached to a model: one file a technique.
//!
//! What acts inside the network is a [`UnetHook`]; what acts on the guided
//! prediction as well is a [`GuidancePatch`](crate::diffusion::guidance_patch::GuidancePatch)
//! that asks the model again, with a hook of its own.

mod downscale;
mod freeu;
mod hypernetwork;
mod hypertile;
mod perturbed_attention;
mod self_attention_guidance;
#[cfg(test)]
mod tests;
mod token_merging;

use std::sync::Arc;

use super::sd_model::SdModel;
use super::{Inputs, Node, NodeError, Value};
use crate::diffusion::ModelHandle;
use crate::models::unet::hooks::UnetHook;

/// The nodes of this folder.
pub(super) fn nodes() -> Vec<Box<dyn Node>> {
    [
        freeu::nodes(),
        hypertile::nodes(),
        hypernetwork::nodes(),
        perturbed_attention::nodes(),
        self_attention_guidance::nodes(),
        token_merging::nodes(),
        downscale::nodes(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// The input `model` with one more hook.
fn attach(inputs: &Inputs, hook: Arc<dyn UnetHook>) -> Result<Vec<Value>, NodeError> {
    let model = inputs.object::<ModelHandle>("model")?;
    let hooked = SdModel::of(&model)?.with_hook(hook);
    Ok(vec![Value::object("MODEL", model.with_network(Arc::new(hooked)))])
}
