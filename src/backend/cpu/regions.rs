//! Convolutions over large maps: regions of pixels with their halo.
//!
//! A task copies a region of the input and the ring around it once for each
//! group of channels, and all taps of the kernel read from that copy:
//!
//! ```text
//!   copy: (rows + kh − 1) × (columns + kw − 1) pixels × ≤ 320 channels
//!   tap (ky, kx): output pixel (y, x) multiplies copied pixel (y + ky, x + kx)
//! ```
//! so a value is copied about 1.5 times instead of `kh·kw` times. Register
//! tiles take pixels of one line, which lie at one distance in the copy.

use std::cell::RefCell;

use rayon::prelude::*;

use super::Exec;
use super::matmul::{Layer, Window};
use super::scratch::Scratch;
use super::simd::element::Element;
use super::simd::finish::{Finish, Place};
use super::simd::product::{A_STRIDE, PANEL, PanelProduct, Runs};
use super::simd::shared::{TileMut, tiles_mut};

thread_local! {
    static SCRATCH: RefCell<[Scratch; 3]> = RefCell::default();
}

/// Frees the calling thread's working memory; it comes back when needed.
pub(super) fn release_scratch() {
    SCRATCH.take();
}

/// Pixels of a line in a region at most.
const MAX_COLUMNS: usize = 64;
/// Values of a region's sums at most, a quarter of an L2 cache of 2 MiB.
const MAX_SUMS: usize = 128 << 10;
/// Pixels of a region at most.
const MAX_PIXELS: usize = 256;
/// Pixels of a region at least: below, widening weights for so few costs more
/// than the copies saved.
const MIN_PIXELS: usize = 160;
/// Narrower maps have too few pixels in a line to fill register tiles evenly.
const MIN_WIDTH: usize = 24;

/// How a convolution is cut into regions.
pub(super) struct Plan {
    kh: usize,
    rows: usize,
    columns: usize,
}

impl Plan {
    /// A plan if the layer is a large convolution that gains from regions.
    pub(super) fn new<E: Element>(exec: &Exec, layer: &Layer<'_, E>) -> Option<Self> {
        let w = layer.a.window;
        let taps = layer.w.k / layer.a.width().max(1);
        let samples = layer.m / (w.oh * w.ow).max(1);
        if taps == 1 || w.stride != 1 || w.ow < MIN_WIDTH || layer.w.is_geglu {
            return None;
        }
        let columns = w.ow.div_ceil(w.ow.div_ceil(MAX_COLUMNS));
        let most = (MAX_SUMS / (layer.w.count * PANEL * columns)).min(MAX_PIXELS / columns);
        let across = w.ow.div_ceil(columns);
        // The fewest lines a region that still give every thread as many regions.
        // By the shape alone: sums run in another order here than elsewhere.
        if most * columns < MIN_PIXELS {
            return None;
        }
        // The most lines a region that still give every thread as many regions.
        let is_even = |rows: &usize| {
            let regions = samples * w.oh.div_ceil(*rows) * across;
            regions >= 8 * exec.threads || regions.is_multiple_of(exec.threads)
        };
        let rows = (1..=most.min(w.oh)).rev().find(is_even).unwrap_or(1);
        Some(Self { kh: taps / w.kw, rows, columns })
    }

    /// Computes all of `out`.
    pub(super) fn run<E: Element>(&self, exec: &Exec, layer: &Layer<'_, E>, out: &mut [E]) {
        let Window { oh, ow, .. } = layer.a.window;
        let n = layer.w.n;
        let mut rows: Vec<usize> = (0..layer.m / ow).filter(|y| y % oh % self.rows == 0).collect();
        rows.push(layer.m / ow);
        let columns: Vec<usize> =
            (0..=ow.div_ceil(self.columns)).map(|i| (i * self.columns).min(ow) * n).collect();
        let tiles = tiles_mut(out, ow * n, &rows, &columns);
        tiles.into_par_iter().with_max_len(1).for_each(|tile| {
            SCRATCH.with_borrow_mut(|scratch| self.task(exec, layer, tile, scratch));
        });
    }

    fn task<E: Element>(
        &self,
        exec: &Exec,
        layer: &Layer<'_, E>,
        mut tile: TileMut<'_, E>,
        [a, wide, c]: &mut [Scratch; 3],
    ) {
        let (weights, window) = (layer.w, layer.a.window);
        let place = Place::pixels(&tile, window.ow, weights.n);
        let line = place.run + window.kw - 1;
        let pixels = tile.rows * place.run;
        let a = a.take((tile.rows + self.kh - 1) * line * A_STRIDE);
        let wide = wide.take(A_STRIDE * PANEL);
        let c = c.take(weights.count * pixels * PANEL);
        let cin = layer.a.width();
        let groups = cin.div_ceil(A_STRIDE);
        let runs = Runs { count: tile.rows, len: place.run, step: line };
        for group in 0..groups {
            let (from, to) = (cin * group / groups, cin * (group + 1) / groups);
            let first = (tile.row, place.first);
            layer.a.gather_region(exec, first, (tile.rows + self.kh - 1, line), from..to, a);
            for tap in 0..self.kh * window.kw {
                let (ky, kx) = (tap / window.kw, tap % window.kw);
                let k = tap * cin + from;
                for (panel, c) in c.chunks_exact_mut(pixels * PANEL).enumerate() {
                    exec.isa.launch(PanelProduct {
                        a: &a[(ky * line + kx) * A_STRIDE..],
                        runs,
                        kc: to - from,
                        b: weights.block(panel, k, to - from),
                        next: weights.block_bytes(panel + 1, k, to - from),
                        wide,
                        c,
                        accumulate: group + tap > 0,
                    });
                }
            }
        }
        let bias = &weights.bias;
        exec.isa.launch(Finish { layer: &layer.epilogue, c, bias, tile: &mut tile, place });
    }
}
