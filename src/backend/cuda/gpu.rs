//! A device with its stream: what launchers work with.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::CudaError;
use super::launch::hopper;
use crate::driver::{Capability, DevicePtr, Driver, DriverError, Graph, Launch, Stream};

/// Names a kernel: the kernel file's stem and the function.
#[derive(Clone, Debug)]
pub struct Kernel<'a> {
    /// File stem of the source.
    pub module: &'static str,
    /// Function.
    pub name: &'a str,
}

/// Geometry of a launch.
#[derive(Clone, Copy, Debug)]
pub struct Geometry {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory in bytes.
    pub shared: u32,
    /// Blocks of a cluster along x; 1 for none.
    pub cluster: u32,
}

impl Geometry {
    /// Blocks along x without shared memory.
    pub fn line(blocks: usize, threads: u32) -> Self {
        Self { grid: [blocks as u32, 1, 1], threads, shared: 0, cluster: 1 }
    }

    /// Blocks along x for a grid-stride loop over `work` threads' worth of work: at most sixteen a multiprocessor.
    pub fn strided(gpu: &Gpu, work: usize, threads: u32) -> Self {
        Self::line(work.div_ceil(threads as usize).clamp(1, 16 * gpu.multiprocessors().max(1)), threads)
    }
}

/// A device with its compute stream and scratch memory.
pub struct Gpu {
    driver: Arc<dyn Driver>,
    stream: Stream,
    is_capturing: AtomicBool,
    is_hopper: bool,
    room: OnceLock<hopper::Room>,
    workspace: Mutex<Workspace>,
    relief: Mutex<Option<Relief>>,
}

/// Called when the device is full: lets go of what can be had again.
pub type Relief = Arc<dyn Fn() + Send + Sync>;

#[derive(Default)]
struct Workspace {
    ptr: DevicePtr,
    bytes: usize,
    /// Outgrown memory that captured graphs may still name, with its size.
    outgrown: Vec<(DevicePtr, usize)>,
}

impl Gpu {
    /// Takes a driver into use.
    pub fn new(driver: Arc<dyn Driver>) -> Result<Self, CudaError> {
        let is_hopper = runs_hopper_kernels(driver.as_ref())?;
        let stream = driver.create_stream()?;
        Ok(Self {
            driver,
            stream,
            is_capturing: AtomicBool::new(false),
            is_hopper,
            room: OnceLock::new(),
            workspace: Mutex::default(),
            relief: Mutex::default(),
        })
    }

    /// The driver.
    pub fn driver(&self) -> &dyn Driver {
        self.driver.as_ref()
    }

    /// The stream that all compute work goes to.
    pub fn stream(&self) -> Stream {
        self.stream
    }

    /// Whether the device runs sm_90a code, and this build has it.
    pub fn is_hopper(&self) -> bool {
        self.is_hopper
    }

    /// Compute capability.
    pub fn capability(&self) -> Capability {
        self.driver.device().capability
    }

    /// Most shared memory of a block, in bytes.
    pub fn shared_memory(&self) -> usize {
        self.driver.device().shared_memory as usize
    }

    /// Streaming multiprocessors.
    pub fn multiprocessors(&self) -> usize {
        self.driver.device().multiprocessors as usize
    }

    /// Launches go into a graph from now on. Weights they read must be complete before the graph runs.
    pub fn begin_capture(&self) -> Result<(), CudaError> {
        self.driver.begin_capture(self.stream)?;
        self.is_capturing.store(true, Relaxed);
        Ok(())
    }

    /// The graph of all launches since [`begin_capture`](Self::begin_capture).
    pub fn end_capture(&self) -> Result<Graph, CudaError> {
        self.is_capturing.store(false, Relaxed);
        Ok(self.driver.end_capture(self.stream)?)
    }

    /// Whether launches go into a graph: then no weight is written any more while they run.
    pub fn is_capturing(&self) -> bool {
        self.is_capturing.load(Relaxed)
    }

    /// Names the shapes that the next launches work on, for traces. Every launcher does.
    pub(super) fn label(&self, text: impl FnOnce() -> String) {
        let instruments = self.driver.instruments();
        if instruments.is_tracing() {
            instruments.set_label(text());
        }
    }

    /// Launches a kernel on the compute stream.
    pub fn launch(
        &self,
        kernel: &Kernel<'_>,
        geometry: &Geometry,
        params: &[&[u8]],
    ) -> Result<(), CudaError> {
        Ok(self.driver.launch(&self.launch_of(kernel, geometry)?, params)?)
    }

    fn launch_of(&self, kernel: &Kernel<'_>, geometry: &Geometry) -> Result<Launch, CudaError> {
        let function = self.driver.function(kernel.module, kernel.name)?;
        Ok(Launch {
            shared: geometry.shared,
            // Every kernel of ours waits for its predecessor by itself (`begin_kernel` in ptx.cuh).
            overlaps: true,
            cluster: [geometry.cluster, 1, 1],
            ..Launch::new(function, geometry.grid, [geometry.threads, 1, 1], self.stream)
        })
    }

    /// How many clusters of a kernel run at a time.
    pub fn clusters(&self, kernel: &Kernel<'_>, geometry: &Geometry) -> Result<usize, CudaError> {
        Ok(self.driver.clusters(&self.launch_of(kernel, geometry)?)?)
    }

    /// Room on the device for tiles of products; asked of the driver once.
    pub(super) fn room(&self) -> &hopper::Room {
        self.room.get_or_init(|| hopper::Room::measure(self))
    }

    /// Whom to ask when the device is full.
    pub fn set_relief(&self, relief: Relief) {
        *self.relief.lock().unwrap_or_else(PoisonError::into_inner) = Some(relief);
    }

    /// Device memory; if the device is full, caches and idle models are let go, and it is asked once more.
    pub fn allocate(&self, bytes: usize) -> Result<DevicePtr, DriverError> {
        let ask = || self.driver.alloc(bytes, self.stream);
        match ask() {
            Err(DriverError::OutOfMemory { .. }) => {}
            answer => return answer,
        }
        let relief = self.relief.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(relief) = relief {
            relief();
        }
        self.driver.trim()?;
        tracing::info!(bytes, "device memory is short: caches and idle models were let go");
        ask()
    }

    /// Scratch memory of at least `bytes`, the same for every launch: work on the
    /// stream is in order, so a launcher may use all of it until the kernels it
    /// queues are done. Its content is undefined.
    pub fn workspace(&self, bytes: usize) -> Result<DevicePtr, CudaError> {
        let mut workspace = self.workspace.lock().unwrap_or_else(PoisonError::into_inner);
        if workspace.bytes < bytes {
            let ptr = self.allocate(bytes)?;
            if !workspace.ptr.is_null() {
                let old = (workspace.ptr, workspace.bytes);
                workspace.outgrown.push(old);
            }
            (workspace.ptr, workspace.bytes) = (ptr, bytes);
        }
        Ok(workspace.ptr)
    }

    /// Bytes of scratch memory, outgrown memory included.
    pub fn workspace_bytes(&self) -> usize {
        let workspace = self.workspace.lock().unwrap_or_else(PoisonError::into_inner);
        workspace.bytes + workspace.outgrown.iter().map(|(_, bytes)| bytes).sum::<usize>()
    }

    /// Gives the scratch memory back; no captured graph may be left.
    pub fn drop_workspace(&self) -> Result<(), CudaError> {
        let mut workspace = self.workspace.lock().unwrap_or_else(PoisonError::into_inner);
        let Workspace { ptr, outgrown, .. } = std::mem::take(&mut *workspace);
        let all = outgrown.into_iter().map(|(ptr, _)| ptr).chain([ptr]);
        for ptr in all.filter(|p| !p.is_null()) {
            self.driver.free(ptr, self.stream)?;
        }
        Ok(())
    }
}

/// Whether the device is a Hopper and has all kernels of its own: they are used together or not at all.
fn runs_hopper_kernels(driver: &dyn Driver) -> Result<bool, DriverError> {
    let device = driver.device();
    if (device.capability.major, device.capability.minor) != (9, 0) {
        return Ok(false);
    }
    for module in hopper::MODULES {
        if !driver.has_module(module)? {
            tracing::warn!(
                device = device.name,
                module,
                "this build lacks the kernels for Hopper: those for sm_80 do the work, slower; build with 90a in KILN_CUDA_ARCHS"
            );
            return Ok(false);
        }
    }
    Ok(true)
}
