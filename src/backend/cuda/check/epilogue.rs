//! Epilogues of products: random operands, reference, comparison of what was stored and what was not to be.

use super::context::{Buffer, Context, compare, fault_of_rows};
use super::elementwise::{ACTS, act as activation};
use super::{Fault, Measured};
use crate::backend::cuda::launch::elementwise::Act;
use crate::backend::cuda::launch::epilogue::{Epilogue, Rows};
use crate::backend::cuda::{CudaError, Element};
use crate::driver::DevicePtr;

/// What an epilogue of a case does.
#[derive(Clone, Copy, Debug)]
pub(super) struct EpilogueCase {
    pub bias: bool,
    pub time_bias: bool,
    pub act: Act,
    pub geglu: bool,
    pub scale: f32,
    pub residual: bool,
    /// The residual is the result's own memory.
    pub in_place: bool,
    /// Elements behind each row of result, residual and time bias.
    pub pad: usize,
    pub out_f32: bool,
}

impl EpilogueCase {
    pub(super) const PLAIN: Self = Self {
        bias: false,
        time_bias: false,
        act: Act::None,
        geglu: false,
        scale: 1.0,
        residual: false,
        in_place: false,
        pad: 0,
        out_f32: false,
    };

    /// One of all kinds; a product of `columns` with samples if `has_samples`.
    pub(super) fn random(random: &mut impl FnMut(usize) -> usize, columns: usize, has_samples: bool) -> Self {
        let geglu = columns.is_multiple_of(16) && random(4) == 0;
        let residual = random(2) == 0;
        let out_f32 = random(4) == 0;
        Self {
            bias: random(3) > 0,
            time_bias: has_samples && !geglu && random(2) == 0,
            act: if geglu { Act::None } else { ACTS[random(ACTS.len())] },
            geglu,
            scale: [1.0, 0.5, -1.25][random(3)],
            residual,
            in_place: residual && !out_f32 && random(3) == 0,
            pad: [0, 8, 40, 3][random(4)],
            out_f32,
        }
    }

    /// A few letters for the name of a case.
    pub(super) fn describe(&self) -> String {
        let mut text = String::new();
        let mut add = |on: bool, word: &str| {
            if on {
                text.push(' ');
                text.push_str(word);
            }
        };
        add(self.bias, "bias");
        add(self.time_bias, "time");
        add(self.geglu, "geglu");
        add(self.scale != 1.0, "scale");
        add(self.residual, if self.in_place { "in-place" } else { "residual" });
        add(self.out_f32, "f32");
        add(self.pad != 0, &format!("pad{}", self.pad));
        add(self.act != Act::None, &format!("{:?}", self.act));
        text
    }
}

/// A product's extents.
#[derive(Clone, Copy, Debug)]
pub(super) struct Extent {
    pub rows: usize,
    pub columns: usize,
    pub rows_per_sample: usize,
    pub element: Element,
}

/// An epilogue with its operands.
pub(super) struct Operands {
    case: EpilogueCase,
    extent: Extent,
    /// The launcher's descriptor.
    pub epilogue: Epilogue,
    out: Buffer,
    bias: Vec<f32>,
    time_bias: Vec<f32>,
    residual: Vec<f32>,
}

impl Operands {
    pub(super) fn new(cx: &mut Context<'_>, case: EpilogueCase, extent: Extent) -> Result<Self, CudaError> {
        let Extent { rows, columns, rows_per_sample, element } = extent;
        let width = if case.geglu { columns / 2 } else { columns };
        let pitch = width + case.pad;
        let bias = if case.bias { cx.values(columns, 0.5, Element::F32) } else { Vec::new() };
        let samples = if case.time_bias { rows / rows_per_sample } else { 0 };
        let time_bias = cx.values(samples * width, 0.5, element);
        let residual = cx.values(if case.residual { rows * width } else { 0 }, 1.0, element);
        let device_bias = if case.bias { cx.upload(&bias, Element::F32)?.ptr } else { DevicePtr::NULL };
        let device_time = match case.time_bias {
            true => Some(Rows::new(upload_rows(cx, &time_bias, width, pitch, element)?.ptr, pitch)),
            false => None,
        };
        let stored = if case.out_f32 { Element::F32 } else { element };
        let (out, device_residual) = match (case.residual, case.in_place) {
            (true, true) => {
                let out = upload_rows(cx, &residual, width, pitch, element)?;
                (out, Some(Rows::new(out.ptr, pitch)))
            }
            (true, false) => {
                let own = upload_rows(cx, &residual, width, pitch, element)?;
                (cx.output(span(rows, width, pitch) * stored.size())?, Some(Rows::new(own.ptr, pitch)))
            }
            (false, _) => (cx.output(span(rows, width, pitch) * stored.size())?, None),
        };
        let epilogue = Epilogue {
            bias: device_bias,
            time_bias: device_time,
            act: case.act,
            geglu: case.geglu,
            scale: case.scale,
            residual: device_residual,
            out: Rows::new(out.ptr, pitch),
            out_f32: case.out_f32,
        };
        Ok(Self { case, extent, epilogue, out, bias, time_bias, residual })
    }

    fn width(&self) -> usize {
        self.epilogue.out_columns(self.extent.columns)
    }

    /// The result's row `row` for that row of the product.
    pub(super) fn reference(&self, row: usize, product: &[f64]) -> Vec<f64> {
        let width = self.width();
        let sum = |column: usize| product[column] + self.bias.get(column).map_or(0.0, |b| f64::from(*b));
        (0..width)
            .map(|column| {
                let value = if self.case.geglu {
                    let from = column / 8 * 16 + column % 8;
                    sum(from) * activation(sum(from + 8), Act::Gelu)
                } else {
                    let sample = row / self.extent.rows_per_sample.max(1);
                    let time = self.time_bias.get(sample * width + column).map_or(0.0, |t| f64::from(*t));
                    activation(sum(column) + time, self.case.act)
                };
                let residual = self.residual.get(row * width + column).map_or(0.0, |r| f64::from(*r));
                value * f64::from(self.case.scale) + residual
            })
            .collect()
    }

    /// Launches, compares `rows` of the result with `want`, and looks at everything else: all of the result
    /// is written, nothing between its rows, and a second launch makes the same bits.
    pub(super) fn measure(
        &self,
        cx: &mut Context<'_>,
        rows: &[usize],
        want: &[f64],
        launch: impl Fn() -> Result<(), CudaError>,
    ) -> Result<Measured, CudaError> {
        let (width, pitch) = (self.width(), self.epilogue.out.pitch);
        let element = if self.case.out_f32 { Element::F32 } else { self.extent.element };
        launch()?;
        let Some(bytes) = cx.download(self.out)? else { return Ok(Measured::bad(Fault::BehindTheEnd)) };
        let values = element.decode(&bytes);
        if let Some(fault) = fault_of_rows(&values, width, pitch) {
            return Ok(Measured::bad(fault));
        }
        if self.case.in_place {
            let residual = bytes_of_rows(&self.residual, width, pitch, element);
            cx.gpu.driver().upload(self.out.ptr, &residual, cx.gpu.stream())?;
        }
        launch()?;
        let again = cx.download(self.out)?.unwrap_or_default();
        if let Some(at) = (0..bytes.len()).find(|at| again.get(*at) != bytes.get(*at)) {
            return Ok(Measured::bad(Fault::Unsteady { at }));
        }
        let got: Vec<f32> =
            rows.iter().flat_map(|row| values.iter().skip(row * pitch).take(width).copied()).collect();
        Ok(Measured { micros: cx.time(launch)?, ..compare(&got, want) })
    }

    /// One rounding of the result, and float sums of `k` products: their error grows with the square root of
    /// `k` when every addition rounds, and linearly when tensor cores cut off.
    pub(super) fn tolerance(case: &EpilogueCase, element: Element, k: usize) -> f64 {
        let stored = if case.out_f32 { Element::F32 } else { element };
        stored.rounding() * 1.02 + 2e-5 + 2e-8 * k as f64
    }
}

/// Elements from the first to the last of `rows` rows.
fn span(rows: usize, width: usize, pitch: usize) -> usize {
    if rows == 0 { 0 } else { (rows - 1) * pitch + width }
}

/// Uploads rows `pitch` elements apart; what lies between them is a NaN.
pub(super) fn upload_rows(
    cx: &mut Context<'_>,
    values: &[f32],
    width: usize,
    pitch: usize,
    element: Element,
) -> Result<Buffer, CudaError> {
    cx.upload_bytes(&bytes_of_rows(values, width, pitch, element))
}

fn bytes_of_rows(values: &[f32], width: usize, pitch: usize, element: Element) -> Vec<u8> {
    let size = element.size();
    let rows = values.len() / width.max(1);
    let mut bytes = vec![0xff; span(rows, width, pitch) * size];
    for (to, from) in bytes.chunks_mut(pitch * size).zip(values.chunks(width)) {
        for (to, from) in to.iter_mut().zip(element.encode(from)) {
            *to = from;
        }
    }
    bytes
}

/// All rows of a small product's reference.
pub(super) fn reference_of_all(
    operands: &Operands,
    product: &[f64],
    columns: usize,
) -> (Vec<usize>, Vec<f64>) {
    let want = product.chunks(columns).enumerate().flat_map(|(row, sums)| operands.reference(row, sums));
    ((0..product.len() / columns).collect(), want.collect())
}

/// The rows to compare: all of a small product, some of a large one, the last among them.
pub(super) fn rows_to_compare(cx: &mut Context<'_>, rows: usize, columns: usize, k: usize) -> Vec<usize> {
    let most = (300_000_000 / (columns * k).max(1)).max(8);
    if rows <= most {
        return (0..rows).collect();
    }
    let mut some: Vec<usize> = (1..most).map(|_| cx.random() as usize % rows).collect();
    some.push(rows - 1);
    some
}
