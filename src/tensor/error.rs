//! Errors of tensor operations.

use super::{DType, Shape};

/// A mistake in the use of an op, or memory that can't be had.
#[derive(Debug, thiserror::Error)]
pub enum TensorError {
    /// Shapes don't fit together.
    #[error("{op}: expected shape {expected}, found {found}")]
    Shape {
        /// The op.
        op: &'static str,
        /// What was needed.
        expected: Shape,
        /// What was given.
        found: Shape,
    },
    /// Sizes don't fit together.
    #[error("{op}: {what} must be {expected}, found {found}")]
    Size {
        /// The op.
        op: &'static str,
        /// Which size.
        what: &'static str,
        /// What was needed.
        expected: usize,
        /// What was given.
        found: usize,
    },
    /// The op can't do this on this backend.
    #[error("{op}: {what} is not supported")]
    Unsupported {
        /// The op.
        op: &'static str,
        /// What was asked.
        what: String,
    },
    /// A stored weight has an element type that can't be computed with.
    #[error("weights of type {0:?} can't be used for computing")]
    WeightType(DType),
    /// A weight of another backend was passed in.
    #[error("{op}: the weight was packed by another backend")]
    ForeignWeight {
        /// The op.
        op: &'static str,
    },
    /// No memory.
    #[error(
        "out of memory: {bytes} bytes can't be had ({in_use} in use); use a smaller picture or batch, or free models"
    )]
    OutOfMemory {
        /// Bytes asked for.
        bytes: usize,
        /// Bytes in use.
        in_use: usize,
    },
    /// The device or its driver reported an error.
    #[error("{0}")]
    Device(String),
}
