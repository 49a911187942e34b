//! Typed views of tensors and the shape checks that all ops share.

use super::matmul::Input;
use super::simd::element::Element;
pub(super) use crate::tensor::check::{shape, size};
use crate::tensor::{Cols, Storage, Tensor, TensorError};

/// The elements of an activation.
pub(super) fn elements<'a, E: Element>(op: &'static str, t: &'a Tensor) -> Result<&'a [E], TensorError> {
    check_type::<E>(op, t)?;
    let len = t.shape().len();
    match t.storage() {
        Storage::Host(b) => b.as_slice::<E>().get(..len).ok_or_else(|| short(op, t)),
        Storage::Device(_) => Err(foreign(op)),
    }
}

/// The elements of an activation, mutable.
pub(super) fn elements_mut<'a, E: Element>(
    op: &'static str,
    t: &'a mut Tensor,
) -> Result<&'a mut [E], TensorError> {
    check_type::<E>(op, t)?;
    let len = t.shape().len();
    let error = short(op, t);
    match t.storage_mut() {
        Storage::Host(b) => b.as_mut_slice::<E>().get_mut(..len).ok_or(error),
        Storage::Device(_) => Err(foreign(op)),
    }
}

fn check_type<E: Element>(op: &'static str, t: &Tensor) -> Result<(), TensorError> {
    if t.dtype() != E::DTYPE {
        let what = format!("a {:?} tensor where {:?} is the backend's type", t.dtype(), E::DTYPE);
        return Err(TensorError::Unsupported { op, what });
    }
    Ok(())
}

fn short(op: &'static str, t: &Tensor) -> TensorError {
    TensorError::Unsupported { op, what: format!("a tensor whose memory is shorter than {}", t.shape()) }
}

fn foreign(op: &'static str) -> TensorError {
    TensorError::Unsupported { op, what: "a tensor on another device".to_owned() }
}

/// Columns of an activation's rows.
pub(super) fn columns<'a, E: Element>(op: &'static str, c: &Cols<'a>) -> Result<Input<'a, E>, TensorError> {
    c.check(op)?;
    let stride = c.tensor.shape().c;
    let data = elements(op, c.tensor)?;
    Ok(Input { data: data.get(c.start..).unwrap_or(&[]), stride, width: c.width })
}
