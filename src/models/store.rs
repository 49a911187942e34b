//! Loaded models: opened once, shared by all prompts, unloaded on request.
//!
//! Nodes hold light handles to a [`ModelFile`]. What is heavy — the memory
//! map and the packed weights — hangs off one slot of it, so
//! [`ModelStore::unload_all`] frees the memory while cached node outputs keep
//! their handles; the next use opens the file again.

use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::hash::{Hash, Hasher};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::ModelError;
use super::clip::ClipText;
use super::detect::{self, ClipConfig, ClipVariant, DetectError, Family, Kind, SamplingConfig, VaeConfig};
use super::layers::{Loader, WeightSource};
use super::layouts::Names;
use super::lora;
use super::patch::{self, PatchedSource, Patches, Values};
use super::unet::Unet;
use super::vae::Vae;
use crate::tensor::{Backend, DType, Placement, RawTensor};
use crate::weights::{OpenOptions, WeightsError, WeightsFile};

/// Where a model file's bytes are.
#[derive(Clone, Debug, Eq)]
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

impl PartialEq for ModelSource {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (ModelSource::File(path), ModelSource::File(other)) => path == other,
            (
                ModelSource::Embedded { name, bytes },
                ModelSource::Embedded { name: other, bytes: other_bytes },
            ) => name == other && (std::ptr::eq(*bytes, *other_bytes) || bytes == other_bytes),
            _ => false,
        }
    }
}

/// Sources are looked up for every node: the name stands for the bytes, which are many.
impl Hash for ModelSource {
    fn hash<H: Hasher>(&self, state: &mut H) {
        match self {
            ModelSource::File(path) => path.hash(state),
            ModelSource::Embedded { name, .. } => name.hash(state),
        }
    }
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
pub(super) struct FileSource {
    file: Arc<WeightsFile>,
    names: Arc<Names>,
    precision: Precision,
}

impl FileSource {
    /// The tensors of a file as they are.
    pub(super) fn new(file: Arc<WeightsFile>) -> Self {
        let names = Arc::new(Names::of(&file));
        Self { file, names, precision: Precision::Stored }
    }
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

    fn shape(&self, name: &str) -> Option<&[usize]> {
        self.names.shape(name)
    }

    fn packed(&self, name: &str) {
        if let Some(stored) = self.names.stored_name(name) {
            self.file.release_pages(stored);
        }
    }
}

/// What a network is loaded from.
pub struct Opening<'a> {
    /// The file.
    pub file: &'a Arc<WeightsFile>,
    /// Its tensors.
    pub source: Arc<dyn WeightSource>,
    /// The backends.
    pub placement: &'a Placement,
}

impl Opening<'_> {
    /// The error for a file that holds something else than `wanted`.
    pub fn is_not(&self, wanted: &str) -> ModelError {
        is_not(self.file, wanted)
    }
}

fn is_not(file: &WeightsFile, wanted: &str) -> ModelError {
    let found = detect::kind_of(file);
    let (file, advice) = (file.path().display(), found.advice());
    ModelError::File(format!("{file} is {found}, not {wanted}; {advice}"))
}

/// The diffusion model that another file's network changes.
pub struct Base<'a> {
    /// Its configuration.
    pub unet: &'a detect::UnetConfig,
    /// Its tensors, by their names in its file, under its patches.
    pub source: Arc<dyn WeightSource>,
}

/// A network that is a file's only one, such as an upscaler.
pub trait Network: Any + Send + Sync + Sized {
    /// Checks the file's tensors; packs nothing yet.
    ///
    /// # Errors
    /// If the file holds something else or is incomplete.
    fn open(opening: &Opening<'_>) -> Result<Self, ModelError>;

    /// What the names of its tensors begin with, for patches.
    fn prefix(file: &WeightsFile) -> &'static str {
        let _ = file;
        ""
    }
}

/// Networks under patches of one type that stay loaded, besides the unpatched ones.
const VARIANTS: usize = 2;

/// What tells networks of a file apart: the type, a number, and the patches that it is under.
type Key = (TypeId, usize, Vec<u64>);

/// Networks that have no slot of their own; the last used is last.
#[derive(Default)]
struct Others(Mutex<Vec<(Key, Arc<dyn Any + Send + Sync>)>>);

impl Others {
    fn get<T: Any + Send + Sync>(&self, key: &Key) -> Option<Arc<T>> {
        let mut others = lock(&self.0);
        let at = others.iter().position(|(known, _)| known == key)?;
        let entry = others.remove(at);
        let network = entry.1.clone();
        others.push(entry);
        network.downcast().ok()
    }

    /// Adds a network. Of those under patches the one that was not used for longest goes.
    fn insert<T: Any + Send + Sync>(&self, key: Key, network: &Arc<T>) {
        let mut others = lock(&self.0);
        let is_rival =
            |known: &Key| !key.2.is_empty() && !known.2.is_empty() && known.0 == key.0 && known.1 == key.1;
        if others.iter().filter(|(known, _)| is_rival(known)).count() >= VARIANTS
            && let Some(at) = others.iter().position(|(known, _)| is_rival(known))
        {
            others.remove(at);
        }
        others.push((key, network.clone()));
    }

    fn are_unused(&self) -> bool {
        lock(&self.0).iter().all(|(_, network)| Arc::strong_count(network) == 1)
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
    /// Something else: networks that are loaded by their type.
    Other,
}

/// The next opened file's id.
static NEXT_ID: AtomicU64 = AtomicU64::new(1);

/// What hangs off an opened file.
struct Opened {
    id: u64,
    file: Arc<WeightsFile>,
    names: Arc<Names>,
    content: Content,
    unet: OnceLock<Arc<Unet>>,
    clips: [OnceLock<Arc<ClipText>>; ClipVariant::ALL.len()],
    vae: OnceLock<Arc<Vae>>,
    others: Others,
}

impl Opened {
    fn source(&self, precision: Precision) -> Arc<dyn WeightSource> {
        Arc::new(FileSource { file: self.file.clone(), names: self.names.clone(), precision })
    }

    fn clip_config(&self, variant: ClipVariant) -> Result<ClipConfig, ModelError> {
        let found = self.clip_configs().iter().find(|c| c.variant == variant);
        found.cloned().ok_or_else(|| self.lacks("text encoder"))
    }

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
            // Says what the file is instead.
            Content::Other => {
                detect::detect(&self.file).map_or_else(|e| Err(e.into()), |_| Err(self.lacks(what)))
            }
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
            && self.others.are_unused()
    }

    fn clip_configs(&self) -> &[ClipConfig] {
        match &self.content {
            Content::Checkpoint(checkpoint) => &checkpoint.clips,
            Content::Text(clips) => clips,
            Content::Vae(_) | Content::Other => &[],
        }
    }

    fn vae_config(&self) -> Result<VaeConfig, ModelError> {
        match &self.content {
            Content::Checkpoint(checkpoint) => checkpoint.vae.clone().ok_or_else(|| self.lacks("VAE")),
            Content::Text(_) => Err(self.lacks("VAE")),
            Content::Other => Ok(detect::detect_vae(&self.file)?),
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
            Kind::Lora
            | Kind::VisionEncoder
            | Kind::ControlNet
            | Kind::Embedding
            | Kind::Upscaler
            | Kind::Taesd
            | Kind::Hypernetwork
            | Kind::Unknown => Content::Other,
            _ => Content::Checkpoint(Box::new(detect::detect(&file)?)),
        };
        let names = Arc::new(Names::of(&file));
        let (unet, clips, vae) = (OnceLock::new(), Default::default(), OnceLock::new());
        let (id, others) = (NEXT_ID.fetch_add(1, Ordering::Relaxed), Others::default());
        let opened = Arc::new(Opened { id, file, names, content, unet, clips, vae, others });
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
        let backend = place(&self.placement).clone();
        let loader = Loader::new(opened.source(self.precision), backend.clone(), &prefix(&config));
        let part = Arc::new(load(config, backend, &loader)?);
        Ok(cell(&opened).get_or_init(|| part).clone())
    }

    /// The error for a file that holds something else than `wanted`.
    pub fn is_not(&self, wanted: &str) -> ModelError {
        self.open().map_or_else(|error| error, |opened| is_not(&opened.file, wanted))
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
        let config = |o: &Opened| o.clip_config(variant);
        self.part(|o| &o.clips[variant as usize], config, |c| c.prefix.clone(), |p| &p.text, ClipText::load)
    }

    /// The backend that runs the diffusion model.
    pub fn diffusion_backend(&self) -> &Arc<dyn Backend> {
        &self.placement.diffusion
    }

    /// The diffusion model under patches, whose names begin with [`patch::DIFFUSION`].
    pub fn patched_unet(&self, patches: &Patches) -> Result<Arc<Unet>, ModelError> {
        if patches.is_empty() {
            return self.unet();
        }
        let opened = self.open()?;
        let key = (TypeId::of::<Unet>(), 0, patches.identity());
        if let Some(unet) = opened.others.get(&key) {
            return Ok(unet);
        }
        opened.file.verify_unchanged()?;
        let config = opened.checkpoint("diffusion model")?.unet.clone();
        let source = opened.source(self.precision);
        let source = PatchedSource::new(source, patch::unet_names(&config), patches.clone());
        let backend = self.placement.diffusion.clone();
        let loader = Loader::new(Arc::new(source), backend.clone(), &config.prefix);
        let unet = Arc::new(Unet::load(config, backend, &loader)?);
        opened.others.insert(key, &unet);
        Ok(unet)
    }

    /// A text encoder under patches, whose names begin as [`patch::clip_names`] says.
    pub fn patched_clip(&self, variant: ClipVariant, patches: &Patches) -> Result<Arc<ClipText>, ModelError> {
        if patches.is_empty() {
            return self.clip(variant);
        }
        let opened = self.open()?;
        let key = (TypeId::of::<ClipText>(), variant as usize, patches.identity());
        if let Some(clip) = opened.others.get(&key) {
            return Ok(clip);
        }
        opened.file.verify_unchanged()?;
        let config = opened.clip_config(variant)?;
        let source = opened.source(self.precision);
        let source = PatchedSource::new(source, patch::clip_names(&config), patches.clone());
        let backend = self.placement.text.clone();
        let loader = Loader::new(Arc::new(source.rounded()), backend.clone(), &config.prefix);
        let clip = Arc::new(ClipText::load(config, backend, &loader)?);
        opened.others.insert(key, &clip);
        Ok(clip)
    }

    /// The diffusion model's weights under patches, by patch name: what merges with another model are made of.
    pub fn unet_values(&self, patches: &Patches) -> Result<Vec<(String, Values)>, ModelError> {
        let opened = self.open()?;
        let config = &opened.checkpoint("diffusion model")?.unet;
        let source = opened.source(self.precision);
        Ok(PatchedSource::new(source, patch::unet_names(config), patches.clone()).values(config.tensors()))
    }

    /// A text encoder's weights under patches, by patch name.
    pub fn clip_values(
        &self,
        variant: ClipVariant,
        patches: &Patches,
    ) -> Result<Vec<(String, Values)>, ModelError> {
        let opened = self.open()?;
        let config = opened.clip_config(variant)?;
        let source = opened.source(self.precision);
        Ok(PatchedSource::new(source, patch::clip_names(&config), patches.clone()).values(config.tensors()))
    }

    /// The tensors whose names in the file begin with one of these, as they are, with their element types.
    pub fn stored_values(&self, prefixes: &[&str]) -> Result<Vec<(String, DType, Values)>, ModelError> {
        let opened = self.open()?;
        let (file, names) = (opened.file.clone(), Arc::new(Names::as_stored(&opened.file)));
        let source: Arc<dyn WeightSource> =
            Arc::new(FileSource { file, names, precision: Precision::Stored });
        let infos = opened.file.infos();
        let wanted = infos.filter(|info| prefixes.iter().any(|prefix| info.name.starts_with(prefix)));
        let values = wanted.filter_map(|i| Some((i.name.to_owned(), i.dtype, Values::of(&source, i.name)?)));
        Ok(values.collect())
    }

    /// The layers of the diffusion model and the names under which LoRA files know them.
    pub fn unet_targets(&self) -> Result<Vec<lora::Target>, ModelError> {
        Ok(lora::unet_targets(&self.open()?.checkpoint("diffusion model")?.unet))
    }

    /// The layers of a text encoder and the names under which LoRA files know them; `is_second` if there is
    /// another one before it.
    pub fn clip_targets(
        &self,
        variant: ClipVariant,
        is_second: bool,
    ) -> Result<Vec<lora::Target>, ModelError> {
        Ok(lora::clip_targets(&self.open()?.clip_config(variant)?, is_second))
    }

    /// The autoencoder's weights, by their names in a file of its own.
    pub fn vae_values(&self) -> Result<Vec<(String, Values)>, ModelError> {
        let opened = self.open()?;
        let config = opened.vae_config()?;
        let names = vec![(config.prefix.clone(), String::new())];
        let source = opened.source(self.precision);
        Ok(PatchedSource::new(source, names, Patches::default()).values(config.tensors()))
    }

    /// Whether the file has a tensor of that name, in this crate's names.
    pub fn has_tensor(&self, name: &str) -> Result<bool, ModelError> {
        Ok(self.open()?.names.shape(name).is_some())
    }

    /// The file's only network, loaded when first asked for.
    pub fn network<T: Network>(&self) -> Result<Arc<T>, ModelError> {
        self.network_under(&Patches::default())
    }

    /// The file's only network under patches, whose names begin with [`patch::DIFFUSION`].
    pub fn network_under<T: Network>(&self, patches: &Patches) -> Result<Arc<T>, ModelError> {
        let opened = self.open()?;
        let key = (TypeId::of::<T>(), 0, patches.identity());
        if let Some(network) = opened.others.get(&key) {
            return Ok(network);
        }
        opened.file.verify_unchanged()?;
        let mut source = opened.source(self.precision);
        if !patches.is_empty() {
            let names = vec![(T::prefix(&opened.file).to_owned(), patch::DIFFUSION.to_owned())];
            source = Arc::new(PatchedSource::new(source, names, patches.clone()));
        }
        let file = &opened.file;
        let network = Arc::new(T::open(&Opening { file, source, placement: &self.placement })?);
        opened.others.insert(key, &network);
        Ok(network)
    }

    /// The network that the file makes of another file's diffusion model under patches, by `open`.
    pub fn network_over<T: Any + Send + Sync>(
        &self,
        (base, patches): (&ModelFile, &Patches),
        open: impl FnOnce(&Opening<'_>, &Base<'_>) -> Result<T, ModelError>,
    ) -> Result<Arc<T>, ModelError> {
        let (opened, base_opened) = (self.open()?, base.open()?);
        let key = (TypeId::of::<T>(), 1, [vec![base_opened.id], patches.identity()].concat());
        if let Some(network) = opened.others.get(&key) {
            return Ok(network);
        }
        opened.file.verify_unchanged()?;
        base_opened.file.verify_unchanged()?;
        let unet = &base_opened.checkpoint("diffusion model")?.unet;
        let source = base_opened.source(base.precision);
        let source = PatchedSource::new(source, patch::unet_names(unet), patches.clone());
        let opening =
            Opening { file: &opened.file, source: opened.source(self.precision), placement: &self.placement };
        let network = Arc::new(open(&opening, &Base { unet, source: Arc::new(source) })?);
        opened.others.insert(key, &network);
        Ok(network)
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

/// Model files by where they are and what they compute in.
type Files = HashMap<(ModelSource, Precision), Arc<ModelFile>>;

/// Loaded models and the backends they run on.
pub struct ModelStore {
    placement: Placement,
    options: OpenOptions,
    files: Arc<Mutex<Files>>,
}

impl ModelStore {
    /// An empty store.
    pub fn new(placement: Placement, options: OpenOptions) -> Self {
        let files = Arc::<Mutex<Files>>::default();
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
