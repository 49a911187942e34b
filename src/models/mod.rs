//! Pure architecture: CLIP, UNet, VAE; family detection; the store of loaded models.
//!
//! A model knows neither samplers nor nodes. It is built from a weight source
//! and runs on any [`Backend`](crate::tensor::Backend).

pub mod clip;
pub mod config;
mod error;
pub mod layers;
pub mod unet;
pub mod vae;

pub use error::ModelError;

/// Loaded models and the backend they run on.
#[derive(Default)]
pub struct ModelStore {}

impl ModelStore {
    /// Drops all loaded models.
    pub fn unload_all(&self) {}

    /// Gives back memory that is not needed.
    pub fn trim(&self) {}
}
