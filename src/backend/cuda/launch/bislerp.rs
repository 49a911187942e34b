//! Resizing by directions (`kernels/image/bislerp.cu`).

use bytemuck::{Pod, Zeroable, bytes_of};

use super::super::{CudaError, Element, Geometry, Gpu, Kernel};
use crate::driver::DevicePtr;

const THREADS: u32 = 256;
/// Threads that make a pixel.
const WARP: usize = 32;

/// Resizes `[samples, height, width, channels]` by spherical interpolation of the channel vectors.
#[derive(Clone, Copy, Debug)]
pub struct Bislerp {
    /// Source.
    pub x: DevicePtr,
    /// Result.
    pub out: DevicePtr,
    /// Samples.
    pub samples: usize,
    /// Height and width of the source.
    pub from: [usize; 2],
    /// Height and width of the result.
    pub to: [usize; 2],
    /// Channels.
    pub channels: usize,
    /// Type of both.
    pub element: Element,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct BislerpArgs {
    x: DevicePtr,
    out: DevicePtr,
    count: u64,
    in_h: i32,
    in_w: i32,
    out_h: i32,
    out_w: i32,
    channels: i32,
    scale_y: f32,
    scale_x: f32,
    unused: i32,
}

/// Queues a resize.
pub fn bislerp(gpu: &Gpu, op: &Bislerp) -> Result<(), CudaError> {
    gpu.label(|| {
        let ([fh, fw], [th, tw]) = (op.from, op.to);
        format!("bislerp {}x{fh}x{fw}x{} -> {th}x{tw}", op.samples, op.channels)
    });
    let count = op.samples * op.to[0] * op.to[1];
    if count * op.channels == 0 {
        return Ok(());
    }
    let ([in_h, in_w], [out_h, out_w]) = (op.from, op.to);
    let extents = [in_h, in_w, out_h, out_w, op.channels];
    if in_h == 0 || in_w == 0 || extents.iter().any(|n| *n > i32::MAX as usize) {
        let reason = format!("{in_h}x{in_w} to {out_h}x{out_w} of {} channels", op.channels);
        return Err(CudaError::Unsupported { op: "bislerp", reason });
    }
    let args = BislerpArgs {
        x: op.x,
        out: op.out,
        count: count as u64,
        in_h: in_h as i32,
        in_w: in_w as i32,
        out_h: out_h as i32,
        out_w: out_w as i32,
        channels: op.channels as i32,
        scale_y: in_h as f32 / out_h as f32,
        scale_x: in_w as f32 / out_w as f32,
        unused: 0,
    };
    let name = format!("bislerp_{}", op.element.suffix());
    let geometry = Geometry::strided(gpu, count * WARP, THREADS);
    gpu.launch(&Kernel { module: "bislerp", name: &name }, &geometry, &[bytes_of(&args)])
}
