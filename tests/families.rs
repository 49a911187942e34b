//! UNets of every family against an independent forward pass in float64 (`data/families/reference.py`), on the CPU
//! in f32 and through the CUDA backend on the simulated GPU in f16.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use kiln::backend::cuda::{CudaBackend, Element, Gpu, Shared};
use kiln::backend::{self, Device, DeviceOptions};
use kiln::driver::simt::{SimtDriver, SimtOptions};
use kiln::driver::toolchain::{SimtVariant, build_simt};
use kiln::models::hypernetwork::Hypernetwork;
use kiln::models::layers::Ops;
use kiln::models::unet::UnetInput;
use kiln::models::unet::hooks::{Hooks, UnetHook};
use kiln::models::{ModelError, ModelSource, ModelStore, Precision, tiny};
use kiln::tensor::{DType, HostTensor, Placement, Tensor};
use kiln::weights::{OpenOptions, WeightsFile};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

const FAMILIES: [&str; 7] = ["sd1", "sd1-inpaint", "sd1-ip2p", "sd2", "sdxl", "sdxl-inpaint", "sdxl-refiner"];

/// Between implementations of the reference 3e-6 was measured on SD1.5; outputs here have a deviation of 0.5 too.
const CPU_TOLERANCE: f64 = 2e-5;
/// A rounding to f16 is 2.8e-4 of a value (rms); some forty of them lie between input and output.
const F16_TOLERANCE: f64 = 5e-3;

fn recorded() -> Arc<WeightsFile> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/families/unets.safetensors");
    WeightsFile::open(&path).expect("the recorded forward passes")
}

fn tensor(file: &WeightsFile, name: &str) -> Option<HostTensor> {
    let raw = file.get(name)?;
    HostTensor::new(raw.shape, raw.to_f32())
}

/// The family's recorded output and ours.
fn forward(family: &str, placement: Placement, precision: Precision) -> (HostTensor, HostTensor) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.safetensors");
    tiny::write(family, &path, DType::F16).unwrap().unwrap();
    forward_file(family, path, placement, precision)
}

/// The same with the network of a file.
fn forward_file(
    family: &str,
    path: PathBuf,
    placement: Placement,
    precision: Precision,
) -> (HostTensor, HostTensor) {
    let store = ModelStore::new(placement, OpenOptions::default());
    let unet = store.file_in(ModelSource::File(path), precision).unet().unwrap();
    let file = recorded();
    let need =
        |part: &str| tensor(&file, &format!("{family}.{part}")).unwrap_or_else(|| panic!("{family}.{part}"));
    let context = unet.context(&[Arc::new(need("context"))]).unwrap();
    let vector = tensor(&file, &format!("{family}.y"));
    let (x, timesteps) = (need("x"), need("timesteps"));
    let input = UnetInput { x: &x, timesteps: timesteps.data(), context: &context, vector: vector.as_ref() };
    (need("output"), unet.forward(&input, None).unwrap())
}

/// A hypernetwork at strength 0.7, as the node attaches it.
struct Hypered(Arc<kiln::models::ModelFile>);

impl UnetHook for Hypered {
    fn changes_sources(&self) -> Option<u64> {
        Some(1)
    }

    fn sources(&self, ops: Ops<'_>, sources: [&Tensor; 2]) -> Result<Option<[Tensor; 2]>, ModelError> {
        self.0.network::<Hypernetwork>()?.apply(ops, sources, 0.7)
    }
}

/// The recorded output under a hypernetwork (`data/families/hypernetwork.py`) and ours.
fn forward_with_hypernetwork(placement: Placement) -> (HostTensor, HostTensor) {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.safetensors");
    tiny::write("sd1", &path, DType::F16).unwrap().unwrap();
    let store = ModelStore::new(placement, OpenOptions::default());
    let unet = store.file(ModelSource::File(path)).unet().unwrap();
    let hook: Arc<dyn UnetHook> =
        Arc::new(Hypered(store.file(ModelSource::File(data.join("pytorch/hypernetwork.pt")))));
    let file = WeightsFile::open(&data.join("families/hypernetwork.safetensors")).unwrap();
    let need = |part: &str| tensor(&file, &format!("sd1-hypernetwork.{part}")).unwrap();
    let (x, timesteps, list) = (need("x"), need("timesteps"), [hook]);
    let context = unet.context_under(&[Arc::new(need("context"))], &list).unwrap();
    let input = UnetInput { x: &x, timesteps: timesteps.data(), context: &context, vector: None };
    let hooks = Hooks { list: &list, sigma: 1.0, sides: &[0, 0] };
    (need("output"), unet.forward_hooked(&input, &[], hooks).unwrap())
}

#[test]
fn attention_under_a_hypernetwork_is_that_of_float64() {
    let (want, got) = forward_with_hypernetwork(cpu());
    let (largest, rms) = errors(&want, &got);
    println!("hypernetwork: largest {largest:.2e}, rms {rms:.2e} of std");
    assert!(largest <= CPU_TOLERANCE, "{largest:e}");
    let (want, got) = forward_with_hypernetwork(simt());
    let (largest, rms) = errors(&want, &got);
    println!("hypernetwork on the simulated GPU: largest {largest:.2e}, rms {rms:.2e} of std");
    assert!(rms <= F16_TOLERANCE, "{rms:e}");
}

/// Largest and rms difference over the standard deviation of `want`.
fn errors(want: &HostTensor, got: &HostTensor) -> (f64, f64) {
    assert_eq!(want.shape(), got.shape());
    let n = want.len() as f64;
    let wide = |t: &HostTensor| t.data().iter().map(|v| f64::from(*v)).collect::<Vec<_>>();
    let (want, got) = (wide(want), wide(got));
    let mean = want.iter().sum::<f64>() / n;
    let std = (want.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n).sqrt();
    let differences: Vec<f64> = want.iter().zip(&got).map(|(a, b)| (a - b).abs()).collect();
    let rms = (differences.iter().map(|d| d * d).sum::<f64>() / n).sqrt();
    (differences.iter().copied().fold(0.0, f64::max) / std, rms / std)
}

fn cpu() -> Placement {
    let options = DeviceOptions { device: Device::Cpu, threads: Some(1), ..DeviceOptions::default() };
    backend::open(options).unwrap()
}

fn simt() -> Placement {
    let library: PathBuf = kiln::driver::simt::built_library(SimtVariant::Fast).unwrap_or_else(|| {
        let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
        let out = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("simt");
        build_simt(&kernels, &[], &out, SimtVariant::Fast).expect("the kernels compile")
    });
    let driver = SimtDriver::open(&library, SimtOptions::default()).unwrap();
    let shared = Shared::new(Arc::new(Gpu::new(Arc::new(driver)).unwrap()), None);
    Placement::all(Arc::new(CudaBackend::new(shared, Element::F16)))
}

#[test]
fn every_family_is_that_of_float64_on_the_cpu() {
    for family in FAMILIES {
        let (want, got) = forward(family, cpu(), Precision::Stored);
        let (largest, rms) = errors(&want, &got);
        println!("{family}: largest {largest:.2e}, rms {rms:.2e} of std");
        assert!(largest <= CPU_TOLERANCE, "{family}: {largest:e}");
    }
}

#[test]
fn every_family_is_that_of_float64_on_the_simulated_gpu() {
    for family in FAMILIES {
        let (want, got) = forward(family, simt(), Precision::Stored);
        let (largest, rms) = errors(&want, &got);
        println!("{family}: largest {largest:.2e}, rms {rms:.2e} of std");
        assert!(rms <= F16_TOLERANCE, "{family}: {rms:e}");
    }
}

/// Writes the weights of `from` as a file of 8-bit ones.
fn store_in_eight_bits(from: &Path, to: &Path, dtype: DType) {
    let file = WeightsFile::open(from).unwrap();
    let stored = if dtype == DType::F8E4M3 { Dtype::F8_E4M3 } else { Dtype::F8_E5M2 };
    let rounded: Vec<_> =
        file.names().map(|name| (name, file.get(name).unwrap().rounded_to(dtype))).collect();
    let views = rounded
        .iter()
        .map(|(name, raw)| (*name, TensorView::new(stored, raw.shape.to_vec(), &raw.bytes).unwrap()));
    let metadata = file.metadata().iter().map(|(key, value)| (key.clone(), value.clone())).collect();
    safetensors::serialize_to_file(views, Some(metadata), to).unwrap();
}

/// A file of 8-bit weights and weights rounded when they are loaded are the same network, bit for bit. With one bit
/// of mantissa less its distance from the unrounded one doubles, more or less: roundings of weights are
/// independent errors, and few enough of them that the output moves in proportion.
#[test]
fn eight_bit_weights_are_rounded_weights() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.safetensors");
    tiny::write("sdxl", &path, DType::F16).unwrap().unwrap();
    let distances =
        [(Precision::F8E4M3, DType::F8E4M3), (Precision::F8E5M2, DType::F8E5M2)].map(|(precision, dtype)| {
            let (want, rounded) = forward_file("sdxl", path.clone(), cpu(), precision);
            let eight = folder.path().join("eight.safetensors");
            store_in_eight_bits(&path, &eight, dtype);
            let (_, stored) = forward_file("sdxl", eight, cpu(), Precision::Stored);
            assert_eq!(rounded.data(), stored.data(), "{precision:?}");
            errors(&want, &rounded).1
        });
    println!("rms {distances:?} of std");
    assert!(distances[0] > 0.01, "{distances:?}");
    assert!((1.5..2.6).contains(&(distances[1] / distances[0])), "{distances:?}");
}
