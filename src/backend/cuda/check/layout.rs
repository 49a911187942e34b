//! Cases of conversions, transposes and weight packing. Nothing is computed, so results must be exact.

use super::random::{ELEMENTS, Shapes, distinct};
use super::{Case, CaseFn, Context, Measured, wide};
use crate::backend::cuda::launch::layout::{
    Convert, PackConv, PackLinear, PackVector, Stored, ToNchw, ToNhwc, convert, pack_conv, pack_linear,
    pack_vector, padded, to_nchw, to_nhwc,
};
use crate::backend::cuda::{CudaError, Element};
use half::{bf16, f16};

const STORED: [Stored; 5] = [Stored::F32, Stored::F16, Stored::BF16, Stored::F8E4M3, Stored::F8E5M2];

pub(super) fn cases() -> Vec<Case> {
    let mut cases = convert_cases();
    cases.extend(transpose_cases());
    cases.extend(pack_cases());
    cases
}

/// Any extents, alignments and stored types.
pub(super) fn random(shapes: &mut Shapes) -> Vec<Case> {
    let image = |s: &mut Shapes| {
        let channels = s.of(1..=70);
        let width = channels + s.below(5);
        [s.of(1..=3), channels, s.of(1..=200), width, width + s.below(5), s.of(1..=2)]
    };
    let mut cases = Vec::new();
    for to in ELEMENTS {
        cases.extend(distinct(shapes, |s| convert_case(s.pick(&STORED), to, s.of(1..=9000), s.below(9))));
        cases.extend(distinct(shapes, |s| to_nhwc_case(image(s), to)));
        cases.extend(distinct(shapes, |s| to_nchw_case(image(s), to)));
        cases.extend(distinct(shapes, |s| {
            let is_geglu = s.once_in(3);
            let (n, row_offset) =
                if is_geglu { (16 * s.of(1..=4), 16 * s.below(3)) } else { (s.of(1..=60), s.below(40)) };
            linear_case((n, s.of(1..=150), row_offset, is_geglu, s.below(4)), s.pick(&STORED), to)
        }));
        cases.extend(distinct(shapes, |s| {
            // One tap is a linear layer.
            conv_case((s.of(1..=9), s.of(1..=90), s.of(2..=25)), s.pick(&STORED), to)
        }));
    }
    cases.extend(distinct(shapes, |s| {
        let is_geglu = s.once_in(2);
        let unit = if is_geglu { 16 } else { 1 };
        vector_case(unit * s.of(1..=50), unit * s.below(9), is_geglu, s.pick(&STORED))
    }));
    cases
}

fn case(name: String, elements: usize, bytes: usize, run: CaseFn) -> Case {
    Case::of_memory("layout", name, elements, bytes, 0.0, run)
}

/// Random stored elements and their values.
fn stored(cx: &mut Context<'_>, count: usize, kind: Stored) -> (Vec<u8>, Vec<f32>) {
    let values = cx.values(count, 0.7, Element::F32);
    match kind {
        Stored::F32 => (Element::F32.encode(&values), values),
        Stored::F16 => {
            (Element::F16.encode(&values), values.iter().map(|v| f16::from_f32(*v).to_f32()).collect())
        }
        Stored::BF16 => {
            (Element::BF16.encode(&values), values.iter().map(|v| bf16::from_f32(*v).to_f32()).collect())
        }
        // Every finite bit pattern is a value.
        Stored::F8E4M3 => {
            let bytes: Vec<u8> = (0..count).map(|_| without_nan(cx.random() as u8, 0x7f)).collect();
            let values = bytes.iter().map(|b| e4m3(*b)).collect();
            (bytes, values)
        }
        Stored::F8E5M2 => {
            let bytes: Vec<u8> = (0..count).map(|_| without_nan(cx.random() as u8, 0x7c)).collect();
            let values = bytes.iter().map(|b| e5m2(*b)).collect();
            (bytes, values)
        }
    }
}

/// Leaves out magnitudes from `first` on: infinities and NaNs.
fn without_nan(byte: u8, first: u8) -> u8 {
    if byte & 0x7f >= first { byte & 0x8f } else { byte }
}

/// Sign, exponent and mantissa of an 8-bit float, by the definition of the format.
fn f8(byte: u8, mantissa_bits: i32, bias: i32) -> f32 {
    let sign = if byte & 0x80 != 0 { -1.0 } else { 1.0 };
    let exponent = i32::from((byte & 0x7f) >> mantissa_bits);
    let fraction = f32::from(byte & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits) as f32;
    let (significand, power) =
        if exponent == 0 { (fraction, 1 - bias) } else { (1.0 + fraction, exponent - bias) };
    sign * significand * 2f32.powi(power)
}

fn e4m3(byte: u8) -> f32 {
    f8(byte, 3, 7)
}

fn e5m2(byte: u8) -> f32 {
    f8(byte, 2, 15)
}

fn convert_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for from in STORED {
        for to in ELEMENTS {
            // The second number: elements by which the source begins off a vector.
            for (count, off) in [(1, 0), (7, 0), (8, 0), (65, 0), (64, 1), (1000, 3), (4099, 0), (33_000, 0)]
            {
                cases.push(convert_case(from, to, count, off));
            }
        }
    }
    for (from, to) in
        [(Stored::F32, Element::F16), (Stored::F16, Element::F32), (Stored::F8E4M3, Element::F16)]
    {
        cases.push(convert_case(from, to, 1 << 26, 0));
    }
    cases
}

fn convert_case(from: Stored, to: Element, count: usize, off: usize) -> Case {
    let run = move |cx: &mut Context<'_>| -> Result<Measured, CudaError> {
        let (bytes, values) = stored(cx, count + off, from);
        let want = wide(values[off..].iter().map(|v| to.round(*v)));
        let src = cx.upload_bytes(&bytes)?;
        let out = cx.output(count * to.size())?;
        let gpu = cx.gpu;
        let op = Convert { src: src.ptr.offset(off * from.size()), from, dst: out.ptr, to, count };
        cx.measure(out, to, &want, || convert(gpu, &op))
    };
    let name = format!("convert {from:?} to {} {count} from {off}", to.suffix());
    case(name, count, count * (from.size() + to.size()), Box::new(run))
}

/// Samples, channels, pixels, columns, pitch, copies.
type Image = [usize; 6];

fn transpose_cases() -> Vec<Case> {
    let small: [Image; 21] = [
        [1, 1, 1, 1, 1, 1],
        [1, 3, 5, 3, 3, 1],
        [2, 4, 64, 4, 4, 1],
        [1, 4, 64, 8, 8, 2],
        [3, 4, 63, 8, 8, 2],
        [1, 9, 100, 16, 16, 2],
        [1, 16, 130, 16, 24, 1],
        [2, 3, 128, 8, 8, 1],
        [1, 3, 129, 3, 4, 1],
        [1, 31, 127, 31, 31, 1],
        [1, 32, 128, 32, 32, 1],
        [2, 33, 256, 40, 40, 1],
        [1, 64, 257, 64, 72, 3],
        [1, 65, 1, 65, 65, 1],
        [2, 100, 7, 101, 103, 1],
        [1, 128, 200, 128, 128, 1],
        [5, 2, 3, 2, 5, 4],
        [1, 320, 64, 320, 320, 1],
        [1, 1000, 2, 1000, 1000, 1],
        [2, 5, 384, 8, 9, 2],
        [1, 13, 1000, 16, 16, 1],
    ];
    let real: [Image; 4] =
        [[1, 4, 4096, 8, 8, 2], [1, 4, 16_384, 8, 8, 2], [8, 4, 16_384, 8, 8, 2], [1, 3, 1 << 20, 8, 8, 1]];
    let mut cases = Vec::new();
    for element in ELEMENTS {
        for shape in small {
            cases.push(to_nhwc_case(shape, element));
            cases.push(to_nchw_case(shape, element));
        }
    }
    for shape in real {
        cases.push(to_nhwc_case(shape, Element::F16));
        cases.push(to_nchw_case(shape, Element::F16));
    }
    cases
}

fn to_nhwc_case(image: Image, element: Element) -> Case {
    let [samples, channels, pixels, width, pitch, copies] = image;
    let (from, to) = (samples * channels * pixels, copies * samples * pixels * pitch);
    let run = move |cx: &mut Context<'_>| -> Result<Measured, CudaError> {
        // A power of two, so that the product is exact.
        let factor = 0.25f32;
        let x = cx.values(from, 1.0, Element::F32);
        // What lies between `width` and `pitch` must stay as it is.
        let keep = cx.values(to, 1.0, element);
        let mut want = wide(keep.iter().copied());
        for row in 0..copies * samples * pixels {
            let (n, p) = (row / pixels % samples, row % pixels);
            for c in 0..width {
                let source = if c < channels { x[(n * channels + c) * pixels + p] } else { 0.0 };
                want[row * pitch + c] = f64::from(element.round(factor * source));
            }
        }
        let (src, out) = (cx.upload(&x, Element::F32)?, cx.output_over(&keep, element)?);
        let gpu = cx.gpu;
        let (src, dst) = (src.ptr, out.ptr);
        let op = ToNhwc { src, dst, samples, channels, pixels, width, pitch, copies, factor, element };
        cx.measure(out, element, &want, || to_nhwc(gpu, &op))
    };
    let name =
        format!("to_nhwc_{} {samples}x{channels}x{pixels} to {width}/{pitch} x{copies}", element.suffix());
    let bytes = 4 * from + copies * samples * pixels * width * element.size();
    case(name, to.max(from), bytes, Box::new(run))
}

fn to_nchw_case(image: Image, element: Element) -> Case {
    let [samples, channels, pixels, _, pitch, _] = image;
    let (from, to) = (samples * pixels * pitch, samples * channels * pixels);
    let run = move |cx: &mut Context<'_>| -> Result<Measured, CudaError> {
        let x = cx.values(from, 1.0, element);
        let mut want = Vec::with_capacity(to);
        for n in 0..samples {
            for c in 0..channels {
                want.extend((0..pixels).map(|p| f64::from(x[(n * pixels + p) * pitch + c])));
            }
        }
        let src = cx.upload(&x, element)?;
        let out = cx.output(4 * to)?;
        let gpu = cx.gpu;
        let op = ToNchw { src: src.ptr, dst: out.ptr, samples, channels, pixels, pitch, element };
        cx.measure(out, Element::F32, &want, || to_nchw(gpu, &op))
    };
    let name = format!("to_nchw_{} {samples}x{channels}x{pixels} of {pitch}", element.suffix());
    case(name, from.max(to), to * (4 + element.size()), Box::new(run))
}

fn pack_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    // n, k, row offset, GEGLU, elements by which the source begins off a vector
    let linear = [
        (1, 1, 0, false, 0),
        (3, 7, 0, false, 0),
        (5, 8, 2, false, 0),
        (16, 24, 0, true, 0),
        (32, 20, 16, true, 0),
        (10, 33, 1, false, 3),
        (64, 320, 0, true, 1),
        (77, 40, 100, false, 0),
    ];
    let conv =
        [(1, 1, 9), (3, 4, 9), (5, 8, 9), (4, 13, 4), (8, 3, 196), (2, 300, 9), (7, 64, 1), (2, 520, 25)];
    for from in STORED {
        for to in ELEMENTS {
            cases.extend(linear.iter().map(|&l| linear_case(l, from, to)));
            cases.extend(conv.iter().map(|&c| conv_case(c, from, to)));
        }
        for (n, offset, is_geglu) in
            [(1, 0, false), (320, 0, false), (77, 13, false), (32, 0, true), (2560, 16, true)]
        {
            cases.push(vector_case(n, offset, is_geglu, from));
        }
    }
    for (n, k, is_geglu) in
        [(2560, 320, true), (10_240, 1280, true), (1280, 5120, false), (3840, 1280, false)]
    {
        cases.push(linear_case((n, k, 0, is_geglu, 0), Stored::F16, Element::F16));
    }
    for (cout, cin, taps) in [(320, 320, 9), (1280, 2560, 9), (320, 4, 9)] {
        cases.push(conv_case((cout, cin, taps), Stored::F16, Element::F16));
    }
    cases
}

/// Where row `r` of `n` goes.
fn place(r: usize, n: usize, is_geglu: bool) -> usize {
    let half = n / 2;
    match (is_geglu, r < half) {
        (false, _) => r,
        (true, true) => 16 * (r / 8) + r % 8,
        (true, false) => 16 * ((r - half) / 8) + 8 + (r - half) % 8,
    }
}

type Matrix = (usize, usize, usize, bool, usize);

fn linear_case((n, k, row_offset, is_geglu, off): Matrix, from: Stored, to: Element) -> Case {
    let kp = padded(k);
    let run = move |cx: &mut Context<'_>| -> Result<Measured, CudaError> {
        let (bytes, values) = stored(cx, n * k + off, from);
        let mut want = vec![0.0; n * kp];
        for (r, row) in values[off..].chunks_exact(k).enumerate() {
            let at = place(r, n, is_geglu) * kp;
            want[at..at + k].copy_from_slice(&wide(row.iter().map(|v| to.round(*v))));
        }
        let src = cx.upload_bytes(&bytes)?;
        // Rows above the offset belong to another matrix; the buffer begins where ours does.
        let before = row_offset * kp * to.size();
        let all = cx.output(before + n * kp * to.size())?;
        let gpu = cx.gpu;
        let src = src.ptr.offset(off * from.size());
        let op = PackLinear { src, from, dst: all.ptr, to, n, k, row_offset, is_geglu };
        let out = super::Buffer { ptr: all.ptr.offset(before), bytes: n * kp * to.size(), guard: all.guard };
        cx.measure(out, to, &want, || pack_linear(gpu, &op))
    };
    let geglu = if is_geglu { " geglu" } else { "" };
    let name = format!("pack_linear {from:?} to {} {n}x{k} at {row_offset}{geglu} from {off}", to.suffix());
    case(name, n * kp, n * (k * from.size() + kp * to.size()), Box::new(run))
}

fn conv_case((cout, cin, taps): (usize, usize, usize), from: Stored, to: Element) -> Case {
    let cp = padded(cin);
    let run = move |cx: &mut Context<'_>| -> Result<Measured, CudaError> {
        let (bytes, values) = stored(cx, cout * cin * taps, from);
        let mut want = vec![0.0; cout * taps * cp];
        for (i, v) in values.iter().enumerate() {
            let (o, c, tap) = (i / taps / cin, i / taps % cin, i % taps);
            want[(o * taps + tap) * cp + c] = f64::from(to.round(*v));
        }
        let src = cx.upload_bytes(&bytes)?;
        let out = cx.output(want.len() * to.size())?;
        let gpu = cx.gpu;
        let op = PackConv { src: src.ptr, from, dst: out.ptr, to, cout, cin, taps };
        cx.measure(out, to, &want, || pack_conv(gpu, &op))
    };
    let name = format!("pack_conv {from:?} to {} {cout}x{cin}x{taps}", to.suffix());
    let bytes = cout * taps * (cin * from.size() + cp * to.size());
    case(name, cout * taps * cp, bytes, Box::new(run))
}

fn vector_case(n: usize, offset: usize, is_geglu: bool, from: Stored) -> Case {
    let run = move |cx: &mut Context<'_>| -> Result<Measured, CudaError> {
        let (bytes, values) = stored(cx, n, from);
        let mut want = vec![0.0; n];
        for (r, v) in values.iter().enumerate() {
            want[place(r, n, is_geglu)] = f64::from(*v);
        }
        let src = cx.upload_bytes(&bytes)?;
        let all = cx.output(4 * (offset + n))?;
        let gpu = cx.gpu;
        let op = PackVector { src: src.ptr, from, dst: all.ptr, n, offset, is_geglu };
        let out = super::Buffer { ptr: all.ptr.offset(4 * offset), bytes: 4 * n, guard: all.guard };
        cx.measure(out, Element::F32, &want, || pack_vector(gpu, &op))
    };
    let geglu = if is_geglu { " geglu" } else { "" };
    case(format!("pack_vector {from:?} {n} at {offset}{geglu}"), n, n * (4 + from.size()), Box::new(run))
}
