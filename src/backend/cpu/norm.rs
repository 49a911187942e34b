//! Group and layer normalisation: statistics in fixed chunks, then one pass.

use rayon::prelude::*;

use super::check::{elements, elements_mut, size};
use super::simd::element::Element;
use super::simd::finish::LARGE_OUTPUT_BYTES;
use super::simd::norm::{ChannelSums, LayerNormRows, ScaleShift};
use super::{Exec, Weight};
use crate::tensor::{GroupNorm, LayerNorm, NormWeight, Tensor, TensorError};

/// Scale and shift in f32.
pub(super) struct NormParams {
    /// Scale of each channel.
    pub(super) scale: Vec<f32>,
    /// Shift of each channel.
    pub(super) shift: Vec<f32>,
}

/// Positions of a statistics chunk: short enough that f32 sums are exact to
/// a few units, and the same for every number of threads.
const CHUNK: usize = 256;

fn params<'a>(op: &'static str, w: &'a NormWeight, channels: usize) -> Result<&'a NormParams, TensorError> {
    let Some(Weight::Norm(p)) = w.packed.downcast::<Weight>() else {
        return Err(TensorError::ForeignWeight { op });
    };
    size(op, "channels", p.scale.len(), channels)?;
    Ok(p)
}

/// Count, mean and sum of squared deviations; combined by Chan's formula.
#[derive(Clone, Copy, Default)]
struct Moments {
    count: f64,
    mean: f64,
    m2: f64,
}

impl Moments {
    fn merge(self, other: Self) -> Self {
        let count = self.count + other.count;
        if count == 0.0 {
            return self;
        }
        let delta = other.mean - self.mean;
        Self {
            count,
            mean: self.mean + delta * other.count / count,
            m2: self.m2 + other.m2 + delta * delta * self.count * other.count / count,
        }
    }
}

/// One of the concatenated inputs.
struct Part<'a, E> {
    data: &'a [E],
    channels: usize,
    first: usize,
}

/// See [`crate::tensor::Backend::group_norm`].
pub(super) fn group_norm<E: Element>(
    exec: &Exec,
    op: &GroupNorm<'_>,
    out: &mut Tensor,
) -> Result<(), TensorError> {
    const OP: &str = "group_norm";
    let s = op.x.shape();
    let mut parts = vec![Part { data: elements::<E>(OP, op.x)?, channels: s.c, first: 0 }];
    op.check(out.shape())?;
    let mut channels = s.c;
    if let Some(x2) = op.x2 {
        let c = x2.shape().c;
        parts.push(Part { data: elements(OP, x2)?, channels: c, first: channels });
        channels += c;
    }
    parts.retain(|p| p.channels > 0);
    let params = params(OP, op.w, channels)?;
    let positions = s.positions();
    if s.n * positions * channels == 0 {
        return Ok(());
    }
    let per_group = channels / op.groups;
    let chunks = positions.div_ceil(CHUNK);
    let moments: Vec<Vec<Moments>> = (0..s.n * chunks)
        .into_par_iter()
        .map(|i| {
            let first = i / chunks * positions + i % chunks * CHUNK;
            let rows = (positions - i % chunks * CHUNK).min(CHUNK);
            chunk_moments(exec, &parts, first, rows, per_group, op.groups)
        })
        .collect();
    let affine: Vec<(Vec<f32>, Vec<f32>)> =
        moments.chunks(chunks).map(|sample| affine(sample, params, per_group, op.eps)).collect();
    let out = elements_mut::<E>(OP, out)?;
    let is_large = size_of_val(out) >= LARGE_OUTPUT_BYTES;
    let rows_each = (1 << 15) / channels + 1;
    let pieces = positions.div_ceil(rows_each);
    let mut tasks = Vec::with_capacity(s.n * pieces);
    for (n, sample) in out.chunks_mut(positions * channels).enumerate() {
        for (i, piece) in sample.chunks_mut(rows_each * channels).enumerate() {
            tasks.push((n, n * positions + i * rows_each, piece));
        }
    }
    tasks.into_par_iter().for_each(|(n, first, piece)| {
        let rows = piece.len() / channels;
        for p in &parts {
            let range = p.first..p.first + p.channels;
            exec.isa.launch(ScaleShift {
                x: &p.data[first * p.channels..][..rows * p.channels],
                width: p.channels,
                factor: &affine[n].0[range.clone()],
                shift: &affine[n].1[range],
                silu: op.silu,
                out: piece,
                stride: channels,
                column: p.first,
                is_large,
            });
        }
    });
    Ok(())
}

/// Factor and shift of each channel of a sample, from its chunks' moments.
fn affine(chunks: &[Vec<Moments>], params: &NormParams, per_group: usize, eps: f32) -> (Vec<f32>, Vec<f32>) {
    let groups: Vec<Moments> = (0..params.scale.len() / per_group)
        .map(|g| chunks.iter().fold(Moments::default(), |m, chunk| m.merge(chunk[g])))
        .collect();
    let channel = |(c, (&scale, &shift)): (usize, (&f32, &f32))| {
        let m = &groups[c / per_group];
        let factor = f64::from(scale) / (m.m2 / m.count + f64::from(eps)).sqrt();
        (factor as f32, (f64::from(shift) - m.mean * factor) as f32)
    };
    params.scale.iter().zip(&params.shift).enumerate().map(channel).unzip()
}

/// Moments of every group over some rows. All channels have the same count,
/// so a group's are closed sums over its channels'.
fn chunk_moments<E: Element>(
    exec: &Exec,
    parts: &[Part<'_, E>],
    first: usize,
    rows: usize,
    per_group: usize,
    groups: usize,
) -> Vec<Moments> {
    let channels = groups * per_group;
    let (mut mean, mut m2) = (vec![0f64; channels], vec![0f64; channels]);
    let (mut sum, mut square) = (vec![0f32; channels], vec![0f32; channels]);
    let share = 1.0 / rows as f64;
    for p in parts {
        let x = &p.data[first * p.channels..][..rows * p.channels];
        let range = p.first..p.first + p.channels;
        let (sum, square) = (&mut sum[range.clone()], &mut square[range]);
        exec.isa.launch(ChannelSums { x, width: p.channels, sum, square });
        for c in 0..p.channels {
            let (sum, square) = (f64::from(sum[c]), f64::from(square[c]));
            mean[p.first + c] = f64::from(x[c].to_f32()) + sum * share;
            m2[p.first + c] = (square - sum * sum * share).max(0.0);
        }
    }
    let group = |(mean, m2): (&[f64], &[f64])| {
        let center = mean.iter().sum::<f64>() / per_group as f64;
        let between = mean.iter().map(|m| (m - center) * (m - center)).sum::<f64>();
        Moments {
            count: (rows * per_group) as f64,
            mean: center,
            m2: m2.iter().sum::<f64>() + between * rows as f64,
        }
    };
    mean.chunks(per_group).zip(m2.chunks(per_group)).map(group).collect()
}

/// See [`crate::tensor::Backend::layer_norm`].
pub(super) fn layer_norm<E: Element>(
    exec: &Exec,
    op: &LayerNorm<'_>,
    out: &mut Tensor,
) -> Result<(), TensorError> {
    const OP: &str = "layer_norm";
    let c = op.x.shape().c;
    op.check(out.shape())?;
    let params = params(OP, op.w, c)?;
    if op.x.shape().is_empty() {
        return Ok(());
    }
    let x = elements::<E>(OP, op.x)?;
    let step = c * 16;
    elements_mut::<E>(OP, out)?.par_chunks_mut(step).zip(x.par_chunks(step)).for_each(|(out, x)| {
        let (scale, shift) = (&params.scale[..], &params.shift[..]);
        exec.isa.launch(LayerNormRows { x, scale, shift, eps: op.eps, out });
    });
    Ok(())
}
