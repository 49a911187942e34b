//! An open weight file: names, shapes and views.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use super::error::{HeaderFault, WeightsError};
use super::header::{self, Header, HeaderEntry};
use super::mmap::Storage;
use super::{pickle, sniff};
use crate::tensor::{DType, RawTensor};

/// How to open a weight file.
#[derive(Clone, Copy, Debug)]
pub struct OpenOptions {
    /// Map the file instead of reading it. Off for storage that may change or
    /// vanish under a running server: a truncated map faults, a copy does not.
    pub mmap: bool,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self { mmap: true }
    }
}

/// What the header says about a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorInfo<'a> {
    /// Its name.
    pub name: &'a str,
    /// Element type.
    pub dtype: DType,
    /// Extents, outermost first.
    pub shape: &'a [usize],
    /// Size of its data.
    pub bytes: usize,
}

impl TensorInfo<'_> {
    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.bytes / self.dtype.size()
    }
}

/// An open `.safetensors` or PyTorch file whose header was checked in full.
///
/// Tensors are views into the file; nothing is copied, or even read, before
/// someone looks at the bytes.
#[derive(Debug)]
pub struct WeightsFile {
    path: PathBuf,
    storage: Storage,
    tensors: Vec<HeaderEntry>,
    index: HashMap<String, usize>,
    metadata: BTreeMap<String, String>,
    opened: Option<Fingerprint>,
}

/// The open file and what it looked like at opening.
#[derive(Debug)]
struct Fingerprint {
    file: File,
    len: u64,
    modified: Option<SystemTime>,
}

impl WeightsFile {
    /// Opens and maps the file at `path`.
    ///
    /// # Errors
    /// If it cannot be read, is not safetensors, or its header does not describe it exactly.
    pub fn open(path: &Path) -> Result<Arc<Self>, WeightsError> {
        Self::open_with(path, OpenOptions::default())
    }

    /// Opens the file at `path` as `options` say.
    ///
    /// # Errors
    /// As [`open`](Self::open); without `mmap` also if it does not fit into memory.
    pub fn open_with(path: &Path, options: OpenOptions) -> Result<Arc<Self>, WeightsError> {
        let io = |action| move |source| WeightsError::Io { file: path.to_path_buf(), action, source };
        // Before opening: opening a pipe would block until someone writes to it.
        let regular = std::fs::metadata(path).map_err(io("open"))?.is_file();
        if !regular {
            return Err(WeightsError::NotAFile { file: path.to_path_buf() });
        }
        let mut file = File::open(path).map_err(io("open"))?;
        let stat = file.metadata().map_err(io("inspect"))?;
        let storage = match (stat.len(), options.mmap) {
            (0, _) => Storage::Owned(Vec::new()),
            (_, true) => Storage::map(&file).map_err(io("map"))?,
            (len, false) => Storage::read(&mut file, len).map_err(io("read"))?,
        };
        let opened =
            options.mmap.then(|| Fingerprint { file, len: stat.len(), modified: stat.modified().ok() });
        Self::with_storage(path.to_path_buf(), storage, opened)
    }

    /// Opens a file that is part of the program; `name` stands for its path in messages.
    ///
    /// # Errors
    /// If its header does not describe it exactly.
    pub fn from_static(bytes: &'static [u8], name: &str) -> Result<Arc<Self>, WeightsError> {
        Self::with_storage(PathBuf::from(name), Storage::fixed(bytes), None)
    }

    /// Opens a file held in memory; `name` stands for its path in messages.
    ///
    /// # Errors
    /// If its header does not describe it exactly.
    pub fn from_bytes(bytes: Vec<u8>, name: &str) -> Result<Arc<Self>, WeightsError> {
        Self::with_storage(PathBuf::from(name), Storage::Owned(bytes), None)
    }

    fn with_storage(
        path: PathBuf,
        storage: Storage,
        opened: Option<Fingerprint>,
    ) -> Result<Arc<Self>, WeightsError> {
        let Header { tensors, metadata } = match header::parse(storage.bytes()) {
            Ok(header) => header,
            Err(fault) if is_unreadable(&fault) && pickle::is_likely(storage.bytes()) => {
                match pickle::parse(storage.bytes()) {
                    Ok(header) => header,
                    Err(fault) => return Err(WeightsError::Pickle { file: path, fault }),
                }
            }
            Err(fault) => return Err(refusal(path, fault, storage.bytes())),
        };
        let index = tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        Ok(Arc::new(Self { path, storage, tensors, index, metadata, opened }))
    }

    /// Where it was opened, or the name it was given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of all tensors, in the file's order.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.tensors.iter().map(|t| t.name.as_str())
    }

    /// What the header says about every tensor, in the file's order.
    pub fn infos(&self) -> impl ExactSizeIterator<Item = TensorInfo<'_>> {
        self.tensors.iter().map(info_of)
    }

    /// What the header says about tensor `name`.
    pub fn info(&self, name: &str) -> Option<TensorInfo<'_>> {
        self.entry(name).map(info_of)
    }

    /// Tensor `name`, if there is one.
    pub fn get(&self, name: &str) -> Option<RawTensor<'_>> {
        let entry = self.entry(name)?;
        let bytes = match &entry.copy {
            Some(copy) => copy,
            None => self.storage.bytes().get(entry.begin..entry.end)?,
        };
        Some(RawTensor { dtype: entry.dtype, shape: &entry.shape, bytes: Cow::Borrowed(bytes) })
    }

    /// Whether there is a tensor `name`.
    pub fn contains(&self, name: &str) -> bool {
        self.index.contains_key(name)
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether there are no tensors.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// The strings of `__metadata__`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Length of the file.
    pub fn len_bytes(&self) -> u64 {
        self.storage.bytes().len() as u64
    }

    /// Number of elements of all tensors together.
    pub fn parameters(&self) -> u64 {
        self.infos().map(|t| t.numel() as u64).sum()
    }

    /// Lets the system take back the memory pages of tensor `name`; they are
    /// read from the file again if the tensor is used again. Call it once a
    /// backend has its own copy. Pages shared with neighbours stay.
    pub fn release_pages(&self, name: &str) {
        if let Some(entry) = self.entry(name) {
            self.storage.release(entry.begin..entry.end);
        }
    }

    /// Lets the system take back all memory pages of the file.
    pub fn release_all(&self) {
        self.storage.release(0..self.storage.bytes().len());
    }

    /// Checks that the mapped file still has the length and modification time
    /// it was opened with. Ask before a long read: values read after a change
    /// would be wrong, and reading past a new end would fault. Always right for
    /// files in memory, and for a map whose *path* got a new file: the map
    /// keeps the old one.
    ///
    /// # Errors
    /// [`WeightsError::Changed`] with the difference.
    pub fn verify_unchanged(&self) -> Result<(), WeightsError> {
        let Some(opened) = &self.opened else { return Ok(()) };
        let stat = opened.file.metadata().map_err(|source| WeightsError::Io {
            file: self.path.clone(),
            action: "inspect",
            source,
        })?;
        let changed = |what, was, now| Err(WeightsError::Changed { file: self.path.clone(), what, was, now });
        if stat.len() != opened.len {
            return changed("bytes", opened.len.to_string(), stat.len().to_string());
        }
        let modified = stat.modified().ok();
        if modified != opened.modified {
            let show = |time: Option<SystemTime>| match time.map(|t| t.duration_since(SystemTime::UNIX_EPOCH))
            {
                Some(Ok(since)) => format!("{:.3} s after 1970", since.as_secs_f64()),
                _ => "unknown".into(),
            };
            return changed("modified", show(opened.modified), show(modified));
        }
        Ok(())
    }

    fn entry(&self, name: &str) -> Option<&HeaderEntry> {
        self.index.get(name).and_then(|&i| self.tensors.get(i))
    }
}

fn info_of(entry: &HeaderEntry) -> TensorInfo<'_> {
    let bytes = entry.copy.as_ref().map_or(entry.end - entry.begin, |copy| copy.len());
    TensorInfo { name: &entry.name, dtype: entry.dtype, shape: &entry.shape, bytes }
}

/// The error for a file whose header has `fault`: another format's name if it
/// begins like one and the header is not even JSON.
fn refusal(file: PathBuf, fault: HeaderFault, bytes: &[u8]) -> WeightsError {
    match sniff::known_format(bytes) {
        Some((format, advice)) if is_unreadable(&fault) => {
            WeightsError::NotSafetensors { file, format, advice }
        }
        _ => WeightsError::Header { file, fault },
    }
}

/// Whether the fault says that there is no header at all, so that the file may be of another format.
fn is_unreadable(fault: &HeaderFault) -> bool {
    matches!(
        fault,
        HeaderFault::NoLength { .. }
            | HeaderFault::TooLarge { .. }
            | HeaderFault::Short { .. }
            | HeaderFault::NotText { .. }
            | HeaderFault::NotJson { .. }
    )
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
