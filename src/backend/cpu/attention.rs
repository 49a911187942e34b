//! Attention: cuts heads and queries into tasks, packs operands.

use std::cell::RefCell;

use rayon::prelude::*;

use super::check::{columns, elements_mut};
use super::matmul::Input;
use super::scratch::Scratch;
use super::simd::attend::{Attend, MAX_KEYS};
use super::simd::attend_pack::{PackKeys, PackQueries, PackValues, SLACK, UnpackResult};
use super::simd::element::Element;
use super::simd::product::PANEL;
use super::simd::shared::{TileMut, tiles_mut};
use super::{Exec, bf16_ops};
use crate::tensor::{Attention, DType, Tensor, TensorError};

thread_local! {
    static SCRATCH: RefCell<HeadScratch> = RefCell::default();
}

/// Frees the calling thread's working memory; it comes back when needed.
pub(super) fn release_scratch() {
    SCRATCH.take();
}

#[derive(Default)]
struct HeadScratch {
    rows: Scratch,
    k: Scratch,
    v: Scratch,
    q: Scratch,
    weights: Scratch,
    state: Scratch,
    out: Scratch,
}

/// Panels of queries that share a pass over the keys: their queries and
/// results should fill no more than a quarter of the L2 cache.
fn panels_at_a_time(d: usize) -> usize {
    ((512 << 10) / (2 * d * PANEL * size_of::<f32>())).clamp(1, 16)
}

struct Heads<'a, E> {
    q: Input<'a, E>,
    k: Input<'a, E>,
    v: Input<'a, E>,
    queries: usize,
    keys: usize,
    d: usize,
    is_causal: bool,
    factor: f32,
}

/// See [`crate::tensor::Backend::attention`].
pub(super) fn attention<E: Element>(
    exec: &Exec,
    op: &Attention<'_>,
    out: &mut Tensor,
) -> Result<(), TensorError> {
    const OP: &str = "attention";
    let (sq, sk) = (op.q.tensor.shape(), op.k.tensor.shape());
    op.check(out.shape())?;
    // Samples that share keys are neighbours: to every query they are one longer sample.
    let sharing = sq.n / sk.n;
    let d = op.q.width / op.heads;
    let (batch, queries, keys) = (sk.n, sq.positions() * sharing, sk.positions());
    if d == 0 || batch * queries == 0 {
        return Ok(());
    }
    if let Some(tier) = exec.tier.filter(|_| E::DTYPE == DType::BF16 && op.scale > 0.0) {
        return bf16_ops::attention(tier, op, out);
    }
    let heads = Heads {
        q: columns::<E>(OP, &op.q)?,
        k: columns::<E>(OP, &op.k)?,
        v: columns::<E>(OP, &op.v)?,
        queries,
        keys,
        d,
        is_causal: op.is_causal,
        factor: op.scale * std::f32::consts::LOG2_E,
    };
    // Query ranges, cut only as far as the threads need.
    let blocks = queries.div_ceil(PANEL);
    let parts = (2 * exec.threads).div_ceil(op.heads * batch).clamp(1, blocks);
    let mut rows: Vec<usize> = (0..batch)
        .flat_map(|n| (0..parts).map(move |i| n * queries + (blocks * i / parts * PANEL).min(queries)))
        .collect();
    rows.push(batch * queries);
    let cuts: Vec<usize> = (0..=op.heads).map(|h| h * d).collect();
    let tiles = tiles_mut(elements_mut::<E>(OP, out)?, op.q.width, &rows, &cuts);
    tiles.into_par_iter().with_max_len(1).for_each(|tile| {
        SCRATCH.with_borrow_mut(|scratch| heads.task(exec, tile, scratch));
    });
    Ok(())
}

impl<E: Element> Heads<'_, E> {
    fn task(&self, exec: &Exec, mut tile: TileMut<'_, E>, scratch: &mut HeadScratch) {
        let HeadScratch { rows, k, v, q, weights, state, out } = scratch;
        let (d, keys, height) = (self.d, self.keys, exec.isa.tile_rows());
        let group = panels_at_a_time(d).min(tile.rows.div_ceil(PANEL));
        let sample = tile.row / self.queries;
        let first_key = sample * keys;
        let rows = rows.take(keys.max(PANEL) * d.next_multiple_of(SLACK) + SLACK);
        let k = k.take(keys.next_multiple_of(height) * d + SLACK);
        let v = v.take(keys * d + SLACK);
        let q = q.take(group * PANEL * d);
        let out = out.take(group * PANEL * d);
        let weights = weights.take(MAX_KEYS * PANEL);
        let state = state.take(group * 2 * PANEL);
        self.read(exec, &self.k, first_key, tile.column, &mut rows[..keys * d]);
        exec.isa.launch(PackKeys { from: &rows[..keys * d], d, to: k });
        self.read(exec, &self.v, first_key, tile.column, &mut rows[..keys * d]);
        exec.isa.launch(PackValues { from: rows, d, keys, to: v });
        for row in (0..tile.rows).step_by(group * PANEL) {
            let count = (tile.rows - row).min(group * PANEL);
            let panels = count.div_ceil(PANEL);
            for (p, q) in q.chunks_exact_mut(PANEL * d).enumerate().take(panels) {
                let from = &mut rows[..(count - p * PANEL).min(PANEL) * d];
                self.read(exec, &self.q, tile.row + row + p * PANEL, tile.column, from);
                exec.isa.launch(PackQueries { from, d, factor: self.factor, to: q });
            }
            let position = tile.row + row - sample * self.queries;
            let causal_from = self.is_causal.then_some(position);
            exec.isa.launch(Attend { q, panels, k, v, keys, d, causal_from, weights, state, out });
            for (p, out) in out.chunks_exact(PANEL * d).enumerate().take(panels) {
                exec.isa.launch(UnpackResult { from: out, d, to: rows });
                let first = row + p * PANEL;
                let rows = rows.chunks_exact(d.next_multiple_of(SLACK));
                for (j, values) in (first..tile.rows.min(first + PANEL)).zip(rows) {
                    E::narrow_into(exec.isa, &values[..d], tile.row_mut(j, 0, d));
                }
            }
        }
    }

    /// Copies one head's columns of consecutive rows to `[row][D]`.
    fn read(&self, exec: &Exec, from: &Input<'_, E>, first: usize, column: usize, to: &mut [f32]) {
        for (i, to) in to.chunks_exact_mut(self.d).enumerate() {
            E::widen_into(exec.isa, &from.data[(first + i) * from.stride + column..][..self.d], to);
        }
    }
}
