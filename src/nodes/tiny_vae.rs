//! TAESD by name: tiny autoencoders in the folder `vae_approx`, for VAELoader and for previews.

use std::sync::Arc;

use super::loaders::VaeHandle;
use super::{NodeError, Services};
use crate::files::{Folders, ModelPath};
use crate::models::taesd::{Taesd, Tiny};
use crate::models::{ModelError, ModelFile, ModelSource};

const FOLDER: &str = "vae_approx";

/// Names in VAELoader, and the factor from latents on links to the network's.
const NAMES: &[(&str, f32)] = &[("taesd", 0.18215), ("taesdxl", 0.13025)];

/// What a tiny autoencoder needs besides its decoder.
#[derive(Clone)]
pub struct TinyVae {
    encoder: Arc<ModelFile>,
    latent_scale: f32,
}

impl TinyVae {
    /// The autoencoder, loaded.
    pub(super) fn open(&self, decoder: &ModelFile) -> Result<Taesd, ModelError> {
        Ok(Taesd {
            encoder: self.encoder.network::<Tiny>()?,
            decoder: decoder.network::<Tiny>()?,
            latent_scale: self.latent_scale,
        })
    }
}

/// The first file of the folder whose name is `stem` and an ending.
fn file_named(folders: &Folders, stem: &str) -> Option<String> {
    let begins = |name: &String| name.strip_prefix(stem).is_some_and(|rest| rest.starts_with('.'));
    folders.list_models(FOLDER).into_iter().find(begins)
}

fn open(services: &Services, stem: &str) -> Option<Arc<ModelFile>> {
    let name = file_named(&services.folders, stem)?;
    match services.folders.model_path(FOLDER, &name).ok()? {
        ModelPath::File(path) => Some(services.models.file(ModelSource::File(path))),
        ModelPath::Embedded { name, bytes } => {
            Some(services.models.file(ModelSource::Embedded { name, bytes }))
        }
    }
}

/// The entries of VAELoader: files, then the tiny autoencoders whose two files are there.
pub fn vae_names(folders: &Folders) -> Vec<String> {
    let mut names = folders.list_models("vae");
    let is_complete = |name: &&str| {
        ["encoder", "decoder"].iter().all(|part| file_named(folders, &format!("{name}_{part}")).is_some())
    };
    names.extend(NAMES.iter().map(|(name, _)| *name).filter(is_complete).map(str::to_owned));
    names
}

/// The tiny autoencoder of that name; `None` if it is no such name.
pub(super) fn named(services: &Services, name: &str) -> Option<Result<VaeHandle, NodeError>> {
    let (_, latent_scale) = NAMES.iter().find(|(known, _)| *known == name)?;
    let part = |part: &str| {
        let stem = format!("{name}_{part}");
        open(services, &stem).ok_or_else(|| {
            NodeError::failed(
                "FileNotFoundError",
                format!("there is no {stem}.safetensors in models/{FOLDER}"),
            )
        })
    };
    let handle = || {
        let (encoder, file) = (part("encoder")?, part("decoder")?);
        Ok(VaeHandle { file, tiny: Some(TinyVae { encoder, latent_scale: *latent_scale }) })
    };
    Some(handle())
}

/// The decoder that previews of a model are made with, if its file is there.
pub(super) fn preview_decoder(services: &Services, stem: &str) -> Option<Arc<Tiny>> {
    let Some(file) = open(services, stem) else {
        tracing::warn!("previews by TAESD need models/{FOLDER}/{stem}.safetensors, which is not there");
        return None;
    };
    file.network::<Tiny>().inspect_err(|e| tracing::warn!("no previews by TAESD: {e}")).ok()
}
