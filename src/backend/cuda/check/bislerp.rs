//! Cases of resizing by directions, against the same in f64; the neighbours are those of the CPU's reference.

use super::random::{ELEMENTS, Shapes, distinct};
use super::{Case, Context, Measured, wide};
use crate::backend::cuda::launch::bislerp::{Bislerp, bislerp};
use crate::backend::cuda::{CudaError, Element};
use crate::tensor::bislerp::{PARALLEL, neighbours};

/// Samples, source, target, channels.
type Shape = (usize, [usize; 2], [usize; 2], usize);

const MAPS: [Shape; 20] = [
    (1, [1, 1], [1, 1], 1),
    (1, [1, 1], [3, 5], 3),
    (1, [4, 4], [1, 1], 8),
    (2, [3, 5], [3, 5], 4),
    (1, [8, 8], [16, 16], 8),
    (1, [5, 7], [11, 13], 3),
    (2, [9, 4], [4, 9], 16),
    (1, [16, 16], [8, 8], 33),
    (1, [17, 31], [5, 20], 1),
    (3, [6, 6], [9, 3], 5),
    (1, [24, 24], [18, 21], 4),
    (4, [6, 5], [12, 3], 31),
    (1, [2, 40], [40, 2], 8),
    (1, [17, 17], [8, 8], 65),
    (1, [100, 1], [37, 3], 4),
    (2, [7, 7], [10, 10], 40),
    (1, [1, 9], [2, 4], 7),
    (1, [25, 20], [13, 11], 3),
    (1, [8, 8], [4, 4], 320),
    (5, [8, 3], [5, 8], 9),
];

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (i, shape) in MAPS.iter().enumerate() {
        cases.push(case(*shape, ELEMENTS[i % 3]));
        cases.push(case(*shape, ELEMENTS[(i + 1) % 3]));
    }
    cases.push(case((2, [128, 128], [64, 64], 320), Element::F16));
    cases
}

/// Small maps of any size and width. Vectors over two channels are often all but parallel, where the kernel and the
/// reference may take another side of the limit.
pub(super) fn random(shapes: &mut Shapes) -> Vec<Case> {
    let mut cases = Vec::new();
    for element in ELEMENTS {
        cases.extend(distinct(shapes, |s| {
            let mut size = || [s.of(1..=16), s.of(1..=16)];
            let (from, to) = (size(), size());
            case((s.of(1..=2), from, to, s.of(3..=70)), element)
        }));
    }
    cases
}

fn case(shape: Shape, element: Element) -> Case {
    let (samples, from, to, channels) = shape;
    let (read, written) = (samples * from[0] * from[1] * channels, samples * to[0] * to[1] * channels);
    let run = move |cx: &mut Context<'_>| -> Result<Measured, CudaError> {
        let x = cx.values(read, 1.0, element);
        let want = reference(&wide(x.iter().copied()), shape);
        let dx = cx.upload(&x, element)?;
        let out = cx.output(written * element.size())?;
        let gpu = cx.gpu;
        let op = Bislerp { x: dx.ptr, out: out.ptr, samples, from, to, channels, element };
        cx.measure(out, element, &want, || bislerp(gpu, &op))
    };
    let ([h, w], [new_h, new_w], suffix) = (from, to, element.suffix());
    let name = format!("bislerp_{suffix} {samples}x{h}x{w}x{channels} to {new_h}x{new_w}");
    // One rounding of the result. Before it an arc cosine and sines of float, of angles that are at least 0.004 off 0
    // and π: a rounding of the cosine is 250 of the angle's sine.
    let tolerance = element.rounding() * 1.01 + 4e-5;
    let bytes = (read + written) * element.size();
    Case::of_memory("image", name, read.max(written), bytes, tolerance, Box::new(run))
}

/// First along the width, then along the height.
fn reference(x: &[f64], (samples, from, to, channels): Shape) -> Vec<f64> {
    let wide = along(x, samples * from[0], (from[1], to[1]), channels);
    let row = to[1] * channels;
    let mut out = Vec::new();
    for plane in wide.chunks_exact(from[0] * row) {
        for i in 0..to[0] {
            let (at, next, ratio) = neighbours(i, from[0], to[0]);
            let cells = plane[at * row..][..row].chunks_exact(channels);
            for (a, b) in cells.zip(plane[next * row..][..row].chunks_exact(channels)) {
                out.extend(between(a, b, f64::from(ratio)));
            }
        }
    }
    out
}

fn along(x: &[f64], rows: usize, (old, new): (usize, usize), channels: usize) -> Vec<f64> {
    let mut out = Vec::with_capacity(rows * new * channels);
    for row in x.chunks_exact(old * channels) {
        for i in 0..new {
            let (at, next, ratio) = neighbours(i, old, new);
            let cell = |i: usize| &row[i * channels..][..channels];
            out.extend(between(cell(at), cell(next), f64::from(ratio)));
        }
    }
    out
}

/// The vector at `r` on the way from `a` to `b`.
fn between(a: &[f64], b: &[f64], r: f64) -> Vec<f64> {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    let (la, lb) = (dot(a, a).sqrt(), dot(b, b).sqrt());
    let inverse = |l: f64| if l == 0.0 { 0.0 } else { 1.0 / l };
    let cos = dot(a, b) * inverse(la) * inverse(lb);
    let limit = 1.0 - f64::from(PARALLEL);
    let (of_a, of_b) = if cos > limit {
        (1.0, 0.0)
    } else if cos < -limit {
        (1.0 - r, r)
    } else {
        let (angle, length) = (cos.acos(), la * (1.0 - r) + lb * r);
        let share = |r: f64, l: f64| (r * angle).sin() / angle.sin() * length * inverse(l);
        (share(1.0 - r, la), share(r, lb))
    };
    a.iter().zip(b).map(|(a, b)| of_a * a + of_b * b).collect()
}
