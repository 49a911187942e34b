//! Activations on a backend.

use super::buffer::{DeviceBuffer, HostBuffer};
use super::{DType, TensorError};

/// Where an activation's elements are.
pub enum Storage {
    /// Host memory on loan from the CPU backend's arena.
    Host(HostBuffer),
    /// Device memory on loan from a GPU backend's pool.
    Device(DeviceBuffer),
}

/// Extent of an activation: `[N, H, W, C]`, channels innermost (NHWC).
///
/// Token sequences `[B, S, C]` are `[B, 1, S, C]`, so a feature map and its
/// token view differ in the shape only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Samples.
    pub n: usize,
    /// Rows.
    pub h: usize,
    /// Columns.
    pub w: usize,
    /// Channels.
    pub c: usize,
}

impl Shape {
    /// A feature map.
    pub fn nhwc(n: usize, h: usize, w: usize, c: usize) -> Self {
        Self { n, h, w, c }
    }

    /// A token sequence `[b, s, c]`.
    pub fn tokens(b: usize, s: usize, c: usize) -> Self {
        Self { n: b, h: 1, w: s, c }
    }

    /// Positions over all samples: N·H·W, the M of a GEMM.
    pub fn rows(self) -> usize {
        self.n * self.h * self.w
    }

    /// Positions of one sample: H·W.
    pub fn positions(self) -> usize {
        self.h * self.w
    }

    /// Number of elements.
    pub fn len(self) -> usize {
        self.rows() * self.c
    }

    /// Whether there are no elements.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// The same positions with `c` channels.
    pub fn with_channels(self, c: usize) -> Self {
        Self { c, ..self }
    }

    /// The same elements as a token sequence.
    pub fn as_tokens(self) -> Self {
        Self::tokens(self.n, self.positions(), self.c)
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "[{}, {}, {}, {}]", self.n, self.h, self.w, self.c)
    }
}

/// An activation on a backend: contiguous NHWC, memory on loan from the arena.
pub struct Tensor {
    shape: Shape,
    dtype: DType,
    storage: Storage,
}

impl Tensor {
    /// Wraps storage; called by backends.
    pub fn new(shape: Shape, dtype: DType, storage: Storage) -> Self {
        Self { shape, dtype, storage }
    }

    /// Extent.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Element type, chosen by the backend.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where the elements are; for backends.
    pub fn storage(&self) -> &Storage {
        &self.storage
    }

    /// Where the elements are, mutable; for backends.
    pub fn storage_mut(&mut self) -> &mut Storage {
        &mut self.storage
    }

    /// The same elements under another shape of the same length.
    pub fn reshape(&mut self, shape: Shape) -> Result<(), TensorError> {
        if shape.len() != self.shape.len() {
            return Err(TensorError::Shape { op: "reshape", expected: self.shape, found: shape });
        }
        self.shape = shape;
        Ok(())
    }
}

/// Columns `start..start + width` of every row of a tensor: lets q, k and v
/// be slices of one fused projection.
#[derive(Clone, Copy)]
pub struct Cols<'a> {
    /// The tensor.
    pub tensor: &'a Tensor,
    /// First channel.
    pub start: usize,
    /// Number of channels.
    pub width: usize,
}

impl<'a> Cols<'a> {
    /// All columns.
    pub fn all(tensor: &'a Tensor) -> Self {
        Self { tensor, start: 0, width: tensor.shape().c }
    }

    /// Columns `start..start + width`.
    pub fn range(tensor: &'a Tensor, start: usize, width: usize) -> Self {
        Self { tensor, start, width }
    }
}
