//! Cases of linear layers.

use rayon::prelude::*;

use super::epilogue::{EpilogueCase, Extent, Operands, rows_to_compare, upload_rows};
use super::random::{HALVES, Shapes, distinct};
use super::{Case, Context, Measured};
use crate::backend::cuda::launch::elementwise::Act;
use crate::backend::cuda::launch::epilogue::Rows;
use crate::backend::cuda::launch::gemm::{Choice, Gemm, gemm, gemm_by};
use crate::backend::cuda::launch::plan::{Plan, Tile};
use crate::backend::cuda::{CudaError, Element};

/// One product.
#[derive(Clone, Copy, Debug)]
struct Spec {
    m: usize,
    n: usize,
    k1: usize,
    k2: usize,
    /// Elements behind the rows of x and x2.
    pad: usize,
    rows_per_sample: usize,
    /// Kernel and splits; none: what the launcher chooses.
    force: Option<(Tile, usize)>,
    epilogue: EpilogueCase,
    element: Element,
}

impl Spec {
    fn plain(m: usize, n: usize, k: usize, element: Element) -> Self {
        let epilogue = EpilogueCase { bias: true, ..EpilogueCase::PLAIN };
        Self { m, n, k1: k, k2: 0, pad: 0, rows_per_sample: m, force: None, epilogue, element }
    }

    fn name(&self) -> String {
        let Self { m, n, k1, k2, pad, force, element, .. } = self;
        let mut name = format!("gemm_{} {m}x{n}x{k1}", element.suffix());
        if *k2 > 0 {
            name.push_str(&format!("+{k2}"));
        }
        if *pad > 0 {
            name.push_str(&format!(" pitch+{pad}"));
        }
        name.push_str(&self.epilogue.describe());
        if let Some((tile, splits)) = force {
            name.push_str(&format!(" {} /{splits}", tile.shape().name));
        }
        name
    }

    fn case(self) -> Case {
        let k = self.k1 + self.k2;
        let flops = 2.0 * (self.m * self.n * k) as f64;
        let width = if self.epilogue.geglu { self.n / 2 } else { self.n };
        let results = if self.epilogue.residual { 2 } else { 1 };
        Case {
            family: "gemm",
            name: self.name(),
            quick: flops < 2e7,
            needs_gpu: flops > 5e8,
            is_random: false,
            flops,
            bytes: ((self.m * k + self.n * k + results * self.m * width) * self.element.size()) as f64,
            tolerance: Operands::tolerance(&self.epilogue, self.element, k),
            run: Box::new(move |cx| run(cx, &self)),
        }
    }
}

pub(super) fn cases() -> Vec<Case> {
    let mut specs = Vec::new();
    for element in HALVES {
        every_tile(element, &mut specs);
        few_rows(element, &mut specs);
        odd(element, &mut specs);
        real(element, &mut specs);
    }
    float(&mut specs);
    specs.into_iter().map(Spec::case).collect()
}

/// Each tile with one block and with several, with fewer and more tiles of K than stages, and splits.
fn every_tile(element: Element, specs: &mut Vec<Spec>) {
    for tile in Tile::ALIGNED.into_iter().chain([Tile::Any]) {
        let shape = tile.shape();
        for (m, n, k, splits) in [
            (shape.m, shape.n, 8, 1),
            (shape.m, shape.n, 4 * shape.k, 1),
            (shape.m + 9, shape.n + 16, 7 * shape.k + 24, 1),
            (2 * shape.m + 1, shape.n - 8, 5 * shape.k, 3),
            (40, 2 * shape.n, 6 * shape.k + 8, 2),
        ] {
            let plain = Spec::plain(m, n, k, element);
            specs.push(Spec { force: Some((tile, splits)), ..plain });
        }
        let geglu = EpilogueCase { bias: true, geglu: true, residual: true, ..EpilogueCase::PLAIN };
        let fused = EpilogueCase { bias: true, act: Act::Gelu, residual: true, ..EpilogueCase::PLAIN };
        for (epilogue, splits) in [(geglu, 1), (geglu, 3), (fused, 1)] {
            let plain = Spec::plain(shape.m + 20, 2 * shape.n + 32, 96 * 2, element);
            specs.push(Spec { force: Some((tile, splits)), epilogue, ..plain });
        }
    }
}

/// Time embeddings and the like.
fn few_rows(element: Element, specs: &mut Vec<Spec>) {
    let silu = EpilogueCase { bias: true, act: Act::Silu, ..EpilogueCase::PLAIN };
    for (m, n, k1, k2) in
        [(1, 8, 8, 0), (2, 1280, 320, 0), (2, 323, 1280, 0), (5, 77, 264, 1024), (16, 96, 136, 8)]
    {
        specs.push(Spec { k2, epilogue: silu, ..Spec::plain(m, n, k1, element) });
        let all = EpilogueCase { residual: true, time_bias: true, pad: 8, scale: 0.5, ..silu };
        specs.push(Spec { k2, epilogue: all, pad: 16, rows_per_sample: 1, ..Spec::plain(m, n, k1, element) });
    }
}

/// Nothing a multiple of anything.
fn odd(element: Element, specs: &mut Vec<Spec>) {
    for (m, n, k1, k2, pad) in [
        (1, 1, 1, 0, 0),
        (3, 5, 7, 0, 1),
        (65, 67, 129, 0, 0),
        (33, 130, 31, 34, 5),
        (130, 63, 100, 3, 2),
        (17, 81, 72, 9, 0),
    ] {
        let epilogue = EpilogueCase { bias: true, residual: true, pad, ..EpilogueCase::PLAIN };
        specs.push(Spec { k2, pad, epilogue, ..Spec::plain(m, n, k1, element) });
    }
}

/// Of every tile as many, whole and split; of the kernel for few rows; and of what the launcher chooses.
pub(super) fn random(shapes: &mut Shapes) -> Vec<Case> {
    let mut cases = Vec::new();
    for element in HALVES {
        for tile in Tile::ALIGNED.into_iter().chain([Tile::Any]) {
            cases.extend(distinct(shapes, |s| {
                let spec = random_spec(s, element, 190, if tile == Tile::Any { 1 } else { 8 });
                Spec { force: Some((tile, s.of(1..=4))), ..spec }.case()
            }));
        }
        cases.extend(distinct(shapes, |s| random_spec(s, element, 190, 8).case()));
        cases.extend(distinct(shapes, |s| {
            let spec = random_spec(s, element, 5, 8);
            let is_plain = !spec.epilogue.geglu;
            Spec { epilogue: if is_plain { spec.epilogue } else { EpilogueCase::PLAIN }, ..spec }.case()
        }));
    }
    cases.extend(random_float(shapes));
    cases
}

/// Up to three samples of up to `rows` rows; depths and pitches in multiples of `unit`.
fn random_spec(s: &mut Shapes, element: Element, rows: usize, unit: usize) -> Spec {
    let (samples, rows_per_sample) = (s.pick(&[1, 1, 2, 3]), s.of(1..=rows));
    let m = samples * rows_per_sample.div_ceil(samples);
    let n = if s.once_in(3) { s.odd(1..=330) } else { 8 * s.of(1..=44) };
    let k2 = if s.once_in(3) { unit * s.of(1..=160 / unit) } else { 0 };
    let (k1, pad) = (unit * s.of(1..=256 / unit), s.pick(&[0, unit, 3 * unit]));
    let epilogue = EpilogueCase::random(&mut |below| s.below(below), n, true);
    Spec { m, n, k1, k2, pad, rows_per_sample: m / samples, force: None, epilogue, element }
}

/// Products in f32.
fn float(specs: &mut Vec<Spec>) {
    let residual = EpilogueCase { bias: true, residual: true, ..EpilogueCase::PLAIN };
    for (m, n, k) in [(8192, 320, 320), (512, 1280, 1280), (154, 3072, 768)] {
        specs.push(Spec { epilogue: residual, ..Spec::plain(m, n, k, Element::F32) });
    }
}

/// In f32, where the launcher takes the large tile where there are enough of them, the small one elsewhere, `any` for
/// what is not aligned, and splits sums of more than 256 products.
fn random_float(shapes: &mut Shapes) -> Vec<Case> {
    let aligned = |s: &mut Shapes, rows| random_spec(s, Element::F32, rows, 8);
    let mut cases = distinct(shapes, |s| aligned(s, 190).case());
    cases.extend(distinct(shapes, |s| {
        let spec = aligned(s, 60);
        let rows_per_sample = s.of(129..=190);
        let (m, n) = (2 * rows_per_sample, 16 * s.of(17..=24));
        Spec { m, n, rows_per_sample, k1: 8 * s.of(1..=9), ..spec }.case()
    }));
    cases.extend(distinct(shapes, |s| {
        let spec = random_spec(s, Element::F32, 190, 1);
        Spec { k1: spec.k1 | 1, ..spec }.case()
    }));
    cases.extend(distinct(shapes, |s| {
        let spec = aligned(s, 60);
        let (n, k1) = (16 * s.of(1..=3), 8 * s.of(64..=100));
        Spec { n, k1, ..spec }.case()
    }));
    cases
}

/// Layers of SD1.5 at 512², cfg pair, its text encoder, and the largest and the odd ones of SDXL at 1024².
fn real(element: Element, specs: &mut Vec<Spec>) {
    let residual = EpilogueCase { bias: true, residual: true, ..EpilogueCase::PLAIN };
    let geglu = EpilogueCase { bias: true, geglu: true, ..EpilogueCase::PLAIN };
    for (m, n, k1, k2, epilogue) in [
        (8192, 320, 320, 0, residual),
        (2048, 640, 640, 0, residual),
        (512, 1280, 1280, 0, residual),
        (128, 1280, 1280, 0, residual),
        (8192, 2560, 320, 0, geglu),
        (2048, 5120, 640, 0, geglu),
        (512, 10240, 1280, 0, geglu),
        (128, 10240, 1280, 0, geglu),
        (8192, 320, 1280, 0, residual),
        (2048, 640, 2560, 0, residual),
        (512, 1280, 5120, 0, residual),
        (128, 1280, 5120, 0, residual),
        (8192, 320, 320, 320, residual),
        (8192, 320, 640, 320, residual),
        (2048, 640, 1280, 640, residual),
        (512, 1280, 1280, 1280, residual),
        (128, 1280, 1280, 1280, residual),
        (154, 320, 768, 0, EpilogueCase::PLAIN),
        (154, 1280, 768, 0, EpilogueCase::PLAIN),
        (154, 768, 768, 0, residual),
        (154, 3072, 768, 0, EpilogueCase { bias: true, act: Act::QuickGelu, ..EpilogueCase::PLAIN }),
        (154, 768, 3072, 0, residual),
        (2, 1280, 1280, 0, EpilogueCase { bias: true, act: Act::Silu, ..EpilogueCase::PLAIN }),
        (2048, 10240, 1280, 0, geglu),
        (2048, 1280, 1280, 0, residual),
        (2048, 1280, 5120, 0, residual),
        (8192, 5120, 640, 0, geglu),
        (8192, 640, 640, 0, residual),
        // A ControlNet's outputs at a strength, added to those of the net before; a PReLU.
        (8192, 320, 320, 0, EpilogueCase { scale: 0.6, ..residual }),
        (128, 1280, 1280, 0, EpilogueCase { scale: 0.6, bias: true, ..EpilogueCase::PLAIN }),
        (4096, 64, 64, 64, EpilogueCase::PLAIN),
        // SDXL's vector of sizes, prompt, and text encoders; SD2.x's text encoder.
        (2, 1280, 2816, 0, EpilogueCase { bias: true, act: Act::Silu, ..EpilogueCase::PLAIN }),
        (2, 1280, 1280, 0, residual),
        (154, 2560, 2048, 0, EpilogueCase::PLAIN),
        (154, 5120, 1280, 0, EpilogueCase { bias: true, act: Act::Gelu, ..EpilogueCase::PLAIN }),
        (1, 1280, 1280, 0, EpilogueCase::PLAIN),
        (154, 4096, 1024, 0, EpilogueCase { bias: true, act: Act::Gelu, ..EpilogueCase::PLAIN }),
    ] {
        specs.push(Spec { k2, epilogue, ..Spec::plain(m, n, k1, element) });
    }
}

fn run(cx: &mut Context<'_>, spec: &Spec) -> Result<Measured, CudaError> {
    let Spec { m, n, k1, k2, pad, rows_per_sample, element, .. } = *spec;
    let k = k1 + k2;
    let x = cx.values(m * k1, 1.0, element);
    let x2 = cx.values(m * k2, 1.0, element);
    let w = cx.values(n * k, 1.0 / (k as f32).sqrt(), element);
    let extent = Extent { rows: m, columns: n, rows_per_sample, element };
    let operands = Operands::new(cx, spec.epilogue, extent)?;

    let kp = k.next_multiple_of(8);
    let mut packed = vec![0.0; n * kp];
    for (to, from) in packed.chunks_mut(kp).zip(w.chunks(k)) {
        to[..k].copy_from_slice(from);
    }
    let op = Gemm {
        w_is_constant: false,
        x: Rows::new(upload_rows(cx, &x, k1, k1 + pad, element)?.ptr, k1 + pad),
        x2: match k2 {
            0 => None,
            _ => Some(Rows::new(upload_rows(cx, &x2, k2, k2 + pad, element)?.ptr, k2 + pad)),
        },
        w: cx.upload(&packed, element)?.ptr,
        m,
        n,
        k1,
        k2,
        rows_per_sample,
        element,
        epilogue: operands.epilogue,
    };
    let rows = rows_to_compare(cx, m, n, k);
    let want: Vec<f64> = rows
        .par_iter()
        .flat_map_iter(|row| {
            let input: Vec<f64> = x[row * k1..(row + 1) * k1]
                .iter()
                .chain(&x2[row * k2..(row + 1) * k2])
                .map(|v| f64::from(*v))
                .collect();
            let product: Vec<f64> =
                w.chunks(k).map(|w| w.iter().zip(&input).map(|(w, x)| f64::from(*w) * x).sum()).collect();
            operands.reference(*row, &product)
        })
        .collect();
    let gpu = cx.gpu;
    operands.measure(cx, &rows, &want, || match spec.force {
        None => gemm(gpu, &op),
        Some((tile, splits)) => gemm_by(gpu, &op, Choice::Tiles(Plan::new(&op.problem(), tile, splits))),
    })
}
