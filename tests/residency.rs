//! Device memory of SDXL at 1024², by the runtime's own accounting, without a GPU and without its arithmetic.
//!
//! The runtime works as on a device — packing, pool, recording, launches — over a driver that keeps books of
//! memory but neither has any nor runs a kernel. The checkpoint is a file of zeros with SDXL's names and shapes,
//! which takes no disk.

use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use kiln::backend::cuda::{CudaBackend, Element, Gpu, Shared};
use kiln::driver::simt::{SimtDriver, SimtOptions};
use kiln::driver::toolchain::{SimtVariant, build_simt};
use kiln::driver::{
    DeviceInfo, DeviceMemory, DevicePtr, Driver, DriverError, Event, Function, FunctionInfo, Graph,
    Instruments, Launch, PinnedBuffer, Stream, TensorMap, TensorMapDesc,
};
use kiln::models::clip::{ClipToken, WeightedToken};
use kiln::models::text::{self, TextKind, TextPart};
use kiln::models::unet::UnetInput;
use kiln::models::{ModelFile, ModelSource, ModelStore};
use kiln::tensor::{HostTensor, Placement};
use kiln::weights::OpenOptions;
use kiln::weights::synth::Manifest;

/// What SDXL at 1024² may take.
const LIMIT_BYTES: u64 = 9_000_000_000;
/// Memory of the device that is played.
const DEVICE_BYTES: u64 = 24 << 30;
/// What memory is aligned to.
const ALIGN: u64 = 512;

/// Books of a device's memory.
#[derive(Default)]
struct Books {
    sizes: HashMap<u64, u64>,
    next: u64,
    used: u64,
    peak: u64,
}

/// A driver without memory and arithmetic; streams, events and graphs are the simulated driver's.
struct DryDriver {
    inner: SimtDriver,
    books: Mutex<Books>,
}

impl DryDriver {
    fn used_and_peak(&self) -> (u64, u64) {
        let books = self.books.lock().unwrap();
        (books.used, books.peak)
    }
}

impl Driver for DryDriver {
    fn device(&self) -> &DeviceInfo {
        self.inner.device()
    }

    fn instruments(&self) -> &Instruments {
        self.inner.instruments()
    }

    fn function(&self, module: &str, name: &str) -> Result<Function, DriverError> {
        self.inner.function(module, name)
    }

    fn function_info(&self, function: Function) -> Result<FunctionInfo, DriverError> {
        self.inner.function_info(function)
    }

    fn alloc(&self, bytes: usize, _stream: Stream) -> Result<DevicePtr, DriverError> {
        let mut books = self.books.lock().unwrap();
        let size = (bytes as u64).next_multiple_of(ALIGN).max(ALIGN);
        if books.used + size > DEVICE_BYTES {
            let (free, in_use) = (DEVICE_BYTES - books.used, books.used as usize);
            return Err(DriverError::OutOfMemory { requested: bytes, free, in_use });
        }
        books.next += ALIGN;
        let at = books.next;
        books.next += size;
        books.sizes.insert(at, size);
        books.used += size;
        books.peak = books.peak.max(books.used);
        Ok(DevicePtr(at))
    }

    fn free(&self, ptr: DevicePtr, _stream: Stream) -> Result<(), DriverError> {
        let mut books = self.books.lock().unwrap();
        let size = books.sizes.remove(&ptr.0).expect("memory that was given");
        books.used -= size;
        Ok(())
    }

    fn memory(&self) -> Result<DeviceMemory, DriverError> {
        let (used, _) = self.used_and_peak();
        Ok(DeviceMemory { free: DEVICE_BYTES - used, total: DEVICE_BYTES })
    }

    fn trim(&self) -> Result<(), DriverError> {
        Ok(())
    }

    fn pinned(&self, bytes: usize) -> Result<PinnedBuffer, DriverError> {
        self.inner.pinned(bytes)
    }

    fn upload(&self, _dst: DevicePtr, _src: &[u8], _stream: Stream) -> Result<(), DriverError> {
        Ok(())
    }

    fn upload_pinned(&self, _: DevicePtr, _: &PinnedBuffer, _: usize, _: Stream) -> Result<(), DriverError> {
        Ok(())
    }

    fn download(&self, dst: &mut [u8], _src: DevicePtr, _stream: Stream) -> Result<(), DriverError> {
        dst.fill(0);
        Ok(())
    }

    fn copy(&self, _: DevicePtr, _: DevicePtr, _: usize, _: Stream) -> Result<(), DriverError> {
        Ok(())
    }

    fn fill(&self, _: DevicePtr, _: u8, _: usize, _: Stream) -> Result<(), DriverError> {
        Ok(())
    }

    fn create_stream(&self) -> Result<Stream, DriverError> {
        self.inner.create_stream()
    }

    fn synchronize(&self, stream: Stream) -> Result<(), DriverError> {
        self.inner.synchronize(stream)
    }

    fn create_event(&self, timing: bool) -> Result<Event, DriverError> {
        self.inner.create_event(timing)
    }

    fn destroy_event(&self, event: Event) -> Result<(), DriverError> {
        self.inner.destroy_event(event)
    }

    fn record(&self, event: Event, stream: Stream) -> Result<(), DriverError> {
        self.inner.record(event, stream)
    }

    fn wait(&self, stream: Stream, event: Event) -> Result<(), DriverError> {
        self.inner.wait(stream, event)
    }

    fn is_done(&self, event: Event) -> Result<bool, DriverError> {
        self.inner.is_done(event)
    }

    fn synchronize_event(&self, event: Event) -> Result<(), DriverError> {
        self.inner.synchronize_event(event)
    }

    fn elapsed_ms(&self, from: Event, to: Event) -> Result<f32, DriverError> {
        self.inner.elapsed_ms(from, to)
    }

    fn begin_capture(&self, stream: Stream) -> Result<(), DriverError> {
        self.inner.begin_capture(stream)
    }

    fn end_capture(&self, stream: Stream) -> Result<Graph, DriverError> {
        self.inner.end_capture(stream)
    }

    fn launch_graph(&self, graph: Graph, stream: Stream) -> Result<(), DriverError> {
        self.inner.launch_graph(graph, stream)
    }

    fn destroy_graph(&self, graph: Graph) -> Result<(), DriverError> {
        self.inner.destroy_graph(graph)
    }

    fn tensor_map(&self, desc: &TensorMapDesc) -> Result<TensorMap, DriverError> {
        self.inner.tensor_map(desc)
    }

    fn launch(&self, _launch: &Launch, _params: &[&[u8]]) -> Result<(), DriverError> {
        Ok(())
    }
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

fn library() -> PathBuf {
    kiln::driver::simt::built_library(SimtVariant::Fast).unwrap_or_else(|| {
        let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
        let out = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("simt");
        build_simt(&kernels, &[], &out, SimtVariant::Fast).expect("the kernels compile")
    })
}

/// Encodes a prompt with both text encoders.
fn encode(file: &ModelFile) -> Arc<HostTensor> {
    let chunk = vec![WeightedToken { token: ClipToken::Id(49407), weight: 1.0 }; 77];
    let part = |variant| TextPart { encoder: file.clip(variant).unwrap(), chunks: vec![chunk.clone()] };
    let parts: Vec<_> = file.clip_variants().unwrap().into_iter().map(part).collect();
    Arc::new(text::encode(TextKind::Sdxl, &parts, None).unwrap().cond)
}

#[test]
fn sdxl_at_1024_pixels_fits_into_nine_gigabytes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sdxl.safetensors");
    hollow_checkpoint(&Manifest::built_in("sdxl-base").unwrap(), &path);

    let inner = SimtDriver::open(&library(), SimtOptions::default()).unwrap();
    let driver = Arc::new(DryDriver { inner, books: Mutex::default() });
    let shared = Shared::new(Arc::new(Gpu::new(driver.clone()).unwrap()), None);
    let backend = |element| Arc::new(CudaBackend::new(shared.clone(), element));
    let (f16, bf16) = (backend(Element::F16), backend(Element::BF16));
    let store =
        ModelStore::new(Placement { diffusion: f16.clone(), text: f16, vae: bf16 }, OpenOptions::default());
    let file = store.file(ModelSource::File(path));

    let conds = [encode(&file), encode(&file)];
    let text_bytes = driver.used_and_peak().0;
    let unet = file.unet().unwrap();
    let context = unet.context(&conds).unwrap();
    let x = HostTensor::zeros(&[2, 4, 128, 128]);
    let vector = HostTensor::zeros(&[2, 2816]);
    for _ in 0..3 {
        let input = UnetInput { x: &x, timesteps: &[500.0; 2], context: &context, vector: Some(&vector) };
        unet.forward(&input, None).unwrap();
    }
    let sampling_bytes = driver.used_and_peak();
    file.vae().unwrap().decode_raw(&x.rows(0, 1)).unwrap();
    let (used, peak) = driver.used_and_peak();
    let report = store.placement().diffusion.memory();
    println!(
        "text encoders {:.2} GB; with the UNet {:.2} GB, at most {:.2} GB; with the VAE {:.2} GB, at most {:.2} GB; \
         weights {:.2} GB",
        text_bytes as f64 / 1e9,
        sampling_bytes.0 as f64 / 1e9,
        sampling_bytes.1 as f64 / 1e9,
        used as f64 / 1e9,
        peak as f64 / 1e9,
        report.weights as f64 / 1e9
    );
    // 3.47 G parameters of two bytes, packed: nothing was left out.
    assert!(report.weights > 6_500_000_000, "{} bytes of weights", report.weights);
    assert!(peak <= LIMIT_BYTES, "{peak} bytes at the peak, {LIMIT_BYTES} may be used");
}
