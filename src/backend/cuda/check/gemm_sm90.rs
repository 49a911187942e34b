//! Cases of linear layers on Hopper.

use super::context::error_of;
use super::elementwise::act;
use super::{Case, Context, Measured};
use crate::backend::cuda::launch::elementwise::Act;
use crate::backend::cuda::launch::epilogue::{Epilogue, Rows};
use crate::backend::cuda::launch::gemm::Gemm;
use crate::backend::cuda::launch::gemm_sm90::{gemm, gemm_by};
use crate::backend::cuda::launch::hopper::Cut;
use crate::backend::cuda::{CudaError, Element};

/// What the epilogue of a case does.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Finish {
    pub bias: bool,
    pub act: Act,
    pub geglu: bool,
    pub scale: f32,
    pub residual: bool,
    /// Rows of a sample; 0: no time bias.
    pub time_rows: usize,
    pub out_float: bool,
    /// Elements by which pitches exceed the widths.
    pub gap: usize,
}

impl Finish {
    pub const PLAIN: Self = Self {
        bias: false,
        act: Act::None,
        geglu: false,
        scale: 1.0,
        residual: false,
        time_rows: 0,
        out_float: false,
        gap: 0,
    };
    pub const BIAS: Self = Self { bias: true, ..Self::PLAIN };
    pub const RESIDUAL: Self = Self { residual: true, scale: 0.75, gap: 24, ..Self::BIAS };
    pub const GEGLU: Self = Self { geglu: true, gap: 8, ..Self::BIAS };

    /// One of the combinations, chosen by a random number.
    pub fn random(bits: u64) -> Self {
        let acts = [Act::None, Act::Silu, Act::Gelu, Act::QuickGelu];
        let geglu = bits & 7 == 0;
        Self {
            bias: bits & 8 != 0,
            act: if geglu { Act::None } else { acts[(bits >> 4) as usize % 4] },
            geglu,
            scale: if bits & 64 != 0 { 1.0 } else { -0.5 },
            residual: bits & 128 != 0,
            time_rows: if geglu || bits & 256 != 0 { 0 } else { 1 + (bits >> 9) as usize % 50 },
            out_float: bits >> 16 & 3 == 0,
            gap: (bits >> 18) as usize % 3 * 8,
        }
    }

    pub fn label(&self) -> String {
        let mut text = String::new();
        let mut add = |set: bool, word: &str| {
            if set {
                text.push(' ');
                text.push_str(word);
            }
        };
        add(self.bias, "bias");
        add(self.time_rows > 0, "time");
        add(self.geglu, "geglu");
        add(self.act != Act::None, &format!("{:?}", self.act));
        add(self.scale != 1.0, "scale");
        add(self.residual, "residual");
        add(self.out_float, "float");
        add(self.gap > 0, "gap");
        text
    }
}

/// A product with its epilogue on the device, and what it should give.
pub(super) struct Finished {
    pub epilogue: Epilogue,
    out: super::Buffer,
    /// Without the gaps between rows.
    want: Vec<f64>,
    width: usize,
    /// Element type of `out`.
    element: Element,
}

impl Finished {
    /// Launches and compares; what lies between the rows must stay as it was.
    pub fn measure(
        &self,
        cx: &Context<'_>,
        launch: impl Fn() -> Result<(), CudaError>,
    ) -> Result<Measured, CudaError> {
        launch()?;
        let mut got = Vec::with_capacity(self.want.len());
        let mut intact = false;
        if let Some(bytes) = cx.download(self.out)? {
            let values = self.element.decode(&bytes);
            intact = true;
            for row in values.chunks(self.epilogue.out.pitch) {
                got.extend_from_slice(&row[..self.width]);
                intact &= row[self.width..].iter().all(|v| v.is_nan());
            }
        }
        let error = if intact { error_of(&got, &self.want) } else { f64::INFINITY };
        Ok(Measured { error, micros: cx.time(launch)? })
    }
}

/// Makes the epilogue's operands and applies it to the reference's product `[rows][columns]`.
pub(super) fn finish(
    cx: &mut Context<'_>,
    product: &[f64],
    columns: usize,
    op: &Finish,
    element: Element,
) -> Result<Finished, CudaError> {
    let rows = product.len() / columns;
    let width = if op.geglu { columns / 2 } else { columns };
    let pitch = width + op.gap;
    let bias = if op.bias { cx.values(columns, 0.5, Element::F32) } else { vec![0.0; columns] };
    let residual = if op.residual { cx.values(rows * pitch, 1.0, element) } else { vec![0.0; rows * pitch] };
    let samples = if op.time_rows > 0 { rows.div_ceil(op.time_rows) } else { 0 };
    let time = cx.values(samples * pitch, 0.5, element);
    let out_element = if op.out_float { Element::F32 } else { element };
    let mut want = vec![0.0; rows * width];
    for r in 0..rows {
        for c in 0..width {
            let at = |column: usize| product[r * columns + column] + f64::from(bias[column]);
            let value = if op.geglu {
                let value = c / 8 * 16 + c % 8;
                at(value) * act(at(value + 8), Act::Gelu)
            } else {
                let shift = if samples > 0 { f64::from(time[r / op.time_rows * pitch + c]) } else { 0.0 };
                act(at(c) + shift, op.act)
            };
            want[r * width + c] = value * f64::from(op.scale) + f64::from(residual[r * pitch + c]);
        }
    }
    let out = cx.output((rows * pitch - op.gap) * out_element.size())?;
    let mut upload = |set: bool, values: &[f32], element: Element| -> Result<Option<Rows>, CudaError> {
        if set { Ok(Some(Rows::new(cx.upload(values, element)?.ptr, pitch))) } else { Ok(None) }
    };
    let epilogue = Epilogue {
        bias: upload(op.bias, &bias, Element::F32)?.unwrap_or_default().ptr,
        time_bias: upload(samples > 0, &time, element)?,
        act: op.act,
        geglu: op.geglu,
        scale: op.scale,
        residual: upload(op.residual, &residual, element)?,
        out: Rows::new(out.ptr, pitch),
        out_f32: op.out_float,
    };
    Ok(Finished { epilogue, out, want, width, element: out_element })
}

/// Error of one rounding of the result, and of sums in single precision; partial sums have at most that order of magnitude.
pub(super) fn tolerance(element: Element, op: &Finish) -> f64 {
    let stored = if op.out_float { Element::F32 } else { element };
    stored.rounding() * 1.01 + 3e-5
}

/// Rows, columns, K and K of the second operand.
#[derive(Clone, Copy, Debug)]
struct Shape(usize, usize, usize, usize);

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for element in [Element::F16, Element::BF16] {
        for (shape, op) in [
            (Shape(128, 128, 64, 0), Finish::PLAIN),
            (Shape(64, 160, 128, 0), Finish::BIAS),
            (Shape(200, 320, 320, 0), Finish::RESIDUAL),
            (Shape(130, 512, 192, 0), Finish::GEGLU),
            (Shape(300, 640, 104, 72), Finish::RESIDUAL),
            (Shape(77, 320, 768, 0), Finish::BIAS),
            (Shape(140, 320, 128, 0), Finish { act: Act::Relu, ..Finish::BIAS }),
            (Shape(300, 160, 72, 0), Finish { act: Act::LeakyRelu, ..Finish::RESIDUAL }),
            (Shape(128, 1280, 1280, 0), Finish::RESIDUAL),
            (Shape(128, 320, 2048, 0), Finish::GEGLU),
        ] {
            cases.push(case(shape, op, None, element));
        }
        for (width, splits) in [(128, 3), (128, 5), (160, 1), (160, 2), (256, 1), (256, 4)] {
            let op = Finish { scale: 1.5, residual: true, ..Finish::GEGLU };
            cases.push(case(
                Shape(150, 480, 264, 0),
                op,
                Some(Cut { width, splits, pair: 1 + width / 160 % 2 }),
                element,
            ));
        }
        let mut bits = 0x0123_4567_89ab_cdef_u64;
        for i in 0..24 {
            bits = bits.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let op = Finish::random(bits >> 20);
            let number = |shift: u32, range: usize| (bits >> shift) as usize % range;
            let columns = 64 + number(24, 40) * 16;
            let second = if number(50, 3) == 0 { 8 + 8 * number(52, 20) } else { 0 };
            let rows = 64 + number(33, 300);
            let rows = if op.time_rows > 0 { rows.next_multiple_of(op.time_rows) } else { rows };
            let shape = Shape(rows, columns, 8 + 8 * number(42, 60), second);
            // Widths and splits in turn, whatever the launcher would choose.
            let steps = shape.2.div_ceil(64) + shape.3.div_ceil(64);
            let cut = Cut {
                width: [128, 160, 256][i % 3],
                splits: (1 + i / 3).min(steps).min(8 / (1 + i % 2)),
                pair: 1 + i % 2,
            };
            cases.push(case(shape, op, Some(cut), element));
        }
        for (shape, op) in REAL {
            cases.push(case(*shape, *op, None, element));
        }
    }
    cases
}

/// Layers of the UNets of SD1.5 at 512² and SDXL at 1024², two samples.
const REAL: &[(Shape, Finish)] = &[
    (Shape(8192, 320, 320, 0), Finish::RESIDUAL),
    (Shape(8192, 2560, 320, 0), Finish::GEGLU),
    (Shape(8192, 320, 1280, 0), Finish::RESIDUAL),
    (Shape(2048, 640, 640, 0), Finish::RESIDUAL),
    (Shape(2048, 5120, 640, 0), Finish::GEGLU),
    (Shape(2048, 640, 2560, 0), Finish::RESIDUAL),
    (Shape(512, 1280, 1280, 0), Finish::RESIDUAL),
    (Shape(512, 10240, 1280, 0), Finish::GEGLU),
    (Shape(512, 1280, 5120, 0), Finish::RESIDUAL),
    (Shape(154, 1280, 768, 0), Finish::PLAIN),
    (Shape(512, 1280, 1280, 1280), Finish::BIAS),
    (Shape(2048, 1280, 1280, 0), Finish::RESIDUAL),
    (Shape(2048, 10240, 1280, 0), Finish::GEGLU),
    (Shape(2048, 1280, 5120, 0), Finish::RESIDUAL),
    (Shape(8192, 640, 640, 0), Finish::RESIDUAL),
    (Shape(8192, 5120, 640, 0), Finish::GEGLU),
    (Shape(4096, 4096, 4096, 0), Finish::PLAIN),
];

fn case(shape: Shape, op: Finish, cut: Option<Cut>, element: Element) -> Case {
    let Shape(rows, columns, k, k2) = shape;
    let flops = 2.0 * rows as f64 * columns as f64 * (k + k2) as f64;
    let forced = cut.map_or(String::new(), |cut| format!(" by {}/{} x{}", cut.width, cut.splits, cut.pair));
    let concat = if k2 > 0 { format!("+{k2}") } else { String::new() };
    Case {
        family: "gemm_sm90",
        name: format!("gemm_sm90_{} {rows}x{columns}x{k}{concat}{}{forced}", element.suffix(), op.label()),
        quick: flops < 6e7,
        needs_gpu: flops > 2e9,
        flops,
        bytes: ((rows * (k + k2) + columns * (k + k2) + rows * columns) * element.size()) as f64,
        tolerance: tolerance(element, &op),
        run: Box::new(move |cx| run(cx, shape, &op, cut, element)),
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
    op: &Finish,
    cut: Option<Cut>,
    element: Element,
) -> Result<Measured, CudaError> {
    let Shape(rows, columns, k, k2) = shape;
    let depth = k + k2;
    let (x_pitch, x2_pitch) = (k + op.gap, if k2 > 0 { k2 + op.gap } else { 0 });
    let x = cx.values(rows * x_pitch, 1.0, element);
    let x2 = cx.values(rows * x2_pitch, 1.0, element);
    let w = cx.values(columns * depth, 1.0 / (depth as f32).sqrt(), element);
    let mut a = Vec::with_capacity(rows * depth);
    for r in 0..rows {
        a.extend_from_slice(&x[r * x_pitch..][..k]);
        a.extend_from_slice(&x2[r * x2_pitch..][..k2]);
    }
    let finished = finish(cx, &product(&a, &w, depth), columns, op, element)?;
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
        rows_per_sample: op.time_rows,
        element,
        epilogue: finished.epilogue,
    };
    finished.measure(cx, || match cut {
        Some(cut) => gemm_by(gpu, &gemm_op, cut),
        None => gemm(gpu, &gemm_op),
    })
}
