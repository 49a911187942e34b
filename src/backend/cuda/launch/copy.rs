//! Elements moved and not changed (`kernels/image/copy.cu`): concatenation and
//! slices of columns, padding and cropping, doubling of maps, tokens in another order.

use bytemuck::{Pod, Zeroable, bytes_of};

use super::super::{CudaError, Element, Geometry, Gpu, Kernel};
use crate::driver::DevicePtr;

const MODULE: &str = "copy";
const THREADS: u32 = 256;

/// Bytes that kernels move at once, the most first.
const UNITS: [usize; 3] = [16, 4, 2];

/// The largest unit that divides everything in `bytes`; 2 divides every element.
pub(super) fn unit(bytes: impl IntoIterator<Item = usize>) -> usize {
    let all = bytes.into_iter().fold(0, |all, b| all | b);
    UNITS.into_iter().find(|u| all.is_multiple_of(*u)).unwrap_or(2)
}

/// Columns of rows.
#[derive(Clone, Copy, Debug)]
pub struct Columns {
    /// First column of the first row.
    pub ptr: DevicePtr,
    /// Columns.
    pub width: usize,
    /// Elements from one row to the next.
    pub pitch: usize,
}

impl Columns {
    fn bytes(&self, size: usize) -> [usize; 3] {
        [self.ptr.0 as usize, self.width * size, self.pitch * size]
    }
}

/// `out = a ‖ b` row by row; without `b` a copy of columns.
#[derive(Clone, Copy, Debug)]
pub struct Concat {
    /// First columns.
    pub a: Columns,
    /// Columns behind them.
    pub b: Option<Columns>,
    /// First column of the first row of the result.
    pub out: DevicePtr,
    /// Elements from one row of `out` to the next.
    pub out_pitch: usize,
    /// Rows.
    pub rows: usize,
    /// Type of all.
    pub element: Element,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct ConcatArgs {
    a: DevicePtr,
    b: DevicePtr,
    out: DevicePtr,
    rows: u64,
    pitch_a: u64,
    pitch_b: u64,
    pitch_out: u64,
    width_a: u32,
    width_b: u32,
}

/// Queues a concatenation.
pub fn concat(gpu: &Gpu, op: &Concat) -> Result<(), CudaError> {
    gpu.label(|| format!("concat {}x{}+{}", op.rows, op.a.width, op.b.map_or(0, |b| b.width)));
    let b = op.b.unwrap_or(Columns { ptr: DevicePtr::NULL, width: 0, pitch: 0 });
    let width = op.a.width + b.width;
    if op.rows == 0 || width == 0 {
        return Ok(());
    }
    if width > op.out_pitch || width > i32::MAX as usize {
        let reason = format!("{width} columns in rows of {}", op.out_pitch);
        return Err(CudaError::Unsupported { op: "concat", reason });
    }
    let size = op.element.size();
    let to = Columns { ptr: op.out, width, pitch: op.out_pitch };
    let unit = unit([op.a.bytes(size), b.bytes(size), to.bytes(size)].into_iter().flatten());
    let units = |elements: usize| elements * size / unit;
    let args = ConcatArgs {
        a: op.a.ptr,
        b: b.ptr,
        out: op.out,
        rows: op.rows as u64,
        pitch_a: units(op.a.pitch) as u64,
        pitch_b: units(b.pitch) as u64,
        pitch_out: units(op.out_pitch) as u64,
        width_a: units(op.a.width) as u32,
        width_b: units(b.width) as u32,
    };
    let name = format!("concat_b{unit}");
    let geometry = Geometry::strided(gpu, op.rows * units(width), THREADS);
    gpu.launch(&Kernel { module: MODULE, name: &name }, &geometry, &[bytes_of(&args)])
}

/// A window onto `[samples, height, width, channels]`: pads with zeros, crops, or both.
#[derive(Clone, Copy, Debug)]
pub struct Window {
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
    /// Rows of zeros above and columns of zeros to the left of the source; negative: cut off.
    pub shift: [i32; 2],
    /// Channels.
    pub channels: usize,
    /// Type of both.
    pub element: Element,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct WindowArgs {
    x: DevicePtr,
    out: DevicePtr,
    count: u64,
    in_h: i32,
    in_w: i32,
    out_h: i32,
    out_w: i32,
    top: i32,
    left: i32,
    width: u32,
    unused: i32,
}

/// Queues a window.
pub fn window(gpu: &Gpu, op: &Window) -> Result<(), CudaError> {
    gpu.label(|| {
        let ([fh, fw], [th, tw]) = (op.from, op.to);
        format!("window {}x{fh}x{fw}x{} -> {th}x{tw}", op.samples, op.channels)
    });
    let count = op.samples * op.to[0] * op.to[1] * op.channels;
    if count == 0 {
        return Ok(());
    }
    let ([in_h, in_w], [out_h, out_w], [top, left]) = (op.from, op.to, op.shift);
    let half = (i32::MAX / 2) as usize;
    let far = top.unsigned_abs().max(left.unsigned_abs()) as usize;
    if [in_h, in_w, out_h, out_w, op.channels, far].iter().any(|n| *n > half) {
        let reason = format!("{in_h}x{in_w} to {out_h}x{out_w} at ({top}, {left}); at most 2^30");
        return Err(CudaError::Unsupported { op: "window", reason });
    }
    let size = op.element.size();
    let unit = unit([op.x.0 as usize, op.out.0 as usize, op.channels * size]);
    let args = WindowArgs {
        x: op.x,
        out: op.out,
        count: (count * size / unit) as u64,
        in_h: in_h as i32,
        in_w: in_w as i32,
        out_h: out_h as i32,
        out_w: out_w as i32,
        top,
        left,
        width: (op.channels * size / unit) as u32,
        unused: 0,
    };
    let name = format!("window_b{unit}");
    let geometry = Geometry::strided(gpu, count * size / unit, THREADS);
    gpu.launch(&Kernel { module: MODULE, name: &name }, &geometry, &[bytes_of(&args)])
}

/// `[samples, height, width, channels]` with every pixel four times.
#[derive(Clone, Copy, Debug)]
pub struct Upsample2x {
    /// Source.
    pub x: DevicePtr,
    /// Result, twice as high and wide.
    pub out: DevicePtr,
    /// Rows of all samples.
    pub rows: usize,
    /// Width.
    pub width: usize,
    /// Channels.
    pub channels: usize,
    /// Type of both.
    pub element: Element,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Upsample2xArgs {
    x: DevicePtr,
    out: DevicePtr,
    count: u64,
    w: u32,
    width: u32,
}

/// Queues a doubling.
pub fn upsample2x(gpu: &Gpu, op: &Upsample2x) -> Result<(), CudaError> {
    gpu.label(|| format!("upsample2x {}x{}x{}", op.rows, op.width, op.channels));
    let count = op.rows * op.width * op.channels;
    if count == 0 {
        return Ok(());
    }
    if op.width > i32::MAX as usize || op.channels > i32::MAX as usize {
        let reason = format!("{} columns of {} channels; at most 2^31", op.width, op.channels);
        return Err(CudaError::Unsupported { op: "upsample2x", reason });
    }
    let size = op.element.size();
    let unit = unit([op.x.0 as usize, op.out.0 as usize, op.channels * size]);
    let args = Upsample2xArgs {
        x: op.x,
        out: op.out,
        count: (count * size / unit) as u64,
        w: op.width as u32,
        width: (op.channels * size / unit) as u32,
    };
    let name = format!("upsample2x_b{unit}");
    let geometry = Geometry::strided(gpu, count * size / unit, THREADS);
    gpu.launch(&Kernel { module: MODULE, name: &name }, &geometry, &[bytes_of(&args)])
}

/// Tokens `[blocks, rows, columns, run]` in the order `[blocks, columns, rows, run]`.
#[derive(Clone, Copy, Debug)]
pub struct Swap {
    /// Source.
    pub x: Columns,
    /// Result, without gaps.
    pub out: DevicePtr,
    /// Tokens of all blocks.
    pub tokens: usize,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub columns: usize,
    /// Tokens that stay together.
    pub run: usize,
    /// Type of both.
    pub element: Element,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct SwapArgs {
    x: DevicePtr,
    out: DevicePtr,
    count: u64,
    pitch: u64,
    rows: u32,
    columns: u32,
    run: u32,
    width: u32,
}

/// Queues a change of order.
pub fn swap(gpu: &Gpu, op: &Swap) -> Result<(), CudaError> {
    gpu.label(|| format!("swap {}x{}", op.tokens, op.x.width));
    let count = op.tokens * op.x.width;
    if count == 0 {
        return Ok(());
    }
    let (extents, block) = ([op.rows, op.columns, op.run, op.x.width], op.rows * op.columns * op.run);
    let is_too_long = extents.iter().any(|n| *n > i32::MAX as usize);
    if is_too_long || block == 0 || !op.tokens.is_multiple_of(block) {
        let reason = format!("{} tokens in blocks of {}x{}x{}", op.tokens, op.rows, op.columns, op.run);
        return Err(CudaError::Unsupported { op: "swap", reason });
    }
    let size = op.element.size();
    let unit = unit(op.x.bytes(size).into_iter().chain([op.out.0 as usize]));
    let units = |elements: usize| elements * size / unit;
    let args = SwapArgs {
        x: op.x.ptr,
        out: op.out,
        count: units(count) as u64,
        pitch: units(op.x.pitch) as u64,
        rows: op.rows as u32,
        columns: op.columns as u32,
        run: op.run as u32,
        width: units(op.x.width) as u32,
    };
    let name = format!("swap_b{unit}");
    let geometry = Geometry::strided(gpu, units(count), THREADS);
    gpu.launch(&Kernel { module: MODULE, name: &name }, &geometry, &[bytes_of(&args)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_divide_everything() {
        assert_eq!(unit([0x1000, 640, 1280]), 16);
        assert_eq!(unit([0x1000, 640, 1284]), 4);
        assert_eq!(unit([0x1008, 640]), 4);
        assert_eq!(unit([0x1000, 6]), 2);
    }
}
