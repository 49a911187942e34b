//! Cases of regional prompts: predictions averaged by place.

use super::random::{Shapes, distinct};
use super::{Case, Context, Measured};
use crate::backend::cuda::launch::region::{MeanByPlace, Part, mean_by_place};
use crate::backend::cuda::{CudaError, Element};
use crate::driver::DevicePtr;

/// Samples, channels, height, width, and how many parts.
type Size = ([usize; 4], usize);

const SIZES: [Size; 8] = [
    ([1, 4, 1, 1], 1),
    ([1, 4, 8, 8], 2),
    ([2, 4, 8, 6], 3),
    ([3, 4, 5, 9], 6),
    ([1, 3, 16, 12], 7),
    ([2, 16, 7, 7], 13),
    ([1, 4, 64, 64], 4),
    ([2, 1, 33, 40], 5),
];

const LEAST: f32 = 1e-37;

pub(super) fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = SIZES.iter().map(|size| mean_case(*size, 1)).collect();
    cases.push(mean_case(([4, 4, 512, 512], 6), 1));
    cases
}

pub(super) fn random(shapes: &mut Shapes) -> Vec<Case> {
    distinct(shapes, |s| {
        let shape = [s.of(1..=3), s.of(1..=6), s.of(1..=24), s.of(1..=24)];
        mean_case((shape, s.of(1..=9)), s.below(1000) as u64)
    })
}

/// A part of the picture, by the numbers of a case.
struct Drawn {
    at: [usize; 2],
    size: [usize; 2],
    x: Vec<f32>,
    weights: Vec<f32>,
    weight_samples: usize,
    strength: f32,
}

impl Drawn {
    fn new(cx: &mut Context<'_>, [n, c, h, w]: [usize; 4], k: usize) -> Self {
        let mut below = |n: usize| (cx.random() % n as u64) as usize;
        // One in three covers the picture.
        let (at, size) = match k % 3 {
            0 => ([0, 0], [h, w]),
            _ => {
                let at = [below(h), below(w)];
                (at, [1 + below(h - at[0]), 1 + below(w - at[1])])
            }
        };
        let (places, weight_samples) = (size[0] * size[1], [0, 1, n][below(3)]);
        let weights = cx.values(weight_samples * places, 0.2, Element::F32);
        Self {
            at,
            size,
            x: cx.values(n * c * places, 1.0, Element::F32),
            weights: weights.iter().map(|v| (v + 0.5).clamp(0.0, 1.0)).collect(),
            weight_samples,
            strength: 0.25 + 0.25 * k as f32,
        }
    }

    /// Index of a place inside, if it is there.
    fn place(&self, y: usize, x: usize) -> Option<usize> {
        let (row, column) = (y.checked_sub(self.at[0])?, x.checked_sub(self.at[1])?);
        (row < self.size[0] && column < self.size[1]).then_some(row * self.size[1] + column)
    }
}

fn mean_case((shape, parts): Size, draw: u64) -> Case {
    let [n, c, h, w] = shape;
    let count = n * c * h * w;
    let run = move |cx: &mut Context<'_>| -> Result<Measured, CudaError> {
        let drawn: Vec<Drawn> =
            (0..parts).map(|k| Drawn::new(cx, shape, k + usize::from(draw.is_multiple_of(2)))).collect();
        let want: Vec<f64> = (0..count).map(|i| want(&drawn, shape, i)).collect();
        let mut all = Vec::new();
        for part in &drawn {
            let weights = cx.upload(&part.weights, Element::F32)?.ptr;
            all.push(Part {
                x: cx.upload(&part.x, Element::F32)?.ptr,
                weights: if part.weight_samples == 0 { DevicePtr::NULL } else { weights },
                weight_samples: part.weight_samples,
                strength: part.strength,
                at: part.at,
                size: part.size,
            });
        }
        let out = cx.output(4 * count)?;
        let gpu = cx.gpu;
        let (samples, channels, size) = (n, c, [h, w]);
        let op = MeanByPlace { parts: &all, out: out.ptr, samples, channels, size, least: LEAST };
        cx.measure(out, Element::F32, &want, || mean_by_place(gpu, &op))
    };
    let name = format!("mean_by_place {n}x{c}x{h}x{w} of {parts} parts, draw {draw}");
    // A product and an addition a part, and the quotient.
    let tolerance = (4 + 2 * parts) as f64 * Element::F32.rounding();
    Case::of_memory("sampling", name, count, 4 * count * (parts + 1), tolerance, Box::new(run))
}

fn want(parts: &[Drawn], [_, c, h, w]: [usize; 4], i: usize) -> f64 {
    let (n, channel, y, x) = (i / (c * h * w), i / (h * w) % c, i / w % h, i % w);
    let (mut total, mut weight) = (0.0, f64::from(LEAST));
    for part in parts {
        let Some(place) = part.place(y, x) else { continue };
        let size = part.size[0] * part.size[1];
        let m = match part.weight_samples {
            0 => part.strength,
            samples => part.weights[n % samples * size + place],
        };
        total += f64::from(m) * f64::from(part.x[(n * c + channel) * size + place]);
        weight += f64::from(m);
    }
    total / weight
}
