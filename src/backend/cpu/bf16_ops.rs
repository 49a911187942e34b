//! The bf16 tier of the matrix ops: checks and descriptors for the kernels in
//! [`super::bf16`], which multiply bf16 by bf16 and sum in f32.
//!
//! Used where the CPU has such instructions; elsewhere bf16 activations go
//! through the f32 products, which is as exact and no slower.

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::{bf16, f16};

use super::Weight;
use super::bf16 as kernels;
use super::check::{columns, elements, elements_mut, shape};
use super::matmul::Input;
use super::weights::{PanelSource, check_len, decode};
use crate::tensor::{Activation, Attention, Conv2d, DType, Linear, Packed, RawTensor, Tensor, TensorError};

/// A weight in tile order.
pub(super) struct TileWeight {
    packed: kernels::PackedB,
    bias: Vec<f32>,
    total: Arc<AtomicUsize>,
}

impl Drop for TileWeight {
    fn drop(&mut self) {
        self.total.fetch_sub(self.packed.size_bytes(), Ordering::Relaxed);
    }
}

/// Shapes were checked before; what a kernel still finds is said in its words.
fn kernel_error(op: &'static str) -> impl Fn(kernels::KernelError) -> TensorError {
    move |e| TensorError::Unsupported { op, what: e.to_string() }
}

/// Packs a weight; rows of all matrices follow each other.
pub(super) fn pack(
    source: &PanelSource<'_>,
    window: [usize; 2],
    total: &Arc<AtomicUsize>,
) -> Result<TileWeight, TensorError> {
    let k = source.cin * source.taps;
    let mut rows = 0;
    for m in source.matrices {
        let count = m.shape.first().copied().unwrap_or(0);
        check_len(source.op, m, count * k)?;
        rows += count;
    }
    let bias = source.bias(rows)?;
    let shape = kernels::KernelShape { cout: rows, cin: source.cin, height: window[0], width: window[1] };
    let packed = match (source.stored_type()?, source.matrices) {
        (DType::F16, m) => pack_as(&stacked::<f16>(m, DType::F16)?, kernels::Weights::F16, source, shape),
        (DType::BF16, m) => pack_as(&stacked::<bf16>(m, DType::BF16)?, kernels::Weights::Bf16, source, shape),
        (_, m) => pack_as(&stacked::<f32>(m, DType::F32)?, kernels::Weights::F32, source, shape),
    }
    .map_err(kernel_error(source.op))?;
    total.fetch_add(packed.size_bytes(), Ordering::Relaxed);
    Ok(TileWeight { packed, bias, total: total.clone() })
}

fn pack_as<'a, T>(
    values: &'a [T],
    wrap: fn(&'a [T]) -> kernels::Weights<'a>,
    source: &PanelSource<'_>,
    shape: kernels::KernelShape,
) -> Result<kernels::PackedB, kernels::KernelError> {
    if source.is_geglu {
        kernels::PackedB::geglu(wrap(values), shape.cout, shape.cin)
    } else {
        kernels::PackedB::conv(wrap(values), shape)
    }
}

/// An element type that weights may be handed over in.
trait Handed: bytemuck::Pod {
    fn from_f32(x: f32) -> Self;
}

impl Handed for f32 {
    fn from_f32(x: f32) -> Self {
        x
    }
}

impl Handed for f16 {
    fn from_f32(x: f32) -> Self {
        f16::from_f32(x)
    }
}

impl Handed for bf16 {
    fn from_f32(x: f32) -> Self {
        bf16::from_f32(x)
    }
}

/// All matrices in one slice: borrowed if a single aligned one is of the type.
fn stacked<'a, T: Handed>(matrices: &'a [RawTensor<'a>], dtype: DType) -> Result<Cow<'a, [T]>, TensorError> {
    if let [m] = matrices
        && m.dtype == dtype
        && cfg!(target_endian = "little")
        && let Ok(values) = bytemuck::try_cast_slice(&m.bytes)
    {
        return Ok(Cow::Borrowed(values));
    }
    let mut all = Vec::new();
    for m in matrices {
        all.extend(decode(m)?.into_iter().map(T::from_f32));
    }
    Ok(Cow::Owned(all))
}

fn weight<'a>(op: &'static str, packed: &'a Packed) -> Result<&'a TileWeight, TensorError> {
    match packed.downcast::<Weight>() {
        Some(Weight::Tiles(w)) => Ok(w),
        _ => Err(TensorError::ForeignWeight { op }),
    }
}

fn activation(act: Activation, is_geglu: bool) -> kernels::Activation {
    match act {
        _ if is_geglu => kernels::Activation::Geglu,
        Activation::None => kernels::Activation::None,
        Activation::Silu => kernels::Activation::Silu,
        Activation::Gelu => kernels::Activation::Gelu,
        Activation::QuickGelu => kernels::Activation::QuickGelu,
        Activation::Relu => kernels::Activation::Relu,
        Activation::LeakyRelu => kernels::Activation::LeakyRelu,
    }
}

fn rows<'a>(input: &Input<'a, bf16>) -> kernels::Rows<'a> {
    kernels::Rows { data: input.data, stride: input.stride }
}

fn heads<'a>(input: &Input<'a, bf16>) -> kernels::Heads<'a> {
    kernels::Heads { data: input.data, stride: input.stride, offset: 0 }
}

fn residual<'a>(
    op: &'static str,
    residual: Option<&'a Tensor>,
    out: &Tensor,
) -> Result<Option<kernels::Rows<'a>>, TensorError> {
    let Some(r) = residual else { return Ok(None) };
    shape(op, out.shape(), r.shape())?;
    Ok(Some(kernels::Rows { data: elements(op, r)?, stride: out.shape().c }))
}

/// See [`crate::tensor::Backend::conv2d`].
pub(super) fn conv2d(tier: kernels::Tier, op: &Conv2d<'_>, out: &mut Tensor) -> Result<(), TensorError> {
    const OP: &str = "conv2d";
    let s = op.x.shape();
    let w = weight(OP, &op.w.packed)?;
    let expected = out.shape();
    op.check(expected)?;
    let time_bias = match &op.time_bias {
        Some(cols) => {
            let t = columns::<bf16>(OP, cols)?;
            (0..s.n).flat_map(|n| &t.data[n * t.stride..][..t.width]).copied().collect()
        }
        None => Vec::new(),
    };
    let input = kernels::ConvInput {
        batch: s.n,
        height: s.h,
        width: s.w,
        first: elements(OP, op.x)?,
        first_channels: s.c,
        second: op.x2.map(|t| elements(OP, t)).transpose()?,
        is_upsampled: op.upsample2x,
    };
    let p = op.pad;
    let geometry =
        kernels::Geometry { stride: op.stride, top: p.top, left: p.left, bottom: p.bottom, right: p.right };
    let epilogue = kernels::Epilogue {
        bias: Some(&w.bias),
        group_bias: op
            .time_bias
            .is_some()
            .then_some((kernels::GroupBias::Bf16(&time_bias), expected.positions())),
        activation: activation(op.act, false),
        scale: op.scale,
        residual: residual(OP, op.residual, out)?,
    };
    let target = target(OP, out, expected.c)?;
    kernels::conv2d(tier, &input, geometry, &w.packed, &epilogue, target).map_err(kernel_error(OP))
}

/// Where a matrix op writes: results that leave the device are f32.
fn target<'a>(
    op: &'static str,
    out: &'a mut Tensor,
    columns: usize,
) -> Result<kernels::Output<'a>, TensorError> {
    Ok(match out.dtype() {
        DType::F32 => kernels::Output::f32(elements_mut(op, out)?, columns),
        _ => kernels::Output::bf16(elements_mut(op, out)?, columns),
    })
}

/// See [`crate::tensor::Backend::linear`].
pub(super) fn linear(tier: kernels::Tier, op: &Linear<'_>, out: &mut Tensor) -> Result<(), TensorError> {
    const OP: &str = "linear";
    let w = weight(OP, &op.w.packed)?;
    let s = op.x.tensor.shape();
    op.check(out.shape())?;
    let first = columns::<bf16>(OP, &op.x)?;
    let mut second = None;
    if let Some(x2) = &op.x2 {
        second = Some(columns::<bf16>(OP, x2)?).filter(|i| i.width > 0);
    }
    let input = kernels::GemmInput {
        rows: s.rows(),
        first: rows(&first),
        first_columns: first.width,
        second: second.as_ref().map(rows),
    };
    let epilogue = kernels::Epilogue {
        bias: Some(&w.bias),
        group_bias: None,
        activation: activation(op.act, op.w.is_geglu),
        scale: op.scale,
        residual: residual(OP, op.residual, out)?,
    };
    let target = target(OP, out, op.w.n)?;
    kernels::gemm(tier, &input, &w.packed, &epilogue, target).map_err(kernel_error(OP))
}

/// See [`crate::tensor::Backend::attention`]; shapes are already checked.
pub(super) fn attention(
    tier: kernels::Tier,
    op: &Attention<'_>,
    out: &mut Tensor,
) -> Result<(), TensorError> {
    const OP: &str = "attention";
    let (sq, sk) = (op.q.tensor.shape(), op.k.tensor.shape());
    // Samples that share keys are neighbours: to every query they are one longer sample.
    let (queries, width) = (sq.positions() * (sq.n / sk.n), op.q.width);
    let [q, k, v] = [columns::<bf16>(OP, &op.q)?, columns(OP, &op.k)?, columns(OP, &op.v)?];
    let call = kernels::Attention {
        batch: sk.n,
        heads: op.heads,
        head_dim: width / op.heads,
        queries,
        keys: sk.positions(),
        q: heads(&q),
        k: heads(&k),
        v: heads(&v),
        scale: op.scale,
        is_causal: op.is_causal,
    };
    kernels::attention(tier, &call, elements_mut(OP, out)?, width).map_err(kernel_error(OP))
}
