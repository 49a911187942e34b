//! What the runtime asks of a device, without a device and without its arithmetic: memory and launches.
//!
//! The runtime works as on a GPU — packing, pool, recording, launches — over a driver that keeps books. The
//! checkpoints are files of zeros with a family's names and shapes, which take no disk.

mod driver;
mod launches;
mod residency;
mod shared_memory;

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use driver::DryDriver;
use kiln::backend::cuda::{CudaBackend, Element, Gpu, Shared};
use kiln::models::clip::{ClipToken, WeightedToken};
use kiln::models::text::{self, TextKind, TextPart};
use kiln::models::{ModelFile, ModelSource, ModelStore};
use kiln::tensor::{HostTensor, Placement};
use kiln::weights::OpenOptions;
use kiln::weights::synth::Manifest;

/// Backends as `kiln serve` opens them on a GPU.
fn placement(driver: &Arc<DryDriver>) -> Placement {
    let shared = Shared::new(Arc::new(Gpu::new(driver.clone()).unwrap()), None);
    let backend = |element| Arc::new(CudaBackend::new(shared.clone(), element));
    let (f16, bf16) = (backend(Element::F16), backend(Element::BF16));
    Placement { diffusion: f16.clone(), text: f16, vae: bf16 }
}

/// A checkpoint on a device of its own.
struct Opened {
    driver: Arc<DryDriver>,
    store: ModelStore,
    file: Arc<ModelFile>,
    _folder: tempfile::TempDir,
}

/// Opens a hollow checkpoint of a built-in manifest.
fn opened(manifest: &str) -> Opened {
    opened_on(manifest, DryDriver::open())
}

/// The same on a given device.
fn opened_on(manifest: &str, driver: DryDriver) -> Opened {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("hollow.safetensors");
    hollow_checkpoint(&Manifest::built_in(manifest).unwrap(), &path);
    let driver = Arc::new(driver);
    let store = ModelStore::new(placement(&driver), OpenOptions::default());
    let file = store.file(ModelSource::File(path));
    Opened { driver, store, file, _folder: folder }
}

/// A file of f16 zeros with the manifest's names and shapes; it has holes instead of data.
fn hollow_checkpoint(manifest: &Manifest, path: &Path) {
    let mut header = String::from("{");
    let mut end = 0u64;
    for (name, shape) in manifest.shapes() {
        let begin = end;
        end += shape.iter().product::<u64>() * 2;
        header += &format!(
            "\"{name}\":{{\"dtype\":\"F16\",\"shape\":{shape:?},\"data_offsets\":[{begin},{end}]}},"
        );
    }
    header.pop();
    header.push('}');
    let mut file = std::fs::File::create(path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len(8 + header.len() as u64 + end).unwrap();
}

/// Encodes a prompt with all text encoders of a file.
fn encode(file: &ModelFile, kind: TextKind) -> Arc<HostTensor> {
    let chunk = vec![WeightedToken { token: ClipToken::Id(49407), weight: 1.0 }; 77];
    let part = |variant| TextPart { encoder: file.clip(variant).unwrap(), chunks: vec![chunk.clone()] };
    let parts: Vec<_> = file.clip_variants().unwrap().into_iter().map(part).collect();
    Arc::new(text::encode(kind, &parts, None).unwrap().cond)
}
