//! Token merging: similar tokens of a picture share a query of self-attention.
//!
//! One token of every 2×2 square is kept as a target, the others are matched to
//! their most similar target, and the best-matching share is merged into it.
//! Source: Bolya and Hoffman, "Token merging for fast Stable Diffusion", 2023. Which
//! token of a square is the target is drawn at random; the reference draws from a
//! generator of the whole process, so its pictures differ from ours in detail.

use std::sync::Arc;

use rayon::prelude::*;

use super::{attach, tokens};
use crate::diffusion::noise::Generator;
use crate::graph::Input;
use crate::models::ModelError;
use crate::models::layers::head_scale;
use crate::models::unet::hooks::{HookCall, SelfAttention, Site, UnetHook};
use crate::nodes::pure::PureNode;
use crate::nodes::shapes::newer_unnamed;
use crate::nodes::{Inputs, Node, NodeError, Schema, Value};
use crate::tensor::{Attention, Cols, HostTensor, Tensor};

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
        let targets = targets((h, w), &mut Generator::new(0));
        let normed = call.ops.download_tokens(attention.normed)?;
        let matches: Vec<Match> =
            (0..s.n).map(|n| Match::new(normed.row(n), s.positions(), &targets, merged)).collect();
        let (c, kept) = (s.c / 3, matches.first().map_or(0, |m| m.kept()));
        let qkv = call.ops.download_tokens(attention.qkv)?;
        let queries = matches.iter().enumerate().flat_map(|(n, m)| m.merge(qkv.row(n), c)).collect();
        let q = tokens(call.ops, [s.n, kept, c], queries)?;
        let attended = call.ops.attention(&Attention {
            q: Cols::all(&q),
            k: Cols::range(attention.qkv, c, c),
            v: Cols::range(attention.qkv, 2 * c, c),
            heads: attention.heads,
            is_causal: false,
            scale: head_scale(c, attention.heads),
        })?;
        let attended: HostTensor = call.ops.download_tokens(&attended)?;
        let out = matches.iter().enumerate().flat_map(|(n, m)| m.spread(attended.row(n), c)).collect();
        tokens(call.ops, [s.n, s.positions(), c], out).map(Some)
    }
}

/// One token of every whole 2×2 square, in the picture's order.
fn targets((h, w): (usize, usize), generator: &mut Generator) -> Vec<usize> {
    let (rows, columns) = (h / 2, w / 2);
    let draws = generator.randint(0, 4, rows * columns);
    let place = |(square, draw): (usize, &i64)| {
        let (y, x) = (square / columns * 2, square % columns * 2);
        (y + *draw as usize / 2) * w + x + *draw as usize % 2
    };
    let mut places: Vec<usize> = draws.iter().enumerate().map(place).collect();
    places.sort_unstable();
    places
}

/// Which tokens of a sample are merged into which.
struct Match {
    targets: Vec<usize>,
    /// Tokens that stay alone.
    alone: Vec<usize>,
    /// Tokens that are merged, and the number of the target of each.
    merged: Vec<(usize, usize)>,
}

impl Match {
    /// Matches the tokens `[S, C]` by cosine similarity; `count` of them are merged.
    fn new(x: &[f32], places: usize, targets: &[usize], count: usize) -> Self {
        let c = x.len() / places.max(1);
        let unit = |place: usize| {
            let token = &x[place * c..(place + 1) * c];
            let norm = token.iter().map(|v| v * v).sum::<f32>().sqrt();
            token.iter().map(move |v| v / norm)
        };
        let aims: Vec<f32> = targets.iter().flat_map(|t| unit(*t)).collect();
        let mut is_target = vec![false; places];
        targets.iter().for_each(|t| is_target[*t] = true);
        let sources: Vec<usize> = (0..places).filter(|p| !is_target[*p]).collect();
        let best = |place: &usize| {
            let token: Vec<f32> = unit(*place).collect();
            let similarity = |aim: &[f32]| -> f32 { aim.iter().zip(&token).map(|(a, b)| a * b).sum() };
            let scores = aims.chunks_exact(c.max(1)).map(similarity).enumerate();
            let top = scores.fold((0, f32::NEG_INFINITY), |best, at| if at.1 > best.1 { at } else { best });
            (*place, top.0, top.1)
        };
        let mut pairs: Vec<(usize, usize, f32)> = sources.par_iter().map(best).collect();
        pairs.sort_by(|a, b| b.2.total_cmp(&a.2));
        let alone = pairs.iter().skip(count).map(|p| p.0).collect();
        let merged = pairs.iter().take(count).map(|p| (p.0, p.1)).collect();
        Self { targets: targets.to_vec(), alone, merged }
    }

    /// Tokens after merging.
    fn kept(&self) -> usize {
        self.alone.len() + self.targets.len()
    }

    /// The queries (first `c` of `3·c` columns): those alone, then the targets as the
    /// mean of themselves and what is merged into them.
    fn merge(&self, qkv: &[f32], c: usize) -> Vec<f32> {
        let query = |place: usize| &qkv[place * 3 * c..place * 3 * c + c];
        let mut out: Vec<f32> =
            self.alone.iter().chain(&self.targets).flat_map(|p| query(*p).iter().copied()).collect();
        let sums = &mut out[self.alone.len() * c..];
        let mut counts = vec![1f32; self.targets.len()];
        for &(place, target) in &self.merged {
            counts[target] += 1.0;
            let sum = &mut sums[target * c..(target + 1) * c];
            sum.iter_mut().zip(query(place)).for_each(|(s, v)| *s += v);
        }
        for (sum, count) in sums.chunks_exact_mut(c.max(1)).zip(&counts) {
            sum.iter_mut().for_each(|s| *s /= count);
        }
        out
    }

    /// Gives every token the result of the query that it was merged into.
    fn spread(&self, x: &[f32], c: usize) -> Vec<f32> {
        let places = self.kept() + self.merged.len();
        let mut out = vec![0f32; places * c];
        let whole = self.alone.iter().chain(&self.targets).copied().enumerate();
        let merged = self.merged.iter().map(|(place, target)| (self.alone.len() + target, *place));
        for (from, to) in whole.chain(merged) {
            out[to * c..(to + 1) * c].copy_from_slice(&x[from * c..(from + 1) * c]);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Four tokens of which two point the same way: they share one query.
    #[test]
    fn similar_tokens_share_a_query() {
        let x = [1.0, 0.0, 2.0, 0.1, 0.0, 1.0, -1.0, 0.5];
        let m = Match::new(&x, 4, &[0], 1);
        assert_eq!(m.merged, [(1, 0)]);
        assert_eq!(m.kept(), 3);
        let qkv: Vec<f32> = (0..4).flat_map(|i| [i as f32, 9.0, 9.0]).collect();
        let merged = m.merge(&qkv, 1);
        assert_eq!(merged[2], 0.5);
        let spread = m.spread(&[7.0, 8.0, 5.0], 1);
        assert_eq!((spread[0], spread[1]), (5.0, 5.0));
        assert_eq!(spread.iter().filter(|v| **v == 7.0 || **v == 8.0).count(), 2);
    }

    #[test]
    fn every_square_has_one_target() {
        let places = targets((4, 5), &mut Generator::new(3));
        assert_eq!(places.len(), 4);
        let mut squares: Vec<_> = places.iter().map(|p| (p / 5 / 2, p % 5 / 2)).collect();
        squares.sort_unstable();
        assert_eq!(squares, [(0, 0), (0, 1), (1, 0), (1, 1)]);
    }
}
