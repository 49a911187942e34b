//! KSampler and KSamplerAdvanced, and the bridge from the sampling loop to a
//! node's progress.

use std::sync::Arc;

use super::tiny_vae;
use super::{Inputs, Node, NodeCtx, NodeError, NodeOutput, PreviewFrame, PreviewMethod, Schema, Value};
use crate::diffusion::sample::{NoiseSource, Observer, SampleRequest, Sampled, Step, sample, schedule_range};
use crate::diffusion::samplers::{SAMPLERS, Sampler};
use crate::diffusion::schedule::{SCHEDULERS, ScheduleError, ksampler_sigmas};
use crate::diffusion::{Conditioning, DiffusionError, Field, Guidance, Guider, Latent, ModelHandle};
use crate::graph::Input;
use crate::models::ModelError;
use crate::models::taesd::{self, Tiny};
use crate::tensor::{HostTensor, TensorError};

/// The KSampler nodes.
pub(super) fn nodes() -> Vec<Box<dyn Node>> {
    vec![Box::new(KSampler), Box::new(KSamplerAdvanced)]
}

impl From<DiffusionError> for NodeError {
    fn from(error: DiffusionError) -> Self {
        match error {
            DiffusionError::Interrupted => NodeError::Interrupted,
            DiffusionError::Model(source) => match source.downcast::<ModelError>() {
                Ok(error) => NodeError::from(*error),
                Err(source) => match source.downcast::<TensorError>() {
                    Ok(error) => NodeError::from(ModelError::from(*error)),
                    Err(source) => NodeError::failed("ModelError", DiffusionError::Model(source)),
                },
            },
            DiffusionError::Sampler { .. } | DiffusionError::Empty { .. } => {
                NodeError::failed("ValueError", error)
            }
            _ => NodeError::failed("RuntimeError", error),
        }
    }
}

impl From<ScheduleError> for NodeError {
    fn from(error: ScheduleError) -> Self {
        NodeError::failed("ValueError", error)
    }
}

/// Largest preview side, in pixels.
const PREVIEW_SIZE: u32 = 512;

/// Sends steps to a node's progress and stops the run when the user asks for it.
struct NodeObserver<'a, 'b> {
    ctx: &'a NodeCtx<'b>,
    model: &'a ModelHandle,
    decoder: Option<Arc<Tiny>>,
}

impl<'a, 'b> NodeObserver<'a, 'b> {
    fn new(ctx: &'a NodeCtx<'b>, model: &'a ModelHandle) -> Self {
        let name = model.0.preview_decoder().filter(|_| ctx.services.preview == PreviewMethod::Taesd);
        let decoder = name.and_then(|name| tiny_vae::preview_decoder(ctx.services, name));
        Self { ctx, model, decoder }
    }

    /// A picture of the first sample of a prediction.
    fn preview(&self, denoised: &Field) -> Result<Option<HostTensor>, DiffusionError> {
        if self.ctx.services.preview == PreviewMethod::None {
            return Ok(None);
        }
        let denoised = &*denoised.to_host()?;
        let tiny = |decoder: &Arc<Tiny>| {
            let picture = taesd::decode(decoder, &denoised.rows(0, 1));
            picture.inspect_err(|e| tracing::warn!("no preview by TAESD: {e}")).ok()
        };
        Ok(match self.decoder.as_ref().and_then(tiny) {
            Some(picture) => Some(channels_last(&picture)),
            None => self.model.0.preview_factors().map(|map| map.picture(denoised)),
        })
    }
}

/// `[1, C, H, W]` to `[1, H, W, C]`, limited to 0..1.
fn channels_last(x: &HostTensor) -> HostTensor {
    let (c, h, w) = (x.dim(1), x.dim(2), x.dim(3));
    HostTensor::from_fn(&[1, h, w, c], |i| x.data()[i % c * h * w + i / c].clamp(0.0, 1.0))
}

impl Observer for NodeObserver<'_, '_> {
    fn step(&mut self, step: &Step<'_>) -> Result<(), DiffusionError> {
        let picture = self.preview(step.denoised)?;
        let preview = picture.map(|image| PreviewFrame { image, max_size: PREVIEW_SIZE });
        self.ctx
            .progress(step.step as u64 + 1, step.total as u64, preview)
            .map_err(|_| DiffusionError::Interrupted)
    }

    fn before_model_call(&mut self) -> Result<(), DiffusionError> {
        self.ctx.check_interrupt().map_err(|_| DiffusionError::Interrupted)
    }
}

/// What a sampling node was asked for.
pub(super) struct Job<'a> {
    /// Model and guidance.
    pub guider: &'a Guider,
    /// The sampler.
    pub sampler: &'a Sampler,
    /// Sigmas to visit.
    pub sigmas: &'a [f32],
    /// Initial noise.
    pub noise: NoiseSource,
    /// Seed of noise drawn on the way.
    pub seed: u64,
    /// Where to start.
    pub latent: &'a Latent,
}

/// Runs a sampler for a node. The latent must already fit the model's channels.
pub(super) fn run(ctx: &NodeCtx<'_>, job: &Job<'_>) -> Result<Sampled, NodeError> {
    let noise = job.noise.generate(job.latent);
    let request = SampleRequest {
        guider: job.guider,
        sampler: job.sampler,
        sigmas: job.sigmas,
        noise: &noise,
        latent: &job.latent.samples,
        mask: job.latent.noise_mask.as_ref(),
        seed: job.seed,
    };
    let mut observer = NodeObserver::new(ctx, &job.guider.model);
    Ok(sample(&request, &mut observer)?)
}

/// The sampler of that name.
pub(super) fn sampler_named(name: &str) -> Result<Sampler, NodeError> {
    Sampler::by_name(name)
        .ok_or_else(|| NodeError::input("sampler_name", &format!("names no sampler: {name}")))
}

/// Guidance from the inputs `positive`, `negative` and `cfg` for `model`.
pub(super) fn cfg_guider(inputs: &Inputs, model: ModelHandle) -> Result<Guider, NodeError> {
    let guidance = Guidance::Cfg {
        positive: inputs.object::<Conditioning>("positive")?,
        negative: inputs.object::<Conditioning>("negative")?,
        scale: inputs.float("cfg")?,
    };
    Ok(Guider { model, guidance })
}

/// The input `cfg`.
pub(super) fn cfg_input(name: &'static str) -> Input {
    Input::float(name, 8.0, 0.0, 100.0).opt("step", 0.1).opt("round", 0.01)
}

/// A seed input.
pub(super) fn seed_input(name: &'static str) -> Input {
    Input::int(name, 0, 0, u64::MAX).opt("control_after_generate", true)
}

/// The input `steps`.
pub(super) fn steps_input(default: i64) -> Input {
    Input::int("steps", default, 1, 10_000)
}

/// The inputs shared by both KSamplers, run over a part of the schedule.
fn ksample(ctx: &NodeCtx<'_>, inputs: &Inputs, range: &Range) -> Result<NodeOutput, NodeError> {
    let model = (*inputs.object::<ModelHandle>("model")?).clone();
    let name = inputs.string("sampler_name")?;
    let latent = model.fit_empty_latent(&*inputs.object::<Latent>("latent_image")?);
    let (scheduler, steps) = (inputs.string("scheduler")?, inputs.size("steps")?);
    let sigmas = ksampler_sigmas(model.0.sampling(), name, scheduler, steps, range.denoise)?;
    let sigmas = schedule_range(&sigmas, range.start, range.end, range.is_fully_denoised);
    let Some(sigmas) = sigmas else {
        return Ok(NodeOutput::one(Value::object("LATENT", latent)));
    };
    let job = Job {
        guider: &cfg_guider(inputs, model)?,
        sampler: &sampler_named(name)?,
        sigmas: &sigmas,
        noise: if range.adds_noise { NoiseSource::Seeded(range.seed) } else { NoiseSource::Zero },
        seed: range.seed,
        latent: &latent,
    };
    let samples = run(ctx, &job)?.samples;
    Ok(NodeOutput::one(Value::object("LATENT", latent.with_samples(samples))))
}

/// What KSampler and KSamplerAdvanced differ in.
struct Range {
    seed: u64,
    denoise: f64,
    start: usize,
    end: usize,
    adds_noise: bool,
    is_fully_denoised: bool,
}

/// `KSampler`.
pub struct KSampler;

impl Node for KSampler {
    fn schema(&self) -> Schema {
        Schema::new("KSampler", "sampling")
            .describe("Denoises a latent with a model and two prompts.")
            .input(Input::link("model", "MODEL"))
            .input(seed_input("seed"))
            .input(steps_input(20))
            .input(cfg_input("cfg"))
            .input(Input::combo("sampler_name", SAMPLERS))
            .input(Input::combo("scheduler", SCHEDULERS))
            .input(Input::link("positive", "CONDITIONING"))
            .input(Input::link("negative", "CONDITIONING"))
            .input(Input::link("latent_image", "LATENT"))
            .input(Input::float("denoise", 1.0, 0.0, 1.0).opt("step", 0.01))
            .output("LATENT")
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let range = Range {
            seed: inputs.seed("seed")?,
            denoise: inputs.float("denoise")?,
            start: 0,
            end: usize::MAX,
            adds_noise: true,
            is_fully_denoised: false,
        };
        ksample(ctx, inputs, &range)
    }
}

/// `KSamplerAdvanced`.
pub struct KSamplerAdvanced;

impl Node for KSamplerAdvanced {
    fn schema(&self) -> Schema {
        Schema::new("KSamplerAdvanced", "sampling")
            .display("KSampler (Advanced)")
            .describe("KSampler for a part of the steps, with noise added or left over as needed.")
            .input(Input::link("model", "MODEL").bare())
            .input(Input::combo("add_noise", &["enable", "disable"]).bare())
            .input(seed_input("noise_seed"))
            .input(steps_input(20))
            .input(cfg_input("cfg"))
            .input(Input::combo("sampler_name", SAMPLERS).bare())
            .input(Input::combo("scheduler", SCHEDULERS).bare())
            .input(Input::link("positive", "CONDITIONING").bare())
            .input(Input::link("negative", "CONDITIONING").bare())
            .input(Input::link("latent_image", "LATENT").bare())
            .input(Input::int("start_at_step", 0, 0, 10_000))
            .input(Input::int("end_at_step", 10_000, 0, 10_000))
            .input(Input::combo("return_with_leftover_noise", &["disable", "enable"]).bare())
            .output("LATENT")
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let range = Range {
            seed: inputs.seed("noise_seed")?,
            denoise: 1.0,
            start: inputs.size("start_at_step")?,
            end: inputs.size("end_at_step")?,
            adds_noise: inputs.string("add_noise")? != "disable",
            is_fully_denoised: inputs.string("return_with_leftover_noise")? != "enable",
        };
        ksample(ctx, inputs, &range)
    }
}
