//! Self-attention guidance: away from a prediction whose most attended places
//! were blurred before the model looked again.
//!
//! Source: Hong et al., "Improving sample quality of diffusion models using
//! self-attention guidance", 2022.

use std::sync::{Arc, Mutex, PoisonError};

use rayon::prelude::*;

use crate::diffusion::guidance_patch::{GuidancePatch, PatchContext, Predictions};
use crate::diffusion::regions::evaluate_on_host;
use crate::diffusion::{DiffusionError, Field, Model, ModelHandle};
use crate::graph::Input;
use crate::models::ModelError;
use crate::models::layers::head_scale;
use crate::models::unet::hooks::{HookCall, SelfAttention, Site, UnetHook};
use crate::nodes::pure::PureNode;
use crate::nodes::sd_model::SdModel;
use crate::nodes::shapes::newer;
use crate::nodes::{Inputs, Node, NodeError, Schema, Value};
use crate::tensor::{HostTensor, Tensor};

/// Attention that a place must draw to be blurred; 1 is what it draws on average.
const THRESHOLD: f32 = 1.0;
/// Side of the blur's kernel.
const KERNEL: usize = 9;
/// Sides up to this are too small to be padded for the blur.
const TOO_SMALL: usize = KERNEL / 2;

/// The node.
pub(super) fn nodes() -> Vec<Box<dyn Node>> {
    vec![PureNode::boxed(schema, patch)]
}

fn schema() -> Schema {
    let schema = Schema::new("SelfAttentionGuidance", "_for_testing")
        .display("Self-Attention Guidance")
        .module("comfy_extras.nodes_sag")
        .describe("Guides away from a prediction of the picture blurred where the model looks most.")
        .input(Input::link("model", "MODEL"))
        .input(Input::float("scale", 0.5, -2.0, 5.0).opt("step", 0.01))
        .input(Input::float("blur_sigma", 2.0, 0.0, 10.0).opt("step", 0.1))
        .output("MODEL");
    newer(schema, true)
}

fn patch(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let model = inputs.object::<ModelHandle>("model")?;
    SdModel::of(&model)?;
    let patch = SelfAttentionGuidance {
        scale: inputs.float("scale")? as f32,
        sigma: inputs.float("blur_sigma")?,
        drawn: Drawn::default(),
    };
    Ok(vec![Value::object("MODEL", model.with_patch(Arc::new(patch)))])
}

/// How much attention every place drew on the negative side, `[B, S]`, in the
/// run's last model call.
type Drawn = Arc<Mutex<Option<HostTensor>>>;

struct SelfAttentionGuidance {
    scale: f32,
    sigma: f64,
    drawn: Drawn,
}

impl GuidancePatch for SelfAttentionGuidance {
    fn fresh(&self) -> Box<dyn GuidancePatch> {
        Box::new(Self { drawn: Drawn::default(), ..*self })
    }

    fn model(&self, model: Arc<dyn Model>) -> Arc<dyn Model> {
        match model.network().downcast_ref::<SdModel>() {
            Some(base) => Arc::new(base.with_hook(Arc::new(Watch { drawn: self.drawn.clone() }))),
            None => model,
        }
    }

    fn needs_uncond(&self) -> bool {
        true
    }

    fn after(
        &mut self,
        ctx: &PatchContext<'_>,
        preds: &Predictions,
        guided: Field,
    ) -> Result<Field, DiffusionError> {
        let drawn = self.drawn.lock().unwrap_or_else(PoisonError::into_inner).take();
        let (Some(drawn), Some(negative)) = (drawn, ctx.sides.get(1)) else { return Ok(guided) };
        if guided.dim(2).min(guided.dim(3)) <= TOO_SMALL {
            return Ok(guided);
        }
        let uncond = preds.uncond.to_host()?;
        let degraded = degrade(&uncond, &drawn, self.sigma)?;
        let noisy = degraded.zip(&*ctx.x.to_host()?, |d, x| d + x).zip(&uncond, |v, u| v - u);
        let out = evaluate_on_host(ctx.model, &[Some(negative)], &noisy, ctx.sigma)?;
        let Some(again) = out.first() else { return Ok(guided) };
        guided.plus(self.scale.into(), (&degraded.into(), &again.clone().into()))
    }
}

/// Notes how much attention each place draws in the first transformer block of the middle.
struct Watch {
    drawn: Drawn,
}

impl UnetHook for Watch {
    fn self_attention(
        &self,
        call: &HookCall<'_>,
        site: Site<'_>,
        attention: &SelfAttention<'_>,
    ) -> Result<Option<Tensor>, ModelError> {
        let watched: Vec<usize> =
            call.sides.iter().enumerate().filter(|(_, side)| **side == 1).map(|(i, _)| i).collect();
        if site.is_middle() && site.index == 0 && !watched.is_empty() {
            let qkv = call.ops.download_tokens(attention.qkv)?;
            let sums: Vec<f32> = watched
                .iter()
                .flat_map(|i| attention_drawn(qkv.row(*i), qkv.dim(1), attention.heads))
                .collect();
            let drawn = HostTensor::new(&[watched.len(), qkv.dim(1)], sums);
            *self.drawn.lock().unwrap_or_else(PoisonError::into_inner) = drawn;
        }
        Ok(None)
    }
}

/// For every key the sum over queries of its share of attention, averaged over heads.
fn attention_drawn(qkv: &[f32], places: usize, heads: usize) -> Vec<f32> {
    let c = qkv.len() / (3 * places.max(1));
    let (width, scale) = (c / heads.max(1), head_scale(c, heads));
    let part = |place: usize, which: usize, head: usize| {
        let start = place * 3 * c + which * c + head * width;
        &qkv[start..start + width]
    };
    let per_query = (0..heads * places).into_par_iter().map(|i| {
        let (head, query) = (i / places, part(i % places, 0, i / places));
        let score =
            |key: usize| query.iter().zip(part(key, 1, head)).map(|(q, k)| q * k).sum::<f32>() * scale;
        let mut shares: Vec<f32> = (0..places).map(score).collect();
        let top = shares.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        shares.iter_mut().for_each(|s| *s = (*s - top).exp());
        let total: f32 = shares.iter().sum();
        shares.iter_mut().for_each(|s| *s /= total);
        shares
    });
    let rows: Vec<Vec<f32>> = per_query.collect();
    let mut drawn = vec![0f64; places];
    for row in &rows {
        drawn.iter_mut().zip(row).for_each(|(d, s)| *d += f64::from(*s));
    }
    drawn.iter().map(|d| (d / heads.max(1) as f64) as f32).collect()
}

/// `x` `[B, C, h, w]`, blurred where more attention was drawn than the threshold.
fn degrade(x: &HostTensor, drawn: &HostTensor, sigma: f64) -> Result<HostTensor, DiffusionError> {
    let (h, w) = (x.dim(2), x.dim(3));
    let places = drawn.dim(1);
    let Some(rows) = rows_of_map(places, (h, w)) else {
        let (got, want) = (vec![places], vec![h, w]);
        return Err(DiffusionError::Shape { what: "attention map of self-attention guidance", got, want });
    };
    let columns = places / rows;
    let blurred = blur(x, sigma);
    let mask = |sample: usize, place: usize| {
        let (y, i) = (place / w * rows / h, place % w * columns / w);
        drawn.row(sample % drawn.dim(0).max(1))[y * columns + i] > THRESHOLD
    };
    let (per_sample, plane) = (x.row_len(), h * w);
    Ok(HostTensor::from_fn(x.shape(), |i| {
        let is_blurred = mask(i / per_sample, i % plane);
        if is_blurred { blurred.data()[i] } else { x.data()[i] }
    }))
}

/// Rows of a map of that many places whose shape is closest to `h`×`w`.
fn rows_of_map(places: usize, (h, w): (usize, usize)) -> Option<usize> {
    let near = ((h as f64 / w as f64) * places as f64).sqrt().round_ties_even() as usize;
    let tries = ((places as f64).sqrt() / 2.0).floor() as usize;
    let candidates = (0..tries).flat_map(|i| [near + i, near.saturating_sub(i).max(1)]);
    candidates.into_iter().find(|rows| *rows > 0 && places.is_multiple_of(*rows))
}

/// A Gaussian of 9×9 with mirrored edges; sides are at least 5.
fn blur(x: &HostTensor, sigma: f64) -> HostTensor {
    let half = (KERNEL / 2) as isize;
    let weights: Vec<f64> = (-half..=half).map(|d| (-0.5 * (d as f64 / sigma).powi(2)).exp()).collect();
    let total: f64 = weights.iter().sum();
    let weights: Vec<f64> = weights.iter().map(|v| v / total).collect();
    let (h, w) = (x.dim(2) as isize, x.dim(3) as isize);
    let mirrored = |place: isize, n: isize| {
        let place = place.abs();
        if place < n { place } else { 2 * (n - 1) - place }
    };
    let mut out = Vec::with_capacity(x.len());
    for plane in x.data().chunks_exact((h * w) as usize) {
        let at = |y: isize, i: isize| f64::from(plane[(mirrored(y, h) * w + mirrored(i, w)) as usize]);
        let row =
            |y: isize, i: isize| -> f64 { (-half..=half).zip(&weights).map(|(d, v)| v * at(y, i + d)).sum() };
        for y in 0..h {
            for i in 0..w {
                let sum: f64 = (-half..=half).zip(&weights).map(|(d, v)| v * row(y + d, i)).sum();
                out.push(sum as f32);
            }
        }
    }
    HostTensor::new(x.shape(), out).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_have_the_picture_s_shape() {
        assert_eq!(rows_of_map(4, (16, 16)), Some(2));
        assert_eq!(rows_of_map(6, (16, 24)), Some(2));
        assert_eq!(rows_of_map(64, (64, 64)), Some(8));
        assert_eq!(rows_of_map(1, (8, 8)), None);
    }

    /// The shares of every query add up to 1, so the keys' sums add up to the places.
    #[test]
    fn attention_is_shared_out() {
        let qkv: Vec<f32> = (0..5 * 3 * 8).map(|i| ((i * 37) % 11) as f32 / 7.0 - 0.7).collect();
        let drawn = attention_drawn(&qkv, 5, 2);
        assert!((drawn.iter().sum::<f32>() - 5.0).abs() < 1e-5, "{drawn:?}");
    }

    #[test]
    fn blur_keeps_a_constant_and_the_sum_of_a_point_inside() {
        let flat = blur(&HostTensor::full(&[1, 1, 5, 6], 3.0), 2.0);
        assert!(flat.data().iter().all(|v| (v - 3.0).abs() < 1e-5));
        let point = HostTensor::from_fn(&[1, 1, 11, 11], |i| if i == 60 { 1.0 } else { 0.0 });
        assert!((blur(&point, 1.0).data().iter().sum::<f32>() - 1.0).abs() < 1e-5);
    }
}
