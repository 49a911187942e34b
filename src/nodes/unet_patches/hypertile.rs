//! HyperTile: queries of self-attention in tiles, so that large pictures cost less.
//!
//! As in the reference, the queries are cut into tiles but keys and values into as
//! many runs of neighbouring tokens: tile `i` attends to run `i`. Of several tile
//! counts within `swap_size`, the reference draws one at random (never the last,
//! so that sizes 1 and 2 leave no choice); here the draw has its own generator.

use std::sync::{Arc, Mutex, PoisonError};

use super::attach;
use crate::diffusion::noise::Generator;
use crate::graph::Input;
use crate::models::ModelError;
use crate::models::layers::head_scale;
use crate::models::unet::hooks::{HookCall, SelfAttention, Site, UnetHook, key_of};
use crate::nodes::pure::PureNode;
use crate::nodes::shapes::newer_unnamed;
use crate::nodes::{Inputs, Node, NodeError, Schema, Value};
use crate::tensor::{Attention, Cols, Shape, SwapTokens, Tensor};

/// Pixels to a latent cell.
const CELL: usize = 8;
/// Smallest tile, in pixels.
const SMALLEST: usize = 32;

/// The node.
pub(super) fn nodes() -> Vec<Box<dyn Node>> {
    vec![PureNode::boxed(schema, patch)]
}

fn schema() -> Schema {
    let schema = Schema::new("HyperTile", "model_patches/unet")
        .module("comfy_extras.nodes_hypertile")
        .describe("Lets self-attention look at parts of the picture only: faster for large pictures.")
        .input(Input::link("model", "MODEL"))
        .input(Input::int("tile_size", 256, 1, 2048))
        .input(Input::int("swap_size", 2, 1, 128))
        .input(Input::int("max_depth", 0, 0, 10))
        .input(Input::boolean("scale_depth").opt("default", false))
        .output("MODEL");
    newer_unnamed(schema, false)
}

fn patch(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let tile = inputs.size("tile_size")?.max(SMALLEST) / CELL;
    let (choices, max_depth) = (inputs.size("swap_size")?, inputs.size("max_depth")? as u32);
    attach(inputs, Arc::new(HyperTile::new(tile, choices, max_depth, inputs.boolean("scale_depth")?)))
}

pub(super) struct HyperTile {
    /// Smallest tile, in latent cells.
    tile: usize,
    choices: usize,
    max_depth: u32,
    is_scaled: bool,
    draws: Mutex<Generator>,
}

/// How tokens are cut: `rows`×`columns` tiles of `h`×`w` tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Tiling {
    rows: usize,
    columns: usize,
    h: usize,
    w: usize,
}

impl Tiling {
    fn count(&self) -> usize {
        self.rows * self.columns
    }
}

impl HyperTile {
    /// Tiles of at least `tile` latent cells, as one of `choices` sizes, at levels up to `max_depth`.
    pub(super) fn new(tile: usize, choices: usize, max_depth: u32, is_scaled: bool) -> Self {
        Self { tile, choices, max_depth, is_scaled, draws: Mutex::new(Generator::new(0)) }
    }

    /// The tiling of a block with that many tokens; `None` if it isn't tiled.
    fn tiling(&self, (height, width): (usize, usize), places: usize) -> Option<Tiling> {
        let side = |n: usize, depth: u32| n as f64 / f64::from(1u32 << depth);
        let depth = (0..=self.max_depth).find(|d| side(height, *d) * side(width, *d) == places as f64)?;
        // The reference takes the picture's width for the rows; for a square it is the same.
        let aspect = width as f64 / height as f64;
        let round = |v: f64| v.sqrt().round_ties_even() as usize;
        let (h, w) = (round(places as f64 * aspect), round(places as f64 / aspect));
        let smallest = if self.is_scaled { self.tile << depth } else { self.tile };
        let (rows, columns) = (self.parts(h, smallest), self.parts(w, smallest));
        let fits = h * w == places && rows * columns > 1;
        fits.then(|| Tiling { rows, columns, h: h / rows, w: w / columns })
    }

    /// Into how many parts of at least `smallest` a side is cut.
    fn parts(&self, side: usize, smallest: usize) -> usize {
        let divisors = (smallest.min(side).max(1)..=side).filter(|d| side.is_multiple_of(*d));
        let parts: Vec<usize> = divisors.map(|d| side / d).take(self.choices.max(1)).collect();
        let last = parts.len().saturating_sub(1);
        let draw = match last {
            0 | 1 => 0,
            _ => {
                let mut draws = self.draws.lock().unwrap_or_else(PoisonError::into_inner);
                draws.randint(0, last as i64, 1).first().map_or(0, |i| *i as usize)
            }
        };
        parts.get(draw).copied().unwrap_or(1)
    }
}

impl UnetHook for HyperTile {
    /// A draw among several tilings is another one in every pass.
    fn key(&self, _: &HookCall<'_>) -> Option<u64> {
        let (tile, max_depth, is_scaled) = (self.tile, self.max_depth, self.is_scaled);
        (self.choices <= 2).then(|| key_of("hypertile", (tile, self.choices, max_depth, is_scaled)))
    }

    fn self_attention(
        &self,
        call: &HookCall<'_>,
        _: Site<'_>,
        attention: &SelfAttention<'_>,
    ) -> Result<Option<Tensor>, ModelError> {
        let s = attention.qkv.shape();
        let Some(tiling) = self.tiling(call.size, s.positions()) else { return Ok(None) };
        let (c, ops) = (s.c / 3, call.ops);
        let tiles = |n: usize, c: usize| Shape::tokens(n * tiling.count(), tiling.h * tiling.w, c);
        // Rows of a tile, which stand apart in the picture, become neighbours, and neighbours again rows.
        let mut q = ops.swap_tokens(&SwapTokens {
            x: Cols::range(attention.qkv, 0, c),
            rows: tiling.h,
            columns: tiling.columns,
            run: tiling.w,
        })?;
        let mut runs = ops.columns(Cols::range(attention.qkv, c, 2 * c))?;
        q.reshape(tiles(s.n, c))?;
        runs.reshape(tiles(s.n, 2 * c))?;
        let mut attended = ops.attention(&Attention {
            q: Cols::all(&q),
            k: Cols::range(&runs, 0, c),
            v: Cols::range(&runs, c, c),
            heads: attention.heads,
            is_causal: false,
            scale: head_scale(c, attention.heads),
        })?;
        attended.reshape(s.with_channels(c))?;
        let back =
            SwapTokens { x: Cols::all(&attended), rows: tiling.columns, columns: tiling.h, run: tiling.w };
        ops.swap_tokens(&back).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(tile: usize, max_depth: u32, is_scaled: bool) -> HyperTile {
        HyperTile::new(tile, 2, max_depth, is_scaled)
    }

    /// A side of 24 has the divisors 8, 12 and 24 from 8 on: three parts.
    #[test]
    fn sides_are_cut_by_the_smallest_divisor() {
        let tiling = hook(8, 0, false).tiling((24, 24), 576);
        assert_eq!(tiling, Some(Tiling { rows: 3, columns: 3, h: 8, w: 8 }));
        assert_eq!(hook(8, 0, false).tiling((24, 24), 144), None);
        assert_eq!(hook(4, 1, false).tiling((24, 24), 144), Some(Tiling { rows: 3, columns: 3, h: 4, w: 4 }));
        assert_eq!(hook(4, 1, true).tiling((32, 32), 256), Some(Tiling { rows: 2, columns: 2, h: 8, w: 8 }));
        assert_eq!(hook(32, 0, false).tiling((24, 24), 576), None);
    }
}
