//! Attention.

use super::*;

#[derive(Clone, Copy, Debug)]
struct Case {
    batch: usize,
    queries: usize,
    keys: usize,
    heads: usize,
    d: usize,
    /// Samples that share keys and values.
    sharing: usize,
    is_causal: bool,
    spread: f32,
}

fn attention_case(b: &CpuBackend, case: Case, rng: &mut Rng) {
    let width = case.heads * case.d;
    let sample_keys = case.batch / case.sharing;
    let scaled = |shape: Shape, rng: &mut Rng| {
        let values: Vec<f32> = rng.values(shape.len()).iter().map(|v| v * case.spread).collect();
        b.put(shape, &values)
    };
    let q = scaled(Shape::tokens(case.batch, case.queries, width + 3), rng);
    let kv = scaled(Shape::tokens(sample_keys, case.keys, 2 * width + 1), rng);
    let scale = (case.d as f32).sqrt().recip();
    let op = Attention {
        q: Cols::range(&q, 2, width),
        k: Cols::range(&kv, 0, width),
        v: Cols::range(&kv, width + 1, width),
        heads: case.heads,
        is_causal: case.is_causal,
        scale,
    };
    let mut out = b.poisoned(Shape::tokens(case.batch, case.queries, width));
    b.attention(&op, &mut out).unwrap();

    let (qv, kvv) = (b.get(&q), b.get(&kv));
    let mut reference = vec![0f64; case.batch * case.queries * width];
    for n in 0..case.batch {
        let kn = n / case.sharing;
        for h in 0..case.heads {
            for i in 0..case.queries {
                let q = &qv[(n * case.queries + i) * (width + 3) + 2 + h * case.d..][..case.d];
                let seen = if case.is_causal { (i + 1).min(case.keys) } else { case.keys };
                let row = |j: usize| &kvv[(kn * case.keys + j) * (2 * width + 1)..][..2 * width + 1];
                let score = |j: usize| {
                    let k = &row(j)[h * case.d..][..case.d];
                    let dot: f64 = q.iter().zip(k).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                    dot * f64::from(scale)
                };
                let scores: Vec<f64> = (0..seen).map(score).collect();
                let top = scores.iter().fold(f64::MIN, |m, &s| m.max(s));
                let total: f64 = scores.iter().map(|s| (s - top).exp()).sum();
                let out = &mut reference[(n * case.queries + i) * width + h * case.d..][..case.d];
                for (j, s) in scores.iter().enumerate() {
                    let weight = (s - top).exp() / total;
                    let v = &row(j)[width + 1 + h * case.d..][..case.d];
                    for (o, v) in out.iter_mut().zip(v) {
                        *o += weight * f64::from(*v);
                    }
                }
            }
        }
    }
    // Scores grow with spread² and carry their rounding error into the exponent.
    let tolerance = 1e-6 * f64::from(1.0 + case.spread * case.spread);
    // bf16 instructions round the softmax weights as well as the result.
    match b.exec.tier {
        Some(_) => b.check_with(&format!("{case:?}"), &out, &reference, 1.0 / 125.0),
        None => b.check(&format!("{case:?}"), &out, &reference, tolerance),
    }
}

#[test]
fn attention_matches_the_reference() {
    let plain =
        Case { batch: 2, queries: 64, keys: 64, heads: 2, d: 40, sharing: 1, is_causal: false, spread: 1.0 };
    let cases = [
        plain,
        Case { queries: 50, keys: 77, ..plain },
        Case { queries: 33, keys: 400, d: 80, ..plain },
        Case { queries: 1, keys: 1, d: 8, heads: 1, ..plain },
        Case { queries: 5, keys: 169, d: 160, ..plain },
        Case { batch: 1, queries: 70, keys: 350, d: 512, heads: 1, ..plain },
        Case { queries: 64, keys: 77, sharing: 2, ..plain },
        Case { batch: 6, queries: 9, keys: 77, sharing: 3, ..plain },
        Case { queries: 77, keys: 77, d: 64, is_causal: true, ..plain },
        Case { queries: 300, keys: 300, d: 16, is_causal: true, spread: 3.0, ..plain },
        Case { queries: 40, keys: 500, d: 24, spread: 6.0, ..plain },
        Case { queries: 20, keys: 30, d: 7, ..plain },
    ];
    let mut rng = Rng(5);
    for b in backends() {
        for case in cases {
            attention_case(&b, case, &mut rng);
        }
    }
}

#[test]
fn random_attention_matches_the_reference() {
    let mut rng = Rng(6);
    let backends = backends();
    for i in 0..40 {
        let (samples, sharing) = (rng.range(1, 3), rng.range(1, 2));
        let case = Case {
            batch: samples * sharing,
            queries: rng.range(1, 120),
            keys: rng.range(1, 200),
            heads: rng.range(1, 4),
            d: 8 * rng.range(1, 20),
            sharing,
            is_causal: sharing == 1 && rng.range(0, 2) == 0,
            spread: 2.0,
        };
        attention_case(&backends[i % backends.len()], case, &mut rng);
    }
}

/// Odd sizes, two of three samples, columns in the middle of wider rows.
#[test]
fn drawn_attention_matches_the_reference() {
    let mut rng = Rng(13);
    let (heads, d, queries, keys, scale) = (3, 5, 7, 11, 0.7f32);
    let width = heads * d;
    for b in backends() {
        let q = b.random(Shape::tokens(3, queries, width + 4), &mut rng);
        let k = b.random(Shape::tokens(3, keys, width + 2), &mut rng);
        let op = AttentionDrawn {
            q: Cols::range(&q, 3, width),
            k: Cols::range(&k, 1, width),
            heads,
            scale,
            first: 1,
        };
        let mut out = b.alloc_f32(Shape::nhwc(2, 1, keys, 1)).unwrap();
        b.attention_drawn(&op, &mut out).unwrap();
        let (qv, kv) = (b.get(&q), b.get(&k));
        let mut want = vec![0f64; 2 * keys];
        for (n, h, i) in (0..2).flat_map(|n| (0..heads * queries).map(move |i| (n, i / queries, i % queries)))
        {
            let q = &qv[((n + 1) * queries + i) * (width + 4) + 3 + h * d..][..d];
            let score = |j: usize| -> f64 {
                let k = &kv[((n + 1) * keys + j) * (width + 2) + 1 + h * d..][..d];
                let dot: f64 = q.iter().zip(k).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                (dot * f64::from(scale)).exp()
            };
            let total: f64 = (0..keys).map(score).sum();
            (0..keys).for_each(|j| want[n * keys + j] += score(j) / total / heads as f64);
        }
        assert_eq!(out.dtype(), DType::F32);
        b.check_with("attention drawn", &out, &want, 1e-6);
        let sum: f32 = b.get(&out).iter().sum();
        assert!((sum - 2.0 * queries as f32).abs() < 1e-4, "every query shares out 1: {sum}");
    }
}
