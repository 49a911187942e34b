//! Cases of many products of one shape.

use super::random::{ELEMENTS, Shapes, distinct};
use super::{Case, Context, Measured};
use crate::backend::cuda::launch::elementwise::Act;
use crate::backend::cuda::launch::epilogue::{Epilogue, Rows};
use crate::backend::cuda::launch::gemm::Gemm;
use crate::backend::cuda::launch::gemm_batched::{BatchedGemm, gemm_batched, gemm_batched_by};
use crate::backend::cuda::launch::plan::Tile;
use crate::backend::cuda::{CudaError, Element};
use crate::driver::DevicePtr;

#[derive(Clone, Copy, Debug)]
struct Spec {
    batch: usize,
    m: usize,
    n: usize,
    k: usize,
    /// Elements behind the rows of x and of the result.
    pad: usize,
    /// Elements behind every x, every W (times 8) and every result.
    gap: usize,
    has_bias: bool,
    out_f32: bool,
    scale: f32,
    /// Results lie side by side in the same rows instead of one behind the other.
    is_beside: bool,
    /// None: the launcher's choice.
    tile: Option<Tile>,
    element: Element,
}

impl Spec {
    fn new([batch, m, n, k]: [usize; 4], element: Element) -> Self {
        let (pad, gap, has_bias, out_f32, scale) = (0, 0, false, false, 1.0);
        Self { batch, m, n, k, pad, gap, has_bias, out_f32, scale, is_beside: false, tile: None, element }
    }

    fn case(self) -> Case {
        let Self { batch, m, n, k, pad, gap, element, .. } = self;
        let mut name = format!("gemm_batched_{} {batch}x {m}x{n}x{k}", element.suffix());
        for (is_there, word) in [
            (pad > 0, format!(" pitch+{pad}")),
            (gap > 0, format!(" gap {gap}")),
            (self.has_bias, " bias".into()),
            (self.out_f32, " f32".into()),
            (self.is_beside, " side by side".into()),
            (self.scale != 1.0, format!(" times {}", self.scale)),
            (self.tile.is_some(), self.tile.map_or(String::new(), |tile| format!(" {}", tile.shape().name))),
        ] {
            if is_there {
                name.push_str(&word);
            }
        }
        let flops = 2.0 * (batch * m * n * k) as f64;
        let out = if self.out_f32 { 4 } else { element.size() };
        // Sums of k products in float, then one rounding.
        let sums = 2.0 * (k as f64).sqrt() * Element::F32.rounding();
        let rounding = if self.out_f32 { Element::F32.rounding() } else { element.rounding() };
        Case {
            family: "gemm",
            name,
            quick: flops < 2e7,
            needs_gpu: flops > 5e8,
            is_random: false,
            flops,
            bytes: (batch * ((m + n) * k * element.size() + m * n * out)) as f64,
            tolerance: 1.01 * rounding + sums,
            run: Box::new(move |cx| run(cx, &self)),
        }
    }
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for element in ELEMENTS {
        for shape in [[1, 1, 1, 1], [3, 5, 7, 9], [2, 64, 64, 64], [5, 130, 129, 40], [70, 9, 8, 16]] {
            cases.push(Spec::new(shape, element).case());
            cases.push(Spec { out_f32: true, gap: 8, pad: 8, ..Spec::new(shape, element) }.case());
        }
        // Token merging of SD1.5 at 512² and 1024², SDXL's largest attention; scores of heads side by side.
        for shape in [[2, 4096, 1024, 320], [2, 16_384, 256, 320], [2, 4096, 1024, 640]] {
            cases.push(Spec { out_f32: true, ..Spec::new(shape, element) }.case());
        }
        cases.push(Spec { is_beside: true, ..Spec::new([16, 4096, 80, 40], element) }.case());
    }
    cases
}

/// Every tile in every element; what the launcher chooses.
pub(super) fn random(shapes: &mut Shapes) -> Vec<Case> {
    let mut cases = Vec::new();
    for element in ELEMENTS {
        for tile in [Tile::T128x128, Tile::T64x64, Tile::Any] {
            if tile == Tile::T128x128 && element == Element::F32 {
                continue;
            }
            cases.extend(distinct(shapes, |s| {
                let unit = if tile == Tile::Any { 1 } else { 8 };
                let n = if s.once_in(3) { s.odd(1..=140) } else { 8 * s.of(1..=17) };
                let shape = [s.of(1..=4), s.of(1..=140), n, unit * s.of(1..=136 / unit)];
                let spec = Spec {
                    pad: unit * s.below(3),
                    gap: unit * s.below(4),
                    has_bias: s.once_in(2),
                    out_f32: s.once_in(2),
                    scale: s.pick(&[1.0, -0.5]),
                    is_beside: s.once_in(4),
                    tile: Some(tile),
                    ..Spec::new(shape, element)
                };
                spec.case()
            }));
        }
        cases.extend(distinct(shapes, |s| {
            let shape = [s.of(1..=5), s.of(1..=90), s.of(1..=90), s.of(1..=90)];
            Spec { out_f32: s.once_in(2), ..Spec::new(shape, element) }.case()
        }));
    }
    cases
}

fn run(cx: &mut Context<'_>, spec: &Spec) -> Result<Measured, CudaError> {
    let Spec { batch, m, n, k, pad, gap, element, out_f32, scale, .. } = *spec;
    let out_element = if out_f32 { Element::F32 } else { element };
    let (x_pitch, w_pitch) = (k + pad, k.next_multiple_of(8));
    let (x_stride, w_stride) = (m * x_pitch + gap, n * w_pitch + 8 * gap);
    let (out_pitch, out_stride) = match spec.is_beside {
        true => (batch * (n + gap) + pad, n + gap),
        false => (n + pad, m * (n + pad) + gap),
    };
    let x = cx.values(batch * x_stride, 1.0, element);
    let mut w = cx.values(batch * w_stride, 1.0 / (k as f32).sqrt(), element);
    for row in (0..batch).flat_map(|b| (0..n).map(move |row| b * w_stride + row * w_pitch)) {
        w[row + k..row + w_pitch].fill(0.0);
    }
    let bias = cx.values(n, 1.0, Element::F32);
    // What lies between rows and between results must stay as it is.
    let held = if spec.is_beside { m * out_pitch } else { batch * out_stride };
    let values = cx.values(held, 1.0, out_element);
    let out = cx.output_over(&values, out_element)?;
    let mut want: Vec<f64> = values.iter().map(|v| f64::from(*v)).collect();
    for (b, row) in (0..batch).flat_map(|b| (0..m).map(move |row| (b, row))) {
        let x = &x[b * x_stride + row * x_pitch..][..k];
        for column in 0..n {
            let w = &w[b * w_stride + column * w_pitch..][..k];
            let sum: f64 = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
            let bias = if spec.has_bias { f64::from(bias[column]) } else { 0.0 };
            want[b * out_stride + row * out_pitch + column] = (sum + bias) * f64::from(scale);
        }
    }
    let first = Gemm {
        x: Rows::new(cx.upload(&x, element)?.ptr, x_pitch),
        x2: None,
        w: cx.upload(&w, element)?.ptr,
        w_is_constant: false,
        m,
        n,
        k1: k,
        k2: 0,
        rows_per_sample: m,
        element,
        epilogue: Epilogue {
            bias: if spec.has_bias { cx.upload(&bias, Element::F32)?.ptr } else { DevicePtr::NULL },
            act: Act::None,
            scale,
            out_f32: out_f32 && element != Element::F32,
            ..Epilogue::to(Rows::new(out.ptr, out_pitch))
        },
    };
    let op = BatchedGemm { first, batch, x_stride, w_stride, out_stride };
    let gpu = cx.gpu;
    cx.measure(out, out_element, &want, || match spec.tile {
        None => gemm_batched(gpu, &op),
        Some(tile) => gemm_batched_by(gpu, &op, tile),
    })
}
