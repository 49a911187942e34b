//! CLIP's byte-pair encoding of plain text.
//!
//! The merges are `instant-clip-tokenizer`'s. What it lacks against the
//! tokenizer that models are used with is done here: Unicode normalisation
//! (NFC), lower-casing letter by letter (no special case for a final sigma), and the
//! spelling of the two marker tokens.

use std::sync::LazyLock;

use instant_clip_tokenizer::Tokenizer;
use unicode_normalization::UnicodeNormalization;
use unicode_normalization::char::is_combining_mark;

use super::{END_TOKEN, START_TOKEN};

static VOCABULARY: LazyLock<Tokenizer> = LazyLock::new(Tokenizer::new);

/// The thread that splits words, if the system has one more: the vocabulary's pattern keeps
/// 90 KB for every thread that used it, and prompts run on threads that come and go.
static SPLITTER: LazyLock<Option<rayon::ThreadPool>> = LazyLock::new(|| {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).thread_name(|_| "kiln-words".to_owned());
    pool.build().ok()
});

/// Spellings in a prompt that stand for a single token, in this case only.
const MARKERS: [(&str, u32); 2] = [("<|startoftext|>", START_TOKEN), ("<|endoftext|>", END_TOKEN)];
/// Spellings that the vocabulary crate takes for markers, and the same words written so that it does not.
const NOT_MARKERS: [(&str, &str); 2] =
    [("<start_of_text>", "< start_of_text>"), ("<end_of_text>", "< end_of_text>")];

/// The token ids of `text`, without start and end.
pub fn encode(text: &str) -> Vec<u32> {
    let mut ids = Vec::new();
    let mut rest = text;
    while let Some((at, spelling, id)) = next_marker(rest) {
        encode_words(&rest[..at], &mut ids);
        ids.push(id);
        rest = &rest[at + spelling.len()..];
    }
    encode_words(rest, &mut ids);
    ids
}

/// Where the first marker is, and which.
fn next_marker(text: &str) -> Option<(usize, &'static str, u32)> {
    let at = |(spelling, id): (&'static str, u32)| text.find(spelling).map(|at| (at, spelling, id));
    MARKERS.into_iter().filter_map(at).min()
}

/// Appends the ids of text that has no markers.
fn encode_words(text: &str, ids: &mut Vec<u32>) {
    let mut normal: String = text.nfc().flat_map(char::to_lowercase).collect();
    for (spelling, _) in MARKERS {
        if normal.contains(spelling) {
            normal = end_word_after(&normal, spelling);
        }
    }
    for (spelling, apart) in NOT_MARKERS {
        if normal.contains(spelling) {
            normal = normal.replace(spelling, apart);
        }
    }
    let mut tokens = Vec::new();
    let mut split = || VOCABULARY.encode(&normal, &mut tokens);
    match &*SPLITTER {
        Some(thread) => thread.install(&mut split),
        None => split(),
    }
    ids.extend(tokens.into_iter().map(|token| u32::from(token.to_u16())));
}

/// A marker that only lower-casing brought about is no token, but its end still ends a word (so that punctuation
/// behind it stays apart) unless it stands in the middle of a run of punctuation.
fn end_word_after(text: &str, spelling: &str) -> String {
    let mut out = String::with_capacity(text.len() + 1);
    let mut rest = text;
    while let Some(at) = rest.find(spelling) {
        let (before, found) = rest.split_at(at);
        let (marker, after) = found.split_at(spelling.len());
        out.push_str(before);
        let begins_word = out.chars().next_back().is_none_or(|c| c.is_whitespace() || is_letter_or_number(c));
        out.push_str(marker);
        if begins_word {
            out.push(' ');
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

/// Unicode categories L and N, as the vocabulary's word pattern has them.
fn is_letter_or_number(c: char) -> bool {
    c.is_alphanumeric() && !is_combining_mark(c)
}
