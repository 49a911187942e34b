//! Cases of convolutions.

use rayon::prelude::*;

use super::epilogue::{EpilogueCase, Extent, Operands, rows_to_compare, upload_rows};
use super::random::{HALVES, Shapes, distinct};
use super::{Case, Context, Measured, wide};
use crate::backend::cuda::launch::conv::{Choice, Conv, Padding, conv, conv_by};
use crate::backend::cuda::launch::elementwise::Act;
use crate::backend::cuda::launch::epilogue::{Epilogue, Rows};
use crate::backend::cuda::launch::plan::{Plan, Tile};
use crate::backend::cuda::{CudaError, Element};
use crate::driver::DevicePtr;

/// One convolution.
#[derive(Clone, Copy, Debug)]
struct Spec {
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
    /// Elements behind the pixels of x and x2.
    pad: usize,
    /// Tile and splits; none: what the launcher chooses.
    force: Option<(Tile, usize)>,
    epilogue: EpilogueCase,
    element: Element,
}

const BIAS: EpilogueCase = EpilogueCase { bias: true, ..EpilogueCase::PLAIN };

impl Spec {
    /// 3x3, stride 1, padding 1.
    fn plain(image: [usize; 3], c1: usize, cout: usize, element: Element) -> Self {
        let [batch, height, width] = image;
        Self {
            batch,
            height,
            width,
            c1,
            c2: 0,
            cout,
            kernel: [3, 3],
            stride: 1,
            padding: Padding::all(1),
            upsample: false,
            pad: 0,
            force: None,
            epilogue: BIAS,
            element,
        }
    }

    /// The descriptor without addresses.
    fn shape(&self) -> Conv {
        Conv {
            w_is_constant: false,
            x: Rows::new(DevicePtr::NULL, self.c1 + self.pad),
            x2: (self.c2 > 0).then(|| Rows::new(DevicePtr::NULL, self.c2 + self.pad)),
            w: DevicePtr::NULL,
            batch: self.batch,
            height: self.height,
            width: self.width,
            c1: self.c1,
            c2: self.c2,
            cout: self.cout,
            kernel: self.kernel,
            stride: self.stride,
            padding: self.padding,
            upsample: self.upsample,
            element: self.element,
            epilogue: Epilogue::to(Rows::default()),
        }
    }

    fn name(&self) -> String {
        let Self { batch, height, width, c1, c2, cout, kernel, stride, padding, .. } = self;
        let mut name = format!("conv_{} {batch}x{height}x{width}x{c1}", self.element.suffix());
        if *c2 > 0 {
            name.push_str(&format!("+{c2}"));
        }
        name.push_str(&format!(" to {cout} {}x{} s{stride}", kernel[0], kernel[1]));
        let Padding { top, bottom, left, right } = *padding;
        name.push_str(&format!(" p{top}{bottom}{left}{right}"));
        if self.upsample {
            name.push_str(" up");
        }
        if self.pad > 0 {
            name.push_str(&format!(" pitch+{}", self.pad));
        }
        name.push_str(&self.epilogue.describe());
        if let Some((tile, splits)) = self.force {
            name.push_str(&format!(" {} /{splits}", tile.shape().name));
        }
        name
    }

    fn case(self) -> Case {
        let problem = self.shape().problem();
        let channels = self.c1 + self.c2;
        let k = self.kernel[0] * self.kernel[1] * channels;
        let flops = 2.0 * (problem.m * self.cout * k) as f64;
        let results = if self.epilogue.residual { 2 } else { 1 };
        let elements = self.batch * self.height * self.width * channels
            + self.cout * k
            + results * problem.m * self.cout;
        Case {
            family: "conv",
            name: self.name(),
            quick: flops < 2e7,
            needs_gpu: flops > 8e8,
            is_random: false,
            flops,
            bytes: (elements * self.element.size()) as f64,
            tolerance: Operands::tolerance(&self.epilogue, self.element, k),
            run: Box::new(move |cx| run(cx, &self)),
        }
    }
}

pub(super) fn cases() -> Vec<Case> {
    let mut specs = Vec::new();
    for element in HALVES {
        every_tile(element, &mut specs);
        edges(element, &mut specs);
        real(element, &mut specs);
        adapters(element, &mut specs);
    }
    edges(Element::F32, &mut specs);
    float(&mut specs);
    specs.into_iter().map(Spec::case).collect()
}

/// Layers of ControlNets' picture encoders, upscalers and TAESD: narrow channels, other activations.
fn adapters(element: Element, specs: &mut Vec<Spec>) {
    let act = |act| EpilogueCase { act, ..BIAS };
    let (silu, relu, leaky) = (act(Act::Silu), act(Act::Relu), act(Act::LeakyRelu));
    let branch = EpilogueCase { bias: true, residual: true, scale: 0.2, ..EpilogueCase::PLAIN };
    let part = EpilogueCase { residual: true, ..EpilogueCase::PLAIN };
    for (side, c1, c2, cout, stride, epilogue) in [
        (64, 3, 0, 16, 1, silu),
        (64, 16, 0, 32, 2, silu),
        (32, 32, 0, 96, 2, silu),
        (16, 96, 0, 256, 2, silu),
        (8, 256, 0, 320, 1, BIAS),
        (24, 64, 0, 32, 1, leaky),
        (24, 64, 32, 32, 1, leaky),
        (24, 32, 32, 32, 1, part),
        (24, 64, 32, 64, 1, branch),
        (24, 32, 0, 64, 1, EpilogueCase { bias: false, ..branch }),
        (24, 12, 0, 64, 1, BIAS),
        (16, 4, 0, 64, 1, relu),
        (32, 64, 0, 64, 2, EpilogueCase::PLAIN),
        (24, 64, 0, 48, 1, BIAS),
    ] {
        specs.push(Spec { c2, stride, epilogue, ..Spec::plain([1, side, side], c1, cout, element) });
    }
    for side in [512, 1024] {
        specs.push(Spec { epilogue: silu, ..Spec::plain([2, side, side], 3, 16, element) });
        specs.push(Spec { c2: 32, epilogue: leaky, ..Spec::plain([1, side / 2, side / 2], 64, 32, element) });
    }
}

/// Each tile, whole and split, with channels that end inside a tile of K and at its end.
fn every_tile(element: Element, specs: &mut Vec<Spec>) {
    let fused = EpilogueCase { bias: true, time_bias: true, residual: true, ..EpilogueCase::PLAIN };
    for tile in Tile::ALIGNED.into_iter().chain([Tile::Any]) {
        let n = tile.shape().n;
        for (image, c1, cout, splits, epilogue) in [
            ([1, 8, 8], 8, n, 1, BIAS),
            ([2, 9, 7], 64, n + 8, 1, fused),
            ([3, 5, 11], 40, n - 8, 1, fused),
            ([2, 8, 8], 32, 2 * n, 4, fused),
            ([1, 13, 10], 72, 24, 3, BIAS),
        ] {
            let plain = Spec::plain(image, c1, cout, element);
            specs.push(Spec { force: Some((tile, splits)), epilogue, ..plain });
        }
    }
}

/// First and last layers, downsampling, upsampling, concatenation, kernels other than 3x3.
fn edges(element: Element, specs: &mut Vec<Spec>) {
    let plain = |image, c1, cout| Spec::plain(image, c1, cout, element);
    let down = Padding { bottom: 1, right: 1, ..Padding::default() };
    specs.extend([
        plain([2, 12, 12], 4, 320),
        plain([1, 17, 9], 3, 128),
        plain([1, 10, 14], 9, 64),
        plain([2, 16, 16], 64, 4),
        plain([1, 12, 20], 128, 3),
        Spec { pad: 4, ..plain([1, 9, 9], 4, 40) },
        Spec { c2: 5, ..plain([1, 9, 9], 4, 40) },
        Spec { stride: 2, ..plain([2, 16, 16], 64, 64) },
        Spec { stride: 2, ..plain([1, 15, 13], 32, 72) },
        Spec { stride: 2, padding: down, ..plain([1, 16, 16], 64, 64) },
        Spec { stride: 2, padding: down, ..plain([1, 15, 17], 24, 48) },
        Spec { upsample: true, ..plain([2, 6, 8], 64, 96) },
        Spec { upsample: true, ..plain([1, 5, 7], 6, 33) },
        Spec { c2: 32, ..plain([2, 8, 8], 64, 64) },
        Spec { c2: 8, pad: 16, ..plain([1, 7, 9], 40, 80) },
        Spec { c2: 64, upsample: true, ..plain([1, 6, 6], 24, 40) },
        Spec { kernel: [1, 1], padding: Padding::default(), c2: 24, ..plain([2, 9, 9], 40, 72) },
        Spec { kernel: [1, 1], padding: Padding::default(), ..plain([1, 8, 8], 4, 4) },
        Spec { kernel: [1, 1], padding: Padding::default(), stride: 2, ..plain([2, 9, 8], 48, 40) },
        Spec { kernel: [2, 2], padding: Padding::default(), stride: 2, ..plain([1, 16, 12], 16, 64) },
        Spec { kernel: [7, 7], padding: Padding::all(3), ..plain([1, 12, 12], 8, 32) },
        Spec {
            kernel: [5, 1],
            padding: Padding { top: 2, bottom: 2, ..Padding::default() },
            ..plain([1, 12, 9], 16, 32)
        },
        Spec { padding: Padding { top: 0, bottom: 2, left: 3, right: 0 }, ..plain([2, 6, 7], 24, 40) },
        Spec { padding: Padding::default(), ..plain([1, 3, 3], 16, 16) },
    ]);
}

/// Of every tile as many, whole and split, and of what the launcher chooses.
pub(super) fn random(shapes: &mut Shapes) -> Vec<Case> {
    let mut cases = Vec::new();
    for element in HALVES {
        for tile in Tile::ALIGNED.into_iter().chain([Tile::Any]) {
            cases.extend(distinct(shapes, |s| {
                let spec = random_spec(s, element, if tile == Tile::Any { 1 } else { 8 });
                Spec { force: Some((tile, s.of(1..=4))), ..spec }.case()
            }));
        }
        cases.extend(distinct(shapes, |s| random_spec(s, element, 8).case()));
    }
    cases.extend(random_float(shapes));
    cases
}

/// Channels and pitches in multiples of `unit`.
fn random_spec(s: &mut Shapes, element: Element, unit: usize) -> Spec {
    let image = [s.of(1..=3), s.of(3..=14), s.of(3..=14)];
    let cout = if s.once_in(4) { s.odd(1..=100) } else { 8 * s.of(1..=24) };
    let [top, bottom, left, right] = [s.below(3), s.of(1..=3), s.below(3), s.of(1..=3)];
    Spec {
        c2: if s.once_in(3) { unit * s.of(1..=10) } else { 0 },
        // Never one pixel and nothing around it: that is a linear layer.
        kernel: s.pick(&[[3, 3], [3, 3], [1, 1], [2, 3], [4, 4]]),
        padding: Padding { top, bottom, left, right },
        stride: s.of(1..=2),
        upsample: s.once_in(4),
        pad: unit * s.below(3),
        epilogue: EpilogueCase { geglu: false, ..EpilogueCase::random(&mut |below| s.below(below), 1, true) },
        ..Spec::plain(image, unit * s.of(1..=12), cout, element)
    }
}

/// Convolutions in f32.
fn float(specs: &mut Vec<Spec>) {
    let residual = EpilogueCase { bias: true, residual: true, ..EpilogueCase::PLAIN };
    specs.push(Spec { epilogue: residual, ..Spec::plain([2, 64, 64], 320, 320, Element::F32) });
    specs.push(Spec { epilogue: residual, ..Spec::plain([2, 8, 8], 1280, 1280, Element::F32) });
}

/// In f32, where the launcher takes the large tile where there are enough of them, the small one elsewhere, and `any`
/// for what is not aligned.
fn random_float(shapes: &mut Shapes) -> Vec<Case> {
    let mut cases =
        distinct(shapes, |s| Spec { batch: 1, upsample: false, ..random_spec(s, Element::F32, 8) }.case());
    cases.extend(distinct(shapes, |s| {
        let spec = random_spec(s, Element::F32, 8);
        let (height, width, cout) = (s.of(17..=21), s.of(17..=21), 8 * s.of(33..=40));
        let kernel = [s.of(2..=3), 3];
        let spec = Spec { height, width, cout, kernel, c1: 8, c2: 0, ..spec };
        Spec { batch: 1, padding: Padding::all(2), stride: 1, upsample: false, ..spec }.case()
    }));
    cases.extend(distinct(shapes, |s| {
        let spec = random_spec(s, Element::F32, 1);
        Spec { c1: spec.c1 | 1, ..spec }.case()
    }));
    cases
}

/// Layers of SD1.5 at 512², cfg pair, and of its VAE.
fn real(element: Element, specs: &mut Vec<Spec>) {
    let time = EpilogueCase { bias: true, time_bias: true, ..EpilogueCase::PLAIN };
    let residual = EpilogueCase { bias: true, residual: true, ..EpilogueCase::PLAIN };
    let plain = |image, c1, cout| Spec::plain(image, c1, cout, element);
    for (side, channels) in [(64, 320), (32, 640), (16, 1280), (8, 1280)] {
        specs.push(Spec { epilogue: time, ..plain([2, side, side], channels, channels) });
        specs.push(Spec { epilogue: residual, ..plain([2, side, side], channels, channels) });
    }
    for (side, channels) in [(64, 320), (32, 640), (16, 1280)] {
        specs.push(Spec { stride: 2, ..plain([2, side, side], channels, channels) });
    }
    for (side, channels) in [(8, 1280), (16, 1280), (32, 640)] {
        specs.push(Spec { upsample: true, ..plain([2, side, side], channels, channels) });
    }
    for (side, c1, c2, cout) in [
        (64, 320, 320, 320),
        (64, 640, 320, 320),
        (32, 1280, 640, 640),
        (32, 640, 320, 640),
        (16, 1280, 1280, 1280),
        (16, 1280, 640, 1280),
        (8, 1280, 1280, 1280),
    ] {
        specs.push(Spec { c2, epilogue: time, ..plain([2, side, side], c1, cout) });
    }
    specs.extend([
        plain([2, 64, 64], 4, 320),
        Spec {
            epilogue: EpilogueCase { out_f32: true, act: Act::None, ..BIAS },
            ..plain([2, 64, 64], 320, 4)
        },
        plain([1, 64, 64], 4, 512),
        Spec { epilogue: residual, ..plain([1, 64, 64], 512, 512) },
        Spec { epilogue: residual, ..plain([1, 128, 128], 512, 512) },
        Spec { epilogue: residual, ..plain([1, 256, 256], 256, 256) },
        Spec { epilogue: residual, ..plain([1, 512, 512], 128, 128) },
        Spec { upsample: true, ..plain([1, 256, 256], 256, 256) },
        plain([1, 512, 512], 128, 3),
    ]);
}

/// Sums over taps and channels at one output pixel, in f64, for all output channels.
fn reference(spec: &Spec, row: usize, out: [usize; 2], x: [&[f64]; 2], w: &[f32]) -> Vec<f64> {
    let (image, y, x0) = (row / (out[0] * out[1]), row / out[1] % out[0], row % out[1]);
    let channels = spec.c1 + spec.c2;
    let factor = if spec.upsample { 2 } else { 1 };
    let mut window = vec![0.0; spec.kernel[0] * spec.kernel[1] * channels];
    for (tap, values) in window.chunks_mut(channels).enumerate() {
        let sy = y * spec.stride + tap / spec.kernel[1];
        let sx = x0 * spec.stride + tap % spec.kernel[1];
        let inside = |at: usize, before: usize, extent: usize| {
            at.checked_sub(before).filter(|at| *at < extent * factor).map(|at| at / factor)
        };
        let (sy, sx) = (inside(sy, spec.padding.top, spec.height), inside(sx, spec.padding.left, spec.width));
        if let (Some(sy), Some(sx)) = (sy, sx) {
            let pixel = (image * spec.height + sy) * spec.width + sx;
            values[..spec.c1].copy_from_slice(&x[0][pixel * spec.c1..(pixel + 1) * spec.c1]);
            values[spec.c1..].copy_from_slice(&x[1][pixel * spec.c2..(pixel + 1) * spec.c2]);
        }
    }
    w.chunks(window.len()).map(|w| w.iter().zip(&window).map(|(w, x)| f64::from(*w) * x).sum()).collect()
}

fn run(cx: &mut Context<'_>, spec: &Spec) -> Result<Measured, CudaError> {
    let Spec { batch, height, width, c1, c2, cout, kernel, pad, element, .. } = *spec;
    let (pixels, channels, taps) = (batch * height * width, c1 + c2, kernel[0] * kernel[1]);
    let x = cx.values(pixels * c1, 1.0, element);
    let x2 = cx.values(pixels * c2, 1.0, element);
    let w = cx.values(cout * taps * channels, 1.0 / ((taps * channels) as f32).sqrt(), element);
    let shape = spec.shape();
    let (problem, out) = (shape.problem(), shape.out_extent());
    let extent = Extent { rows: problem.m, columns: cout, rows_per_sample: out[0] * out[1], element };
    let operands = Operands::new(cx, spec.epilogue, extent)?;

    let cp = channels.next_multiple_of(8);
    let mut packed = vec![0.0; cout * taps * cp];
    for (to, from) in packed.chunks_mut(cp).zip(w.chunks(channels)) {
        to[..channels].copy_from_slice(from);
    }
    let op = Conv {
        w_is_constant: false,
        x: Rows::new(upload_rows(cx, &x, c1, c1 + pad, element)?.ptr, c1 + pad),
        x2: match c2 {
            0 => None,
            _ => Some(Rows::new(upload_rows(cx, &x2, c2, c2 + pad, element)?.ptr, c2 + pad)),
        },
        w: cx.upload(&packed, element)?.ptr,
        epilogue: operands.epilogue,
        ..shape
    };
    let rows = rows_to_compare(cx, problem.m, cout, problem.k);
    let (x, x2) = (wide(x), wide(x2));
    let want: Vec<f64> = rows
        .par_iter()
        .flat_map_iter(|row| operands.reference(*row, &reference(spec, *row, out, [&x, &x2], &w)))
        .collect();
    let gpu = cx.gpu;
    operands.measure(cx, &rows, &want, || match spec.force {
        None => conv(gpu, &op),
        Some((tile, splits)) => conv_by(gpu, &op, Choice::Tiles(Plan::new(&problem, tile, splits))),
    })
}
