//! Which backend runs which network.

use std::sync::Arc;

use super::Backend;

/// The backends of a model's parts: the same device, perhaps in different precision.
#[derive(Clone)]
pub struct Placement {
    /// Runs diffusion models.
    pub diffusion: Arc<dyn Backend>,
    /// Runs text encoders.
    pub text: Arc<dyn Backend>,
    /// Runs autoencoders.
    pub vae: Arc<dyn Backend>,
}

impl Placement {
    /// Everything on one backend.
    pub fn all(backend: Arc<dyn Backend>) -> Self {
        Self { diffusion: backend.clone(), text: backend.clone(), vae: backend }
    }

    /// Gives free memory of all backends back.
    pub fn trim(&self) {
        self.diffusion.trim();
        for other in [&self.text, &self.vae] {
            if !Arc::ptr_eq(other, &self.diffusion) {
                other.trim();
            }
        }
    }
}
