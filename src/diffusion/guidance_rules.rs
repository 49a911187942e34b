//! How patches combine predictions: each by one [`Rule`] on a device, and by the same arithmetic in host memory.
//!
//! On a device a rule's sums stay there: no step waits for them. The host's forms work element by element as the papers
//! state them, and are what the device is compared with.

use super::{DiffusionError, Field};
use crate::tensor::HostTensor;
use crate::tensor::latents::Rule;

/// Sum in f64 of the products of two slices.
fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// Applies `f` to the samples of equally shaped tensors and joins the results.
fn per_sample<const N: usize>(inputs: [&HostTensor; N], f: impl Fn([&[f32]; N]) -> Vec<f32>) -> HostTensor {
    let first = inputs[0];
    let data: Vec<f32> = (0..first.dim(0)).flat_map(|b| f(inputs.map(|t| t.row(b)))).collect();
    HostTensor::new(first.shape(), data).unwrap_or_else(|| first.clone())
}

/// `x − denoised`.
fn noise(x: &[f32], denoised: &[f32]) -> Vec<f32> {
    x.iter().zip(denoised).map(|(x, d)| x - d).collect()
}

/// Perp-Neg of `[positive, negative, empty]`: `empty + scale·(p − negative_scale·n⊥)` with `p`, `n` relative to `empty`.
pub(super) fn perpendicular_negative(
    inputs: [&Field; 3],
    (scale, negative_scale): (f64, f64),
) -> Result<Field, DiffusionError> {
    let rule = Rule::Perpendicular { scale, negative_scale };
    Field::combined(rule, inputs, |[positive, negative, empty]| {
        let pos = positive.zip(empty, |p, e| p - e);
        let neg = negative.zip(empty, |n, e| n - e);
        let along = (dot(neg.data(), pos.data()) / dot(pos.data(), pos.data())) as f32;
        let (scale, negative_scale) = (scale as f32, negative_scale as f32);
        let direction = pos.zip(&neg, |p, n| p - (n - along * p) * negative_scale);
        empty.zip(&direction, |e, d| e + scale * d)
    })
}

/// Standard deviation (with n − 1).
fn deviation(values: &[f32]) -> f64 {
    let n = values.len() as f64;
    let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / n;
    let sum: f64 = values.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum();
    (sum / (n - 1.0)).sqrt()
}

/// RescaleCFG of `[x, cond, uncond]`. Works on velocities: `v = (x/(σ²+1) − denoised)·sqrt(σ²+1)/σ`.
pub(super) fn rescale(
    inputs: [&Field; 3],
    sigma: f32,
    scale: f64,
    multiplier: f32,
) -> Result<Field, DiffusionError> {
    let var = f64::from(sigma).powi(2) + 1.0;
    let gain = var.sqrt() / f64::from(sigma);
    let rule = Rule::Rescale { variance: var, scale, multiplier: multiplier.into() };
    let (var, gain, scale) = (var as f32, gain as f32, scale as f32);
    Field::combined(rule, inputs, |inputs| {
        per_sample(inputs, |[x, cond, uncond]| {
            let velocity =
                |d: &[f32]| -> Vec<f32> { x.iter().zip(d).map(|(x, d)| (x / var - d) * gain).collect() };
            let (pos, neg) = (velocity(cond), velocity(uncond));
            let guided: Vec<f32> = neg.iter().zip(&pos).map(|(n, p)| n + scale * (p - n)).collect();
            let ratio = (deviation(&pos) / deviation(&guided)) as f32;
            let factor = multiplier * ratio + (1.0 - multiplier);
            x.iter().zip(&guided).map(|(x, g)| x / var - g * factor / gain).collect()
        })
    })
}

/// RenormCFG of `[cond, uncond]`.
pub(super) fn renorm(inputs: [&Field; 2], scale: f64, limit: f64) -> Result<Field, DiffusionError> {
    Field::combined(Rule::Renorm { scale, limit }, inputs, |inputs| {
        let scale = scale as f32;
        per_sample(inputs, |[cond, uncond]| {
            let guided: Vec<f32> = uncond.iter().zip(cond).map(|(u, c)| u + scale * (c - u)).collect();
            let (norm, most) = (dot(&guided, &guided).sqrt(), dot(cond, cond).sqrt() * limit);
            let factor = if limit > 0.0 && norm >= most { (most / norm) as f32 } else { 1.0 };
            guided.iter().map(|g| g * factor).collect()
        })
    })
}

/// Mahiro of `[cond, uncond, guided]`.
pub(super) fn agree(inputs: [&Field; 3], scale: f64) -> Result<Field, DiffusionError> {
    Field::combined(Rule::Agree { scale }, inputs, |[cond, uncond, guided]| {
        let scale = scale as f32;
        let signed_root = |v: f32| v.abs().sqrt().copysign(v);
        let leap = cond.map(|c| c * scale);
        let u = uncond.map(|v| signed_root(v * scale));
        let merged = leap.zip(guided, |l, g| signed_root((l + g) / 2.0));
        // Cosine similarity over channels, averaged over all places.
        let plane = guided.dim(2) * guided.dim(3);
        let (mut sum, mut count) = (0.0, 0usize);
        for b in 0..guided.dim(0) {
            let (u, m) = (u.row(b), merged.row(b));
            for i in 0..plane {
                let over = |a: &[f32], b: &[f32]| -> f64 {
                    let pairs = a.iter().skip(i).step_by(plane).zip(b.iter().skip(i).step_by(plane));
                    pairs.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
                };
                sum += over(u, m) / (over(u, u) * over(m, m)).sqrt().max(1e-8);
                count += 1;
            }
        }
        let share = (2.0 * (sum / count.max(1) as f64 + 1.0)) as f32;
        guided.zip(&leap, |g, l| (share * g + (4.0 - share) * l) / 4.0)
    })
}

/// CFG-Zero* of `[x, cond, uncond, guided]`.
pub(super) fn fit_uncond(inputs: [&Field; 4], scale: f64) -> Result<Field, DiffusionError> {
    Field::combined(Rule::FitUncond { scale }, inputs, |inputs| {
        let scale = scale as f32;
        per_sample(inputs, |[x, cond, uncond, guided]| {
            let (pos, neg) = (noise(x, cond), noise(x, uncond));
            let alpha = (dot(&pos, &neg) / (dot(&neg, &neg) + 1e-8)) as f32;
            let change = (alpha - 1.0) + scale * (1.0 - alpha);
            guided.iter().zip(uncond).map(|(g, u)| g + u * change).collect()
        })
    })
}

/// CFGNorm of `[cond, guided]`.
pub(super) fn limit_norms(inputs: [&Field; 2], strength: f32) -> Result<Field, DiffusionError> {
    Field::combined(Rule::LimitNorms { strength: strength.into() }, inputs, |[cond, guided]| {
        let plane = guided.dim(2) * guided.dim(3);
        per_sample([cond, guided], |[cond, guided]| {
            let norm = |t: &[f32], i: usize| -> f64 {
                t.iter().skip(i).step_by(plane).map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt()
            };
            let factors: Vec<f32> = (0..plane)
                .map(|i| (norm(cond, i) / (norm(guided, i) + 1e-8)).clamp(0.0, 1.0) as f32 * strength)
                .collect();
            guided.iter().enumerate().map(|(i, g)| g * factors[i % plane]).collect()
        })
    })
}

/// The negative side of `[x, cond, uncond]`: its noise projected on the first right singular vector of the
/// two-row matrix of both sides' noises.
pub(super) fn damp_tangents(inputs: [&Field; 3]) -> Result<Field, DiffusionError> {
    Field::combined(Rule::DampTangents, inputs, |inputs| {
        per_sample(inputs, |[x, cond, uncond]| {
            let (pos, neg) = (noise(x, cond), noise(x, uncond));
            let (pp, pn, nn) = (dot(&pos, &pos), dot(&pos, &neg), dot(&neg, &neg));
            // The top eigenvector (a, b) of the Gram matrix gives the direction a·pos + b·neg.
            let angle = 0.5 * (2.0 * pn).atan2(pp - nn);
            let (a, b) = (angle.cos(), angle.sin());
            let squared = a * a * pp + 2.0 * a * b * pn + b * b * nn;
            let share = if squared > 0.0 { (a * pn + b * nn) / squared } else { 0.0 };
            let (a, b) = ((share * a) as f32, (share * b) as f32);
            x.iter().zip(&pos).zip(&neg).map(|((x, p), n)| x - (a * p + b * n)).collect()
        })
    })
}

/// APG of `[direction, cond, uncond]`: limits the guidance and damps its part along the positive prediction;
/// the result gives the wanted direction under plain guidance.
pub(super) fn project(
    inputs: [&Field; 3],
    (eta, norm_threshold): (f32, f32),
    scale: f64,
) -> Result<Field, DiffusionError> {
    let rule = Rule::Project { eta: eta.into(), limit: norm_threshold.into(), scale };
    Field::combined(rule, inputs, |inputs| {
        let scale = scale as f32;
        per_sample(inputs, |[direction, cond, uncond]| {
            let norm = dot(direction, direction).sqrt();
            let limit = if norm_threshold > 0.0 { (f64::from(norm_threshold) / norm).min(1.0) } else { 1.0 };
            let length = dot(cond, cond).sqrt().max(1e-12);
            let along = limit * dot(direction, cond) / (length * length);
            let (limit, along) = (limit as f32, along as f32 * (eta - 1.0));
            direction
                .iter()
                .zip(cond)
                .zip(uncond)
                .map(|((d, c), u)| (u + (limit * d + along * c)) + (c - u) / scale)
                .collect()
        })
    })
}

/// Epsilon scaling: the predicted noise divided.
pub(super) fn scale_noise(x: &Field, guided: &Field, factor: f32) -> Result<Field, DiffusionError> {
    if let (Field::Host(x), Field::Host(guided)) = (x, guided) {
        return Ok(x.zip(guided, |x, d| x - (x - d) / factor).into());
    }
    let share = 1.0 / f64::from(factor);
    Field::lincomb(&[(1.0 - share, x), (share, guided)])
}
