//! Convolution and linear layers as one blocked product.
//!
//! The output is cut into a grid of tasks (rows × panels); each task runs
//!
//! ```text
//! for every K block (≤ 320):
//!     gather its rows of A from the activations        → L2, rows × K block
//!     for every panel:
//!         widen the weights' block to f32              → L1, K block × 32
//!         for every row tile: C += A·B                 → registers
//!         after the last K block: the epilogue         → output
//! ```
//! No im2col buffer: rows are gathered per block from NHWC slices (a tap of a
//! 3×3 convolution is a contiguous run of channels), which also makes
//! strides, padding, nearest-2× enlargement and two concatenated inputs index
//! arithmetic. The copy costs one load and store a value against N/16 FMAs.
//! Every element is summed in the same order whatever the cut, so results
//! don't depend on the number of threads.

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use super::Exec;
use super::regions::Plan;
use super::scratch::Scratch;
use super::simd::element::Element;
use super::simd::finish::{Epilogue, Finish, Place};
use super::simd::product::{A_STRIDE, PANEL, PanelProduct, Runs};
use super::simd::shared::{TileMut, tiles_mut};
use super::weights::Panels;

/// Rows of a task at most: its A block then fills an eighth of the L2 cache.
const MAX_ROWS: usize = 224;
/// Panels of a task at most, which bounds its accumulators.
const MAX_PANELS: usize = 20;

/// One of up to two concatenated inputs: columns of a row-major matrix.
pub(super) struct Input<'a, E> {
    /// Rows, beginning at the first used column.
    pub(super) data: &'a [E],
    /// Distance between rows.
    pub(super) stride: usize,
    /// Columns used.
    pub(super) width: usize,
}

/// How output positions map to input pixels.
#[derive(Clone, Copy)]
pub(super) struct Window {
    /// Kernel width.
    pub(super) kw: usize,
    /// Stride.
    pub(super) stride: usize,
    /// Padding above.
    pub(super) top: usize,
    /// Padding to the left.
    pub(super) left: usize,
    /// Input height.
    pub(super) h: usize,
    /// Input width.
    pub(super) w: usize,
    /// Enlargement of the input, 1 or 2.
    pub(super) up: usize,
    /// Output height.
    pub(super) oh: usize,
    /// Output width.
    pub(super) ow: usize,
}

impl Window {
    /// One position after the other: a linear layer.
    pub(super) fn rows(rows: usize) -> Self {
        Self { kw: 1, stride: 1, top: 0, left: 0, h: rows, w: 1, up: 1, oh: rows, ow: 1 }
    }

    fn is_pointwise(&self) -> bool {
        let same = self.oh == self.h && self.ow == self.w;
        same && self.kw == 1 && self.stride == 1 && self.top == 0 && self.left == 0 && self.up == 1
    }
}

/// The left operand.
pub(super) struct Rows<'a, E> {
    /// Inputs, concatenated.
    pub(super) inputs: [Option<Input<'a, E>>; 2],
    /// Position map.
    pub(super) window: Window,
}

/// A run of K that is contiguous in one input.
#[derive(Clone, Copy)]
struct Segment {
    input: usize,
    ky: usize,
    kx: usize,
    channel: usize,
    len: usize,
    to: usize,
}

impl<E: Element> Rows<'_, E> {
    /// Input channels.
    pub(super) fn width(&self) -> usize {
        self.inputs.iter().flatten().map(|i| i.width).sum()
    }

    fn segments(&self, k: Range<usize>, out: &mut Vec<Segment>) {
        out.clear();
        let (cin, first) = (self.width(), self.inputs[0].as_ref().map_or(0, |i| i.width));
        let mut at = k.start;
        while at < k.end {
            let (tap, c) = (at / cin, at % cin);
            let (input, channel, end) = if c < first { (0, c, first) } else { (1, c - first, cin) };
            let len = (end - c).min(k.end - at);
            out.push(Segment {
                input,
                ky: tap / self.window.kw,
                kx: tap % self.window.kw,
                channel,
                len,
                to: at - k.start,
            });
            at += len;
        }
    }

    /// Copies K segments of output rows `rows` to rows of `A_STRIDE`; whether
    /// any of it was more than padding.
    fn gather(&self, exec: &Exec, rows: Range<usize>, segments: &[Segment], to: &mut [f32]) -> bool {
        let w = self.window;
        let mut has_pixels = false;
        let is_pointwise = w.is_pointwise();
        for (m, to) in rows.zip(to.chunks_mut(A_STRIDE)) {
            let (n, oy, ox) =
                if is_pointwise { (0, 0, 0) } else { (m / (w.oh * w.ow), m / w.ow % w.oh, m % w.ow) };
            for s in segments {
                let Some(input) = &self.inputs[s.input] else { continue };
                let to = &mut to[s.to..][..s.len];
                let pixel = if is_pointwise {
                    m
                } else {
                    // Rows above the picture wrap to huge numbers.
                    let y = (oy * w.stride + s.ky).wrapping_sub(w.top);
                    let x = (ox * w.stride + s.kx).wrapping_sub(w.left);
                    if y >= w.h * w.up || x >= w.w * w.up {
                        to.fill(0.0);
                        continue;
                    }
                    (n * w.h + y / w.up) * w.w + x / w.up
                };
                has_pixels = true;
                E::widen_into(exec.isa, &input.data[pixel * input.stride + s.channel..][..s.len], to);
            }
        }
        has_pixels
    }

    /// Copies channels `k` of the pixels that a region of the output sees:
    /// `size` lines and columns from output line `first.0` (over all samples) and
    /// column `first.1` on, one pixel to `A_STRIDE` values, padding as zeros.
    pub(super) fn gather_region(
        &self,
        exec: &Exec,
        first: (usize, usize),
        size: (usize, usize),
        k: Range<usize>,
        to: &mut [f32],
    ) {
        let w = self.window;
        let (n, oy) = (first.0 / w.oh, first.0 % w.oh);
        let split = self.inputs[0].as_ref().map_or(0, |i| i.width);
        for (i, to) in to.chunks_exact_mut(A_STRIDE).take(size.0 * size.1).enumerate() {
            // Lines above the picture wrap to huge numbers.
            let y = (oy + i / size.1).wrapping_sub(w.top);
            let x = (first.1 + i % size.1).wrapping_sub(w.left);
            let to = &mut to[..k.len()];
            if y >= w.h * w.up || x >= w.w * w.up {
                to.fill(0.0);
                continue;
            }
            let pixel = (n * w.h + y / w.up) * w.w + x / w.up;
            let (head, tail) = to.split_at_mut(split.clamp(k.start, k.end) - k.start);
            for (input, channel, to) in
                [(&self.inputs[0], k.start, head), (&self.inputs[1], k.start.max(split) - split, tail)]
            {
                if let Some(input) = input.as_ref().filter(|_| !to.is_empty()) {
                    let from = &input.data[pixel * input.stride + channel..][..to.len()];
                    E::widen_into(exec.isa, from, to);
                }
            }
        }
    }
}

thread_local! {
    static SCRATCH: RefCell<TaskScratch> = RefCell::default();
}

/// Frees the calling thread's working memory; it comes back when needed.
pub(super) fn release_scratch() {
    SCRATCH.take();
}

#[derive(Default)]
struct TaskScratch {
    a: Scratch,
    wide: Scratch,
    c: Scratch,
    segments: Vec<Segment>,
}

/// A whole layer.
pub(super) struct Layer<'a, E> {
    /// Weights.
    pub(super) w: &'a Panels,
    /// Left operand.
    pub(super) a: Rows<'a, E>,
    /// Epilogue.
    pub(super) epilogue: Epilogue<'a, E>,
    /// Output rows.
    pub(super) m: usize,
}

impl<E: Element> Layer<'_, E> {
    /// Computes all of `out`, `m × w.n`.
    pub(super) fn run(&self, exec: &Exec, out: &mut [E]) {
        if self.m == 0 || self.w.n == 0 {
            return;
        }
        if let Some(plan) = Plan::new(exec, self) {
            return plan.run(exec, self, out);
        }
        let (row_parts, panel_parts) = self.grid(exec);
        let rows: Vec<usize> = (0..=row_parts).map(|i| self.m * i / row_parts).collect();
        let per_panel = self.w.outputs_per_panel();
        let columns: Vec<usize> =
            (0..=panel_parts).map(|i| (self.w.count * i / panel_parts * per_panel).min(self.w.n)).collect();
        let tiles = tiles_mut(out, self.w.n, &rows, &columns);
        tiles.into_par_iter().with_max_len(1).for_each(|tile| {
            SCRATCH.with_borrow_mut(|scratch| self.task(exec, tile, scratch));
        });
    }

    /// Number of parts of the rows and of the panels: the cheapest cut, by
    /// the busiest thread's work in units of one FMA vector.
    fn grid(&self, exec: &Exec) -> (usize, usize) {
        let tile = exec.isa.tile_rows();
        let (min_rows, min_panels) = (self.m.div_ceil(MAX_ROWS), self.w.count.div_ceil(MAX_PANELS));
        let most = 4 * exec.threads;
        let mut best = (usize::MAX, (min_rows, min_panels));
        for panels in min_panels..=(min_panels + most).min(self.w.count) {
            for rows in min_rows..=(min_rows + most).min(self.m.div_ceil(tile).max(min_rows)) {
                let turns = (rows * panels).div_ceil(exec.threads);
                let (height, width) = (self.m.div_ceil(rows), self.w.count.div_ceil(panels));
                // Product, widening of weights, gathering of rows, fixed cost.
                let cost = turns * (height * width * 2 + width * 4 + height * 2 + 4);
                if cost < best.0 {
                    best = (cost, (rows, panels));
                }
            }
        }
        best.1
    }

    fn task(&self, exec: &Exec, mut tile: TileMut<'_, E>, scratch: &mut TaskScratch) {
        let TaskScratch { a, wide, c, segments } = scratch;
        let per_panel = self.w.outputs_per_panel();
        let panels = tile.column / per_panel..(tile.column + tile.columns).div_ceil(per_panel);
        let (k, rows) = (self.w.k, tile.rows);
        let blocks = k.div_ceil(A_STRIDE).max(1);
        let c_panel = rows * PANEL;
        let a = a.take(rows * A_STRIDE);
        let wide = wide.take(A_STRIDE * PANEL);
        let c = c.take(c_panel * panels.len());
        let mut is_started = false;
        for block in 0..blocks {
            let (from, to) = (k * block / blocks, k * (block + 1) / blocks);
            self.a.segments(from..to, segments);
            let is_needed = self.a.gather(exec, tile.row..tile.row + rows, segments, a);
            // On maps smaller than the kernel most taps see padding only.
            if !is_needed && (is_started || block + 1 < blocks) {
                continue;
            }
            for (i, panel) in panels.clone().enumerate() {
                let c = &mut c[i * c_panel..][..c_panel];
                let next = if panel + 1 < panels.end {
                    self.w.block_bytes(panel + 1, from, to - from)
                } else {
                    self.w.block_bytes(panels.start, to, k * (block + 2) / blocks - to)
                };
                exec.isa.launch(PanelProduct {
                    a,
                    runs: Runs::one(rows),
                    kc: to - from,
                    b: self.w.block(panel, from, to - from),
                    next: if block + 1 == blocks && panel + 1 == panels.end { &[] } else { next },
                    wide,
                    c,
                    accumulate: is_started,
                });
            }
            is_started = true;
        }
        let bias = &self.w.bias[panels.start * PANEL..panels.end * PANEL];
        let place = Place::rows(&tile);
        exec.isa.launch(Finish { layer: &self.epilogue, c, bias, tile: &mut tile, place });
    }
}
