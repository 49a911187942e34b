//! Ceilings of a device, measured in the same run as the kernels: tensor cores and memory.

use bytemuck::{Pod, Zeroable, bytes_of};

use super::super::{CudaError, Element, Geometry, Gpu, Kernel};
use crate::driver::DevicePtr;

/// Threads of a block.
const THREADS: u32 = 256;
/// Blocks of a multiprocessor.
const BLOCKS: usize = 4;
/// Independent products of a warp in flight (`kChains` in the kernel).
const CHAINS: f64 = 8.0;
/// Floating-point operations of one m16n8k16.
const PRODUCT: f64 = 2.0 * 16.0 * 8.0 * 16.0;

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct CeilingArgs {
    out: DevicePtr,
    rounds: i32,
    unused: i32,
}

/// Bytes of [`tensor_cores`]' result.
pub fn result_bytes(gpu: &Gpu) -> usize {
    gpu.multiprocessors() * BLOCKS * THREADS as usize * 4
}

/// Queues `rounds` products of every warp with operands in registers; returns the operations.
pub fn tensor_cores(gpu: &Gpu, out: DevicePtr, rounds: i32, element: Element) -> Result<f64, CudaError> {
    let args = CeilingArgs { out, rounds, unused: 0 };
    let name = format!("ceiling_sm80_{}", element.suffix());
    let blocks = gpu.multiprocessors() * BLOCKS;
    let kernel = Kernel { module: "ceiling_sm80", name: &name };
    gpu.launch(&kernel, &Geometry::line(blocks, THREADS), &[bytes_of(&args)])?;
    Ok(blocks as f64 * f64::from(THREADS / 32) * f64::from(rounds) * CHAINS * PRODUCT)
}
