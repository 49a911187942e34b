//! Cases of attention that is drawn, against the same in f64.

use super::random::{ELEMENTS, Shapes, distinct};
use super::{Case, Context, Measured};
use crate::backend::cuda::launch::attention_drawn::{Drawn, drawn};
use crate::backend::cuda::launch::epilogue::Rows;
use crate::backend::cuda::{CudaError, Element};

/// Samples, heads, columns of a head, queries, keys, elements between two rows besides.
const SHAPES: [[usize; 6]; 21] = [
    [1, 1, 1, 1, 1, 0],
    [1, 1, 8, 1, 5, 0],
    [1, 2, 8, 8, 8, 0],
    [2, 1, 16, 9, 7, 0],
    [1, 3, 5, 17, 31, 0],
    [1, 1, 40, 64, 64, 0],
    [2, 2, 24, 33, 65, 3],
    [1, 8, 8, 16, 16, 8],
    [1, 1, 160, 12, 20, 0],
    [3, 2, 12, 5, 40, 1],
    [1, 5, 64, 24, 24, 0],
    [1, 1, 8, 600, 10, 0],
    [1, 1, 8, 3, 300, 0],
    [1, 2, 33, 100, 9, 0],
    [4, 1, 8, 2, 2, 16],
    [1, 4, 16, 49, 129, 0],
    [2, 3, 7, 20, 128, 2],
    [1, 2, 80, 30, 30, 0],
    [1, 1, 320, 9, 11, 0],
    [5, 2, 8, 7, 6, 0],
    [2, 20, 64, 1024, 1024, 0],
];

pub(super) fn cases() -> Vec<Case> {
    let shapes = SHAPES.iter().enumerate();
    shapes.flat_map(|(i, shape)| [i, i + 1].map(|i| case(*shape, ELEMENTS[i % 3]))).collect()
}

/// Heads of whole vectors and others, with more queries than a head has blocks once in a while.
pub(super) fn random(shapes: &mut Shapes) -> Vec<Case> {
    let mut cases = Vec::new();
    for element in ELEMENTS {
        cases.extend(distinct(shapes, |s| {
            let (dim, gap) =
                if s.once_in(2) { (8 * s.of(1..=5), 8 * s.below(2)) } else { (s.odd(1..=40), s.below(4)) };
            let queries = if s.once_in(8) { s.of(513..=700) } else { s.of(1..=70) };
            let keys = if queries > 70 { s.of(1..=20) } else { s.of(1..=150) };
            case([s.of(1..=2), s.of(1..=3), dim, queries, keys, gap], element)
        }));
    }
    cases
}

fn case([samples, heads, dim, queries, keys, gap]: [usize; 6], element: Element) -> Case {
    let pitch = heads * dim + gap;
    let products = samples * heads * queries * keys;
    let run = move |cx: &mut Context<'_>| -> Result<Measured, CudaError> {
        // Scores of deviation 2: shares of a tenth and of a thousandth.
        let q = cx.values(samples * queries * pitch, 2.0, element);
        let k = cx.values(samples * keys * pitch, 1.0, element);
        let scale = 1.0 / (dim as f32).sqrt();
        let want = reference([&q, &k], [samples, heads, dim, queries, keys], pitch, scale);
        let (dq, dk) = (cx.upload(&q, element)?, cx.upload(&k, element)?);
        let out = cx.output(samples * keys * size_of::<f32>())?;
        let gpu = cx.gpu;
        let op = Drawn {
            q: Rows::new(dq.ptr, pitch),
            k: Rows::new(dk.ptr, pitch),
            out: out.ptr,
            samples,
            queries,
            keys,
            heads,
            head_dim: dim,
            scale,
            element,
        };
        cx.measure(out, Element::F32, &want, || drawn(gpu, &op))
    };
    let suffix = element.suffix();
    let name = format!("attention_drawn_{suffix} b{samples} h{heads} d{dim} q{queries} k{keys} gap {gap}");
    Case {
        family: "attention",
        name,
        quick: products * dim < 200_000,
        needs_gpu: products * dim > 20_000_000,
        is_random: false,
        flops: 4.0 * (products * dim) as f64,
        bytes: (samples * (queries + keys) * heads * dim * element.size()) as f64,
        // A score of up to 10 is off by some roundings of it, its exponential by as many times its value.
        tolerance: 1e-5,
        run: Box::new(run),
    }
}

fn reference(
    [q, k]: [&[f32]; 2],
    [samples, heads, dim, queries, keys]: [usize; 5],
    pitch: usize,
    scale: f32,
) -> Vec<f64> {
    let mut out = vec![0.0; samples * keys];
    for (sample, out) in out.chunks_exact_mut(keys).enumerate() {
        for (head, query) in (0..heads).flat_map(|head| (0..queries).map(move |query| (head, query))) {
            let row = |x: &[f32], at: usize| x[at * pitch + head * dim..][..dim].to_vec();
            let mine = row(q, sample * queries + query);
            let score = |key: usize| -> f64 {
                let theirs = row(k, sample * keys + key);
                let products = mine.iter().zip(&theirs).map(|(a, b)| f64::from(*a) * f64::from(*b));
                (products.sum::<f64>() * f64::from(scale)).exp()
            };
            let scores: Vec<f64> = (0..keys).map(score).collect();
            let total: f64 = scores.iter().sum();
            out.iter_mut().zip(&scores).for_each(|(o, s)| *o += s / total / heads as f64);
        }
    }
    out
}
