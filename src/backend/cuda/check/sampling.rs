//! Cases of samplers: guidance, combinations, random numbers, reductions.

use super::context::{compare, differing, is_poison};
use super::random::{ELEMENTS, Shapes, distinct};
use super::{Case, CaseFn, Context, Fault, Measured};
use crate::backend::cuda::launch::latent::{
    Blend, Guide, Inpaint, Lincomb, Prediction, Step, Term, blend, guide, lincomb,
};
use crate::backend::cuda::launch::philox::{
    PhiloxBits, PhiloxNormal, PhiloxState, philox_bits, philox_normal, torch_threads,
};
use crate::backend::cuda::launch::reduce::{Reduce, ScaledError, reduce};
use crate::backend::cuda::{CudaError, Element};
use crate::driver::{Capability, DevicePtr};

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (i, shape) in LATENTS.iter().enumerate() {
        for element in ELEMENTS {
            cases.push(guide_case(*shape, i, element));
        }
        cases.push(blend_case(*shape, i));
    }
    for count in [1usize, 3, 4, 5, 31, 255, 1024, 1025, 4096, 16_384, 65_537] {
        for terms in [1usize, 2, 5, 8] {
            cases.push(lincomb_case(count, terms, count.is_multiple_of(2) && terms == 5));
        }
    }
    for (i, (counter, key, first)) in KNOWN_ANSWERS.iter().enumerate() {
        cases.push(bits_case(format!("known answer {i}"), 300, *counter, *key, Some(*first)));
    }
    for (i, count) in [1usize, 2, 255, 256, 257, 1000, 1024, 4097, 16_384, 65_536, 100_003].iter().enumerate()
    {
        cases.push(normal_case(*count, i as u64 * 4, 8));
        cases.push(normal_case(*count, 0, 1));
    }
    for (samples, count) in REDUCTIONS {
        cases.push(reduce_case(samples, count, false));
        cases.push(reduce_case(samples, count, true));
    }
    cases.push(lincomb_case(1 << 24, 3, false));
    cases.push(normal_case(1 << 24, 0, 132));
    cases.push(reduce_case(4, 1 << 22, false));
    cases
}

/// Latents of any extents with every combination of operands; reductions in one chunk and in several.
pub(super) fn random(shapes: &mut Shapes) -> Vec<Case> {
    let latent = |s: &mut Shapes| {
        let channels = s.of(1..=16);
        [s.of(1..=4), channels, s.of(1..=300), channels + s.below(6)]
    };
    let mut cases = Vec::new();
    for element in ELEMENTS {
        cases.extend(distinct(shapes, |s| guide_case(latent(s), s.below(420), element)));
    }
    cases.extend(distinct(shapes, |s| blend_case(latent(s), s.below(4))));
    cases.extend(distinct(shapes, |s| lincomb_case(s.of(1..=5000), s.of(1..=8), s.once_in(3))));
    cases.extend(distinct(shapes, |s| {
        let mut word = || ((s.below(1 << 31) as u64) << 33) ^ ((s.below(1 << 31) as u64) << 11);
        let (counter, key) = ([word(), word()], word());
        let count = s.of(1..=700);
        bits_case(format!("of {count} at {counter:x?}"), count, counter, key, None)
    }));
    cases.extend(distinct(shapes, |s| normal_case(s.of(1..=9000), 4 * s.below(1000) as u64, s.of(1..=9))));
    for counts in [1..=4000, 4100..=20_000] {
        cases.extend(distinct(shapes, |s| reduce_case(s.of(1..=3), s.of(counts.clone()), s.once_in(2))));
    }
    cases
}

fn case(name: String, elements: usize, bytes: usize, tolerance: f64, run: CaseFn) -> Case {
    Case::of_memory("sampling", name, elements, bytes, tolerance, run)
}

/// Samples, channels, pixels, pitch of the model's output.
const LATENTS: [[usize; 4]; 22] = [
    [1, 1, 1, 1],
    [1, 4, 1, 4],
    [1, 4, 64, 4],
    [2, 4, 64, 8],
    [3, 4, 63, 8],
    [1, 4, 255, 4],
    [2, 4, 256, 16],
    [1, 16, 64, 16],
    [2, 16, 100, 24],
    [1, 3, 77, 3],
    [5, 2, 33, 5],
    [1, 4, 1024, 8],
    [2, 4, 1023, 4],
    [1, 8, 500, 8],
    [7, 4, 9, 4],
    [1, 9, 128, 16],
    [2, 1, 2000, 1],
    [4, 4, 400, 8],
    [1, 32, 70, 32],
    [3, 5, 111, 7],
    [2, 4, 4096, 8],
    [1, 4, 16_384, 8],
];

/// Bits of a variant: which operands and results a case has.
struct Variant {
    has_negative: bool,
    has_mask: bool,
    /// `None`: no step.
    operands: Option<usize>,
    wants_denoised: bool,
    wants_uncond: bool,
}

fn variant(i: usize) -> Variant {
    Variant {
        has_negative: !i.is_multiple_of(4),
        has_mask: i % 3 == 1,
        operands: if i % 7 == 3 { None } else { Some(i % 6) },
        wants_denoised: i % 5 != 2 || i % 7 == 3,
        wants_uncond: i.is_multiple_of(2),
    }
}

fn guide_case(shape: [usize; 4], i: usize, element: Element) -> Case {
    let [samples, channels, pixels, pitch] = shape;
    let count = samples * channels * pixels;
    let run = move |cx: &mut Context<'_>| run_guide(cx, shape, &variant(i), element);
    let name = format!("guide_{} {samples}x{channels}x{pixels} of {pitch} variant {i}", element.suffix());
    let bytes = count * (2 * element.size() + 8);
    // A dozen operations in f32 on terms up to five times the result's rms.
    case(name, count, bytes, 12.0 * 5.0 * Element::F32.rounding(), Box::new(run))
}

/// Host operands of a guidance case, and its factors.
struct GuideData {
    cond: Vec<f32>,
    uncond: Vec<f32>,
    x: Vec<f32>,
    mask: Vec<f32>,
    mask_samples: usize,
    original: Vec<f32>,
    operands: Vec<Vec<f32>>,
    of_uncond: f32,
}

const PREDICTION: Prediction = Prediction { skip: 0.75, scale: -1.5 };
const CFG: f32 = 7.5;
const OF_X: f32 = 0.6;
const OF_DENOISED: f32 = 0.4;

/// Factor of operand `k`.
fn factor(k: usize) -> f32 {
    0.25 * (k as f32 - 1.5)
}

impl GuideData {
    fn new(
        cx: &mut Context<'_>,
        [samples, channels, pixels, pitch]: [usize; 4],
        variant: &Variant,
        element: Element,
    ) -> Self {
        let count = samples * channels * pixels;
        let mask_samples = if samples.is_multiple_of(2) { samples / 2 } else { 1 };
        let mask = cx.values(mask_samples * pixels, 0.5, Element::F32);
        Self {
            cond: cx.values(samples * pixels * pitch, 1.0, element),
            uncond: cx.values(samples * pixels * pitch, 1.0, element),
            x: cx.values(count, 3.0, Element::F32),
            mask: mask.iter().map(|v| (v + 0.5).clamp(0.0, 1.0)).collect(),
            mask_samples,
            original: cx.values(count, 1.0, Element::F32),
            operands: (0..variant.operands.unwrap_or(0))
                .map(|_| cx.values(count, 1.0, Element::F32))
                .collect(),
            of_uncond: if variant.wants_uncond { -0.3 } else { 0.0 },
        }
    }

    /// Guided prediction, the negative side's, and the next latent.
    fn want(&self, [_, channels, pixels, pitch]: [usize; 4], variant: &Variant) -> [Vec<f64>; 3] {
        let mut want = [vec![], vec![], vec![]];
        for (i, x) in self.x.iter().enumerate() {
            let (n, c, p) = (i / pixels / channels, i / pixels % channels, i % pixels);
            let (x, at) = (f64::from(*x), (n * pixels + p) * pitch + c);
            let side = |out: &[f32]| {
                f64::from(PREDICTION.skip) * x + f64::from(PREDICTION.scale) * f64::from(out[at])
            };
            let (mut d, mut u) = (side(&self.cond), side(&self.cond));
            if variant.has_negative {
                u = side(&self.uncond);
                d = u + f64::from(CFG) * (d - u);
            }
            if variant.has_mask {
                let m = f64::from(self.mask[n % self.mask_samples * pixels + p]);
                d = d * m + f64::from(self.original[i]) * (1.0 - m);
            }
            let others = self.operands.iter().enumerate();
            let others: f64 = others.map(|(k, o)| f64::from(factor(k)) * f64::from(o[i])).sum();
            let next =
                f64::from(OF_X) * x + f64::from(OF_DENOISED) * d + f64::from(self.of_uncond) * u + others;
            for (list, value) in want.iter_mut().zip([d, u, next]) {
                list.push(value);
            }
        }
        want
    }
}

fn run_guide(
    cx: &mut Context<'_>,
    shape: [usize; 4],
    variant: &Variant,
    element: Element,
) -> Result<Measured, CudaError> {
    let [samples, channels, pixels, pitch] = shape;
    let data = GuideData::new(cx, shape, variant, element);
    // All results in one buffer, one behind the other.
    let wanted = [variant.wants_denoised, variant.wants_uncond, variant.operands.is_some()];
    let results = wanted.iter().filter(|w| **w).count();
    let out = cx.output(4 * samples * channels * pixels * results)?;
    let (mut want, mut places) = (Vec::new(), [DevicePtr::NULL; 3]);
    for ((place, is_wanted), values) in places.iter_mut().zip(wanted).zip(data.want(shape, variant)) {
        if is_wanted {
            *place = out.ptr.offset(4 * want.len());
            want.extend(values);
        }
    }
    let (cond, uncond) = (cx.upload(&data.cond, element)?, cx.upload(&data.uncond, element)?);
    let (x, original) = (cx.upload(&data.x, Element::F32)?, cx.upload(&data.original, Element::F32)?);
    let mask = cx.upload(&data.mask, Element::F32)?;
    let mut operands = Vec::new();
    for (k, operand) in data.operands.iter().enumerate() {
        operands.push(Term { factor: factor(k), x: cx.upload(operand, Element::F32)?.ptr });
    }
    let step = Step {
        next: places[2],
        of_x: OF_X,
        of_denoised: OF_DENOISED,
        of_uncond: data.of_uncond,
        operands: &operands,
    };
    let inpaint = Inpaint { mask: mask.ptr, samples: data.mask_samples, original: original.ptr };
    let gpu = cx.gpu;
    let op = Guide {
        cond: cond.ptr,
        uncond: if variant.has_negative { uncond.ptr } else { DevicePtr::NULL },
        element,
        pitch,
        x: x.ptr,
        samples,
        channels,
        pixels,
        prediction: PREDICTION,
        cfg: CFG,
        inpaint: variant.has_mask.then_some(inpaint),
        denoised: places[0],
        uncond_denoised: places[1],
        step: variant.operands.map(|_| step),
    };
    cx.measure(out, Element::F32, &want, || guide(gpu, &op))
}

fn blend_case([samples, channels, pixels, _]: [usize; 4], i: usize) -> Case {
    let count = samples * channels * pixels;
    // Masks with all, or one, of the samples and channels.
    let (mask_samples, mask_channels) = match i % 4 {
        0 => (1, 1),
        1 => (samples, 1),
        2 => (samples, channels),
        _ => (1, channels),
    };
    let run = move |cx: &mut Context<'_>| -> Result<Measured, CudaError> {
        let (x, other) = (cx.values(count, 1.0, Element::F32), cx.values(count, 2.0, Element::F32));
        let mask = cx.values(mask_samples * mask_channels * pixels, 0.4, Element::F32);
        let want: Vec<f64> = (0..count)
            .map(|i| {
                let (n, c, p) = (i / pixels / channels, i / pixels % channels, i % pixels);
                let m =
                    f64::from(mask[((n % mask_samples) * mask_channels + c % mask_channels) * pixels + p]);
                f64::from(x[i]) * m + f64::from(other[i]) * (1.0 - m)
            })
            .collect();
        let (dx, dother) = (cx.upload(&x, Element::F32)?, cx.upload(&other, Element::F32)?);
        let dmask = cx.upload(&mask, Element::F32)?;
        let out = cx.output(4 * count)?;
        let gpu = cx.gpu;
        let (x, other, mask, out_ptr) = (dx.ptr, dother.ptr, dmask.ptr, out.ptr);
        let op =
            Blend { x, other, mask, out: out_ptr, samples, channels, pixels, mask_samples, mask_channels };
        cx.measure(out, Element::F32, &want, || blend(gpu, &op))
    };
    let name = format!("blend {samples}x{channels}x{pixels} by {mask_samples}x{mask_channels}");
    // Four operations on terms a few times the rms.
    case(name, count, 16 * count, 1e-6, Box::new(run))
}

fn lincomb_case(count: usize, terms: usize, is_off: bool) -> Case {
    let run = move |cx: &mut Context<'_>| -> Result<Measured, CudaError> {
        // Off a vector's border: the path of single elements.
        let off = usize::from(is_off);
        let factors: Vec<f32> = (0..terms).map(|k| 1.25 - 0.5 * k as f32).collect();
        let mut want = vec![0.0; count];
        let mut list = Vec::new();
        for factor in &factors {
            let x = cx.values(count + off, 1.0, Element::F32);
            for (w, v) in want.iter_mut().zip(&x[off..]) {
                *w += f64::from(*factor) * f64::from(*v);
            }
            list.push(Term { factor: *factor, x: cx.upload(&x, Element::F32)?.ptr.offset(4 * off) });
        }
        let out = cx.output(4 * count)?;
        let gpu = cx.gpu;
        let op = Lincomb { terms: &list, out: out.ptr, count };
        cx.measure(out, Element::F32, &want, || lincomb(gpu, &op))
    };
    let bytes = 4 * count * (terms + 1);
    let name = format!("lincomb {count} of {terms}{}", if is_off { " off" } else { "" });
    // At most eight roundings of sums of at most four times the rms.
    case(name, count, bytes, 32.0 * Element::F32.rounding(), Box::new(run))
}

/// Counter, key and output of Philox4x32-10: the known-answer vectors published with Random123.
const KNOWN_ANSWERS: [([u64; 2], u64, [u32; 4]); 3] = [
    ([0, 0], 0, [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
    ([u64::MAX, u64::MAX], u64::MAX, [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
    (
        [0x85a3_08d3_243f_6a88, 0x0370_7344_1319_8a2e],
        0x299f_31d0_a409_3822,
        [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
    ),
];

/// `count` calls from a counter on; the first gives `first`, if that is known.
fn bits_case(what: String, count: usize, counter: [u64; 2], key: u64, first: Option<[u32; 4]>) -> Case {
    let run = move |cx: &mut Context<'_>| -> Result<Measured, CudaError> {
        let mut want = first.unwrap_or_else(|| philox(counter, key)).to_vec();
        for i in 1..count {
            want.extend(philox([counter[0].wrapping_add(i as u64), counter[1]], key));
        }
        let out = cx.output(16 * count)?;
        let gpu = cx.gpu;
        let op = PhiloxBits { out: out.ptr, count, key, counter };
        let judge = |bytes: &[u8]| {
            let got: Vec<u32> = bytes.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
            differing(&got, &want)
        };
        cx.measure_by(out, judge, || philox_bits(gpu, &op))
    };
    case(format!("philox_bits {what}"), 4 * count, 16 * count, 0.0, Box::new(run))
}

/// Philox4x32-10 as its paper states it.
fn philox(counter: [u64; 2], key: u64) -> [u32; 4] {
    let mut c = [counter[0] as u32, (counter[0] >> 32) as u32, counter[1] as u32, (counter[1] >> 32) as u32];
    let mut k = [key as u32, (key >> 32) as u32];
    for _ in 0..10 {
        let a = 0xd251_1f53u64 * u64::from(c[0]);
        let b = 0xcd9e_8d57u64 * u64::from(c[2]);
        c = [(b >> 32) as u32 ^ c[1] ^ k[0], b as u32, (a >> 32) as u32 ^ c[3] ^ k[1], a as u32];
        k = [k[0].wrapping_add(0x9e37_79b9), k[1].wrapping_add(0xbb67_ae85)];
    }
    c
}

/// Element `i` of torch.randn on a device whose kernel has `threads` threads, in f64 from the rounded uniform numbers.
fn torch_normal(i: usize, threads: usize, state: PhiloxState) -> f64 {
    let (subsequence, slot) = ((i % threads) as u64, i / threads);
    let bits = philox([state.offset / 4 + (slot / 4) as u64, subsequence], state.seed);
    let pair = slot % 4 / 2 * 2;
    let unit = 2f64.powi(-32);
    let turn = f64::from(2f32.powi(-32) * 6.283_185_5f32);
    let u = (f64::from(bits[pair] as f32) * unit + unit / 2.0) as f32;
    let v = (f64::from(bits[pair + 1] as f32) * turn + turn / 2.0) as f32;
    let radius = (-2.0 * f64::from(u).ln()).sqrt();
    let angle = f64::from(v);
    radius * if slot.is_multiple_of(2) { angle.sin() } else { angle.cos() }
}

fn normal_case(count: usize, offset: u64, multiprocessors: usize) -> Case {
    let run = move |cx: &mut Context<'_>| -> Result<Measured, CudaError> {
        let state = PhiloxState { seed: cx.random(), offset };
        let threads = torch_threads(count, multiprocessors, Capability { major: 8, minor: 9 });
        let want: Vec<f64> = (0..count).map(|i| torch_normal(i, threads, state)).collect();
        let out = cx.output(4 * count)?;
        let gpu = cx.gpu;
        let op = PhiloxNormal { out: out.ptr, count, state, threads };
        let after = philox_normal(gpu, &op)?;
        let calls = count.div_ceil(4 * threads) as u64;
        let is_advanced = after == PhiloxState { offset: offset + 4 * calls, ..state };
        let judge = |bytes: &[u8]| match is_advanced {
            true => compare(&Element::F32.decode(bytes), &want),
            false => Measured { error: f64::INFINITY, ..Measured::default() },
        };
        cx.measure_by(out, judge, || philox_normal(gpu, &op).map(|_| ()))
    };
    // The hardware's sine is good to 2^-20 of the radius, which is at most 6.7.
    let name = format!("philox_normal {count} at {offset} on {multiprocessors}");
    case(name, count, 4 * count, 1e-5, Box::new(run))
}

/// Samples and elements of each.
const REDUCTIONS: [(usize, usize); 20] = [
    (1, 1),
    (1, 2),
    (2, 31),
    (1, 32),
    (3, 33),
    (1, 255),
    (2, 256),
    (1, 257),
    (5, 1000),
    (1, 4095),
    (1, 4096),
    (2, 4097),
    (1, 8192),
    (3, 10_001),
    (1, 16_384),
    (2, 16_384),
    (1, 65_536),
    (1, 65_537),
    (17, 100),
    (1, 2_100_000),
];

fn reduce_case(samples: usize, count: usize, is_error: bool) -> Case {
    let run = move |cx: &mut Context<'_>| -> Result<Measured, CudaError> {
        let all = samples * count;
        let (atol, rtol) = (0.0078f32, 0.05f32);
        let x = cx.values(all, 1.0, Element::F32);
        let low: Vec<f32> = cx.values(all, 0.05, Element::F32).iter().zip(&x).map(|(e, x)| x + e).collect();
        let previous = cx.values(all, 1.0, Element::F32);
        let mut sums = Vec::new();
        for n in 0..samples {
            let (mut sum, mut magnitude, mut squares, mut largest) = (0.0, 0.0, 0.0, 0.0f64);
            for i in n * count..(n + 1) * count {
                let mut v = f64::from(x[i]);
                if is_error {
                    let size = f64::from(low[i].abs().max(previous[i].abs()));
                    v = (v - f64::from(low[i])) / f64::from(atol).max(f64::from(rtol) * size);
                }
                sum += v;
                magnitude += v.abs();
                squares += v * v;
                largest = largest.max(v.abs());
            }
            sums.push([(sum, magnitude), (squares, squares), (largest, largest)]);
        }
        let (dx, dlow) = (cx.upload(&x, Element::F32)?, cx.upload(&low, Element::F32)?);
        let dprevious = cx.upload(&previous, Element::F32)?;
        let out = cx.output(12 * samples)?;
        let gpu = cx.gpu;
        let error = is_error.then_some(ScaledError { low: dlow.ptr, previous: dprevious.ptr, atol, rtol });
        let op = Reduce { x: dx.ptr, error, out: out.ptr, samples, count };
        // Each against the sum of magnitudes that it comes from.
        let worst = |bytes: &[u8]| {
            let (got, of) = (Element::F32.decode(bytes), 3 * sums.len());
            let mut worst = Measured::default();
            for (at, (value, (want, size))) in got.iter().zip(sums.iter().flatten()).enumerate() {
                let (got, want) = (f64::from(*value), *want);
                let error = if got.is_nan() { f64::INFINITY } else { (got - want).abs() / size };
                if error > worst.error {
                    let wrong = Fault::Wrong { at, of, got, want };
                    let fault = if is_poison(*value) { Fault::Unwritten { at, of } } else { wrong };
                    worst = Measured { error, fault: Some(fault), micros: None };
                }
            }
            worst
        };
        cx.measure_by(out, worst, || reduce(gpu, &op))
    };
    let arrays = if is_error { 3 } else { 1 };
    let kind = if is_error { " errors" } else { "" };
    // Sixteen additions of a thread, then a tree of thirteen levels, and the error's own four operations.
    let name = format!("reduce {samples}x{count}{kind}");
    case(name, samples * count, 4 * arrays * samples * count, 34.0 * Element::F32.rounding(), Box::new(run))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_gives_the_published_answers() {
        for (counter, key, want) in KNOWN_ANSWERS {
            assert_eq!(philox(counter, key), want);
        }
    }

    #[test]
    fn normal_numbers_are_normal() {
        let state = PhiloxState { seed: 1234, offset: 8 };
        let values: Vec<f64> = (0..40_000).map(|i| torch_normal(i, 512, state)).collect();
        let mean = values.iter().sum::<f64>() / 40_000.0;
        let var = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / 40_000.0;
        // Four standard errors.
        assert!(mean.abs() < 0.02 && (var - 1.0).abs() < 0.03, "{mean} {var}");
    }
}
