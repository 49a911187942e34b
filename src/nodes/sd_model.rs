//! A loaded UNet as the sampling loop sees it.

use std::sync::Arc;

use super::NodeError;
use crate::diffusion::preview::Latent2Rgb;
use crate::diffusion::schedule::{Betas, ModelSampling, Prediction};
use crate::diffusion::{DenoiseItem, DiffusionError, Model, ModelHandle, base_of};
use crate::models::unet::UnetInput;
use crate::models::unet::hooks::{Hooks, UnetHook};
use crate::models::{ModelError, ModelFile, detect};
use crate::tensor::HostTensor;

/// The diffusion model of an SD-family checkpoint, with what nodes attached to it.
/// Cheap to copy: a node that changes it makes a copy with the change.
#[derive(Clone)]
pub struct SdModel {
    file: Arc<ModelFile>,
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
        let sampling = ModelSampling::discrete(prediction, betas(&config));
        let channels = file.unet()?.config().in_channels;
        let latent_scale = config.latent_scale as f32;
        Ok(Self { file, sampling, latent_scale, channels, hooks: Vec::new() })
    }

    /// The model on a `MODEL` link, below its guidance patches.
    pub fn of(handle: &ModelHandle) -> Result<&Self, NodeError> {
        let what = "is no diffusion model that this node can change";
        base_of(&*handle.0).ok_or_else(|| NodeError::input("model", what))
    }

    /// The betas that the model was trained with.
    pub fn betas(&self) -> Result<Betas, ModelError> {
        Ok(betas(&self.file.sampling()?))
    }

    /// The file that the model is from.
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

    fn run(&self, items: &[DenoiseItem<'_>], sigma: f32) -> Result<Vec<HostTensor>, ModelError> {
        let unet = self.file.unet()?;
        let shape = items.first().map(|i| i.x.shape().to_vec()).unwrap_or_default();
        let each: usize = shape.iter().product();
        let mut data = Vec::with_capacity(items.len() * each);
        items.iter().for_each(|item| data.extend_from_slice(item.x.data()));
        let batch = shape.first().copied().unwrap_or(0);
        let mut stacked = shape;
        if let Some(first) = stacked.first_mut() {
            *first = items.len() * batch;
        }
        let found = data.len();
        let x = HostTensor::new(&stacked, data).ok_or(ModelError::Input {
            what: "elements of the latents of one call",
            expected: items.len() * each,
            found,
        })?;
        let conds: Vec<_> = items.iter().map(|i| i.cond.cond.clone()).collect();
        let context = unet.context(&conds)?;
        let timesteps = vec![self.sampling.timestep(sigma); x.dim(0)];
        let input = self.sampling.calculate_input(sigma, &x);
        let sides: Vec<usize> = items.iter().flat_map(|i| std::iter::repeat_n(i.side, batch)).collect();
        let hooks = Hooks { list: &self.hooks, sigma, sides: &sides };
        let input = UnetInput { x: &input, timesteps: &timesteps, context: &context };
        let output = unet.forward_hooked(&input, hooks)?;
        let denoised = self.sampling.calculate_denoised(sigma, &output, &x);
        Ok((0..items.len()).map(|i| denoised.rows(i * batch, batch)).collect())
    }
}

fn betas(config: &detect::SamplingConfig) -> Betas {
    let detect::BetaSchedule { start, end, steps } = config.beta_schedule;
    Betas { start, end, steps, ..Betas::default() }
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

    fn latent_channels(&self) -> usize {
        self.channels
    }

    fn preview_factors(&self) -> Option<&Latent2Rgb> {
        Some(&crate::diffusion::preview::SD1)
    }
}
