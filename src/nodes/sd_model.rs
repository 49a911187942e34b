//! A loaded UNet as the sampling loop sees it.

use std::any::Any;
use std::collections::HashMap;
use std::sync::Arc;

use super::model_inputs::{Beside, beside, vector};
use super::{NodeError, control, unclip};
use crate::diffusion::model::tokens_batch;
use crate::diffusion::preview::{self, Latent2Rgb};
use crate::diffusion::schedule::{Betas, ModelSampling, Prediction};
use crate::diffusion::{CondEntry, DenoiseItem, DiffusionError, Model, ModelHandle};
use crate::models::detect::{Family, UnetConfig};
use crate::models::patch::{Patch, Patches};
use crate::models::unet::UnetInput;
use crate::models::unet::hooks::{Hooks, UnetHook};
use crate::models::{ModelError, ModelFile, detect};
use crate::tensor::HostTensor;

/// The diffusion model of an SD-family checkpoint, with what nodes attached to it.
/// Cheap to copy: a node that changes it makes a copy with the change.
#[derive(Clone)]
pub struct SdModel {
    file: Arc<ModelFile>,
    patches: Patches,
    family: Family,
    sampling: ModelSampling,
    latent_scale: f32,
    channels: usize,
    hooks: Vec<Arc<dyn UnetHook>>,
}

impl SdModel {
    /// Reads what the file says about the model; loads no weights.
    pub fn new(file: Arc<ModelFile>) -> Result<Self, ModelError> {
        let config = file.sampling()?;
        let prediction = match config.prediction {
            detect::Prediction::Epsilon => Prediction::Eps,
            detect::Prediction::V => Prediction::V,
        };
        let sampling = match config.continuous {
            Some(range) => ModelSampling::continuous_edm(prediction, range.sigma_min, range.sigma_max, 1.0),
            None => ModelSampling::discrete(prediction, betas(&config)),
        };
        let channels = file.unet()?.config().out_channels;
        let family = file.family()?;
        let (latent_scale, patches) = (config.latent_scale as f32, Patches::default());
        Ok(Self { file, patches, family, sampling, latent_scale, channels, hooks: Vec::new() })
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

    /// The same model with other noise levels or another meaning of its output.
    pub fn with_sampling(&self, sampling: ModelSampling) -> Self {
        Self { sampling, ..self.clone() }
    }

    /// The patches that the network's weights are under.
    pub fn patches(&self) -> &Patches {
        &self.patches
    }

    /// The same network with further patches of its weights.
    pub fn patched(&self, more: HashMap<String, Patch>) -> Self {
        Self { patches: self.patches.with(more), ..self.clone() }
    }

    fn run(&self, items: &[DenoiseItem<'_>], sigma: f32) -> Result<Vec<HostTensor>, ModelError> {
        let unet = self.file.patched_unet(&self.patches)?;
        let batch = items.first().map_or(0, |i| i.x.dim(0));
        let x = stacked(items.iter().map(|i| i.x))?;
        let conds: Vec<_> = items.iter().map(|i| i.cond.cond.clone()).collect();
        let context = unet.context_under(&conds, &self.hooks)?;
        let timesteps = vec![self.sampling.timestep(sigma); x.dim(0)];
        let mut input = self.sampling.calculate_input(sigma, &x);
        let kind = Beside::of(unet.config());
        if kind != Beside::Nothing {
            let more = items.iter().map(|item| kind.channels(item, self.latent_scale));
            let more = more.collect::<Result<Option<Vec<_>>, _>>()?.unwrap_or_default();
            input = beside(&input, &stacked(more.iter())?);
        }
        let vector = self.vectors(unet.config(), items)?;
        let call = UnetInput { x: &input, timesteps: &timesteps, context: &context, vector: vector.as_ref() };
        let controls = control::inputs(items, sigma, &self.sampling)?;
        let negative = |i: &DenoiseItem<'_>| usize::from(i.is_negative);
        let sides: Vec<usize> = items.iter().flat_map(|i| std::iter::repeat_n(negative(i), batch)).collect();
        let hooks = Hooks { list: &self.hooks, sigma, sides: &sides };
        let output = unet.forward_hooked(&call, &controls, hooks)?;
        ModelError::check_numbers("diffusion model", input.data(), output.data())?;
        let denoised = self.sampling.calculate_denoised(sigma, &output, &x);
        Ok((0..items.len()).map(|i| denoised.rows(i * batch, batch)).collect())
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
    fn denoise(&self, items: &[DenoiseItem<'_>], sigma: f32) -> Result<Vec<HostTensor>, DiffusionError> {
        self.run(items, sigma).map_err(DiffusionError::model)
    }

    fn sampling(&self) -> &ModelSampling {
        &self.sampling
    }

    fn latent_scale(&self) -> f32 {
        self.latent_scale
    }

    fn can_batch(&self, a: &CondEntry, b: &CondEntry) -> bool {
        let (x, y) = (&a.cond, &b.cond);
        tokens_batch(x.dim(1), y.dim(1)) && x.dim(2) == y.dim(2) && control::is_same(a, b)
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
