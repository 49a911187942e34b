//! Sums over samples (`kernels/sampling/reduce.cu`).

use bytemuck::{Pod, Zeroable, bytes_of};

use super::super::{CudaError, Geometry, Gpu, Kernel};
use crate::driver::DevicePtr;

const MODULE: &str = "reduce";
const THREADS: u32 = 256;
/// Least elements of a block.
const CHUNK: usize = 4096;
/// Most blocks of a sample.
const MAX_CHUNKS: usize = 512;
/// A partial result of a warp, in shared memory.
const SMEM: u32 = 12 * THREADS / 32;

/// What makes a value an error: `(x − low)/max(atol, rtol·max(|low|, |previous|))`.
#[derive(Clone, Copy, Debug)]
pub struct ScaledError {
    /// Solution of lower order.
    pub low: DevicePtr,
    /// Solution before the step.
    pub previous: DevicePtr,
    /// Absolute tolerance.
    pub atol: f32,
    /// Relative tolerance.
    pub rtol: f32,
}

/// Sum, sum of squares and largest magnitude of every sample.
#[derive(Clone, Copy, Debug)]
pub struct Reduce {
    /// f32 `[samples, count]`.
    pub x: DevicePtr,
    /// Reduces scaled errors instead of the values.
    pub error: Option<ScaledError>,
    /// f32 `[samples, 3]`.
    pub out: DevicePtr,
    /// Samples.
    pub samples: usize,
    /// Elements of a sample.
    pub count: usize,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct ReduceArgs {
    x: DevicePtr,
    low: DevicePtr,
    previous: DevicePtr,
    partial: DevicePtr,
    out: DevicePtr,
    count: i64,
    chunk: i64,
    chunks: i32,
    atol: f32,
    rtol: f32,
    unused: i32,
}

/// Queues a reduction.
pub fn reduce(gpu: &Gpu, op: &Reduce) -> Result<(), CudaError> {
    gpu.label(|| format!("reduce {}x{}", op.samples, op.count));
    if op.samples == 0 {
        return Ok(());
    }
    if op.samples > 65_535 {
        let reason = format!("{} samples; at most 65535", op.samples);
        return Err(CudaError::Unsupported { op: "reduce", reason });
    }
    let chunk = op.count.div_ceil(MAX_CHUNKS).max(CHUNK);
    let chunks = op.count.div_ceil(chunk).max(1);
    let mut args = ReduceArgs {
        x: op.x,
        low: op.error.map_or(DevicePtr::NULL, |e| e.low),
        previous: op.error.map_or(DevicePtr::NULL, |e| e.previous),
        partial: DevicePtr::NULL,
        out: op.out,
        count: op.count as i64,
        chunk: chunk as i64,
        chunks: chunks as i32,
        atol: op.error.map_or(0.0, |e| e.atol),
        rtol: op.error.map_or(0.0, |e| e.rtol),
        unused: 0,
    };
    if chunks > 1 {
        args.partial = gpu.workspace(12 * chunks * op.samples)?;
    }
    let grid = [chunks as u32, op.samples as u32, 1];
    let geometry = Geometry { grid, threads: THREADS, shared: SMEM, cluster: 1 };
    gpu.launch(&Kernel { module: MODULE, name: "reduce_chunks" }, &geometry, &[bytes_of(&args)])?;
    if chunks == 1 {
        return Ok(());
    }
    let geometry = Geometry { shared: SMEM, ..Geometry::line(op.samples, THREADS) };
    gpu.launch(&Kernel { module: MODULE, name: "reduce_merge" }, &geometry, &[bytes_of(&args)])
}
