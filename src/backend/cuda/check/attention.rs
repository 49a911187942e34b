//! Cases of attention: every head dim, odd lengths, shared keys, causal masks, slices of fused tensors, large
//! scores, forced tiles and splits, and the real shapes.

use super::context::{compare, fault_of_rows};
use super::random::{ELEMENTS, HALVES, Shapes, distinct};
use super::{Case, Context, Fault, Measured};
use crate::backend::cuda::launch::attention::{Attention, Plan, TILES, attention, attention_as};
use crate::backend::cuda::{CudaError, Element, Gpu};
use crate::driver::DevicePtr;

/// Multiply-adds that a reference may take; beyond it only some rows are compared.
const REFERENCE_BUDGET: usize = 300_000_000;

/// One shape.
#[derive(Clone, Copy)]
pub(super) struct Spec {
    pub(super) element: Element,
    pub(super) batch: usize,
    pub(super) key_batch: usize,
    pub(super) heads: usize,
    pub(super) dim: usize,
    pub(super) queries: usize,
    pub(super) keys: usize,
    pub(super) is_causal: bool,
    /// q is the last slice of a tensor of three times the width; k and v are the slices of one of twice the width.
    pub(super) is_fused: bool,
    /// Deviation of scores before the softmax.
    pub(super) spread: f32,
    /// Extra elements between rows, to leave the fast path.
    pub(super) odd: usize,
    /// Tile of [`TILES`] and number of splits, instead of the plan's choice.
    pub(super) forced: Option<(usize, usize)>,
}

impl Spec {
    pub(super) fn new(element: Element, [batch, heads, dim, queries, keys]: [usize; 5]) -> Self {
        Self {
            element,
            batch,
            key_batch: batch,
            heads,
            dim,
            queries,
            keys,
            is_causal: false,
            is_fused: false,
            spread: 1.0,
            odd: 0,
            forced: None,
        }
    }

    fn name(&self) -> String {
        let Self { element, batch, heads, dim, queries, keys, .. } = *self;
        let mut name = format!("_{} b{batch} h{heads} d{dim} q{queries} k{keys}", element.suffix());
        if self.key_batch != batch {
            name += &format!(" of {} samples", self.key_batch);
        }
        if self.is_causal {
            name += " causal";
        }
        if self.is_fused {
            name += " fused";
        }
        if self.spread != 1.0 {
            name += &format!(" spread {}", self.spread);
        }
        if self.odd != 0 {
            name += &format!(" odd {}", self.odd);
        }
        if let Some((tile, splits)) = self.forced {
            let tile = TILES[tile];
            name += &format!(" {}x{} d{} in {splits}", tile.rows, tile.keys, tile.dim);
        }
        name
    }

    fn flops(&self) -> f64 {
        4.0 * [self.batch, self.heads, self.queries, self.keys, self.dim]
            .iter()
            .map(|n| *n as f64)
            .product::<f64>()
    }

    fn bytes(&self) -> f64 {
        let rows = 2 * self.batch * self.queries + 2 * self.key_batch * self.keys;
        (rows * self.heads * self.dim * self.element.size()) as f64
    }
}

pub(super) fn cases() -> Vec<Case> {
    let mut specs = Vec::new();
    for element in HALVES {
        dims(&mut specs, element);
        lengths(&mut specs, element);
        variants(&mut specs, element);
        tiles(&mut specs, element);
        real(&mut specs, element);
    }
    odd_layouts(&mut specs);
    specs.into_iter().map(|spec| case(spec, "attention", launch)).collect()
}

/// Of every tile as many, with its keys whole and in parts; and of the plain kernel, with what only that takes.
pub(super) fn random(shapes: &mut Shapes) -> Vec<Case> {
    let mut cases = Vec::new();
    for element in HALVES {
        for (i, tile) in TILES.iter().enumerate() {
            cases.extend(distinct(shapes, |s| {
                let (heads, most) = if tile.dim > 160 { (1, 90) } else { (s.of(1..=2), 170) };
                let dim = tile.dim - 8 * s.below(tile.dim / 16);
                let shape = [1, heads, dim, s.of(1..=most), s.of(1..=most)];
                case(
                    Spec { forced: Some((i, s.of(1..=3))), ..variant(s, element, shape) },
                    "attention",
                    launch,
                )
            }));
        }
    }
    for element in ELEMENTS {
        cases.extend(distinct(shapes, |s| {
            let shape = [1, s.of(1..=2), s.odd(1..=99), s.of(1..=50), s.of(1..=90)];
            case(Spec { odd: s.below(4), ..variant(s, element, shape) }, "attention", launch)
        }));
    }
    cases
}

/// One of the kinds: shared keys, a causal mask, slices of fused tensors, small and large scores.
pub(super) fn variant(s: &mut Shapes, element: Element, shape: [usize; 5]) -> Spec {
    let (key_batch, sharing) = (s.of(1..=2), s.of(1..=2));
    let [_, heads, dim, queries, keys] = shape;
    Spec {
        key_batch,
        is_causal: s.once_in(4),
        is_fused: s.once_in(2),
        spread: s.pick(&[1.0, 0.1, 20.0]),
        ..Spec::new(element, [key_batch * sharing, heads, dim, queries, keys])
    }
}

fn dims(specs: &mut Vec<Spec>, element: Element) {
    for dim in (16..=160).step_by(8).chain([200, 256, 512]) {
        specs.push(Spec::new(element, [1, 2, dim, 70, 77]));
        specs.push(Spec::new(element, [2, 1, dim, 33, 130]));
    }
}

fn lengths(specs: &mut Vec<Spec>, element: Element) {
    for dim in [40, 64, 80, 128, 160, 512] {
        for [queries, keys] in [
            [1, 1],
            [7, 7],
            [77, 1],
            [1, 154],
            [154, 63],
            [64, 64],
            [65, 65],
            [129, 128],
            [129, 1000],
            [200, 31],
        ] {
            specs.push(Spec::new(element, [1, 2, dim, queries, keys]));
        }
    }
}

fn variants(specs: &mut Vec<Spec>, element: Element) {
    for dim in [40, 64, 80, 128, 160, 512] {
        let base = |shape: [usize; 4]| {
            let [batch, heads, queries, keys] = shape;
            Spec::new(element, [batch, heads, dim, queries, keys])
        };
        specs.push(Spec { key_batch: 2, ..base([6, 2, 40, 77]) });
        specs.push(Spec { key_batch: 1, ..base([3, 1, 129, 96]) });
        for queries in [1, 64, 77, 200] {
            specs.push(Spec { is_causal: true, ..base([1, 3, queries, queries]) });
        }
        specs.push(Spec { is_causal: true, ..base([2, 1, 100, 60]) });
        specs.push(Spec { is_causal: true, ..base([1, 1, 60, 150]) });
        specs.push(Spec { is_fused: true, ..base([2, 2, 70, 70]) });
        specs.push(Spec { is_fused: true, ..base([2, 2, 70, 154]) });
        specs.push(Spec { spread: 20.0, ..base([1, 2, 90, 300]) });
        specs.push(Spec { spread: 60.0, is_causal: true, ..base([1, 2, 140, 140]) });
        specs.push(Spec { spread: 0.01, ..base([1, 1, 64, 200]) });
    }
}

fn tiles(specs: &mut Vec<Spec>, element: Element) {
    for (i, tile) in TILES.iter().enumerate() {
        for splits in [1, 2, 3, 7] {
            let shape = Spec::new(element, [2, 2, tile.dim, 150, 450]);
            specs.push(Spec { forced: Some((i, splits)), ..shape });
            specs.push(Spec { forced: Some((i, splits)), is_causal: true, key_batch: 1, ..shape });
        }
        let narrower = Spec::new(element, [1, 2, tile.dim - 8, 131, 200]);
        specs.push(Spec { forced: Some((i, 2)), is_fused: true, spread: 10.0, ..narrower });
    }
}

/// Self and cross attention of SD1.5 at 512², SD2.1 at 768², SDXL and its refiner at 1024², text encoders and VAE.
fn real(specs: &mut Vec<Spec>, element: Element) {
    let shapes = [
        [2, 8, 40, 4096, 4096],
        [2, 8, 40, 4096, 77],
        [2, 8, 80, 1024, 1024],
        [2, 8, 80, 1024, 77],
        [2, 8, 160, 256, 256],
        [2, 8, 160, 256, 77],
        [2, 8, 160, 64, 64],
        [2, 8, 160, 64, 77],
        [16, 8, 40, 4096, 4096],
        [16, 8, 40, 4096, 154],
        [2, 10, 64, 4096, 4096],
        [2, 10, 64, 4096, 77],
        [2, 20, 64, 1024, 1024],
        [2, 20, 64, 1024, 77],
        // SD2.1 at 768², the SDXL refiner at 1024².
        [2, 5, 64, 9216, 9216],
        [2, 5, 64, 9216, 77],
        [2, 12, 64, 4096, 4096],
        [2, 24, 64, 1024, 77],
        [1, 1, 512, 4096, 4096],
        [1, 1, 512, 16384, 16384],
    ];
    specs.extend(shapes.iter().map(|shape| Spec::new(element, *shape)));
    specs.push(Spec { key_batch: 2, ..Spec::new(element, [16, 8, 40, 4096, 77]) });
    for heads in [12, 16, 20] {
        specs.push(Spec { is_causal: true, is_fused: true, ..Spec::new(element, [2, heads, 64, 77, 77]) });
    }
}

/// What only the plain kernel takes.
fn odd_layouts(specs: &mut Vec<Spec>) {
    for element in ELEMENTS {
        for dim in [1, 4, 12, 33, 100] {
            specs.push(Spec::new(element, [2, 2, dim, 19, 45]));
            specs.push(Spec { is_causal: true, key_batch: 1, ..Spec::new(element, [2, 2, dim, 40, 40]) });
        }
        specs.push(Spec { odd: 3, ..Spec::new(element, [1, 2, 64, 20, 77]) });
        specs.push(Spec { spread: 40.0, ..Spec::new(element, [1, 2, 20, 31, 200]) });
        specs.push(Spec::new(element, [1, 1, 640, 5, 40]));
    }
    specs.push(Spec::new(Element::F32, [1, 2, 64, 77, 77]));
}

/// What a case runs.
pub(super) type LaunchFn = fn(&Gpu, &Attention, &Spec) -> Result<(), CudaError>;

fn launch(gpu: &Gpu, op: &Attention, spec: &Spec) -> Result<(), CudaError> {
    match spec.forced {
        Some((tile, splits)) if TILES[tile].shared <= gpu.shared_memory() => {
            attention_as(gpu, op, &Plan::tiled(TILES[tile], spec.keys, splits))
        }
        // A tile that the device has no room for is never chosen there.
        _ => attention(gpu, op),
    }
}

pub(super) fn case(spec: Spec, kernel: &'static str, launch: LaunchFn) -> Case {
    let flops = spec.flops();
    // p is rounded to the element type, and so is the result. The errors of p are independent, so they add up
    // as the values do, to 0.4 roundings of a row's rms; the largest of 10^5 elements is five times that, and a
    // row dominated by one key has twice the rms of all. Scores in f32 are off by 2^-23 of |q||k|, which counts
    // when they are large.
    let tolerance = 6.0 * spec.element.rounding() + 4e-6 * f64::from(spec.spread.max(1.0));
    Case {
        family: kernel,
        name: kernel.to_owned() + &spec.name(),
        quick: flops < 2e7,
        needs_gpu: flops > 2e9,
        is_random: false,
        flops,
        bytes: spec.bytes(),
        tolerance,
        run: Box::new(move |cx| run(cx, &spec, launch)),
    }
}

/// A matrix with rows of `pitch` elements: a column slice, or the whole.
struct Operand {
    values: Vec<f32>,
    pitch: usize,
    offset: usize,
}

impl Operand {
    fn row(&self, row: usize, head: usize, dim: usize) -> &[f32] {
        let from = row * self.pitch + self.offset + head * dim;
        &self.values[from..from + dim]
    }
}

fn run(cx: &mut Context<'_>, spec: &Spec, launch: LaunchFn) -> Result<Measured, CudaError> {
    let width = spec.heads * spec.dim;
    let (q_rows, k_rows) = (spec.batch * spec.queries, spec.key_batch * spec.keys);
    let (q_slices, k_slices) = if spec.is_fused { (3, 2) } else { (1, 1) };
    let pitches = [q_slices, k_slices, k_slices].map(|n| n * width + spec.odd);
    // Scores times 1/sqrt(dim) deviate by `spread`.
    let deviation = spec.spread.sqrt();
    let q = cx.values(q_rows * pitches[0], deviation, spec.element);
    let k = cx.values(k_rows * pitches[1], deviation, spec.element);
    let v = if spec.is_fused { Vec::new() } else { cx.values(k_rows * pitches[2], 1.0, spec.element) };
    let (dq, dk) = (cx.upload(&q, spec.element)?, cx.upload(&k, spec.element)?);
    let dv = if spec.is_fused { dk } else { cx.upload(&v, spec.element)? };
    let q_offset = (q_slices - 1) * width;
    let v_offset = (k_slices - 1) * width;
    let at = |ptr: DevicePtr, offset: usize| ptr.offset(offset * spec.element.size());
    let out_pitch = width + if spec.is_fused { 16 } else { spec.odd };
    let out = cx.output(q_rows * out_pitch * spec.element.size())?;
    let op = Attention {
        q: at(dq.ptr, q_offset),
        k: dk.ptr,
        v: at(dv.ptr, v_offset),
        out: out.ptr,
        q_pitch: pitches[0],
        k_pitch: pitches[1],
        v_pitch: pitches[2],
        out_pitch,
        batch: spec.batch,
        key_batch: spec.key_batch,
        queries: spec.queries,
        keys: spec.keys,
        heads: spec.heads,
        head_dim: spec.dim,
        is_causal: spec.is_causal,
        scale: 1.0 / (spec.dim as f32).sqrt(),
        element: spec.element,
    };
    let gpu = cx.gpu;
    let launch = || launch(gpu, &op, spec);
    launch()?;
    let q = Operand { values: q, pitch: pitches[0], offset: q_offset };
    let v =
        Operand { values: if spec.is_fused { k.clone() } else { v }, pitch: pitches[2], offset: v_offset };
    let k = Operand { values: k, pitch: pitches[1], offset: 0 };
    let measured = match cx.download(out)? {
        Some(bytes) => judge(spec, &op, &spec.element.decode(&bytes), [&q, &k, &v]),
        None => Measured::bad(Fault::BehindTheEnd),
    };
    Ok(Measured { micros: cx.time(launch)?, ..measured })
}

/// Error of `got`; infinite if an element of the result is missing or a gap between rows was written.
fn judge(spec: &Spec, op: &Attention, got: &[f32], operands: [&Operand; 3]) -> Measured {
    let width = spec.heads * spec.dim;
    if let Some(fault) = fault_of_rows(got, width, op.out_pitch) {
        return Measured::bad(fault);
    }
    let all = spec.batch * spec.queries;
    let rows = (REFERENCE_BUDGET / (2 * spec.keys * width)).clamp(1, all);
    // Evenly spread, the first and the last among them.
    let chosen = (0..rows).map(|i| if rows == 1 { all - 1 } else { i * (all - 1) / (rows - 1) });
    let (mut have, mut want) = (Vec::new(), Vec::new());
    for row in chosen {
        have.extend_from_slice(&got[row * op.out_pitch..][..width]);
        for head in 0..spec.heads {
            want.extend(reference(spec, operands, row, head, f64::from(op.scale)));
        }
    }
    compare(&have, &want)
}

/// One row of one head in f64.
fn reference(spec: &Spec, [q, k, v]: [&Operand; 3], row: usize, head: usize, scale: f64) -> Vec<f64> {
    let (sample, query) = (row / spec.queries, row % spec.queries);
    let first = sample / (spec.batch / spec.key_batch) * spec.keys;
    let visible = if spec.is_causal { spec.keys.min(query + 1) } else { spec.keys };
    let q = q.row(row, head, spec.dim);
    let scores: Vec<f64> = (0..visible)
        .map(|key| {
            let k = k.row(first + key, head, spec.dim);
            q.iter().zip(k).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>() * scale
        })
        .collect();
    let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mut out = vec![0.0; spec.dim];
    let mut sum = 0.0;
    for (key, score) in scores.iter().enumerate() {
        let p = (score - top).exp();
        sum += p;
        for (out, v) in out.iter_mut().zip(v.row(first + key, head, spec.dim)) {
            *out += p * f64::from(*v);
        }
    }
    out.iter_mut().for_each(|x| *x /= sum);
    out
}
