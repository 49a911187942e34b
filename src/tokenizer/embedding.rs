//! Textual inversion: `embedding:NAME` in a prompt.
//!
//! It counts at the begin of a segment and after a blank or newline. The name
//! ends at white space. If there is none of that name, commas at its ends are
//! taken off and looked up again. A missing embedding is left out with a
//! warning; what stands behind it is kept either way.

use super::{EmbeddingLookup, EmbeddingRows};

const MARK: &str = "embedding:";

/// What a segment is made of.
pub(super) enum Part<'t> {
    /// Plain text.
    Text(&'t str),
    /// The vectors of an embedding.
    Rows(EmbeddingRows),
}

/// Calls `take` for every part of `text`, in order.
pub(super) fn for_each_part(text: &str, lookup: &dyn EmbeddingLookup, mut take: impl FnMut(Part<'_>)) {
    for piece in pieces(text) {
        let Some(body) = piece.strip_prefix(MARK) else {
            take(Part::Text(piece));
            continue;
        };
        let mut words = body.split(is_python_space).filter(|word| !word.is_empty());
        let Some(name) = words.next() else {
            tracing::warn!("\"embedding:\" without a name is left out");
            continue;
        };
        let (rows, leftover) = find(name, lookup);
        match rows {
            Some(rows) => take(Part::Rows(rows)),
            None => tracing::warn!(name, "embedding not found; it is left out of the prompt"),
        }
        let rest: Vec<&str> = leftover.as_deref().into_iter().chain(words).collect();
        if !rest.is_empty() {
            take(Part::Text(&rest.join(" ")));
        }
    }
}

/// Cuts `text` so that every piece but the first begins with the mark; empty pieces are left out.
fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let mut cuts = vec![0];
    for (at, _) in text.match_indices(MARK) {
        if text[..at].ends_with([' ', '\n']) {
            cuts.push(at);
        }
    }
    let ends: Vec<usize> = cuts.iter().skip(1).map(|&at| at - 1).chain([text.len()]).collect();
    cuts.into_iter()
        .zip(ends)
        .map(|(begin, end)| &text[begin..end.max(begin)])
        .filter(|piece| !piece.is_empty())
}

/// The rows of `name`, or of `name` without commas at its ends; in the second
/// case also the text that remains of the name: what lies beyond as many
/// characters as the bare name has.
fn find(name: &str, lookup: &dyn EmbeddingLookup) -> (Option<EmbeddingRows>, Option<String>) {
    let bare = name.trim_matches(',');
    let rows = if bare.is_empty() { None } else { lookup.rows(name) };
    if rows.is_some() || bare.len() == name.len() {
        return (rows, None);
    }
    let leftover = name.chars().skip(bare.chars().count()).collect();
    let rows = if bare.is_empty() { None } else { lookup.rows(bare) };
    (rows, Some(leftover))
}

/// Whether Python's `str.split` cuts here: Unicode white space and the four ASCII separators.
fn is_python_space(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\x1c'..='\x1f')
}
