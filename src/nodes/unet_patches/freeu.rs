//! FreeU: stronger backbone features and weaker low frequencies on the skip
//! connections of the two lowest levels.
//!
//! Source: Si et al., "FreeU: Free lunch in diffusion U-Net", 2023. Version 2
//! scales the backbone by place, as its mean over channels says.

use std::f64::consts::TAU;
use std::sync::Arc;

use rayon::prelude::*;

use super::attach;
use crate::diffusion::ModelHandle;
use crate::graph::Input;
use crate::models::ModelError;
use crate::models::unet::hooks::{HookCall, Joined, UnetHook};
use crate::nodes::pure::PureNode;
use crate::nodes::sd_model::SdModel;
use crate::nodes::{Inputs, Node, NodeError, Schema, Value};
use crate::tensor::{HostTensor, Tensor};

/// The nodes.
pub(super) fn nodes() -> Vec<Box<dyn Node>> {
    vec![
        PureNode::boxed(|| schema("FreeU", 1.1, 1.2), |inputs| patch(inputs, false)),
        PureNode::boxed(|| schema("FreeU_V2", 1.3, 1.4), |inputs| patch(inputs, true)),
    ]
}

fn schema(class: &'static str, b1: f64, b2: f64) -> Schema {
    let factor = |name, default| Input::float(name, default, 0.0, 10.0).opt("step", 0.01);
    Schema::new(class, "model_patches/unet")
        .module("comfy_extras.nodes_freelunch")
        .describe("Strengthens the UNet's backbone and weakens the coarse part of its skip connections.")
        .input(Input::link("model", "MODEL").bare())
        .input(factor("b1", b1))
        .input(factor("b2", b2))
        .input(factor("s1", 0.9))
        .input(factor("s2", 0.2))
        .output("MODEL")
}

fn patch(inputs: &Inputs, is_by_place: bool) -> Result<Vec<Value>, NodeError> {
    let factor = |name| inputs.float(name).map(|v| v as f32);
    let width = SdModel::of(&*inputs.object::<ModelHandle>("model")?)?.file().unet()?.config().model_channels;
    let levels = [(4 * width, factor("b1")?, factor("s1")?), (2 * width, factor("b2")?, factor("s2")?)];
    attach(inputs, Arc::new(FreeU { levels, is_by_place }))
}

struct FreeU {
    /// Channels of a level, factor on its backbone, factor on its skips' low frequencies.
    levels: [(usize, f32, f32); 2],
    is_by_place: bool,
}

impl UnetHook for FreeU {
    fn way_up(&self, call: &HookCall<'_>, h: &Tensor, skip: &Tensor) -> Result<Joined, ModelError> {
        let Some(&(_, backbone, low)) = self.levels.iter().find(|level| level.0 == h.shape().c) else {
            return Ok(Joined::default());
        };
        let mut map = call.ops.download_nchw(h)?;
        scale_backbone(&mut map, backbone, self.is_by_place);
        let mut skip = call.ops.download_nchw(skip)?;
        scale_low_band(&mut skip, low);
        Ok(Joined { h: Some(call.ops.upload_nchw(&map)?), skip: Some(call.ops.upload_nchw(&skip)?) })
    }
}

/// Scales the first half of the channels of `[B, C, h, w]`.
fn scale_backbone(x: &mut HostTensor, factor: f32, is_by_place: bool) {
    let (channels, places) = (x.dim(1), x.dim(2) * x.dim(3));
    for sample in x.data_mut().chunks_exact_mut((channels * places).max(1)) {
        let factors = if is_by_place { place_factors(sample, places, factor) } else { vec![factor; places] };
        for plane in sample.chunks_exact_mut(places).take(channels / 2) {
            plane.iter_mut().zip(&factors).for_each(|(v, f)| *v *= f);
        }
    }
}

/// 1 where the mean over channels is smallest, `factor` where it is largest.
/// A map of one place has no range: NaN, as in the reference.
fn place_factors(sample: &[f32], places: usize, factor: f32) -> Vec<f32> {
    let channels = (sample.len() / places) as f64;
    let mut mean = vec![0f64; places];
    for plane in sample.chunks_exact(places) {
        mean.iter_mut().zip(plane).for_each(|(m, v)| *m += f64::from(*v));
    }
    mean.iter_mut().for_each(|m| *m /= channels);
    let (low, high) = mean.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), &m| (l.min(m), h.max(m)));
    mean.iter().map(|m| (factor - 1.0) * ((m - low) / (high - low)) as f32 + 1.0).collect()
}

/// Scales the spatial frequencies −1 and 0 of every plane of `[B, C, h, w]`
/// (0 alone along a side of one place); the real part is kept.
fn scale_low_band(x: &mut HostTensor, factor: f32) {
    let (h, w) = (x.dim(2), x.dim(3));
    let (rows, columns) = (waves(h), waves(w));
    x.data_mut().par_chunks_exact_mut((h * w).max(1)).for_each(|plane| {
        let mut band = vec![0f64; h * w];
        for row in &rows {
            for column in &columns {
                // The coefficient of the product of both waves, then its part of the plane.
                let (mut re, mut im) = (0.0, 0.0);
                for (line, r) in plane.chunks_exact(w).zip(row) {
                    for (v, c) in line.iter().zip(column) {
                        let (cos, sin) = product(*r, *c);
                        re += f64::from(*v) * cos;
                        im += f64::from(*v) * sin;
                    }
                }
                for (line, r) in band.chunks_exact_mut(w).zip(row) {
                    for (v, c) in line.iter_mut().zip(column) {
                        let (cos, sin) = product(*r, *c);
                        *v += re * cos + im * sin;
                    }
                }
            }
        }
        let scale = f64::from(factor - 1.0) / (h * w) as f64;
        plane.iter_mut().zip(&band).for_each(|(v, b)| *v += (scale * b) as f32);
    });
}

/// The waves `exp(−2πi·f·d/n)` of the frequencies kept.
fn waves(n: usize) -> Vec<Vec<(f64, f64)>> {
    let frequencies: &[f64] = if n > 1 { &[-1.0, 0.0] } else { &[0.0] };
    let wave =
        |f: &f64| (0..n).map(|d| (-TAU * f * d as f64 / n as f64).sin_cos()).map(|(s, c)| (c, s)).collect();
    frequencies.iter().map(wave).collect()
}

fn product(a: (f64, f64), b: (f64, f64)) -> (f64, f64) {
    (a.0 * b.0 - a.1 * b.1, a.0 * b.1 + a.1 * b.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A constant is all low frequency, a checkerboard has none of it.
    #[test]
    fn low_band_of_known_planes() {
        let mut flat = HostTensor::full(&[1, 1, 4, 6], 2.0);
        scale_low_band(&mut flat, 0.5);
        assert!(flat.data().iter().all(|v| (v - 1.0).abs() < 1e-6), "{flat:?}");
        let board = HostTensor::from_fn(&[1, 1, 4, 6], |i| if (i / 6 + i % 6) % 2 == 0 { 1.0 } else { -1.0 });
        let mut filtered = board.clone();
        scale_low_band(&mut filtered, 0.5);
        assert!(filtered.data().iter().zip(board.data()).all(|(a, b)| (a - b).abs() < 1e-6));
    }

    /// A cosine along one side is half frequency 1 and half −1: a quarter goes at factor 0.5.
    #[test]
    fn only_one_of_a_pair_of_frequencies_is_kept() {
        let wave = HostTensor::from_fn(&[1, 1, 1, 8], |i| (TAU * i as f64 / 8.0).cos() as f32);
        let mut filtered = wave.clone();
        scale_low_band(&mut filtered, 0.5);
        for (a, b) in filtered.data().iter().zip(wave.data()) {
            assert!((a - 0.75 * b).abs() < 1e-6, "{a} {b}");
        }
    }

    #[test]
    fn backbone_by_place() {
        let mut x = HostTensor::from_fn(&[1, 2, 1, 3], |i| [0.0, 1.0, 2.0, 0.0, 1.0, 2.0][i]);
        scale_backbone(&mut x, 3.0, true);
        assert_eq!(x.data(), [0.0, 2.0, 6.0, 0.0, 1.0, 2.0]);
    }
}
