//! What the device can do at most: the measure for every timed case.

use super::{Context, Options};
use crate::backend::cuda::launch::ceiling::{instruction, result_bytes, tensor_cores};
use crate::backend::cuda::{CudaError, Element, Gpu};

/// Bytes of the copy that measures memory; larger than any L2 cache.
const COPY_BYTES: usize = 1 << 30;

/// Ceilings of a device.
#[derive(Clone, Copy, Debug)]
pub struct Ceiling {
    /// Floating-point operations a second of the tensor cores (f16, f32 sums).
    pub flops: f64,
    /// Instruction that they were measured with.
    pub instruction: &'static str,
    /// Bytes a second of a copy, counting those read and those written.
    pub bytes: f64,
}

/// Measures the ceilings; `None` on the SIMT layer, whose times mean nothing.
pub fn measure_ceiling(gpu: &Gpu) -> Result<Option<Ceiling>, CudaError> {
    if gpu.driver().device().is_simulated {
        return Ok(None);
    }
    let mut cx = Context::new(gpu, "ceiling", Options { timing: true, ..Options::default() });
    let out = cx.output(result_bytes(gpu))?;
    let rounds = 4096;
    let operations = tensor_cores(gpu, out.ptr, rounds, Element::F16)?;
    let micros = cx.time(|| tensor_cores(gpu, out.ptr, rounds, Element::F16).map(|_| ()))?;
    let (from, to) = (cx.output(COPY_BYTES)?, cx.output(COPY_BYTES)?);
    let copy = cx.time(|| Ok(gpu.driver().copy(to.ptr, from.ptr, COPY_BYTES, gpu.stream())?))?;
    Ok(micros.zip(copy).map(|(micros, copy)| Ceiling {
        flops: operations / (micros * 1e-6),
        instruction: instruction(gpu),
        bytes: 2.0 * COPY_BYTES as f64 / (copy * 1e-6),
    }))
}

impl std::fmt::Display for Ceiling {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { flops, bytes, instruction } = self;
        write!(f, "{:.1} TFLOP/s ({instruction}), {:.0} GB/s (copy)", flops / 1e12, bytes / 1e9)
    }
}
