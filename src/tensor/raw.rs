//! A tensor as it lies in a file: bytes, element type, shape.

use std::borrow::Cow;

use super::DType;

/// A stored tensor: row-major little-endian bytes, possibly unaligned.
#[derive(Clone, Debug)]
pub struct RawTensor<'a> {
    /// Element type.
    pub dtype: DType,
    /// Extent of every dimension, outermost first.
    pub shape: &'a [usize],
    /// The elements.
    pub bytes: Cow<'a, [u8]>,
}
