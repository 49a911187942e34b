//! Cases of planes blurred where a map says so.

use super::random::{Shapes, distinct};
use super::{Case, Context, Measured};
use crate::backend::cuda::launch::blur::{BlurWhere, blur_where};
use crate::backend::cuda::{CudaError, Element};

/// Samples, channels, height, width, rows and columns of the map, taps on either side.
type Size = [usize; 7];

const SIZES: [Size; 8] = [
    [1, 1, 1, 1, 1, 1, 0],
    [1, 4, 5, 5, 1, 1, 4],
    [2, 4, 8, 8, 1, 1, 4],
    [3, 4, 16, 12, 4, 3, 4],
    [1, 16, 9, 33, 3, 8, 3],
    [70, 1, 6, 7, 2, 2, 2],
    [2, 4, 64, 64, 8, 8, 4],
    [1, 3, 40, 31, 50, 60, 1],
];

const THRESHOLD: f32 = 1.0;

pub(super) fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = SIZES.iter().map(|size| blur_case(*size)).collect();
    cases.push(blur_case([8, 4, 256, 256, 32, 32, 4]));
    cases
}

pub(super) fn random(shapes: &mut Shapes) -> Vec<Case> {
    distinct(shapes, |s| {
        let half = s.of(0..=4);
        let [h, w] = [half + s.of(1..=20), half + s.of(1..=20)];
        blur_case([s.of(1..=4), s.of(1..=5), h, w, s.of(1..=9), s.of(1..=9), half])
    })
}

fn blur_case([samples, channels, h, w, rows, columns, half]: Size) -> Case {
    let count = samples * channels * h * w;
    let run = move |cx: &mut Context<'_>| -> Result<Measured, CudaError> {
        let x = cx.values(count, 1.0, Element::F32);
        let maps = samples.div_ceil(2);
        let map: Vec<f32> =
            cx.values(maps * rows * columns, 0.5, Element::F32).iter().map(|v| v + 1.0).collect();
        let taps: Vec<f32> = cx
            .values(2 * half + 1, 0.1, Element::F32)
            .iter()
            .map(|v| v + 1.0 / (2 * half + 1) as f32)
            .collect();
        let map_of: Vec<usize> = (0..samples).map(|_| (cx.random() % maps as u64) as usize).collect();
        let mut want = Vec::with_capacity(count);
        for (n, c) in (0..samples).flat_map(|n| (0..channels).map(move |c| (n, c))) {
            let plane = &x[(n * channels + c) * h * w..][..h * w];
            for (y, i) in (0..h).flat_map(|y| (0..w).map(move |i| (y, i))) {
                let cell = (map_of[n] * rows + y * rows / h) * columns + i * columns / w;
                let is_blurred = map[cell] > THRESHOLD;
                want.push(if is_blurred {
                    filtered(plane, [h, w], [y, i], &taps)
                } else {
                    f64::from(plane[y * w + i])
                });
            }
        }
        let (dx, dmap) = (cx.upload(&x, Element::F32)?, cx.upload(&map, Element::F32)?);
        let out = cx.output(4 * count)?;
        let gpu = cx.gpu;
        let op = BlurWhere {
            x: dx.ptr,
            out: out.ptr,
            channels,
            size: [h, w],
            map: dmap.ptr,
            map_size: [rows, columns],
            map_of: &map_of,
            threshold: THRESHOLD,
            taps: &taps,
        };
        cx.measure(out, Element::F32, &want, || blur_where(gpu, &op))
    };
    let name = format!("blur_where {samples}x{channels}x{h}x{w} by {rows}x{columns}, {half} on a side");
    // Two sums of at most nine terms about as large as the result.
    Case::of_memory("sampling", name, count, 8 * count, 16.0 * Element::F32.rounding(), Box::new(run))
}

/// The filter at one place, from the definition: a mirror on the first and last element.
fn filtered(plane: &[f32], [h, w]: [usize; 2], [y, x]: [usize; 2], taps: &[f32]) -> f64 {
    let half = taps.len() as i64 / 2;
    let mirrored = |place: i64, n: usize| {
        let (place, last) = (place.abs(), n as i64 - 1);
        if place > last { 2 * last - place } else { place }
    };
    let mut sum = 0.0;
    for (d, down) in (-half..=half).zip(taps) {
        for (e, across) in (-half..=half).zip(taps) {
            let at = mirrored(y as i64 + d, h) as usize * w + mirrored(x as i64 + e, w) as usize;
            sum += f64::from(*down) * f64::from(*across) * f64::from(plane[at]);
        }
    }
    sum
}
