//! Key layouts: how files name their tensors, and the names that this crate uses for them.
//!
//! The networks are built from one set of names: the UNet as in the latent-diffusion
//! code under `model.diffusion_model.`, text encoders as in the `transformers`
//! library (`….text_model.encoder.layers.0.…`), the VAE as in latent diffusion.
//! [`Names`] is a directory from these names to the tensors of a file that may
//! use others: OpenCLIP's names (SD2.x, SDXL), diffusers' names, or a UNet
//! without its prefix. Some tensors are parts of stored ones (a third of a fused
//! projection) or stored on their side (a transposed projection).
//!
//! What it is not: a copy of anything. Tensors stay views into the file.

mod diffusers_control;
mod diffusers_unet;
mod diffusers_vae;
pub mod open_clip;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::collections::BTreeMap;

use crate::tensor::{DType, RawTensor};
use crate::weights::WeightsFile;

/// Where a UNet is in a checkpoint.
const UNET_PREFIX: &str = "model.diffusion_model.";

/// Which part of a stored tensor a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    /// All of it.
    Whole,
    /// One of `of` equal slices along the first axis.
    Slice { index: usize, of: usize },
    /// All of it with its two axes exchanged.
    Transposed,
}

/// A tensor under this crate's name.
#[derive(Clone, Debug)]
struct Entry {
    /// Its name in the file.
    stored: String,
    part: Part,
    dtype: DType,
    shape: Vec<usize>,
}

/// The tensors of a file under this crate's names.
#[derive(Clone, Debug, Default)]
pub struct Names {
    entries: BTreeMap<String, Entry>,
}

/// Name, element type and shape as stored.
type Stored<'a> = (&'a str, DType, &'a [usize]);

/// What one stored tensor becomes.
type Renamed = Vec<(String, Part)>;

impl Names {
    /// The directory of `file`. Reads its header only.
    pub fn of(file: &WeightsFile) -> Self {
        Self::from_stored(file.infos().map(|t| (t.name, t.dtype, t.shape)))
    }

    /// The directory of `file` under the names it uses itself.
    pub fn as_stored(file: &WeightsFile) -> Self {
        let entry = |stored: &str, dtype, shape: &[usize]| Entry {
            stored: stored.to_owned(),
            part: Part::Whole,
            dtype,
            shape: shape.to_vec(),
        };
        let entries = file.infos().map(|t| (t.name.to_owned(), entry(t.name, t.dtype, t.shape)));
        Self { entries: entries.collect() }
    }

    /// The directory of tensors with these names, element types and shapes.
    pub fn from_stored<'a>(stored: impl IntoIterator<Item = Stored<'a>>) -> Self {
        let stored: BTreeMap<&str, (DType, &[usize])> =
            stored.into_iter().map(|(n, d, s)| (n, (d, s))).collect();
        let translate = Translator::of(&stored);
        let mut entries = BTreeMap::new();
        let mut renamed = Vec::new();
        for (&name, &(dtype, shape)) in &stored {
            match translate.rename(name) {
                Some(parts) => {
                    renamed.extend(parts.into_iter().map(|(to, part)| (to, part, name, dtype, shape)))
                }
                None => {
                    let entry =
                        Entry { stored: name.to_owned(), part: Part::Whole, dtype, shape: shape.to_vec() };
                    entries.insert(name.to_owned(), entry);
                }
            }
        }
        // A tensor under the right name has precedence over one that is renamed to it.
        for (to, part, name, dtype, shape) in renamed {
            let Some(shape) = shape_of(part, shape) else { continue };
            entries.entry(to).or_insert(Entry { stored: name.to_owned(), part, dtype, shape });
        }
        Self { entries }
    }

    /// Every name with element type and shape.
    pub fn iter(&self) -> impl Iterator<Item = (&str, (DType, &[usize]))> {
        self.entries.iter().map(|(name, e)| (name.as_str(), (e.dtype, e.shape.as_slice())))
    }

    /// The tensor of that name, from the file that the directory was made of.
    pub fn get<'a>(&'a self, file: &'a WeightsFile, name: &str) -> Option<RawTensor<'a>> {
        let entry = self.entries.get(name)?;
        let raw = file.get(&entry.stored)?;
        let bytes = match entry.part {
            Part::Whole => raw.bytes,
            Part::Slice { index, of } => {
                let len = raw.bytes.len() / of;
                match raw.bytes {
                    Cow::Borrowed(bytes) => Cow::Borrowed(bytes.get(index * len..(index + 1) * len)?),
                    Cow::Owned(bytes) => Cow::Owned(bytes.get(index * len..(index + 1) * len)?.to_vec()),
                }
            }
            Part::Transposed => {
                let [rows, columns] = *entry.shape.as_slice() else { return None };
                Cow::Owned(transposed(&raw.bytes, rows, columns, entry.dtype.size()))
            }
        };
        Some(RawTensor { dtype: entry.dtype, shape: &entry.shape, bytes })
    }

    /// The extents of the tensor of that name.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.entries.get(name).map(|e| e.shape.as_slice())
    }

    /// The name in the file of the tensor that holds `name`.
    pub fn stored_name(&self, name: &str) -> Option<&str> {
        self.entries.get(name).map(|e| e.stored.as_str())
    }
}

/// The shape of a part; `None` if the stored tensor has no such part.
fn shape_of(part: Part, stored: &[usize]) -> Option<Vec<usize>> {
    match (part, stored) {
        (Part::Whole, _) => Some(stored.to_vec()),
        (Part::Slice { of, .. }, [first, rest @ ..]) if first.is_multiple_of(of) => {
            Some([&[first / of], rest].concat())
        }
        (Part::Transposed, &[rows, columns]) => Some(vec![columns, rows]),
        _ => None,
    }
}

/// `[rows, columns]` from elements stored as `[columns, rows]`.
fn transposed(stored: &[u8], rows: usize, columns: usize, size: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(stored.len());
    for row in 0..rows {
        for column in 0..columns {
            let at = (column * rows + row) * size;
            out.extend_from_slice(stored.get(at..at + size).unwrap_or_default());
        }
    }
    out
}

/// What a file's names as a whole say about how to read them.
enum Translator {
    /// A UNet in the latent-diffusion layout without its prefix.
    BareUnet,
    /// A UNet of the diffusers library.
    DiffusersUnet(diffusers_unet::Blocks),
    /// A ControlNet of the diffusers library.
    DiffusersControl(diffusers_control::Control),
    /// A VAE of the diffusers library.
    DiffusersVae { levels: usize },
    /// Everything else: only OpenCLIP's names change.
    Other { has_bare_open_clip: bool },
}

impl Translator {
    fn of(stored: &BTreeMap<&str, (DType, &[usize])>) -> Self {
        let has = |name: &str| stored.contains_key(name);
        let is_control =
            stored.keys().any(|n| n.contains("input_hint_block.") || n.starts_with("controlnet_"));
        if has("input_blocks.0.0.weight") && !is_control {
            return Translator::BareUnet;
        }
        if has("conv_in.weight") && has("time_embedding.linear_1.weight") && !is_control {
            return Translator::DiffusersUnet(diffusers_unet::Blocks::of(stored.keys().copied()));
        }
        if has("controlnet_cond_embedding.conv_in.weight") {
            return Translator::DiffusersControl(diffusers_control::Control::of(stored.keys().copied()));
        }
        if has("decoder.up_blocks.0.resnets.0.conv1.weight") {
            let is_level =
                |i: &usize| stored.keys().any(|n| n.starts_with(&format!("decoder.up_blocks.{i}.")));
            return Translator::DiffusersVae { levels: (0..).take_while(is_level).count() };
        }
        Translator::Other { has_bare_open_clip: has("transformer.resblocks.0.ln_1.weight") }
    }

    /// What a stored tensor becomes; `None` if it keeps its name.
    fn rename(&self, name: &str) -> Option<Renamed> {
        let whole = |to: String| Some(vec![(to, Part::Whole)]);
        match self {
            Translator::BareUnet => whole(format!("{UNET_PREFIX}{name}")),
            Translator::DiffusersUnet(blocks) => whole(format!("{UNET_PREFIX}{}", blocks.rename(name)?)),
            Translator::DiffusersControl(control) => whole(control.rename(name)?),
            Translator::DiffusersVae { levels } => whole(diffusers_vae::rename(name, *levels)?),
            Translator::Other { has_bare_open_clip } => open_clip::rename(name, *has_bare_open_clip),
        }
    }
}
