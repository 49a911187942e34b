//! Convolution and linear layers: checks, and the epilogue of each.

use super::check::{columns, elements, elements_mut, size};
use super::matmul::{Input, Layer, Rows, Window};
use super::simd::element::Element;
use super::simd::finish::{Epilogue, LARGE_OUTPUT_BYTES, SampleBias};
use super::weights::Panels;
use super::{Exec, Weight};
use crate::tensor::{Conv2d, Linear, Tensor, TensorError};

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
    let expected = out.shape();
    op.check(expected)?;
    let mut inputs = [Some(Input { data: elements::<E>(OP, op.x)?, stride: s.c, width: s.c }), None];
    if let Some(x2) = op.x2 {
        let c = x2.shape().c;
        inputs[1] = Some(Input { data: elements(OP, x2)?, stride: c, width: c });
    }
    size(OP, "weight rows", op.w.cin * op.w.kh * op.w.kw, w.k)?;
    let time_bias = match &op.time_bias {
        Some(cols) => {
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
        residual: op.residual.map(|r| elements(OP, r)).transpose()?,
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
    op.check(out.shape())?;
    let mut inputs = [Some(columns::<E>(OP, &op.x)?), None];
    if let Some(x2) = &op.x2 {
        inputs[1] = Some(columns(OP, x2)?);
    }
    size(OP, "weight rows", op.w.k, w.k)?;
    let epilogue = Epilogue {
        time_bias: None,
        act: op.act,
        is_geglu: w.is_geglu,
        scale: op.scale,
        residual: op.residual.map(|r| elements(OP, r)).transpose()?,
        width: op.w.n,
        is_large: out.shape().len() * size_of::<E>() >= LARGE_OUTPUT_BYTES,
    };
    let m = s.rows();
    let layer = Layer { w, a: Rows { inputs, window: Window::rows(m) }, epilogue, m };
    layer.run(exec, elements_mut(OP, out)?);
    Ok(())
}
