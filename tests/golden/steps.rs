//! Cases of `dpm_adaptive` that leave the recorded path, looked at step by step.
//!
//! A discrete model is told the timestep nearest to sigma. Step-size control
//! derives every sigma from the network's outputs before it, so the last bits of
//! those decide on which side of the middle between two timesteps a sigma falls
//! that lies on it. The reference decides by its own last bits, which change with
//! its thread count: either side is its answer. Such a case must agree with the
//! recorded side, under the same tolerance, and all of this is checked:
//!
//! * up to one step the recorded latents are met as closely as those of samplers
//!   without control ([`ON_PATH`]);
//! * in that step or the one before, which chose its length, exactly one model call
//!   was made at a sigma within [`EDGE`] of the middle between two timesteps;
//! * with the other timestep told in that one call and nothing else changed, every
//!   step is on the recorded path to the end, which is a tenth of the tolerance.
//!
//! So a wrong coefficient, error norm or controller is not excused: it shows at
//! every step, and telling one timestep differently doesn't undo it.

use std::any::Any;
use std::sync::{Arc, Mutex};

use kiln::diffusion::noise::prepare_noise;
use kiln::diffusion::sample::{Observer, SampleRequest, Step, sample};
use kiln::diffusion::samplers::Sampler;
use kiln::diffusion::schedule::{ModelSampling, ksampler_sigmas};
use kiln::diffusion::{
    Conditioning, DenoiseItem, DiffusionError, Field, Guidance, Guider, Latent, LatentFormat, Model,
    ModelHandle,
};
use kiln::nodes::Value;
use kiln::tensor::HostTensor;
use serde_json::{Map, Value as Json};

use super::bench::{Bench, link};
use super::compare::std_of;

/// How close the latent of a step must be to the recorded one, of its standard deviation.
const ON_PATH: f64 = 1e-4;

/// How near to the middle between two timesteps a sigma must lie for either to be right, relative.
/// Latents of variance near sigma² move by as much of their spread as sigma does of itself, and the
/// reference's move by 1e-5 between its own thread counts; timesteps are 2.5e-3 to 6e-3 apart.
const EDGE: f32 = 1e-5;

/// A KSampler of a recorded case with the values on its links.
pub struct Controlled {
    inputs: Json,
    model: Arc<ModelHandle>,
    positive: Arc<Conditioning>,
    negative: Arc<Conditioning>,
    latent: Arc<Latent>,
}

/// A run of it.
struct Path {
    samples: HostTensor,
    /// The largest error of each step's latent, of its standard deviation.
    errors: Vec<f64>,
    /// The sigmas of each step's model calls.
    sigmas: Vec<Vec<f32>>,
}

/// The model, with sigmas noted and one of them replaced.
struct Told {
    inner: ModelHandle,
    replaced: Option<(f32, f32)>,
    sigmas: Mutex<Vec<f32>>,
}

impl Model for Told {
    fn denoise(&self, items: &[DenoiseItem<'_>], sigma: f32) -> Result<Vec<Field>, DiffusionError> {
        self.sigmas.lock().expect("no panic holds it").push(sigma);
        let other = self.replaced.filter(|(from, _)| *from == sigma).map(|(_, to)| to);
        self.inner.0.denoise(items, other.unwrap_or(sigma))
    }

    fn sampling(&self) -> &ModelSampling {
        self.inner.0.sampling()
    }

    fn latent_format(&self) -> LatentFormat {
        self.inner.0.latent_format()
    }

    fn network(&self) -> &dyn Any {
        self.inner.0.network()
    }
}

/// Compares the latent of each step with the recorded ones, `[steps, …]`.
struct Watch<'a> {
    recorded: &'a HostTensor,
    told: &'a Told,
    path: Path,
}

impl Observer for Watch<'_> {
    fn step(&mut self, step: &Step<'_>) -> Result<(), DiffusionError> {
        let recorded = self.recorded.rows(step.step.min(self.recorded.dim(0) - 1), 1);
        let x = step.x.to_host()?;
        let differences = x.data().iter().zip(recorded.data());
        let worst = differences.map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max);
        self.path.errors.push(worst / std_of(recorded.data()));
        self.path.sigmas.push(std::mem::take(&mut self.told.sigmas.lock().expect("no panic holds it")));
        Ok(())
    }
}

impl Controlled {
    /// The case's KSampler, if it is one with step-size control.
    pub fn find(prompt: &Map<String, Json>, bench: &Bench) -> Option<Self> {
        let is_controlled =
            |n: &&Json| n["class_type"] == "KSampler" && n["inputs"]["sampler_name"] == "dpm_adaptive";
        let inputs = &prompt.values().find(is_controlled)?["inputs"];
        let links = ["model", "positive", "negative", "latent_image"].map(|name| link(&inputs[name]));
        let links: Vec<_> = links.into_iter().collect::<Option<_>>()?;
        let ran = bench.run(prompt, &links).ok()?;
        let value = |i: usize| ran.values.get(i).and_then(|v| v.first());
        Some(Self {
            inputs: inputs.clone(),
            model: value(0).and_then(Value::downcast)?,
            positive: value(1).and_then(Value::downcast)?,
            negative: value(2).and_then(Value::downcast)?,
            latent: value(3).and_then(Value::downcast)?,
        })
    }

    fn run(&self, recorded: &HostTensor, replaced: Option<(f32, f32)>) -> Option<Path> {
        let told = Arc::new(Told { inner: (*self.model).clone(), replaced, sigmas: Mutex::default() });
        let (name, seed) = (self.inputs["sampler_name"].as_str()?, self.inputs["seed"].as_u64()?);
        let (scheduler, steps) = (self.inputs["scheduler"].as_str()?, self.inputs["steps"].as_u64()?);
        let denoise = self.inputs["denoise"].as_f64()?;
        let sigmas = ksampler_sigmas(told.sampling(), name, scheduler, steps as usize, denoise).ok()?;
        let guidance = Guidance::Cfg {
            positive: self.positive.clone(),
            negative: self.negative.clone(),
            scale: self.inputs["cfg"].as_f64()?,
        };
        let latent = &self.latent.samples;
        let request = SampleRequest {
            guider: &Guider { model: ModelHandle(told.clone()), guidance },
            sampler: &Sampler::by_name(name)?,
            sigmas: &sigmas,
            noise: &prepare_noise(latent.shape(), seed, self.latent.batch_index.as_deref()),
            latent,
            mask: self.latent.noise_mask.as_ref(),
            seed,
        };
        let path = Path { samples: HostTensor::zeros(&[1]), errors: Vec::new(), sigmas: Vec::new() };
        let mut watch = Watch { recorded, told: &told, path };
        let samples = sample(&request, &mut watch).ok()?.samples;
        Some(Path { samples, ..watch.path })
    }

    /// The latent on the recorded side of the one timestep that was on the edge, and in words which
    /// it was; `None` if that is not what keeps the case off the recorded path.
    pub fn on_the_recorded_side(&self, recorded: &HostTensor) -> Option<(HostTensor, String)> {
        let path = self.run(recorded, None)?;
        let step = path.errors.iter().position(|&error| error > ON_PATH)?;
        let sampling = self.model.0.sampling();
        let sigmas = path.sigmas.get(step.saturating_sub(1)..=step)?.concat();
        let edges: Vec<_> = sigmas.iter().filter_map(|&s| Some((s, across(s, sampling, EDGE)?))).collect();
        let &[(sigma, other)] = edges.as_slice() else { return None };
        let moved = self.run(recorded, Some((sigma, other)))?;
        let worst = moved.errors.iter().copied().fold(0.0, f64::max);
        let is_on_path = moved.errors.len() == recorded.dim(0) && worst <= ON_PATH;
        let words = format!(
            "; told timestep {} instead of {} at sigma {sigma}, {:.1e} from the middle, all {} recorded steps within {worst:.1e}",
            sampling.timestep(other),
            sampling.timestep(sigma),
            (other / sigma - 1.0).abs(),
            moved.errors.len(),
        );
        is_on_path.then_some((moved.samples, words))
    }
}

/// The nearest sigma of another timestep, if it is within `reach` of `sigma`, relative.
fn across(sigma: f32, sampling: &ModelSampling, reach: f32) -> Option<f32> {
    let timestep = sampling.timestep(sigma);
    let is_near = |other: f32| (other / sigma - 1.0).abs() <= reach;
    let (mut up, mut down) = (sigma.next_up(), sigma.next_down());
    while is_near(up) || is_near(down) {
        for other in [up, down] {
            if sampling.timestep(other) != timestep && is_near(other) {
                return Some(other);
            }
        }
        (up, down) = (up.next_up(), down.next_down());
    }
    None
}
