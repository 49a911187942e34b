//! Self-attention guidance: away from a prediction whose most attended places
//! were blurred before the model looked again.
//!
//! Source: Hong et al., "Improving sample quality of diffusion models using
//! self-attention guidance", 2022.

use std::sync::{Arc, Mutex, PoisonError};

use crate::diffusion::guidance_patch::{GuidancePatch, PatchContext, Predictions};
use crate::diffusion::regions::evaluate;
use crate::diffusion::{DeviceField, DiffusionError, Field, Model, ModelHandle};
use crate::graph::Input;
use crate::models::ModelError;
use crate::models::layers::{Ops, fused_self_attention};
use crate::models::unet::hooks::{HookCall, SelfAttention, Site, UnetHook, key_of};
use crate::nodes::pure::PureNode;
use crate::nodes::sd_model::SdModel;
use crate::nodes::shapes::newer;
use crate::nodes::{Inputs, Node, NodeError, Schema, Value};
use crate::tensor::latents::BlurWhere;
use crate::tensor::{Attention, AttentionDrawn, HostTensor, Tensor};

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
        noted: Noted::default(),
    };
    Ok(vec![Value::object("MODEL", model.with_patch(Arc::new(patch)))])
}

/// How much attention every place drew in a model call.
struct Drawn {
    /// `[samples, 1, S, 1]`, on the device.
    map: Tensor,
    /// Its rows that are of the negative side.
    rows: Vec<usize>,
}

/// What was noted in the run's last model call.
type Noted = Arc<Mutex<Option<Drawn>>>;

struct SelfAttentionGuidance {
    scale: f32,
    sigma: f64,
    noted: Noted,
}

impl GuidancePatch for SelfAttentionGuidance {
    fn fresh(&self) -> Box<dyn GuidancePatch> {
        Box::new(Self { noted: Noted::default(), ..*self })
    }

    fn model(&self, model: Arc<dyn Model>) -> Arc<dyn Model> {
        match model.network().downcast_ref::<SdModel>() {
            Some(base) => Arc::new(base.with_hook(Arc::new(Watch { noted: self.noted.clone() }))),
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
        let noted = self.noted.lock().unwrap_or_else(PoisonError::into_inner).take();
        let (Some(noted), Some(negative)) = (noted, ctx.sides.get(1)) else { return Ok(guided) };
        if guided.dim(2).min(guided.dim(3)) <= TOO_SMALL {
            return Ok(guided);
        }
        let degraded = match &preds.uncond {
            Field::Device(uncond) => Field::Device(noted.degrade(uncond, self.sigma)?),
            Field::Host(uncond) => Field::Host(degrade(uncond, &noted.on_host(ctx.model)?, self.sigma)?),
        };
        let noisy = Field::lincomb(&[(1.0, &degraded), (1.0, ctx.x), (-1.0, &preds.uncond)])?;
        let out = evaluate(ctx.model, &[Some(negative)], &noisy, ctx.sigma)?;
        let Some(again) = out.first() else { return Ok(guided) };
        guided.plus(self.scale.into(), (&degraded, again))
    }
}

impl Drawn {
    /// `x`, blurred where more attention was drawn than the threshold, on the device.
    fn degrade(&self, x: &DeviceField, sigma: f64) -> Result<DeviceField, DiffusionError> {
        let [samples, _, h, w] = x.shape();
        let taps = taps(sigma).map(|tap| tap as f32);
        let map_of: Vec<usize> = self.rows.iter().copied().cycle().take(samples).collect();
        let map_size = size_of_map(self.map.shape().positions(), (h, w))?;
        x.blur_where(&BlurWhere {
            taps: &taps,
            map: &self.map,
            map_size,
            map_of: &map_of,
            threshold: THRESHOLD,
        })
    }

    /// The negative side's part in host memory, `[B, S]`.
    fn on_host(&self, model: &dyn Model) -> Result<HostTensor, DiffusionError> {
        let network = model.network().downcast_ref::<SdModel>();
        let backend = network.map(|base| base.file().diffusion_backend());
        let backend =
            backend.ok_or_else(|| DiffusionError::model("self-attention guidance: not a UNet of SD"))?;
        let map = Ops(backend.as_ref()).download_tokens(&self.map).map_err(DiffusionError::model)?;
        let rows: Vec<f32> = self.rows.iter().flat_map(|row| map.row(*row)).copied().collect();
        Ok(HostTensor::new(&[self.rows.len(), map.dim(1)], rows).unwrap_or_default())
    }
}

/// Notes how much attention each place draws in the first transformer block of the middle.
struct Watch {
    noted: Noted,
}

/// The samples of a pass that are denoised towards the negative side.
fn negative(sides: &[usize]) -> Vec<usize> {
    sides.iter().enumerate().filter(|(_, side)| **side == 1).map(|(i, _)| i).collect()
}

impl UnetHook for Watch {
    fn key(&self, call: &HookCall<'_>) -> Option<u64> {
        Some(key_of("attention drawn", negative(call.sides)))
    }

    fn watch(
        &self,
        call: &HookCall<'_>,
        site: Site<'_>,
        attention: &SelfAttention<'_>,
    ) -> Result<Option<Tensor>, ModelError> {
        let samples = negative(call.sides);
        let (Some(first), Some(last)) = (samples.first(), samples.last()) else { return Ok(None) };
        if !(site.is_middle() && site.index == 0) {
            return Ok(None);
        }
        let Attention { q, k, heads, scale, .. } =
            fused_self_attention(attention.qkv, attention.heads, false);
        let op = AttentionDrawn { q, k, heads, scale, first: *first };
        call.ops.attention_drawn(&op, last - first + 1).map(Some)
    }

    fn watched(&self, call: &HookCall<'_>, made: Tensor) {
        let samples = negative(call.sides);
        let first = samples.first().copied().unwrap_or(0);
        let rows = samples.iter().map(|sample| sample - first).collect();
        *self.noted.lock().unwrap_or_else(PoisonError::into_inner) = Some(Drawn { map: made, rows });
    }
}

/// `x` `[B, C, h, w]`, blurred where more attention was drawn than the threshold.
fn degrade(x: &HostTensor, drawn: &HostTensor, sigma: f64) -> Result<HostTensor, DiffusionError> {
    let (h, w) = (x.dim(2), x.dim(3));
    let [rows, columns] = size_of_map(drawn.dim(1), (h, w))?;
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

/// Rows and columns of a map of that many places.
fn size_of_map(places: usize, (h, w): (usize, usize)) -> Result<[usize; 2], DiffusionError> {
    let rows = rows_of_map(places, (h, w)).ok_or_else(|| {
        let (got, want) = (vec![places], vec![h, w]);
        DiffusionError::Shape { what: "attention map of self-attention guidance", got, want }
    })?;
    Ok([rows, places / rows])
}

/// Rows of a map of that many places whose shape is closest to `h`×`w`.
fn rows_of_map(places: usize, (h, w): (usize, usize)) -> Option<usize> {
    let near = ((h as f64 / w as f64) * places as f64).sqrt().round_ties_even() as usize;
    let tries = ((places as f64).sqrt() / 2.0).floor() as usize;
    let candidates = (0..tries).flat_map(|i| [near + i, near.saturating_sub(i).max(1)]);
    candidates.into_iter().find(|rows| *rows > 0 && places.is_multiple_of(*rows))
}

/// Weights of the blur along a side.
fn taps(sigma: f64) -> [f64; KERNEL] {
    let weight = |i: usize| (-0.5 * ((i as f64 - (KERNEL / 2) as f64) / sigma).powi(2)).exp();
    let weights: [f64; KERNEL] = std::array::from_fn(weight);
    let total: f64 = weights.iter().sum();
    weights.map(|v| v / total)
}

/// A Gaussian of 9×9 with mirrored edges; sides are at least 5.
fn blur(x: &HostTensor, sigma: f64) -> HostTensor {
    let half = (KERNEL / 2) as isize;
    let weights = taps(sigma);
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

    #[test]
    fn blur_keeps_a_constant_and_the_sum_of_a_point_inside() {
        let flat = blur(&HostTensor::full(&[1, 1, 5, 6], 3.0), 2.0);
        assert!(flat.data().iter().all(|v| (v - 3.0).abs() < 1e-5));
        let point = HostTensor::from_fn(&[1, 1, 11, 11], |i| if i == 60 { 1.0 } else { 0.0 });
        assert!((blur(&point, 1.0).data().iter().sum::<f32>() - 1.0).abs() < 1e-5);
    }
}
