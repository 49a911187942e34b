//! What the device can do at most: the measure for every timed case.

use super::{Context, Options};
use crate::backend::cuda::launch::ceiling::{instruction, result_bytes, tensor_cores};
use crate::backend::cuda::{CudaError, Element, Gpu};

/// Bytes of the copy that measures memory, if they are free; larger than any L2 cache.
const COPY_BYTES: u64 = 1 << 30;
/// A copy is a multiple of this.
const COPY_GRAIN: u64 = 1 << 20;

/// Ceilings of a device.
#[derive(Clone, Copy, Debug)]
pub struct Ceiling {
    /// Floating-point operations a second of the tensor cores (f16, f32 sums).
    pub flops: f64,
    /// Instruction that they were measured with.
    pub instruction: &'static str,
    /// Bytes a second of a copy, counting those read and those written.
    pub bytes: f64,
    /// Bytes that were copied to measure it: fewer where little memory is free.
    pub copied: usize,
}

/// Bytes to copy on a device with so many free: there and back takes half of them.
fn copy_bytes(free: u64) -> usize {
    let bytes = COPY_BYTES.min(free / 4) / COPY_GRAIN * COPY_GRAIN;
    bytes.max(COPY_GRAIN) as usize
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
    let copied = copy_bytes(gpu.driver().memory()?.free);
    let (from, to) = (cx.output(copied)?, cx.output(copied)?);
    let copy = cx.time(|| Ok(gpu.driver().copy(to.ptr, from.ptr, copied, gpu.stream())?))?;
    Ok(micros.zip(copy).map(|(micros, copy)| Ceiling {
        flops: operations / (micros * 1e-6),
        instruction: instruction(gpu),
        bytes: 2.0 * copied as f64 / (copy * 1e-6),
        copied,
    }))
}

impl std::fmt::Display for Ceiling {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { flops, bytes, instruction, copied } = self;
        let mib = copied >> 20;
        write!(f, "{:.1} TFLOP/s ({instruction}), {:.0} GB/s (copy of {mib} MiB)", flops / 1e12, bytes / 1e9)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_copy_fits_what_is_free() {
        assert_eq!(copy_bytes(80 << 30), 1 << 30);
        assert_eq!(copy_bytes(4 << 30), 1 << 30);
        assert_eq!(copy_bytes((1 << 30) + 12_345), 256 << 20);
        assert_eq!(copy_bytes(1000), 1 << 20);
    }
}
