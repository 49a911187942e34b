//! A store for unit tests of the layers above.

use std::sync::Arc;

use super::ModelStore;
use crate::backend::{self, Device, DeviceOptions};
use crate::weights::OpenOptions;

impl Default for ModelStore {
    fn default() -> Self {
        let options = DeviceOptions { device: Device::Cpu, threads: Some(1), ..DeviceOptions::default() };
        Self::new(backend::open(options).expect("a CPU backend"), OpenOptions::default())
    }
}

#[test]
fn a_file_that_is_no_model_is_named_and_described() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broken.safetensors");
    std::fs::write(&path, b"not a model").unwrap();
    let store = Arc::new(ModelStore::default());
    let file = store.file(super::ModelSource::File(path));
    let error = file.unet().err().expect("an error").to_string();
    assert!(error.contains("broken.safetensors"), "{error}");
}
