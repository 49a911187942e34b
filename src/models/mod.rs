//! Pure architecture: CLIP, UNet, VAE; and the store of loaded models.

/// Loaded models and the backend they run on.
#[derive(Default)]
pub struct ModelStore {}
