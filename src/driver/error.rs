//! What can go wrong at the driver.

/// An error of a driver.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// There is no CUDA driver on this machine.
    #[error("no CUDA driver: {reason}; install the NVIDIA driver, or run with --cpu")]
    NoDriver {
        /// What was tried.
        reason: String,
    },
    /// No device of that index.
    #[error("there is no CUDA device {ordinal}: this machine has {count}")]
    NoDevice {
        /// Index asked for.
        ordinal: usize,
        /// Devices there are.
        count: usize,
    },
    /// The binary holds no kernels for this device.
    #[error("no kernels for {device}: {reason}")]
    NoKernels {
        /// Device or layer.
        device: String,
        /// Why, and what to do.
        reason: String,
    },
    /// A kernel that is not in its module.
    #[error("kernel {name} is not in module {module}")]
    NoFunction {
        /// Kernel file.
        module: String,
        /// Kernel.
        name: String,
    },
    /// The device has no memory left.
    #[error("out of device memory: {requested} bytes requested, {free} free")]
    OutOfMemory {
        /// Bytes asked for.
        requested: usize,
        /// Bytes free.
        free: u64,
        /// Bytes that this driver has in use.
        in_use: usize,
    },
    /// Parameters that do not fit the kernel.
    #[error("kernel {kernel}: {reason}")]
    Parameters {
        /// Kernel.
        kernel: String,
        /// Which number or size is wrong.
        reason: String,
    },
    /// A launch geometry or descriptor that the device does not allow.
    #[error("{what}: {reason}")]
    Invalid {
        /// What was asked for.
        what: &'static str,
        /// Why it cannot be.
        reason: String,
    },
    /// The driver reported an error.
    #[error("{call}: {message}")]
    Call {
        /// The call.
        call: &'static str,
        /// The driver's message.
        message: String,
    },
    /// A kernel failed while it ran (SIMT layer).
    #[error("{0}")]
    Kernel(String),
    /// Compiling kernels failed.
    #[error(transparent)]
    Tool(#[from] super::toolchain::ToolError),
}
