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
use super::detect::{self, ClipConfig, ClipVariant, DetectError, Family, Kind, SamplingConfig, VaeConfig};
use super::layers::{Loader, WeightSource};
use super::layouts::Names;
use super::unet::Unet;
use super::vae::Vae;
use crate::tensor::{Backend, DType, Placement, RawTensor};
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

/// How precise a model's weights are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Precision {
    /// As the file has them.
    #[default]
    Stored,
    /// Rounded to 8 bits, 4 of them the exponent.
    F8E4M3,
    /// Rounded to 8 bits, 5 of them the exponent.
    F8E5M2,
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

/// A file under this crate's names.
struct FileSource {
    file: Arc<WeightsFile>,
    names: Arc<Names>,
    precision: Precision,
}

impl WeightSource for FileSource {
    fn raw(&self, name: &str) -> Option<RawTensor<'_>> {
        let raw = self.names.get(&self.file, name)?;
        Some(match self.precision {
            Precision::Stored => raw,
            Precision::F8E4M3 => raw.rounded_to(DType::F8E4M3),
            Precision::F8E5M2 => raw.rounded_to(DType::F8E5M2),
        })
    }

    fn packed(&self, name: &str) {
        if let Some(stored) = self.names.stored_name(name) {
            self.file.release_pages(stored);
        }
    }
}

/// What a file holds.
enum Content {
    /// A diffusion model, perhaps with text encoders and VAE.
    Checkpoint(Box<detect::Checkpoint>),
    /// Text encoders alone.
    Text(Vec<ClipConfig>),
    /// A VAE alone.
    Vae(VaeConfig),
}

/// What hangs off an opened file.
struct Opened {
    file: Arc<WeightsFile>,
    names: Arc<Names>,
    content: Content,
    unet: OnceLock<Arc<Unet>>,
    clips: [OnceLock<Arc<ClipText>>; ClipVariant::ALL.len()],
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
        match &self.content {
            Content::Checkpoint(checkpoint) => Ok(checkpoint),
            Content::Text(_) | Content::Vae(_) => Err(self.lacks(what)),
        }
    }

    /// Whether nobody else holds the file or one of its networks.
    fn is_idle(self: &Arc<Self>) -> bool {
        fn unused<T>(cell: &OnceLock<Arc<T>>) -> bool {
            cell.get().is_none_or(|part| Arc::strong_count(part) == 1)
        }
        Arc::strong_count(self) == 1
            && unused(&self.unet)
            && self.clips.iter().all(unused)
            && unused(&self.vae)
    }

    fn clip_configs(&self) -> &[ClipConfig] {
        match &self.content {
            Content::Checkpoint(checkpoint) => &checkpoint.clips,
            Content::Text(clips) => clips,
            Content::Vae(_) => &[],
        }
    }

    fn vae_config(&self) -> Result<VaeConfig, ModelError> {
        match &self.content {
            Content::Checkpoint(checkpoint) => checkpoint.vae.clone().ok_or_else(|| self.lacks("VAE")),
            Content::Text(_) => Err(self.lacks("VAE")),
            Content::Vae(vae) => Ok(vae.clone()),
        }
    }
}

/// A model file. Cheap to hold: its weights come and go.
pub struct ModelFile {
    source: ModelSource,
    precision: Precision,
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
        let content = match detect::kind_of(&file) {
            Kind::Vae => Content::Vae(detect::detect_vae(&file)?),
            Kind::TextEncoder => Content::Text(detect::detect_text_encoders(&file)?),
            _ => Content::Checkpoint(Box::new(detect::detect(&file)?)),
        };
        let names = Arc::new(Names::of(&file));
        let (unet, clips, vae) = (OnceLock::new(), Default::default(), OnceLock::new());
        let opened = Arc::new(Opened { file, names, content, unet, clips, vae });
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
        let (file, names) = (opened.file.clone(), opened.names.clone());
        let source = Arc::new(FileSource { file, names, precision: self.precision });
        let backend = place(&self.placement).clone();
        let loader = Loader::new(source, backend.clone(), &prefix(&config));
        let part = Arc::new(load(config, backend, &loader)?);
        Ok(cell(&opened).get_or_init(|| part).clone())
    }

    /// What samplers must know about the diffusion model.
    pub fn sampling(&self) -> Result<SamplingConfig, ModelError> {
        Ok(self.open()?.checkpoint("diffusion model")?.sampling)
    }

    /// The family of the diffusion model.
    pub fn family(&self) -> Result<Family, ModelError> {
        Ok(self.open()?.checkpoint("diffusion model")?.family)
    }

    /// The diffusion model.
    pub fn unet(&self) -> Result<Arc<Unet>, ModelError> {
        let config = |o: &Opened| Ok(o.checkpoint("diffusion model")?.unet.clone());
        self.part(|o| &o.unet, config, |c| c.prefix.clone(), |p| &p.diffusion, Unet::load)
    }

    /// Which text encoders there are, in the order in which their outputs are joined; none is no error.
    pub fn clip_variants(&self) -> Result<Vec<ClipVariant>, ModelError> {
        Ok(self.open()?.clip_configs().iter().map(|c| c.variant).collect())
    }

    /// A text encoder.
    pub fn clip(&self, variant: ClipVariant) -> Result<Arc<ClipText>, ModelError> {
        let config = |o: &Opened| {
            let found = o.clip_configs().iter().find(|c| c.variant == variant);
            found.cloned().ok_or_else(|| o.lacks("text encoder"))
        };
        self.part(|o| &o.clips[variant as usize], config, |c| c.prefix.clone(), |p| &p.text, ClipText::load)
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
    files: Arc<Mutex<HashMap<(ModelSource, Precision), Arc<ModelFile>>>>,
}

impl ModelStore {
    /// An empty store.
    pub fn new(placement: Placement, options: OpenOptions) -> Self {
        let files = Arc::<Mutex<HashMap<(ModelSource, Precision), Arc<ModelFile>>>>::default();
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
        self.file_in(source, Precision::Stored)
    }

    /// As [`file`](Self::file), with weights of that precision.
    pub fn file_in(&self, source: ModelSource, precision: Precision) -> Arc<ModelFile> {
        let mut files = lock(&self.files);
        let entry = files.entry((source.clone(), precision)).or_insert_with(|| {
            let (placement, options) = (self.placement.clone(), self.options);
            Arc::new(ModelFile { source, precision, placement, options, opened: Mutex::new(None) })
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
