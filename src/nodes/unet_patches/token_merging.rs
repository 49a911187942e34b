//! Token merging: similar tokens of a picture share a query of self-attention.
//!
//! How: [`crate::tensor::merge`]. Source: Bolya and Hoffman, "Token merging for fast
//! Stable Diffusion", 2023. Which token of a square is the target is drawn at random; the reference draws from a
//! generator of the whole process, so its pictures differ from ours in detail.

use std::sync::Arc;

use super::attach;
use crate::diffusion::noise::Generator;
use crate::graph::Input;
use crate::models::ModelError;
use crate::models::layers::head_scale;
use crate::models::unet::hooks::{HookCall, SelfAttention, Site, UnetHook, key_of};
use crate::nodes::pure::PureNode;
use crate::nodes::shapes::newer_unnamed;
use crate::nodes::{Inputs, Node, NodeError, Schema, Value};
use crate::tensor::{Attention, Cols, MatchTokens, Tensor};

/// The node.
pub(super) fn nodes() -> Vec<Box<dyn Node>> {
    vec![PureNode::boxed(schema, patch)]
}

fn schema() -> Schema {
    let schema = Schema::new("TomePatchModel", "model_patches/unet")
        .module("comfy_extras.nodes_tomesd")
        .describe("Merges similar places of the picture in self-attention: faster for large pictures.")
        .input(Input::link("model", "MODEL"))
        .input(Input::float("ratio", 0.3, 0.0, 1.0).opt("step", 0.01))
        .output("MODEL");
    newer_unnamed(schema, false)
}

fn patch(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    attach(inputs, Arc::new(TokenMerging::new(inputs.float("ratio")?)))
}

pub(super) struct TokenMerging {
    ratio: f64,
}

impl TokenMerging {
    /// Merges that share of all tokens away.
    pub(super) fn new(ratio: f64) -> Self {
        Self { ratio }
    }
}

impl UnetHook for TokenMerging {
    fn key(&self, _: &HookCall<'_>) -> Option<u64> {
        Some(key_of("token merging", self.ratio.to_bits()))
    }

    fn self_attention(
        &self,
        call: &HookCall<'_>,
        _: Site<'_>,
        attention: &SelfAttention<'_>,
    ) -> Result<Option<Tensor>, ModelError> {
        let (s, (h, w)) = (attention.qkv.shape(), call.size);
        let merged = (s.positions() as f64 * self.ratio) as usize;
        // Blocks at the full size only.
        if s.positions() != h * w || merged == 0 || h < 2 || w < 2 {
            return Ok(None);
        }
        let targets = targets((h / 2) * (w / 2));
        let (ops, c) = (call.ops, s.c / 3);
        let matching = MatchTokens { x: attention.normed, size: call.size, targets: &targets, merged };
        let rows = ops.match_tokens(&matching)?;
        let q = ops.merge_tokens(Cols::range(attention.qkv, 0, c), &rows)?;
        let attended = ops.attention(&Attention {
            q: Cols::all(&q),
            k: Cols::range(attention.qkv, c, c),
            v: Cols::range(attention.qkv, 2 * c, c),
            heads: attention.heads,
            is_causal: false,
            scale: head_scale(c, attention.heads),
        })?;
        ops.spread_tokens(&attended, &rows).map(Some)
    }
}

/// Which token of every square is the target: the same draws in every call.
fn targets(squares: usize) -> Vec<u8> {
    Generator::new(0).randint(0, 4, squares).into_iter().map(|draw| draw as u8).collect()
}

#[cfg(test)]
mod tests {
    use super::targets;

    #[test]
    fn targets_are_drawn_from_all_places_of_a_square() {
        let drawn = targets(400);
        let count = |place| drawn.iter().filter(|drawn| **drawn == place).count();
        assert!((0..4).all(|place| count(place) > 60), "{:?}", [0, 1, 2, 3].map(count));
        assert_eq!(drawn.len(), 400);
    }
}
