//! Changes to the guidance step that nodes attach to a model.
//!
//! Sources: Lin et al., "Common diffusion noise schedules and sample steps are
//! flawed", 2023 (RescaleCFG); Fan et al., "CFG-Zero*", 2025; Sadat et al.,
//! "Eliminating oversaturation and artifacts of high guidance scales" (APG),
//! 2024; Kwon et al., "TCFG: Tangential damping classifier-free guidance", 2025;
//! Huang et al., "FreSca", 2025; Ning et al., "Elucidating the exposure bias"
//! (epsilon scaling), 2023; Armandpour et al. (Perp-Neg), 2023; Levin and Fried,
//! "Differential diffusion", 2023.

use std::sync::Arc;

use super::conditioning::{CondEntry, Conditioning, ResolvedCond, resolve};
use super::guidance::evaluate;
use super::model::Model;
use super::schedule::ModelSampling;
use super::{DiffusionError, frequency};
use crate::tensor::HostTensor;

/// The denoised predictions of both sides.
pub struct Predictions {
    /// Towards the positive side.
    pub cond: HostTensor,
    /// Towards the negative side; zeros if it was not evaluated.
    pub uncond: HostTensor,
    /// Whether the negative side was evaluated.
    pub has_uncond: bool,
}

/// The step that a patch works on.
pub struct PatchContext<'a> {
    /// The model, for further predictions.
    pub model: &'a dyn Model,
    /// The conditionings: positive, negative, ….
    pub sides: &'a [Vec<ResolvedCond>],
    /// The model's input `[B, C, h, w]`.
    pub x: &'a HostTensor,
    /// Its noise level.
    pub sigma: f32,
    /// Guidance scale.
    pub scale: f64,
}

/// A change to the guidance step. Methods are called in the order: `known`, `before`,
/// `combine`, `after`, `saw`; every run works on a [`fresh`](Self::fresh) copy.
pub trait GuidancePatch: Send + Sync {
    /// A copy without state, for one run.
    fn fresh(&self) -> Box<dyn GuidancePatch>;

    /// The model that the run asks in place of `model`: a patch may watch it at work.
    fn model(&self, model: Arc<dyn Model>) -> Arc<dyn Model> {
        model
    }

    /// The guided prediction at `sigma`, if it need not be computed.
    fn known(&mut self, sampling: &ModelSampling, x: &HostTensor, sigma: f32) -> Option<HostTensor> {
        let _ = (sampling, x, sigma);
        None
    }

    /// Sees every guided prediction that was computed.
    fn saw(&mut self, x: &HostTensor, sigma: f32, guided: &HostTensor) {
        let _ = (x, sigma, guided);
    }

    /// Changes the predictions before they are combined.
    fn before(&mut self, ctx: &PatchContext<'_>, preds: &mut Predictions) -> Result<(), DiffusionError> {
        let _ = (ctx, preds);
        Ok(())
    }

    /// Combines the predictions in place of classifier-free guidance.
    fn combine(
        &mut self,
        ctx: &PatchContext<'_>,
        preds: &Predictions,
    ) -> Result<Option<HostTensor>, DiffusionError> {
        let _ = (ctx, preds);
        Ok(None)
    }

    /// Changes the combined prediction.
    fn after(
        &mut self,
        ctx: &PatchContext<'_>,
        preds: &Predictions,
        guided: HostTensor,
    ) -> Result<HostTensor, DiffusionError> {
        let _ = (ctx, preds);
        Ok(guided)
    }

    /// The noise mask of a step in place of the one that was given.
    fn mask(
        &self,
        sampling: &ModelSampling,
        mask: &HostTensor,
        sigma: f32,
        sigmas: &[f32],
    ) -> Option<HostTensor> {
        let _ = (sampling, mask, sigma, sigmas);
        None
    }

    /// Whether the negative side is needed even at scale 1.
    fn needs_uncond(&self) -> bool {
        false
    }
}

/// An operation on latents.
pub type LatentOperation = Arc<dyn Fn(&HostTensor) -> Result<HostTensor, DiffusionError> + Send + Sync>;

/// The patches that need nothing but the predictions.
#[derive(Clone)]
pub enum BuiltinPatch {
    /// Scales the guided noise prediction to the deviation of the positive one.
    RescaleCfg {
        /// Share of the rescaled prediction.
        multiplier: f32,
    },
    /// Limits the guided prediction's norm to that of the positive one; without guidance from a sigma up.
    RenormCfg {
        /// The sigma from which on the positive prediction stands alone.
        truncation: f32,
        /// Largest norm in units of the positive prediction's; 0 for any.
        limit: f64,
    },
    /// Mixes in the scaled positive prediction as the two agree.
    Mahiro,
    /// Scales the negative side to fit the positive one best.
    CfgZeroStar,
    /// Limits the guided prediction's norm over channels to the positive one's.
    CfgNorm {
        /// Factor on the result.
        strength: f32,
    },
    /// Keeps of the negative side's noise what lies along the main direction of both.
    TangentialDamping,
    /// Divides the predicted noise.
    EpsilonScaling {
        /// The divisor.
        factor: f32,
    },
    /// Scales guidance by frequency.
    FreSca {
        /// Factor on low frequencies.
        low: f32,
        /// Factor on high frequencies.
        high: f32,
        /// Half side of the low-frequency square in frequency steps.
        cutoff: usize,
    },
    /// Adaptive projected guidance.
    Apg {
        /// Weight of the part along the positive prediction.
        eta: f32,
        /// Largest norm of the guidance of a sample; 0 for any.
        norm_threshold: f32,
        /// Weight of earlier steps' guidance.
        momentum: f32,
        /// Running mean and the sigma it is of.
        state: Option<(HostTensor, f32)>,
    },
    /// Applies an operation to the guidance direction.
    LatentOperation(LatentOperation),
    /// Reads the noise mask as the share of the run at which a place is let go.
    DifferentialDiffusion {
        /// Share of the thresholded mask.
        strength: f32,
    },
    /// The negative side counts only as far as it is perpendicular to the positive one.
    PerpNeg {
        /// The empty prompt.
        empty: Arc<Conditioning>,
        /// Weight of the negative side.
        negative_scale: f64,
    },
}

impl GuidancePatch for BuiltinPatch {
    fn fresh(&self) -> Box<dyn GuidancePatch> {
        let mut copy = self.clone();
        if let BuiltinPatch::Apg { state, .. } = &mut copy {
            *state = None;
        }
        Box::new(copy)
    }

    fn before(&mut self, ctx: &PatchContext<'_>, preds: &mut Predictions) -> Result<(), DiffusionError> {
        match self {
            BuiltinPatch::TangentialDamping if preds.has_uncond => tangential_damping(ctx.x, preds),
            BuiltinPatch::FreSca { low, high, cutoff } if preds.has_uncond => {
                let direction = preds.cond.zip(&preds.uncond, |c, u| c - u);
                let filtered = frequency::scale_bands(&direction, *low, *high, *cutoff);
                preds.cond = filtered.zip(&preds.uncond, |d, u| d + u);
            }
            BuiltinPatch::Apg { eta, norm_threshold, momentum, state } => {
                let mut direction = preds.cond.zip(&preds.uncond, |c, u| c - u);
                if *momentum != 0.0 {
                    if let Some((mean, _)) = state.take().filter(|(_, last)| ctx.sigma <= *last) {
                        direction = direction.zip(&mean, |d, m| *momentum * m + d);
                    }
                    *state = Some((direction.clone(), ctx.sigma));
                }
                preds.cond = projected(&direction, preds, (*eta, *norm_threshold), ctx.scale as f32);
            }
            BuiltinPatch::LatentOperation(operation) => {
                let direction = preds.cond.zip(&preds.uncond, |c, u| c - u);
                preds.cond = operation(&direction)?.zip(&preds.uncond, |d, u| d + u);
            }
            _ => {}
        }
        Ok(())
    }

    fn combine(
        &mut self,
        ctx: &PatchContext<'_>,
        preds: &Predictions,
    ) -> Result<Option<HostTensor>, DiffusionError> {
        match self {
            BuiltinPatch::RescaleCfg { multiplier } => Ok(Some(rescale_cfg(ctx, preds, *multiplier))),
            BuiltinPatch::RenormCfg { truncation, .. } if ctx.sigma >= *truncation => {
                Ok(Some(preds.cond.clone()))
            }
            BuiltinPatch::RenormCfg { limit, .. } => Ok(Some(renorm_cfg(preds, ctx.scale as f32, *limit))),
            BuiltinPatch::PerpNeg { empty, negative_scale } => {
                let size = (ctx.x.dim(2), ctx.x.dim(3));
                // the reference prepares the empty prompt without its share of the run: it counts at every step
                let conds: Vec<ResolvedCond> = empty
                    .iter()
                    .map(|entry| CondEntry { start_percent: None, end_percent: None, ..entry.clone() })
                    .map(|entry| resolve(&entry, size, ctx.model.sampling()))
                    .collect();
                let out = evaluate(ctx.model, &[Some(&conds)], ctx.x, ctx.sigma)?;
                let scales = (ctx.scale, *negative_scale);
                let guided =
                    out.first().map(|e| perpendicular_negative(&preds.cond, &preds.uncond, e, scales));
                Ok(guided)
            }
            _ => Ok(None),
        }
    }

    fn after(
        &mut self,
        ctx: &PatchContext<'_>,
        preds: &Predictions,
        guided: HostTensor,
    ) -> Result<HostTensor, DiffusionError> {
        Ok(match self {
            BuiltinPatch::Mahiro => mahiro(preds, &guided, ctx.scale as f32),
            BuiltinPatch::CfgZeroStar => cfg_zero_star(ctx, preds, &guided),
            BuiltinPatch::CfgNorm { strength } => cfg_norm(&preds.cond, &guided, *strength),
            BuiltinPatch::EpsilonScaling { factor } => ctx.x.zip(&guided, |x, d| x - (x - d) / *factor),
            _ => guided,
        })
    }

    fn mask(
        &self,
        sampling: &ModelSampling,
        mask: &HostTensor,
        sigma: f32,
        sigmas: &[f32],
    ) -> Option<HostTensor> {
        let BuiltinPatch::DifferentialDiffusion { strength } = self else { return None };
        let (first, last) = (*sigmas.first()?, *sigmas.last()?);
        let from = sampling.timestep(first);
        let to = sampling.timestep(last.max(sampling.sigma_min()));
        let threshold = (sampling.timestep(sigma) - to) / (from - to);
        Some(mask.map(|m| {
            let open = if m >= threshold { 1.0 } else { 0.0 };
            if *strength < 1.0 { strength * open + (1.0 - strength) * m } else { open }
        }))
    }
}

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

/// Perp-Neg: `empty + scale·(p − negative_scale·n⊥)` with `p`, `n` relative to `empty`.
pub(super) fn perpendicular_negative(
    positive: &HostTensor,
    negative: &HostTensor,
    empty: &HostTensor,
    (scale, negative_scale): (f64, f64),
) -> HostTensor {
    let pos = positive.zip(empty, |p, e| p - e);
    let neg = negative.zip(empty, |n, e| n - e);
    let along = (dot(neg.data(), pos.data()) / dot(pos.data(), pos.data())) as f32;
    let (scale, negative_scale) = (scale as f32, negative_scale as f32);
    let direction = pos.zip(&neg, |p, n| p - (n - along * p) * negative_scale);
    empty.zip(&direction, |e, d| e + scale * d)
}

/// Standard deviation (with n − 1).
fn deviation(values: &[f32]) -> f64 {
    let n = values.len() as f64;
    let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / n;
    let sum: f64 = values.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum();
    (sum / (n - 1.0)).sqrt()
}

/// Works on velocities: `v = (x/(σ²+1) − denoised)·sqrt(σ²+1)/σ`.
fn rescale_cfg(ctx: &PatchContext<'_>, preds: &Predictions, multiplier: f32) -> HostTensor {
    let var = f64::from(ctx.sigma).powi(2) + 1.0;
    let gain = var.sqrt() / f64::from(ctx.sigma);
    let (var, gain, scale) = (var as f32, gain as f32, ctx.scale as f32);
    per_sample([ctx.x, &preds.cond, &preds.uncond], |[x, cond, uncond]| {
        let velocity =
            |d: &[f32]| -> Vec<f32> { x.iter().zip(d).map(|(x, d)| (x / var - d) * gain).collect() };
        let (pos, neg) = (velocity(cond), velocity(uncond));
        let guided: Vec<f32> = neg.iter().zip(&pos).map(|(n, p)| n + scale * (p - n)).collect();
        let ratio = (deviation(&pos) / deviation(&guided)) as f32;
        let factor = multiplier * ratio + (1.0 - multiplier);
        x.iter().zip(&guided).map(|(x, g)| x / var - g * factor / gain).collect()
    })
}

fn renorm_cfg(preds: &Predictions, scale: f32, limit: f64) -> HostTensor {
    per_sample([&preds.cond, &preds.uncond], |[cond, uncond]| {
        let guided: Vec<f32> = uncond.iter().zip(cond).map(|(u, c)| u + scale * (c - u)).collect();
        let (norm, most) = (dot(&guided, &guided).sqrt(), dot(cond, cond).sqrt() * limit);
        let factor = if limit > 0.0 && norm >= most { (most / norm) as f32 } else { 1.0 };
        guided.iter().map(|g| g * factor).collect()
    })
}

fn mahiro(preds: &Predictions, guided: &HostTensor, scale: f32) -> HostTensor {
    let signed_root = |v: f32| v.abs().sqrt().copysign(v);
    let leap = preds.cond.map(|c| c * scale);
    let u = preds.uncond.map(|v| signed_root(v * scale));
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
}

fn cfg_zero_star(ctx: &PatchContext<'_>, preds: &Predictions, guided: &HostTensor) -> HostTensor {
    let scale = ctx.scale as f32;
    per_sample([ctx.x, &preds.cond, &preds.uncond, guided], |[x, cond, uncond, guided]| {
        let noise = |d: &[f32]| -> Vec<f32> { x.iter().zip(d).map(|(x, d)| x - d).collect() };
        let (pos, neg) = (noise(cond), noise(uncond));
        let alpha = (dot(&pos, &neg) / (dot(&neg, &neg) + 1e-8)) as f32;
        let change = (alpha - 1.0) + scale * (1.0 - alpha);
        guided.iter().zip(uncond).map(|(g, u)| g + u * change).collect()
    })
}

fn cfg_norm(cond: &HostTensor, guided: &HostTensor, strength: f32) -> HostTensor {
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
}

/// Projects the negative side's noise on the first right singular vector of the
/// two-row matrix of both sides' noises.
fn tangential_damping(x: &HostTensor, preds: &mut Predictions) {
    preds.uncond = per_sample([x, &preds.cond, &preds.uncond], |[x, cond, uncond]| {
        let noise = |d: &[f32]| -> Vec<f32> { x.iter().zip(d).map(|(x, d)| x - d).collect() };
        let (pos, neg) = (noise(cond), noise(uncond));
        let (pp, pn, nn) = (dot(&pos, &pos), dot(&pos, &neg), dot(&neg, &neg));
        // The top eigenvector (a, b) of the Gram matrix gives the direction a·pos + b·neg.
        let angle = 0.5 * (2.0 * pn).atan2(pp - nn);
        let (a, b) = (angle.cos(), angle.sin());
        let squared = a * a * pp + 2.0 * a * b * pn + b * b * nn;
        let share = if squared > 0.0 { (a * pn + b * nn) / squared } else { 0.0 };
        let (a, b) = ((share * a) as f32, (share * b) as f32);
        x.iter().zip(&pos).zip(&neg).map(|((x, p), n)| x - (a * p + b * n)).collect()
    });
}

/// APG: limits the guidance and damps its part along the positive prediction;
/// the result gives the wanted direction under plain guidance.
fn projected(
    direction: &HostTensor,
    preds: &Predictions,
    (eta, norm_threshold): (f32, f32),
    scale: f32,
) -> HostTensor {
    per_sample([direction, &preds.cond, &preds.uncond], |[direction, cond, uncond]| {
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
}
