//! The diffusion process around a model that is seen as a function: schedules,
//! samplers, noise, guidance, conditioning.

mod error;
mod latent;
pub mod noise;
pub mod samplers;
pub mod schedule;

pub use error::DiffusionError;
pub use latent::Latent;
