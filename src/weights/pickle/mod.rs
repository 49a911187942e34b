//! PyTorch's own files (`.pt`, `.pth`, `.ckpt`, `.bin`), read without running anything.
//!
//! Such a file is a pickle, a program for a small stack machine, beside the raw
//! bytes of its tensors. Python's machine may call any function that the
//! program names; the [`machine`] here builds plain values only and knows the few
//! functions that make tensors and dictionaries. Every other name makes an inert
//! placeholder: trainers leave callbacks and settings beside the weights, which
//! nobody here asks for. A *tensor* that some unknown function would make is an
//! error that names the function.
//!
//! Two containers exist: since PyTorch 1.6 a zip whose members are stored, not
//! deflated ([`archive`]), so that tensors are views into the memory map; before,
//! pickles in a row and then the storages ([`legacy`]). What a file's nested
//! dictionaries become as a flat list of names is told in [`flatten`].
//!
//! What it is not: a check of the zip's checksums (a checkpoint would have to be
//! read in full), or a reader of TorchScript and of quantised or sparse tensors.

mod archive;
mod error;
mod flatten;
mod legacy;
mod machine;
mod reduce;
mod tensors;
#[cfg(test)]
mod tests;
mod value;

use std::collections::HashMap;
use std::ops::Range;

use super::header::Header;
pub use error::PickleFault;
use value::{Graph, Id};

/// A container that was taken apart.
struct Contents {
    graph: Graph,
    root: Id,
    /// Where the bytes of the storages are in the file.
    storages: HashMap<String, Range<usize>>,
}

/// Whether `bytes` begin like a zip archive or a binary pickle.
pub(super) fn is_likely(bytes: &[u8]) -> bool {
    is_archive(bytes) || matches!(bytes, [0x80, 2..=5, ..])
}

fn is_archive(bytes: &[u8]) -> bool {
    bytes.starts_with(b"PK\x03\x04")
}

/// The tensors of a file whose whole content is `bytes`, in the order of its dictionaries.
pub(super) fn parse(bytes: &[u8]) -> Result<Header, PickleFault> {
    let contents = if is_archive(bytes) { archive::read(bytes)? } else { legacy::read(bytes)? };
    let Contents { graph, root, storages } = &contents;
    if !graph.foreign.is_empty() {
        let names: Vec<&str> = graph.foreign.iter().map(String::as_str).collect();
        tracing::debug!("names in a pickle that were not called: {}", names.join(", "));
    }
    let flat = flatten::flatten(graph, *root)?;
    let mut gathered = tensors::Gathering::new(bytes);
    let mut entries = Vec::with_capacity(flat.tensors.len());
    for (name, tensor) in flat.tensors {
        let place = storages
            .get(&tensor.storage.key)
            .ok_or_else(|| PickleFault::NoStorage { name: name.clone(), key: tensor.storage.key.clone() })?;
        entries.push(gathered.entry(name, tensor, place.clone())?);
    }
    Ok(Header { tensors: entries, metadata: flat.metadata })
}
