//! The ControlNet of the diffusers library under the names of latent diffusion.
//!
//! Its half UNet is named as a UNet's; what a ControlNet has besides begins with `controlnet_`.

use super::diffusers_unet::Blocks;

/// Where the convolutions of the picture are.
const HINT: &str = "controlnet_cond_embedding.";

/// Names of one net.
pub(super) struct Control {
    unet: Blocks,
    /// Convolutions of the picture between the first and the last.
    hint_blocks: usize,
}

impl Control {
    pub(super) fn of<'a>(names: impl Iterator<Item = &'a str> + Clone) -> Self {
        let is_there = |i: &usize| names.clone().any(|name| name.starts_with(&format!("{HINT}blocks.{i}.")));
        Self { hint_blocks: (0..).take_while(is_there).count(), unet: Blocks::of(names.clone()) }
    }

    /// What `name` becomes; `None` if it keeps its name, as what union nets have besides does.
    pub(super) fn rename(&self, name: &str) -> Option<String> {
        if let Some(rest) = name.strip_prefix("controlnet_mid_block.") {
            return Some(format!("middle_block_out.0.{rest}"));
        }
        if let Some(rest) = name.strip_prefix("controlnet_down_blocks.") {
            let (block, rest) = rest.split_once('.')?;
            return Some(format!("zero_convs.{block}.0.{rest}"));
        }
        let Some(hint) = name.strip_prefix(HINT) else { return self.unet.rename(name) };
        // Activations between the convolutions have numbers of their own.
        let (convolution, rest) = match hint.strip_prefix("blocks.") {
            Some(block) => {
                let (block, rest) = block.split_once('.')?;
                (block.parse::<usize>().ok()?.checked_add(1)?, rest)
            }
            None => match hint.split_once('.')? {
                ("conv_in", rest) => (0, rest),
                ("conv_out", rest) => (self.hint_blocks + 1, rest),
                _ => return None,
            },
        };
        Some(format!("input_hint_block.{}.{rest}", 2 * convolution))
    }
}
