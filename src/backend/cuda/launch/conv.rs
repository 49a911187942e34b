//! Convolutions (`kernels/conv/conv_sm80.cu`); those that are linear layers go to [`super::gemm`].

use bytemuck::{Pod, Zeroable, bytes_of};

use super::super::{CudaError, Element, Geometry, Gpu, Kernel};
use super::epilogue::{Epilogue, EpilogueArgs, Product, Rows, check_element, int};
use super::gemm::{Gemm, gemm, partial_memory, sum_splits};
use super::plan::{Plan, Problem, THREADS, Tile, plan};
use super::{conv_f32, conv_sm90};
use crate::driver::DevicePtr;

const OP: &str = "conv";
const MODULE: &str = "conv_sm80";
/// Bytes of shared memory per row of a tile, for the corner of a pixel's window.
const CORNER: usize = 16;
/// Largest kernel along each side.
const MAX_KERNEL: usize = 7;

/// Pixels around an image, by side.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Padding {
    /// Rows above.
    pub top: usize,
    /// Rows below.
    pub bottom: usize,
    /// Columns on the left.
    pub left: usize,
    /// Columns on the right.
    pub right: usize,
}

impl Padding {
    /// The same on all sides.
    pub fn all(pixels: usize) -> Self {
        Self { top: pixels, bottom: pixels, left: pixels, right: pixels }
    }
}

/// `out = epilogue(conv(x ‖ x2, w))`, NHWC; the result's rows are the output pixels in order.
#[derive(Clone, Copy, Debug)]
pub struct Conv {
    /// Pixels of `c1` channels.
    pub x: Rows,
    /// Pixels of `c2` channels, those behind the channels of `x`.
    pub x2: Option<Rows>,
    /// `[cout][kernel_h·kernel_w][Cp]`, Cp being `c1 + c2` rounded up to 8, zero filled; begins at a multiple of 16 bytes.
    pub w: DevicePtr,
    /// Nobody writes `w` while the kernel before this one may still run, so it may be read that early.
    pub w_is_constant: bool,
    /// Images.
    pub batch: usize,
    /// Rows of pixels in memory.
    pub height: usize,
    /// Pixels of a row in memory.
    pub width: usize,
    /// Channels of `x`.
    pub c1: usize,
    /// Channels of `x2`, 0 without.
    pub c2: usize,
    /// Channels of the product.
    pub cout: usize,
    /// Taps along height and width.
    pub kernel: [usize; 2],
    /// Input pixels from one output pixel to the next.
    pub stride: usize,
    /// Zeros around the (enlarged) input.
    pub padding: Padding,
    /// The input is first made twice as high and wide, each pixel repeated.
    pub upsample: bool,
    /// Element of operands and, unless it is f32, result.
    pub element: Element,
    /// What becomes of the product; its time bias has one row an image.
    pub epilogue: Epilogue,
}

impl Conv {
    /// Height and width of the result; 0 where the kernel does not fit.
    pub fn out_extent(&self) -> [usize; 2] {
        let Padding { top, bottom, left, right } = self.padding;
        let of = |extent: usize, padding: usize, kernel: usize| {
            let padded = extent * if self.upsample { 2 } else { 1 } + padding;
            if padded < kernel { 0 } else { (padded - kernel) / self.stride.max(1) + 1 }
        };
        [of(self.height, top + bottom, self.kernel[0]), of(self.width, left + right, self.kernel[1])]
    }

    /// Extents of the product.
    pub fn problem(&self) -> Problem {
        let [height, width] = self.out_extent();
        Problem {
            m: self.batch * height * width,
            n: self.cout,
            k: self.kernel[0] * self.kernel[1] * (self.c1 + self.c2).next_multiple_of(8),
        }
    }

    /// Whether x and x2 consist of 16-byte vectors.
    pub fn is_aligned(&self) -> bool {
        self.x.is_vector()
            && self.x2.is_none_or(|x2| x2.is_vector())
            && self.c1.is_multiple_of(8)
            && self.c2.is_multiple_of(8)
    }

    /// Its shape in words, for traces.
    pub(super) fn label(&self) -> String {
        let Self { kernel: [kh, kw], batch, height, width, c1, c2, cout, .. } = self;
        let [to_height, to_width] = self.out_extent();
        format!(
            "conv {kh}x{kw} {batch}x{height}x{width}x{} -> {batch}x{to_height}x{to_width}x{cout}",
            c1 + c2
        )
    }

    /// The linear layer that this is, if it is one.
    pub fn as_gemm(&self) -> Option<Gemm> {
        let is_linear =
            self.kernel == [1, 1] && self.stride == 1 && self.padding == Padding::default() && !self.upsample;
        is_linear.then(|| Gemm {
            x: self.x,
            x2: self.x2,
            w: self.w,
            w_is_constant: self.w_is_constant,
            m: self.batch * self.height * self.width,
            n: self.cout,
            k1: self.c1,
            k2: self.c2,
            rows_per_sample: self.height * self.width,
            element: self.element,
            epilogue: self.epilogue,
        })
    }
}

/// Which kernel computes a convolution that is no linear layer, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// Implicit product by mma.sync, sm_80 and later.
    Tiles(Plan),
}

/// The choice for a device with this many multiprocessors.
pub fn choose(op: &Conv, multiprocessors: usize) -> Choice {
    Choice::Tiles(plan(&op.problem(), multiprocessors, op.is_aligned()))
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct ConvArgs {
    x: DevicePtr,
    x2: DevicePtr,
    w: DevicePtr,
    pitch: i64,
    pitch2: i64,
    c1: i32,
    c2: i32,
    cp: i32,
    batch: i32,
    height: i32,
    width: i32,
    out_height: i32,
    out_width: i32,
    cout: i32,
    kernel_h: i32,
    kernel_w: i32,
    stride: i32,
    pad_top: i32,
    pad_left: i32,
    doubling: i32,
    pub(super) tiles_m: i32,
    pub(super) tiles_n: i32,
    pub(super) k_tiles_per_split: i32,
    pub(super) epilogue: EpilogueArgs,
}

/// Queues `op`.
pub fn conv(gpu: &Gpu, op: &Conv) -> Result<(), CudaError> {
    match op.as_gemm() {
        Some(linear) => gemm(gpu, &linear),
        None if op.element == Element::F32 => conv_f32::conv(gpu, op),
        None if gpu.is_hopper() && conv_sm90::supports(op) => conv_sm90::conv(gpu, op),
        None => conv_by(gpu, op, choose(op, gpu.multiprocessors())),
    }
}

/// Queues `op` with a kernel of the caller's choice, which must fit its alignment.
pub fn conv_by(gpu: &Gpu, op: &Conv, choice: Choice) -> Result<(), CudaError> {
    gpu.label(|| op.label());
    let Choice::Tiles(plan) = choice;
    check_element(OP, op.element)?;
    let mut args = arguments(op)?;
    let problem = op.problem();
    if problem.m == 0 || problem.n == 0 {
        return Ok(());
    }
    if plan.tile != Tile::Any && !op.is_aligned() {
        let reason = format!("{:?} for operands without 16-byte vectors", plan.tile);
        return Err(CudaError::Unsupported { op: OP, reason });
    }
    let (tiles_m, tiles_n) = plan.tiles(&problem);
    args.tiles_m = int(OP, "tiles", tiles_m)?;
    args.tiles_n = int(OP, "tiles", tiles_n)?;
    args.k_tiles_per_split = int(OP, "tiles of K", plan.k_tiles_per_split(&problem))?;
    args.epilogue.partial = partial_memory(gpu, &plan, &problem)?;
    let shape = plan.tile.shape();
    let name = format!("conv_sm80_{}_{}", shape.name, op.element.suffix());
    let geometry = Geometry {
        grid: [int(OP, "tiles", tiles_m * tiles_n)? as u32, plan.splits as u32, 1],
        threads: THREADS,
        shared: (plan.tile.shared_bytes(gpu.capability()) + shape.m * CORNER) as u32,
        cluster: 1,
    };
    gpu.launch(&Kernel { module: MODULE, name: &name }, &geometry, &[bytes_of(&args)])?;
    sum_splits(gpu, op.element, &args.epilogue, &op.epilogue, plan.splits, &problem)
}

/// Checks a convolution and makes the kernels' argument of it, but for tiles and splits.
pub(super) fn arguments(op: &Conv) -> Result<ConvArgs, CudaError> {
    let unsupported = |reason: String| CudaError::Unsupported { op: OP, reason };
    let [kernel_h, kernel_w] = op.kernel;
    if !(1..=MAX_KERNEL).contains(&kernel_h) || !(1..=MAX_KERNEL).contains(&kernel_w) || op.stride == 0 {
        return Err(unsupported(format!(
            "a kernel of {kernel_h}x{kernel_w} with stride {}; sides are 1 to {MAX_KERNEL}, strides 1 and more",
            op.stride
        )));
    }
    let channels = op.c1 + op.c2;
    if channels == 0 || op.x2.is_none() && op.c2 != 0 || op.x2.is_some() && op.c2 == 0 {
        return Err(unsupported(format!("inputs of {} and {} channels, second {:?}", op.c1, op.c2, op.x2)));
    }
    let x2 = op.x2.unwrap_or_default();
    if op.x.pitch < op.c1 || x2.pitch < op.c2 {
        let pitches = (op.x.pitch, x2.pitch);
        return Err(unsupported(format!("pitches {pitches:?} for {} and {} channels", op.c1, op.c2)));
    }
    if !op.w.0.is_multiple_of(16) {
        return Err(unsupported(format!("weights at {:#x}, not a multiple of 16", op.w.0)));
    }
    int(OP, "input pixels", op.batch * op.height * op.width * if op.upsample { 4 } else { 1 })?;
    let problem = op.problem();
    let [out_height, out_width] = op.out_extent();
    let product =
        Product { op: OP, rows: problem.m, columns: op.cout, rows_per_sample: out_height * out_width };
    let extent = |what, value| int(OP, what, value);
    int(OP, "weights of an output channel", problem.k)?;
    Ok(ConvArgs {
        x: op.x.ptr,
        x2: x2.ptr,
        w: op.w,
        pitch: op.x.pitch as i64,
        pitch2: x2.pitch as i64,
        c1: extent("channels", op.c1)?,
        c2: extent("channels", op.c2)?,
        cp: extent("channels", channels.next_multiple_of(8))?,
        batch: extent("images", op.batch)?,
        height: extent("rows of pixels", op.height)?,
        width: extent("columns of pixels", op.width)?,
        out_height: extent("rows of pixels", out_height)?,
        out_width: extent("columns of pixels", out_width)?,
        cout: extent("output channels", op.cout)?,
        kernel_h: kernel_h as i32,
        kernel_w: kernel_w as i32,
        stride: extent("pixels of stride", op.stride)?,
        pad_top: extent("rows of padding", op.padding.top)?,
        pad_left: extent("columns of padding", op.padding.left)?,
        doubling: i32::from(op.upsample),
        tiles_m: 0,
        tiles_n: 0,
        k_tiles_per_split: 0,
        epilogue: EpilogueArgs::new(&op.epilogue, &product)?,
    })
}
