//! Element types and orders of elements (`kernels/layout/`): host order to the
//! device's and back, and weights from their stored form to the kernels' layouts.

use bytemuck::{Pod, Zeroable, bytes_of};

use super::super::{CudaError, Element, Geometry, Gpu, Kernel};
use crate::driver::DevicePtr;

const THREADS: u32 = 256;
/// Elements of one access, and the multiple that inner extents of weights are rounded up to.
const VECTOR: usize = 8;
/// Tile of the transposes.
const TILE_PIXELS: usize = 128;
const TILE_CHANNELS: usize = 32;
/// Bytes of that tile: one float more a row.
const TILE_BYTES: usize = 4 * TILE_CHANNELS * (TILE_PIXELS + 1);
/// Floats of a block that packs a convolution.
const CONV_FLOATS: usize = 12 * 1024;

/// Element type of a stored weight, numbered as in `kernels/include/raw.cuh`.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stored {
    /// IEEE single precision.
    F32 = 0,
    /// IEEE half precision.
    F16 = 1,
    /// bfloat16.
    BF16 = 2,
    /// 8-bit float, 4 exponent bits (OCP E4M3FN).
    F8E4M3 = 3,
    /// 8-bit float, 5 exponent bits (OCP E5M2).
    F8E5M2 = 4,
}

impl Stored {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::F8E4M3 | Self::F8E5M2 => 1,
        }
    }

    /// Whether eight elements at `address` can be read at once.
    fn is_vector(self, address: DevicePtr) -> bool {
        address.0.is_multiple_of(if self.size() == 1 { 8 } else { 16 })
    }
}

impl From<Element> for Stored {
    fn from(element: Element) -> Self {
        match element {
            Element::F16 => Self::F16,
            Element::BF16 => Self::BF16,
            Element::F32 => Self::F32,
        }
    }
}

/// An inner extent rounded up to whole vectors: Kp of a linear weight, Cp of a convolution's.
pub fn padded(extent: usize) -> usize {
    extent.next_multiple_of(VECTOR)
}

/// `dst = src` in another element type, rounded to nearest even.
#[derive(Clone, Copy, Debug)]
pub struct Convert {
    /// Source, aligned to its elements.
    pub src: DevicePtr,
    /// Type of `src`.
    pub from: Stored,
    /// Result.
    pub dst: DevicePtr,
    /// Type of `dst`.
    pub to: Element,
    /// Elements.
    pub count: usize,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct ConvertArgs {
    src: DevicePtr,
    dst: DevicePtr,
    count: u64,
    kind: i32,
    is_vector: i32,
}

/// Queues a conversion.
pub fn convert(gpu: &Gpu, op: &Convert) -> Result<(), CudaError> {
    gpu.label(|| format!("convert {:?} -> {:?} {}", op.from, op.to, op.count));
    if op.count == 0 {
        return Ok(());
    }
    aligned("convert", op.src, op.from.size())?;
    let is_vector = op.from.is_vector(op.src) && op.dst.0.is_multiple_of(16);
    let args = ConvertArgs {
        src: op.src,
        dst: op.dst,
        count: op.count as u64,
        kind: op.from as i32,
        is_vector: i32::from(is_vector),
    };
    let name = format!("convert_{}", op.to.suffix());
    let geometry = Geometry::strided(gpu, op.count.div_ceil(VECTOR), THREADS);
    gpu.launch(&Kernel { module: "convert", name: &name }, &geometry, &[bytes_of(&args)])
}

/// f32 `[samples, channels, pixels]` to rows of channels: `dst = factor · src`, once for each copy.
///
/// Also makes a model's input from a latent: `factor` scales it, copies are the
/// conditioned and unconditioned halves of a batch, and `width` adds zero
/// channels up to what the first convolution reads.
#[derive(Clone, Copy, Debug)]
pub struct ToNhwc {
    /// Source.
    pub src: DevicePtr,
    /// Result `[copies, samples, pixels, pitch]`.
    pub dst: DevicePtr,
    /// Samples.
    pub samples: usize,
    /// Channels of `src`.
    pub channels: usize,
    /// Pixels of a sample.
    pub pixels: usize,
    /// Columns written; those from `channels` on are zero.
    pub width: usize,
    /// Elements from one row of `dst` to the next.
    pub pitch: usize,
    /// How often the samples are written.
    pub copies: usize,
    /// Factor.
    pub factor: f32,
    /// Type of `dst`.
    pub element: Element,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct ToNhwcArgs {
    src: DevicePtr,
    dst: DevicePtr,
    pixels: i64,
    channels: i32,
    width: i32,
    pitch: i32,
    copies: i32,
    factor: f32,
    unused: i32,
}

/// Queues a transpose to the device's order.
pub fn to_nhwc(gpu: &Gpu, op: &ToNhwc) -> Result<(), CudaError> {
    gpu.label(|| format!("to_nhwc {}x{}x{} to {} wide", op.samples, op.channels, op.pixels, op.width));
    const OP: &str = "to_nhwc";
    if op.samples == 0 || op.pixels == 0 || op.width == 0 || op.copies == 0 {
        return Ok(());
    }
    if op.width < op.channels || op.pitch < op.width {
        let reason = format!("{} channels, {} columns, pitch {}", op.channels, op.width, op.pitch);
        return Err(CudaError::Unsupported { op: OP, reason });
    }
    let args = ToNhwcArgs {
        src: op.src,
        dst: op.dst,
        pixels: op.pixels as i64,
        channels: op.channels as i32,
        width: op.width as i32,
        pitch: op.pitch as i32,
        copies: op.copies as i32,
        factor: op.factor,
        unused: 0,
    };
    let geometry = tiles(OP, [op.pixels, op.width.max(op.pitch), op.samples], op.width)?;
    let name = format!("to_nhwc_{}", op.element.suffix());
    gpu.launch(&Kernel { module: "transpose", name: &name }, &geometry, &[bytes_of(&args)])
}

/// Rows of channels to f32 `[samples, channels, pixels]`.
#[derive(Clone, Copy, Debug)]
pub struct ToNchw {
    /// Source `[samples, pixels, pitch]`.
    pub src: DevicePtr,
    /// Result.
    pub dst: DevicePtr,
    /// Samples.
    pub samples: usize,
    /// Channels.
    pub channels: usize,
    /// Pixels of a sample.
    pub pixels: usize,
    /// Elements from one row of `src` to the next.
    pub pitch: usize,
    /// Type of `src`.
    pub element: Element,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct ToNchwArgs {
    src: DevicePtr,
    dst: DevicePtr,
    pixels: i64,
    channels: i32,
    pitch: i32,
}

/// Queues a transpose to the host's order.
pub fn to_nchw(gpu: &Gpu, op: &ToNchw) -> Result<(), CudaError> {
    gpu.label(|| format!("to_nchw {}x{}x{}", op.samples, op.channels, op.pixels));
    const OP: &str = "to_nchw";
    if op.samples == 0 || op.pixels == 0 || op.channels == 0 {
        return Ok(());
    }
    if op.pitch < op.channels {
        let reason = format!("{} channels in rows of {}", op.channels, op.pitch);
        return Err(CudaError::Unsupported { op: OP, reason });
    }
    let args = ToNchwArgs {
        src: op.src,
        dst: op.dst,
        pixels: op.pixels as i64,
        channels: op.channels as i32,
        pitch: op.pitch as i32,
    };
    let geometry = tiles(OP, [op.pixels, op.pitch, op.samples], op.channels)?;
    let name = format!("to_nchw_{}", op.element.suffix());
    gpu.launch(&Kernel { module: "transpose", name: &name }, &geometry, &[bytes_of(&args)])
}

fn tiles(
    op: &'static str,
    [pixels, pitch, samples]: [usize; 3],
    columns: usize,
) -> Result<Geometry, CudaError> {
    let down = columns.div_ceil(TILE_CHANNELS);
    if pixels > i32::MAX as usize || pitch > i32::MAX as usize || down > 65_535 || samples > 65_535 {
        let reason = format!("{samples} samples of {pixels} pixels of {columns} channels, pitch {pitch}");
        return Err(CudaError::Unsupported { op, reason });
    }
    Ok(Geometry {
        grid: [pixels.div_ceil(TILE_PIXELS) as u32, down as u32, samples as u32],
        threads: THREADS,
        shared: TILE_BYTES as u32,
        cluster: 1,
    })
}

/// Rows `[n, k]` into a linear weight `[*, Kp]`.
#[derive(Clone, Copy, Debug)]
pub struct PackLinear {
    /// Stored matrix, aligned to its elements.
    pub src: DevicePtr,
    /// Type of `src`.
    pub from: Stored,
    /// The packed weight's first row, at a multiple of 16 bytes.
    pub dst: DevicePtr,
    /// Type of `dst`.
    pub to: Element,
    /// Rows.
    pub n: usize,
    /// Columns of `src`.
    pub k: usize,
    /// Row of `dst` that row 0 becomes: matrices stack.
    pub row_offset: usize,
    /// The rows are values, then gates: they are interleaved in blocks of 8.
    pub is_geglu: bool,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct PackLinearArgs {
    src: DevicePtr,
    dst: DevicePtr,
    n: i64,
    k: i64,
    kp: i64,
    half: i64,
    kind: i32,
    is_vector: i32,
}

/// Queues the packing of a matrix.
pub fn pack_linear(gpu: &Gpu, op: &PackLinear) -> Result<(), CudaError> {
    gpu.label(|| format!("pack_linear {:?} {}x{}", op.from, op.n, op.k));
    const OP: &str = "pack_linear";
    if op.n == 0 || op.k == 0 {
        return Ok(());
    }
    aligned(OP, op.src, op.from.size())?;
    aligned(OP, op.dst, 16)?;
    let kp = padded(op.k);
    let args = PackLinearArgs {
        src: op.src,
        dst: op.dst.offset(op.row_offset * kp * op.to.size()),
        n: op.n as i64,
        k: op.k as i64,
        kp: kp as i64,
        half: geglu_half(OP, op.n, op.is_geglu)?,
        kind: op.from as i32,
        is_vector: i32::from(kp == op.k && op.from.is_vector(op.src)),
    };
    let name = format!("pack_linear_{}", op.to.suffix());
    let geometry = Geometry::strided(gpu, op.n * kp / VECTOR, THREADS);
    gpu.launch(&Kernel { module: "pack", name: &name }, &geometry, &[bytes_of(&args)])
}

/// `[cout, cin, taps]` into a convolution's weight `[cout, taps, Cp]`; `taps` = kh·kw.
#[derive(Clone, Copy, Debug)]
pub struct PackConv {
    /// Stored weight, aligned to its elements.
    pub src: DevicePtr,
    /// Type of `src`.
    pub from: Stored,
    /// The packed weight, at a multiple of 16 bytes.
    pub dst: DevicePtr,
    /// Type of `dst`.
    pub to: Element,
    /// Output channels.
    pub cout: usize,
    /// Input channels.
    pub cin: usize,
    /// Kernel height times width.
    pub taps: usize,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct PackConvArgs {
    src: DevicePtr,
    dst: DevicePtr,
    cin: i32,
    cp: i32,
    taps: i32,
    chunk: i32,
    kind: i32,
    unused: i32,
}

/// Channels of a block: whole vectors that fit shared memory with their taps; 0 if not even one does.
fn conv_chunk(cp: usize, taps: usize) -> usize {
    let octets = CONV_FLOATS / (VECTOR * taps + 1);
    cp.min(256).min(octets * VECTOR)
}

/// Queues the packing of a convolution's weight.
pub fn pack_conv(gpu: &Gpu, op: &PackConv) -> Result<(), CudaError> {
    gpu.label(|| format!("pack_conv {:?} {}x{}x{}", op.from, op.cout, op.cin, op.taps));
    const OP: &str = "pack_conv";
    if op.taps == 1 {
        let (PackConv { src, from, dst, to, .. }, row_offset) = (*op, 0);
        let matrix = PackLinear { src, from, dst, to, n: op.cout, k: op.cin, row_offset, is_geglu: false };
        return pack_linear(gpu, &matrix);
    }
    if op.cout == 0 || op.cin == 0 || op.taps == 0 {
        return Ok(());
    }
    aligned(OP, op.src, op.from.size())?;
    aligned(OP, op.dst, 16)?;
    let cp = padded(op.cin);
    let chunk = conv_chunk(cp, op.taps);
    if chunk == 0 || op.cout > 65_535 || cp > i32::MAX as usize {
        let reason = format!("[{}, {}] channels with {} taps", op.cout, op.cin, op.taps);
        return Err(CudaError::Unsupported { op: OP, reason });
    }
    let args = PackConvArgs {
        src: op.src,
        dst: op.dst,
        cin: op.cin as i32,
        cp: cp as i32,
        taps: op.taps as i32,
        chunk: chunk as i32,
        kind: op.from as i32,
        unused: 0,
    };
    let geometry = Geometry {
        grid: [cp.div_ceil(chunk) as u32, op.cout as u32, 1],
        threads: THREADS,
        shared: 4 * (chunk * op.taps + chunk / VECTOR) as u32,
        cluster: 1,
    };
    let name = format!("pack_conv_{}", op.to.suffix());
    gpu.launch(&Kernel { module: "pack", name: &name }, &geometry, &[bytes_of(&args)])
}

/// A bias, scale or shift as f32.
#[derive(Clone, Copy, Debug)]
pub struct PackVector {
    /// Stored vector, aligned to its elements.
    pub src: DevicePtr,
    /// Type of `src`.
    pub from: Stored,
    /// f32 vector.
    pub dst: DevicePtr,
    /// Elements.
    pub n: usize,
    /// Element of `dst` that element 0 becomes.
    pub offset: usize,
    /// The bias of a GEGLU: interleaved like the rows of its weight.
    pub is_geglu: bool,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct PackVectorArgs {
    src: DevicePtr,
    dst: DevicePtr,
    n: i64,
    half: i64,
    kind: i32,
    unused: i32,
}

/// Queues the packing of a vector.
pub fn pack_vector(gpu: &Gpu, op: &PackVector) -> Result<(), CudaError> {
    gpu.label(|| format!("pack_vector {:?} {}", op.from, op.n));
    const OP: &str = "pack_vector";
    if op.n == 0 {
        return Ok(());
    }
    aligned(OP, op.src, op.from.size())?;
    let args = PackVectorArgs {
        src: op.src,
        dst: op.dst.offset(4 * op.offset),
        n: op.n as i64,
        half: geglu_half(OP, op.n, op.is_geglu)?,
        kind: op.from as i32,
        unused: 0,
    };
    gpu.launch(
        &Kernel { module: "pack", name: "pack_vector" },
        &Geometry::strided(gpu, op.n, THREADS),
        &[bytes_of(&args)],
    )
}

/// Rows of values (as many as gates), 0 without GEGLU.
fn geglu_half(op: &'static str, n: usize, is_geglu: bool) -> Result<i64, CudaError> {
    if is_geglu && !n.is_multiple_of(2 * VECTOR) {
        let reason = format!("{n} rows of a GEGLU; a multiple of {} is needed", 2 * VECTOR);
        return Err(CudaError::Unsupported { op, reason });
    }
    Ok(if is_geglu { n as i64 / 2 } else { 0 })
}

fn aligned(op: &'static str, ptr: DevicePtr, to: usize) -> Result<(), CudaError> {
    if ptr.0.is_multiple_of(to as u64) {
        return Ok(());
    }
    let reason = format!("address {:#x} is no multiple of {to} bytes", ptr.0);
    Err(CudaError::Unsupported { op, reason })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conv_chunks_fit_shared_memory() {
        assert_eq!(conv_chunk(320, 9), 256);
        assert_eq!(conv_chunk(8, 9), 8);
        assert_eq!(conv_chunk(320, 196), 56);
        assert_eq!(conv_chunk(8, 1535), 8);
        assert_eq!(conv_chunk(8, 1536), 0);
    }

    #[test]
    fn geglu_needs_whole_blocks() {
        assert_eq!(geglu_half("test", 32, true).unwrap(), 16);
        assert_eq!(geglu_half("test", 33, false).unwrap(), 0);
        assert!(geglu_half("test", 24, true).is_err());
    }
}
