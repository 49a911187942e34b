//! Cases of linear layers on Hopper.

use super::epilogue::{EpilogueCase, Extent, Operands, reference_of_all};
use super::random::{HALVES, Shapes, distinct};
use super::{Case, Context, Measured};
use crate::backend::cuda::launch::elementwise::Act;
use crate::backend::cuda::launch::epilogue::Rows;
use crate::backend::cuda::launch::gemm::Gemm;
use crate::backend::cuda::launch::gemm_sm90::{gemm, gemm_by};
use crate::backend::cuda::launch::hopper::Cut;
pub(super) use crate::backend::cuda::launch::hopper::Finish;
use crate::backend::cuda::{CudaError, Element};

pub(super) const PLAIN: EpilogueCase = EpilogueCase::PLAIN;
pub(super) const BIAS: EpilogueCase = EpilogueCase { bias: true, ..PLAIN };
pub(super) const RESIDUAL: EpilogueCase = EpilogueCase { residual: true, scale: 0.75, pad: 24, ..BIAS };
const GEGLU: EpilogueCase = EpilogueCase { geglu: true, pad: 8, ..BIAS };

/// A random epilogue and cut for the kernel of this width and finish; `steps` of K.
pub(super) fn random_finish(
    s: &mut Shapes,
    finish: Finish,
    width: usize,
    steps: usize,
) -> (EpilogueCase, Cut) {
    let base = EpilogueCase { bias: !s.once_in(3), pad: 8 * s.below(4), ..PLAIN };
    let residual = s.once_in(2);
    let with_residual = EpilogueCase {
        residual,
        in_place: residual && s.once_in(2),
        scale: s.pick(&[1.0, 0.5, -1.25]),
        ..base
    };
    let pair = s.of(1..=2);
    let whole = Cut { width, splits: 1, pair };
    match finish {
        Finish::Plain => (EpilogueCase { act: s.pick(&[Act::None, Act::LeakyRelu]), ..with_residual }, whole),
        Finish::Time => (EpilogueCase { time_bias: true, ..base }, whole),
        Finish::Geglu => (EpilogueCase { geglu: true, ..base }, whole),
        Finish::Any => {
            let splits = s.of(1..=steps.min(8 / pair));
            let act = s.pick(&[Act::Silu, Act::Gelu, Act::QuickGelu, Act::Relu]);
            let any = match s.below(3) {
                0 => EpilogueCase { geglu: true, residual: true, in_place: false, ..with_residual },
                1 => EpilogueCase { act, time_bias: s.once_in(2), ..with_residual },
                _ => {
                    EpilogueCase { out_f32: true, in_place: false, time_bias: s.once_in(2), ..with_residual }
                }
            };
            (any, Cut { splits, ..whole })
        }
    }
}

/// Error of one rounding of the result, and of sums in single precision; partial sums have at most that order of magnitude.
pub(super) fn tolerance(element: Element, op: &EpilogueCase) -> f64 {
    let stored = if op.out_f32 { Element::F32 } else { element };
    stored.rounding() * 1.01 + 3e-5
}

/// Rows, columns, K and K of the second operand.
#[derive(Clone, Copy, Debug)]
struct Shape(usize, usize, usize, usize);

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for element in HALVES {
        for (shape, op) in [
            (Shape(128, 128, 64, 0), PLAIN),
            (Shape(64, 160, 128, 0), BIAS),
            (Shape(200, 320, 320, 0), RESIDUAL),
            (Shape(130, 512, 192, 0), GEGLU),
            (Shape(300, 640, 104, 72), RESIDUAL),
            (Shape(77, 320, 768, 0), BIAS),
            (Shape(140, 320, 128, 0), EpilogueCase { act: Act::Relu, ..BIAS }),
            (Shape(300, 160, 72, 0), EpilogueCase { act: Act::LeakyRelu, ..RESIDUAL }),
            (Shape(128, 1280, 1280, 0), RESIDUAL),
            (Shape(128, 320, 2048, 0), GEGLU),
        ] {
            cases.push(case(shape, op, None, element));
        }
        for (width, splits) in [(128, 3), (128, 5), (160, 1), (160, 2), (256, 1), (256, 4)] {
            let op = EpilogueCase { scale: 1.5, residual: true, ..GEGLU };
            let cut = Cut { width, splits, pair: 1 + width / 160 % 2 };
            cases.push(case(Shape(150, 480, 264, 0), op, Some(cut), element));
        }
        for (shape, op) in REAL {
            cases.push(case(*shape, *op, None, element));
        }
    }
    cases
}

/// Of every width and finish as many.
pub(super) fn random(shapes: &mut Shapes) -> Vec<Case> {
    let mut cases = Vec::new();
    for element in HALVES {
        for width in [128, 160, 256] {
            for finish in [Finish::Plain, Finish::Geglu, Finish::Any] {
                cases.extend(distinct(shapes, |s| random_case(s, width, finish, element)));
            }
        }
    }
    cases
}

fn random_case(s: &mut Shapes, width: usize, finish: Finish, element: Element) -> Case {
    let (k1, k2) = (8 * s.of(1..=26), if s.once_in(3) { 8 * s.of(1..=20) } else { 0 });
    let (op, cut) = random_finish(s, finish, width, k1.div_ceil(64) + k2.div_ceil(64));
    let columns = if op.geglu { 16 * s.of(4..=25) } else { 8 * s.of(8..=50) };
    let rows = s.of(64..=330);
    // Samples with a time bias are of any number of rows, also in a tile.
    let rows = if op.time_bias { rows.next_multiple_of(3) } else { rows };
    case(Shape(rows, columns, k1, k2), op, Some(cut), element)
}

/// Layers of the UNets of SD1.5 at 512² and SDXL at 1024², two samples.
const REAL: &[(Shape, EpilogueCase)] = &[
    (Shape(8192, 320, 320, 0), RESIDUAL),
    (Shape(8192, 2560, 320, 0), GEGLU),
    (Shape(8192, 320, 1280, 0), RESIDUAL),
    (Shape(2048, 640, 640, 0), RESIDUAL),
    (Shape(2048, 5120, 640, 0), GEGLU),
    (Shape(2048, 640, 2560, 0), RESIDUAL),
    (Shape(512, 1280, 1280, 0), RESIDUAL),
    (Shape(512, 10240, 1280, 0), GEGLU),
    (Shape(512, 1280, 5120, 0), RESIDUAL),
    (Shape(154, 1280, 768, 0), PLAIN),
    (Shape(512, 1280, 1280, 1280), BIAS),
    (Shape(2048, 1280, 1280, 0), RESIDUAL),
    (Shape(2048, 10240, 1280, 0), GEGLU),
    (Shape(2048, 1280, 5120, 0), RESIDUAL),
    (Shape(8192, 640, 640, 0), RESIDUAL),
    (Shape(8192, 5120, 640, 0), GEGLU),
    (Shape(4096, 4096, 4096, 0), PLAIN),
];

fn case(shape: Shape, op: EpilogueCase, cut: Option<Cut>, element: Element) -> Case {
    let Shape(rows, columns, k, k2) = shape;
    let flops = 2.0 * rows as f64 * columns as f64 * (k + k2) as f64;
    let forced = cut.map_or(String::new(), |cut| format!(" by {cut}"));
    let concat = if k2 > 0 { format!("+{k2}") } else { String::new() };
    Case {
        family: "gemm_sm90",
        name: format!("gemm_sm90_{} {rows}x{columns}x{k}{concat}{}{forced}", element.suffix(), op.describe()),
        quick: flops < 6e7,
        needs_gpu: flops > 2e9,
        is_random: false,
        flops,
        bytes: ((rows * (k + k2) + columns * (k + k2) + rows * columns) * element.size()) as f64,
        tolerance: tolerance(element, &op),
        run: Box::new(move |cx| run(cx, shape, op, cut, element)),
    }
}

/// `a[rows][k] · b[columns][k]ᵀ` in f64, rows in parallel.
pub(super) fn product(a: &[f32], b: &[f32], k: usize) -> Vec<f64> {
    use rayon::prelude::*;
    let columns = b.len() / k;
    let mut out = vec![0.0; a.len() / k * columns];
    out.par_chunks_mut(columns).zip(a.par_chunks(k)).for_each(|(out, row)| {
        for (out, column) in out.iter_mut().zip(b.chunks(k)) {
            // Eight sums, so that the compiler can use vectors.
            let mut sums = [0.0f64; 8];
            for (x, y) in row.chunks(8).zip(column.chunks(8)) {
                for (sum, (x, y)) in sums.iter_mut().zip(x.iter().zip(y)) {
                    *sum += f64::from(*x) * f64::from(*y);
                }
            }
            *out = sums.iter().sum();
        }
    });
    out
}

fn run(
    cx: &mut Context<'_>,
    shape: Shape,
    op: EpilogueCase,
    cut: Option<Cut>,
    element: Element,
) -> Result<Measured, CudaError> {
    let Shape(rows, columns, k, k2) = shape;
    let depth = k + k2;
    let (x_pitch, x2_pitch) = (k + op.pad, if k2 > 0 { k2 + op.pad } else { 0 });
    let x = cx.values(rows * x_pitch, 1.0, element);
    let x2 = cx.values(rows * x2_pitch, 1.0, element);
    let w = cx.values(columns * depth, 1.0 / (depth as f32).sqrt(), element);
    let mut a = Vec::with_capacity(rows * depth);
    for r in 0..rows {
        a.extend_from_slice(&x[r * x_pitch..][..k]);
        a.extend_from_slice(&x2[r * x2_pitch..][..k2]);
    }
    let rows_per_sample = if op.time_bias { rows / 3 } else { rows };
    let operands = Operands::new(cx, op, Extent { rows, columns, rows_per_sample, element })?;
    let (all, want) = reference_of_all(&operands, &product(&a, &w, depth), columns);
    let gpu = cx.gpu;
    let gemm_op = Gemm {
        x: Rows::new(cx.upload(&x, element)?.ptr, x_pitch),
        x2: if k2 > 0 { Some(Rows::new(cx.upload(&x2, element)?.ptr, x2_pitch)) } else { None },
        w: cx.upload(&w, element)?.ptr,
        w_is_constant: rows % 2 == 0,
        m: rows,
        n: columns,
        k1: k,
        k2,
        rows_per_sample,
        element,
        epilogue: operands.epilogue,
    };
    operands.measure(cx, &all, &want, || match cut {
        Some(cut) => gemm_by(gpu, &gemm_op, cut),
        None => gemm(gpu, &gemm_op),
    })
}
