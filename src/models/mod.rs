//! Pure architecture: CLIP, UNet, VAE; and the store of loaded models.

/// Loaded models and the backend they run on.
#[derive(Default)]
pub struct ModelStore {}

impl ModelStore {
    /// Drops all loaded models.
    pub fn unload_all(&self) {}

    /// Gives back memory that is not needed.
    pub fn trim(&self) {}
}
