//! Backends: implementations of the op set.

pub mod cpu;
pub mod cuda;
pub mod metered;

use std::sync::Arc;

use crate::tensor::{Backend, TensorError};

/// Which device to run on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceOptions {
    /// Worker threads of the CPU backend; all cores if not given.
    pub threads: Option<usize>,
    /// Compute in bf16 (AMX tiles where the CPU has them) instead of f32.
    pub cpu_bf16: bool,
    /// Most bytes of activations; the machine's memory if not given.
    pub memory_limit: Option<usize>,
}

/// The backend for these options: the CPU, until a GPU backend is built in.
pub fn open(options: DeviceOptions) -> Result<Arc<dyn Backend>, TensorError> {
    Ok(Arc::new(cpu::CpuBackend::new(cpu::CpuOptions {
        threads: options.threads,
        bf16: options.cpu_bf16,
        memory_limit: options.memory_limit,
    })?))
}
