//! Tolerance: the output is a mean of values of magnitude ≤ 1 with weights
//! rounded to bf16 (2⁻⁹ each, of random sign), then rounded itself:
//! 2⁻⁸·|ref| + 2⁻⁸·(mean of |p·v|).

use super::super::*;
use super::Random;
use half::bf16;

#[derive(Clone, Copy, Debug)]
struct Case {
    batch: usize,
    heads: usize,
    dim: usize,
    queries: usize,
    keys: usize,
    is_causal: bool,
    /// Spread of the scores: large values move the running maximum often.
    spread: f32,
    seed: u64,
}

fn check_case(tier: Tier, case: Case) {
    let Case { batch, heads, dim, queries, keys, is_causal, spread, seed } = case;
    let mut random = Random(seed * 13 + 5);
    let width = heads * dim;
    // Self-attention reads one fused QKV matrix, cross-attention a fused KV.
    let is_fused = queries == keys && random.next() & 1 == 1;
    let q_stride = if is_fused { 3 * width } else { width + 2 };
    let kv_stride = if is_fused { 3 * width } else { 2 * width + 6 };
    let mut q_data = random.bf16s(batch * queries * q_stride);
    let mut kv_data = random.bf16s(batch * keys * kv_stride);
    if !is_fused {
        let poison = |data: &mut [bf16], stride: usize, used: usize| {
            data.iter_mut().enumerate().filter(|(i, _)| i % stride >= used).for_each(|(_, v)| *v = bf16::NAN);
        };
        poison(&mut q_data, q_stride, width);
        poison(&mut kv_data, kv_stride, 2 * width);
    }
    let kv: &[bf16] = if is_fused { &q_data } else { &kv_data };
    let (k_offset, v_offset) = if is_fused { (width, 2 * width) } else { (0, width) };
    let scale = spread / (dim as f32).sqrt();
    let call = Attention {
        batch,
        heads,
        head_dim: dim,
        queries,
        keys,
        q: Heads { data: &q_data, stride: q_stride, offset: 0 },
        k: Heads { data: kv, stride: kv_stride, offset: k_offset },
        v: Heads { data: kv, stride: kv_stride, offset: v_offset },
        scale,
        is_causal,
    };
    let out_stride = width + 4;
    let mut out = vec![bf16::NAN; batch * queries * out_stride];
    attention(tier, &call, &mut out, out_stride).unwrap();
    let step = if queries * keys * dim * heads * batch > 1 << 25 { 37 } else { 1 };
    for (b, h) in (0..batch).flat_map(|b| (0..heads).map(move |h| (b, h))) {
        for i in (0..queries).step_by(step) {
            let q = &q_data[(b * queries + i) * q_stride + h * dim..][..dim];
            let seen = if is_causal { (i + 1).min(keys) } else { keys };
            let at = |j: usize, offset: usize| &kv[(b * keys + j) * kv_stride + offset + h * dim..][..dim];
            let scores: Vec<f64> = (0..seen)
                .map(|j| q.iter().zip(at(j, k_offset)).map(|(q, k)| q.to_f64() * k.to_f64()).sum::<f64>())
                .map(|s| s * f64::from(scale))
                .collect();
            let max = scores.iter().copied().fold(f64::MIN, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
            let total: f64 = weights.iter().sum();
            for d in 0..dim {
                let terms =
                    || weights.iter().enumerate().map(|(j, w)| w / total * at(j, v_offset)[d].to_f64());
                let (expected, magnitude) = (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>());
                let got = out[(b * queries + i) * out_stride + h * dim + d].to_f64();
                let limit = (expected.abs() + magnitude) / 256.0 + 1e-6;
                assert!(
                    (got - expected).abs() <= limit,
                    "{tier:?} {case:?} at b {b} h {h} i {i} d {d}: got {got}, expected {expected}"
                );
            }
        }
    }
    let gaps = out.iter().enumerate().filter(|(i, _)| i % out_stride >= width);
    assert!(gaps.into_iter().all(|(_, v)| v.is_nan()), "{case:?} wrote between the rows");
}

fn check_tier(tier: Tier) {
    if !tier.is_available() {
        eprintln!("{tier:?} skipped: not available on this CPU");
        return;
    }
    let base =
        Case { batch: 1, heads: 2, dim: 40, queries: 64, keys: 64, is_causal: false, spread: 1.0, seed: 1 };
    let cases = [
        base,
        Case { batch: 2, heads: 8, queries: 300, keys: 77, seed: 2, ..base },
        Case { dim: 64, heads: 12, batch: 2, queries: 77, keys: 77, is_causal: true, seed: 3, ..base },
        Case { dim: 160, queries: 256, keys: 256, seed: 4, ..base },
        Case { dim: 80, queries: 1024, keys: 1024, heads: 1, seed: 5, ..base },
        Case { dim: 512, heads: 1, queries: 600, keys: 600, seed: 6, ..base },
        Case { dim: 512, heads: 1, queries: 300, keys: 1100, spread: 8.0, seed: 7, ..base },
        Case { dim: 16, queries: 1, keys: 1, seed: 8, ..base },
        Case { dim: 48, queries: 33, keys: 700, spread: 30.0, seed: 9, ..base },
        Case { dim: 40, queries: 300, keys: 600, spread: 200.0, seed: 12, ..base },
        Case { dim: 32, queries: 700, keys: 700, is_causal: true, spread: 20.0, seed: 10, ..base },
        Case { dim: 128, heads: 1, queries: 40, keys: 300, is_causal: true, seed: 11, ..base },
    ];
    for case in cases {
        check_case(tier, case);
    }
    let mut random = Random(99);
    for seed in 100..130 {
        let mut draw = |limit: u64| 1 + (random.next() % limit) as usize;
        let queries = draw(120);
        let case = Case {
            batch: draw(2),
            heads: draw(3),
            dim: 8 * (1 + draw(19)),
            queries,
            keys: if draw(2) == 1 { queries } else { draw(600) },
            is_causal: draw(3) == 1,
            spread: draw(12) as f32,
            seed,
        };
        check_case(tier, case);
    }
}

#[test]
fn amx_matches_f64() {
    check_tier(Tier::Amx);
}

#[test]
fn avx512_matches_f64() {
    check_tier(Tier::Avx512Bf16);
}

#[test]
fn portable_matches_f64() {
    check_tier(Tier::Portable);
}

/// Keys far from every query but one huge key pointing away: the bound is loose
/// by hundreds of bits, so lowered scores vanish and the maximum must be used.
#[test]
fn loose_bounds_fall_back_to_the_maximum() {
    for tier in Tier::available() {
        let (dim, keys) = (32, 70);
        let mut random = Random(4);
        let q = vec![bf16::ONE; 20 * dim];
        let mut k = random.bf16s(keys * dim);
        k[..dim].fill(bf16::from_f32(-60.0));
        let v = random.bf16s(keys * dim);
        let heads = |data| Heads { data, stride: dim, offset: 0 };
        let call = Attention {
            batch: 1,
            heads: 1,
            head_dim: dim,
            queries: 20,
            keys,
            q: heads(&q),
            k: heads(&k),
            v: heads(&v),
            scale: 1.0,
            is_causal: false,
        };
        let mut out = vec![bf16::NAN; 20 * dim];
        attention(tier, &call, &mut out, dim).unwrap();
        let scores: Vec<f64> = k.chunks(dim).map(|k| k.iter().map(|v| v.to_f64()).sum()).collect();
        let max = scores.iter().copied().fold(f64::MIN, f64::max);
        let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
        for d in 0..dim {
            let terms =
                scores.iter().zip(v.chunks(dim)).map(|(s, v)| (s - max).exp() / total * v[d].to_f64());
            let expected: f64 = terms.sum();
            assert!((out[d].to_f64() - expected).abs() < 0.01, "{tier:?} {d}: {} {expected}", out[d]);
        }
    }
}

#[test]
fn bad_calls_are_errors() {
    let data = [bf16::ONE; 64];
    let heads = Heads { data: &data, stride: 32, offset: 0 };
    let good = Attention {
        batch: 1,
        heads: 2,
        head_dim: 16,
        queries: 2,
        keys: 2,
        q: heads,
        k: heads,
        v: heads,
        scale: 0.25,
        is_causal: false,
    };
    let run = |call: Attention| attention(Tier::detect(), &call, &mut [bf16::ZERO; 64], 32);
    assert!(run(good).is_ok());
    assert!(
        run(Attention { keys: 3, ..good })
            .is_err_and(|e| e.to_string().contains("attention keys is 64, needs 96"))
    );
    assert!(run(Attention { scale: -1.0, ..good }).is_err_and(|e| e.to_string().contains("scale is -1")));
    assert!(run(Attention { head_dim: 4096, heads: 0, ..good }).is_ok());
    assert!(run(Attention { v: Heads { offset: 8, ..heads }, ..good }).is_err());
}
