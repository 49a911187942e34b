//! Backends: implementations of the op set, and the choice between them.

pub mod cpu;
pub mod cuda;
pub mod metered;

use std::path::PathBuf;
use std::sync::Arc;

use crate::driver::DriverError;
use crate::tensor::{Placement, TensorError};

/// Which kind of device to run on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// A GPU if there is one that this build has kernels for, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
    /// The CUDA kernels on the CPU, for tests: slow and strict.
    Simt,
}

/// Element type that a network computes in on a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// IEEE half precision.
    F16,
    /// bfloat16.
    BF16,
    /// IEEE single precision: no tensor cores, an order of magnitude slower.
    F32,
}

/// Which device to run on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceOptions {
    /// Kind of device.
    pub device: Device,
    /// Index of the GPU.
    pub ordinal: usize,
    /// Precision of diffusion models on a GPU; f16 if not given.
    pub diffusion: Option<Precision>,
    /// Precision of text encoders on a GPU; f16 if not given.
    pub text: Option<Precision>,
    /// Precision of autoencoders on a GPU; bf16 if not given, as f16 overflows in some of them; f32 before Ampere,
    /// which has no bf16.
    pub vae: Option<Precision>,
    /// The autoencoder runs on the CPU.
    pub vae_on_cpu: bool,
    /// Noise that samplers draw on the way comes from the GPU's generator.
    pub gpu_noise: bool,
    /// Worker threads of the CPU backend; all cores if not given.
    pub threads: Option<usize>,
    /// Compute in bf16 (AMX tiles where the CPU has them) instead of f32.
    pub cpu_bf16: bool,
    /// Kernels of this folder in place of the binary's own.
    pub kernels: Option<PathBuf>,
    /// Most bytes of activations; the machine's memory if not given.
    pub memory_limit: Option<usize>,
}

/// A device that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The GPU or its driver.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// The backend.
    #[error(transparent)]
    Tensor(#[from] TensorError),
}

/// The backends for these options.
///
/// With [`Device::Auto`] a GPU that cannot be used is not an error: a log line
/// says why (a warning, unless there is just no driver), and the CPU does the work.
pub fn open(options: DeviceOptions) -> Result<Placement, OpenError> {
    let cpu = || cpu_backend(&options);
    match options.device {
        Device::Cpu => Ok(Placement::all(cpu()?)),
        Device::Cuda | Device::Simt => cuda::open(&options, cpu),
        Device::Auto => match cuda::open(&options, cpu) {
            Ok(placement) => Ok(placement),
            Err(reason) => {
                match reason {
                    OpenError::Driver(DriverError::NoDriver { .. }) => {
                        tracing::info!(%reason, "no GPU in use")
                    }
                    _ => tracing::warn!(%reason, "no GPU in use, the CPU does the work"),
                }
                Ok(Placement::all(cpu()?))
            }
        },
    }
}

/// The CPU's backend for these options.
pub fn cpu_backend(options: &DeviceOptions) -> Result<Arc<cpu::CpuBackend>, TensorError> {
    Ok(Arc::new(cpu::CpuBackend::new(cpu::CpuOptions {
        threads: options.threads,
        bf16: options.cpu_bf16,
        memory_limit: options.memory_limit,
    })?))
}
