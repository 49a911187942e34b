//! What travels on a `LATENT` link.

use crate::tensor::HostTensor;

/// Channel means of Playground 2.5's latents.
const PLAYGROUND_MEAN: [f32; 4] = [-1.6574, 1.886, -1.383, 2.5155];
/// Their standard deviations.
const PLAYGROUND_DEVIATION: [f32; 4] = [8.4927, 5.9022, 6.5498, 5.2299];
/// The standard deviation that its network was trained on.
const PLAYGROUND_DATA: f32 = 0.5;

/// How an autoencoder's latents become those of a model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum LatentFormat {
    /// Times a factor: 0.18215 for SD1.x.
    Scaled(f32),
    /// Playground 2.5: every channel around its mean, with a standard deviation of 0.5.
    Playground25,
}

impl LatentFormat {
    /// Means and standard deviations of Playground 2.5's channels.
    pub const PLAYGROUND_STATISTICS: [[f32; 4]; 2] = [PLAYGROUND_MEAN, PLAYGROUND_DEVIATION];

    /// A latent on a link as the model knows it.
    pub fn to_model(self, latent: &HostTensor) -> HostTensor {
        match self {
            LatentFormat::Scaled(factor) => latent.map(|v| v * factor),
            LatentFormat::Playground25 => {
                by_channel(latent, |v, mean, deviation| (v - mean) * PLAYGROUND_DATA / deviation)
            }
        }
    }

    /// A model's latent as it goes on a link.
    pub fn from_model(self, latent: &HostTensor) -> HostTensor {
        match self {
            LatentFormat::Scaled(factor) => latent.map(|v| v / factor),
            LatentFormat::Playground25 => {
                by_channel(latent, |v, mean, deviation| v * deviation / PLAYGROUND_DATA + mean)
            }
        }
    }
}

/// `f` of every value of `[B, 4, h, w]` with the mean and the deviation of its channel.
fn by_channel(x: &HostTensor, f: impl Fn(f32, f32, f32) -> f32) -> HostTensor {
    let (channels, plane) = (x.dim(1), (x.dim(2) * x.dim(3)).max(1));
    let data = x.data();
    HostTensor::from_fn(x.shape(), |i| {
        let channel = i / plane % channels.max(1) % PLAYGROUND_MEAN.len();
        f(data[i], PLAYGROUND_MEAN[channel], PLAYGROUND_DEVIATION[channel])
    })
}

/// A batch of latents on a link.
///
/// The values are the autoencoder's own, unscaled: the factor of the model
/// family (0.18215 for SD1.x) is applied around the sampler only, as in ComfyUI.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Latent {
    /// `[B, C, h, w]`.
    pub samples: HostTensor,
    /// Where to sample (1) and where to keep the latent (0), at any size and with
    /// any number of leading dimensions: it is resized where it is used.
    pub noise_mask: Option<HostTensor>,
    /// For every sample its number in the batch that it was taken from. Noise is
    /// drawn for those numbers, so that a sample keeps its noise when it is
    /// sampled on its own.
    pub batch_index: Option<Vec<usize>>,
}

impl Latent {
    /// A latent without mask and batch numbers.
    pub fn new(samples: HostTensor) -> Self {
        Self { samples, noise_mask: None, batch_index: None }
    }

    /// The same mask and batch numbers around other samples.
    pub fn with_samples(&self, samples: HostTensor) -> Self {
        Self { samples, noise_mask: self.noise_mask.clone(), batch_index: self.batch_index.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of the formula in f64.
    #[test]
    fn playground_latents_are_centred() {
        let x = HostTensor::from_fn(&[2, 4, 1, 2], |i| i as f32 - 3.0);
        let inside = LatentFormat::Playground25.to_model(&x);
        let expected = [
            -0.079_044_36,
            -0.020_170_26,
            -0.244_485_11,
            -0.159_770_93,
            0.181_913_95,
            0.258_252_16,
            0.046_320_2,
            0.141_924_32,
        ];
        for (value, want) in inside.data().iter().zip(expected) {
            assert!((value - want).abs() < 1e-6, "{value} {want}");
        }
        let back = LatentFormat::Playground25.from_model(&inside);
        for (value, want) in back.data().iter().zip(x.data()) {
            assert!((value - want).abs() < 1e-5, "{value} {want}");
        }
    }
}
