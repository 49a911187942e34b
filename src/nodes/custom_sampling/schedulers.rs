//! Sigmas: schedules from models, from numbers and from tables, and their editing.

use super::super::pure::PureNode;
use super::super::sampling::steps_input;
use super::super::shapes::{newer_unnamed, unknown};
use super::super::{Inputs, Node, NodeError, Schema, Value};
use super::{MODULE, bare};
use crate::diffusion::ModelHandle;
use crate::diffusion::sample::Sigmas;
use crate::diffusion::schedule::{
    AlignYourSteps, SCHEDULERS, Spacing, align_your_steps_sigmas, basic_scheduler, beta_sigmas,
    exponential_sigmas, extend_intermediate_sigmas, flip_sigmas, gits_sigmas, karras_sigmas, laplace_sigmas,
    optimal_sigmas, polyexponential_sigmas, sd_turbo_sigmas, set_first_sigma, split_sigmas,
    split_sigmas_denoise, vp_sigmas,
};
use crate::graph::Input;

const SCHEDULES: &str = "sampling/custom_sampling/schedulers";
const EDITING: &str = "sampling/custom_sampling/sigmas";

/// The schedulers and the nodes that edit sigmas.
pub(super) fn nodes() -> Vec<Box<dyn Node>> {
    vec![
        PureNode::boxed(basic_schema, basic),
        PureNode::boxed(karras_schema, karras),
        PureNode::boxed(exponential_schema, exponential),
        PureNode::boxed(polyexponential_schema, polyexponential),
        PureNode::boxed(laplace_schema, laplace),
        PureNode::boxed(vp_schema, vp),
        PureNode::boxed(beta_schema, beta),
        PureNode::boxed(sd_turbo_schema, sd_turbo),
        PureNode::boxed(align_your_steps_schema, align_your_steps),
        PureNode::boxed(gits_schema, gits),
        PureNode::boxed(optimal_schema, optimal),
        PureNode::boxed(split_schema, split),
        PureNode::boxed(split_denoise_schema, split_denoise),
        PureNode::boxed(flip_schema, flip),
        PureNode::boxed(set_first_schema, set_first),
        PureNode::boxed(extend_schema, extend),
        PureNode::boxed(percent_schema, percent_to_sigma),
    ]
}

fn sigmas(values: Vec<f32>) -> Result<Vec<Value>, NodeError> {
    Ok(vec![Value::object("SIGMAS", Sigmas(values))])
}

fn two(halves: (Vec<f32>, Vec<f32>)) -> Result<Vec<Value>, NodeError> {
    let value = |v| Value::object("SIGMAS", Sigmas(v));
    Ok(vec![value(halves.0), value(halves.1)])
}

fn given(inputs: &Inputs) -> Result<std::sync::Arc<Sigmas>, NodeError> {
    inputs.object::<Sigmas>("sigmas")
}

/// A number that clients must not round.
fn exact(name: &'static str, default: f64, max: f64) -> Input {
    Input::float(name, default, 0.0, max).opt("step", 0.01).opt("round", false)
}

fn denoise() -> Input {
    Input::float("denoise", 1.0, 0.0, 1.0).opt("step", 0.01)
}

/// The inputs of the schedules from numbers: steps and both ends.
fn from_numbers(class: &'static str, text: &'static str) -> Schema {
    Schema::new(class, SCHEDULES)
        .module(MODULE)
        .describe(text)
        .input(steps_input(20))
        .input(exact("sigma_max", 14.614642, 5000.0))
        .input(exact("sigma_min", 0.0291675, 5000.0))
}

fn numbers(inputs: &Inputs) -> Result<(usize, f64, f64), NodeError> {
    Ok((inputs.size("steps")?, inputs.float("sigma_min")?, inputs.float("sigma_max")?))
}

fn basic_schema() -> Schema {
    Schema::new("BasicScheduler", SCHEDULES)
        .module(MODULE)
        .describe("The sigmas of a named scheduler for a model.")
        .input(bare("model", "MODEL"))
        .input(Input::combo("scheduler", SCHEDULERS).bare())
        .input(steps_input(20))
        .input(denoise())
        .output("SIGMAS")
}

fn basic(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let model = inputs.object::<ModelHandle>("model")?;
    let (name, steps) = (inputs.string("scheduler")?, inputs.size("steps")?);
    sigmas(basic_scheduler(model.0.sampling(), name, steps, inputs.float("denoise")?)?)
}

fn karras_schema() -> Schema {
    from_numbers("KarrasScheduler", "Karras' schedule between two sigmas.")
        .input(exact("rho", 7.0, 100.0))
        .output("SIGMAS")
}

fn karras(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let (steps, min, max) = numbers(inputs)?;
    sigmas(karras_sigmas(steps, min, max, inputs.float("rho")?))
}

fn exponential_schema() -> Schema {
    from_numbers("ExponentialScheduler", "Even steps in log sigma between two sigmas.").output("SIGMAS")
}

fn exponential(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let (steps, min, max) = numbers(inputs)?;
    sigmas(exponential_sigmas(steps, min, max))
}

fn polyexponential_schema() -> Schema {
    from_numbers("PolyexponentialScheduler", "Polynomial steps in log sigma between two sigmas.")
        .input(exact("rho", 1.0, 100.0))
        .output("SIGMAS")
}

fn polyexponential(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let (steps, min, max) = numbers(inputs)?;
    sigmas(polyexponential_sigmas(steps, min, max, inputs.float("rho")?))
}

fn laplace_schema() -> Schema {
    let coarse =
        |name, default, min| Input::float(name, default, min, 10.0).opt("step", 0.1).opt("round", false);
    from_numbers("LaplaceScheduler", "Quantiles of a Laplace distribution of log sigma.")
        .input(coarse("mu", 0.0, -10.0))
        .input(coarse("beta", 0.5, 0.0))
        .output("SIGMAS")
}

fn laplace(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let (steps, min, max) = numbers(inputs)?;
    sigmas(laplace_sigmas(steps, min, max, inputs.float("mu")?, inputs.float("beta")?))
}

fn vp_schema() -> Schema {
    Schema::new("VPScheduler", SCHEDULES)
        .module(MODULE)
        .describe("The schedule of a continuous variance-preserving process.")
        .input(steps_input(20))
        .input(exact("beta_d", 19.9, 5000.0))
        .input(exact("beta_min", 0.1, 5000.0))
        .input(exact("eps_s", 0.001, 1.0).opt("step", 0.0001))
        .output("SIGMAS")
}

fn vp(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let (beta_d, beta_min) = (inputs.float("beta_d")?, inputs.float("beta_min")?);
    sigmas(vp_sigmas(inputs.size("steps")?, beta_d, beta_min, inputs.float("eps_s")?))
}

fn beta_schema() -> Schema {
    Schema::new("BetaSamplingScheduler", SCHEDULES)
        .module(MODULE)
        .describe("Timesteps at quantiles of a beta distribution.")
        .input(bare("model", "MODEL"))
        .input(steps_input(20))
        .input(exact("alpha", 0.6, 50.0))
        .input(exact("beta", 0.6, 50.0))
        .output("SIGMAS")
}

fn beta(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let model = inputs.object::<ModelHandle>("model")?;
    let (alpha, beta) = (inputs.float("alpha")?, inputs.float("beta")?);
    sigmas(beta_sigmas(model.0.sampling(), inputs.size("steps")?, alpha, beta)?)
}

fn sd_turbo_schema() -> Schema {
    Schema::new("SDTurboScheduler", SCHEDULES)
        .module(MODULE)
        .describe("The timesteps of the turbo models.")
        .input(bare("model", "MODEL"))
        .input(Input::int("steps", 1, 1, 10))
        .input(denoise().opt("min", 0))
        .output("SIGMAS")
}

fn sd_turbo(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let model = inputs.object::<ModelHandle>("model")?;
    sigmas(sd_turbo_sigmas(model.0.sampling(), inputs.size("steps")?, inputs.float("denoise")?))
}

fn align_your_steps_schema() -> Schema {
    let schema = Schema::new("AlignYourStepsScheduler", SCHEDULES)
        .module("comfy_extras.nodes_align_your_steps")
        .describe("Tabulated schedules found by optimisation, for SD1, SDXL and SVD.")
        .input(Input::combo("model_type", &["SD1", "SDXL", "SVD"]).opt("multiselect", false))
        .input(steps_input(10))
        .input(denoise())
        .output("SIGMAS");
    newer_unnamed(schema, false)
}

fn align_your_steps(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let name = inputs.string("model_type")?;
    let kind = AlignYourSteps::from_name(name).ok_or_else(|| unknown("model_type", name))?;
    sigmas(align_your_steps_sigmas(kind, inputs.size("steps")?, inputs.float("denoise")?))
}

fn gits_schema() -> Schema {
    let schema = Schema::new("GITSScheduler", SCHEDULES)
        .module("comfy_extras.nodes_gits")
        .describe("Tabulated schedules from the geometry of sampling paths.")
        .input(Input::float("coeff", 1.2, 0.8, 1.5).opt("step", 0.05))
        .input(Input::int("steps", 10, 2, 1000))
        .input(denoise())
        .output("SIGMAS");
    newer_unnamed(schema, false)
}

fn gits(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let (coeff, steps) = (inputs.float("coeff")?, inputs.size("steps")?);
    let values = gits_sigmas(coeff, steps, inputs.float("denoise")?).ok_or_else(|| {
        let what = format!("has no table for {coeff} and {steps} steps: use 0.80 to 1.50 in steps of 0.05");
        NodeError::input("coeff", &what)
    })?;
    sigmas(values)
}

fn optimal_schema() -> Schema {
    let schema = Schema::new("OptimalStepsScheduler", SCHEDULES)
        .module("comfy_extras.nodes_optimalsteps")
        .describe("Tabulated schedules for flow models.")
        .input(Input::combo("model_type", &["FLUX", "Wan", "Chroma"]).opt("multiselect", false))
        .input(Input::int("steps", 20, 3, 1000))
        .input(denoise())
        .output("SIGMAS");
    newer_unnamed(schema, false)
}

fn optimal(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let name = inputs.string("model_type")?;
    let values = optimal_sigmas(name, inputs.size("steps")?, inputs.float("denoise")?);
    sigmas(values.ok_or_else(|| unknown("model_type", name))?)
}

fn editing(class: &'static str, text: &'static str) -> Schema {
    Schema::new(class, EDITING).module(MODULE).describe(text).input(bare("sigmas", "SIGMAS"))
}

fn split_schema() -> Schema {
    editing("SplitSigmas", "Cuts sigmas before a step; both parts hold the sigma at the cut.")
        .input(Input::int("step", 0, 0, 10_000))
        .named_output("SIGMAS", "high_sigmas")
        .named_output("SIGMAS", "low_sigmas")
}

fn split(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    two(split_sigmas(&given(inputs)?.0, inputs.size("step")?))
}

fn split_denoise_schema() -> Schema {
    editing("SplitSigmasDenoise", "Cuts sigmas so that the second part holds a share of the steps.")
        .input(denoise())
        .named_output("SIGMAS", "high_sigmas")
        .named_output("SIGMAS", "low_sigmas")
}

fn split_denoise(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    two(split_sigmas_denoise(&given(inputs)?.0, inputs.float("denoise")?))
}

fn flip_schema() -> Schema {
    editing("FlipSigmas", "Reverses sigmas, to turn a picture back into noise.").output("SIGMAS")
}

fn flip(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    sigmas(flip_sigmas(&given(inputs)?.0))
}

fn set_first_schema() -> Schema {
    editing("SetFirstSigma", "Replaces the first sigma.")
        .input(exact("sigma", 136.0, 20_000.0).opt("step", 0.001))
        .output("SIGMAS")
}

fn set_first(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    sigmas(set_first_sigma(&given(inputs)?.0, inputs.float("sigma")? as f32))
}

fn extend_schema() -> Schema {
    editing("ExtendIntermediateSigmas", "Divides the steps in a range of sigmas into smaller ones.")
        .input(Input::int("steps", 2, 1, 100))
        .input(exact("start_at_sigma", -1.0, 20_000.0).opt("min", -1.0))
        .input(exact("end_at_sigma", 12.0, 20_000.0))
        .input(Input::combo("spacing", &["linear", "cosine", "sine"]).bare())
        .output("SIGMAS")
}

fn extend(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let name = inputs.string("spacing")?;
    let spacing = Spacing::from_name(name).ok_or_else(|| unknown("spacing", name))?;
    let (start, end) = (inputs.float("start_at_sigma")? as f32, inputs.float("end_at_sigma")? as f32);
    sigmas(extend_intermediate_sigmas(&given(inputs)?.0, inputs.size("steps")?, start, end, spacing))
}

fn percent_schema() -> Schema {
    Schema::new("SamplingPercentToSigma", EDITING)
        .module(MODULE)
        .describe("The sigma at a share of the sampling.")
        .input(Input::link("model", "MODEL"))
        .input(Input::float("sampling_percent", 0.0, 0.0, 1.0).opt("step", 0.0001))
        .input(Input::boolean("return_actual_sigma").opt("default", false))
        .named_output("FLOAT", "sigma_value")
}

fn percent_to_sigma(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let model = inputs.object::<ModelHandle>("model")?;
    let percent = inputs.float("sampling_percent")?;
    let sampling = model.0.sampling();
    let sigma = if inputs.boolean("return_actual_sigma")? {
        sampling.percent_to_actual_sigma(percent)
    } else {
        sampling.percent_to_sigma(percent)
    };
    Ok(vec![Value::Json(sigma.into())])
}
