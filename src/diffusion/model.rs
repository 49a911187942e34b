//! A model as the sampling loop sees it: a function from noisy latents to
//! denoised ones.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use super::conditioning::CondEntry;
use super::guidance_patch::GuidancePatch;
use super::schedule::ModelSampling;
use super::{DiffusionError, Field, Latent, LatentFormat};
use crate::tensor::{Backend, HostTensor};

/// One piece of a model call.
#[derive(Clone, Copy, Debug)]
pub struct DenoiseItem<'a> {
    /// Noisy latents `[b, C, h, w]` in the model's own scale; a part of the
    /// picture if the conditioning has an area.
    pub x: &'a Field,
    /// What to denoise towards, for every latent of `x`.
    pub cond: &'a CondEntry,
    /// Height and width of the whole latent, for models that are told the picture's size.
    pub full_size: (usize, usize),
    /// Row and column of the latent where `x` begins.
    pub offset: (usize, usize),
    /// Whether the conditioning is one to denoise away from.
    pub is_negative: bool,
    /// What does not change during the run.
    pub run: &'a RunInputs,
}

/// What a run starts from, for models that see more than the noisy latents (inpainting).
#[derive(Clone, Debug, Default)]
pub struct RunInputs {
    /// The latent that the run began with, in the model's own scale.
    pub latent: Option<Arc<HostTensor>>,
    /// Where to sample `[B, C, h, w]`, if only in a part.
    pub mask: Option<Arc<HostTensor>>,
    /// The run's seed, for models that draw noise of their own.
    pub seed: u64,
}

/// A diffusion model.
///
/// Implementations may split a call as memory demands; the result must not
/// depend on it beyond rounding.
pub trait Model: Send + Sync {
    /// The denoised prediction for every item, where its `x` is. Items of one call share the shape
    /// of `x` and are pairwise [batchable](Model::can_batch).
    ///
    /// # Errors
    /// Whatever stops the model from running, as [`DiffusionError::Model`].
    fn denoise(&self, items: &[DenoiseItem<'_>], sigma: f32) -> Result<Vec<Field>, DiffusionError>;

    /// The device that latents stay on while this model samples; `None`: they are in host memory.
    fn device(&self) -> Option<Arc<dyn Backend>> {
        None
    }

    /// The model's noise levels.
    fn sampling(&self) -> &ModelSampling;

    /// How a latent on a link becomes the model's own.
    fn latent_format(&self) -> LatentFormat;

    /// Channels of the model's latents.
    fn latent_channels(&self) -> usize {
        4
    }

    /// Weights from latent channels to red, green and blue, for previews.
    fn preview_factors(&self) -> Option<&super::preview::Latent2Rgb> {
        None
    }

    /// Name without ending of the tiny decoder that fits the model's latents, for previews.
    fn preview_decoder(&self) -> Option<&'static str> {
        None
    }

    /// Whether two conditionings can run in one call.
    fn can_batch(&self, a: &CondEntry, b: &CondEntry) -> bool {
        tokens_batch(a.cond.dim(1), b.cond.dim(1)) && a.cond.dim(2) == b.cond.dim(2)
    }

    /// Patches of the guidance step, in the order they were attached.
    fn guidance_patches(&self) -> &[Arc<dyn GuidancePatch>] {
        &[]
    }

    /// The network itself, below everything that was attached to it: nodes that
    /// change its weights look for their own type here.
    fn network(&self) -> &dyn Any;

    /// The same attachments around another network; `None` if this is the network.
    fn around(&self, network: Arc<dyn Model>) -> Option<Arc<dyn Model>> {
        let _ = network;
        None
    }
}

/// Most repetitions of a conditioning to reach a common token count.
const MAX_TOKEN_REPEATS: usize = 4;

/// Whether conditionings of `a` and `b` tokens can share a call: each is repeated
/// to the least common multiple, at most four times.
pub fn tokens_batch(a: usize, b: usize) -> bool {
    if a == b {
        return true;
    }
    if a == 0 || b == 0 {
        return false;
    }
    let multiple = a / gcd(a, b) * b;
    multiple / a.min(b) <= MAX_TOKEN_REPEATS
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// A model on a `MODEL` link.
#[derive(Clone)]
pub struct ModelHandle(pub Arc<dyn Model>);

impl fmt::Debug for ModelHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ModelHandle")
    }
}

impl ModelHandle {
    /// The network below all attachments, if it is a `T`.
    pub fn network<T: Any>(&self) -> Option<&T> {
        self.0.network().downcast_ref()
    }

    /// Everything that was attached to this model, around another network.
    pub fn with_network(&self, network: Arc<dyn Model>) -> Self {
        Self(self.0.around(network.clone()).unwrap_or(network))
    }

    /// The same model with one more guidance patch.
    pub fn with_patch(&self, patch: Arc<dyn GuidancePatch>) -> Self {
        let mut patches = self.0.guidance_patches().to_vec();
        patches.push(patch);
        Self(Arc::new(PatchedModel { inner: self.0.clone(), patches }))
    }

    /// An all-zero latent with the channels of this model; other latents as they are.
    pub fn fit_empty_latent(&self, latent: &Latent) -> Latent {
        let shape = latent.samples.shape();
        let channels = self.0.latent_channels();
        match shape {
            &[b, c, h, w] if c != channels && latent.samples.is_zero() => {
                latent.with_samples(HostTensor::zeros(&[b, channels, h, w]))
            }
            _ => latent.clone(),
        }
    }

    /// A latent on a link in the model's scale.
    pub fn latent_in(&self, latent: &HostTensor) -> HostTensor {
        self.0.latent_format().to_model(latent)
    }

    /// A latent of the model as it goes on a link.
    pub fn latent_out(&self, latent: &HostTensor) -> HostTensor {
        self.0.latent_format().from_model(latent)
    }
}

/// A model with its own list of guidance patches.
struct PatchedModel {
    inner: Arc<dyn Model>,
    patches: Vec<Arc<dyn GuidancePatch>>,
}

impl Model for PatchedModel {
    fn denoise(&self, items: &[DenoiseItem<'_>], sigma: f32) -> Result<Vec<Field>, DiffusionError> {
        self.inner.denoise(items, sigma)
    }

    fn device(&self) -> Option<Arc<dyn Backend>> {
        self.inner.device().filter(|_| !self.patches.iter().any(|patch| patch.needs_host()))
    }

    fn sampling(&self) -> &ModelSampling {
        self.inner.sampling()
    }

    fn latent_format(&self) -> LatentFormat {
        self.inner.latent_format()
    }

    fn latent_channels(&self) -> usize {
        self.inner.latent_channels()
    }

    fn preview_factors(&self) -> Option<&super::preview::Latent2Rgb> {
        self.inner.preview_factors()
    }

    fn preview_decoder(&self) -> Option<&'static str> {
        self.inner.preview_decoder()
    }

    fn can_batch(&self, a: &CondEntry, b: &CondEntry) -> bool {
        self.inner.can_batch(a, b)
    }

    fn guidance_patches(&self) -> &[Arc<dyn GuidancePatch>] {
        &self.patches
    }

    fn network(&self) -> &dyn Any {
        self.inner.network()
    }

    fn around(&self, network: Arc<dyn Model>) -> Option<Arc<dyn Model>> {
        let inner = self.inner.around(network.clone()).unwrap_or(network);
        Some(Arc::new(Self { inner, patches: self.patches.clone() }))
    }
}

#[cfg(test)]
mod tests {
    use super::tokens_batch;

    #[test]
    fn token_counts_batch_up_to_four_repeats() {
        assert!(tokens_batch(77, 77));
        assert!(tokens_batch(77, 308));
        assert!(!tokens_batch(77, 385));
        assert!(tokens_batch(154, 231));
        assert!(!tokens_batch(308, 385));
    }
}
