//! Activations, linear combinations, embeddings, transfers to and from the host.

use rayon::prelude::*;

use super::check::{elements, elements_mut, shape, size};
use super::simd::element::Element;
use super::simd::map::{Activate, Axpby};
use super::weights::{WeightMemory, decode_into};
use super::{Exec, Weight};
use crate::tensor::{
    Activation, Curve, DType, Embed, EmbedRow, Embedding, HostLayout, Shape, Tensor, TensorError, check,
};

/// Elements of a task.
const CHUNK: usize = 1 << 14;

/// An embedding table in its file type.
pub(super) struct Table {
    /// The rows.
    pub(super) memory: WeightMemory,
    /// Element type.
    pub(super) dtype: DType,
}

/// See [`crate::tensor::Backend::activate`].
pub(super) fn activate<E: Element>(
    exec: &Exec,
    x: &Tensor,
    act: Activation,
    out: &mut Tensor,
) -> Result<(), TensorError> {
    const OP: &str = "activate";
    shape(OP, x.shape(), out.shape())?;
    let x = elements::<E>(OP, x)?;
    let out = elements_mut::<E>(OP, out)?;
    out.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(out, x)| {
        exec.isa.launch(Activate { x, act, out });
    });
    Ok(())
}

/// See [`crate::tensor::Backend::curve`].
pub(super) fn curve<E: Element>(x: &Tensor, curve: Curve, out: &mut Tensor) -> Result<(), TensorError> {
    const OP: &str = "curve";
    shape(OP, x.shape(), out.shape())?;
    let x = elements::<E>(OP, x)?;
    let out = elements_mut::<E>(OP, out)?;
    out.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(out, x)| {
        out.iter_mut().zip(x).for_each(|(o, v)| *o = E::from_f32(curve.value(v.to_f32())));
    });
    Ok(())
}

/// See [`crate::tensor::Backend::axpby`].
pub(super) fn axpby<E: Element>(
    exec: &Exec,
    (a, x): (f32, &Tensor),
    (b, y): (f32, &Tensor),
    out: &mut Tensor,
) -> Result<(), TensorError> {
    const OP: &str = "axpby";
    shape(OP, x.shape(), y.shape())?;
    shape(OP, x.shape(), out.shape())?;
    let (x, y) = (elements::<E>(OP, x)?, elements::<E>(OP, y)?);
    let out = elements_mut::<E>(OP, out)?;
    out.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).zip(y.par_chunks(CHUNK)).for_each(|((out, x), y)| {
        exec.isa.launch(Axpby { a, x, b, y, out });
    });
    Ok(())
}

/// Nearest neighbour: pixel `(y, x)` of `out` is pixel `(⌊y·h/H⌋, ⌊x·w/W⌋)` of `x`.
pub(super) fn resize_nearest<E: Element>(x: &Tensor, out: &mut Tensor) -> Result<(), TensorError> {
    const OP: &str = "resize";
    let (from, to) = (x.shape(), out.shape());
    check::resize(from, to)?;
    if to.is_empty() {
        return Ok(());
    }
    let x = elements::<E>(OP, x)?;
    let out = elements_mut::<E>(OP, out)?;
    out.par_chunks_mut(to.w * to.c).enumerate().for_each(|(row, out)| {
        let (n, y) = (row / to.h, row % to.h * from.h / to.h);
        for (column, pixel) in out.chunks_exact_mut(to.c).enumerate() {
            let at = (n * from.h + y) * from.w + column * from.w / to.w;
            pixel.copy_from_slice(&x[at * to.c..][..to.c]);
        }
    });
    Ok(())
}

/// See [`crate::tensor::Backend::embed`].
pub(super) fn embed<E: Element>(op: &Embed<'_>, out: &mut Tensor) -> Result<(), TensorError> {
    const OP: &str = "embed";
    let width = op.table.width;
    op.check(out.shape())?;
    let sequence = out.shape().w;
    if out.shape().is_empty() {
        return Ok(());
    }
    let (mut token, mut position) = (vec![0f32; width], vec![0f32; width]);
    let rows = elements_mut::<E>(OP, out)?.chunks_exact_mut(width);
    for (i, (row, out)) in op.tokens.iter().zip(rows).enumerate() {
        match *row {
            EmbedRow::Id(id) => table_row(op.table, id as usize, &mut token)?,
            EmbedRow::Vector(v) => {
                token.copy_from_slice(v);
            }
        }
        table_row(op.positions, i % sequence, &mut position)?;
        for ((o, t), p) in out.iter_mut().zip(&token).zip(&position) {
            *o = E::from_f32(t + p);
        }
    }
    Ok(())
}

fn table_row(e: &Embedding, row: usize, out: &mut [f32]) -> Result<(), TensorError> {
    const OP: &str = "embed";
    let Some(Weight::Table(t)) = e.packed.downcast::<Weight>() else {
        return Err(TensorError::ForeignWeight { op: OP });
    };
    if row >= e.rows {
        return Err(TensorError::Size { op: OP, what: "token id (below)", expected: e.rows, found: row });
    }
    let bytes = e.width * t.dtype.size();
    decode_into(t.dtype, &t.memory.as_slice::<u8>()[row * bytes..][..bytes], out)
}

/// See [`crate::tensor::Backend::timestep_embedding`].
///
/// Rounded to f32 where f32 tensor code rounds: the exponent, the frequency,
/// the angle. An angle near 1000 turns one rounding into 6e-5 of phase.
pub(super) fn timestep_embedding<E: Element>(timesteps: &[f32], out: &mut Tensor) -> Result<(), TensorError> {
    const OP: &str = "timestep_embedding";
    let s = out.shape();
    size(OP, "rows", timesteps.len(), s.rows())?;
    if s.is_empty() {
        return Ok(());
    }
    let half = s.c / 2;
    let rows = elements_mut::<E>(OP, out)?.chunks_exact_mut(s.c);
    for (t, out) in timesteps.iter().zip(rows) {
        out.fill(E::from_f32(0.0));
        for i in 0..half {
            let exponent = -(10_000f64.ln() as f32) * i as f32 / half as f32;
            let frequency = f64::from(exponent).exp() as f32;
            let angle = f64::from(t * frequency);
            out[i] = E::from_f32(angle.cos() as f32);
            out[half + i] = E::from_f32(angle.sin() as f32);
        }
    }
    Ok(())
}

/// See [`crate::tensor::Backend::upload`].
pub(super) fn upload<E: Element>(
    data: &[f32],
    layout: HostLayout,
    out: &mut Tensor,
) -> Result<(), TensorError> {
    const OP: &str = "upload";
    let s = out.shape();
    size(OP, "number of values", s.len(), data.len())?;
    if s.is_empty() {
        return Ok(());
    }
    let at = strides(layout, s);
    elements_mut::<E>(OP, out)?.par_chunks_mut(s.w * s.c).enumerate().for_each(|(row, out)| {
        let base = at.base(row, s);
        for (x, pixel) in out.chunks_exact_mut(s.c).enumerate() {
            for (c, o) in pixel.iter_mut().enumerate() {
                *o = E::from_f32(data[base + x * at.x + c * at.c]);
            }
        }
    });
    Ok(())
}

/// See [`crate::tensor::Backend::download`].
pub(super) fn download<E: Element>(
    x: &Tensor,
    layout: HostLayout,
    out: &mut [f32],
) -> Result<(), TensorError> {
    const OP: &str = "download";
    let s = x.shape();
    size(OP, "number of values", s.len(), out.len())?;
    if s.is_empty() {
        return Ok(());
    }
    let x = elements::<E>(OP, x)?;
    match layout {
        HostLayout::Nhwc => {
            out.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(out, x)| {
                out.iter_mut().zip(x).for_each(|(o, v)| *o = v.to_f32());
            });
        }
        HostLayout::Nchw => out.par_chunks_mut(s.w).enumerate().for_each(|(row, out)| {
            let (n, c, y) = (row / (s.c * s.h), row / s.h % s.c, row % s.h);
            let from = &x[(n * s.h + y) * s.w * s.c..];
            out.iter_mut().enumerate().for_each(|(i, o)| *o = from[i * s.c + c].to_f32());
        }),
    }
    Ok(())
}

/// Distances between elements of host data.
struct Strides {
    n: usize,
    y: usize,
    x: usize,
    c: usize,
}

fn strides(layout: HostLayout, s: Shape) -> Strides {
    match layout {
        HostLayout::Nchw => Strides { n: s.c * s.h * s.w, y: s.w, x: 1, c: s.h * s.w },
        HostLayout::Nhwc => Strides { n: s.c * s.h * s.w, y: s.w * s.c, x: s.c, c: 1 },
    }
}

impl Strides {
    fn base(&self, row: usize, s: Shape) -> usize {
        row / s.h * self.n + row % s.h * self.y
    }
}
