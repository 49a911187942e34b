//! What travels on a `LATENT` link.

use crate::tensor::HostTensor;

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
