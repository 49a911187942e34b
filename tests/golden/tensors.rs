//! Recorded tensors.

use std::path::Path;
use std::sync::Arc;

use kiln::tensor::HostTensor;
use kiln::weights::WeightsFile;

/// The tensors of a group.
pub struct Tensors(Option<Arc<WeightsFile>>);

impl Tensors {
    /// Opens the file if there is one.
    pub fn open(path: &Path) -> Self {
        Self(path.exists().then(|| WeightsFile::open(path).unwrap_or_else(|e| panic!("{e}"))))
    }

    /// Whether `name` is there.
    pub fn has(&self, name: &str) -> bool {
        self.0.as_ref().is_some_and(|f| f.contains(name))
    }

    /// The tensor as f32. Names ending `_u8` and `_u16` hold pictures scaled to integers.
    pub fn get(&self, name: &str) -> Option<HostTensor> {
        let raw = self.0.as_ref()?.get(name)?;
        HostTensor::new(raw.shape, raw.to_f32())
    }
}
