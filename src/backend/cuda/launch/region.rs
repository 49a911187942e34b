//! Predictions of parts of the picture averaged by place (`kernels/sampling/region.cu`).

use bytemuck::{Pod, Zeroable, bytes_of};

use super::super::{CudaError, Geometry, Gpu, Kernel};
use crate::driver::DevicePtr;

const MODULE: &str = "region";
const THREADS: u32 = 256;
/// Parts of a launch.
pub const MAX_PARTS: usize = 6;

/// A part of the picture.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// f32 `[samples, channels, height, width]`.
    pub x: DevicePtr,
    /// f32 `[weight_samples, height, width]`, whose samples repeat; null: `strength` everywhere.
    pub weights: DevicePtr,
    /// Samples of the weights.
    pub weight_samples: usize,
    /// Weight of every place.
    pub strength: f32,
    /// Row and column of the picture where it begins.
    pub at: [usize; 2],
    /// Height and width.
    pub size: [usize; 2],
}

/// `Σ weight·part / (least + Σ weight)` at every place.
#[derive(Clone, Copy, Debug)]
pub struct MeanByPlace<'a> {
    /// The parts, all inside the picture; any number.
    pub parts: &'a [Part],
    /// f32 `[samples, channels, height, width]`; none of the parts.
    pub out: DevicePtr,
    /// Samples.
    pub samples: usize,
    /// Channels.
    pub channels: usize,
    /// Height and width.
    pub size: [usize; 2],
    /// Weight of every place before anything covers it.
    pub least: f32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct PartArgs {
    x: DevicePtr,
    weights: DevicePtr,
    top: i32,
    left: i32,
    h: i32,
    w: i32,
    weight_samples: i32,
    strength: f32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct MeanByPlaceArgs {
    part: [PartArgs; MAX_PARTS],
    out: DevicePtr,
    weight: DevicePtr,
    places: i64,
    h: i32,
    w: i32,
    channels: i32,
    parts: i32,
    is_first: i32,
    is_last: i32,
    least: f32,
    unused: i32,
}

/// Queues a mean.
pub fn mean_by_place(gpu: &Gpu, op: &MeanByPlace<'_>) -> Result<(), CudaError> {
    const OP: &str = "mean_by_place";
    let ([h, w], places) = (op.size, op.samples * op.size[0] * op.size[1]);
    gpu.label(|| format!("{OP} {} parts of {}x{}x{h}x{w}", op.parts.len(), op.samples, op.channels));
    if places * op.channels == 0 {
        return Ok(());
    }
    let is_inside = |part: &Part| (0..2).all(|i| part.at[i] + part.size[i] <= op.size[i]);
    let has_samples = |part: &Part| part.weights.is_null() || part.weight_samples > 0;
    let is_long = [h, w, op.channels].iter().any(|n| *n > i32::MAX as usize);
    if is_long || op.parts.is_empty() || !op.parts.iter().all(|part| is_inside(part) && has_samples(part)) {
        let reason = format!("{:?} of a picture of {w}x{h}", op.parts);
        return Err(CudaError::Unsupported { op: OP, reason });
    }
    let weight = if op.parts.len() > MAX_PARTS { gpu.workspace(4 * places)? } else { DevicePtr::NULL };
    let launches = op.parts.len().div_ceil(MAX_PARTS);
    for (i, parts) in op.parts.chunks(MAX_PARTS).enumerate() {
        let mut args = MeanByPlaceArgs {
            part: [PartArgs::zeroed(); MAX_PARTS],
            out: op.out,
            weight,
            places: places as i64,
            h: h as i32,
            w: w as i32,
            channels: op.channels as i32,
            parts: parts.len() as i32,
            is_first: i32::from(i == 0),
            is_last: i32::from(i + 1 == launches),
            least: op.least,
            unused: 0,
        };
        for (args, part) in args.part.iter_mut().zip(parts) {
            *args = PartArgs {
                x: part.x,
                weights: part.weights,
                top: part.at[0] as i32,
                left: part.at[1] as i32,
                h: part.size[0] as i32,
                w: part.size[1] as i32,
                // More than there are of the picture's are never reached.
                weight_samples: part.weight_samples.min(op.samples) as i32,
                strength: part.strength,
            };
        }
        let geometry = Geometry::strided(gpu, places, THREADS);
        gpu.launch(&Kernel { module: MODULE, name: OP }, &geometry, &[bytes_of(&args)])?;
    }
    Ok(())
}
