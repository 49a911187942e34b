//! Noise on picture embeddings, for unCLIP models (Ramesh et al. 2022; Stability's SD2.1 unCLIP).
//!
//! Such a model was trained on embeddings with noise, and is told how much: its vector
//! is the noisy embedding and the level as sinusoids. Levels are steps of a cosine
//! schedule of 1000. The file holds the mean and spread that embeddings are normalised by.

use super::vector::sinusoid;
use crate::models::ModelError;
use crate::models::layers::Loader;
use crate::models::store::{Network, Opening};

/// Number of noise levels.
pub const LEVELS: usize = 1000;
/// Largest share of noise that a step adds.
const MAX_BETA: f64 = 0.999;
/// Keeps the first steps from being too small.
const OFFSET: f64 = 0.008;

/// Statistics of the embeddings that a model was trained on.
pub struct NoiseAugmentor {
    mean: Vec<f32>,
    std: Vec<f32>,
    /// √ᾱ and √(1−ᾱ) of every level.
    shares: Vec<(f32, f32)>,
}

impl Network for NoiseAugmentor {
    fn open(opening: &Opening<'_>) -> Result<Self, ModelError> {
        let loader =
            Loader::new(opening.source.clone(), opening.placement.diffusion.clone(), "noise_augmentor.");
        let read = |name: &str| {
            let missing = || ModelError::Missing { name: format!("noise_augmentor.{name}") };
            loader.read(name, &loader.shape(name).ok_or_else(missing)?)
        };
        Self::new(read("data_mean")?, read("data_std")?)
    }
}

impl NoiseAugmentor {
    /// With these statistics.
    ///
    /// # Errors
    /// If they are not of one width.
    pub fn new(mean: Vec<f32>, std: Vec<f32>) -> Result<Self, ModelError> {
        if mean.len() != std.len() {
            let what = "width of noise_augmentor.data_std";
            return Err(ModelError::Input { what, expected: mean.len(), found: std.len() });
        }
        Ok(Self { mean, std, shares: shares() })
    }

    /// Values of an embedding.
    pub fn width(&self) -> usize {
        self.mean.len()
    }

    /// The step that is `amount` of the way to the last one.
    pub fn level(amount: f64) -> usize {
        ((LEVELS - 1) as f64 * amount).round_ties_even().clamp(0.0, (LEVELS - 1) as f64) as usize
    }

    /// The embedding with noise, then the level as sinusoids.
    ///
    /// # Errors
    /// If the embedding is of another width.
    pub fn augment(&self, embedding: &[f32], level: usize, noise: &[f32]) -> Result<Vec<f32>, ModelError> {
        if embedding.len() != self.width() || noise.len() != self.width() {
            let what =
                "width of the picture's embedding (load the picture encoder that belongs to the model)";
            return Err(ModelError::Input { what, expected: self.width(), found: embedding.len() });
        }
        let (keep, add) = self.shares.get(level).copied().unwrap_or((1.0, 0.0));
        let statistics = self.mean.iter().zip(&self.std);
        let noisy = embedding.iter().zip(noise).zip(statistics).map(|((x, noise), (mean, std))| {
            let scaled = (x - mean) / std;
            (keep * scaled + add * noise) * std + mean
        });
        Ok(noisy.chain(sinusoid(level as f32, self.width())).collect())
    }
}

/// The cosine schedule (Nichol & Dhariwal 2021).
fn shares() -> Vec<(f32, f32)> {
    let rest = |t: f64| ((t + OFFSET) / (1.0 + OFFSET) * std::f64::consts::FRAC_PI_2).cos().powi(2);
    let n = LEVELS as f64;
    let mut product = 1.0;
    (0..LEVELS)
        .map(|i| {
            let beta = (1.0 - rest((i + 1) as f64 / n) / rest(i as f64 / n)).min(MAX_BETA);
            product *= 1.0 - beta;
            (product.sqrt() as f32, (1.0 - product).sqrt() as f32)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against the closed form: the product telescopes to cos²(t)/cos²(0) wherever no step is capped.
    #[test]
    fn levels_are_those_of_the_cosine() {
        let rest = |t: f64| ((t + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2).cos().powi(2);
        let all = shares();
        for i in [0usize, 1, 50, 499, 997] {
            let want = rest((i + 1) as f64 / 1000.0) / rest(0.0);
            assert!((f64::from(all[i].0) - want.sqrt()).abs() < 1e-6, "{i}: {} {}", all[i].0, want.sqrt());
            assert!((f64::from(all[i].1) - (1.0 - want).sqrt()).abs() < 1e-6, "{i}");
        }
        assert_eq!((NoiseAugmentor::level(0.05), NoiseAugmentor::level(1.0)), (50, 999));
        assert!(all[999].0 < 1e-3 && all[999].1 > 0.999);
    }

    #[test]
    fn embeddings_are_normalised_noised_and_brought_back() {
        let augmentor = NoiseAugmentor::new(vec![1.0, -1.0], vec![2.0, 0.5]).unwrap();
        let (keep, add) = augmentor.shares[499];
        let got = augmentor.augment(&[3.0, 0.0], 499, &[0.5, -1.0]).unwrap();
        let want = [(keep + add * 0.5) * 2.0 + 1.0, (keep * 2.0 - add) * 0.5 - 1.0];
        assert!((got[0] - want[0]).abs() < 1e-6 && (got[1] - want[1]).abs() < 1e-6, "{got:?} {want:?}");
        // Width 2: one frequency, of one radian a level.
        assert!(
            (f64::from(got[2]) - 499f64.cos()).abs() < 1e-6
                && (f64::from(got[3]) - 499f64.sin()).abs() < 1e-6
        );
        assert!(augmentor.augment(&[0.0], 0, &[0.0]).is_err());
    }
}
