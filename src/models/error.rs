//! Errors of loading and running a model.

use crate::tensor::{BodyError, TensorError};

/// Why a model can't be loaded or run.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A tensor op failed.
    #[error(transparent)]
    Tensor(#[from] TensorError),
    /// The file lacks a tensor.
    #[error("the model file has no tensor '{name}'; it is incomplete or of another family")]
    Missing {
        /// The tensor.
        name: String,
    },
    /// A tensor has an unexpected shape.
    #[error(
        "tensor '{name}' has shape {found:?}, expected {expected:?}; the file is damaged or of another family"
    )]
    Shape {
        /// The tensor.
        name: String,
        /// What the architecture needs.
        expected: Vec<usize>,
        /// What the file has.
        found: Vec<usize>,
    },
    /// An input doesn't fit the model.
    #[error("{what} must be {expected}, found {found}")]
    Input {
        /// Which property.
        what: &'static str,
        /// What the model needs.
        expected: usize,
        /// What was given.
        found: usize,
    },
    /// A network gave something that is no number, from numbers.
    #[error("the {network}'s result is not a number (NaN or infinite): {advice}")]
    NotANumber {
        /// Which network.
        network: &'static str,
        /// Why that may be and what to do.
        advice: &'static str,
    },
    /// The file can't be used.
    #[error("{0}")]
    File(String),
}

/// Advice for a network that fails by itself.
const DAMAGED: &str = "its weights are damaged, get the file again; or they overflow half precision, use a file \
                       that was made for it";
/// Advice for a network that fails under patches only.
const PATCHED: &str = "without the LoRAs or merges on it it is one; one of them is damaged or too strong, get its file \
                       again or lower its strength";
/// Advice for a network that fails under hooks only.
const HOOKED: &str = "without the patches of its inside on it (FreeU, HyperTile, …) it is one; weaken or remove them, or \
                      use a larger picture";

impl ModelError {
    /// `network` gives no number by itself.
    pub fn damaged(network: &'static str) -> Self {
        Self::NotANumber { network, advice: DAMAGED }
    }

    /// `network` gives no number under patches, and one without them.
    pub fn damaged_by_patches(network: &'static str) -> Self {
        Self::NotANumber { network, advice: PATCHED }
    }

    /// `network` gives no number under hooks, and one without them.
    pub fn damaged_by_hooks(network: &'static str) -> Self {
        Self::NotANumber { network, advice: HOOKED }
    }

    /// From the error of recorded work, which is one of these or a backend's own.
    pub(crate) fn from_recorded(error: BodyError) -> Self {
        match error.downcast::<Self>() {
            Ok(error) => *error,
            Err(error) => match error.downcast::<TensorError>() {
                Ok(error) => Self::Tensor(*error),
                Err(error) => Self::Tensor(TensorError::Device(error.to_string())),
            },
        }
    }

    /// Checks that `network` made numbers of numbers. What was no number before is let through.
    ///
    /// # Errors
    /// [`NotANumber`](Self::NotANumber).
    pub fn check_numbers(network: &'static str, input: &[f32], output: &[f32]) -> Result<(), Self> {
        let are_numbers = |values: &[f32]| values.iter().all(|v| v.is_finite());
        if are_numbers(output) || !are_numbers(input) { Ok(()) } else { Err(Self::damaged(network)) }
    }

    /// Whether memory ran out, so that a smaller piece of work may succeed.
    pub fn is_out_of_memory(&self) -> bool {
        matches!(self, ModelError::Tensor(TensorError::OutOfMemory { .. }))
    }
}
