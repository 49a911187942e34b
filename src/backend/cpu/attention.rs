//! Attention: cuts heads and queries into tasks, packs operands.

use std::cell::RefCell;

use rayon::prelude::*;

use super::Exec;
use super::check::{columns, elements_mut, shape, size};
use super::matmul::Input;
use super::scratch::Scratch;
use super::simd::attend::{Attend, KEYS, pack_keys};
use super::simd::element::Element;
use super::simd::product::PANEL;
use super::simd::shared::{TileMut, tiles_mut};
use crate::tensor::{Attention, Tensor, TensorError};

thread_local! {
    static SCRATCH: RefCell<HeadScratch> = RefCell::default();
}

#[derive(Default)]
struct HeadScratch {
    rows: Scratch,
    k: Scratch,
    v: Scratch,
    q: Scratch,
    scores: Scratch,
    out: Scratch,
}

struct Heads<'a, E> {
    q: Input<'a, E>,
    k: Input<'a, E>,
    v: Input<'a, E>,
    queries: usize,
    keys: usize,
    is_shared: bool,
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
    shape(OP, sq.with_channels(op.q.width), out.shape())?;
    size(OP, "width of the keys", op.q.width, op.k.width)?;
    size(OP, "width of the values", op.q.width, op.v.width)?;
    shape(OP, sk.with_channels(op.v.tensor.shape().c), op.v.tensor.shape())?;
    if sk.n != 1 {
        size(OP, "batch of the keys", sq.n, sk.n)?;
    }
    if op.heads == 0 || op.q.width % op.heads != 0 {
        let (expected, found) = (op.heads, op.q.width);
        return Err(TensorError::Size { op: OP, what: "width as a multiple of the heads", expected, found });
    }
    let d = op.q.width / op.heads;
    let (queries, keys) = (sq.positions(), sk.positions());
    if d == 0 || sq.n * queries == 0 {
        return Ok(());
    }
    if keys == 0 {
        return Err(TensorError::Size { op: OP, what: "number of keys", expected: 1, found: 0 });
    }
    let heads = Heads {
        q: columns::<E>(OP, &op.q)?,
        k: columns::<E>(OP, &op.k)?,
        v: columns::<E>(OP, &op.v)?,
        queries,
        keys,
        is_shared: sk.n == 1,
        d,
        is_causal: op.is_causal,
        factor: op.scale * std::f32::consts::LOG2_E,
    };
    // Query ranges, cut only as far as the threads need.
    let blocks = queries.div_ceil(PANEL);
    let parts = (2 * exec.threads).div_ceil(op.heads * sq.n).clamp(1, blocks);
    let mut rows: Vec<usize> = (0..sq.n)
        .flat_map(|n| (0..parts).map(move |i| n * queries + (blocks * i / parts * PANEL).min(queries)))
        .collect();
    rows.push(sq.n * queries);
    let cuts: Vec<usize> = (0..=op.heads).map(|h| h * d).collect();
    let tiles = tiles_mut(elements_mut::<E>(OP, out)?, op.q.width, &rows, &cuts);
    tiles.into_par_iter().with_max_len(1).for_each(|tile| {
        SCRATCH.with_borrow_mut(|scratch| heads.task(exec, tile, scratch));
    });
    Ok(())
}

impl<E: Element> Heads<'_, E> {
    fn task(&self, exec: &Exec, mut tile: TileMut<'_, E>, scratch: &mut HeadScratch) {
        let HeadScratch { rows, k, v, q, scores, out } = scratch;
        let (d, keys, height) = (self.d, self.keys, exec.isa.tile_rows());
        let sample = tile.row / self.queries;
        let first_key = if self.is_shared { 0 } else { sample * keys };
        let rows = rows.take(keys.max(PANEL) * d);
        let k = k.take(keys.next_multiple_of(height) * d);
        let v = v.take(keys * d);
        let q = q.take(PANEL * d);
        let out = out.take(PANEL * d);
        let scores = scores.take(KEYS * PANEL);
        self.read(exec, &self.k, first_key, tile.column, &mut rows[..keys * d]);
        pack_keys(&rows[..keys * d], d, height, k);
        self.read(exec, &self.v, first_key, tile.column, v);
        for row in (0..tile.rows).step_by(PANEL) {
            let count = (tile.rows - row).min(PANEL);
            let from = &mut rows[..count * d];
            self.read(exec, &self.q, tile.row + row, tile.column, from);
            for (i, lanes) in q.chunks_exact_mut(PANEL).enumerate() {
                for (j, lane) in lanes.iter_mut().enumerate() {
                    *lane = if j < count { from[j * d + i] * self.factor } else { 0.0 };
                }
            }
            let position = tile.row + row - sample * self.queries;
            exec.isa.launch(Attend {
                q,
                k,
                v,
                keys,
                d,
                causal_from: self.is_causal.then_some(position),
                scores,
                out,
            });
            for j in 0..count {
                for (i, o) in tile.row_mut(row + j, 0, d).iter_mut().enumerate() {
                    *o = E::from_f32(out[i * PANEL + j]);
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
