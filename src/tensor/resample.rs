//! Separable resampling with PyTorch's `interpolate` arithmetic (`align_corners = false`, no antialiasing but where a name says so).
//!
//! An [`Axis`] lists, for each output coordinate, the source coordinates and weights that make it up; the two
//! axes are applied one after the other. Source positions are computed in `f32`, as PyTorch does, because one on
//! the other side of an integer moves a whole pixel. Cubic kernel: R. Keys, "Cubic convolution interpolation for
//! digital image processing", 1981, with a = −0.75.

use rayon::prelude::*;

/// Which pixels make up a pixel of another size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Filter {
    /// Source index `⌊dst · scale⌋`.
    Nearest,
    /// Source index `⌊(dst + ½) · scale⌋`.
    NearestExact,
    /// Two taps an axis.
    Bilinear,
    /// Four taps an axis; may overshoot the value range.
    Bicubic,
    /// Mean of all source pixels that an output pixel touches.
    Area,
    /// Spherical interpolation of the channel vectors, for latents and feature maps; see [`super::bislerp`].
    Bislerp,
}

/// A buffer seen as `outer` planes of `h × w` cells of `inner` values.
#[derive(Clone, Copy, Debug)]
pub struct Grid {
    /// Planes.
    pub outer: usize,
    /// Rows.
    pub h: usize,
    /// Columns.
    pub w: usize,
    /// Values of a cell.
    pub inner: usize,
}

/// Source coordinates and weights of every output coordinate of one axis.
pub struct Axis {
    /// `taps[ends[i-1]..ends[i]]` belong to output coordinate `i`.
    ends: Vec<usize>,
    taps: Vec<(usize, f32)>,
}

impl Axis {
    /// `x` with planes of `to` (height, width).
    pub fn resize(filter: Filter, x: &[f32], grid: Grid, to: [usize; 2]) -> Vec<f32> {
        if filter == Filter::Bislerp {
            return super::bislerp::resize(x, grid, to);
        }
        let [height, width] = to;
        let wide = Self::new(filter, grid.w, width).apply_x(x, grid);
        Self::new(filter, grid.h, height).apply_y(&wide, Grid { w: width, ..grid })
    }

    /// The same by PyTorch's `bicubic` with `antialias`: as many taps as the scale asks for.
    pub fn resize_antialiased(x: &[f32], grid: Grid, to: [usize; 2]) -> Vec<f32> {
        let [height, width] = to;
        let wide = Self::cubic_wide(grid.w, width).apply_x(x, grid);
        Self::cubic_wide(grid.h, height).apply_y(&wide, Grid { w: width, ..grid })
    }

    /// Keys' kernel with a = −0.5, as wide as the scale when the picture shrinks; weights sum to 1.
    fn cubic_wide(old: usize, new: usize) -> Self {
        const A: f32 = -0.5;
        let kernel = |x: f32| match x.abs() {
            x if x < 1.0 => ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0,
            x if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * A,
            _ => 0.0,
        };
        let mut axis = Self { ends: Vec::with_capacity(new), taps: Vec::new() };
        let scale = old as f32 / new as f32;
        let wide = scale.max(1.0);
        for i in 0..new {
            let (center, support) = (scale * (i as f32 + 0.5), 2.0 * wide);
            let first = ((center - support + 0.5) as i64).max(0) as usize;
            let end = ((center + support + 0.5) as usize).min(old);
            let weight = |at: usize| kernel((at as f32 - center + 0.5) / wide);
            let total: f32 = (first..end).map(weight).sum();
            axis.taps.extend((first..end).map(|at| (at, weight(at) / total)));
            axis.ends.push(axis.taps.len());
        }
        axis
    }

    fn new(filter: Filter, old: usize, new: usize) -> Self {
        let mut axis = Self { ends: Vec::with_capacity(new), taps: Vec::new() };
        let scale = old as f32 / new as f32;
        for i in 0..new {
            match filter {
                Filter::Nearest => axis.taps.push((floor_index(i as f32 * scale, old), 1.0)),
                Filter::NearestExact => axis.taps.push((floor_index((i as f32 + 0.5) * scale, old), 1.0)),
                // Directions have passes of their own, between these same neighbours.
                Filter::Bilinear | Filter::Bislerp => {
                    let (at, next, t) = linear_position(i, old, new);
                    axis.taps.extend([(at, 1.0 - t), (next, t)]);
                }
                Filter::Bicubic => axis.push_cubic((i as f32 + 0.5) * scale - 0.5, old),
                Filter::Area => axis.push_area(i, old, new),
            }
            axis.ends.push(axis.taps.len());
        }
        axis
    }

    fn push_cubic(&mut self, position: f32, old: usize) {
        const A: f32 = -0.75;
        let inner = |x: f32| ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0;
        let outer = |x: f32| ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A;
        let base = position.floor();
        let t = position - base;
        let weights = [outer(t + 1.0), inner(t), inner(1.0 - t), outer(2.0 - t)];
        for (offset, weight) in (-1..).zip(weights) {
            let index = (base as i64 + offset).clamp(0, old as i64 - 1);
            self.taps.push((index as usize, weight));
        }
    }

    /// The window `[⌊i·old/new⌋, ⌈(i+1)·old/new⌉)` of adaptive pooling.
    fn push_area(&mut self, i: usize, old: usize, new: usize) {
        let start = i * old / new;
        let end = ((i + 1) * old).div_ceil(new);
        let weight = 1.0 / (end - start) as f32;
        self.taps.extend((start..end).map(|index| (index, weight)));
    }

    fn taps(&self, i: usize) -> &[(usize, f32)] {
        let start = if i == 0 { 0 } else { self.ends[i - 1] };
        &self.taps[start..self.ends[i]]
    }

    fn apply_x(&self, x: &[f32], grid: Grid) -> Vec<f32> {
        let inner = grid.inner;
        let width = self.ends.len();
        let mut out = vec![0.0; grid.outer * grid.h * width * inner];
        out.par_chunks_exact_mut(width * inner).zip(x.par_chunks_exact(grid.w * inner)).for_each(
            |(new_row, row)| {
                for (i, cell) in new_row.chunks_exact_mut(inner).enumerate() {
                    for &(index, weight) in self.taps(i) {
                        for (o, v) in cell.iter_mut().zip(&row[index * inner..][..inner]) {
                            *o = fused(*v, weight, *o);
                        }
                    }
                }
            },
        );
        out
    }

    fn apply_y(&self, x: &[f32], grid: Grid) -> Vec<f32> {
        let row_len = grid.w * grid.inner;
        let height = self.ends.len();
        let mut out = vec![0.0; grid.outer * height * row_len];
        out.par_chunks_exact_mut(row_len).enumerate().for_each(|(n, row)| {
            let plane = &x[n / height * grid.h * row_len..][..grid.h * row_len];
            for &(index, weight) in self.taps(n % height) {
                for (o, v) in row.iter_mut().zip(&plane[index * row_len..][..row_len]) {
                    *o = fused(*v, weight, *o);
                }
            }
        });
        out
    }
}

/// a · b + c with one rounding, as PyTorch's kernels compute it; through `f64`
/// because without a target feature `mul_add` is a library call for each value.
fn fused(a: f32, b: f32, c: f32) -> f32 {
    (f64::from(a) * f64::from(b) + f64::from(c)) as f32
}

fn floor_index(position: f32, old: usize) -> usize {
    (position as usize).min(old - 1)
}

/// The two neighbours of output coordinate `i` and the second one's weight.
pub fn linear_position(i: usize, old: usize, new: usize) -> (usize, usize, f32) {
    let scale = old as f32 / new as f32;
    let position = ((i as f32 + 0.5) * scale - 0.5).max(0.0);
    let at = floor_index(position, old);
    (at, (at + 1).min(old - 1), (position - at as f32).min(1.0))
}
