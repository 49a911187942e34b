//! Names of a UNet's layers in the diffusers library.
//!
//! That library groups blocks by level where the latent-diffusion layout
//! numbers them in a row, and calls the parts of a residual block otherwise.

use crate::models::detect::UnetConfig;

/// Parts of a residual block: here, there.
const RESIDUAL: &[(&str, &str)] = &[
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
];

/// Layers outside the blocks.
const SINGLE: &[(&str, &str)] = &[
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("label_emb.0.0", "add_embedding.linear_1"),
    ("label_emb.0.2", "add_embedding.linear_2"),
    ("input_blocks.0.0", "conv_in"),
    ("out.0", "conv_norm_out"),
    ("out.2", "conv_out"),
];

enum Part {
    Single,
    Residual,
    Transformer,
}

/// Modules of one UNet by their names here.
pub(super) struct Modules(Vec<(String, String, Part)>);

impl Modules {
    /// The modules of a UNet.
    pub fn of(config: &UnetConfig) -> Self {
        let single = |(ours, theirs): &(&str, &str)| (ours.to_string(), theirs.to_string(), Part::Single);
        let mut modules = Self(SINGLE.iter().map(single).collect());
        modules.way_down(config);
        modules.add("middle_block.0".into(), "mid_block.resnets.0".into(), Part::Residual);
        modules.add("middle_block.1".into(), "mid_block.attentions.0".into(), Part::Transformer);
        modules.add("middle_block.2".into(), "mid_block.resnets.1".into(), Part::Residual);
        modules.way_up(config);
        modules
    }

    fn add(&mut self, ours: String, theirs: String, part: Part) {
        self.0.push((ours, theirs, part));
    }

    fn way_down(&mut self, config: &UnetConfig) {
        let mut index = 1;
        for (level, &blocks) in config.num_res_blocks.iter().enumerate() {
            for block in 0..blocks {
                let (ours, theirs) = (format!("input_blocks.{index}"), format!("down_blocks.{level}"));
                self.add(format!("{ours}.0"), format!("{theirs}.resnets.{block}"), Part::Residual);
                self.add(format!("{ours}.1"), format!("{theirs}.attentions.{block}"), Part::Transformer);
                index += 1;
            }
            let theirs = format!("down_blocks.{level}.downsamplers.0.conv");
            self.add(format!("input_blocks.{index}.0.op"), theirs, Part::Single);
            index += 1;
        }
    }

    fn way_up(&mut self, config: &UnetConfig) {
        let mut index = 0;
        for (level, &blocks) in config.num_res_blocks.iter().rev().enumerate() {
            for block in 0..=blocks {
                let (ours, theirs) = (format!("output_blocks.{index}"), format!("up_blocks.{level}"));
                self.add(format!("{ours}.0"), format!("{theirs}.resnets.{block}"), Part::Residual);
                self.add(format!("{ours}.1"), format!("{theirs}.attentions.{block}"), Part::Transformer);
                if block == blocks {
                    let place = if config.output_depth.get(index).is_some_and(|d| *d > 0) { 2 } else { 1 };
                    let theirs = format!("{theirs}.upsamplers.0.conv");
                    self.add(format!("{ours}.{place}.conv"), theirs, Part::Single);
                }
                index += 1;
            }
        }
    }

    /// What the library calls a layer, if it has it.
    pub fn name_of(&self, layer: &str) -> Option<String> {
        self.0.iter().find_map(|(ours, theirs, part)| {
            let rest = layer.strip_prefix(ours.as_str())?;
            match (part, rest.strip_prefix('.')) {
                (Part::Single, None) if rest.is_empty() => Some(theirs.clone()),
                (Part::Transformer, Some(rest)) if rest != "conv" => Some(format!("{theirs}.{rest}")),
                (Part::Residual, Some(rest)) => {
                    let (_, name) = RESIDUAL.iter().find(|(ours, _)| *ours == rest)?;
                    Some(format!("{theirs}.{name}"))
                }
                _ => None,
            }
        })
    }
}
