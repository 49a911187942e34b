//! Guidance: from conditionings to one prediction per step.
//!
//! Every *side* (positive, negative, …) is a list of conditionings whose
//! predictions are averaged by place ([`regions`](super::regions)). The sides are
//! then combined: classifier-free guidance and its relatives.
//!
//! Sources: Ho and Salimans, "Classifier-free diffusion guidance", 2022; Brooks
//! et al., "InstructPix2Pix", 2023 (two scales); Armandpour et al., "Re-imagine
//! the negative prompt algorithm" (Perp-Neg), 2023.

use std::sync::Arc;

use super::conditioning::{Conditioning, ResolvedCond, match_areas, resolve, share_attachment};
use super::guidance_patch::{GuidancePatch, PatchContext, Predictions};
use super::guidance_rules as rules;
use super::model::{Model, ModelHandle, RunInputs};
use super::regions::evaluate;
use super::samplers::Guided;
use super::{DiffusionError, Field};
use crate::tensor::HostTensor;

/// Attachment of a conditioning: nets that steer the model (a type of the nodes).
pub const CONTROL: &str = "control";
/// Attachment of a conditioning: its nets act on the other sides too.
pub const SHARES_CONTROL: &str = "control_apply_to_uncond";

/// How the sides are combined.
#[derive(Clone, Debug)]
pub enum Guidance {
    /// The positive side alone.
    Basic {
        /// What to denoise towards.
        positive: Arc<Conditioning>,
    },
    /// Classifier-free guidance.
    Cfg {
        /// What to denoise towards.
        positive: Arc<Conditioning>,
        /// What to denoise away from.
        negative: Arc<Conditioning>,
        /// Guidance scale; 1 leaves the negative side out.
        scale: f64,
    },
    /// Two positive sides with a scale each.
    Dual {
        /// First positive side.
        positive: Arc<Conditioning>,
        /// Second positive side.
        middle: Arc<Conditioning>,
        /// What to denoise away from.
        negative: Arc<Conditioning>,
        /// Scale from the second to the first positive side.
        scale_positive: f64,
        /// Scale from the negative to the second positive side.
        scale_negative: f64,
        /// Applies the second scale to the result of the first instead of adding both.
        is_nested: bool,
    },
    /// The negative side counts only as far as it is perpendicular to the positive one.
    PerpNeg {
        /// What to denoise towards.
        positive: Arc<Conditioning>,
        /// What to denoise away from.
        negative: Arc<Conditioning>,
        /// The empty prompt.
        empty: Arc<Conditioning>,
        /// Guidance scale.
        scale: f64,
        /// Weight of the negative side.
        negative_scale: f64,
    },
}

impl Guidance {
    /// The sides in the order that they are evaluated in: `[positive, negative, …]`.
    fn sides(&self) -> Vec<&Conditioning> {
        match self {
            Guidance::Basic { positive } => vec![positive],
            Guidance::Cfg { positive, negative, .. } => vec![positive, negative],
            Guidance::Dual { positive, middle, negative, .. } => vec![positive, middle, negative],
            Guidance::PerpNeg { positive, negative, empty, .. } => vec![positive, negative, empty],
        }
    }

    /// Which of the sides is the one to denoise away from.
    fn negative_side(&self) -> Option<usize> {
        match self {
            Guidance::Basic { .. } => None,
            Guidance::Cfg { .. } | Guidance::PerpNeg { .. } => Some(1),
            Guidance::Dual { .. } => Some(2),
        }
    }
}

/// A model with guidance: what a `GUIDER` link carries.
#[derive(Clone, Debug)]
pub struct Guider {
    /// The model.
    pub model: ModelHandle,
    /// The sides and how they are combined.
    pub guidance: Guidance,
}

impl Guider {
    /// Fits the guider to latents of `shape` (`[B, C, h, w]`) and to what the run starts from.
    ///
    /// # Errors
    /// [`DiffusionError::Shape`] if `shape` has not four dimensions.
    pub fn prepare(&self, shape: &[usize], run: RunInputs) -> Result<PreparedGuider<'_>, DiffusionError> {
        let &[_, _, h, w] = shape else {
            let want = vec![0, 0, 0, 0];
            return Err(DiffusionError::Shape { what: "latent", got: shape.to_vec(), want });
        };
        let (sampling, run) = (self.model.0.sampling(), Arc::new(run));
        let negative = self.guidance.negative_side();
        let sides = self.guidance.sides().into_iter().enumerate();
        let mut sides: Vec<Vec<ResolvedCond>> = sides
            .map(|(side, entries)| {
                let is_negative = negative == Some(side);
                let resolved = entries.iter().map(|entry| resolve(entry, (h, w), sampling));
                resolved.map(|cond| ResolvedCond { is_negative, run: run.clone(), ..cond }).collect()
            })
            .collect();
        match_areas(&mut sides);
        share_attachment(&mut sides, CONTROL, SHARES_CONTROL);
        let patches: Vec<_> = self.model.0.guidance_patches().iter().map(|p| p.fresh()).collect();
        let model = patches.iter().fold(self.model.0.clone(), |model, patch| patch.model(model));
        Ok(PreparedGuider { guider: self, model, sides, patches, uncond: None })
    }
}

/// A guider fitted to one latent size, with the state of one run.
pub struct PreparedGuider<'a> {
    guider: &'a Guider,
    /// The guider's model, as the patches watch it.
    model: Arc<dyn Model>,
    sides: Vec<Vec<ResolvedCond>>,
    patches: Vec<Box<dyn GuidancePatch>>,
    /// The negative side of the last prediction that was computed under patches.
    uncond: Option<Field>,
}

impl PreparedGuider<'_> {
    /// The guided prediction. With `needs_uncond` the negative side is evaluated
    /// even if the scale makes it irrelevant.
    ///
    /// # Errors
    /// What the model returns.
    pub fn predict(&mut self, x: &Field, sigma: f32, needs_uncond: bool) -> Result<Guided, DiffusionError> {
        let sampling = self.guider.model.0.sampling();
        for patch in &mut self.patches {
            if let Some(denoised) = patch.known(sampling, x, sigma)? {
                return Ok(Guided { denoised, uncond: self.uncond.clone() });
            }
        }
        let guided = self.compute(x, sigma, needs_uncond)?;
        for patch in &mut self.patches {
            patch.saw(x, sigma, &guided.denoised)?;
        }
        if !self.patches.is_empty() {
            self.uncond = guided.uncond.clone();
        }
        Ok(guided)
    }

    fn compute(&mut self, x: &Field, sigma: f32, needs_uncond: bool) -> Result<Guided, DiffusionError> {
        let model = self.model.clone();
        let model = &*model;
        let needs_uncond = needs_uncond || self.patches.iter().any(|p| p.needs_uncond());
        let skip = |scale: f64| is_one(scale) && !needs_uncond;
        let side = |i: usize| self.sides.get(i).map(Vec::as_slice);
        let at = |scale: f64| At { x, sigma, scale };
        match &self.guider.guidance {
            Guidance::Basic { .. } => {
                let out = evaluate(model, &[side(0), None], x, sigma)?;
                self.combine(out, false, at(1.0))
            }
            Guidance::Cfg { scale, .. } => {
                let negative = if skip(*scale) { None } else { side(1) };
                let has_negative = negative.is_some();
                let out = evaluate(model, &[side(0), negative], x, sigma)?;
                self.combine(out, has_negative, at(*scale))
            }
            Guidance::Dual { scale_positive, scale_negative, is_nested, .. } => {
                let (first, second) = (*scale_positive, *scale_negative);
                let negative = if !is_nested && skip(second) { None } else { side(2) };
                let middle = if !is_nested && skip(second) && skip(first) { None } else { side(1) };
                let has_negative = negative.is_some();
                let out = evaluate(model, &[negative, middle, side(0)], x, sigma)?;
                let [negative, middle, positive] = three(out)?;
                if *is_nested {
                    let inner = self.combine(vec![positive, middle], true, at(first))?.denoised;
                    let denoised = Field::guided(&inner, &negative, second)?;
                    return Ok(Guided { denoised, uncond: Some(negative) });
                }
                let mut guided = self.combine(vec![middle.clone(), negative], has_negative, at(second))?;
                guided.denoised = guided.denoised.plus(first, (&positive, &middle))?;
                Ok(guided)
            }
            Guidance::PerpNeg { scale, negative_scale, .. } => {
                let out = evaluate(model, &[side(0), side(1), side(2)], x, sigma)?;
                let [positive, negative, empty] = three(out)?;
                let scales = (*scale, *negative_scale);
                let guided = rules::perpendicular_negative([&positive, &negative, &empty], scales)?;
                let preds = Predictions { cond: positive, uncond: negative, has_uncond: true };
                self.finish(preds, guided, at(*scale))
            }
        }
    }

    /// Classifier-free guidance of `[cond, uncond]` with the model's patches.
    fn combine(&mut self, out: Vec<Field>, has_uncond: bool, at: At<'_>) -> Result<Guided, DiffusionError> {
        let At { x, sigma, scale } = at;
        let Ok([cond, mut uncond]) = <[Field; 2]>::try_from(out) else {
            return Err(DiffusionError::Empty { what: "prediction", hint: "give two sides" });
        };
        if !has_uncond && !self.patches.is_empty() {
            uncond = x.zeros()?;
        }
        let mut preds = Predictions { cond, uncond, has_uncond };
        let ctx = PatchContext { model: &*self.model, sides: &self.sides, x, sigma, scale };
        for patch in &mut self.patches {
            patch.before(&ctx, &mut preds)?;
        }
        let mut guided = None;
        for patch in &mut self.patches {
            // The patch attached last decides, as the last of ComfyUI's setters does.
            guided = patch.combine(&ctx, &preds)?.or(guided);
        }
        let guided = match guided {
            Some(guided) => guided,
            None if has_uncond => Field::guided(&preds.cond, &preds.uncond, scale)?,
            None => preds.cond.clone(),
        };
        self.finish(preds, guided, at)
    }

    fn finish(
        &mut self,
        preds: Predictions,
        mut guided: Field,
        at: At<'_>,
    ) -> Result<Guided, DiffusionError> {
        let At { x, sigma, scale } = at;
        let ctx = PatchContext { model: &*self.model, sides: &self.sides, x, sigma, scale };
        for patch in &mut self.patches {
            guided = patch.after(&ctx, &preds, guided)?;
        }
        Ok(Guided { denoised: guided, uncond: preds.has_uncond.then_some(preds.uncond) })
    }

    /// The noise mask at `sigma`, if a patch changes it over time.
    pub fn mask_at(&self, mask: &HostTensor, sigma: f32, sigmas: &[f32]) -> Option<HostTensor> {
        let sampling = self.guider.model.0.sampling();
        self.patches.iter().rev().find_map(|p| p.mask(sampling, mask, sigma, sigmas))
    }
}

fn three(out: Vec<Field>) -> Result<[Field; 3], DiffusionError> {
    let hint = "give three sides";
    out.try_into().map_err(|_| DiffusionError::Empty { what: "prediction", hint })
}

/// Where a combination happens.
#[derive(Clone, Copy)]
struct At<'a> {
    x: &'a Field,
    sigma: f32,
    scale: f64,
}

/// Within 1e-9 of 1.
fn is_one(scale: f64) -> bool {
    (scale - 1.0).abs() <= 1e-9 * scale.abs().max(1.0)
}
