//! Convolutions on Hopper (`kernels/conv/conv_sm90.cu`): TMA and wgmma.
//!
//! Takes what TMA can take, 16-byte aligned operands in multiples of eight
//! channels; [`supports`] says no to the rest, which the sm_80 kernels do.
//! Convolutions that are linear layers go to [`super::gemm_sm90`].

use bytemuck::{Pod, Zeroable, bytes_of};

use super::super::{CudaError, Element, Gpu, Kernel};
use super::conv::{Conv, Padding};
use super::epilogue::{self, EpilogueArgs, Rows, int};
use super::gemm_sm90;
use super::hopper::{
    Cut, DEPTH, Finish, Plan, Product, ROWS, Room, Tiles, best_cut, epilogue_in_vectors, map_element,
    matrix_map, ranked_cuts,
};
use crate::driver::{Im2col, Swizzle, TensorMap, TensorMapDesc};

const OP: &str = "conv_sm90";
/// Fewer output channels leave most of the narrowest tile empty.
const LEAST_CHANNELS: usize = 64;
/// Fewer pixels leave most of a tile of 128 empty.
const LEAST_PIXELS: usize = 64;
/// Largest kernel along each side, and stride: the map's bounding box is described in few bits.
const MOST_TAPS: usize = 7;
const MOST_STRIDE: usize = 8;

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct ConvArgs {
    epilogue: EpilogueArgs,
    tiles: Tiles,
    images: i32,
    height: i32,
    width: i32,
    c1: i32,
    c1_steps: i32,
    tap_steps: i32,
    cp: i32,
    kernel_w: i32,
    stride: i32,
    pad_top: i32,
    pad_left: i32,
    corner_x: i32,
    corner_y: i32,
    im2col: i32,
    box_w: i32,
    box_h: i32,
    boxes_w: i32,
    boxes_h: i32,
    doubling: i32,
    unused: i32,
}

/// How the 128 pixels of a tile are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pixels {
    /// A box of pixels: powers of two along width, height and images.
    Boxes {
        /// log2 of the pixels along the width.
        width: u32,
        /// log2 of the pixels along the height.
        height: u32,
    },
    /// Any consecutive output pixels.
    Im2col,
}

/// The choice for a lattice of `height` x `width` pixels: boxes if they fill it exactly.
pub fn choose_pixels(op: &Conv) -> Pixels {
    let [height, width] = lattice(op);
    let width_log = width.trailing_zeros().min(7);
    let height_log = height.trailing_zeros().min(7 - width_log);
    let whole = 1 << width_log == width && 1 << height_log == height;
    // Boxes over several images that are only parts of them would leave rows of the tile empty.
    if op.stride == 1 && height > 0 && width > 0 && (width_log + height_log == 7 || whole) {
        Pixels::Boxes { width: width_log, height: height_log }
    } else {
        Pixels::Im2col
    }
}

/// Height and width of the lattice that tiles are cut from: output pixels, with doubling input pixels.
fn lattice(op: &Conv) -> [usize; 2] {
    if op.upsample { [op.height, op.width] } else { op.out_extent() }
}

/// Whether the Hopper kernels take this convolution and are the better choice for it.
pub fn supports(op: &Conv) -> bool {
    if let Some(op) = op.as_gemm() {
        return gemm_sm90::supports(&op);
    }
    let doubles = op.kernel == [3, 3] && op.stride == 1 && op.padding == Padding::all(1);
    let Padding { top, bottom, left, right } = op.padding;
    let sides = [top, bottom, left, right, op.kernel[0], op.kernel[1]];
    op.problem().m >= LEAST_PIXELS
        && op.cout >= LEAST_CHANNELS
        && op.c1 > 0
        && (1..=MOST_STRIDE).contains(&op.stride)
        && sides.iter().all(|side| *side <= MOST_TAPS)
        && op.kernel.iter().all(|side| *side > 0)
        && (!op.upsample || doubles)
        && op.element != Element::F32
        && op.is_aligned()
        && op.w.0.is_multiple_of(16)
        && epilogue_in_vectors(&op.epilogue, op.cout)
}

fn product(op: &Conv, pixels: Pixels) -> Product {
    let [height, width] = lattice(op);
    let tiles_m = match pixels {
        Pixels::Im2col => (op.batch * height * width).div_ceil(ROWS),
        Pixels::Boxes { width: w, height: h } => {
            height.div_ceil(1 << h) * width.div_ceil(1 << w) * op.batch.div_ceil(1 << (7 - w - h))
        }
    };
    let tap_steps = op.c1.div_ceil(DEPTH) + op.c2.div_ceil(DEPTH);
    Product {
        tiles_m: tiles_m * if op.upsample { 4 } else { 1 },
        columns: op.cout,
        steps: op.kernel[0] * op.kernel[1] * tap_steps,
        is_right_constant: op.w_is_constant,
    }
}

/// The ways to cut up a convolution that can make sense, the launcher's choice first.
pub fn cuts_of(op: &Conv, room: &Room) -> Vec<Cut> {
    if let Some(op) = op.as_gemm() {
        return gemm_sm90::cuts_of(&op, room);
    }
    ranked_cuts(&product(op, choose_pixels(op)), room)
}

/// Queues a convolution, cut up as the caller says and its pixels found as the launcher does.
pub fn conv_cut(gpu: &Gpu, op: &Conv, cut: Cut) -> Result<(), CudaError> {
    match op.as_gemm() {
        Some(op) => gemm_sm90::gemm_by(gpu, &op, cut),
        None => conv_by(gpu, op, choose_pixels(op), cut),
    }
}

/// Queues a convolution.
pub fn conv(gpu: &Gpu, op: &Conv) -> Result<(), CudaError> {
    if let Some(op) = op.as_gemm() {
        return gemm_sm90::gemm(gpu, &op);
    }
    let pixels = choose_pixels(op);
    conv_by(gpu, op, pixels, best_cut(&product(op, pixels), gpu.room()))
}

/// Queues a convolution, cut up as the caller says.
pub fn conv_by(gpu: &Gpu, op: &Conv, pixels: Pixels, cut: Cut) -> Result<(), CudaError> {
    gpu.label(|| op.label());
    let boxes_fit = match pixels {
        Pixels::Im2col => true,
        Pixels::Boxes { width, height } => op.stride == 1 && width + height <= 7,
    };
    if !supports(op) || op.x2.is_none() != (op.c2 == 0) || !boxes_fit {
        return Err(CudaError::Unsupported { op: OP, reason: format!("not for the sm_90a kernels: {op:?}") });
    }
    let finish = Finish::of(&op.epilogue, cut, true);
    let plan = Plan::new(&product(op, pixels), cut, finish, gpu.room())?;
    let map_x = pixel_map(gpu, op, op.x, op.c1, pixels)?;
    let map_x2 = match op.x2 {
        Some(x2) => pixel_map(gpu, op, x2, op.c2, pixels)?,
        None => map_x,
    };
    let depth = op.kernel[0] * op.kernel[1] * (op.c1 + op.c2);
    let map_w = matrix_map(gpu, Rows::new(op.w, depth), [op.cout, depth], plan.box_rows(), op.element)?;
    let args = arguments(op, pixels, &plan)?;
    let name = format!("conv_sm90_128x{}{}_{}", cut.width, finish.name(), op.element.suffix());
    let params = [bytes_of(&args), bytes_of(&map_x), bytes_of(&map_x2), bytes_of(&map_w)];
    gpu.launch(&Kernel { module: OP, name: &name }, &plan.geometry(), &params)
}

/// Pixels outside the image at which the bounding box of im2col mode begins, along width and height.
fn corner(op: &Conv) -> [usize; 2] {
    // Doubled, a tap moves by at most one input pixel.
    if op.upsample { [1, 1] } else { [op.padding.left, op.padding.top] }
}

fn arguments(op: &Conv, pixels: Pixels, plan: &Plan) -> Result<ConvArgs, CudaError> {
    let [height, width] = lattice(op);
    let [out_height, out_width] = op.out_extent();
    let whole = epilogue::Product {
        op: OP,
        rows: op.problem().m,
        columns: op.cout,
        rows_per_sample: out_height * out_width,
    };
    let (box_w, box_h) = match pixels {
        Pixels::Im2col => (0, 0),
        Pixels::Boxes { width, height } => (width, height),
    };
    let extent = |what, value| int(OP, what, value);
    let [corner_x, corner_y] = corner(op);
    extent("weights of an output channel", op.problem().k)?;
    Ok(ConvArgs {
        epilogue: EpilogueArgs::new(&op.epilogue, &whole)?,
        tiles: plan.tiles,
        images: extent("images", op.batch)?,
        height: extent("rows of pixels", height)?,
        width: extent("columns of pixels", width)?,
        c1: extent("channels", op.c1)?,
        c1_steps: op.c1.div_ceil(DEPTH) as i32,
        tap_steps: (op.c1.div_ceil(DEPTH) + op.c2.div_ceil(DEPTH)) as i32,
        cp: extent("channels", op.c1 + op.c2)?,
        kernel_w: op.kernel[1] as i32,
        stride: op.stride as i32,
        pad_top: op.padding.top as i32,
        pad_left: op.padding.left as i32,
        corner_x: corner_x as i32,
        corner_y: corner_y as i32,
        im2col: i32::from(pixels == Pixels::Im2col),
        box_w: box_w as i32,
        box_h: box_h as i32,
        boxes_w: extent("boxes", width.div_ceil(1 << box_w))?,
        boxes_h: extent("boxes", height.div_ceil(1 << box_h))?,
        doubling: i32::from(op.upsample),
        unused: 0,
    })
}

/// Map of one of the inputs: 128 pixels by one step of channels.
fn pixel_map(
    gpu: &Gpu,
    op: &Conv,
    input: Rows,
    channels: usize,
    pixels: Pixels,
) -> Result<TensorMap, CudaError> {
    let pitch = (input.pitch * op.element.size()) as u64;
    let [corner_x, corner_y] = corner(op);
    // The last pixel that a kernel may begin at, counted from the last of the image.
    let last = |padding: usize, taps: usize| padding as i32 - taps as i32 + 1;
    let upper = if op.upsample {
        [-1, -1]
    } else {
        [last(op.padding.right, op.kernel[1]), last(op.padding.bottom, op.kernel[0])]
    };
    let (box_extents, im2col) = match pixels {
        Pixels::Boxes { width, height } => {
            (vec![DEPTH as u32, 1 << width, 1 << height, 1 << (7 - width - height)], None)
        }
        Pixels::Im2col => {
            let im2col = Im2col {
                lower: [-(corner_x as i32), -(corner_y as i32)],
                upper,
                pixels: ROWS as u32,
                stride: [op.stride as u32; 2],
            };
            (vec![DEPTH as u32, 1, 1, 1], Some(im2col))
        }
    };
    Ok(gpu.driver().tensor_map(&TensorMapDesc {
        base: input.ptr,
        element: map_element(op.element),
        extents: vec![channels as u64, op.width as u64, op.height as u64, op.batch as u64],
        strides: vec![pitch, pitch * op.width as u64, pitch * (op.width * op.height) as u64],
        box_extents,
        swizzle: Swizzle::B128,
        im2col,
    })?)
}
