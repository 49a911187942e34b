//! Typed views of tensors and the shape checks that all ops share.

use super::matmul::Input;
use super::simd::element::Element;
use crate::tensor::{Cols, Shape, Storage, Tensor, TensorError};

/// The elements of an activation.
pub(super) fn elements<'a, E: Element>(op: &'static str, t: &'a Tensor) -> Result<&'a [E], TensorError> {
    check_type::<E>(op, t)?;
    let len = t.shape().len();
    match t.storage() {
        Storage::Host(b) => b.as_slice::<E>().get(..len).ok_or_else(|| short(op, t)),
        #[allow(unreachable_patterns)]
        _ => Err(foreign(op)),
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
        #[allow(unreachable_patterns)]
        _ => Err(foreign(op)),
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
    let stride = c.tensor.shape().c;
    let end = c.start.saturating_add(c.width);
    size(op, "end of the columns", end.min(stride), end)?;
    let data = elements(op, c.tensor)?;
    Ok(Input { data: data.get(c.start..).unwrap_or(&[]), stride, width: c.width })
}

/// Fails unless `found == expected`.
pub(super) fn size(
    op: &'static str,
    what: &'static str,
    expected: usize,
    found: usize,
) -> Result<(), TensorError> {
    if expected == found { Ok(()) } else { Err(TensorError::Size { op, what, expected, found }) }
}

/// Fails unless `found == expected`.
pub(super) fn shape(op: &'static str, expected: Shape, found: Shape) -> Result<(), TensorError> {
    if expected == found { Ok(()) } else { Err(TensorError::Shape { op, expected, found }) }
}
