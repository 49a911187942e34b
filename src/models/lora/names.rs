//! The names under which LoRA files know a model's layers.

use super::diffusers;
use crate::models::detect::{ClipConfig, UnetConfig};
use crate::models::patch::DIFFUSION;

/// A tensor of a model and the names of its layer in LoRA files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The tensor's name among patches.
    pub name: String,
    /// Number of its elements.
    pub elements: usize,
    /// Names of the layer in files.
    pub aliases: Vec<String>,
}

/// The layers of a diffusion model.
pub fn unet_targets(config: &UnetConfig) -> Vec<Target> {
    let diffusers = diffusers::Modules::of(config);
    let names = config.tensors().into_iter().filter_map(|(name, shape)| {
        let name = name.strip_prefix(&config.prefix)?.to_owned();
        Some(target(&name, shape.iter().product(), &diffusers))
    });
    names.collect()
}

fn target(name: &str, elements: usize, diffusers: &diffusers::Modules) -> Target {
    let full = format!("{DIFFUSION}{name}");
    let Some(layer) = name.strip_suffix(".weight") else {
        return Target { aliases: vec![full.clone()], elements, name: full };
    };
    let flat = |name: &str| format!("lora_unet_{}", name.replace('.', "_"));
    let mut aliases = vec![flat(layer), format!("{DIFFUSION}{layer}")];
    if let Some(theirs) = diffusers.name_of(layer) {
        aliases.push(flat(&theirs));
        aliases.push(format!("lycoris_{}", theirs.replace('.', "_")));
        // Attention processors once held the matrices; PEFT files name the layer itself.
        let processor = theirs.replace(".to_", ".processor.to_");
        let processor =
            processor.strip_suffix(".to_out.0").map_or(processor.clone(), |p| format!("{p}.to_out"));
        for name in [&processor, &theirs] {
            for alias in [format!("unet.{name}"), name.clone()] {
                if !aliases.contains(&alias) {
                    aliases.push(alias);
                }
            }
        }
    }
    Target { name: full, elements, aliases }
}

/// The layers of a text encoder; `is_second` if the model has another one before it.
pub fn clip_targets(config: &ClipConfig, is_second: bool) -> Vec<Target> {
    let (flat, dotted) = if is_second { ("te2", "text_encoder_2") } else { ("te1", "text_encoder") };
    let namespace = format!("{}.transformer.text_model.", config.variant.key());
    let names = config.tensors().into_iter().filter_map(|(name, shape)| {
        let layer = name.strip_prefix(&config.prefix)?.strip_suffix(".weight")?.to_owned();
        // Attention and MLP only, as in the reference.
        let is_known = layer.contains(".self_attn.") || layer.contains(".mlp.");
        is_known.then(|| (layer, shape.iter().product()))
    });
    let target = |(layer, elements): (String, usize)| {
        let under = layer.replace('.', "_");
        let mut aliases = vec![
            format!("lora_{flat}_text_model_{under}"),
            format!("{dotted}.text_model.{layer}"),
            format!("text_encoders.{namespace}{layer}"),
        ];
        if !is_second {
            // Files for models with one encoder don't number it.
            aliases.push(format!("lora_te_text_model_{under}"));
        }
        Target { name: format!("{namespace}{layer}.weight"), elements, aliases }
    };
    let projection = config.projection.as_ref().map(|(_, width)| Target {
        name: format!("{}.transformer.text_projection.weight", config.variant.key()),
        elements: width * config.width,
        aliases: vec![format!("lora_{flat}_text_projection")],
    });
    names.map(target).chain(projection).collect()
}
