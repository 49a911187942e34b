//! Planes blurred where a map says so (`kernels/sampling/blur.cu`).

use bytemuck::{Pod, Zeroable, bytes_of};

use super::super::{CudaError, Geometry, Gpu, Kernel};
use crate::driver::DevicePtr;

const OP: &str = "blur_where";
const THREADS: u32 = 256;
/// Most taps along a side.
const TAPS: usize = 9;
/// Samples of a launch.
const SAMPLES: usize = 64;

/// `x` filtered where the map is above the threshold.
#[derive(Clone, Copy, Debug)]
pub struct BlurWhere<'a> {
    /// f32 `[samples, channels, height, width]`.
    pub x: DevicePtr,
    /// Result; not x.
    pub out: DevicePtr,
    /// Channels.
    pub channels: usize,
    /// Height and width, both longer than the taps on a side.
    pub size: [usize; 2],
    /// f32 `[any, rows, columns]`.
    pub map: DevicePtr,
    /// Rows and columns of the map.
    pub map_size: [usize; 2],
    /// For every sample the map's.
    pub map_of: &'a [usize],
    /// Blurred above.
    pub threshold: f32,
    /// Weights along a side: an odd number, at most nine.
    pub taps: &'a [f32],
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct BlurArgs {
    x: DevicePtr,
    map: DevicePtr,
    out: DevicePtr,
    count: i64,
    channels: i32,
    h: i32,
    w: i32,
    rows: i32,
    columns: i32,
    half: i32,
    threshold: f32,
    tap: [f32; TAPS],
    map_of: [i32; SAMPLES],
}

/// Queues a filter.
pub fn blur_where(gpu: &Gpu, op: &BlurWhere<'_>) -> Result<(), CudaError> {
    let ([h, w], [rows, columns]) = (op.size, op.map_size);
    gpu.label(|| format!("{OP} {}x{}x{h}x{w}", op.map_of.len(), op.channels));
    let (half, each) = (op.taps.len() / 2, op.channels * h * w);
    if op.map_of.is_empty() || each == 0 {
        return Ok(());
    }
    let is_long = [h, w, rows, columns, op.channels].iter().any(|n| *n > i32::MAX as usize);
    if op.taps.len() > TAPS
        || op.taps.len().is_multiple_of(2)
        || h.min(w) <= half
        || rows * columns == 0
        || is_long
    {
        let reason = format!("{} taps on {w}x{h} by a map of {columns}x{rows}", op.taps.len());
        return Err(CudaError::Unsupported { op: OP, reason });
    }
    for (i, map_of) in op.map_of.chunks(SAMPLES).enumerate() {
        let (skipped, count) = (4 * i * SAMPLES * each, map_of.len() * each);
        let mut args = BlurArgs {
            x: op.x.offset(skipped),
            map: op.map,
            out: op.out.offset(skipped),
            count: count as i64,
            channels: op.channels as i32,
            h: h as i32,
            w: w as i32,
            rows: rows as i32,
            columns: columns as i32,
            half: half as i32,
            threshold: op.threshold,
            tap: [0.0; TAPS],
            map_of: [0; SAMPLES],
        };
        args.tap[..op.taps.len()].copy_from_slice(op.taps);
        args.map_of.iter_mut().zip(map_of).for_each(|(to, sample)| *to = *sample as i32);
        let geometry = Geometry::strided(gpu, count, THREADS);
        gpu.launch(&Kernel { module: "blur", name: OP }, &geometry, &[bytes_of(&args)])?;
    }
    Ok(())
}
