//! What some UNets see besides noisy latents and text: pictures beside the latents
//! (inpainting, InstructPix2Pix), and a vector of pooled text and sizes (SDXL).
//!
//! Conditioning nodes leave these in a conditioning's `extra`; where they left
//! nothing, the reference's defaults stand in.

use std::sync::Arc;

use crate::diffusion::inpaint::resize_mask;
use crate::diffusion::{DenoiseItem, LatentFormat};
use crate::image::resample::{self, Crop, Method, Resize};
use crate::models::ModelError;
use crate::models::detect::{Family, UnetConfig};
use crate::models::unet::vector::{NUMBER_WIDTH, sinusoids};
use crate::tensor::HostTensor;

/// The latent of a picture beside the noisy latents, as on a link: `Arc<HostTensor>`.
pub(super) const CONCAT_LATENT: &str = "concat_latent_image";
/// The mask beside the noisy latents: `Arc<HostTensor>`.
pub(super) const CONCAT_MASK: &str = "concat_mask";

/// Pixels to a latent cell, in each direction.
const CELL: usize = 8;
/// Aesthetic scores that the refiner is told where a conditioning has none.
const SCORE: f64 = 6.0;
/// The same for what is denoised away from.
const NEGATIVE_SCORE: f64 = 2.5;
/// A grey picture in the latent space of SD1.x, a channel each.
const GREY_LATENT: [f32; 4] = [0.8223, -0.6876, 0.6364, 0.1380];

/// What a UNet sees beside the noisy latents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Beside {
    /// Nothing.
    Nothing,
    /// A mask and the latent of the picture under it.
    MaskAndPicture,
    /// The latent of the picture to edit.
    Picture,
}

impl Beside {
    /// By the number of input channels.
    pub(super) fn of(config: &UnetConfig) -> Self {
        match config.in_channels.saturating_sub(config.out_channels) {
            0 => Beside::Nothing,
            more if more == config.out_channels => Beside::Picture,
            _ => Beside::MaskAndPicture,
        }
    }

    /// The further channels `[B, C, h, w]` for one item, if there are any. `format` makes a picture's latent
    /// the model's own.
    pub(super) fn channels(
        self,
        item: &DenoiseItem<'_>,
        format: LatentFormat,
    ) -> Result<Option<HostTensor>, ModelError> {
        let full = [item.x.dim(0), item.x.dim(1), item.full_size.0, item.full_size.1];
        let given = item.cond.extra.get::<Arc<HostTensor>>(CONCAT_LATENT);
        let planes = match self {
            Beside::Nothing => return Ok(None),
            // InstructPix2Pix was trained on latents without the factor.
            Beside::Picture => match given {
                Some(picture) => fitted(&picture, full)?,
                None => HostTensor::zeros(&full),
            },
            Beside::MaskAndPicture => {
                let mask = item.cond.extra.get::<Arc<HostTensor>>(CONCAT_MASK).map(|m| (*m).clone());
                match mask.or_else(|| item.run.mask.clone()) {
                    Some(mask) => {
                        let picture = match (given, &item.run.latent) {
                            (Some(picture), _) => fitted(&format.to_model(&picture), full)?,
                            (None, Some(start)) => fitted(start, full)?,
                            (None, None) => grey(full),
                        };
                        beside(&fitted_mask(&mask, full), &picture)
                    }
                    None => beside(&HostTensor::full(&[full[0], 1, full[2], full[3]], 1.0), &grey(full)),
                }
            }
        };
        Ok(Some(cut(&planes, item)))
    }
}

/// Every sample a grey picture.
fn grey(shape: [usize; 4]) -> HostTensor {
    let plane = shape[2] * shape[3];
    let channels = shape[1].max(1);
    HostTensor::from_fn(&shape, |i| GREY_LATENT.get(i / plane.max(1) % channels).copied().unwrap_or(1.0))
}

/// A latent in the size and batch of `shape`.
fn fitted(latent: &HostTensor, shape: [usize; 4]) -> Result<HostTensor, ModelError> {
    if latent.shape().len() != 4 || latent.dim(1) != shape[1] {
        let (expected, found) = (shape[1], latent.dim(1));
        return Err(ModelError::Input {
            what: "channels of the picture beside the latents",
            expected,
            found,
        });
    }
    let resized = if (latent.dim(2), latent.dim(3)) == (shape[2], shape[3]) {
        latent.clone()
    } else {
        let to = Resize { crop: Crop::Center, ..Resize::to(shape[3], shape[2], Method::Bilinear) };
        resample::upscale(latent, to).map_err(|e| ModelError::File(e.to_string()))?
    };
    Ok(batch_of(&resized, shape[0]))
}

/// The rounded first plane of every mask `[B, 1, h, w]`, in the size and batch of `shape`.
fn fitted_mask(mask: &HostTensor, shape: [usize; 4]) -> HostTensor {
    let first = match mask.shape() {
        &[b, c, h, w] if c > 1 => {
            let plane = h * w;
            HostTensor::from_fn(&[b, h, w], |i| mask.data()[i / plane * c * plane + i % plane])
        }
        _ => mask.clone(),
    };
    let resized = resize_mask(&first, (shape[2], shape[3])).map(f32::round_ties_even);
    let count = resized.dim(0);
    batch_of(&resized.reshape(&[count, 1, shape[2], shape[3]]).unwrap_or_default(), shape[0])
}

/// `count` samples: spread over those there are, as the reference spreads them.
fn batch_of(x: &HostTensor, count: usize) -> HostTensor {
    let there = x.dim(0);
    if there == count || there == 0 {
        return x.clone();
    }
    let pick = |i: usize| match count {
        0 | 1 => i,
        _ if count < there => {
            let step = (there - 1) as f64 / (count - 1) as f64;
            ((i as f64 * step).round_ties_even() as usize).min(there - 1)
        }
        _ => (((i as f64 + 0.5) * (there as f64 / count as f64)).floor() as usize).min(there - 1),
    };
    let data = (0..count).flat_map(|i| x.row(pick(i)).iter().copied()).collect();
    let mut shape = x.shape().to_vec();
    if let Some(batch) = shape.first_mut() {
        *batch = count;
    }
    HostTensor::new(&shape, data).unwrap_or_default()
}

/// Channels of `a`, then those of `b`.
pub(super) fn beside(a: &HostTensor, b: &HostTensor) -> HostTensor {
    let data = (0..a.dim(0)).flat_map(|i| a.row(i).iter().chain(b.row(i)).copied()).collect();
    HostTensor::new(&[a.dim(0), a.dim(1) + b.dim(1), a.dim(2), a.dim(3)], data).unwrap_or_default()
}

/// The part of `planes` that the item's latents are.
fn cut(planes: &HostTensor, item: &DenoiseItem<'_>) -> HostTensor {
    let (h, w) = (item.x.dim(2), item.x.dim(3));
    let (fh, fw) = (planes.dim(2), planes.dim(3));
    if (h, w) == (fh, fw) {
        return planes.clone();
    }
    let (y, x) = item.offset;
    HostTensor::from_fn(&[planes.dim(0), planes.dim(1), h, w], |i| {
        let (plane, row, column) = (i / (h * w), i / w % h, i % w);
        planes.data()[(plane * fh + y + row) * fw + x + column]
    })
}

/// Pooled text and sizes of one item, for models that have such an input.
pub(super) fn vector(
    config: &UnetConfig,
    family: Family,
    item: &DenoiseItem<'_>,
) -> Result<Option<Vec<f32>>, ModelError> {
    let Some(width) = config.adm_channels else { return Ok(None) };
    let extra = &item.cond.extra;
    let number = |name: &str, default: f64| extra.get::<f64>(name).map_or(default, |v| *v);
    let (height, wide) = ((item.full_size.0 * CELL) as f64, (item.full_size.1 * CELL) as f64);
    let (height, wide) = (number("height", height), number("width", wide));
    let mut numbers = vec![height, wide, number("crop_h", 0.0), number("crop_w", 0.0)];
    if family == Family::SdxlRefiner {
        let default = if item.is_negative { NEGATIVE_SCORE } else { SCORE };
        numbers.push(number("aesthetic_score", default));
    } else {
        numbers.extend([number("target_height", height), number("target_width", wide)]);
    }
    let numbers: Vec<f32> = numbers.into_iter().map(|v| v as f32).collect();
    let expected = width.saturating_sub(numbers.len() * NUMBER_WIDTH);
    let pooled = item.cond.pooled.as_ref().map_or(&[][..], |p| p.data());
    if pooled.len() != expected {
        return Err(ModelError::Input {
            what: "width of the pooled text (encode the prompt with a text encoder of the model's family)",
            expected,
            found: pooled.len(),
        });
    }
    Ok(Some([pooled, &sinusoids(&numbers)].concat()))
}

#[cfg(test)]
#[path = "model_inputs_tests.rs"]
mod tests;
