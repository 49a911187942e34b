//! Loaded models: opened once, shared by all prompts, unloaded on request.
//!
//! Nodes hold light handles to a [`ModelFile`]. What is heavy — the memory
//! map and the packed weights — hangs off one slot of it, so
//! [`ModelStore::unload_all`] frees the memory while cached node outputs keep
//! their handles; the next use opens the file again.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::ModelError;
use super::clip::ClipText;
use super::detect::{self, ClipConfig, DetectError, Kind, SamplingConfig, VaeConfig};
use super::layers::{Loader, WeightSource};
use super::unet::Unet;
use super::vae::Vae;
use crate::tensor::{Backend, Placement, RawTensor};
use crate::weights::{OpenOptions, WeightsError, WeightsFile};

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

impl From<DetectError> for ModelError {
    fn from(e: DetectError) -> Self {
        ModelError::File(e.to_string())
    }
}

impl From<WeightsError> for ModelError {
    fn from(e: WeightsError) -> Self {
        ModelError::File(e.to_string())
    }
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
    /// What the file says about itself; `None` for a VAE's own file.
    checkpoint: Option<detect::Checkpoint>,
    unet: OnceLock<Arc<Unet>>,
    clip: OnceLock<Arc<ClipText>>,
    vae: OnceLock<Arc<Vae>>,
}

impl Opened {
    fn lacks(&self, what: &str) -> ModelError {
        ModelError::File(format!(
            "{} holds no {what}; load one from another file",
            self.file.path().display()
        ))
    }

    fn checkpoint(&self, what: &str) -> Result<&detect::Checkpoint, ModelError> {
        self.checkpoint.as_ref().ok_or_else(|| self.lacks(what))
    }

    /// Whether nobody else holds the file or one of its networks.
    fn is_idle(self: &Arc<Self>) -> bool {
        fn unused<T>(cell: &OnceLock<Arc<T>>) -> bool {
            cell.get().is_none_or(|part| Arc::strong_count(part) == 1)
        }
        Arc::strong_count(self) == 1 && unused(&self.unet) && unused(&self.clip) && unused(&self.vae)
    }

    fn clip_config(&self) -> Result<ClipConfig, ModelError> {
        self.checkpoint("text encoder")?.clip.clone().ok_or_else(|| self.lacks("text encoder"))
    }

    fn vae_config(&self) -> Result<VaeConfig, ModelError> {
        match &self.checkpoint {
            Some(checkpoint) => checkpoint.vae.clone().ok_or_else(|| self.lacks("VAE")),
            None => Ok(detect::detect_vae(&self.file)?),
        }
    }
}

/// A model file. Cheap to hold: its weights come and go.
pub struct ModelFile {
    source: ModelSource,
    placement: Placement,
    options: OpenOptions,
    opened: Mutex<Option<Arc<Opened>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ModelFile {
    fn open(&self) -> Result<Arc<Opened>, ModelError> {
        let mut slot = lock(&self.opened);
        if let Some(opened) = slot.as_ref() {
            return Ok(opened.clone());
        }
        let file = match &self.source {
            ModelSource::File(path) => WeightsFile::open_with(path, self.options)?,
            ModelSource::Embedded { name, bytes } => WeightsFile::from_static(bytes, name)?,
        };
        let checkpoint = match detect::kind_of(&file) {
            Kind::Vae => None,
            _ => Some(detect::detect(&file)?),
        };
        let (unet, clip, vae) = (OnceLock::new(), OnceLock::new(), OnceLock::new());
        let opened = Arc::new(Opened { file, checkpoint, unet, clip, vae });
        *slot = Some(opened.clone());
        Ok(opened)
    }

    /// A network of the file, loaded when first asked for.
    fn part<C, T>(
        &self,
        cell: impl Fn(&Opened) -> &OnceLock<Arc<T>>,
        config: impl FnOnce(&Opened) -> Result<C, ModelError>,
        prefix: impl FnOnce(&C) -> String,
        place: impl FnOnce(&Placement) -> &Arc<dyn Backend>,
        load: impl FnOnce(C, Arc<dyn Backend>, &Loader) -> Result<T, ModelError>,
    ) -> Result<Arc<T>, ModelError> {
        let opened = self.open()?;
        if let Some(part) = cell(&opened).get() {
            return Ok(part.clone());
        }
        opened.file.verify_unchanged()?;
        let config = config(&opened)?;
        let source = Arc::new(FileSource(opened.file.clone()));
        let backend = place(&self.placement).clone();
        let loader = Loader::new(source, backend.clone(), &prefix(&config));
        let part = Arc::new(load(config, backend, &loader)?);
        Ok(cell(&opened).get_or_init(|| part).clone())
    }

    /// What samplers must know about the diffusion model.
    pub fn sampling(&self) -> Result<SamplingConfig, ModelError> {
        Ok(self.open()?.checkpoint("diffusion model")?.sampling)
    }

    /// The diffusion model.
    pub fn unet(&self) -> Result<Arc<Unet>, ModelError> {
        let config = |o: &Opened| Ok(o.checkpoint("diffusion model")?.unet.clone());
        self.part(|o| &o.unet, config, |c| c.prefix.clone(), |p| &p.diffusion, Unet::load)
    }

    /// The text encoder.
    pub fn clip(&self) -> Result<Arc<ClipText>, ModelError> {
        self.part(|o| &o.clip, Opened::clip_config, |c| c.prefix.clone(), |p| &p.text, ClipText::load)
    }

    /// The autoencoder.
    pub fn vae(&self) -> Result<Arc<Vae>, ModelError> {
        self.part(|o| &o.vae, Opened::vae_config, |c| c.prefix.clone(), |p| &p.vae, Vae::load)
    }

    /// Unloads unless a network of the file is at work. Returns whether it did.
    fn unload_if_idle(&self) -> bool {
        let Ok(mut slot) = self.opened.try_lock() else { return false };
        let is_idle = slot.as_ref().is_some_and(|opened| opened.is_idle());
        if is_idle {
            *slot = None;
        }
        is_idle
    }

    /// Drops the memory map and all packed weights; they come back on the next use.
    fn unload(&self) {
        *lock(&self.opened) = None;
    }
}

/// Loaded models and the backends they run on.
pub struct ModelStore {
    placement: Placement,
    options: OpenOptions,
    files: Arc<Mutex<HashMap<ModelSource, Arc<ModelFile>>>>,
}

impl ModelStore {
    /// An empty store.
    pub fn new(placement: Placement, options: OpenOptions) -> Self {
        let files = Arc::<Mutex<HashMap<ModelSource, Arc<ModelFile>>>>::default();
        let known = Arc::downgrade(&files);
        placement.diffusion.on_pressure(Arc::new(move || {
            let Some(files) = known.upgrade() else { return false };
            // The files may be locked further up this thread's own stack.
            let Ok(files) = files.try_lock() else { return false };
            files.values().map(|file| file.unload_if_idle()).fold(false, |any, freed| any | freed)
        }));
        Self { placement, options, files }
    }

    /// The backends that models run on.
    pub fn placement(&self) -> &Placement {
        &self.placement
    }

    /// The model file at `source`. A file that changed on disk since it was
    /// opened is opened anew.
    pub fn file(&self, source: ModelSource) -> Arc<ModelFile> {
        let mut files = lock(&self.files);
        let entry = files.entry(source.clone()).or_insert_with(|| {
            let (placement, options) = (self.placement.clone(), self.options);
            Arc::new(ModelFile { source, placement, options, opened: Mutex::new(None) })
        });
        let is_stale = lock(&entry.opened).as_ref().is_some_and(|o| o.file.verify_unchanged().is_err());
        if is_stale {
            entry.unload();
        }
        entry.clone()
    }

    /// Frees every model's memory. Handles stay valid and load again when used.
    pub fn unload_all(&self) {
        lock(&self.files).values().for_each(|file| file.unload());
        self.trim();
    }

    /// Gives free arena memory back to the system.
    pub fn trim(&self) {
        self.placement.trim();
    }
}
