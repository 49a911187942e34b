//! Sampling from parts: noise, guider, sampler and sigmas objects.

mod samplers;
mod schedulers;

use super::pure::PureNode;
use super::sampling::{Job, cfg_guider, cfg_input, run, seed_input};
use super::shapes::newer_unnamed;
use super::{Inputs, Node, NodeCtx, NodeError, NodeOutput, Schema, Value};
use crate::diffusion::sample::{NoiseSource, Sampled, Sigmas};
use crate::diffusion::samplers::Sampler;
use crate::diffusion::{Conditioning, Guidance, Guider, Latent, ModelHandle};
use crate::graph::Input;

/// The custom sampling nodes.
pub(super) fn nodes() -> Vec<Box<dyn Node>> {
    let mut nodes: Vec<Box<dyn Node>> = vec![
        Box::new(SamplerCustom),
        Box::new(SamplerCustomAdvanced),
        PureNode::boxed(random_noise_schema, random_noise),
        PureNode::boxed(disable_noise_schema, |_| Ok(vec![Value::object("NOISE", NoiseSource::Zero)])),
        PureNode::boxed(add_noise_schema, add_noise),
        PureNode::boxed(basic_guider_schema, basic_guider),
        PureNode::boxed(cfg_guider_schema, cfg_guider_node),
        PureNode::boxed(dual_cfg_guider_schema, dual_cfg_guider),
        PureNode::boxed(perp_neg_guider_schema, perp_neg_guider),
    ];
    nodes.extend(schedulers::nodes());
    nodes.extend(samplers::nodes());
    nodes
}

const MODULE: &str = "comfy_extras.nodes_custom_sampler";
const CATEGORY: &str = "sampling/custom_sampling";
const NOISE: &str = "sampling/custom_sampling/noise";
const GUIDERS: &str = "sampling/custom_sampling/guiders";

fn bare(name: &'static str, type_name: &'static str) -> Input {
    Input::link(name, type_name).bare()
}

/// The two outputs of SamplerCustom: the latent, and the last denoised prediction.
fn outputs(latent: &Latent, sampled: Sampled) -> NodeOutput {
    let denoised = sampled.denoised.unwrap_or_else(|| sampled.samples.clone());
    let value = |samples| Value::object("LATENT", latent.with_samples(samples));
    NodeOutput::many(vec![value(sampled.samples), value(denoised)])
}

/// `SamplerCustom`.
pub struct SamplerCustom;

impl Node for SamplerCustom {
    fn schema(&self) -> Schema {
        Schema::new("SamplerCustom", CATEGORY)
            .module(MODULE)
            .describe("Samples with a sampler and sigmas of your choice.")
            .input(bare("model", "MODEL"))
            .input(Input::boolean("add_noise").opt("default", true))
            .input(seed_input("noise_seed"))
            .input(cfg_input("cfg"))
            .input(bare("positive", "CONDITIONING"))
            .input(bare("negative", "CONDITIONING"))
            .input(bare("sampler", "SAMPLER"))
            .input(bare("sigmas", "SIGMAS"))
            .input(bare("latent_image", "LATENT"))
            .named_output("LATENT", "output")
            .named_output("LATENT", "denoised_output")
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let model = (*inputs.object::<ModelHandle>("model")?).clone();
        let latent = model.fit_empty_latent(&*inputs.object::<Latent>("latent_image")?);
        let seed = inputs.seed("noise_seed")?;
        let sampler = inputs.object::<Sampler>("sampler")?;
        let sigmas = inputs.object::<Sigmas>("sigmas")?;
        let job = Job {
            guider: &cfg_guider(inputs, model)?,
            sampler: &sampler,
            sigmas: &sigmas.0,
            noise: if inputs.boolean("add_noise")? { NoiseSource::Seeded(seed) } else { NoiseSource::Zero },
            seed,
            latent: &latent,
        };
        Ok(outputs(&latent, run(ctx, &job)?))
    }
}

/// `SamplerCustomAdvanced`.
pub struct SamplerCustomAdvanced;

impl Node for SamplerCustomAdvanced {
    fn schema(&self) -> Schema {
        Schema::new("SamplerCustomAdvanced", CATEGORY)
            .module(MODULE)
            .describe("Samples with noise, guider, sampler and sigmas of your choice.")
            .input(bare("noise", "NOISE"))
            .input(bare("guider", "GUIDER"))
            .input(bare("sampler", "SAMPLER"))
            .input(bare("sigmas", "SIGMAS"))
            .input(bare("latent_image", "LATENT"))
            .named_output("LATENT", "output")
            .named_output("LATENT", "denoised_output")
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let guider = inputs.object::<Guider>("guider")?;
        let noise = *inputs.object::<NoiseSource>("noise")?;
        let sampler = inputs.object::<Sampler>("sampler")?;
        let sigmas = inputs.object::<Sigmas>("sigmas")?;
        let latent = guider.model.fit_empty_latent(&*inputs.object::<Latent>("latent_image")?);
        let job = Job {
            guider: &guider,
            sampler: &sampler,
            sigmas: &sigmas.0,
            noise,
            seed: noise.seed(),
            latent: &latent,
        };
        Ok(outputs(&latent, run(ctx, &job)?))
    }
}

fn random_noise_schema() -> Schema {
    Schema::new("RandomNoise", NOISE)
        .module(MODULE)
        .describe("Gaussian noise from a seed.")
        .input(seed_input("noise_seed"))
        .output("NOISE")
}

fn random_noise(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    Ok(vec![Value::object("NOISE", NoiseSource::Seeded(inputs.seed("noise_seed")?))])
}

fn disable_noise_schema() -> Schema {
    Schema::new("DisableNoise", NOISE).module(MODULE).describe("No noise.").output("NOISE")
}

fn add_noise_schema() -> Schema {
    Schema::new("AddNoise", "_for_testing/custom_sampling/noise")
        .module(MODULE)
        .describe("Adds noise to a latent, scaled to the span of the sigmas.")
        .input(bare("model", "MODEL"))
        .input(bare("noise", "NOISE"))
        .input(bare("sigmas", "SIGMAS"))
        .input(bare("latent_image", "LATENT"))
        .output("LATENT")
}

fn add_noise(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let latent = inputs.object::<Latent>("latent_image")?;
    let sigmas = inputs.object::<Sigmas>("sigmas")?;
    let scale = match sigmas.0.as_slice() {
        [] => return Ok(vec![Value::shared("LATENT", latent)]),
        [only] => *only,
        [first, .., last] => (first - last).abs(),
    };
    let model = inputs.object::<ModelHandle>("model")?;
    let noise = inputs.object::<NoiseSource>("noise")?.generate(&latent);
    if noise.shape() != latent.samples.shape() {
        let what = format!("makes noise of shape {:?} for {:?}", noise.shape(), latent.samples.shape());
        return Err(NodeError::input("noise", &what));
    }
    let samples = &latent.samples;
    let original = if samples.is_zero() { samples.clone() } else { model.latent_in(samples) };
    let noisy = model.0.sampling().noise_scaling(scale, &noise, &original, false);
    let out = model.latent_out(&noisy).map(|v| if v.is_finite() { v } else { 0.0 });
    Ok(vec![Value::object("LATENT", latent.with_samples(out))])
}

fn basic_guider_schema() -> Schema {
    Schema::new("BasicGuider", GUIDERS)
        .module(MODULE)
        .describe("Denoises towards one prompt, without a negative one.")
        .input(bare("model", "MODEL"))
        .input(bare("conditioning", "CONDITIONING"))
        .output("GUIDER")
}

fn guider(inputs: &Inputs, guidance: Guidance) -> Result<Vec<Value>, NodeError> {
    let model = (*inputs.object::<ModelHandle>("model")?).clone();
    Ok(vec![Value::object("GUIDER", Guider { model, guidance })])
}

fn basic_guider(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    guider(inputs, Guidance::Basic { positive: inputs.object::<Conditioning>("conditioning")? })
}

fn cfg_guider_schema() -> Schema {
    Schema::new("CFGGuider", GUIDERS)
        .module(MODULE)
        .describe("Classifier-free guidance with a positive and a negative prompt.")
        .input(bare("model", "MODEL"))
        .input(bare("positive", "CONDITIONING"))
        .input(bare("negative", "CONDITIONING"))
        .input(cfg_input("cfg"))
        .output("GUIDER")
}

fn cfg_guider_node(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let model = (*inputs.object::<ModelHandle>("model")?).clone();
    Ok(vec![Value::object("GUIDER", cfg_guider(inputs, model)?)])
}

fn dual_cfg_guider_schema() -> Schema {
    Schema::new("DualCFGGuider", GUIDERS)
        .module(MODULE)
        .describe("Guidance from a negative prompt to a second one, and from that to a first one.")
        .input(bare("model", "MODEL"))
        .input(bare("cond1", "CONDITIONING"))
        .input(bare("cond2", "CONDITIONING"))
        .input(bare("negative", "CONDITIONING"))
        .input(cfg_input("cfg_conds"))
        .input(cfg_input("cfg_cond2_negative"))
        .input(Input::combo("style", &["regular", "nested"]).bare())
        .output("GUIDER")
}

fn dual_cfg_guider(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let guidance = Guidance::Dual {
        positive: inputs.object::<Conditioning>("cond1")?,
        middle: inputs.object::<Conditioning>("cond2")?,
        negative: inputs.object::<Conditioning>("negative")?,
        scale_positive: inputs.float("cfg_conds")?,
        scale_negative: inputs.float("cfg_cond2_negative")?,
        is_nested: inputs.string("style")? == "nested",
    };
    guider(inputs, guidance)
}

fn perp_neg_guider_schema() -> Schema {
    let schema = Schema::new("PerpNegGuider", "_for_testing")
        .module("comfy_extras.nodes_perpneg")
        .describe("The negative prompt counts only as far as it is perpendicular to the positive one.")
        .input(Input::link("model", "MODEL"))
        .input(Input::link("positive", "CONDITIONING"))
        .input(Input::link("negative", "CONDITIONING"))
        .input(Input::link("empty_conditioning", "CONDITIONING"))
        .input(cfg_input("cfg"))
        .input(Input::float("neg_scale", 1.0, 0.0, 100.0).opt("step", 0.01))
        .output("GUIDER");
    newer_unnamed(schema, true)
}

fn perp_neg_guider(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let guidance = Guidance::PerpNeg {
        positive: inputs.object::<Conditioning>("positive")?,
        negative: inputs.object::<Conditioning>("negative")?,
        empty: inputs.object::<Conditioning>("empty_conditioning")?,
        scale: inputs.float("cfg")?,
        negative_scale: inputs.float("neg_scale")?,
    };
    guider(inputs, guidance)
}
