//! The vector that SDXL is told beside the prompt: pooled text, then picture sizes as sinusoids.
//!
//! Podell et al. 2023, "SDXL: Improving latent diffusion models for high-resolution image synthesis": the
//! base model gets original size, crop and target size, the refiner original size, crop and an aesthetic score.

/// Channels of one number's sinusoids.
pub const NUMBER_WIDTH: usize = 256;
/// The longest wavelength over 2π.
const MAX_PERIOD: f64 = 10_000.0;

/// `numbers` as sinusoids, one after the other: cosines, then sines, each of falling frequency.
pub fn sinusoids(numbers: &[f32]) -> Vec<f32> {
    numbers.iter().flat_map(|&number| sinusoid(number, NUMBER_WIDTH)).collect()
}

/// `number` as `width` values: cosines, then sines, each of falling frequency.
pub fn sinusoid(number: f32, width: usize) -> Vec<f32> {
    let half = width / 2;
    // Rounded to f32 where the reference rounds.
    let angles = (0..half).map(|i| {
        let exponent = -(MAX_PERIOD.ln() as f32) * i as f32 / half as f32;
        f64::from(number * f64::from(exponent).exp() as f32)
    });
    angles.clone().map(f64::cos).chain(angles.map(f64::sin)).map(|v| v as f32).collect()
}
