//! What can go wrong on the device.

use crate::driver::DriverError;

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
