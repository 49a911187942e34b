//! Random numbers on the device (`kernels/sampling/philox.cu`).

use bytemuck::{Pod, Zeroable, bytes_of};

use super::super::{CudaError, Geometry, Gpu, Kernel};
use crate::driver::{Capability, DevicePtr};

const MODULE: &str = "philox";
const THREADS: u32 = 256;
/// Threads of a block of PyTorch's kernel.
const TORCH_BLOCK: usize = 256;
/// Numbers of one call of the generator.
const CALL: usize = 4;
/// PyTorch splits larger tensors (2 GiB of f32) into parts with offsets of their own.
const MAX_COUNT: usize = 1 << 29;

/// The generator of PyTorch's CUDA device: seed and how much of it is used up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PhiloxState {
    /// Seed.
    pub seed: u64,
    /// Offset into every thread's subsequence; a multiple of 4.
    pub offset: u64,
}

/// Threads that PyTorch's kernel has for `count` numbers on a device like this.
///
/// Whole blocks of 256 for all numbers, but at most as many as the device can
/// hold at once. The values of a tensor longer than that depend on the device.
pub fn torch_threads(count: usize, multiprocessors: usize, capability: Capability) -> usize {
    let blocks = resident_threads(capability) / TORCH_BLOCK * multiprocessors;
    TORCH_BLOCK * count.div_ceil(TORCH_BLOCK).min(blocks).max(1)
}

/// Most resident threads of a multiprocessor (CUDA programming guide, "Technical specifications per compute capability").
fn resident_threads(capability: Capability) -> usize {
    match (capability.major, capability.minor) {
        (7, 5) => 1024,
        (8, 6 | 7 | 9) | (11.., _) => 1536,
        _ => 2048,
    }
}

/// `count` standard normal numbers, as `torch.randn(…, device='cuda')` gives them.
#[derive(Clone, Copy, Debug)]
pub struct PhiloxNormal {
    /// f32 `[count]`.
    pub out: DevicePtr,
    /// Numbers.
    pub count: usize,
    /// The generator before the call.
    pub state: PhiloxState,
    /// Threads of PyTorch's kernel: [`torch_threads`], of the device whose noise is wanted.
    pub threads: usize,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct PhiloxNormalArgs {
    out: DevicePtr,
    seed: u64,
    offset: u64,
    count: u64,
    threads: u64,
}

/// Queues the numbers and returns the generator's state after them.
pub fn philox_normal(gpu: &Gpu, op: &PhiloxNormal) -> Result<PhiloxState, CudaError> {
    gpu.label(|| format!("philox_normal {}", op.count));
    if op.count == 0 {
        return Ok(op.state);
    }
    let fail = |reason: String| Err(CudaError::Unsupported { op: "philox_normal", reason });
    if !op.state.offset.is_multiple_of(CALL as u64) {
        return fail(format!("offset {} is no multiple of {CALL}", op.state.offset));
    }
    if op.threads == 0 || op.count >= MAX_COUNT {
        return fail(format!("{} numbers on {} threads; fewer than {MAX_COUNT}", op.count, op.threads));
    }
    let args = PhiloxNormalArgs {
        out: op.out,
        seed: op.state.seed,
        offset: op.state.offset,
        count: op.count as u64,
        threads: op.threads as u64,
    };
    let rounds = op.count.div_ceil(CALL * op.threads);
    let geometry = Geometry::strided(gpu, rounds * op.threads, THREADS);
    gpu.launch(&Kernel { module: MODULE, name: "philox_normal" }, &geometry, &[bytes_of(&args)])?;
    Ok(PhiloxState { offset: op.state.offset + (rounds * CALL) as u64, ..op.state })
}

/// Raw output: `out[i] = philox4x32_10(counter + i, key)`.
#[derive(Clone, Copy, Debug)]
pub struct PhiloxBits {
    /// u32 `[count, 4]`, at a multiple of 16 bytes.
    pub out: DevicePtr,
    /// Counters.
    pub count: usize,
    /// Key, the low word first.
    pub key: u64,
    /// First counter, low and high half; the low half counts and does not carry.
    pub counter: [u64; 2],
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct PhiloxBitsArgs {
    out: DevicePtr,
    key: u64,
    low: u64,
    high: u64,
    count: u64,
}

/// Queues raw random words.
pub fn philox_bits(gpu: &Gpu, op: &PhiloxBits) -> Result<(), CudaError> {
    gpu.label(|| format!("philox_bits {}", op.count));
    if op.count == 0 {
        return Ok(());
    }
    let [low, high] = op.counter;
    let args = PhiloxBitsArgs { out: op.out, key: op.key, low, high, count: op.count as u64 };
    let geometry = Geometry::strided(gpu, op.count, THREADS);
    gpu.launch(&Kernel { module: MODULE, name: "philox_bits" }, &geometry, &[bytes_of(&args)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_of_pytorch_by_device() {
        let at = |major, minor| Capability { major, minor };
        assert_eq!(torch_threads(4 * 64 * 64, 132, at(9, 0)), 16_384);
        assert_eq!(torch_threads(100, 132, at(9, 0)), 256);
        assert_eq!(torch_threads(1 << 24, 132, at(9, 0)), 132 * 2048);
        assert_eq!(torch_threads(1 << 24, 128, at(8, 9)), 128 * 1536);
        assert_eq!(torch_threads(1 << 24, 170, at(12, 0)), 170 * 1536);
    }
}
