//! A driver that keeps books of memory and launches but neither has memory nor runs a kernel.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use kiln::driver::simt::{SimtDriver, SimtOptions};
use kiln::driver::toolchain::{SimtVariant, build_simt};
use kiln::driver::{
    Capability, DeviceInfo, DeviceMemory, DevicePtr, Driver, DriverError, Event, Function, FunctionInfo,
    Graph, Instruments, Launch, PinnedBuffer, Stream, TensorMap, TensorMapDesc,
};

/// What memory is aligned to.
const ALIGN: u64 = 512;

/// Memory of the device that is played.
pub const DEVICE_BYTES: u64 = 24 << 30;
/// Multiprocessors of the device that is played: those of an H200.
const MULTIPROCESSORS: u32 = 132;

/// Books of a device's memory.
#[derive(Default)]
struct Books {
    sizes: HashMap<u64, u64>,
    next: u64,
    used: u64,
    peak: u64,
}

/// A driver without memory and arithmetic; streams, events and graphs are the simulated driver's.
pub struct DryDriver {
    inner: SimtDriver,
    info: DeviceInfo,
    books: Mutex<Books>,
    names: Mutex<HashMap<Function, String>>,
    launches: Mutex<Vec<Function>>,
}

impl DryDriver {
    /// A Hopper device with nothing on it.
    pub fn open() -> Self {
        Self::open_as(Capability { major: 9, minor: 0 })
    }

    /// A device of that capability with nothing on it.
    pub fn open_as(capability: Capability) -> Self {
        let library = kiln::driver::simt::built_library(SimtVariant::Fast).unwrap_or_else(|| {
            let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
            let out = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("simt");
            build_simt(&kernels, &[], &out, SimtVariant::Fast).expect("the kernels compile")
        });
        let inner = SimtDriver::open(&library, SimtOptions { capability, ..SimtOptions::default() }).unwrap();
        let info = DeviceInfo { multiprocessors: MULTIPROCESSORS, ..inner.device().clone() };
        Self { inner, info, books: Mutex::default(), names: Mutex::default(), launches: Mutex::default() }
    }

    /// Names of the kernels that were launched since the last call.
    pub fn take_launches(&self) -> Vec<String> {
        let launches = std::mem::take(&mut *self.launches.lock().unwrap());
        let names = self.names.lock().unwrap();
        launches.iter().map(|function| names[function].clone()).collect()
    }

    /// Bytes in use now, and the most there ever were.
    pub fn used_and_peak(&self) -> (u64, u64) {
        let books = self.books.lock().unwrap();
        (books.used, books.peak)
    }
}

impl Driver for DryDriver {
    fn device(&self) -> &DeviceInfo {
        &self.info
    }

    fn instruments(&self) -> &Instruments {
        self.inner.instruments()
    }

    fn function(&self, module: &str, name: &str) -> Result<Function, DriverError> {
        let function = self.inner.function(module, name)?;
        self.names.lock().unwrap().insert(function, name.to_owned());
        Ok(function)
    }

    fn has_module(&self, module: &str) -> Result<bool, DriverError> {
        self.inner.has_module(module)
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

    fn launch(&self, launch: &Launch, _params: &[&[u8]]) -> Result<(), DriverError> {
        if launch.shared > self.info.shared_memory {
            let kernel = self.names.lock().unwrap()[&launch.function].clone();
            let reason = format!("{} bytes of shared memory of {}", launch.shared, self.info.shared_memory);
            return Err(DriverError::Parameters { kernel, reason });
        }
        self.launches.lock().unwrap().push(launch.function);
        Ok(())
    }
}
