//! Other noise levels, or another meaning of the network's output, for a model.

use std::sync::Arc;

use super::pure::PureNode;
use super::sd_model::SdModel;
use super::shapes::{MAX_SIDE, unknown};
use super::{Inputs, Node, NodeError, Schema, Value};
use crate::diffusion::schedule::{ModelSampling, Prediction};
use crate::diffusion::{LatentFormat, ModelHandle};
use crate::graph::Input;

/// Training steps that a consistency model keeps.
const CONSISTENCY_STEPS: usize = 50;

/// The nodes that set a model's noise levels.
pub(super) fn nodes() -> Vec<Box<dyn Node>> {
    vec![
        PureNode::boxed(discrete_schema, discrete),
        PureNode::boxed(continuous_edm_schema, continuous_edm),
        PureNode::boxed(continuous_v_schema, continuous_v),
        PureNode::boxed(|| flow_schema("ModelSamplingSD3", 3.0), |inputs| flow(inputs, 1000.0)),
        PureNode::boxed(|| flow_schema("ModelSamplingAuraFlow", 1.73), |inputs| flow(inputs, 1.0)),
        PureNode::boxed(flux_schema, flux),
        PureNode::boxed(compute_type_schema, compute_type),
    ]
}

fn schema(class: &'static str, about: &'static str) -> Schema {
    Schema::new(class, "advanced/model")
        .module("comfy_extras.nodes_model_advanced")
        .describe(about)
        .input(Input::link("model", "MODEL").bare())
}

/// The input `model`, changed.
fn changed(inputs: &Inputs, change: impl FnOnce(&SdModel) -> SdModel) -> Result<Vec<Value>, NodeError> {
    let model = inputs.object::<ModelHandle>("model")?;
    let changed = change(SdModel::of(&model)?);
    Ok(vec![Value::object("MODEL", model.with_network(Arc::new(changed)))])
}

/// The input `model` with other noise levels.
fn with_sampling(inputs: &Inputs, sampling: ModelSampling) -> Result<Vec<Value>, NodeError> {
    changed(inputs, |model| model.with_sampling(sampling))
}

fn compute_type_schema() -> Schema {
    Schema::new("ModelComputeDtype", "advanced/debug/model")
        .display("ModelComputeDtype")
        .module("comfy_extras.nodes_model_advanced")
        .describe("The type to compute in. Here it is the device's own for all models; the node lets the model through.")
        .input(Input::link("model", "MODEL").bare())
        .input(Input::combo("dtype", &["default", "fp32", "fp16", "bf16"]).bare())
        .output("MODEL")
}

/// A type changes a picture by rounding only, and what a device computes in is set when kiln starts.
fn compute_type(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let dtype = inputs.string("dtype")?;
    if dtype != "default" {
        tracing::info!("ModelComputeDtype asks for {dtype}: the type stays the device's");
    }
    Ok(vec![Value::shared("MODEL", inputs.object::<ModelHandle>("model")?)])
}

fn discrete_schema() -> Schema {
    let kinds = ["eps", "v_prediction", "lcm", "x0", "img_to_img"];
    schema("ModelSamplingDiscrete", "What the model predicts, and whether its last step is pure noise.")
        .input(Input::combo("sampling", &kinds).bare())
        .input(Input::boolean("zsnr").opt("default", false))
        .output("MODEL")
}

fn discrete(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let mut betas = SdModel::of(&*inputs.object::<ModelHandle>("model")?)?.betas()?;
    betas.has_zero_terminal_snr = inputs.boolean("zsnr")?;
    let prediction = match inputs.string("sampling")? {
        "eps" => Prediction::Eps,
        "v_prediction" => Prediction::V,
        "lcm" => return with_sampling(inputs, ModelSampling::distilled(betas, CONSISTENCY_STEPS)),
        "x0" => Prediction::X0,
        "img_to_img" => Prediction::ImageToImage,
        other => return Err(unknown("sampling", other)),
    };
    with_sampling(inputs, ModelSampling::discrete(prediction, betas))
}

/// A noise level of a continuous model.
fn sigma(name: &'static str, default: f64) -> Input {
    Input::float(name, default, 0.0, 1000.0).opt("step", 0.001).opt("round", false)
}

fn sigma_range(inputs: &Inputs) -> Result<(f64, f64), NodeError> {
    let (low, high) = (inputs.float("sigma_min")?, inputs.float("sigma_max")?);
    match [("sigma_min", low), ("sigma_max", high)].iter().find(|(_, sigma)| *sigma <= 0.0) {
        Some((name, sigma)) => Err(NodeError::input(name, &format!("is {sigma}: it must be above 0"))),
        None => Ok((low, high)),
    }
}

fn continuous_edm_schema() -> Schema {
    let kinds = ["v_prediction", "edm", "edm_playground_v2.5", "eps", "cosmos_rflow"];
    schema("ModelSamplingContinuousEDM", "Continuous noise levels, told as a quarter of their logarithm.")
        .input(Input::combo("sampling", &kinds).bare())
        .input(sigma("sigma_max", 120.0))
        .input(sigma("sigma_min", 0.002))
        .output("MODEL")
}

fn continuous_edm(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let (low, high) = sigma_range(inputs)?;
    let edm = |prediction, data| ModelSampling::continuous_edm(prediction, low, high, data);
    let sampling = match inputs.string("sampling")? {
        "v_prediction" => edm(Prediction::V, 1.0),
        "edm" => edm(Prediction::Edm, ModelSampling::EDM_DATA),
        "edm_playground_v2.5" => {
            let sampling = edm(Prediction::Edm, ModelSampling::EDM_DATA);
            return changed(inputs, |model| {
                model.with_sampling(sampling).with_latent_format(LatentFormat::Playground25)
            });
        }
        "eps" => edm(Prediction::Eps, 1.0),
        "cosmos_rflow" => ModelSampling::continuous_flow(low, high),
        other => return Err(unknown("sampling", other)),
    };
    with_sampling(inputs, sampling)
}

fn continuous_v_schema() -> Schema {
    schema("ModelSamplingContinuousV", "Continuous noise levels of a v-prediction model, told as an angle.")
        .input(Input::combo("sampling", &["v_prediction"]).bare())
        .input(sigma("sigma_max", 500.0))
        .input(sigma("sigma_min", 0.03))
        .output("MODEL")
}

fn continuous_v(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let (low, high) = sigma_range(inputs)?;
    with_sampling(inputs, ModelSampling::continuous_v(Prediction::V, low, high))
}

fn flow_schema(class: &'static str, shift: f64) -> Schema {
    schema(class, "Noise levels of a rectified flow, shifted towards noise.")
        .input(Input::float("shift", shift, 0.0, 100.0).opt("step", 0.01))
        .output("MODEL")
}

fn flow(inputs: &Inputs, multiplier: f32) -> Result<Vec<Value>, NodeError> {
    with_sampling(inputs, ModelSampling::flow(inputs.float("shift")?, multiplier))
}

fn flux_schema() -> Schema {
    let shift = |name, default| Input::float(name, default, 0.0, 100.0).opt("step", 0.01);
    let side = |name| Input::int(name, 1024, 16, MAX_SIDE).opt("step", 8);
    schema("ModelSamplingFlux", "Noise levels of a rectified flow, shifted by the size of the picture.")
        .input(shift("max_shift", 1.15))
        .input(shift("base_shift", 0.5))
        .input(side("width"))
        .input(side("height"))
        .output("MODEL")
}

/// The shift grows linearly with the number of 16×16 patches: from `base_shift`
/// at 256 of them to `max_shift` at 4096.
fn flux(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    const FEW: f64 = 256.0;
    const MANY: f64 = 4096.0;
    let (most, base) = (inputs.float("max_shift")?, inputs.float("base_shift")?);
    let slope = (most - base) / (MANY - FEW);
    let patches = inputs.size("width")? as f64 * inputs.size("height")? as f64 / (8 * 8 * 2 * 2) as f64;
    let shift = patches * slope + (base - slope * FEW);
    with_sampling(inputs, ModelSampling::exponential_flow(shift))
}
