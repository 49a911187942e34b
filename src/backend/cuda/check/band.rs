//! Cases of frequencies scaled.

use std::f64::consts::TAU;

use super::random::{Shapes, distinct};
use super::{Case, Context, Measured};
use crate::backend::cuda::launch::band::{ScaleBands, scale_bands};
use crate::backend::cuda::{CudaError, Element};

/// Planes, height, width, half side of the square.
const SIZES: [[usize; 4]; 9] = [
    [1, 1, 1, 1],
    [2, 1, 5, 1],
    [1, 8, 8, 2],
    [4, 6, 5, 2],
    [3, 9, 12, 3],
    [2, 16, 33, 20],
    [1, 40, 36, 7],
    [1, 3, 300, 20],
    [1, 64, 64, 10],
];

pub(super) fn cases() -> Vec<Case> {
    SIZES.iter().map(|size| bands_case(*size)).collect()
}

pub(super) fn random(shapes: &mut Shapes) -> Vec<Case> {
    distinct(shapes, |s| bands_case([s.of(1..=3), s.of(1..=24), s.of(1..=40), s.of(1..=6)]))
}

fn bands_case([planes, h, w, cutoff]: [usize; 4]) -> Case {
    let count = planes * h * w;
    let (low, high) = (1.5f32, 0.75f32);
    let run = move |cx: &mut Context<'_>| -> Result<Measured, CudaError> {
        let x = cx.values(count, 1.0, Element::F32);
        let plane =
            |p: usize| want(&x[p * h * w..(p + 1) * h * w], [h, w], cutoff, [low, high].map(f64::from));
        let want: Vec<f64> = (0..planes).flat_map(plane).collect();
        let dx = cx.upload(&x, Element::F32)?;
        let out = cx.output(4 * count)?;
        let gpu = cx.gpu;
        let op = ScaleBands { x: dx.ptr, out: out.ptr, planes, size: [h, w], cutoff, low, high };
        cx.measure(out, Element::F32, &want, || scale_bands(gpu, &op))
    };
    let name = format!("scale_bands {planes}x{h}x{w} at {cutoff}");
    // Two sums as long as the sides: their terms fall with the distance, and roundings of a hundred of them cancel.
    Case::of_memory("sampling", name, count, 8 * count, 24.0 * Element::F32.rounding(), Box::new(run))
}

/// By the discrete Fourier transform, frequency by frequency of the square.
fn want(x: &[f32], [h, w]: [usize; 2], cutoff: usize, [low, high]: [f64; 2]) -> Vec<f64> {
    let kept = |n: usize| {
        let cutoff = cutoff.min(n / 2) as i64;
        (-cutoff..cutoff).map(|f| f as f64)
    };
    let wave =
        |v: f64, u: f64, i: usize| TAU * (v * (i / w) as f64 / h as f64 + u * (i % w) as f64 / w as f64);
    let mut band = vec![0.0; h * w];
    for v in kept(h) {
        for u in kept(w) {
            let terms = x.iter().enumerate().map(|(i, x)| (f64::from(*x), wave(v, u, i)));
            let (re, im) = terms.fold((0.0, 0.0), |(re, im), (x, t)| (re + x * t.cos(), im - x * t.sin()));
            for (i, band) in band.iter_mut().enumerate() {
                let t = wave(v, u, i);
                *band += (re * t.cos() - im * t.sin()) / (h * w) as f64;
            }
        }
    }
    x.iter().zip(band).map(|(x, band)| high * f64::from(*x) + (low - high) * band).collect()
}
