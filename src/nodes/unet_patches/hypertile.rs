//! HyperTile: queries of self-attention in tiles, so that large pictures cost less.
//!
//! As in the reference, the queries are cut into tiles but keys and values into as
//! many runs of neighbouring tokens: tile `i` attends to run `i`. Of several tile
//! counts within `swap_size`, the reference draws one at random (never the last,
//! so that sizes 1 and 2 leave no choice); here the draw has its own generator.

use std::sync::{Arc, Mutex, PoisonError};

use super::{attach, tokens};
use crate::diffusion::noise::Generator;
use crate::graph::Input;
use crate::models::ModelError;
use crate::models::layers::head_scale;
use crate::models::unet::hooks::{HookCall, SelfAttention, Site, UnetHook};
use crate::nodes::pure::PureNode;
use crate::nodes::shapes::newer_unnamed;
use crate::nodes::{Inputs, Node, NodeError, Schema, Value};
use crate::tensor::{Attention, Cols, Tensor};

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

    /// For every token in the order of tiles its place in the picture.
    fn places(&self) -> impl Iterator<Item = usize> + '_ {
        let width = self.columns * self.w;
        (0..self.count()).flat_map(move |tile| {
            let (top, left) = (tile / self.columns * self.h, tile % self.columns * self.w);
            (0..self.h * self.w).map(move |i| (top + i / self.w) * width + left + i % self.w)
        })
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
    fn self_attention(
        &self,
        call: &HookCall<'_>,
        _: Site<'_>,
        attention: &SelfAttention<'_>,
    ) -> Result<Option<Tensor>, ModelError> {
        let s = attention.qkv.shape();
        let Some(tiling) = self.tiling(call.size, s.positions()) else { return Ok(None) };
        let (c, each) = (s.c / 3, tiling.h * tiling.w);
        let order: Vec<usize> = tiling.places().collect();
        let qkv = call.ops.download_tokens(attention.qkv)?;
        let samples = s.n * tiling.count();
        let mut queries = Vec::with_capacity(s.n * order.len() * c);
        for n in 0..s.n {
            order.iter().for_each(|p| queries.extend_from_slice(&qkv.row(n)[p * 3 * c..p * 3 * c + c]));
        }
        let q = tokens(call.ops, [samples, each, c], queries)?;
        let runs = tokens(call.ops, [samples, each, 3 * c], qkv.into_data())?;
        let attended = call.ops.attention(&Attention {
            q: Cols::all(&q),
            k: Cols::range(&runs, c, c),
            v: Cols::range(&runs, 2 * c, c),
            heads: attention.heads,
            is_causal: false,
            scale: head_scale(c, attention.heads),
        })?;
        let attended = call.ops.download_tokens(&attended)?;
        let mut out = vec![0f32; s.n * order.len() * c];
        for (token, values) in attended.data().chunks_exact(c).enumerate() {
            let place = token / order.len() * order.len() + order[token % order.len()];
            out[place * c..(place + 1) * c].copy_from_slice(values);
        }
        tokens(call.ops, [s.n, order.len(), c], out).map(Some)
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

    #[test]
    fn tiles_hold_every_place_once() {
        let tiling = Tiling { rows: 2, columns: 3, h: 2, w: 1 };
        let places: Vec<usize> = tiling.places().collect();
        assert_eq!(places, [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]);
    }
}
