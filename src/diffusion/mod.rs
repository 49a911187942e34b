//! Diffusion: noise, schedules, samplers and guidance over a model seen as a function.

pub mod noise;
pub mod schedule;
