//! A loaded UNet as the sampling loop sees it.

use std::any::Any;
use std::collections::HashMap;
use std::sync::Arc;

use super::model_inputs::{Beside, beside, vector};
use super::step_cache::CallCache;
use super::{NodeError, control, unclip};
use crate::diffusion::model::tokens_batch;
use crate::diffusion::preview::{self, Latent2Rgb};
use crate::diffusion::schedule::{Betas, ModelSampling, Prediction};
use crate::diffusion::{
    CondEntry, DenoiseItem, DeviceField, DiffusionError, Field, LatentFormat, Model, ModelHandle,
};
use crate::models::controlnet::ControlInput;
use crate::models::detect::{Family, UnetConfig};
use crate::models::patch::{Patch, Patches};
use crate::models::unet::hooks::{Hooks, UnetHook, key_of};
use crate::models::unet::{DeviceInput, Unet, UnetInput};
use crate::models::{ModelError, ModelFile, detect};
use crate::tensor::{Backend, HostTensor, ModelInput};

/// What messages call it.
const NETWORK: &str = "diffusion model";

/// The diffusion model of an SD-family checkpoint, with what nodes attached to it.
/// Cheap to copy: a node that changes it makes a copy with the change.
#[derive(Clone)]
pub struct SdModel {
    file: Arc<ModelFile>,
    patches: Patches,
    family: Family,
    sampling: ModelSampling,
    latent_format: LatentFormat,
    channels: usize,
    hooks: Vec<Arc<dyn UnetHook>>,
    /// Stands before the network in one run.
    cache: Option<Arc<CallCache>>,
}

/// A call of a model's network.
pub(super) struct NetworkCall<'a> {
    /// Names the conditioning of every equal share of the samples.
    pub conds: &'a [u64],
    /// Noise level.
    pub sigma: f32,
    /// What the network is given.
    pub input: &'a HostTensor,
    /// Channels of the latents, which come first.
    pub channels: usize,
}

impl SdModel {
    /// Reads what the file says about the model; loads no weights.
    pub fn new(file: Arc<ModelFile>) -> Result<Self, ModelError> {
        let config = file.sampling()?;
        let prediction = match config.prediction {
            detect::Prediction::Epsilon => Prediction::Eps,
            detect::Prediction::V => Prediction::V,
            detect::Prediction::Edm => Prediction::Edm,
        };
        let sampling = match config.continuous {
            Some(range) => {
                let data = if prediction == Prediction::Edm { ModelSampling::EDM_DATA } else { 1.0 };
                ModelSampling::continuous_edm(prediction, range.sigma_min, range.sigma_max, data)
            }
            None => ModelSampling::discrete(prediction, betas(&config)),
        };
        let channels = file.unet()?.config().out_channels;
        let family = file.family()?;
        let latent_format = match config.prediction {
            detect::Prediction::Edm => LatentFormat::Playground25,
            detect::Prediction::Epsilon | detect::Prediction::V => {
                LatentFormat::Scaled(config.latent_scale as f32)
            }
        };
        let (hooks, patches) = (Vec::new(), Patches::default());
        Ok(Self { file, patches, family, sampling, latent_format, channels, hooks, cache: None })
    }

    /// The model on a `MODEL` link, below its guidance patches.
    pub fn of(handle: &ModelHandle) -> Result<&Self, NodeError> {
        handle
            .network()
            .ok_or_else(|| NodeError::input("model", "is no diffusion model that this node can change"))
    }

    /// The betas that the model was trained with.
    pub fn betas(&self) -> Result<Betas, ModelError> {
        Ok(betas(&self.file.sampling()?))
    }

    /// The file that holds the network.
    pub fn file(&self) -> &Arc<ModelFile> {
        &self.file
    }

    /// The same model with one more hook.
    pub fn with_hook(&self, hook: Arc<dyn UnetHook>) -> Self {
        let mut copy = self.clone();
        copy.hooks.push(hook);
        copy
    }

    /// The same model with a cache before its network, for one run.
    pub(super) fn with_cache(&self, cache: Arc<CallCache>) -> Self {
        Self { cache: Some(cache), ..self.clone() }
    }

    /// The same model with other noise levels or another meaning of its output.
    pub fn with_sampling(&self, sampling: ModelSampling) -> Self {
        Self { sampling, ..self.clone() }
    }

    /// The same model on other latents.
    pub fn with_latent_format(&self, latent_format: LatentFormat) -> Self {
        Self { latent_format, ..self.clone() }
    }

    /// The patches that the network's weights are under.
    pub fn patches(&self) -> &Patches {
        &self.patches
    }

    /// The same network with further patches of its weights.
    pub fn patched(&self, more: HashMap<String, Patch>) -> Self {
        Self { patches: self.patches.with(more), ..self.clone() }
    }

    /// A call on latents that are on the network's own device, and stay there.
    fn run_on_device(
        &self,
        items: &[DenoiseItem<'_>],
        x: &DeviceField,
        sigma: f32,
    ) -> Result<Vec<Field>, DiffusionError> {
        let failed = |error: ModelError| DiffusionError::model(error);
        let unet = self.file.patched_unet(&self.patches).map_err(failed)?;
        let conds: Vec<_> = items.iter().map(|i| i.cond.cond.clone()).collect();
        let context = unet.context_under(&conds, &self.hooks).map_err(failed)?;
        let batch = items.first().map_or(0, |i| i.x.dim(0));
        let timesteps = vec![self.sampling.timestep(sigma); batch * items.len()];
        let beside = self.beside(unet.config(), items).map_err(failed)?;
        let vector = self.vectors(unet.config(), items).map_err(failed)?;
        let controls = control::inputs(items, sigma, &self.sampling, (&self.file, &self.patches));
        let controls = controls.map_err(failed)?;
        let sides = sides(items, batch);
        let planes = x.planes()?;
        let call = DeviceInput {
            latents: &ModelInput {
                x: &planes,
                copies: items.len(),
                factor: self.sampling.input_factor(sigma),
                beside: None,
            },
            beside: beside.as_ref(),
            timesteps: &timesteps,
            context: &context,
            vector: vector.as_ref(),
        };
        let hooks = Hooks { list: &self.hooks, sigma, sides: &sides };
        let output = unet.forward_on_device(&call, &controls, hooks).map_err(failed)?;
        Field::predictions(x, output, self.sampling.prediction_factors(sigma))
    }

    /// What the network sees beside the latents of all items.
    fn beside(
        &self,
        config: &UnetConfig,
        items: &[DenoiseItem<'_>],
    ) -> Result<Option<HostTensor>, ModelError> {
        let kind = Beside::of(config);
        let more = items.iter().map(|item| kind.channels(item, self.latent_format));
        let more = more.collect::<Result<Option<Vec<_>>, _>>()?;
        more.map(|more| stacked(more.iter())).transpose()
    }

    fn run(&self, items: &[DenoiseItem<'_>], sigma: f32) -> Result<Vec<Field>, DiffusionError> {
        let hosts: Vec<_> = items.iter().map(|i| i.x.to_host()).collect::<Result<_, _>>()?;
        let hosts: Vec<&HostTensor> = hosts.iter().map(|x| &**x).collect();
        let out = self.run_on_host(items, &hosts, sigma).map_err(DiffusionError::model)?;
        Ok(out.into_iter().map(Field::from).collect())
    }

    /// A call on latents in host memory.
    fn run_on_host(
        &self,
        items: &[DenoiseItem<'_>],
        latents: &[&HostTensor],
        sigma: f32,
    ) -> Result<Vec<HostTensor>, ModelError> {
        let unet = self.file.patched_unet(&self.patches)?;
        let batch = items.first().map_or(0, |i| i.x.dim(0));
        let x = stacked(latents.iter().copied())?;
        let conds: Vec<_> = items.iter().map(|i| i.cond.cond.clone()).collect();
        let context = unet.context_under(&conds, &self.hooks)?;
        let timesteps = vec![self.sampling.timestep(sigma); x.dim(0)];
        let mut input = self.sampling.calculate_input(sigma, &x);
        if let Some(more) = self.beside(unet.config(), items)? {
            input = beside(&input, &more);
        }
        let vector = self.vectors(unet.config(), items)?;
        let call = UnetInput { x: &input, timesteps: &timesteps, context: &context, vector: vector.as_ref() };
        let controls = control::inputs(items, sigma, &self.sampling, (&self.file, &self.patches))?;
        let sides = sides(items, batch);
        let hooks = Hooks { list: &self.hooks, sigma, sides: &sides };
        let run = || unet.forward_hooked(&call, &controls, hooks);
        let output = match &self.cache {
            None => run()?,
            Some(cache) => {
                // An embedding is held by its conditioning for the whole run.
                let name = |i: &DenoiseItem<'_>| {
                    key_of("cond", (Arc::as_ptr(&i.cond.cond).addr(), i.is_negative, i.offset, i.x.shape()))
                };
                let names: Vec<u64> = items.iter().map(name).collect();
                let (conds, channels) = (names.as_slice(), self.channels);
                cache.output(&NetworkCall { conds, sigma, input: &input, channels }, run)?
            }
        };
        ModelError::check_numbers(NETWORK, input.data(), output.data())
            .map_err(|error| self.blamed(error, (&unet, &call), &conds, &controls, hooks))?;
        let denoised = self.sampling.calculate_denoised(sigma, &output, &x);
        Ok((0..items.len()).map(|i| denoised.rows(i * batch, batch)).collect())
    }

    /// The error of a result that is no number, with the part to blame: the call is made again without
    /// ControlNets, without hooks and without patches, until it gives numbers.
    fn blamed(
        &self,
        error: ModelError,
        (unet, call): (&Unet, &UnetInput<'_>),
        conds: &[Arc<HostTensor>],
        controls: &[ControlInput],
        hooks: Hooks<'_>,
    ) -> ModelError {
        let gives_numbers = |out: Result<HostTensor, ModelError>| {
            out.is_ok_and(|out| ModelError::check_numbers(NETWORK, &[], out.data()).is_ok())
        };
        if !controls.is_empty() && gives_numbers(unet.forward_hooked(call, &[], hooks)) {
            return ModelError::damaged("ControlNet");
        }
        if !hooks.list.is_empty() && gives_numbers(unet.forward(call, None)) {
            return ModelError::damaged_by_hooks(NETWORK);
        }
        let plain = || {
            let unet = self.file.unet()?;
            let context = unet.context(conds)?;
            unet.forward(&UnetInput { context: &context, ..*call }, None)
        };
        if !self.patches.is_empty() && gives_numbers(plain()) {
            return ModelError::damaged_by_patches(NETWORK);
        }
        error
    }

    /// One row of pooled text and sizes for every sample, for models that have such an input.
    fn vectors(
        &self,
        config: &UnetConfig,
        items: &[DenoiseItem<'_>],
    ) -> Result<Option<HostTensor>, ModelError> {
        let mut data = Vec::new();
        for item in items {
            let row = match (self.family, config.adm_channels) {
                (Family::Sd2Unclip, Some(width)) => Some(unclip::vector(width, &self.file, item)?),
                _ => vector(config, self.family, item)?,
            };
            let Some(row) = row else { return Ok(None) };
            (0..item.x.dim(0)).for_each(|_| data.extend_from_slice(&row));
        }
        let rows = items.iter().map(|i| i.x.dim(0)).sum::<usize>();
        let width = config.adm_channels.unwrap_or(0);
        Ok(HostTensor::new(&[rows, width], data))
    }
}

/// Which side every sample of a call is denoised towards.
fn sides(items: &[DenoiseItem<'_>], batch: usize) -> Vec<usize> {
    items.iter().flat_map(|i| std::iter::repeat_n(usize::from(i.is_negative), batch)).collect()
}

/// Samples of one shape as one batch.
fn stacked<'a>(parts: impl Iterator<Item = &'a HostTensor> + Clone) -> Result<HostTensor, ModelError> {
    let mut shape = parts.clone().next().map(|x| x.shape().to_vec()).unwrap_or_default();
    if let Some(batch) = shape.first_mut() {
        *batch *= parts.clone().count();
    }
    let data: Vec<f32> = parts.flat_map(|x| x.data().iter().copied()).collect();
    let (expected, found) = (shape.iter().product(), data.len());
    HostTensor::new(&shape, data).ok_or(ModelError::Input {
        what: "elements of the latents of one call",
        expected,
        found,
    })
}

fn betas(config: &detect::SamplingConfig) -> Betas {
    let detect::BetaSchedule { start, end, steps } = config.beta_schedule;
    Betas { start, end, steps, has_zero_terminal_snr: config.has_zero_terminal_snr }
}

impl Model for SdModel {
    fn denoise(&self, items: &[DenoiseItem<'_>], sigma: f32) -> Result<Vec<Field>, DiffusionError> {
        if let Some(first) = items.first()
            && let (Some(x), Some(device)) = (first.x.on_device(), self.device())
            && Arc::ptr_eq(x.device(), &device)
            && items.iter().all(|i| i.x.is_same_on_device(first.x))
        {
            return self.run_on_device(items, x, sigma);
        }
        self.run(items, sigma)
    }

    /// A cache before the network compares latents in host memory.
    fn device(&self) -> Option<Arc<dyn Backend>> {
        let backend = self.file.diffusion_backend();
        (self.cache.is_none() && backend.latent_ops().is_some()).then(|| backend.clone())
    }

    fn sampling(&self) -> &ModelSampling {
        &self.sampling
    }

    fn latent_format(&self) -> LatentFormat {
        self.latent_format
    }

    fn can_batch(&self, a: &CondEntry, b: &CondEntry) -> bool {
        let (x, y) = (&a.cond, &b.cond);
        tokens_batch(x.dim(1), y.dim(1))
            && x.dim(2) == y.dim(2)
            && control::is_same(a, b)
            && control::texts_batch(a, b)
    }

    fn network(&self) -> &dyn Any {
        self
    }

    fn preview_decoder(&self) -> Option<&'static str> {
        Some(match self.family {
            Family::Sd1 | Family::Sd2 | Family::Sd2Unclip => "taesd_decoder",
            Family::Sdxl | Family::SdxlRefiner => "taesdxl_decoder",
        })
    }

    fn latent_channels(&self) -> usize {
        self.channels
    }

    fn preview_factors(&self) -> Option<&Latent2Rgb> {
        Some(match self.family {
            Family::Sd1 | Family::Sd2 | Family::Sd2Unclip => &preview::SD1,
            Family::Sdxl | Family::SdxlRefiner => &preview::SDXL,
        })
    }
}
