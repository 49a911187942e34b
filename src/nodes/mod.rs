//! The node library: one file a category, one registry line a node.
//!
//! A node is a type with a [`Schema`] and an [`execute`](Node::execute).
//! `execute` is synchronous: every prompt in flight has a thread of its own,
//! which blocks while the device works for it, so node code reads top to
//! bottom and HTTP never waits for compute.

pub mod canny;
pub mod clip_vision;
pub mod compositing;
pub mod conditioning;
mod context;
pub mod control;
pub mod controlnet;
pub mod custom_sampling;
pub mod deprecated_loaders;
#[cfg(test)]
mod file_tests;
#[cfg(test)]
mod golden_tests;
pub mod guest_loaders;
pub mod guidance;
pub mod image;
pub mod image_file;
pub mod image_filter;
pub mod image_quantize;
pub mod image_transform;
pub mod inpaint_model;
pub mod latent;
pub mod latent_file;
pub mod latent_math;
pub mod loaders;
pub mod lora;
pub mod lora_save;
pub mod mask;
mod model_inputs;
pub mod model_merge;
pub mod model_sampling;
pub mod model_save;
pub mod newer_families;
#[cfg(test)]
mod object_info_tests;
mod plane;
pub mod preview_any;
pub mod primitive;
mod pure;
pub mod regex;
pub mod sampling;
#[cfg(test)]
mod sampling_tests;
pub(crate) mod sd_model;
mod shapes;
mod step_cache;
pub mod string;
pub mod text;
pub mod text_sdxl;
pub mod tiny_vae;
pub mod unclip;
pub mod unet_patches;
pub mod upscale_model;
pub mod vae;
mod value;

pub use crate::graph::Schema;
pub use context::{NodeCtx, NodeError, PreviewFrame, PreviewMethod, ProgressSink, Services};
pub use value::{Inputs, NodeOutput, Object, Value};

use serde_json::Value as Json;

/// A node class.
pub trait Node: Send + Sync {
    /// What it takes and gives.
    fn schema(&self) -> Schema;

    /// Runs the node once. `inputs` holds converted values for every given input.
    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError>;

    /// A check that the schema can't express (ComfyUI's `VALIDATE_INPUTS`), on
    /// literal inputs only: `Err` holds the text after `"<input> - "`.
    fn validate(&self, services: &Services, inputs: &serde_json::Map<String, Json>) -> Result<(), String> {
        let _ = (services, inputs);
        Ok(())
    }

    /// Inputs that [`validate`](Node::validate) checks itself, for which the
    /// generic checks (such as membership in a list) are left out.
    fn validated_inputs(&self) -> &'static [&'static str] {
        &[]
    }

    /// A fingerprint of the outside world (ComfyUI's `IS_CHANGED`), such as the
    /// hash of a file: it becomes part of the cache key. `None`: inputs say all.
    fn fingerprint(&self, services: &Services, inputs: &serde_json::Map<String, Json>) -> Option<String> {
        let _ = (services, inputs);
        None
    }

    /// Whether results may be taken from the cache at all (`false`: runs every time).
    fn is_cacheable(&self) -> bool {
        true
    }
}

/// Every node class of this build, in the order of `/object_info`.
pub fn registry() -> Vec<Box<dyn Node>> {
    [
        loaders::nodes(),
        guest_loaders::nodes(),
        deprecated_loaders::nodes(),
        lora::nodes(),
        lora_save::nodes(),
        text::nodes(),
        text_sdxl::nodes(),
        clip_vision::nodes(),
        unclip::nodes(),
        inpaint_model::nodes(),
        conditioning::nodes(),
        controlnet::nodes(),
        sampling::nodes(),
        custom_sampling::nodes(),
        guidance::nodes(),
        unet_patches::nodes(),
        step_cache::nodes(),
        model_sampling::nodes(),
        model_merge::nodes(),
        model_save::nodes(),
        newer_families::nodes(),
        latent::nodes(),
        latent_math::nodes(),
        latent_file::nodes(),
        vae::nodes(),
        image::nodes(),
        image_transform::nodes(),
        image_filter::nodes(),
        image_quantize::nodes(),
        canny::nodes(),
        compositing::nodes(),
        image_file::nodes(),
        upscale_model::nodes(),
        mask::nodes(),
        primitive::nodes(),
        string::nodes(),
        regex::nodes(),
        preview_any::nodes(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
