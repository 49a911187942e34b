//! Guidance: from conditionings to one prediction per step.
//!
//! Every *side* (positive, negative, …) is a list of conditionings whose
//! predictions are averaged by place, weighted with strength, mask and area
//! (regional prompting). The sides are then combined: classifier-free guidance
//! and its relatives.
//!
//! Sources: Ho and Salimans, "Classifier-free diffusion guidance", 2022; Brooks
//! et al., "InstructPix2Pix", 2023 (two scales); Armandpour et al., "Re-imagine
//! the negative prompt algorithm" (Perp-Neg), 2023.

use std::sync::Arc;

use super::conditioning::{Conditioning, Rect, ResolvedCond, match_areas, resolve, share_attachment};
use super::guidance_patch::{GuidancePatch, PatchContext, Predictions, perpendicular_negative};
use super::model::{DenoiseItem, Model, ModelHandle, RunInputs};
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
    uncond: Option<HostTensor>,
}

impl PreparedGuider<'_> {
    /// The guided prediction. With `needs_uncond` the negative side is evaluated
    /// even if the scale makes it irrelevant.
    ///
    /// # Errors
    /// What the model returns.
    pub fn predict(&mut self, x: &Field, sigma: f32, needs_uncond: bool) -> Result<Guided, DiffusionError> {
        if x.on_device().is_some()
            && self.patches.is_empty()
            && let Some(guided) = self.compute_on_device(x, sigma, needs_uncond)?
        {
            return Ok(guided);
        }
        let x = &*x.to_host()?;
        let sampling = self.guider.model.0.sampling();
        if let Some(denoised) = self.patches.iter_mut().find_map(|p| p.known(sampling, x, sigma)) {
            return Ok(HostGuided { denoised, uncond: self.uncond.clone() }.into());
        }
        let guided = self.compute(x, sigma, needs_uncond)?;
        if !self.patches.is_empty() {
            self.patches.iter_mut().for_each(|p| p.saw(x, sigma, &guided.denoised));
            self.uncond = guided.uncond.clone();
        }
        Ok(guided.into())
    }

    /// One side alone or classifier-free guidance of a latent on a device; `None` for what is combined in host
    /// memory.
    fn compute_on_device(
        &self,
        x: &Field,
        sigma: f32,
        needs_uncond: bool,
    ) -> Result<Option<Guided>, DiffusionError> {
        let side = |i: usize| self.sides.get(i).map(Vec::as_slice);
        let (negative, scale) = match &self.guider.guidance {
            Guidance::Basic { .. } => (None, 1.0),
            Guidance::Cfg { scale, .. } if is_one(*scale) && !needs_uncond => (None, 1.0),
            Guidance::Cfg { scale, .. } => (side(1), *scale),
            Guidance::Dual { .. } | Guidance::PerpNeg { .. } => return Ok(None),
        };
        let mut out = evaluate_fields(&*self.model, &[side(0), negative], x, sigma)?.into_iter();
        let (Some(cond), Some(uncond)) = (out.next(), out.next()) else { return Ok(None) };
        Ok(Some(match negative {
            None => Guided { denoised: cond, uncond: None },
            Some(_) => Guided { denoised: Field::guided(&cond, &uncond, scale)?, uncond: Some(uncond) },
        }))
    }

    fn compute(
        &mut self,
        x: &HostTensor,
        sigma: f32,
        needs_uncond: bool,
    ) -> Result<HostGuided, DiffusionError> {
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
                let Ok([negative, middle, positive]) = <[HostTensor; 3]>::try_from(out) else {
                    return Err(DiffusionError::Empty { what: "prediction", hint: "give three sides" });
                };
                if *is_nested {
                    let inner = self.combine(vec![positive, middle], true, at(first))?.denoised;
                    let denoised = inner.zip(&negative, |i, n| n + second as f32 * (i - n));
                    return Ok(HostGuided { denoised, uncond: Some(negative) });
                }
                let change = positive.zip(&middle, |p, m| (p - m) * first as f32);
                let mut guided = self.combine(vec![middle, negative], has_negative, at(second))?;
                guided.denoised = guided.denoised.zip(&change, |g, c| g + c);
                Ok(guided)
            }
            Guidance::PerpNeg { scale, negative_scale, .. } => {
                let out = evaluate(model, &[side(0), side(1), side(2)], x, sigma)?;
                let Ok([positive, negative, empty]) = <[HostTensor; 3]>::try_from(out) else {
                    return Err(DiffusionError::Empty { what: "prediction", hint: "give three sides" });
                };
                let scales = (*scale, *negative_scale);
                let guided = perpendicular_negative(&positive, &negative, &empty, scales);
                let preds = Predictions { cond: positive, uncond: negative, has_uncond: true };
                self.finish(preds, guided, at(*scale))
            }
        }
    }

    /// Classifier-free guidance of `[cond, uncond]` with the model's patches.
    fn combine(
        &mut self,
        out: Vec<HostTensor>,
        has_uncond: bool,
        at: At<'_>,
    ) -> Result<HostGuided, DiffusionError> {
        let At { x, sigma, scale } = at;
        let Ok([cond, uncond]) = <[HostTensor; 2]>::try_from(out) else {
            return Err(DiffusionError::Empty { what: "prediction", hint: "give two sides" });
        };
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
        let guided =
            guided.unwrap_or_else(|| preds.uncond.zip(&preds.cond, |u, c| u + (c - u) * scale as f32));
        self.finish(preds, guided, at)
    }

    fn finish(
        &mut self,
        preds: Predictions,
        mut guided: HostTensor,
        at: At<'_>,
    ) -> Result<HostGuided, DiffusionError> {
        let At { x, sigma, scale } = at;
        let ctx = PatchContext { model: &*self.model, sides: &self.sides, x, sigma, scale };
        for patch in &mut self.patches {
            guided = patch.after(&ctx, &preds, guided)?;
        }
        Ok(HostGuided { denoised: guided, uncond: Some(preds.uncond) })
    }

    /// The noise mask at `sigma`, if a patch changes it over time.
    pub fn mask_at(&self, mask: &HostTensor, sigma: f32, sigmas: &[f32]) -> Option<HostTensor> {
        let sampling = self.guider.model.0.sampling();
        self.patches.iter().rev().find_map(|p| p.mask(sampling, mask, sigma, sigmas))
    }
}

/// What the guided model predicts, in host memory.
struct HostGuided {
    denoised: HostTensor,
    uncond: Option<HostTensor>,
}

impl From<HostGuided> for Guided {
    fn from(guided: HostGuided) -> Self {
        Guided { denoised: guided.denoised.into(), uncond: guided.uncond.map(Field::from) }
    }
}

/// Where a combination happens.
#[derive(Clone, Copy)]
struct At<'a> {
    x: &'a HostTensor,
    sigma: f32,
    scale: f64,
}

/// Within 1e-9 of 1.
fn is_one(scale: f64) -> bool {
    (scale - 1.0).abs() <= 1e-9 * scale.abs().max(1.0)
}

/// A conditioning at work: which side, where, and with what weights.
struct Piece<'a> {
    side: usize,
    cond: &'a ResolvedCond,
    rect: Rect,
    x: Field,
    /// `[B or 1, h, w]` over `rect`; `None` is `strength` everywhere.
    weights: Option<HostTensor>,
}

/// The averaged prediction of every side at `sigma`; zeros for `None`.
///
/// # Errors
/// What the model returns, and [`DiffusionError::Shape`] if it returns other
/// shapes than it was given.
pub fn evaluate(
    model: &dyn Model,
    sides: &[Option<&[ResolvedCond]>],
    x: &HostTensor,
    sigma: f32,
) -> Result<Vec<HostTensor>, DiffusionError> {
    let out = evaluate_fields(model, sides, &Field::Host(x.clone()), sigma)?;
    out.into_iter().map(Field::into_host).collect()
}

/// The same for a latent anywhere; predictions are where the latent is, as far as that goes.
fn evaluate_fields(
    model: &dyn Model,
    sides: &[Option<&[ResolvedCond]>],
    x: &Field,
    sigma: f32,
) -> Result<Vec<Field>, DiffusionError> {
    let mut pieces: Vec<Piece<'_>> = Vec::new();
    for (side, conds) in sides.iter().enumerate() {
        for cond in conds.iter().copied().flatten().filter(|c| c.is_active(sigma)) {
            pieces.extend(Piece::new(side, cond, x)?);
        }
    }
    let mut sums: Vec<Sum> = sides.iter().map(|_| Sum::default()).collect();
    while let Some(first) = pieces.first() {
        let joins = |p: &Piece<'_>| p.is_like(&first.x) && model.can_batch(&first.cond.entry, &p.cond.entry);
        let joins: Vec<bool> = pieces.iter().map(joins).collect();
        let mut batch = Vec::with_capacity(pieces.len());
        for (piece, joins) in std::mem::take(&mut pieces).into_iter().zip(joins) {
            if joins { batch.push(piece) } else { pieces.push(piece) }
        }
        batch.reverse();
        let full_size = (x.dim(2), x.dim(3));
        let items: Vec<DenoiseItem<'_>> = batch.iter().map(|p| p.item(full_size)).collect();
        let outputs = model.denoise(&items, sigma)?;
        for (piece, output) in batch.iter().zip(outputs) {
            if output.shape() != piece.x.shape() {
                let (got, want) = (output.shape().to_vec(), piece.x.shape().to_vec());
                return Err(DiffusionError::Shape { what: "the model's prediction", got, want });
            }
            if let Some(sum) = sums.get_mut(piece.side) {
                sum.add(piece, output, x.shape())?;
            }
        }
    }
    sums.into_iter().map(|sum| sum.mean(x.shape())).collect()
}

/// Cells of the ramp on an area's inner edges.
const RAMP: usize = 8;

impl<'a> Piece<'a> {
    /// What the model is asked.
    fn item(&self, full_size: (usize, usize)) -> DenoiseItem<'_> {
        DenoiseItem {
            x: &self.x,
            cond: &self.cond.entry,
            full_size,
            offset: (self.rect.y, self.rect.x),
            is_negative: self.cond.is_negative,
            run: &self.cond.run,
        }
    }

    /// Whether a call can take this piece beside one for `x`: of the same shape, in the same place.
    fn is_like(&self, x: &Field) -> bool {
        match x {
            Field::Host(x) => self.x.on_device().is_none() && self.x.shape() == x.shape(),
            Field::Device(_) => self.x.is_same_on_device(x),
        }
    }

    /// `None` if the area lies outside the latent.
    fn new(side: usize, cond: &'a ResolvedCond, x: &Field) -> Result<Option<Self>, DiffusionError> {
        let (h, w) = (x.dim(2), x.dim(3));
        if let Some(mask) = cond.mask.as_ref().filter(|m| (m.dim(1), m.dim(2)) != (h, w)) {
            let (got, want) = (mask.shape().to_vec(), vec![mask.dim(0), h, w]);
            return Err(DiffusionError::Shape { what: "mask of a conditioning", got, want });
        }
        let whole = Rect { height: h, width: w, y: 0, x: 0 };
        let rect = cond.rect.map_or(whole, |r| Rect {
            height: r.height.min(h.saturating_sub(r.y)),
            width: r.width.min(w.saturating_sub(r.x)),
            ..r
        });
        if rect.height == 0 || rect.width == 0 {
            return Ok(None);
        }
        let part = if rect == whole { x.clone() } else { crop(&*x.to_host()?, rect).into() };
        let weights = match (&cond.mask, cond.rect) {
            (Some(mask), _) => Some(mask_weights(mask, rect, cond)),
            (None, Some(_)) => Some(ramp_weights(rect, (h, w), cond.entry.strength as f32)),
            (None, None) => None,
        };
        Ok(Some(Self { side, cond, rect, x: part, weights }))
    }
}

fn crop(x: &HostTensor, rect: Rect) -> HostTensor {
    let (b, c, h, w) = (x.dim(0), x.dim(1), x.dim(2), x.dim(3));
    let mut out = Vec::with_capacity(b * c * rect.height * rect.width);
    for plane in x.data().chunks_exact(h * w) {
        for row in plane.chunks_exact(w).skip(rect.y).take(rect.height) {
            out.extend_from_slice(&row[rect.x..rect.x + rect.width]);
        }
    }
    HostTensor::new(&[b, c, rect.height, rect.width], out).unwrap_or_default()
}

fn mask_weights(mask: &HostTensor, rect: Rect, cond: &ResolvedCond) -> HostTensor {
    let (b, h, w) = (mask.dim(0), mask.dim(1), mask.dim(2));
    let as_latent = mask.clone().reshape(&[b, 1, h, w]).unwrap_or_default();
    let (mask_strength, strength) = (cond.entry.mask_strength as f32, cond.entry.strength as f32);
    let weights = crop(&as_latent, rect).map(|v| v * mask_strength * strength);
    weights.reshape(&[b, rect.height, rect.width]).unwrap_or_default()
}

/// `strength`, rising linearly over a few cells from every edge inside the picture.
fn ramp_weights(rect: Rect, full: (usize, usize), strength: f32) -> HostTensor {
    let profile = |length: usize, start: usize, full: usize| -> Vec<f32> {
        let ramp = RAMP.min(length / 4);
        let rise = |distance: usize| {
            if distance < ramp { (1.0 / ramp as f64 * (distance + 1) as f64) as f32 } else { 1.0 }
        };
        let low = |i: usize| if start != 0 { rise(i) } else { 1.0 };
        let high = |i: usize| if start + length < full { rise(length - 1 - i) } else { 1.0 };
        (0..length).map(|i| low(i) * high(i)).collect()
    };
    let rows = profile(rect.height, rect.y, full.0);
    let columns = profile(rect.width, rect.x, full.1);
    let width = rect.width;
    HostTensor::from_fn(&[1, rect.height, width], |i| strength * rows[i / width] * columns[i % width])
}

/// A weighted mean by place in the making.
#[derive(Default)]
struct Sum {
    /// Predictions on a device, of the whole picture, with their weights.
    on_device: Vec<(f64, Field)>,
    /// All others.
    on_host: Option<HostSum>,
}

impl Sum {
    fn add(&mut self, piece: &Piece<'_>, output: Field, shape: &[usize]) -> Result<(), DiffusionError> {
        if output.on_device().is_some() && piece.weights.is_none() {
            self.on_device.push((piece.cond.entry.strength, output));
            return Ok(());
        }
        let sum = self.on_host.get_or_insert_with(|| HostSum::new(shape));
        sum.add(piece, &*output.to_host()?);
        Ok(())
    }

    fn mean(self, shape: &[usize]) -> Result<Field, DiffusionError> {
        let Some(mut sum) = self.on_host else {
            let mut parts = self.on_device;
            if let [_] = parts.as_slice()
                && let Some((strength, only)) = parts.pop()
                && strength != 0.0
            {
                return Ok(only);
            }
            let total: f64 = parts.iter().map(|(strength, _)| strength).sum();
            let weighted = parts.iter().map(|(strength, x)| (strength / (total + COVERED), x));
            let weighted: Vec<(f64, &Field)> = weighted.collect();
            return match weighted.is_empty() {
                true => Ok(HostTensor::zeros(shape).into()),
                false => Field::lincomb(&weighted),
            };
        };
        for (strength, output) in &self.on_device {
            sum.add_whole(*strength as f32, &*output.to_host()?);
        }
        Ok(sum.mean().into())
    }
}

/// Weight of every place before anything covers it: a place that nothing covers becomes 0 / 1e-37 = 0.
const COVERED: f64 = 1e-37;

/// The same in host memory.
struct HostSum {
    total: HostTensor,
    weight: HostTensor,
}

impl HostSum {
    fn new(shape: &[usize]) -> Self {
        Self { total: HostTensor::zeros(shape), weight: HostTensor::full(shape, COVERED as f32) }
    }

    /// Adds a prediction of the whole picture.
    fn add_whole(&mut self, strength: f32, output: &HostTensor) {
        let (total, weight) = (self.total.data_mut(), self.weight.data_mut());
        for ((t, w), value) in total.iter_mut().zip(weight).zip(output.data()) {
            *t += value * strength;
            *w += strength;
        }
    }

    fn add(&mut self, piece: &Piece<'_>, output: &HostTensor) {
        let (channels, h, w) = (self.total.dim(1), self.total.dim(2), self.total.dim(3));
        let rect = piece.rect;
        let uniform = piece.cond.entry.strength as f32;
        let (total, weight) = (self.total.data_mut(), self.weight.data_mut());
        for (row, line) in output.data().chunks_exact(rect.width).enumerate() {
            let (plane, y) = (row / rect.height, row % rect.height);
            let start = (plane * h + rect.y + y) * w + rect.x;
            for (i, &value) in line.iter().enumerate() {
                let m = match &piece.weights {
                    None => uniform,
                    Some(t) => {
                        let sample = (plane / channels) % t.dim(0).max(1);
                        t.data()[(sample * rect.height + y) * rect.width + i]
                    }
                };
                total[start + i] += value * m;
                weight[start + i] += m;
            }
        }
    }

    fn mean(self) -> HostTensor {
        self.total.zip(&self.weight, |t, w| t / w)
    }
}
