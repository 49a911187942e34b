//! The diffusion process around a model that is seen as a function: schedules,
//! samplers, noise, guidance, conditioning.

pub mod conditioning;
mod error;
mod field;
mod frequency;
pub mod guidance;
pub mod guidance_patch;
mod guidance_rules;
pub mod inpaint;
mod latent;
pub mod model;
pub mod noise;
pub mod preview;
pub mod regions;
pub mod sample;
pub mod samplers;
pub mod schedule;
pub mod step_cache;

pub use conditioning::{CondEntry, Conditioning};
pub use error::DiffusionError;
pub use field::{DeviceField, Field, PredictionFactors};
pub use guidance::{Guidance, Guider};
pub use latent::{Latent, LatentFormat};
pub use model::{DenoiseItem, Model, ModelHandle, RunInputs};

#[cfg(test)]
pub(crate) mod golden;
