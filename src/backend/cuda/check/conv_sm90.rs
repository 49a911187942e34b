//! Cases of convolutions on Hopper.

use super::epilogue::{EpilogueCase, Extent, Operands, reference_of_all};
use super::gemm_sm90::{BIAS, Finish, PLAIN, RESIDUAL, product, random_finish, tolerance};
use super::random::{HALVES, Shapes, distinct};
use super::{Case, Context, Measured};
use crate::backend::cuda::launch::conv::{Conv, Padding};
use crate::backend::cuda::launch::conv_sm90::{Pixels, conv, conv_by};
use crate::backend::cuda::launch::elementwise::Act;
use crate::backend::cuda::launch::epilogue::{Epilogue, Rows};
use crate::backend::cuda::launch::hopper::Cut;
use crate::backend::cuda::{CudaError, Element};
use crate::driver::DevicePtr;

/// Extents of a convolution.
#[derive(Clone, Copy, Debug)]
struct Shape {
    batch: usize,
    height: usize,
    width: usize,
    c1: usize,
    c2: usize,
    cout: usize,
    kernel: [usize; 2],
    stride: usize,
    padding: Padding,
    upsample: bool,
}

/// 3x3 with one pixel of padding.
const fn square(batch: usize, size: [usize; 2], c1: usize, cout: usize) -> Shape {
    Shape {
        batch,
        height: size[0],
        width: size[1],
        c1,
        c2: 0,
        cout,
        kernel: [3, 3],
        stride: 1,
        padding: Padding { top: 1, bottom: 1, left: 1, right: 1 },
        upsample: false,
    }
}

const fn concat(shape: Shape, c2: usize) -> Shape {
    Shape { c2, ..shape }
}

const fn halved(shape: Shape) -> Shape {
    Shape { stride: 2, ..shape }
}

const fn doubled(shape: Shape) -> Shape {
    Shape { upsample: true, ..shape }
}

/// Only on the right and below, as the encoders of latents have it.
const fn lopsided(shape: Shape) -> Shape {
    Shape { padding: Padding { top: 0, bottom: 1, left: 0, right: 1 }, ..halved(shape) }
}

const TIME: EpilogueCase = EpilogueCase { time_bias: true, ..BIAS };
const SILU: EpilogueCase = EpilogueCase { act: Act::Silu, ..BIAS };
/// As in enlargers of pictures.
const LEAKY: EpilogueCase = EpilogueCase { act: Act::LeakyRelu, ..BIAS };

/// Small ones: every way to find the pixels, sizes that no box divides, concatenation, strides, doubling.
const SMALL: &[(Shape, EpilogueCase)] = &[
    (square(1, [8, 16], 64, 128), PLAIN),
    (square(2, [8, 8], 64, 160), TIME),
    (square(3, [8, 8], 72, 64), RESIDUAL),
    (square(1, [16, 16], 40, 96), SILU),
    (square(5, [4, 4], 128, 128), BIAS),
    (square(9, [4, 4], 128, 64), TIME),
    (square(1, [32, 32], 16, 64), RESIDUAL),
    (square(1, [48, 40], 16, 64), LEAKY),
    (doubled(square(1, [14, 9], 64, 64)), LEAKY),
    (square(1, [2, 128], 64, 64), BIAS),
    (square(1, [3, 256], 8, 64), BIAS),
    (square(2, [12, 12], 64, 64), TIME),
    (square(1, [9, 13], 72, 72), RESIDUAL),
    (square(3, [7, 11], 24, 128), PLAIN),
    (concat(square(2, [8, 8], 64, 64), 64), BIAS),
    (concat(square(1, [16, 16], 72, 80), 40), TIME),
    (concat(square(1, [10, 14], 8, 64), 136), RESIDUAL),
    (halved(square(2, [16, 16], 64, 64)), BIAS),
    (halved(square(1, [17, 24], 40, 64)), RESIDUAL),
    (halved(square(3, [13, 15], 72, 128)), TIME),
    (halved(square(3, [13, 22], 24, 64)), TIME),
    (halved(square(1, [36, 27], 16, 64)), RESIDUAL),
    (lopsided(square(2, [16, 16], 64, 64)), BIAS),
    (lopsided(square(3, [18, 23], 24, 64)), TIME),
    (lopsided(square(1, [18, 23], 32, 64)), SILU),
    (doubled(square(2, [8, 8], 64, 64)), BIAS),
    (doubled(square(1, [4, 8], 40, 96)), RESIDUAL),
    (doubled(square(2, [5, 7], 72, 64)), TIME),
    (doubled(square(1, [16, 16], 16, 64)), BIAS),
    (concat(doubled(square(1, [6, 10], 32, 64)), 24), BIAS),
    (
        Shape {
            kernel: [1, 1],
            padding: Padding { top: 0, bottom: 0, left: 0, right: 0 },
            ..square(1, [12, 10], 136, 128)
        },
        RESIDUAL,
    ),
    (
        Shape {
            kernel: [1, 1],
            padding: Padding { top: 0, bottom: 0, left: 0, right: 0 },
            ..halved(square(2, [16, 16], 64, 64))
        },
        BIAS,
    ),
    (
        Shape {
            kernel: [5, 3],
            padding: Padding { top: 2, bottom: 1, left: 0, right: 2 },
            ..square(2, [11, 10], 48, 64)
        },
        BIAS,
    ),
    (
        Shape {
            kernel: [3, 3],
            padding: Padding { top: 0, bottom: 0, left: 0, right: 0 },
            ..square(2, [18, 10], 48, 64)
        },
        BIAS,
    ),
    (
        Shape {
            kernel: [7, 7],
            padding: Padding { top: 3, bottom: 3, left: 3, right: 3 },
            ..square(1, [8, 16], 16, 64)
        },
        SILU,
    ),
];

/// Layers of the UNets of SD1.5 at 512² and SDXL at 1024², two samples, and of the decoder of latents.
const REAL: &[(Shape, EpilogueCase)] = &[
    (square(2, [64, 64], 320, 320), TIME),
    (square(2, [32, 32], 640, 640), RESIDUAL),
    (square(2, [16, 16], 1280, 1280), TIME),
    (square(2, [8, 8], 1280, 1280), RESIDUAL),
    (concat(square(2, [64, 64], 640, 320), 320), TIME),
    (concat(square(2, [32, 32], 1280, 640), 640), TIME),
    (concat(square(2, [16, 16], 1280, 1280), 1280), TIME),
    (concat(square(2, [8, 8], 1280, 1280), 1280), TIME),
    (halved(square(2, [64, 64], 320, 320)), BIAS),
    (halved(square(2, [32, 32], 640, 640)), BIAS),
    (halved(square(2, [16, 16], 1280, 1280)), BIAS),
    (doubled(square(2, [32, 32], 640, 640)), BIAS),
    (doubled(square(2, [16, 16], 1280, 1280)), BIAS),
    (doubled(square(2, [8, 8], 1280, 1280)), BIAS),
    (square(2, [128, 128], 320, 320), TIME),
    (square(2, [64, 64], 640, 640), TIME),
    (square(2, [32, 32], 1280, 1280), TIME),
    (concat(square(2, [128, 128], 640, 320), 320), TIME),
    (square(2, [96, 72], 640, 640), TIME),
    (square(1, [64, 64], 512, 512), RESIDUAL),
    (square(1, [128, 128], 512, 512), RESIDUAL),
    (square(1, [256, 256], 256, 256), RESIDUAL),
    (doubled(square(1, [128, 128], 512, 512)), BIAS),
    (square(1, [512, 512], 128, 128), RESIDUAL),
];

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for element in HALVES {
        for (i, (shape, op)) in SMALL.iter().enumerate() {
            cases.push(case(*shape, *op, None, element));
            // Widths, splits and im2col mode, whatever the launcher would choose.
            let steps = shape.kernel[0] * shape.kernel[1];
            let cut = Cut {
                width: [160, 256, 128][i % 3],
                splits: (1 + i % 8).min(steps).min(8 / (1 + i / 2 % 2)),
                pair: 1 + i / 2 % 2,
            };
            if shape.kernel != [1, 1] || shape.stride != 1 {
                cases.push(case(*shape, *op, Some(cut), element));
            }
        }
        for (shape, op) in REAL {
            cases.push(case(*shape, *op, None, element));
        }
    }
    cases
}

/// Of every width and finish as many: boxes of pixels and im2col mode, concatenation, strides, doubling.
pub(super) fn random(shapes: &mut Shapes) -> Vec<Case> {
    let mut cases = Vec::new();
    for element in HALVES {
        for width in [128, 160, 256] {
            for finish in [Finish::Plain, Finish::Time, Finish::Any] {
                cases.extend(distinct(shapes, |s| random_case(s, width, finish, element)));
            }
        }
    }
    cases
}

fn random_case(s: &mut Shapes, width: usize, finish: Finish, element: Element) -> Case {
    let (batch, height, columns) = (s.of(1..=3), s.of(8..=14), s.of(9..=17));
    let shape = square(batch, [height, columns], 8 * s.of(1..=10), 16 * s.of(4..=18));
    let shape = if s.once_in(3) { concat(shape, 8 * s.of(1..=9)) } else { shape };
    let Padding { top, bottom, left, right } = shape.padding;
    let shape = match s.below(6) {
        0 if batch > 1 => halved(Shape { height: height + 6, ..shape }),
        1 => doubled(Shape { height: height / 2 + 1, width: columns / 2 + 1, ..shape }),
        2 => Shape {
            kernel: [2, 3],
            padding: Padding { top: top + s.below(2), bottom, left, right: right + 1 },
            ..shape
        },
        3 => Shape { kernel: [1, 1], padding: Padding { top: 0, bottom, left: 0, right }, ..shape },
        4 => Shape { height: 8, width: 16, ..shape },
        _ => shape,
    };
    let (op, cut) = random_finish(s, finish, width, shape.kernel[0] * shape.kernel[1]);
    case(shape, EpilogueCase { geglu: false, ..op }, Some(cut), element)
}

/// The descriptor, without its operands.
fn descriptor(shape: &Shape, element: Element) -> Conv {
    let Shape { batch, height, width, c1, c2, cout, kernel, stride, padding, upsample } = *shape;
    let nowhere = Rows::default();
    Conv {
        x: nowhere,
        x2: (c2 > 0).then_some(nowhere),
        w: DevicePtr::NULL,
        w_is_constant: cout % 128 != 0,
        batch,
        height,
        width,
        c1,
        c2,
        cout,
        kernel,
        stride,
        padding,
        upsample,
        element,
        epilogue: Epilogue::to(nowhere),
    }
}

fn case(shape: Shape, op: EpilogueCase, cut: Option<Cut>, element: Element) -> Case {
    let problem = descriptor(&shape, element).problem();
    let Shape { batch, height, width, c1, c2, cout, kernel, stride, upsample, .. } = shape;
    let flops = 2.0 * problem.m as f64 * problem.n as f64 * problem.k as f64;
    let concat = if c2 > 0 { format!("+{c2}") } else { String::new() };
    let double = if upsample { " doubled" } else { "" };
    let forced = cut.map_or(String::new(), |cut| format!(" im2col by {cut}"));
    let name = format!(
        "conv_sm90_{} {batch}x{height}x{width} {c1}{concat}->{cout} {}x{} s{stride}{double}{}{forced}",
        element.suffix(),
        kernel[0],
        kernel[1],
        op.describe(),
    );
    let values = batch * height * width * (c1 + c2) + problem.n * problem.k + problem.m * problem.n;
    Case {
        family: "conv_sm90",
        name,
        quick: flops < 6e7,
        needs_gpu: flops > 2e9,
        is_random: false,
        flops,
        bytes: (values * element.size()) as f64,
        tolerance: tolerance(element, &op),
        run: Box::new(move |cx| run(cx, &shape, op, cut, element)),
    }
}

/// The left operand of the product in full: a row of taps and channels for every output pixel.
fn unfold(op: &Conv, x: &[f32], x2: &[f32], pitches: [usize; 2]) -> Vec<f32> {
    let [out_height, out_width] = op.out_extent();
    let channels = op.c1 + op.c2;
    let zoom = if op.upsample { 2 } else { 1 };
    let mut out = Vec::with_capacity(op.problem().m * op.problem().k);
    for pixel in 0..op.batch * out_height * out_width {
        let (image, y, x0) =
            (pixel / (out_height * out_width), pixel / out_width % out_height, pixel % out_width);
        for tap in 0..op.kernel[0] * op.kernel[1] {
            let down = (y * op.stride + tap / op.kernel[1]).wrapping_sub(op.padding.top);
            let right = (x0 * op.stride + tap % op.kernel[1]).wrapping_sub(op.padding.left);
            if down >= op.height * zoom || right >= op.width * zoom {
                out.resize(out.len() + channels, 0.0);
                continue;
            }
            let at = (image * op.height + down / zoom) * op.width + right / zoom;
            out.extend_from_slice(&x[at * pitches[0]..][..op.c1]);
            out.extend_from_slice(&x2[at * pitches[1]..][..op.c2]);
        }
    }
    out
}

fn run(
    cx: &mut Context<'_>,
    shape: &Shape,
    case: EpilogueCase,
    cut: Option<Cut>,
    element: Element,
) -> Result<Measured, CudaError> {
    let mut op = descriptor(shape, element);
    let pixels = shape.batch * shape.height * shape.width;
    let pitches = [shape.c1 + case.pad, if shape.c2 > 0 { shape.c2 + case.pad } else { 0 }];
    let x = cx.values(pixels * pitches[0], 1.0, element);
    let x2 = cx.values(pixels * pitches[1], 1.0, element);
    let (rows, columns, depth) = (op.problem().m, shape.cout, op.problem().k);
    let w = cx.values(columns * depth, 1.0 / (depth as f32).sqrt(), element);
    let extent = Extent { rows, columns, rows_per_sample: rows / shape.batch, element };
    let operands = Operands::new(cx, case, extent)?;
    let whole = product(&unfold(&op, &x, &x2, pitches), &w, depth);
    let (all, want) = reference_of_all(&operands, &whole, columns);
    op.x = Rows::new(cx.upload(&x, element)?.ptr, pitches[0]);
    if shape.c2 > 0 {
        op.x2 = Some(Rows::new(cx.upload(&x2, element)?.ptr, pitches[1]));
    }
    op.w = cx.upload(&w, element)?.ptr;
    op.epilogue = operands.epilogue;
    let gpu = cx.gpu;
    operands.measure(cx, &all, &want, || match cut {
        Some(cut) => conv_by(gpu, &op, Pixels::Im2col, cut),
        None => conv(gpu, &op),
    })
}
