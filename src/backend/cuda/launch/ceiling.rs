//! Ceilings of a device, measured in the same run as the kernels: what its tensor cores do with operands at hand.

use bytemuck::{Pod, Zeroable, bytes_of};

use super::super::{CudaError, Element, Geometry, Gpu, Kernel};
use crate::driver::DevicePtr;

/// Threads of a block.
const THREADS: u32 = 256;
/// Blocks of a multiprocessor of the kernel for mma.sync.
const BLOCKS: usize = 4;
/// Independent products of a warp in flight (`kChains` in that kernel).
const CHAINS: f64 = 8.0;
/// Floating-point operations of one m16n8k16.
const PRODUCT: f64 = 2.0 * 16.0 * 8.0 * 16.0;
/// Floating-point operations of one round of a warpgroup: 64 x 256 x 64.
const WARPGROUP_ROUND: f64 = 2.0 * 64.0 * 256.0 * 64.0;
/// `CeilingSmem`: two tiles of 64 rows and one of 256, 64 elements deep.
const WARPGROUP_SHARED: u32 = (2 * 64 + 256) * 64 * 2;

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct CeilingArgs {
    out: DevicePtr,
    rounds: i32,
    unused: i32,
}

/// The instruction that reaches a device's peak.
pub fn instruction(gpu: &Gpu) -> &'static str {
    if gpu.is_hopper() { "wgmma" } else { "mma.sync" }
}

/// Bytes of [`tensor_cores`]' result.
pub fn result_bytes(gpu: &Gpu) -> usize {
    gpu.multiprocessors() * BLOCKS * THREADS as usize * 4
}

/// Queues `rounds` rounds of products without loads; returns the operations.
pub fn tensor_cores(gpu: &Gpu, out: DevicePtr, rounds: i32, element: Element) -> Result<f64, CudaError> {
    gpu.label(|| format!("ceiling {rounds} rounds {}", element.suffix()));
    let args = CeilingArgs { out, rounds, unused: 0 };
    let rounds = f64::from(rounds);
    if gpu.is_hopper() {
        let name = format!("ceiling_sm90_{}", element.suffix());
        let blocks = gpu.multiprocessors();
        let geometry = Geometry { shared: WARPGROUP_SHARED, ..Geometry::line(blocks, THREADS) };
        gpu.launch(&Kernel { module: "ceiling_sm90", name: &name }, &geometry, &[bytes_of(&args)])?;
        return Ok(blocks as f64 * f64::from(THREADS / 128) * rounds * WARPGROUP_ROUND);
    }
    let name = format!("ceiling_sm80_{}", element.suffix());
    let blocks = gpu.multiprocessors() * BLOCKS;
    let kernel = Kernel { module: "ceiling_sm80", name: &name };
    gpu.launch(&kernel, &Geometry::line(blocks, THREADS), &[bytes_of(&args)])?;
    Ok(blocks as f64 * f64::from(THREADS / 32) * rounds * CHAINS * PRODUCT)
}
