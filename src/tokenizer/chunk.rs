//! Packs tokens into chunks of 77.
//!
//! A chunk is start, up to 75 tokens, end, padding. What is pushed together
//! stays together if it is short: fewer than eight tokens that do not fit go
//! whole to the next chunk, more are cut at the border.

use super::{CHUNK_TOKENS, END_TOKEN, START_TOKEN, Token};

/// Groups from this length on may be cut.
const DIVISIBLE_TOKENS: usize = 8;

/// Collects chunks.
pub(super) struct Packer {
    pad_token: u32,
    full: Vec<Vec<(Token, f32)>>,
    current: Vec<(Token, f32)>,
}

impl Packer {
    pub(super) fn new(pad_token: u32) -> Self {
        Self { pad_token, full: Vec::new(), current: Self::begin() }
    }

    /// Adds a group of tokens under one weight.
    pub(super) fn push(&mut self, group: Vec<Token>, weight: f32) {
        let is_divisible = group.len() >= DIVISIBLE_TOKENS;
        if !is_divisible && group.len() > self.room() {
            self.close();
        }
        for token in group {
            if self.room() == 0 {
                self.close();
            }
            self.current.push((token, weight));
        }
    }

    /// All chunks; at least one.
    pub(super) fn finish(mut self) -> Vec<Vec<(Token, f32)>> {
        self.close();
        self.full
    }

    fn begin() -> Vec<(Token, f32)> {
        let mut chunk = Vec::with_capacity(CHUNK_TOKENS);
        chunk.push((Token::Id(START_TOKEN), 1.0));
        chunk
    }

    /// Places before the end token.
    fn room(&self) -> usize {
        (CHUNK_TOKENS - 1).saturating_sub(self.current.len())
    }

    fn close(&mut self) {
        let mut chunk = std::mem::replace(&mut self.current, Self::begin());
        chunk.push((Token::Id(END_TOKEN), 1.0));
        chunk.resize(CHUNK_TOKENS, (Token::Id(self.pad_token), 1.0));
        self.full.push(chunk);
    }
}
