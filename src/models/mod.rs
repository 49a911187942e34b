//! Pure architecture: CLIP, UNet, VAE; patches of their weights; family detection; the store of loaded models.
//!
//! A model knows neither samplers nor nodes. It is built from a weight source
//! and runs on any [`Backend`](crate::tensor::Backend).

pub mod clip;
pub mod clip_vision;
pub mod controlnet;
pub mod detect;
mod error;
pub mod hypernetwork;
pub mod layers;
pub mod layouts;
pub mod lora;
pub mod patch;
mod store;
pub mod taesd;
#[cfg(test)]
mod tests;
pub mod text;
pub mod tiny;
pub mod unet;
pub mod upscale;
pub mod vae;

pub use error::ModelError;
pub use store::{ModelFile, ModelSource, ModelStore, Network, Opening, Precision};
