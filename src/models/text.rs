//! How the text encoders of a model family make conditioning together.
//!
//! | family | encoders | hidden state | final norm | pooled state |
//! | --- | --- | --- | --- | --- |
//! | SD1.x | L | last | yes | of L |
//! | SD2.x | H | last but one | yes | of H, projected |
//! | SDXL | L and G, side by side | last but one | no | of G, projected |
//! | SDXL refiner | G | last but one | no | of G, projected |

use std::sync::Arc;

use super::ModelError;
use super::clip::{ClipText, Encoded, HiddenState, WeightedToken};
use super::detect::ClipVariant;
use crate::tensor::HostTensor;

/// A combination of text encoders that models were trained with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TextKind {
    /// CLIP ViT-L.
    Sd1,
    /// OpenCLIP ViT-H.
    Sd2,
    /// CLIP ViT-L and OpenCLIP ViT-bigG.
    Sdxl,
    /// OpenCLIP ViT-bigG.
    SdxlRefiner,
}

impl TextKind {
    /// The combination of these encoders, in any order; `None` if no model has it.
    pub fn of(variants: &[ClipVariant]) -> Option<Self> {
        let mut sorted = variants.to_vec();
        sorted.sort();
        match sorted.as_slice() {
            [ClipVariant::L] => Some(TextKind::Sd1),
            [ClipVariant::H] => Some(TextKind::Sd2),
            [ClipVariant::L, ClipVariant::G] => Some(TextKind::Sdxl),
            [ClipVariant::G] => Some(TextKind::SdxlRefiner),
            _ => None,
        }
    }

    /// The hidden state that becomes conditioning: `layer` counts from the end, -1 is the last.
    fn hidden_state(self, layer: Option<i64>) -> HiddenState {
        let default = if self == TextKind::Sd1 { -1 } else { -2 };
        let skip_last = usize::try_from(-1 - layer.unwrap_or(default)).unwrap_or(0);
        HiddenState { skip_last, is_normed: matches!(self, TextKind::Sd1 | TextKind::Sd2) }
    }
}

/// A text encoder with a prompt's chunks in its own tokens.
pub struct TextPart {
    /// The encoder.
    pub encoder: Arc<ClipText>,
    /// The prompt.
    pub chunks: Vec<Vec<WeightedToken>>,
}

/// Encodes a prompt with one encoder or two. Two are given in the order L, G: their
/// states stand side by side, cut to the shorter if the prompts differ in chunks, and
/// the last one's pooled state is used.
///
/// # Errors
/// If an encoder fails or `parts` is empty.
pub fn encode(kind: TextKind, parts: &[TextPart], layer: Option<i64>) -> Result<Encoded, ModelError> {
    let state = kind.hidden_state(layer);
    let mut joined: Option<Encoded> = None;
    for part in parts {
        let next = part.encoder.encode(&part.chunks, state)?;
        joined = Some(match joined {
            None => next,
            Some(first) => Encoded { cond: side_by_side(&first.cond, &next.cond)?, pooled: next.pooled },
        });
    }
    joined.ok_or(ModelError::Input { what: "text encoders of a model", expected: 1, found: 0 })
}

/// `[1, T, A]` and `[1, T', B]` as `[1, min(T, T'), A + B]`.
fn side_by_side(a: &HostTensor, b: &HostTensor) -> Result<HostTensor, ModelError> {
    let (tokens, width) = (a.dim(1).min(b.dim(1)), a.dim(2) + b.dim(2));
    let mut data = Vec::with_capacity(tokens * width);
    for (a, b) in a.data().chunks_exact(a.dim(2)).zip(b.data().chunks_exact(b.dim(2))) {
        data.extend_from_slice(a);
        data.extend_from_slice(b);
    }
    let found = data.len();
    HostTensor::new(&[1, tokens, width], data).ok_or(ModelError::Input {
        what: "elements of two joined text encodings",
        expected: tokens * width,
        found,
    })
}
