//! From a tensor's strides to the bytes that hold it.

use std::ops::Range;

use super::PickleFault;
use super::value::Tensor;
use crate::weights::header::HeaderEntry;

/// Makes entries. Tensors that are not in one piece are copied together; the
/// copies of a file may have no more bytes than the file itself.
pub(super) struct Gathering<'a> {
    bytes: &'a [u8],
    left: usize,
}

impl<'a> Gathering<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, left: bytes.len() }
    }

    /// The entry of a tensor whose storage lies at `place` in the file.
    pub fn entry(
        &mut self,
        name: String,
        tensor: &Tensor,
        place: Range<usize>,
    ) -> Result<HeaderEntry, PickleFault> {
        let Some(dtype) = tensor.storage.dtype else {
            return Err(PickleFault::DType { name, storage: tensor.storage.type_name.clone() });
        };
        let size = dtype.size() as u64;
        let Tensor { storage, offset, shape, strides } = tensor;
        let found = place.len() as u64;
        let needed = storage.begin.checked_add(storage.elements).and_then(|n| n.checked_mul(size));
        let needed = needed.unwrap_or(u64::MAX);
        if needed > found {
            return Err(PickleFault::Storage { name, needed, found });
        }
        let beyond = || PickleFault::Beyond {
            name: name.clone(),
            shape: shape.clone(),
            strides: strides.clone(),
            offset: *offset,
            elements: storage.elements,
        };
        let numel = shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d)).ok_or_else(beyond)?;
        let reach = match numel {
            0 => Some(*offset),
            _ => shape
                .iter()
                .zip(strides)
                .try_fold(offset.checked_add(1), |at, (&d, &stride)| {
                    Some(at?.checked_add((d - 1).checked_mul(stride)?))
                })
                .flatten(),
        };
        if reach.is_none_or(|end| end > storage.elements) || numel > storage.elements {
            return Err(if numel > storage.elements && reach.is_some_and(|end| end <= storage.elements) {
                PickleFault::Overlap { name, shape: shape.clone(), strides: strides.clone() }
            } else {
                beyond()
            });
        }
        // All of these are at most `found`, the length of a slice.
        let begin = place.start + ((storage.begin + offset) * size) as usize;
        let extents = shape.iter().map(|&d| d as usize).collect();
        let bytes = (numel * size) as usize;
        if numel == 0 || is_contiguous(shape, strides) {
            return Ok(HeaderEntry { name, dtype, shape: extents, begin, end: begin + bytes, copy: None });
        }
        if !is_injective(shape, strides) {
            return Err(PickleFault::Overlap { name, shape: shape.clone(), strides: strides.clone() });
        }
        let Some(left) = self.left.checked_sub(bytes) else {
            return Err(PickleFault::Limit {
                what: "bytes in tensors of several pieces",
                cap: self.bytes.len(),
            });
        };
        self.left = left;
        let copy = gathered(&self.bytes[begin..place.end], shape, strides, dtype.size());
        Ok(HeaderEntry { name, dtype, shape: extents, begin, end: begin, copy: Some(copy.into()) })
    }
}

fn is_contiguous(shape: &[u64], strides: &[u64]) -> bool {
    let mut expected = 1;
    shape.iter().zip(strides).rev().all(|(&d, &stride)| {
        let fits = d == 1 || stride == expected;
        expected *= d;
        fits
    })
}

/// Whether no two elements are one: every stride reaches beyond all that smaller strides reach.
fn is_injective(shape: &[u64], strides: &[u64]) -> bool {
    let mut axes: Vec<(u64, u64)> =
        shape.iter().zip(strides).filter(|(d, _)| **d > 1).map(|(&d, &s)| (s, d)).collect();
    axes.sort_unstable();
    let mut reach = 0;
    axes.into_iter().all(|(stride, d)| {
        let is_beyond = stride > reach;
        reach += stride * (d - 1);
        is_beyond
    })
}

/// The elements in row-major order; all of them are known to lie inside `bytes`.
fn gathered(bytes: &[u8], shape: &[u64], strides: &[u64], size: usize) -> Vec<u8> {
    let numel: u64 = shape.iter().product();
    let mut out = Vec::with_capacity(numel as usize * size);
    let mut index = vec![0u64; shape.len()];
    let mut at = 0u64;
    for _ in 0..numel {
        let from = at as usize * size;
        out.extend_from_slice(bytes.get(from..from + size).unwrap_or_default());
        for axis in (0..shape.len()).rev() {
            index[axis] += 1;
            at += strides[axis];
            if index[axis] < shape[axis] {
                break;
            }
            at -= strides[axis] * shape[axis];
            index[axis] = 0;
        }
    }
    out
}
