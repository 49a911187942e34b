//! Cases of predictions combined by what they have in common.

use super::random::{Shapes, distinct};
use super::{Case, Context, Measured};
use crate::backend::cuda::launch::combine::{Combine, combine};
use crate::backend::cuda::{CudaError, Element};
use crate::driver::DevicePtr;
use crate::tensor::latents::Rule;

/// Every rule, with parameters that bring each of its branches.
const RULES: [Rule; 13] = [
    Rule::Rescale { variance: 5.0, scale: 7.5, multiplier: 0.7 },
    Rule::Renorm { scale: 6.0, limit: 1.0 },
    Rule::Renorm { scale: 6.0, limit: 9.0 },
    Rule::Renorm { scale: 2.0, limit: 0.0 },
    Rule::FitUncond { scale: 5.0 },
    Rule::DampTangents,
    Rule::Project { eta: 0.5, limit: 2.0, scale: 4.0 },
    Rule::Project { eta: 1.5, limit: 0.0, scale: 4.0 },
    Rule::Perpendicular { scale: 5.0, negative_scale: 1.2 },
    Rule::Agree { scale: 4.0 },
    Rule::Agree { scale: 0.0 },
    Rule::LimitNorms { strength: 0.9 },
    Rule::LimitNorms { strength: 1.0 },
];

/// Samples, channels, pixels.
const LATENTS: [[usize; 3]; 8] =
    [[1, 1, 2], [1, 4, 1], [2, 4, 64], [3, 4, 63], [1, 16, 257], [2, 3, 1400], [1, 4, 4099], [2, 8, 1030]];

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for rule in RULES {
        cases.extend(LATENTS.iter().map(|shape| combine_case(rule, *shape)));
    }
    // Chunks of more than the least length.
    cases.push(combine_case(RULES[0], [1, 4, 70_001]));
    cases.push(combine_case(RULES[9], [1, 2, 70_001]));
    cases.push(combine_case(RULES[0], [4, 4, 1 << 18]));
    cases
}

/// Of each kernel: sums over elements and over places, and norms.
pub(super) fn random(shapes: &mut Shapes) -> Vec<Case> {
    let latent = |s: &mut Shapes| [s.of(1..=3), s.of(1..=9), s.of(2..=700)];
    let mut cases = Vec::new();
    for rules in [&RULES[..9], &RULES[9..11], &RULES[11..]] {
        cases.extend(distinct(shapes, |s| combine_case(s.pick(rules), latent(s))));
    }
    cases
}

fn combine_case(rule: Rule, [samples, channels, pixels]: [usize; 3]) -> Case {
    let count = samples * channels * pixels;
    let run = move |cx: &mut Context<'_>| -> Result<Measured, CudaError> {
        let inputs = inputs(cx, rule, count);
        let wide: Vec<Vec<f64>> = inputs.iter().map(|x| x.iter().map(|v| f64::from(*v)).collect()).collect();
        let want = want(rule, &wide, [samples, channels, pixels]);
        let mut all: Vec<DevicePtr> = Vec::new();
        for x in &inputs {
            all.push(cx.upload(x, Element::F32)?.ptr);
        }
        let out = cx.output(4 * count)?;
        let gpu = cx.gpu;
        let op = Combine { rule, inputs: &all, out: out.ptr, samples, channels, pixels };
        cx.measure(out, Element::F32, &want, || combine(gpu, &op))
    };
    let name = format!("combine {samples}x{channels}x{pixels} {rule:?}");
    let bytes = 4 * count * (2 * rule.inputs() + 1);
    // Four roundings of terms up to seven times the result's rms: what leads to their factors is in f64.
    Case::of_memory("sampling", name, count, bytes, 30.0 * Element::F32.rounding(), Box::new(run))
}

/// Predictions of one picture: alike, each with something of its own.
fn inputs(cx: &mut Context<'_>, rule: Rule, count: usize) -> Vec<Vec<f32>> {
    let base = cx.values(count, 1.0, Element::F32);
    let each = (0..rule.inputs()).map(|k| {
        let own = cx.values(count, 0.4 + 0.2 * k as f32, Element::F32);
        own.iter().zip(&base).map(|(o, b)| b + o + 0.1 * k as f32).collect()
    });
    each.collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// `a + factor·(b − a)`.
fn mix(a: &[f64], b: &[f64], factor: f64) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + factor * (b - a)).collect()
}

fn less(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a - b).collect()
}

fn deviation(values: &[f64]) -> f64 {
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (values.len() as f64 - 1.0)).sqrt()
}

/// A rule as its papers state it, element by element.
fn want(rule: Rule, inputs: &[Vec<f64>], [samples, channels, pixels]: [usize; 3]) -> Vec<f64> {
    let each = channels * pixels;
    let of_sample =
        |n: usize| -> Vec<&[f64]> { inputs.iter().map(|x| &x[n * each..(n + 1) * each]).collect() };
    match rule {
        Rule::Perpendicular { .. } => {
            let all: Vec<&[f64]> = inputs.iter().map(Vec::as_slice).collect();
            want_linear(rule, &all)
        }
        Rule::Agree { scale } => want_agreeing(scale, inputs, [samples, channels, pixels]),
        Rule::LimitNorms { strength } => {
            let norm = |x: &[f64], i: usize| {
                let (n, p) = (i / each, i % pixels);
                (0..channels).map(|c| x[(n * channels + c) * pixels + p].powi(2)).sum::<f64>().sqrt()
            };
            let share = |i: usize| (norm(&inputs[0], i) / (norm(&inputs[1], i) + 1e-8)).clamp(0.0, 1.0);
            (0..samples * each).map(|i| inputs[1][i] * share(i) * strength).collect()
        }
        _ => (0..samples).flat_map(|n| want_linear(rule, &of_sample(n))).collect(),
    }
}

fn want_linear(rule: Rule, inputs: &[&[f64]]) -> Vec<f64> {
    let (a, b, c) = (inputs[0], inputs[1], inputs.get(2).copied().unwrap_or_default());
    match rule {
        Rule::Rescale { variance, scale, multiplier } => {
            let x: Vec<f64> = a.iter().map(|x| x / variance).collect();
            let (pos, guided) = (less(&x, b), less(&x, &mix(c, b, scale)));
            let factor = multiplier * deviation(&pos) / deviation(&guided) + (1.0 - multiplier);
            x.iter().zip(&guided).map(|(x, g)| x - g * factor).collect()
        }
        Rule::Renorm { scale, limit } => {
            let guided = mix(b, a, scale);
            let (norm, most) = (dot(&guided, &guided).sqrt(), dot(a, a).sqrt() * limit);
            let factor = if limit > 0.0 && norm >= most { most / norm } else { 1.0 };
            guided.iter().map(|g| g * factor).collect()
        }
        Rule::FitUncond { scale } => {
            let (pos, neg) = (less(a, b), less(a, c));
            let alpha = dot(&pos, &neg) / (dot(&neg, &neg) + 1e-8);
            let change = (alpha - 1.0) + scale * (1.0 - alpha);
            inputs[3].iter().zip(c).map(|(g, u)| g + u * change).collect()
        }
        Rule::DampTangents => {
            let (pos, neg) = (less(a, b), less(a, c));
            let (pp, pn, nn) = (dot(&pos, &pos), dot(&pos, &neg), dot(&neg, &neg));
            let angle = 0.5 * (2.0 * pn).atan2(pp - nn);
            let main: Vec<f64> =
                pos.iter().zip(&neg).map(|(p, n)| angle.cos() * p + angle.sin() * n).collect();
            let share = dot(&neg, &main) / dot(&main, &main);
            a.iter().zip(&main).map(|(x, m)| x - share * m).collect()
        }
        Rule::Project { eta, limit, scale } => {
            let norm = dot(a, a).sqrt();
            let limit = if limit > 0.0 { (limit / norm).min(1.0) } else { 1.0 };
            let along = limit * dot(a, b) / dot(b, b) * (eta - 1.0);
            let terms = a.iter().zip(b).zip(c);
            terms.map(|((d, c), u)| (u + (limit * d + along * c)) + (c - u) / scale).collect()
        }
        Rule::Perpendicular { scale, negative_scale } => {
            let (pos, neg) = (less(a, c), less(b, c));
            let along = dot(&neg, &pos) / dot(&pos, &pos);
            let terms = c.iter().zip(&pos).zip(&neg);
            terms.map(|((e, p), n)| e + scale * (p - (n - along * p) * negative_scale)).collect()
        }
        Rule::Agree { .. } | Rule::LimitNorms { .. } => Vec::new(),
    }
}

fn want_agreeing(scale: f64, inputs: &[Vec<f64>], [samples, channels, pixels]: [usize; 3]) -> Vec<f64> {
    let signed_root = |v: f64| v.abs().sqrt().copysign(v);
    let (cond, uncond, guided) = (&inputs[0], &inputs[1], &inputs[2]);
    let mut sum = 0.0;
    for place in 0..samples * pixels {
        let (n, p) = (place / pixels, place % pixels);
        let over = |f: &dyn Fn(usize) -> f64| -> f64 {
            (0..channels).map(|c| f((n * channels + c) * pixels + p)).sum()
        };
        let u = |i: usize| signed_root(uncond[i] * scale);
        let m = |i: usize| signed_root((cond[i] * scale + guided[i]) / 2.0);
        let lengths = (over(&|i| u(i) * u(i)) * over(&|i| m(i) * m(i))).sqrt();
        sum += over(&|i| u(i) * m(i)) / lengths.max(1e-8);
    }
    let share = 2.0 * (sum / (samples * pixels) as f64 + 1.0);
    guided.iter().zip(cond).map(|(g, c)| (share * g + (4.0 - share) * c * scale) / 4.0).collect()
}
