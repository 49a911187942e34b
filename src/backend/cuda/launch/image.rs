//! Pictures: resizing (`kernels/image/resize.cu`) and 8 bits (`rgb8.cu`).

use bytemuck::{Pod, Zeroable, bytes_of};

use super::super::{CudaError, Element, Geometry, Gpu, Kernel};
use crate::driver::DevicePtr;

const THREADS: u32 = 256;
const VECTOR: usize = 8;
/// Bytes, or pixels of a preview, that a thread makes.
const BYTES: usize = 4;
/// Most channels of a latent that has a preview.
pub const MAX_PREVIEW_CHANNELS: usize = 16;

/// Interpolation, numbered as in `kernels/image/resize.cu`.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Filter {
    /// Source index ⌊dst·scale⌋.
    Nearest = 0,
    /// Source index ⌊(dst + ½)·scale⌋.
    NearestExact = 1,
    /// Two taps an axis.
    Bilinear = 2,
    /// Four taps an axis.
    Bicubic = 3,
    /// Mean of all pixels that an output pixel touches.
    Area = 4,
}

/// Resizes `[samples, height, width, channels]`; planes of NCHW are samples of one channel.
#[derive(Clone, Copy, Debug)]
pub struct Resize {
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
    /// Interpolation.
    pub filter: Filter,
    /// Type of both.
    pub element: Element,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct ResizeArgs {
    x: DevicePtr,
    out: DevicePtr,
    count: u64,
    in_h: i32,
    in_w: i32,
    out_h: i32,
    out_w: i32,
    channels: i32,
    filter: i32,
    scale_y: f32,
    scale_x: f32,
}

/// Queues a resize.
pub fn resize(gpu: &Gpu, op: &Resize) -> Result<(), CudaError> {
    gpu.label(|| {
        let ([fh, fw], [th, tw]) = (op.from, op.to);
        format!("resize {:?} {}x{fh}x{fw}x{} -> {th}x{tw}", op.filter, op.samples, op.channels)
    });
    let count = op.samples * op.to[0] * op.to[1] * op.channels;
    if count == 0 {
        return Ok(());
    }
    let ([in_h, in_w], [out_h, out_w]) = (op.from, op.to);
    let extents = [in_h, in_w, out_h, out_w, op.channels];
    if in_h == 0 || in_w == 0 || extents.iter().any(|n| *n > i32::MAX as usize) {
        let reason = format!("{in_h}x{in_w} to {out_h}x{out_w} of {} channels", op.channels);
        return Err(CudaError::Unsupported { op: "resize", reason });
    }
    let is_vector = op.channels.is_multiple_of(VECTOR) && (op.x.0 | op.out.0).is_multiple_of(16);
    let vectors = count / if is_vector { VECTOR } else { 1 };
    let args = ResizeArgs {
        x: op.x,
        out: op.out,
        count: vectors as u64,
        in_h: in_h as i32,
        in_w: in_w as i32,
        out_h: out_h as i32,
        out_w: out_w as i32,
        channels: op.channels as i32,
        filter: op.filter as i32,
        scale_y: in_h as f32 / out_h as f32,
        scale_x: in_w as f32 / out_w as f32,
    };
    let name = format!("resize{}_{}", if is_vector { "" } else { "_scalar" }, op.element.suffix());
    let geometry = Geometry::strided(gpu, vectors, THREADS);
    gpu.launch(&Kernel { module: "resize", name: &name }, &geometry, &[bytes_of(&args)])
}

/// Pixels of −1..1 to bytes: `trunc(255·clamp((x + 1)/2, 0, 1))`, as ComfyUI saves pictures.
#[derive(Clone, Copy, Debug)]
pub struct ToRgb8 {
    /// Source `[pixels, pitch]`.
    pub x: DevicePtr,
    /// u8 `[pixels, channels]`, at a multiple of 4 bytes.
    pub out: DevicePtr,
    /// Pixels of all samples.
    pub pixels: usize,
    /// Channels.
    pub channels: usize,
    /// Elements from one pixel of `x` to the next.
    pub pitch: usize,
    /// Type of `x`.
    pub element: Element,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct ToRgb8Args {
    x: DevicePtr,
    out: DevicePtr,
    count: u64,
    channels: i32,
    pitch: i32,
}

/// Queues a conversion to bytes.
pub fn to_rgb8(gpu: &Gpu, op: &ToRgb8) -> Result<(), CudaError> {
    gpu.label(|| format!("to_rgb8 {}x{}", op.pixels, op.channels));
    const OP: &str = "to_rgb8";
    let count = op.pixels * op.channels;
    if count == 0 {
        return Ok(());
    }
    rows(OP, op.channels, op.pitch)?;
    aligned(OP, op.out)?;
    let args = ToRgb8Args {
        x: op.x,
        out: op.out,
        count: count as u64,
        channels: op.channels as i32,
        pitch: op.pitch as i32,
    };
    let name = format!("to_rgb8_{}", op.element.suffix());
    let geometry = Geometry::strided(gpu, count.div_ceil(BYTES), THREADS);
    gpu.launch(&Kernel { module: "rgb8", name: &name }, &geometry, &[bytes_of(&args)])
}

/// Bytes to pixels of −1..1: `2·(v/255) − 1`.
#[derive(Clone, Copy, Debug)]
pub struct FromRgb8 {
    /// u8 `[pixels, channels]`.
    pub x: DevicePtr,
    /// Result `[pixels, pitch]`.
    pub out: DevicePtr,
    /// Pixels of all samples.
    pub pixels: usize,
    /// Channels.
    pub channels: usize,
    /// Columns written; those from `channels` on are zero.
    pub width: usize,
    /// Elements from one pixel of `out` to the next.
    pub pitch: usize,
    /// Type of `out`.
    pub element: Element,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct FromRgb8Args {
    x: DevicePtr,
    out: DevicePtr,
    count: u64,
    channels: i32,
    pitch: i32,
    width: i32,
    unused: i32,
}

/// Queues a conversion from bytes.
pub fn from_rgb8(gpu: &Gpu, op: &FromRgb8) -> Result<(), CudaError> {
    gpu.label(|| format!("from_rgb8 {}x{}", op.pixels, op.channels));
    const OP: &str = "from_rgb8";
    if op.pixels == 0 || op.width == 0 {
        return Ok(());
    }
    rows(OP, op.channels, op.width)?;
    rows(OP, op.width, op.pitch)?;
    let is_vector = (op.width | op.pitch).is_multiple_of(VECTOR) && op.out.0.is_multiple_of(16);
    let vectors = op.pixels * op.width / if is_vector { VECTOR } else { 1 };
    let args = FromRgb8Args {
        x: op.x,
        out: op.out,
        count: vectors as u64,
        channels: op.channels as i32,
        pitch: op.pitch as i32,
        width: op.width as i32,
        unused: 0,
    };
    let name = format!("from_rgb8{}_{}", if is_vector { "" } else { "_scalar" }, op.element.suffix());
    let geometry = Geometry::strided(gpu, vectors, THREADS);
    gpu.launch(&Kernel { module: "rgb8", name: &name }, &geometry, &[bytes_of(&args)])
}

/// A quick picture of a latent: `rgb = Σ channel·factor + bias`, then bytes as in [`ToRgb8`].
#[derive(Clone, Copy, Debug)]
pub struct Preview<'a> {
    /// f32 `[samples, channels, pixels]`.
    pub latent: DevicePtr,
    /// u8 `[samples, pixels, 3]`, at a multiple of 4 bytes.
    pub out: DevicePtr,
    /// Samples.
    pub samples: usize,
    /// Pixels of a sample.
    pub pixels: usize,
    /// Red, green and blue of every channel; at most [`MAX_PREVIEW_CHANNELS`].
    pub factors: &'a [[f32; 3]],
    /// Added to every pixel.
    pub bias: [f32; 3],
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct PreviewArgs {
    latent: DevicePtr,
    out: DevicePtr,
    count: u64,
    pixels: u32,
    channels: i32,
    factor: [[f32; 3]; MAX_PREVIEW_CHANNELS],
    bias: [f32; 3],
    unused: i32,
}

/// Queues a preview.
pub fn preview(gpu: &Gpu, op: &Preview<'_>) -> Result<(), CudaError> {
    gpu.label(|| format!("preview {}x{}x{}", op.samples, op.factors.len(), op.pixels));
    const OP: &str = "preview";
    let count = op.samples * op.pixels;
    if count == 0 {
        return Ok(());
    }
    if op.factors.len() > MAX_PREVIEW_CHANNELS || op.pixels > i32::MAX as usize {
        let reason =
            format!("{} pixels of {} channels; at most {MAX_PREVIEW_CHANNELS}", op.pixels, op.factors.len());
        return Err(CudaError::Unsupported { op: OP, reason });
    }
    aligned(OP, op.out)?;
    let mut args = PreviewArgs {
        latent: op.latent,
        out: op.out,
        count: count as u64,
        pixels: op.pixels as u32,
        channels: op.factors.len() as i32,
        factor: [[0.0; 3]; MAX_PREVIEW_CHANNELS],
        bias: op.bias,
        unused: 0,
    };
    args.factor[..op.factors.len()].copy_from_slice(op.factors);
    let geometry = Geometry::strided(gpu, count.div_ceil(BYTES), THREADS);
    gpu.launch(&Kernel { module: "rgb8", name: "preview" }, &geometry, &[bytes_of(&args)])
}

fn rows(op: &'static str, width: usize, pitch: usize) -> Result<(), CudaError> {
    if width <= pitch && pitch <= i32::MAX as usize {
        return Ok(());
    }
    Err(CudaError::Unsupported { op, reason: format!("{width} columns in rows of {pitch}") })
}

fn aligned(op: &'static str, ptr: DevicePtr) -> Result<(), CudaError> {
    if ptr.0.is_multiple_of(BYTES as u64) {
        return Ok(());
    }
    let reason = format!("bytes at {:#x}, no multiple of {BYTES}", ptr.0);
    Err(CudaError::Unsupported { op, reason })
}
