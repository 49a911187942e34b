//! Frequencies of planes scaled (`kernels/sampling/band.cu`).

use bytemuck::{Pod, Zeroable, bytes_of};

use super::super::{CudaError, Geometry, Gpu, Kernel};
use crate::driver::DevicePtr;

const MODULE: &str = "band";
const THREADS: u32 = 256;
/// Columns of a block.
const TILE: usize = 32;
/// Longest side: a block has its table in shared memory.
const MAX_SIDE: usize = 4096;

/// Scales the frequencies in the square of half side `cutoff` around zero by `low`, all others by `high`.
#[derive(Clone, Copy, Debug)]
pub struct ScaleBands {
    /// f32 `[planes, height, width]`.
    pub x: DevicePtr,
    /// Result; not x.
    pub out: DevicePtr,
    /// Planes.
    pub planes: usize,
    /// Height and width, at most 4096 each.
    pub size: [usize; 2],
    /// Half side of the square; at most half a side counts.
    pub cutoff: usize,
    /// Factor inside.
    pub low: f32,
    /// Factor outside.
    pub high: f32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct BandArgs {
    x: DevicePtr,
    out: DevicePtr,
    rows: DevicePtr,
    h: i32,
    w: i32,
    cutoff_rows: i32,
    cutoff_columns: i32,
    high: f32,
    change: f32,
}

/// Queues a scaling.
pub fn scale_bands(gpu: &Gpu, op: &ScaleBands) -> Result<(), CudaError> {
    let [h, w] = op.size;
    gpu.label(|| format!("scale_bands {}x{h}x{w} at {}", op.planes, op.cutoff));
    if op.planes * h * w == 0 {
        return Ok(());
    }
    if h.max(w) > MAX_SIDE || op.planes > 65_535 {
        let reason = format!("{} planes of {w}x{h}; at most 65535 of {MAX_SIDE} a side", op.planes);
        return Err(CudaError::Unsupported { op: "scale_bands", reason });
    }
    let args = BandArgs {
        x: op.x,
        out: op.out,
        rows: gpu.workspace(8 * op.planes * h * w)?,
        h: h as i32,
        w: w as i32,
        cutoff_rows: op.cutoff.min(h / 2) as i32,
        cutoff_columns: op.cutoff.min(w / 2) as i32,
        high: op.high,
        change: op.low - op.high,
    };
    let launch = |name: &str, grid: [usize; 2], side: usize| {
        let grid = [grid[0] as u32, grid[1] as u32, 1];
        let geometry = Geometry { grid, threads: THREADS, shared: 8 * side as u32, cluster: 1 };
        gpu.launch(&Kernel { module: MODULE, name }, &geometry, &[bytes_of(&args)])
    };
    launch("band_rows", [op.planes * h, 1], w)?;
    launch("band_columns", [w.div_ceil(TILE), op.planes], h)
}
