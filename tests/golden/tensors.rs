//! Recorded tensors.

use std::path::Path;
use std::sync::Arc;

use kiln::tensor::{HostTensor, RawTensor};
use kiln::weights::WeightsFile;

/// The tensors of a group.
pub struct Tensors(Option<Arc<WeightsFile>>);

impl Tensors {
    /// Opens the file if there is one.
    pub fn open(path: &Path) -> Self {
        Self(path.exists().then(|| WeightsFile::open(path).unwrap_or_else(|e| panic!("{e}"))))
    }

    /// The tensor as f32. Names ending `_u8` and `_u16` hold pictures scaled to integers.
    pub fn get(&self, name: &str) -> Option<HostTensor> {
        let raw = self.raw(name)?;
        HostTensor::new(raw.shape, raw.to_f32())
    }

    /// The tensor as stored.
    pub fn raw(&self, name: &str) -> Option<RawTensor<'_>> {
        self.0.as_ref()?.get(name)
    }

    /// The tensor as f32, or what to report if there is none.
    pub fn need(&self, name: &str) -> Result<HostTensor, String> {
        self.get(name).ok_or_else(|| format!("no recorded tensor {name}"))
    }

    /// All names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().flat_map(|file| file.names())
    }
}
