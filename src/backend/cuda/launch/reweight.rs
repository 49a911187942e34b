//! Feature maps reweighted by channel, place and frequency (`kernels/image/reweight.cu`).

use bytemuck::{Pod, Zeroable, bytes_of};

use super::super::{CudaError, Element, Geometry, Gpu, Kernel};
use crate::driver::DevicePtr;

const MODULE: &str = "reweight";
const THREADS: u32 = 256;
const WARPS: usize = THREADS as usize / 32;
/// Channels of a block of `low_band`.
const CHANNELS: usize = 32;
/// Longest side of a map.
const MAX_SIDE: usize = 1024;
/// Most samples: blocks along y.
const MAX_SAMPLES: usize = 65_535;
/// Extremes of every warp.
const HALF_SMEM: u32 = 8 * WARPS as u32;
/// Waves of both sides and seven sums of every thread.
const BAND_SMEM: u32 = 8 * 2 * MAX_SIDE as u32 + 4 * 7 * THREADS;

/// Scales the first half of the channels of `[samples, places, channels]`.
#[derive(Clone, Copy, Debug)]
pub struct ScaleHalf {
    /// Source.
    pub x: DevicePtr,
    /// Result.
    pub out: DevicePtr,
    /// Room for an f32 a place, if the factor goes by place: from 1 at the smallest mean over channels to `factor`
    /// at the largest.
    pub means: Option<DevicePtr>,
    /// Samples.
    pub samples: usize,
    /// Places of a sample.
    pub places: usize,
    /// Channels.
    pub channels: usize,
    /// The factor.
    pub factor: f32,
    /// Type of both.
    pub element: Element,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct ScaleHalfArgs {
    x: DevicePtr,
    out: DevicePtr,
    means: DevicePtr,
    places: i64,
    channels: i32,
    factor: f32,
}

/// Queues a scaling.
pub fn scale_half(gpu: &Gpu, op: &ScaleHalf) -> Result<(), CudaError> {
    gpu.label(|| format!("scale_half {}x{}x{}", op.samples, op.places, op.channels));
    let each = op.places * op.channels;
    if op.samples * each == 0 {
        return Ok(());
    }
    if op.samples > MAX_SAMPLES || op.channels > i32::MAX as usize {
        let reason = format!("{} samples of {} channels", op.samples, op.channels);
        return Err(CudaError::Unsupported { op: "scale_half", reason });
    }
    let args = ScaleHalfArgs {
        x: op.x,
        out: op.out,
        means: op.means.unwrap_or(DevicePtr::NULL),
        places: op.places as i64,
        channels: op.channels as i32,
        factor: op.factor,
    };
    let run = |kernel: &str, blocks: usize| {
        let most = 16 * gpu.multiprocessors().max(1);
        let grid = [blocks.clamp(1, most) as u32, op.samples as u32, 1];
        let geometry = Geometry { grid, threads: THREADS, shared: HALF_SMEM, cluster: 1 };
        let name = format!("{kernel}_{}", op.element.suffix());
        gpu.launch(&Kernel { module: MODULE, name: &name }, &geometry, &[bytes_of(&args)])
    };
    if op.means.is_some() {
        run("place_means", op.places.div_ceil(WARPS))?;
    }
    run("scale_half", each.div_ceil(8 * THREADS as usize))
}

/// Scales the spatial frequencies −1 and 0 of every channel of `[samples, h, w, channels]`.
#[derive(Clone, Copy, Debug)]
pub struct ScaleLowBand {
    /// Source.
    pub x: DevicePtr,
    /// Result.
    pub out: DevicePtr,
    /// Samples.
    pub samples: usize,
    /// Height and width, at most 1024 each.
    pub size: [usize; 2],
    /// Channels.
    pub channels: usize,
    /// The factor.
    pub factor: f32,
    /// Type of both.
    pub element: Element,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct LowBandArgs {
    x: DevicePtr,
    out: DevicePtr,
    h: i32,
    w: i32,
    channels: i32,
    scale: f32,
}

/// Queues a scaling.
pub fn scale_low_band(gpu: &Gpu, op: &ScaleLowBand) -> Result<(), CudaError> {
    gpu.label(|| format!("scale_low_band {}x{}x{}x{}", op.samples, op.size[0], op.size[1], op.channels));
    let [h, w] = op.size;
    if op.samples * h * w * op.channels == 0 {
        return Ok(());
    }
    if op.samples > MAX_SAMPLES || h.max(w) > MAX_SIDE || op.channels > i32::MAX as usize {
        let reason = format!("{} samples of {w}x{h}; at most {MAX_SAMPLES} of {MAX_SIDE} a side", op.samples);
        return Err(CudaError::Unsupported { op: "scale_low_band", reason });
    }
    let args = LowBandArgs {
        x: op.x,
        out: op.out,
        h: h as i32,
        w: w as i32,
        channels: op.channels as i32,
        scale: ((f64::from(op.factor) - 1.0) / (h * w) as f64) as f32,
    };
    let grid = [op.channels.div_ceil(CHANNELS) as u32, op.samples as u32, 1];
    let geometry = Geometry { grid, threads: THREADS, shared: BAND_SMEM, cluster: 1 };
    let name = format!("low_band_{}", op.element.suffix());
    gpu.launch(&Kernel { module: MODULE, name: &name }, &geometry, &[bytes_of(&args)])
}
