//! Sampler objects: by name, or one node a method with its settings.

use std::sync::Arc;

use super::super::pure::PureNode;
use super::super::sampling::sampler_named;
use super::super::shapes::{newer, newer_unnamed, unknown};
use super::super::{Inputs, Node, NodeError, Schema, Value};
use super::MODULE;
use crate::diffusion::samplers::{
    AdaptiveOptions, Algorithm, ErSdeOptions, LcmUpscaleOptions, NoiseDevice, NoiseScaler, Resizer, SAMPLERS,
    SaSolverOptions, Sampler, SolverType, Stochastic,
};
use crate::diffusion::{DiffusionError, ModelHandle};
use crate::graph::Input;
use crate::image::{Method, Resize, upscale};

const CATEGORY: &str = "sampling/custom_sampling/samplers";
const ADVANCED: &str = "comfy_extras.nodes_advanced_samplers";

/// The sampler nodes.
pub(super) fn nodes() -> Vec<Box<dyn Node>> {
    vec![
        PureNode::boxed(select_schema, select),
        PureNode::boxed(dpmpp_3m_sde_schema, dpmpp_3m_sde),
        PureNode::boxed(dpmpp_2m_sde_schema, dpmpp_2m_sde),
        PureNode::boxed(dpmpp_sde_schema, dpmpp_sde),
        PureNode::boxed(dpmpp_2s_schema, dpmpp_2s),
        PureNode::boxed(euler_ancestral_schema, euler_ancestral),
        PureNode::boxed(euler_ancestral_cfg_pp_schema, euler_ancestral_cfg_pp),
        PureNode::boxed(lms_schema, lms),
        PureNode::boxed(dpm_adaptive_schema, dpm_adaptive),
        PureNode::boxed(er_sde_schema, er_sde),
        PureNode::boxed(sa_solver_schema, sa_solver),
        PureNode::boxed(euler_cfg_pp_schema, euler_cfg_pp),
        PureNode::boxed(lcm_upscale_schema, lcm_upscale),
    ]
}

fn method(class: &'static str, text: &'static str) -> Schema {
    Schema::new(class, CATEGORY).module(MODULE).describe(text)
}

fn sampler(algorithm: Algorithm) -> Result<Vec<Value>, NodeError> {
    Ok(vec![Value::object("SAMPLER", Sampler::from(algorithm))])
}

/// A number of 0 or more that clients must not round.
fn exact(name: &'static str, default: f64) -> Input {
    Input::float(name, default, 0.0, 100.0).opt("step", 0.01).opt("round", false)
}

/// Where noise is drawn. Only a latent on a GPU has a generator of its own.
fn noise_device() -> Input {
    Input::combo("noise_device", &["gpu", "cpu"]).bare()
}

/// An SDE sampler with its noise from the input `noise_device`.
fn sde_sampler(inputs: &Inputs, algorithm: Algorithm) -> Result<Vec<Value>, NodeError> {
    let noise_device = match inputs.string("noise_device")? {
        "gpu" => NoiseDevice::Gpu,
        _ => NoiseDevice::Cpu,
    };
    Ok(vec![Value::object("SAMPLER", Sampler { noise_device, ..algorithm.into() })])
}

fn stochastic(inputs: &Inputs) -> Result<Stochastic, NodeError> {
    Ok(Stochastic { eta: inputs.float("eta")?, s_noise: inputs.float("s_noise")? })
}

fn select_schema() -> Schema {
    method("KSamplerSelect", "A sampler by name, with its usual settings.")
        .input(Input::combo("sampler_name", SAMPLERS).bare())
        .output("SAMPLER")
}

fn select(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    Ok(vec![Value::object("SAMPLER", sampler_named(inputs.string("sampler_name")?)?)])
}

fn dpmpp_3m_sde_schema() -> Schema {
    method("SamplerDPMPP_3M_SDE", "DPM-Solver++(3M) SDE.")
        .input(exact("eta", 1.0))
        .input(exact("s_noise", 1.0))
        .input(noise_device())
        .output("SAMPLER")
}

fn dpmpp_3m_sde(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    sde_sampler(inputs, Algorithm::Dpmpp3mSde(stochastic(inputs)?))
}

fn dpmpp_2m_sde_schema() -> Schema {
    method("SamplerDPMPP_2M_SDE", "DPM-Solver++(2M) SDE.")
        .input(Input::combo("solver_type", &["midpoint", "heun"]).bare())
        .input(exact("eta", 1.0))
        .input(exact("s_noise", 1.0))
        .input(noise_device())
        .output("SAMPLER")
}

fn dpmpp_2m_sde(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let solver = match inputs.string("solver_type")? {
        "midpoint" => SolverType::Midpoint,
        "heun" => SolverType::Heun,
        other => return Err(unknown("solver_type", other)),
    };
    sde_sampler(inputs, Algorithm::Dpmpp2mSde { noise: stochastic(inputs)?, solver })
}

fn dpmpp_sde_schema() -> Schema {
    method("SamplerDPMPP_SDE", "DPM-Solver++ SDE.")
        .input(exact("eta", 1.0))
        .input(exact("s_noise", 1.0))
        .input(exact("r", 0.5))
        .input(noise_device())
        .output("SAMPLER")
}

fn dpmpp_sde(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    sde_sampler(inputs, Algorithm::DpmppSde { noise: stochastic(inputs)?, r: inputs.float("r")? })
}

fn dpmpp_2s_schema() -> Schema {
    method("SamplerDPMPP_2S_Ancestral", "DPM-Solver++(2S), ancestral.")
        .input(exact("eta", 1.0))
        .input(exact("s_noise", 1.0))
        .output("SAMPLER")
}

fn dpmpp_2s(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    sampler(Algorithm::Dpmpp2s(stochastic(inputs)?))
}

fn euler_ancestral_schema() -> Schema {
    method("SamplerEulerAncestral", "Euler, ancestral.")
        .input(exact("eta", 1.0))
        .input(exact("s_noise", 1.0))
        .output("SAMPLER")
}

fn euler_ancestral(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    sampler(Algorithm::Euler(stochastic(inputs)?))
}

fn euler_ancestral_cfg_pp_schema() -> Schema {
    method("SamplerEulerAncestralCFGPP", "Euler, ancestral, in CFG++ form.")
        .display("SamplerEulerAncestralCFG++")
        .input(exact("eta", 1.0).opt("max", 1.0))
        .input(exact("s_noise", 1.0).opt("max", 10.0))
        .output("SAMPLER")
}

fn euler_ancestral_cfg_pp(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    sampler(Algorithm::EulerCfgPp(stochastic(inputs)?))
}

fn lms_schema() -> Schema {
    method("SamplerLMS", "Linear multistep.").input(Input::int("order", 4, 1, 100)).output("SAMPLER")
}

fn lms(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    sampler(Algorithm::Lms { order: inputs.size("order")? })
}

fn dpm_adaptive_schema() -> Schema {
    method("SamplerDPMAdaptative", "DPM-Solver with a step size from error control.")
        .input(Input::int("order", 3, 2, 3))
        .input(exact("rtol", 0.05))
        .input(exact("atol", 0.0078))
        .input(exact("h_init", 0.05))
        .input(exact("pcoeff", 0.0))
        .input(exact("icoeff", 1.0))
        .input(exact("dcoeff", 0.0))
        .input(exact("accept_safety", 0.81))
        .input(exact("eta", 0.0))
        .input(exact("s_noise", 1.0))
        .output("SAMPLER")
}

fn dpm_adaptive(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    sampler(Algorithm::DpmAdaptive(AdaptiveOptions {
        order: inputs.size("order")?,
        rtol: inputs.float("rtol")?,
        atol: inputs.float("atol")?,
        h_init: inputs.float("h_init")?,
        pcoeff: inputs.float("pcoeff")?,
        icoeff: inputs.float("icoeff")?,
        dcoeff: inputs.float("dcoeff")?,
        accept_safety: inputs.float("accept_safety")?,
        eta: inputs.float("eta")?,
        s_noise: inputs.float("s_noise")?,
    }))
}

const ER_SDE_TYPES: [&str; 3] = ["ER-SDE", "Reverse-time SDE", "ODE"];

fn er_sde_schema() -> Schema {
    method("SamplerER_SDE", "Extended reverse-time SDE solver.")
        .input(Input::combo("solver_type", &ER_SDE_TYPES).opt("options", Vec::<String>::new()))
        .input(Input::int("max_stage", 3, 1, 3))
        .input(exact("eta", 1.0))
        .input(exact("s_noise", 1.0))
        .output("SAMPLER")
}

fn er_sde(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let noise = stochastic(inputs)?;
    let (scaler, s_noise) = match inputs.string("solver_type")? {
        "ER-SDE" => (NoiseScaler::Extended, noise.s_noise),
        "Reverse-time SDE" if noise.eta > 0.0 => (NoiseScaler::Power(noise.eta), noise.s_noise),
        "Reverse-time SDE" | "ODE" => (NoiseScaler::Power(0.0), 0.0),
        other => return Err(unknown("solver_type", other)),
    };
    sampler(Algorithm::ErSde(ErSdeOptions { scaler, max_stage: inputs.size("max_stage")?, s_noise }))
}

fn sa_solver_schema() -> Schema {
    let share = |name, default| Input::float(name, default, 0.0, 1.0).opt("step", 0.001);
    method("SamplerSASolver", "Stochastic Adams predictor-corrector.")
        .input(Input::link("model", "MODEL"))
        .input(exact("eta", 1.0).opt("max", 10.0))
        .input(share("sde_start_percent", 0.2))
        .input(share("sde_end_percent", 0.8))
        .input(exact("s_noise", 1.0))
        .input(Input::int("predictor_order", 3, 1, 6))
        .input(Input::int("corrector_order", 4, 0, 6))
        .input(Input::boolean("use_pece"))
        .input(Input::boolean("simple_order_2"))
        .output("SAMPLER")
}

fn sa_solver(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let model = inputs.object::<ModelHandle>("model")?;
    let sigma = |name| inputs.float(name).map(|percent| model.0.sampling().percent_to_sigma(percent));
    sampler(Algorithm::SaSolver(SaSolverOptions {
        eta: inputs.float("eta")?,
        range: Some((sigma("sde_start_percent")?, sigma("sde_end_percent")?)),
        s_noise: inputs.float("s_noise")?,
        predictor_order: inputs.size("predictor_order")?,
        corrector_order: inputs.size("corrector_order")?,
        use_pece: inputs.boolean("use_pece")?,
        simple_order_2: inputs.boolean("simple_order_2")?,
    }))
}

fn euler_cfg_pp_schema() -> Schema {
    let schema = Schema::new("SamplerEulerCFGpp", "_for_testing")
        .display("SamplerEulerCFG++")
        .module(ADVANCED)
        .describe("Euler in one of two CFG++ forms.")
        .input(Input::combo("version", &["regular", "alternative"]).opt("multiselect", false))
        .output("SAMPLER");
    newer(schema, true)
}

fn euler_cfg_pp(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    sampler(match inputs.string("version")? {
        "alternative" => Algorithm::EulerCfgPpAlternative,
        _ => Algorithm::EulerCfgPp(Stochastic::NONE),
    })
}

const UPSCALE_METHODS: [&str; 5] = ["bislerp", "nearest-exact", "bilinear", "area", "bicubic"];

fn lcm_upscale_schema() -> Schema {
    let schema = Schema::new("SamplerLCMUpscale", CATEGORY)
        .module(ADVANCED)
        .describe("LCM that enlarges the latent on the way.")
        .input(Input::float("scale_ratio", 1.0, 0.1, 20.0).opt("step", 0.01))
        .input(Input::int("scale_steps", -1, -1, 1000).opt("step", 1))
        .input(Input::combo("upscale_method", &UPSCALE_METHODS).opt("multiselect", false))
        .output("SAMPLER");
    newer_unnamed(schema, false)
}

fn lcm_upscale(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let name = inputs.string("upscale_method")?;
    let method = Method::from_name(name).ok_or_else(|| unknown("upscale_method", name))?;
    let resizer = Resizer(Arc::new(move |x, height, width| {
        upscale(x, Resize::to(width, height, method)).map_err(DiffusionError::model)
    }));
    let steps = usize::try_from(inputs.int("scale_steps")?).ok();
    let scale = inputs.float("scale_ratio")?;
    sampler(Algorithm::LcmUpscale(LcmUpscaleOptions {
        scale,
        steps,
        resizer,
        is_channels_last: method == Method::Bislerp,
    }))
}
