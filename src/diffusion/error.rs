//! What can go wrong between a latent and its denoised version.

use super::noise::BrownianError;

/// Why a sampling run ended early.
#[derive(Debug, thiserror::Error)]
pub enum DiffusionError {
    /// The caller asked to stop.
    #[error("interrupted")]
    Interrupted,
    /// Two tensors that must agree do not.
    #[error("{what} has shape {got:?}, but {want:?} is needed")]
    Shape {
        /// Which tensor.
        what: &'static str,
        /// Its shape.
        got: Vec<usize>,
        /// The shape that fits.
        want: Vec<usize>,
    },
    /// A list that must not be empty is.
    #[error("{what} is empty: {hint}")]
    Empty {
        /// Which list.
        what: &'static str,
        /// What to do.
        hint: &'static str,
    },
    /// A sampler's setting is outside what the method allows.
    #[error("sampler {sampler}: {what}")]
    Sampler {
        /// Name of the method.
        sampler: &'static str,
        /// What is wrong and what to do.
        what: String,
    },
    /// The noise of an SDE sampler cannot be made.
    #[error(transparent)]
    Brownian(#[from] BrownianError),
    /// The model failed.
    #[error("model: {0}")]
    Model(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl DiffusionError {
    /// Wraps a failure of the model.
    pub fn model(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        DiffusionError::Model(error.into())
    }
}
