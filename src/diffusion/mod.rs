//! The diffusion process around a model that is seen as a function: schedules,
//! samplers, noise, guidance, conditioning.

mod latent;
pub mod noise;

pub use latent::Latent;
