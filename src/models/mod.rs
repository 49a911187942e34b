//! Pure architecture: CLIP, UNet, VAE; family detection; the store of loaded models.
//!
//! A model knows neither samplers nor nodes. It is built from a weight source
//! and runs on any [`Backend`](crate::tensor::Backend).

pub mod clip;
pub mod detect;
mod error;
pub mod layers;
pub mod layouts;
mod store;
#[cfg(test)]
mod tests;
pub mod text;
pub mod tiny;
pub mod unet;
pub mod vae;

pub use error::ModelError;
pub use store::{ModelFile, ModelSource, ModelStore, Precision};
