//! Text → token ids: CLIP's byte-pair encoding, prompt weights, textual inversion, chunks of 77.
//!
//! A prompt passes four stages, one file each:
//!
//! 1. `emphasis`: `(text:1.3)` and friends cut it into segments with weights,
//! 2. `embedding`: `embedding:NAME` inside a segment becomes rows of numbers,
//! 3. `bpe`: the rest becomes token ids,
//! 4. `chunk`: tokens are packed into chunks of 77 with start, end and padding.
//!
//! The rules are ComfyUI's, so that a prompt means the same picture. Ids are
//! those of the `transformers` 5 tokenizer (version 4 without ftfy spaces out
//! CJK text and drops control characters: other ids for the same prompt).
//!
//! ```
//! use kiln::tokenizer::{NoEmbeddings, Token, TokenizerOptions, tokenize};
//! let chunks = tokenize("a (cat:1.3)", &TokenizerOptions::sd1(), &NoEmbeddings);
//! assert_eq!(chunks.len(), 1);
//! assert_eq!(chunks[0][2], (Token::Id(2368), 1.3));
//! ```

mod bpe;
mod chunk;
mod embedding;
mod emphasis;
mod python_float;

use std::sync::Arc;

pub use bpe::encode;

/// Marks the begin of every chunk.
pub const START_TOKEN: u32 = 49406;
/// Marks the end of the text in every chunk.
pub const END_TOKEN: u32 = 49407;
/// Tokens in a chunk, start and end included.
pub const CHUNK_TOKENS: usize = 77;

/// One place of a text encoder's input.
#[derive(Clone, Debug, PartialEq)]
pub enum Token {
    /// A row of the encoder's embedding table.
    Id(u32),
    /// A row given in full, by textual inversion.
    Vector(Arc<[f32]>),
}

/// What differs between the text encoders that share CLIP's vocabulary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenizerOptions {
    /// Fills a chunk after its end token.
    pub pad_token: u32,
}

impl TokenizerOptions {
    /// CLIP ViT-L of SD1.x and SDXL: padded with the end token.
    pub fn sd1() -> Self {
        Self { pad_token: END_TOKEN }
    }

    /// OpenCLIP ViT-H and ViT-bigG of SD2.x and SDXL: padded with token 0.
    pub fn open_clip() -> Self {
        Self { pad_token: 0 }
    }
}

/// The vectors of an embedding, one a token place.
pub type EmbeddingRows = Vec<Arc<[f32]>>;

/// Where the vectors of textual inversion come from.
pub trait EmbeddingLookup {
    /// The vectors of embedding `name`, as wide as the text encoder, or `None` if there is none of that name.
    fn rows(&self, name: &str) -> Option<EmbeddingRows>;
}

impl<F: Fn(&str) -> Option<EmbeddingRows>> EmbeddingLookup for F {
    fn rows(&self, name: &str) -> Option<EmbeddingRows> {
        self(name)
    }
}

/// Knows no embedding: every `embedding:NAME` is left out.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoEmbeddings;

impl EmbeddingLookup for NoEmbeddings {
    fn rows(&self, _name: &str) -> Option<EmbeddingRows> {
        None
    }
}

/// The chunks of `text`: at least one, each of [`CHUNK_TOKENS`] tokens with their weights.
///
/// Start, end and padding have weight 1. Weights are computed in f64, as
/// Python does, and rounded to f32 here.
pub fn tokenize(
    text: &str,
    options: &TokenizerOptions,
    embeddings: &dyn EmbeddingLookup,
) -> Vec<Vec<(Token, f32)>> {
    let mut packer = chunk::Packer::new(options.pad_token);
    for segment in emphasis::segments(text) {
        let weight = segment.weight as f32;
        embedding::for_each_part(&segment.text, embeddings, |part| {
            let tokens: Vec<_> = match part {
                embedding::Part::Rows(rows) => rows.into_iter().map(Token::Vector).collect(),
                embedding::Part::Text(text) => encode(text).into_iter().map(Token::Id).collect(),
            };
            packer.push(tokens, weight);
        });
    }
    packer.finish()
}

#[cfg(test)]
mod tests;
