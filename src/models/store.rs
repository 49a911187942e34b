//! Loaded models: opened once, shared by all prompts, unloaded on request.
//!
//! Nodes hold light handles to a [`Checkpoint`]. What is heavy — the memory
//! map and the packed weights — hangs off one slot of it, so [`ModelStore::unload_all`]
//! frees the memory while cached node outputs keep their handles; the next use
//! opens the file again.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::ModelError;
use super::clip::ClipText;
use super::detect::{self, Detected};
use super::layers::{Loader, WeightSource};
use super::unet::Unet;
use super::vae::Vae;
use crate::tensor::{Backend, RawTensor};
use crate::weights::{OpenOptions, WeightsFile};

/// Where a model file's bytes are.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ModelSource {
    /// A file.
    File(PathBuf),
    /// Bytes inside the binary.
    Embedded {
        /// Name for messages.
        name: &'static str,
        /// The whole file.
        bytes: &'static [u8],
    },
}

struct FileSource(Arc<WeightsFile>);

impl WeightSource for FileSource {
    fn raw(&self, name: &str) -> Option<RawTensor<'_>> {
        self.0.get(name)
    }

    fn packed(&self, name: &str) {
        self.0.release_pages(name);
    }
}

/// What hangs off an opened file.
struct Opened {
    file: Arc<WeightsFile>,
    detected: Detected,
    unet: OnceLock<Arc<Unet>>,
    clip: OnceLock<Arc<ClipText>>,
    vae: OnceLock<Arc<Vae>>,
}

/// A model file. Cheap to hold: its weights come and go.
pub struct Checkpoint {
    source: ModelSource,
    backend: Arc<dyn Backend>,
    options: OpenOptions,
    opened: Mutex<Option<Arc<Opened>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Checkpoint {
    fn open(&self) -> Result<Arc<Opened>, ModelError> {
        let mut slot = lock(&self.opened);
        if let Some(opened) = slot.as_ref() {
            return Ok(opened.clone());
        }
        let file = match &self.source {
            ModelSource::File(path) => WeightsFile::open_with(path, self.options),
            ModelSource::Embedded { name, bytes } => WeightsFile::from_static(bytes, name),
        }
        .map_err(|e| ModelError::File(e.to_string()))?;
        let detected = detect::detect(&file).map_err(|e| ModelError::File(e.to_string()))?;
        let opened = Arc::new(Opened {
            file,
            detected,
            unet: OnceLock::new(),
            clip: OnceLock::new(),
            vae: OnceLock::new(),
        });
        *slot = Some(opened.clone());
        Ok(opened)
    }

    /// What the file holds.
    pub fn detected(&self) -> Result<Detected, ModelError> {
        Ok(self.open()?.detected.clone())
    }

    fn part<T>(
        &self,
        cell: impl Fn(&Opened) -> &OnceLock<Arc<T>>,
        prefix: impl Fn(&Detected) -> Option<&str>,
        missing: &'static str,
        load: impl FnOnce(&Detected, &Loader) -> Result<T, ModelError>,
    ) -> Result<Arc<T>, ModelError> {
        let opened = self.open()?;
        if let Some(part) = cell(&opened).get() {
            return Ok(part.clone());
        }
        opened.file.verify_unchanged().map_err(|e| ModelError::File(e.to_string()))?;
        let prefix = prefix(&opened.detected)
            .ok_or_else(|| ModelError::File(format!("{} holds no {missing}", opened.file.path().display())))?;
        let source = Arc::new(FileSource(opened.file.clone()));
        let loader = Loader::new(source, self.backend.clone(), prefix);
        let part = Arc::new(load(&opened.detected, &loader)?);
        Ok(cell(&opened).get_or_init(|| part).clone())
    }

    /// The diffusion model.
    pub fn unet(&self) -> Result<Arc<Unet>, ModelError> {
        let backend = self.backend.clone();
        self.part(
            |o| &o.unet,
            |d| d.unet.as_ref().map(|p| p.prefix.as_str()),
            "diffusion model",
            |d, loader| match &d.unet {
                Some(part) => Unet::load(part.config.clone(), backend, loader),
                None => Err(ModelError::Missing { name: "model.diffusion_model".into() }),
            },
        )
    }

    /// The text encoder.
    pub fn clip(&self) -> Result<Arc<ClipText>, ModelError> {
        let backend = self.backend.clone();
        self.part(
            |o| &o.clip,
            |d| d.clip.as_ref().map(|p| p.prefix.as_str()),
            "text encoder",
            |d, loader| match &d.clip {
                Some(part) => ClipText::load(part.config.clone(), backend, loader),
                None => Err(ModelError::Missing { name: "cond_stage_model".into() }),
            },
        )
    }

    /// The autoencoder.
    pub fn vae(&self) -> Result<Arc<Vae>, ModelError> {
        let backend = self.backend.clone();
        self.part(
            |o| &o.vae,
            |d| d.vae.as_ref().map(|p| p.prefix.as_str()),
            "VAE",
            |d, loader| match &d.vae {
                Some(part) => Vae::load(part.config.clone(), backend, loader),
                None => Err(ModelError::Missing { name: "first_stage_model".into() }),
            },
        )
    }

    /// Drops the memory map and all packed weights; they come back on the next use.
    fn unload(&self) {
        *lock(&self.opened) = None;
    }
}

/// Loaded models and the backend they run on.
pub struct ModelStore {
    backend: Arc<dyn Backend>,
    options: OpenOptions,
    checkpoints: Mutex<HashMap<ModelSource, Arc<Checkpoint>>>,
}

impl ModelStore {
    /// An empty store.
    pub fn new(backend: Arc<dyn Backend>, options: OpenOptions) -> Self {
        Self { backend, options, checkpoints: Mutex::default() }
    }

    /// The backend that models run on.
    pub fn backend(&self) -> &Arc<dyn Backend> {
        &self.backend
    }

    /// The checkpoint at `source`. A file that changed on disk since it was
    /// opened is opened anew.
    pub fn checkpoint(&self, source: ModelSource) -> Arc<Checkpoint> {
        let mut all = lock(&self.checkpoints);
        let entry = all.entry(source.clone()).or_insert_with(|| {
            Arc::new(Checkpoint {
                source,
                backend: self.backend.clone(),
                options: self.options,
                opened: Mutex::new(None),
            })
        });
        let is_stale = lock(&entry.opened).as_ref().is_some_and(|o| o.file.verify_unchanged().is_err());
        if is_stale {
            entry.unload();
        }
        entry.clone()
    }

    /// Frees every model's memory. Handles stay valid and load again when used.
    pub fn unload_all(&self) {
        lock(&self.checkpoints).values().for_each(|c| c.unload());
        self.trim();
    }

    /// Gives free arena memory back to the system.
    pub fn trim(&self) {
        self.backend.trim();
    }
}
