//! Cases of pictures: resizing, 8 bits, previews, and elements that are only moved.

use super::context::differing;
use super::random::{ELEMENTS, Shapes, UNITS, distinct, unit_of};
use super::{Case, CaseFn, Context, Fault, Measured, wide};
use crate::backend::cuda::launch::copy::{Columns, Concat, Upsample2x, Window, concat, upsample2x, window};
use crate::backend::cuda::launch::image::{
    Filter, FromRgb8, Preview, Resize, ToRgb8, from_rgb8, preview, resize, to_rgb8,
};
use crate::backend::cuda::{CudaError, Element};

const FILTERS: [Filter; 5] =
    [Filter::Nearest, Filter::NearestExact, Filter::Bilinear, Filter::Bicubic, Filter::Area];

pub(super) fn cases() -> Vec<Case> {
    let mut cases = resize_cases();
    cases.extend(rgb8_cases());
    cases.extend(move_cases());
    cases
}

/// Pictures of whole vectors and others, and elements in every unit that a copy moves.
pub(super) fn random(shapes: &mut Shapes) -> Vec<Case> {
    let mut cases = Vec::new();
    let size = |s: &mut Shapes| [s.of(1..=24), s.of(1..=24)];
    for element in ELEMENTS {
        for is_vector in [true, false] {
            cases.extend(distinct(shapes, |s| {
                let channels = if is_vector { 8 * s.of(1..=3) } else { s.odd(1..=12) };
                resize_case((s.of(1..=3), size(s), size(s), channels), s.pick(&FILTERS), element)
            }));
            cases.extend(distinct(shapes, |s| {
                let channels = s.of(1..=4);
                let width = if is_vector { 8 * s.of(1..=2) } else { channels + s.below(4) };
                let pitch = if is_vector { width + 8 * s.below(2) } else { (width + s.below(4)) | 1 };
                from_rgb8_case([s.of(1..=900), channels, width, pitch], element)
            }));
        }
        cases.extend(distinct(shapes, |s| {
            let channels = s.of(1..=4);
            to_rgb8_case([s.of(1..=900), channels, 0, channels + s.below(6)], element)
        }));
    }
    cases.extend(distinct(shapes, |s| preview_case(s.of(1..=3), s.of(1..=16), s.of(1..=900))));
    for unit in UNITS {
        cases.extend(distinct(shapes, |s| {
            let (element, each) = unit_of(s, unit);
            let [a, b, skip] = [each * s.odd(1..=9), each * s.below(9), each * s.below(3)];
            let [more_a, more_b, more] = [0; 3].map(|_| each * s.below(4));
            let shape = [s.of(1..=60), a, a + more_a, b, b + more_b, skip, skip + a + b + more];
            concat_case(shape, element)
        }));
        cases.extend(distinct(shapes, |s| {
            let (element, each) = unit_of(s, unit);
            let shift = [0; 2].map(|_| s.below(9) as i32 - 4);
            window_case((s.of(1..=2), size(s), size(s), shift, each * s.odd(1..=5)), element)
        }));
        cases.extend(distinct(shapes, |s| {
            let (element, each) = unit_of(s, unit);
            upsample_case(s.of(1..=20), s.of(1..=20), each * s.odd(1..=5), element)
        }));
    }
    cases
}

fn case(name: String, elements: usize, bytes: usize, tolerance: f64, run: CaseFn) -> Case {
    Case::of_memory("image", name, elements, bytes, tolerance, run)
}

/// Samples, source, target, channels.
type Shape = (usize, [usize; 2], [usize; 2], usize);

fn resize_cases() -> Vec<Case> {
    let shapes: [Shape; 21] = [
        (1, [1, 1], [1, 1], 1),
        (1, [1, 1], [3, 5], 3),
        (1, [4, 4], [1, 1], 8),
        (2, [3, 5], [3, 5], 4),
        (1, [8, 8], [16, 16], 8),
        (1, [5, 7], [11, 13], 3),
        (2, [9, 4], [4, 9], 16),
        (1, [16, 16], [8, 8], 3),
        (1, [17, 31], [5, 100], 1),
        (3, [6, 6], [9, 3], 5),
        (1, [64, 64], [48, 56], 4),
        (4, [12, 10], [25, 7], 1),
        (1, [2, 100], [100, 2], 8),
        (1, [33, 33], [64, 64], 24),
        (1, [100, 1], [37, 3], 2),
        (2, [7, 7], [20, 20], 40),
        (1, [1, 9], [2, 4], 7),
        (1, [50, 40], [13, 11], 3),
        (1, [128, 128], [16, 16], 4),
        (1, [10, 10], [10, 20], 64),
        (5, [8, 3], [5, 8], 9),
    ];
    let mut cases = Vec::new();
    for filter in FILTERS {
        for (i, shape) in shapes.iter().enumerate() {
            cases.push(resize_case(*shape, filter, ELEMENTS[i % 3]));
            cases.push(resize_case(*shape, filter, ELEMENTS[(i + 1) % 3]));
        }
        cases.push(resize_case((1, [1024, 1024], [2048, 2048], 3), filter, Element::F32));
        cases.push(resize_case((2, [64, 64], [128, 128], 1280), filter, Element::F16));
    }
    cases
}

/// Source coordinates and weights of output coordinate `i`, by the formulas that PyTorch documents.
fn taps(filter: Filter, i: usize, old: usize, new: usize) -> Vec<(usize, f64)> {
    let scale = old as f32 / new as f32;
    let (center, last) = (i as f32 + 0.5, old as i64 - 1);
    match filter {
        Filter::Nearest => vec![(((i as f32 * scale) as usize).min(old - 1), 1.0)],
        Filter::NearestExact => vec![(((center * scale) as usize).min(old - 1), 1.0)],
        Filter::Bilinear => {
            let position = (f64::from(center) * f64::from(scale) - 0.5).max(0.0);
            let first = (position as usize).min(old - 1);
            let t = (position - first as f64).min(1.0);
            vec![(first, 1.0 - t), ((first + 1).min(old - 1), t)]
        }
        Filter::Bicubic => {
            let position = f64::from(center) * f64::from(scale) - 0.5;
            let base = position.floor();
            let tap = |k: i64| {
                let x = (position - base - k as f64).abs();
                let weight = match x <= 1.0 {
                    true => 1.25 * x.powi(3) - 2.25 * x.powi(2) + 1.0,
                    false => -0.75 * (x.powi(3) - 5.0 * x.powi(2) + 8.0 * x - 4.0),
                };
                ((base as i64 + k).clamp(0, last) as usize, weight)
            };
            (-1..3).map(tap).collect()
        }
        Filter::Area => {
            let (start, end) = (i * old / new, ((i + 1) * old).div_ceil(new));
            (start..end).map(|k| (k, 1.0 / (end - start) as f64)).collect()
        }
    }
}

fn resize_case(shape: Shape, filter: Filter, element: Element) -> Case {
    let (samples, from, to, channels) = shape;
    let (read, written) = (samples * from[0] * from[1] * channels, samples * to[0] * to[1] * channels);
    let run = move |cx: &mut Context<'_>| -> Result<Measured, CudaError> {
        let x = cx.values(read, 1.0, element);
        let across: Vec<_> = (0..to[1]).map(|i| taps(filter, i, from[1], to[1])).collect();
        let mut want = Vec::with_capacity(written);
        for (n, i) in (0..samples).flat_map(|n| (0..to[0]).map(move |i| (n, i))) {
            let down = taps(filter, i, from[0], to[0]);
            for across in &across {
                for c in 0..channels {
                    let mut sum = 0.0;
                    for (y, wy) in &down {
                        for (x_at, wx) in across {
                            let at = ((n * from[0] + y) * from[1] + x_at) * channels + c;
                            sum += wy * wx * f64::from(x[at]);
                        }
                    }
                    want.push(sum);
                }
            }
        }
        let dx = cx.upload(&x, element)?;
        let out = cx.output(written * element.size())?;
        let gpu = cx.gpu;
        let op = Resize { x: dx.ptr, out: out.ptr, samples, from, to, channels, filter, element };
        cx.measure(out, element, &want, || resize(gpu, &op))
    };
    let tolerance = match filter {
        Filter::Nearest | Filter::NearestExact => 0.0,
        // One rounding of the result; sums of at most 16 terms, or of a window.
        Filter::Area => element.rounding() * 1.01 + 4e-6,
        // Besides, a position may be off by a rounding of the largest, on slopes up to eight times the rms.
        _ => {
            let far = from[0].max(from[1]) as f64;
            element.rounding() * 1.01 + 1e-6 + 8.0 * far * Element::F32.rounding()
        }
    };
    let ([h, w], [new_h, new_w], suffix) = (from, to, element.suffix());
    let name = format!("resize_{suffix} {filter:?} {samples}x{h}x{w}x{channels} to {new_h}x{new_w}");
    case(name, read.max(written), (read + written) * element.size(), tolerance, Box::new(run))
}

/// Pixels, channels, columns, pitch.
const PICTURES: [[usize; 4]; 21] = [
    [1, 1, 1, 1],
    [1, 3, 3, 3],
    [2, 3, 8, 8],
    [3, 3, 4, 5],
    [5, 4, 4, 4],
    [7, 3, 3, 8],
    [16, 1, 1, 1],
    [33, 2, 2, 3],
    [64, 3, 8, 8],
    [85, 3, 3, 3],
    [100, 4, 8, 16],
    [255, 3, 3, 4],
    [256, 3, 8, 8],
    [257, 1, 8, 8],
    [1000, 3, 3, 3],
    [1023, 3, 7, 9],
    [1024, 3, 8, 24],
    [4096, 3, 3, 3],
    [4097, 4, 4, 4],
    [10_000, 3, 8, 8],
    [65_536, 3, 3, 3],
];

fn rgb8_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for element in ELEMENTS {
        for shape in PICTURES {
            cases.push(to_rgb8_case(shape, element));
            cases.push(from_rgb8_case(shape, element));
        }
    }
    cases.push(to_rgb8_case([1 << 20, 3, 8, 8], Element::F32));
    cases.push(from_rgb8_case([1 << 20, 3, 8, 8], Element::F16));
    for channels in [1usize, 3, 4, 16] {
        for (samples, pixels) in [(1, 1), (1, 2), (2, 3), (1, 5), (3, 63), (1, 64), (2, 1023), (1, 4096)] {
            cases.push(preview_case(samples, channels, pixels));
        }
    }
    cases.push(preview_case(4, 4, 1 << 20));
    cases
}

/// The byte of a value in −1..1, every step in f32.
fn level(v: f32) -> u8 {
    (((v + 1.0) * 0.5).clamp(0.0, 1.0) * 255.0) as u8
}

fn to_rgb8_case([pixels, channels, _, pitch]: [usize; 4], element: Element) -> Case {
    let run = move |cx: &mut Context<'_>| -> Result<Measured, CudaError> {
        let mut x = cx.values(pixels * pitch, 0.8, element);
        // Edges of the range, and beyond.
        for (v, edge) in x.iter_mut().zip([1.0, -1.0, 7.5, -9.0, 0.0, f32::INFINITY]) {
            *v = edge;
        }
        let want: Vec<u8> =
            x.chunks_exact(pitch).flat_map(|pixel| pixel[..channels].iter().map(|v| level(*v))).collect();
        let dx = cx.upload(&x, element)?;
        let out = cx.output(want.len())?;
        let gpu = cx.gpu;
        let op = ToRgb8 { x: dx.ptr, out: out.ptr, pixels, channels, pitch, element };
        cx.measure_by(out, |got| differing(got, &want), || to_rgb8(gpu, &op))
    };
    let name = format!("to_rgb8_{} {pixels}x{channels} of {pitch}", element.suffix());
    let bytes = pixels * channels * (element.size() + 1);
    case(name, pixels * pitch, bytes, 0.0, Box::new(run))
}

fn from_rgb8_case([pixels, channels, width, pitch]: [usize; 4], element: Element) -> Case {
    let run = move |cx: &mut Context<'_>| -> Result<Measured, CudaError> {
        let x: Vec<u8> = (0..pixels * channels).map(|_| cx.random() as u8).collect();
        // What lies between `width` and `pitch` must stay as it is.
        let mut values = cx.values(pixels * pitch, 1.0, element);
        let out = cx.output_over(&values, element)?;
        for (row, bytes) in values.chunks_exact_mut(pitch).zip(x.chunks_exact(channels)) {
            row[..width].fill(0.0);
            for (v, byte) in row.iter_mut().zip(bytes) {
                *v = element.round(f32::from(*byte) / 255.0 * 2.0 - 1.0);
            }
        }
        let want = wide(values.iter().copied());
        let dx = cx.upload_bytes(&x)?;
        let gpu = cx.gpu;
        let op = FromRgb8 { x: dx.ptr, out: out.ptr, pixels, channels, width, pitch, element };
        cx.measure(out, element, &want, || from_rgb8(gpu, &op))
    };
    let name = format!("from_rgb8_{} {pixels}x{channels} to {width} of {pitch}", element.suffix());
    let bytes = pixels * (channels + width * element.size());
    case(name, pixels * pitch, bytes, 0.0, Box::new(run))
}

fn preview_case(samples: usize, channels: usize, pixels: usize) -> Case {
    let count = samples * channels * pixels;
    let run = move |cx: &mut Context<'_>| -> Result<Measured, CudaError> {
        let latent = cx.values(count, 1.0, Element::F32);
        let factors: Vec<[f32; 3]> = cx.values(3 * channels, 0.4, Element::F32).as_chunks::<3>().0.to_vec();
        let bias = [0.1084f32, -0.0175, -0.0011];
        let mut want = Vec::with_capacity(3 * samples * pixels);
        for (n, p) in (0..samples).flat_map(|n| (0..pixels).map(move |p| (n, p))) {
            for k in 0..3 {
                let terms = (0..channels)
                    .map(|c| f64::from(latent[(n * channels + c) * pixels + p]) * f64::from(factors[c][k]));
                let v = terms.sum::<f64>() + f64::from(bias[k]);
                want.push(((v + 1.0) / 2.0).clamp(0.0, 1.0) * 255.0);
            }
        }
        let dlatent = cx.upload(&latent, Element::F32)?;
        let out = cx.output(want.len())?;
        let gpu = cx.gpu;
        let (latent, out_ptr) = (dlatent.ptr, out.ptr);
        let op = Preview { latent, out: out_ptr, samples, pixels, factors: &factors, bias };
        // How far the exact value lies outside the interval that the byte stands for.
        let outside = |got: &[u8]| {
            let of = want.len();
            let pairs = got.iter().map(|g| f64::from(*g)).zip(&want).enumerate();
            pairs.fold(Measured::default(), |worst, (at, (got, want))| {
                let error = (got - want).max(want - got - 1.0);
                let fault = Some(Fault::Wrong { at, of, got, want: *want });
                if error > worst.error { Measured { error, fault, micros: None } } else { worst }
            })
        };
        cx.measure_by(out, outside, || preview(gpu, &op))
    };
    let name = format!("preview {samples}x{channels}x{pixels}");
    // Sums of 17 terms of magnitude 1 in f32, times 127.5.
    case(name, count, 4 * count + 3 * samples * pixels, 127.5 * 17.0 * 6e-8, Box::new(run))
}

/// Rows; width and pitch of a; of b; columns skipped in the result, its pitch.
const ROWS: [[usize; 7]; 20] = [
    [1, 1, 1, 0, 0, 0, 1],
    [1, 8, 8, 8, 8, 0, 16],
    [3, 5, 5, 3, 3, 0, 8],
    [7, 8, 16, 0, 0, 0, 8],
    [7, 8, 16, 0, 0, 8, 32],
    [2, 3, 9, 4, 8, 1, 9],
    [100, 16, 16, 8, 8, 0, 24],
    [33, 320, 320, 0, 0, 0, 640],
    [33, 40, 48, 24, 24, 0, 64],
    [5, 2, 2, 2, 2, 0, 4],
    [64, 4, 4, 5, 5, 0, 9],
    [64, 4, 4, 4, 4, 0, 8],
    [9, 1, 3, 1, 2, 1, 4],
    [255, 7, 7, 7, 7, 0, 14],
    [256, 64, 64, 64, 64, 0, 128],
    [77, 768, 768, 1280, 1280, 0, 2048],
    [1, 1000, 1000, 24, 24, 0, 1024],
    [500, 6, 6, 2, 2, 0, 8],
    [20, 31, 31, 1, 1, 0, 32],
    [4, 0, 0, 8, 8, 0, 8],
];

/// Samples, source, target, shift, channels.
type Frame = (usize, [usize; 2], [usize; 2], [i32; 2], usize);

const FRAMES: [Frame; 20] = [
    (1, [1, 1], [1, 1], [0, 0], 1),
    (1, [1, 1], [3, 3], [1, 1], 1),
    (1, [4, 4], [5, 5], [0, 0], 8),
    (2, [4, 4], [2, 2], [-1, -1], 8),
    (1, [5, 3], [9, 7], [2, 3], 3),
    (3, [8, 8], [8, 8], [1, -1], 4),
    (1, [8, 8], [4, 4], [-20, 0], 4),
    (1, [7, 9], [3, 12], [-2, 2], 16),
    (2, [16, 16], [17, 17], [0, 0], 24),
    (1, [10, 10], [6, 6], [-2, -2], 5),
    (1, [2, 3], [1, 1], [0, 0], 2),
    (1, [30, 20], [20, 30], [-5, 5], 1),
    (2, [13, 11], [20, 20], [3, 4], 7),
    (1, [64, 64], [66, 66], [1, 1], 8),
    (1, [3, 3], [6, 6], [3, 3], 6),
    (4, [5, 5], [5, 5], [0, 0], 9),
    (1, [12, 12], [10, 14], [-1, 1], 40),
    (1, [100, 1], [50, 1], [-50, 0], 3),
    (1, [9, 9], [9, 9], [8, 8], 10),
    (2, [6, 7], [8, 9], [1, 1], 12),
];

fn move_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (i, shape) in ROWS.iter().enumerate() {
        cases.push(concat_case(*shape, ELEMENTS[i % 3]));
        cases.push(concat_case(*shape, ELEMENTS[(i + 1) % 3]));
    }
    for (i, shape) in FRAMES.iter().enumerate() {
        cases.push(window_case(*shape, ELEMENTS[i % 3]));
        cases.push(window_case(*shape, ELEMENTS[(i + 1) % 3]));
        let (samples, [h, w], ..) = *shape;
        cases.push(upsample_case(samples * h, w, shape.4, ELEMENTS[i % 3]));
        cases.push(upsample_case(samples * h, w, shape.4, ELEMENTS[(i + 2) % 3]));
    }
    cases.push(concat_case([8192, 640, 640, 320, 320, 0, 960], Element::F16));
    cases.push(upsample_case(128, 64, 640, Element::F16));
    cases.push(window_case((1, [1024, 1024], [1025, 1025], [0, 0], 8), Element::F16));
    cases
}

fn concat_case(shape: [usize; 7], element: Element) -> Case {
    let [rows, width_a, pitch_a, width_b, pitch_b, skip, pitch] = shape;
    let width = width_a + width_b;
    let run = move |cx: &mut Context<'_>| -> Result<Measured, CudaError> {
        let (a, b) = (cx.values(rows * pitch_a, 1.0, element), cx.values(rows * pitch_b, 1.0, element));
        let mut values = cx.values(rows * pitch, 1.0, element);
        let out = cx.output_over(&values, element)?;
        for (r, row) in values.chunks_exact_mut(pitch).enumerate() {
            row[skip..skip + width_a].copy_from_slice(&a[r * pitch_a..][..width_a]);
            row[skip + width_a..skip + width].copy_from_slice(&b[r * pitch_b..][..width_b]);
        }
        let (da, db) = (cx.upload(&a, element)?, cx.upload(&b, element)?);
        let gpu = cx.gpu;
        let op = Concat {
            a: Columns { ptr: da.ptr, width: width_a, pitch: pitch_a },
            b: (width_b > 0).then_some(Columns { ptr: db.ptr, width: width_b, pitch: pitch_b }),
            out: out.ptr.offset(skip * element.size()),
            out_pitch: pitch,
            rows,
            element,
        };
        cx.measure(out, element, &wide(values.iter().copied()), || concat(gpu, &op))
    };
    let name = format!(
        "concat_{} {rows} rows {width_a}/{pitch_a}+{width_b}/{pitch_b} to {skip}/{pitch}",
        element.suffix()
    );
    case(name, rows * pitch, 2 * rows * width * element.size(), 0.0, Box::new(run))
}

fn window_case((samples, from, to, shift, channels): Frame, element: Element) -> Case {
    let (read, written) = (samples * from[0] * from[1] * channels, samples * to[0] * to[1] * channels);
    let run = move |cx: &mut Context<'_>| -> Result<Measured, CudaError> {
        let x = cx.values(read, 1.0, element);
        let mut want = vec![0.0; written];
        for (i, w) in want.iter_mut().enumerate() {
            let (c, pixel) = (i % channels, i / channels);
            let (n, y, col) = (pixel / to[1] / to[0], pixel / to[1] % to[0], pixel % to[1]);
            let (y, col) = (y as i64 - i64::from(shift[0]), col as i64 - i64::from(shift[1]));
            if (0..from[0] as i64).contains(&y) && (0..from[1] as i64).contains(&col) {
                *w = f64::from(x[((n * from[0] + y as usize) * from[1] + col as usize) * channels + c]);
            }
        }
        let dx = cx.upload(&x, element)?;
        let out = cx.output(written * element.size())?;
        let gpu = cx.gpu;
        let op = Window { x: dx.ptr, out: out.ptr, samples, from, to, shift, channels, element };
        cx.measure(out, element, &want, || window(gpu, &op))
    };
    let ([h, w], [new_h, new_w], [top, left], suffix) = (from, to, shift, element.suffix());
    let name = format!("window_{suffix} {samples}x{h}x{w}x{channels} to {new_h}x{new_w} at {top},{left}");
    case(name, read.max(written), (read + written) * element.size(), 0.0, Box::new(run))
}

fn upsample_case(rows: usize, width: usize, channels: usize, element: Element) -> Case {
    let read = rows * width * channels;
    let run = move |cx: &mut Context<'_>| -> Result<Measured, CudaError> {
        let x = cx.values(read, 1.0, element);
        let mut want = Vec::with_capacity(4 * read);
        for (y, col) in (0..2 * rows).flat_map(|y| (0..2 * width).map(move |col| (y, col))) {
            let at = (y / 2 * width + col / 2) * channels;
            want.extend(wide(x[at..at + channels].iter().copied()));
        }
        let dx = cx.upload(&x, element)?;
        let out = cx.output(4 * read * element.size())?;
        let gpu = cx.gpu;
        let op = Upsample2x { x: dx.ptr, out: out.ptr, rows, width, channels, element };
        cx.measure(out, element, &want, || upsample2x(gpu, &op))
    };
    let name = format!("upsample2x_{} {rows}x{width}x{channels}", element.suffix());
    case(name, 4 * read, 5 * read * element.size(), 0.0, Box::new(run))
}
