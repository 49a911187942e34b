//! A loaded UNet as the sampling loop sees it.

use std::sync::Arc;

use super::model_inputs::{Beside, beside, vector};
use crate::diffusion::preview::{self, Latent2Rgb};
use crate::diffusion::schedule::{Betas, ModelSampling, Prediction};
use crate::diffusion::{DenoiseItem, DiffusionError, Model};
use crate::models::detect::{Family, UnetConfig};
use crate::models::unet::UnetInput;
use crate::models::{ModelError, ModelFile, detect};
use crate::tensor::HostTensor;

/// The diffusion model of an SD-family checkpoint.
pub struct SdModel {
    file: Arc<ModelFile>,
    family: Family,
    sampling: ModelSampling,
    latent_scale: f32,
    channels: usize,
}

impl SdModel {
    /// Reads what the file says about the model; loads no weights.
    pub fn new(file: Arc<ModelFile>) -> Result<Self, ModelError> {
        let config = file.sampling()?;
        let prediction = match config.prediction {
            detect::Prediction::Epsilon => Prediction::Eps,
            detect::Prediction::V => Prediction::V,
        };
        let detect::BetaSchedule { start, end, steps } = config.beta_schedule;
        let has_zero_terminal_snr = config.has_zero_terminal_snr;
        let sampling = match config.continuous {
            Some(range) => ModelSampling::continuous_edm(prediction, range.sigma_min, range.sigma_max, 1.0),
            None => ModelSampling::discrete(prediction, Betas { start, end, steps, has_zero_terminal_snr }),
        };
        let channels = file.unet()?.config().out_channels;
        let family = file.family()?;
        Ok(Self { file, family, sampling, latent_scale: config.latent_scale as f32, channels })
    }

    fn run(&self, items: &[DenoiseItem<'_>], sigma: f32) -> Result<Vec<HostTensor>, ModelError> {
        let unet = self.file.unet()?;
        let batch = items.first().map_or(0, |i| i.x.dim(0));
        let x = stacked(items.iter().map(|i| i.x))?;
        let conds: Vec<_> = items.iter().map(|i| i.cond.cond.clone()).collect();
        let context = unet.context(&conds)?;
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
        let output = unet.forward(&call, None)?;
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
            let Some(row) = vector(config, self.family, item)? else { return Ok(None) };
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
        Some(match self.family {
            Family::Sd1 | Family::Sd2 | Family::Sd2Unclip => &preview::SD1,
            Family::Sdxl | Family::SdxlRefiner => &preview::SDXL,
        })
    }
}
