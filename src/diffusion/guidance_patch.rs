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
use super::model::Model;
use super::regions::evaluate;
use super::schedule::ModelSampling;
use super::{DiffusionError, Field, frequency, guidance_rules as rules};
use crate::tensor::HostTensor;

/// The denoised predictions of both sides.
pub struct Predictions {
    /// Towards the positive side.
    pub cond: Field,
    /// Towards the negative side; zeros if it was not evaluated.
    pub uncond: Field,
    /// Whether the negative side was evaluated.
    pub has_uncond: bool,
}

impl Predictions {
    /// `cond − uncond`.
    fn direction(&self) -> Result<Field, DiffusionError> {
        Field::lincomb(&[(1.0, &self.cond), (-1.0, &self.uncond)])
    }

    /// `uncond + direction`.
    fn beyond_uncond(&self, direction: &Field) -> Result<Field, DiffusionError> {
        Field::lincomb(&[(1.0, direction), (1.0, &self.uncond)])
    }
}

/// The step that a patch works on.
pub struct PatchContext<'a> {
    /// The model, for further predictions.
    pub model: &'a dyn Model,
    /// The conditionings: positive, negative, ….
    pub sides: &'a [Vec<ResolvedCond>],
    /// The model's input `[B, C, h, w]`.
    pub x: &'a Field,
    /// Its noise level.
    pub sigma: f32,
    /// Guidance scale.
    pub scale: f64,
}

/// A change to the guidance step. Predictions stay where the run is: a patch that can only work in host memory copies
/// them there, and the step waits for the device. Methods are called in the order: `known`, `before`,
/// `combine`, `after`, `saw`; every run works on a [`fresh`](Self::fresh) copy.
pub trait GuidancePatch: Send + Sync {
    /// A copy without state, for one run.
    fn fresh(&self) -> Box<dyn GuidancePatch>;

    /// The model that the run asks in place of `model`: a patch may watch it at work.
    fn model(&self, model: Arc<dyn Model>) -> Arc<dyn Model> {
        model
    }

    /// Whether the whole run is in host memory for it.
    fn needs_host(&self) -> bool {
        false
    }

    /// The guided prediction at `sigma`, if it need not be computed.
    fn known(
        &mut self,
        sampling: &ModelSampling,
        x: &Field,
        sigma: f32,
    ) -> Result<Option<Field>, DiffusionError> {
        let _ = (sampling, x, sigma);
        Ok(None)
    }

    /// Sees every guided prediction that was computed.
    fn saw(&mut self, x: &Field, sigma: f32, guided: &Field) -> Result<(), DiffusionError> {
        let _ = (x, sigma, guided);
        Ok(())
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
    ) -> Result<Option<Field>, DiffusionError> {
        let _ = (ctx, preds);
        Ok(None)
    }

    /// Changes the combined prediction.
    fn after(
        &mut self,
        ctx: &PatchContext<'_>,
        preds: &Predictions,
        guided: Field,
    ) -> Result<Field, DiffusionError> {
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
        state: Option<(Field, f32)>,
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
            BuiltinPatch::TangentialDamping if preds.has_uncond => {
                preds.uncond = rules::damp_tangents([ctx.x, &preds.cond, &preds.uncond])?;
            }
            BuiltinPatch::FreSca { low, high, cutoff } if preds.has_uncond => {
                let (low, high, cutoff) = (*low, *high, *cutoff);
                let direction = preds.direction()?;
                let filtered = match &direction {
                    Field::Host(x) => frequency::scale_bands(x, low, high, cutoff).into(),
                    Field::Device(x) => Field::Device(x.scale_bands(cutoff, low, high)?),
                };
                preds.cond = preds.beyond_uncond(&filtered)?;
            }
            BuiltinPatch::Apg { eta, norm_threshold, momentum, state } => {
                let mut direction = preds.direction()?;
                if *momentum != 0.0 {
                    if let Some((mean, _)) = state.take().filter(|(_, last)| ctx.sigma <= *last) {
                        direction = Field::lincomb(&[((*momentum).into(), &mean), (1.0, &direction)])?;
                    }
                    *state = Some((direction.clone(), ctx.sigma));
                }
                let inputs = [&direction, &preds.cond, &preds.uncond];
                preds.cond = rules::project(inputs, (*eta, *norm_threshold), ctx.scale)?;
            }
            BuiltinPatch::LatentOperation(operation) => {
                let changed = operation(&*preds.direction()?.to_host()?)?;
                preds.cond = preds.beyond_uncond(&changed.into())?;
            }
            _ => {}
        }
        Ok(())
    }

    fn combine(
        &mut self,
        ctx: &PatchContext<'_>,
        preds: &Predictions,
    ) -> Result<Option<Field>, DiffusionError> {
        let (cond, uncond) = (&preds.cond, &preds.uncond);
        Ok(match self {
            BuiltinPatch::RescaleCfg { multiplier } => {
                Some(rules::rescale([ctx.x, cond, uncond], ctx.sigma, ctx.scale, *multiplier)?)
            }
            BuiltinPatch::RenormCfg { truncation, .. } if ctx.sigma >= *truncation => Some(cond.clone()),
            BuiltinPatch::RenormCfg { limit, .. } => Some(rules::renorm([cond, uncond], ctx.scale, *limit)?),
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
                let by_empty = |e: &Field| rules::perpendicular_negative([cond, uncond, e], scales);
                out.first().map(by_empty).transpose()?
            }
            _ => None,
        })
    }

    fn after(
        &mut self,
        ctx: &PatchContext<'_>,
        preds: &Predictions,
        guided: Field,
    ) -> Result<Field, DiffusionError> {
        let (cond, uncond) = (&preds.cond, &preds.uncond);
        match self {
            BuiltinPatch::Mahiro => rules::agree([cond, uncond, &guided], ctx.scale),
            BuiltinPatch::CfgZeroStar => rules::fit_uncond([ctx.x, cond, uncond, &guided], ctx.scale),
            BuiltinPatch::CfgNorm { strength } => rules::limit_norms([cond, &guided], *strength),
            BuiltinPatch::EpsilonScaling { factor } => rules::scale_noise(ctx.x, &guided, *factor),
            _ => Ok(guided),
        }
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
