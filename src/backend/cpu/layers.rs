//! Convolution and linear layers: checks, and the epilogue of each.

use super::check::{columns, elements, elements_mut, shape, size};
use super::matmul::{Input, Layer, Rows, Window};
use super::simd::element::Element;
use super::simd::finish::{Epilogue, LARGE_OUTPUT_BYTES, SampleBias};
use super::weights::Panels;
use super::{Exec, Weight};
use crate::tensor::{Activation, Conv2d, Linear, Tensor, TensorError};

fn panels<'a>(op: &'static str, packed: &'a crate::tensor::Packed) -> Result<&'a Panels, TensorError> {
    match packed.downcast::<Weight>() {
        Some(Weight::Panels(p)) => Ok(p),
        _ => Err(TensorError::ForeignWeight { op }),
    }
}

/// See [`crate::tensor::Backend::conv2d`].
pub(super) fn conv2d<E: Element>(exec: &Exec, op: &Conv2d<'_>, out: &mut Tensor) -> Result<(), TensorError> {
    const OP: &str = "conv2d";
    let s = op.x.shape();
    let w = panels(OP, &op.w.packed)?;
    if op.stride == 0 {
        return Err(TensorError::Size { op: OP, what: "stride", expected: 1, found: 0 });
    }
    let Some(expected) = op.out_shape() else {
        return Err(TensorError::Size {
            op: OP,
            what: "height and width",
            expected: op.w.kh,
            found: s.h.min(s.w),
        });
    };
    shape(OP, expected, out.shape())?;
    let mut inputs = [Some(Input { data: elements::<E>(OP, op.x)?, stride: s.c, width: s.c }), None];
    let mut channels = s.c;
    if let Some(x2) = op.x2 {
        let c = x2.shape().c;
        shape(OP, s.with_channels(c), x2.shape())?;
        inputs[1] = Some(Input { data: elements(OP, x2)?, stride: c, width: c });
        channels += c;
    }
    size(OP, "input channels", op.w.cin, channels)?;
    size(OP, "weight rows", op.w.cin * op.w.kh * op.w.kw, w.k)?;
    let time_bias = match &op.time_bias {
        Some(cols) => {
            size(OP, "time bias width", op.w.cout, cols.width)?;
            size(OP, "time bias rows", s.n, cols.tensor.shape().rows())?;
            let t = columns::<E>(OP, cols)?;
            Some(SampleBias { data: t.data, stride: t.stride, positions: expected.positions() })
        }
        None => None,
    };
    let up = if op.upsample2x { 2 } else { 1 };
    let window = Window {
        kw: op.w.kw,
        stride: op.stride,
        top: op.pad.top,
        left: op.pad.left,
        h: s.h,
        w: s.w,
        up,
        oh: expected.h,
        ow: expected.w,
    };
    let epilogue = Epilogue {
        time_bias,
        act: op.act,
        is_geglu: w.is_geglu,
        scale: op.scale,
        residual: residual(OP, op.residual, out)?,
        width: op.w.cout,
        is_large: expected.len() * size_of::<E>() >= LARGE_OUTPUT_BYTES,
    };
    let layer = Layer { w, a: Rows { inputs, window }, epilogue, m: expected.rows() };
    layer.run(exec, elements_mut(OP, out)?);
    Ok(())
}

/// See [`crate::tensor::Backend::linear`].
pub(super) fn linear<E: Element>(exec: &Exec, op: &Linear<'_>, out: &mut Tensor) -> Result<(), TensorError> {
    const OP: &str = "linear";
    let w = panels(OP, &op.w.packed)?;
    let s = op.x.tensor.shape();
    shape(OP, s.with_channels(op.w.n), out.shape())?;
    if op.w.is_geglu && op.act != Activation::None {
        let what = format!("{:?} behind a GEGLU weight", op.act);
        return Err(TensorError::Unsupported { op: OP, what });
    }
    let mut inputs = [Some(columns::<E>(OP, &op.x)?), None];
    let mut k = op.x.width;
    if let Some(x2) = &op.x2 {
        size(OP, "rows of the second input", s.rows(), x2.tensor.shape().rows())?;
        inputs[1] = Some(columns(OP, x2)?);
        k += x2.width;
    }
    size(OP, "input features", op.w.k, k)?;
    size(OP, "weight rows", op.w.k, w.k)?;
    let epilogue = Epilogue {
        time_bias: None,
        act: op.act,
        is_geglu: w.is_geglu,
        scale: op.scale,
        residual: residual(OP, op.residual, out)?,
        width: op.w.n,
        is_large: out.shape().len() * size_of::<E>() >= LARGE_OUTPUT_BYTES,
    };
    let m = s.rows();
    let layer = Layer { w, a: Rows { inputs, window: Window::rows(m) }, epilogue, m };
    layer.run(exec, elements_mut(OP, out)?);
    Ok(())
}

fn residual<'a, E: Element>(
    op: &'static str,
    residual: Option<&'a Tensor>,
    out: &Tensor,
) -> Result<Option<&'a [E]>, TensorError> {
    let Some(r) = residual else { return Ok(None) };
    shape(op, out.shape(), r.shape())?;
    elements(op, r).map(Some)
}
