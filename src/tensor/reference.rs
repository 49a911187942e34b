//! Ops on copies in host memory: what a backend does that has no kernel of its own for them.
//!
//! All are moves or reweighting of feature maps for hooks; the CPU backends run them as they are here, and the
//! kernels of the others are checked against them. Sums are f64.

use std::f64::consts::TAU;

use rayon::prelude::*;

use super::resample::{Axis, Grid};
use super::{Backend, Cols, Curve, Filter, HostLayout, ScaleHalf, Shape, SwapTokens, Tensor, TensorError};

/// The elements in host memory, as they lie there.
pub(super) fn read<B: Backend + ?Sized>(backend: &B, x: &Tensor) -> Result<Vec<f32>, TensorError> {
    let mut data = vec![0f32; x.shape().len()];
    backend.download(x, HostLayout::Nhwc, &mut data)?;
    Ok(data)
}

/// See [`Backend::curve`].
pub(super) fn curve<B: Backend + ?Sized>(
    backend: &B,
    x: &Tensor,
    curve: Curve,
    out: &mut Tensor,
) -> Result<(), TensorError> {
    super::check::shape("curve", x.shape(), out.shape())?;
    let mut data = read(backend, x)?;
    data.iter_mut().for_each(|v| *v = curve.value(*v));
    backend.upload(&data, HostLayout::Nhwc, out)
}

/// See [`Backend::resize`].
pub fn resize<B: Backend + ?Sized>(
    backend: &B,
    x: &Tensor,
    filter: Filter,
    out: &mut Tensor,
) -> Result<(), TensorError> {
    let (from, to) = (x.shape(), out.shape());
    super::check::resize(from, to)?;
    let grid = Grid { outer: from.n, h: from.h, w: from.w, inner: from.c };
    let data = Axis::resize(filter, &read(backend, x)?, grid, [to.h, to.w]);
    backend.upload(&data, HostLayout::Nhwc, out)
}

/// See [`Backend::swap_tokens`].
pub(super) fn swap_tokens<B: Backend + ?Sized>(
    backend: &B,
    op: &SwapTokens<'_>,
    out: &mut Tensor,
) -> Result<(), TensorError> {
    op.check(out.shape())?;
    let data = swapped(&read(backend, op.x.tensor)?, op);
    backend.upload(&data, HostLayout::Nhwc, out)
}

/// The columns of `x` in the order of `op`.
pub fn swapped(x: &[f32], op: &SwapTokens<'_>) -> Vec<f32> {
    let (pitch, width) = (op.x.tensor.shape().c, op.x.width);
    let (rows, columns, run) = (op.rows, op.columns, op.run);
    let tokens = x.len() / pitch.max(1);
    let mut out = Vec::with_capacity(tokens * width);
    for token in 0..tokens {
        let (i, rest) = (token % run, token / run);
        let (row, rest) = (rest % rows, rest / rows);
        let (column, block) = (rest % columns, rest / columns);
        let from = ((block * rows + row) * columns + column) * run + i;
        out.extend_from_slice(&x[from * pitch + op.x.start..][..width]);
    }
    out
}

/// See [`Backend::concat`].
pub(super) fn concat<B: Backend + ?Sized>(
    backend: &B,
    parts: &[Cols<'_>],
    out: &mut Tensor,
) -> Result<(), TensorError> {
    super::check::concat(parts, out.shape())?;
    let data = parts.iter().map(|part| read(backend, part.tensor)).collect::<Result<Vec<_>, _>>()?;
    let row = |row: usize| {
        parts.iter().zip(&data).flat_map(move |(part, data)| {
            let from = row * part.tensor.shape().c + part.start;
            data[from..from + part.width].iter().copied()
        })
    };
    let joined: Vec<f32> = (0..out.shape().rows()).flat_map(row).collect();
    backend.upload(&joined, HostLayout::Nhwc, out)
}

/// See [`Backend::scale_half`].
pub(super) fn scale_half<B: Backend + ?Sized>(
    backend: &B,
    op: &ScaleHalf<'_>,
    out: &mut Tensor,
) -> Result<(), TensorError> {
    super::check::shape("scale_half", op.x.shape(), out.shape())?;
    let mut data = read(backend, op.x)?;
    half_scaled(&mut data, op.x.shape(), op.factor, op.is_by_place);
    backend.upload(&data, HostLayout::Nhwc, out)
}

/// Scales the first half of the channels of `[n, h, w, c]`.
pub fn half_scaled(x: &mut [f32], shape: Shape, factor: f32, is_by_place: bool) {
    let (places, c) = (shape.positions(), shape.c);
    for sample in x.chunks_exact_mut((places * c).max(1)) {
        let factors = if is_by_place { place_factors(sample, places, factor) } else { vec![factor; places] };
        for (place, f) in sample.chunks_exact_mut(c).zip(&factors) {
            place[..c / 2].iter_mut().for_each(|v| *v *= f);
        }
    }
}

/// 1 where the mean over channels is smallest, `factor` where it is largest.
fn place_factors(sample: &[f32], places: usize, factor: f32) -> Vec<f32> {
    let c = sample.len() / places;
    let mean = |place: &[f32]| place.iter().map(|v| f64::from(*v)).sum::<f64>() / c as f64;
    let means: Vec<f64> = sample.chunks_exact(c).map(mean).collect();
    let (low, high) =
        means.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), &m| (l.min(m), h.max(m)));
    means.iter().map(|m| (factor - 1.0) * ((m - low) / (high - low)) as f32 + 1.0).collect()
}

/// See [`Backend::scale_low_band`].
pub(super) fn scale_low_band<B: Backend + ?Sized>(
    backend: &B,
    x: &Tensor,
    factor: f32,
    out: &mut Tensor,
) -> Result<(), TensorError> {
    super::check::shape("scale_low_band", x.shape(), out.shape())?;
    let mut data = read(backend, x)?;
    low_band_scaled(&mut data, x.shape(), factor);
    backend.upload(&data, HostLayout::Nhwc, out)
}

/// The waves of the frequencies kept at every place: (0, 0), then those with −1 along rows, along columns, along
/// both, as far as these have more than one place.
fn waves(h: usize, w: usize) -> Vec<Vec<(f64, f64)>> {
    let kept = [(0, 0), (1, 0), (0, 1), (1, 1)]
        .into_iter()
        .filter(|(y, x)| (*y == 0 || h > 1) && (*x == 0 || w > 1));
    let wave = |(along_y, along_x): (usize, usize)| {
        let place = |i: usize| {
            let turns = (along_y * (i / w)) as f64 / h as f64 + (along_x * (i % w)) as f64 / w as f64;
            let (sin, cos) = (TAU * turns).sin_cos();
            (cos, sin)
        };
        (0..h * w).map(place).collect()
    };
    kept.map(wave).collect()
}

/// Scales the low band of every channel of `[n, h, w, c]`.
pub fn low_band_scaled(x: &mut [f32], shape: Shape, factor: f32) {
    let (places, c) = (shape.positions(), shape.c);
    let waves = waves(shape.h, shape.w);
    let scale = f64::from(factor - 1.0) / places as f64;
    x.par_chunks_exact_mut((places * c).max(1)).for_each(|sample| {
        let mut band = vec![0f64; places * c];
        for wave in &waves {
            // The coefficient of every channel, then its part of the map.
            let (mut re, mut im) = (vec![0f64; c], vec![0f64; c]);
            for (place, (cos, sin)) in sample.chunks_exact(c).zip(wave) {
                for ((re, im), v) in re.iter_mut().zip(&mut im).zip(place) {
                    *re += f64::from(*v) * cos;
                    *im += f64::from(*v) * sin;
                }
            }
            for (place, (cos, sin)) in band.chunks_exact_mut(c).zip(wave) {
                place.iter_mut().zip(&re).zip(&im).for_each(|((b, re), im)| *b += re * cos + im * sin);
            }
        }
        sample.iter_mut().zip(&band).for_each(|(v, b)| *v += (scale * b) as f32);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A constant is all low frequency, a checkerboard has none of it.
    #[test]
    fn low_band_of_known_planes() {
        let shape = Shape::nhwc(1, 4, 6, 1);
        let mut flat = vec![2f32; 24];
        low_band_scaled(&mut flat, shape, 0.5);
        assert!(flat.iter().all(|v| (v - 1.0).abs() < 1e-6), "{flat:?}");
        let board: Vec<f32> = (0..24).map(|i| if (i / 6 + i % 6) % 2 == 0 { 1.0 } else { -1.0 }).collect();
        let mut filtered = board.clone();
        low_band_scaled(&mut filtered, shape, 0.5);
        assert!(filtered.iter().zip(&board).all(|(a, b)| (a - b).abs() < 1e-6));
    }

    /// A cosine along one side is half frequency 1 and half −1: a quarter goes at factor 0.5.
    #[test]
    fn only_one_of_a_pair_of_frequencies_is_kept() {
        for shape in [Shape::nhwc(1, 1, 8, 1), Shape::nhwc(1, 8, 1, 1)] {
            let wave: Vec<f32> = (0..8).map(|i| (TAU * f64::from(i) / 8.0).cos() as f32).collect();
            let mut filtered = wave.clone();
            low_band_scaled(&mut filtered, shape, 0.5);
            for (a, b) in filtered.iter().zip(&wave) {
                assert!((a - 0.75 * b).abs() < 1e-6, "{a} {b}");
            }
        }
    }

    #[test]
    fn half_of_the_channels_by_place() {
        let mut x = [0.0, 0.0, 1.0, 1.0, 2.0, 2.0];
        half_scaled(&mut x, Shape::nhwc(1, 1, 3, 2), 3.0, true);
        assert_eq!(x, [0.0, 0.0, 2.0, 1.0, 6.0, 2.0]);
    }
}
