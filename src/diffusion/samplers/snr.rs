//! Signal-to-noise coordinates of a noise level, and ancestral step splitting.
//!
//! A noisy latent is `alpha·x0 + sigma·noise`. Models of the variance-exploding
//! kind have `alpha = 1`; rectified-flow models have `alpha = 1 − sigma`.
//! Exponential integrators (DPM-Solver++, SEEDS, …) step in the half log-SNR
//! `lambda = ln(alpha / sigma)`.
//!
//! Source: Lu et al., "DPM-Solver++", 2022; Lipman et al., "Flow matching", 2023.

/// How `alpha` follows from `sigma`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnrSpace {
    /// `alpha = 1`.
    VarianceExploding,
    /// `alpha = 1 − sigma`.
    Flow,
}

impl SnrSpace {
    /// Half log-SNR at `sigma`.
    pub fn lambda(self, sigma: f64) -> f64 {
        match self {
            SnrSpace::VarianceExploding => -sigma.ln(),
            SnrSpace::Flow => ((1.0 - sigma) / sigma).ln(),
        }
    }

    /// The noise level with half log-SNR `lambda`.
    pub fn sigma(self, lambda: f64) -> f64 {
        match self {
            SnrSpace::VarianceExploding => (-lambda).exp(),
            SnrSpace::Flow => 1.0 / (1.0 + lambda.exp()),
        }
    }

    /// The signal's factor at `sigma`.
    pub fn alpha(self, sigma: f64) -> f64 {
        match self {
            SnrSpace::VarianceExploding => 1.0,
            SnrSpace::Flow => 1.0 - sigma,
        }
    }

    /// Splits the step `from → to` into a deterministic step to `down`, a
    /// rescaling and fresh noise. `eta` 0 is fully deterministic, 1 is ancestral.
    pub(super) fn ancestral(self, from: f64, to: f64, eta: f64) -> Ancestral {
        match self {
            SnrSpace::VarianceExploding => {
                let (down, up) = split_variance(from, to, eta);
                Ancestral { down, rescale: 1.0, up }
            }
            SnrSpace::Flow => {
                let down = to * (1.0 + (to / from - 1.0) * eta);
                let rescale = (1.0 - to) / (1.0 - down);
                let up = (to * to - (down * rescale).powi(2)).max(0.0).sqrt();
                Ancestral { down, rescale, up }
            }
        }
    }
}

/// An ancestral step in parts: `x(to) = rescale · x(down) + up · noise`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ancestral {
    /// Where the deterministic part ends.
    pub down: f64,
    /// Factor on the latent before noise is added.
    pub rescale: f64,
    /// Standard deviation of the fresh noise.
    pub up: f64,
}

/// Variance-exploding split: `down² + up² = to²`.
///
/// In f32 on purpose: where `from` is huge (zero-SNR schedules) `down` is the
/// difference of nearly equal squares, and its rounding is part of the result.
pub(super) fn split_variance(from: f64, to: f64, eta: f64) -> (f64, f64) {
    if eta == 0.0 {
        return (to, 0.0);
    }
    let (from, to) = (from as f32, to as f32);
    let up = to.min(eta as f32 * (to * to * (from * from - to * to) / (from * from)).sqrt());
    let down = (to * to - up * up).sqrt();
    (f64::from(down), f64::from(up))
}
