//! What can go wrong on the device.

use crate::driver::DriverError;
use crate::tensor::TensorError;

/// An error of a launch.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    /// The driver's error.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// A shape or layout that a kernel does not take.
    #[error("{op}: {reason}")]
    Unsupported {
        /// Operation.
        op: &'static str,
        /// What is not supported, with the values.
        reason: String,
    },
}

impl From<CudaError> for TensorError {
    fn from(error: CudaError) -> Self {
        match error {
            CudaError::Unsupported { op, reason } => Self::Unsupported { op, what: reason },
            CudaError::Driver(DriverError::OutOfMemory { requested, in_use, .. }) => {
                Self::OutOfMemory { bytes: requested, in_use }
            }
            CudaError::Driver(error) => Self::Device(error.to_string()),
        }
    }
}
