//! A real GPU through the CUDA driver API, loaded at run time.
//!
//! - The primary context of the device, made current on whatever thread calls.
//! - Memory from a stream-ordered pool of our own that keeps what is freed until [`Driver::trim`].
//! - Kernels from fatbins: the modules that this binary carries, or a folder of
//!   sources ([`Modules`]); a module is loaded when its first function is asked for. One is loaded at once, to see whether
//!   there is code for the device at all.
//! - Streams do not wait for the default stream; graphs are captured in relaxed
//!   mode, so that other threads may go on uploading.
//! - Handles and device ranges are checked before the driver sees them: what a
//!   caller gets wrong is an error here, not memory corruption there.
//!
//! The API: "CUDA Driver API" manual. Nothing is linked; without a driver
//! [`CudaDriver::open`] says [`DriverError::NoDriver`].

mod context;
mod ffi;
mod handles;
mod module;
mod staging;
mod tensor_map;

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys::{
    self, CUevent, CUgraph, CUgraphExec, CUlaunchAttribute, CUlaunchAttributeID, CUlaunchAttributeValue,
    CUlaunchConfig, CUmemPool_attribute as PoolAttribute, CUmemoryPool, CUresult, CUstream,
    CUstreamCaptureMode,
};

use self::context::Context;
use self::ffi::{check, cu};
use self::handles::Handles;
pub use self::module::Modules;
use self::module::{Kernel, Loader};
use self::staging::Staging;
use super::{
    Capability, DeviceInfo, DeviceMemory, DevicePtr, Driver, DriverError, Event, Function, FunctionInfo,
    Graph, Instruments, Launch, PinnedBuffer, Stream, TensorMap, TensorMapDesc,
};

/// Devices of this machine; an error if there is no CUDA driver.
pub fn device_count() -> Result<usize, DriverError> {
    ffi::load()?;
    context::device_count()
}

/// The GPUs of this machine, by index; an error if there is no CUDA driver.
pub fn devices() -> Result<Vec<DeviceInfo>, DriverError> {
    (0..device_count()?).map(context::device).collect()
}

/// One GPU.
pub struct CudaDriver {
    context: Arc<Context>,
    info: DeviceInfo,
    instruments: Instruments,
    loader: Loader,
    /// The `CUmemoryPool`.
    pool: usize,
    /// A stream that records no graph: for allocations while another stream does.
    side: usize,
    streams: Handles<usize>,
    events: Handles<usize>,
    graphs: Handles<usize>,
    state: Mutex<State>,
    staging: Mutex<Staging>,
}

#[derive(Default)]
struct State {
    /// Address and size of every allocation.
    allocations: BTreeMap<u64, usize>,
    /// Streams that record a graph.
    capturing: HashSet<u64>,
}

impl CudaDriver {
    /// Opens the device of that index with those kernels.
    pub fn open(ordinal: usize, modules: &Modules) -> Result<Self, DriverError> {
        ffi::load()?;
        let context = Context::open(ordinal)?;
        context.enter()?;
        let info = context.info(ordinal)?;
        let loader = Loader::new(modules, &info)?;
        loader.probe(&info)?;
        let pool = create_pool(ordinal)?;
        let side = create_stream()?;
        Ok(Self {
            context: Arc::new(context),
            info,
            instruments: Instruments::default(),
            loader,
            pool,
            side,
            streams: Handles::new("stream"),
            events: Handles::new("event"),
            graphs: Handles::new("graph"),
            state: Mutex::default(),
            staging: Mutex::default(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The `CUstream` behind a handle, with the context current.
    fn enter(&self, stream: Stream) -> Result<CUstream, DriverError> {
        self.context.enter()?;
        Ok(self.streams.get(stream.0)? as CUstream)
    }

    fn is_capturing(&self, stream: Stream) -> bool {
        self.state().capturing.contains(&stream.0)
    }

    fn refuse_capture(&self, what: &'static str, stream: Stream) -> Result<(), DriverError> {
        if self.is_capturing(stream) {
            return Err(DriverError::Invalid { what, reason: "the stream records a graph".into() });
        }
        Ok(())
    }

    /// Checks that a range lies in one allocation.
    fn check_range(&self, what: &'static str, ptr: DevicePtr, bytes: usize) -> Result<(), DriverError> {
        check_range(&self.state().allocations, what, ptr, bytes)
    }

    fn alloc_on(&self, bytes: usize, stream: CUstream) -> Result<u64, CUresult> {
        let mut ptr = 0;
        // SAFETY: `ptr` is written; pool and stream are alive. Zero bytes are no valid size.
        let result = unsafe {
            sys::cuMemAllocFromPoolAsync(&mut ptr, bytes.max(1), self.pool as CUmemoryPool, stream)
        };
        if result == CUresult::CUDA_SUCCESS { Ok(ptr) } else { Err(result) }
    }

    fn pool_bytes(&self, attribute: PoolAttribute) -> Result<u64, DriverError> {
        let mut bytes = 0u64;
        let value = (&raw mut bytes).cast();
        // SAFETY: these attributes are 64-bit numbers; the pool is alive.
        unsafe { cu!(cuMemPoolGetAttribute(self.pool as CUmemoryPool, attribute, value)) }?;
        Ok(bytes)
    }

    /// Queues the kernel.
    fn launch_kernel(
        &self,
        kernel: &Kernel,
        launch: &Launch,
        params: &[&[u8]],
        stream: CUstream,
    ) -> CUresult {
        let mut attributes = [NO_ATTRIBUTE; 2];
        let launch = Launch { overlaps: launch.overlaps && kernel.waits_by_itself(), ..*launch };
        let config = self.launch_config(&launch, stream, &mut attributes);
        let mut pointers: Vec<*mut std::ffi::c_void> = params.iter().map(|p| p.as_ptr() as *mut _).collect();
        let function = kernel.raw as sys::CUfunction;
        // SAFETY: number and sizes of the parameters were checked; the driver copies them before it returns.
        // What the kernel does with addresses inside them can fault the device, not the host.
        unsafe { sys::cuLaunchKernelEx(&config, function, pointers.as_mut_ptr(), std::ptr::null_mut()) }
    }

    /// A launch as the driver wants it; valid as long as `attributes`.
    fn launch_config(
        &self,
        launch: &Launch,
        stream: CUstream,
        attributes: &mut [sys::CUlaunchAttribute; 2],
    ) -> CUlaunchConfig {
        let mut count = 0;
        if launch.cluster != [1, 1, 1] {
            attributes[count] = cluster_attribute(launch.cluster);
            count += 1;
        }
        if launch.overlaps && self.info.capability.major >= 9 {
            attributes[count].id = CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
            attributes[count].value.programmaticStreamSerializationAllowed = 1;
            count += 1;
        }
        CUlaunchConfig {
            gridDimX: launch.grid[0],
            gridDimY: launch.grid[1],
            gridDimZ: launch.grid[2],
            blockDimX: launch.block[0],
            blockDimY: launch.block[1],
            blockDimZ: launch.block[2],
            sharedMemBytes: launch.shared,
            hStream: stream,
            attrs: attributes.as_mut_ptr(),
            numAttrs: count as u32,
        }
    }

    /// Runs `launch` between two events and returns its microseconds on the device.
    fn timed(
        &self,
        stream: CUstream,
        launch: impl FnOnce() -> CUresult,
    ) -> Result<(CUresult, f64), DriverError> {
        let (from, to) = (new_event(true)?, new_event(true)?);
        let run = || {
            // SAFETY: events and stream are alive.
            unsafe { cu!(cuEventRecord(from as CUevent, stream)) }?;
            let result = launch();
            // SAFETY: as above.
            unsafe { cu!(cuEventRecord(to as CUevent, stream)) }?;
            Ok((result, elapsed(from, to)?))
        };
        let timed = run();
        for event in [from, to] {
            // SAFETY: made above, destroyed once.
            unsafe { cu!(cuEventDestroy_v2(event as CUevent)) }?;
        }
        timed.map(|(result, ms)| (result, f64::from(ms) * 1e3))
    }
}

const NO_ATTRIBUTE: CUlaunchAttribute = CUlaunchAttribute {
    id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_IGNORE,
    pad: [0; 4],
    value: CUlaunchAttributeValue { pad: [0; 64] },
};

/// The size of a launch's clusters.
fn cluster_attribute([x, y, z]: [u32; 3]) -> CUlaunchAttribute {
    let mut attribute = NO_ATTRIBUTE;
    attribute.id = CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    attribute.value.clusterDim = sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x, y, z };
    attribute
}

/// A pool that keeps freed memory until it is trimmed.
fn create_pool(ordinal: usize) -> Result<usize, DriverError> {
    let props = sys::CUmemPoolProps {
        allocType: sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
        handleTypes: sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_NONE,
        location: sys::CUmemLocation {
            type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE,
            id: i32::try_from(ordinal).unwrap_or(i32::MAX),
        },
        win32SecurityAttributes: std::ptr::null_mut(),
        maxSize: 0,
        usage: 0,
        reserved: [0; 54],
    };
    let mut pool: CUmemoryPool = std::ptr::null_mut();
    // SAFETY: `pool` is written; the properties are complete.
    unsafe { cu!(cuMemPoolCreate(&mut pool, &props)) }?;
    let mut keep = u64::MAX;
    let value = (&raw mut keep).cast();
    let threshold = PoolAttribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the attribute is a 64-bit number; the pool is alive.
    unsafe { cu!(cuMemPoolSetAttribute(pool, threshold, value)) }?;
    Ok(pool as usize)
}

fn create_stream() -> Result<usize, DriverError> {
    let mut stream: CUstream = std::ptr::null_mut();
    // SAFETY: `stream` is written.
    unsafe { cu!(cuStreamCreate(&mut stream, sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32)) }?;
    Ok(stream as usize)
}

fn new_event(timing: bool) -> Result<usize, DriverError> {
    let flags = match timing {
        true => sys::CUevent_flags::CU_EVENT_DEFAULT,
        false => sys::CUevent_flags::CU_EVENT_DISABLE_TIMING,
    };
    let mut event: CUevent = std::ptr::null_mut();
    // SAFETY: `event` is written.
    unsafe { cu!(cuEventCreate(&mut event, flags as u32)) }?;
    Ok(event as usize)
}

/// Waits for `to` and returns the milliseconds since `from`.
fn elapsed(from: usize, to: usize) -> Result<f32, DriverError> {
    let mut ms = 0.0;
    // SAFETY: the caller's events are alive.
    unsafe { cu!(cuEventSynchronize(to as CUevent)) }?;
    // SAFETY: as above; `ms` is written.
    unsafe { cu!(cuEventElapsedTime_v2(&mut ms, from as CUevent, to as CUevent)) }?;
    Ok(ms)
}

fn check_range(
    allocations: &BTreeMap<u64, usize>,
    what: &'static str,
    ptr: DevicePtr,
    bytes: usize,
) -> Result<(), DriverError> {
    let holder = allocations.range(..=ptr.0).next_back();
    let fits = holder.is_some_and(|(base, size)| {
        let offset = (ptr.0 - base) as usize;
        offset <= *size && bytes <= *size - offset
    });
    if fits {
        return Ok(());
    }
    let reason = match holder {
        Some((base, size)) => {
            format!("{bytes} bytes at {:#x}; the allocation before it is {size} bytes at {base:#x}", ptr.0)
        }
        None => format!("{bytes} bytes at {:#x}, which is no device memory", ptr.0),
    };
    Err(DriverError::Invalid { what, reason })
}

impl Driver for CudaDriver {
    fn device(&self) -> &DeviceInfo {
        &self.info
    }

    fn instruments(&self) -> &Instruments {
        &self.instruments
    }

    fn function(&self, module: &str, name: &str) -> Result<Function, DriverError> {
        if let Some(function) = self.loader.known(module, name) {
            return Ok(function);
        }
        self.context.enter()?;
        self.loader.load(module, name, &self.info)
    }

    fn has_module(&self, module: &str) -> Result<bool, DriverError> {
        self.context.enter()?;
        self.loader.has(module, &self.info)
    }

    fn function_info(&self, function: Function) -> Result<FunctionInfo, DriverError> {
        Ok(self.loader.kernel(function)?.info)
    }

    fn alloc(&self, bytes: usize, stream: Stream) -> Result<DevicePtr, DriverError> {
        let own = self.enter(stream)?;
        if self.instruments.is_failing() {
            return Err(DriverError::OutOfMemory {
                requested: bytes,
                free: self.memory()?.free,
                in_use: self.instruments.counts().bytes_in_use as usize,
            });
        }
        // An allocation on a stream that records would become the graph's own memory.
        let is_capturing = self.is_capturing(stream);
        let queue = if is_capturing { self.side as CUstream } else { own };
        let mut result = self.alloc_on(bytes, queue);
        if result == Err(CUresult::CUDA_ERROR_OUT_OF_MEMORY) || (is_capturing && result.is_ok()) {
            // Memory whose release is still queued counts as used until the stream is there.
            self.instruments.synced();
            // SAFETY: the stream is alive.
            unsafe { cu!(cuStreamSynchronize(queue)) }?;
            if result.is_err() {
                result = self.alloc_on(bytes, queue);
            }
        }
        match result {
            Ok(ptr) => {
                self.state().allocations.insert(ptr, bytes);
                self.instruments.allocated(bytes);
                Ok(DevicePtr(ptr))
            }
            Err(CUresult::CUDA_ERROR_OUT_OF_MEMORY) => Err(DriverError::OutOfMemory {
                requested: bytes,
                free: self.memory()?.free,
                in_use: self.instruments.counts().bytes_in_use as usize,
            }),
            Err(other) => check("cuMemAllocFromPoolAsync", other).map(|()| DevicePtr::NULL),
        }
    }

    fn free(&self, ptr: DevicePtr, stream: Stream) -> Result<(), DriverError> {
        let queue = self.enter(stream)?;
        // A graph names addresses: they must stay taken as long as it may run.
        self.refuse_capture("free", stream)?;
        let Some(bytes) = self.state().allocations.remove(&ptr.0) else {
            let reason = format!("{:#x} is not an allocation, or was freed before", ptr.0);
            return Err(DriverError::Invalid { what: "free", reason });
        };
        self.instruments.freed(bytes);
        // SAFETY: allocated from the pool and freed once.
        unsafe { cu!(cuMemFreeAsync(ptr.0, queue)) }
    }

    fn memory(&self) -> Result<DeviceMemory, DriverError> {
        self.context.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: both are written.
        unsafe { cu!(cuMemGetInfo_v2(&mut free, &mut total)) }?;
        // What the pool keeps for reuse is free to us.
        let reserved = self.pool_bytes(PoolAttribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?;
        let used = self.pool_bytes(PoolAttribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?;
        Ok(DeviceMemory { free: free as u64 + reserved.saturating_sub(used), total: total as u64 })
    }

    fn trim(&self) -> Result<(), DriverError> {
        self.context.enter()?;
        if !self.state().capturing.is_empty() {
            let reason = "a stream records a graph, which a wait for the device would spoil".into();
            return Err(DriverError::Invalid { what: "trim", reason });
        }
        // Only memory whose release has happened can go back.
        self.instruments.synced();
        // SAFETY: a context is current.
        unsafe { cu!(cuCtxSynchronize()) }?;
        // SAFETY: the pool is alive.
        unsafe { cu!(cuMemPoolTrimTo(self.pool as CUmemoryPool, 0)) }
    }

    fn pinned(&self, bytes: usize) -> Result<PinnedBuffer, DriverError> {
        self.context.enter()?;
        let mut ptr = std::ptr::null_mut();
        // Usable from every context of the process.
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE;
        // SAFETY: `ptr` is written; zero bytes are no valid size.
        unsafe { cu!(cuMemHostAlloc(&mut ptr, bytes.max(1), flags)) }?;
        // SAFETY: fresh memory of at least `bytes` bytes.
        unsafe { std::ptr::write_bytes(ptr.cast::<u8>(), 0, bytes) };
        let context = self.context.clone();
        let release = move |ptr: *mut u8, _| {
            // SAFETY: allocated above and freed once. A drop has no way to report a refusal.
            let _ = context.enter().and_then(|()| unsafe { cu!(cuMemFreeHost(ptr.cast())) });
        };
        // SAFETY: initialised, owned by the buffer alone, freed by `release`.
        Ok(unsafe { PinnedBuffer::new(ptr.cast(), bytes, Box::new(release)) })
    }

    fn upload(&self, dst: DevicePtr, src: &[u8], stream: Stream) -> Result<(), DriverError> {
        let queue = self.enter(stream)?;
        self.refuse_capture("upload", stream)?;
        self.check_range("upload", dst, src.len())?;
        self.instruments.copied_up(src.len());
        let mut staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        staging.upload(dst, src, queue, &self.instruments, |bytes| self.pinned(bytes))
    }

    fn upload_pinned(
        &self,
        dst: DevicePtr,
        src: &PinnedBuffer,
        bytes: usize,
        stream: Stream,
    ) -> Result<(), DriverError> {
        let queue = self.enter(stream)?;
        self.check_range("upload", dst, bytes)?;
        let Some(src) = src.bytes().get(..bytes) else {
            let reason = format!("{bytes} bytes of a pinned buffer of {}", src.len());
            return Err(DriverError::Invalid { what: "upload", reason });
        };
        self.instruments.copied_up(bytes);
        // SAFETY: the device range is allocated; the source is page-locked and only read. A caller that
        // changes or drops it too early spoils the copy, not the host.
        unsafe { cu!(cuMemcpyHtoDAsync_v2(dst.0, src.as_ptr().cast(), bytes, queue)) }
    }

    fn download(&self, dst: &mut [u8], src: DevicePtr, stream: Stream) -> Result<(), DriverError> {
        let queue = self.enter(stream)?;
        self.refuse_capture("download", stream)?;
        self.check_range("download", src, dst.len())?;
        self.instruments.copied_down(dst.len());
        self.instruments.synced();
        // SAFETY: the device range is allocated, `dst` is writable and outlives the wait below.
        let copied = unsafe { cu!(cuMemcpyDtoHAsync_v2(dst.as_mut_ptr().cast(), src.0, dst.len(), queue)) };
        // SAFETY: the stream is alive.
        copied.and(unsafe { cu!(cuStreamSynchronize(queue)) })
    }

    fn copy(&self, dst: DevicePtr, src: DevicePtr, bytes: usize, stream: Stream) -> Result<(), DriverError> {
        let queue = self.enter(stream)?;
        self.check_range("copy to", dst, bytes)?;
        self.check_range("copy from", src, bytes)?;
        // SAFETY: both ranges are allocated.
        unsafe { cu!(cuMemcpyDtoDAsync_v2(dst.0, src.0, bytes, queue)) }
    }

    fn fill(&self, dst: DevicePtr, value: u8, bytes: usize, stream: Stream) -> Result<(), DriverError> {
        let queue = self.enter(stream)?;
        self.check_range("fill", dst, bytes)?;
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the range is allocated.
        unsafe { cu!(cuMemsetD8Async(dst.0, value, bytes, queue)) }
    }

    fn create_stream(&self) -> Result<Stream, DriverError> {
        self.context.enter()?;
        Ok(Stream(self.streams.insert(create_stream()?)))
    }

    fn synchronize(&self, stream: Stream) -> Result<(), DriverError> {
        let queue = self.enter(stream)?;
        self.refuse_capture("synchronize", stream)?;
        self.instruments.synced();
        // SAFETY: the stream is alive.
        unsafe { cu!(cuStreamSynchronize(queue)) }
    }

    fn create_event(&self, timing: bool) -> Result<Event, DriverError> {
        self.context.enter()?;
        Ok(Event(self.events.insert(new_event(timing)?)))
    }

    fn destroy_event(&self, event: Event) -> Result<(), DriverError> {
        self.context.enter()?;
        // SAFETY: taken out of the living ones, so destroyed once.
        unsafe { cu!(cuEventDestroy_v2(self.events.remove(event.0)? as CUevent)) }
    }

    fn record(&self, event: Event, stream: Stream) -> Result<(), DriverError> {
        let queue = self.enter(stream)?;
        // SAFETY: both are alive.
        unsafe { cu!(cuEventRecord(self.events.get(event.0)? as CUevent, queue)) }
    }

    fn wait(&self, stream: Stream, event: Event) -> Result<(), DriverError> {
        let queue = self.enter(stream)?;
        // SAFETY: both are alive.
        unsafe { cu!(cuStreamWaitEvent(queue, self.events.get(event.0)? as CUevent, 0)) }
    }

    fn is_done(&self, event: Event) -> Result<bool, DriverError> {
        self.context.enter()?;
        // SAFETY: the event is alive.
        match unsafe { sys::cuEventQuery(self.events.get(event.0)? as CUevent) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            other => check("cuEventQuery", other).map(|()| true),
        }
    }

    fn synchronize_event(&self, event: Event) -> Result<(), DriverError> {
        self.context.enter()?;
        self.instruments.synced();
        // SAFETY: the event is alive.
        unsafe { cu!(cuEventSynchronize(self.events.get(event.0)? as CUevent)) }
    }

    fn elapsed_ms(&self, from: Event, to: Event) -> Result<f32, DriverError> {
        self.context.enter()?;
        let (from, to) = (self.events.get(from.0)?, self.events.get(to.0)?);
        let mut ms = 0.0;
        // SAFETY: `ms` is written; both events are alive.
        unsafe { cu!(cuEventElapsedTime_v2(&mut ms, from as CUevent, to as CUevent)) }?;
        Ok(ms)
    }

    fn begin_capture(&self, stream: Stream) -> Result<(), DriverError> {
        let queue = self.enter(stream)?;
        self.refuse_capture("graph capture", stream)?;
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream is alive.
        unsafe { cu!(cuStreamBeginCapture_v2(queue, mode)) }?;
        self.state().capturing.insert(stream.0);
        Ok(())
    }

    fn end_capture(&self, stream: Stream) -> Result<Graph, DriverError> {
        let queue = self.enter(stream)?;
        if !self.state().capturing.remove(&stream.0) {
            let reason = "the stream does not record".into();
            return Err(DriverError::Invalid { what: "graph capture", reason });
        }
        let mut graph: CUgraph = std::ptr::null_mut();
        // SAFETY: `graph` is written; the stream is alive.
        unsafe { cu!(cuStreamEndCapture(queue, &mut graph)) }?;
        let mut run: CUgraphExec = std::ptr::null_mut();
        // SAFETY: `run` is written; the graph is complete.
        let made = unsafe { cu!(cuGraphInstantiateWithFlags(&mut run, graph, 0)) };
        // SAFETY: the executable graph does not need it any more.
        made.and(unsafe { cu!(cuGraphDestroy(graph)) })?;
        Ok(Graph(self.graphs.insert(run as usize)))
    }

    fn launch_graph(&self, graph: Graph, stream: Stream) -> Result<(), DriverError> {
        let queue = self.enter(stream)?;
        self.instruments.graph_launched();
        // SAFETY: both are alive.
        unsafe { cu!(cuGraphLaunch(self.graphs.get(graph.0)? as CUgraphExec, queue)) }
    }

    fn destroy_graph(&self, graph: Graph) -> Result<(), DriverError> {
        self.context.enter()?;
        // SAFETY: taken out of the living ones, so destroyed once.
        unsafe { cu!(cuGraphExecDestroy(self.graphs.remove(graph.0)? as CUgraphExec)) }
    }

    fn tensor_map(&self, desc: &TensorMapDesc) -> Result<TensorMap, DriverError> {
        self.context.enter()?;
        tensor_map::encode(desc, self.info.driver_version)
    }

    fn clusters(&self, launch: &Launch) -> Result<usize, DriverError> {
        let kernel = self.loader.kernel(launch.function)?;
        let queue = self.enter(launch.stream)?;
        let mut attributes = [NO_ATTRIBUTE; 2];
        // "The cluster size must be specified in config": also that of a launch without clusters.
        let one = (launch.cluster == [1, 1, 1]).then_some(cluster_attribute([1, 1, 1]));
        let mut config = self.launch_config(&Launch { overlaps: false, ..*launch }, queue, &mut attributes);
        if let Some(one) = &one {
            (config.attrs, config.numAttrs) = (std::ptr::from_ref(one).cast_mut(), 1);
        }
        let mut count = 0;
        // SAFETY: `count` is written; the function is alive; attributes are only read.
        let asked =
            unsafe { sys::cuOccupancyMaxActiveClusters(&mut count, kernel.raw as sys::CUfunction, &config) };
        if asked == CUresult::CUDA_ERROR_INVALID_CLUSTER_SIZE {
            return Ok(0);
        }
        check("cuOccupancyMaxActiveClusters", asked)?;
        Ok(usize::try_from(count).unwrap_or(0))
    }

    fn launch(&self, launch: &Launch, params: &[&[u8]]) -> Result<(), DriverError> {
        let kernel = self.loader.kernel(launch.function)?;
        kernel.check_launch(launch, params, &self.info)?;
        let queue = self.enter(launch.stream)?;
        let result = self.instruments.launched(&kernel.name, launch, || {
            let run = || self.launch_kernel(&kernel, launch, params, queue);
            if self.instruments.is_tracing() && !self.is_capturing(launch.stream) {
                self.timed(queue, run).map(|(result, us)| (result, Some(us)))
            } else {
                Ok((run(), None))
            }
        })?;
        check("cuLaunchKernelEx", result)
            .map_err(|error| DriverError::Kernel(format!("{}: {error} ({launch:?})", kernel.name)))
    }
}

impl Drop for CudaDriver {
    fn drop(&mut self) {
        if self.context.enter().is_err() {
            return;
        }
        // Nothing here can be reported: what the driver refuses goes with the context.
        // SAFETY: a context is current.
        let _ = unsafe { cu!(cuCtxSynchronize()) };
        for graph in self.graphs.take_all() {
            // SAFETY: alive until here, and not running.
            let _ = unsafe { cu!(cuGraphExecDestroy(graph as CUgraphExec)) };
        }
        for event in self.events.take_all() {
            // SAFETY: alive until here.
            let _ = unsafe { cu!(cuEventDestroy_v2(event as CUevent)) };
        }
        self.staging.lock().unwrap_or_else(PoisonError::into_inner).destroy();
        for ptr in std::mem::take(&mut self.state().allocations).into_keys() {
            // SAFETY: allocated from the pool and not freed before.
            let _ = unsafe { cu!(cuMemFreeAsync(ptr, self.side as CUstream)) };
        }
        // SAFETY: alive until here.
        let _ = unsafe { cu!(cuStreamSynchronize(self.side as CUstream)) };
        for stream in self.streams.take_all().into_iter().chain([self.side]) {
            // SAFETY: alive until here, and idle.
            let _ = unsafe { cu!(cuStreamDestroy_v2(stream as CUstream)) };
        }
        // SAFETY: alive until here; nothing allocated from it is left.
        let _ = unsafe { cu!(cuMemPoolDestroy(self.pool as CUmemoryPool)) };
        self.loader.unload();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_must_lie_in_one_allocation() {
        let allocations = BTreeMap::from([(0x1000, 64), (0x2000, 16)]);
        let check = |ptr, bytes| check_range(&allocations, "fill", DevicePtr(ptr), bytes);
        assert!(check(0x1000, 64).is_ok());
        assert!(check(0x1010, 48).is_ok());
        assert!(check(0x2010, 0).is_ok());
        let error = check(0x1010, 49).unwrap_err().to_string();
        assert_eq!(error, "fill: 49 bytes at 0x1010; the allocation before it is 64 bytes at 0x1000");
        assert!(check(0x0fff, 1).unwrap_err().to_string().contains("no device memory"));
        assert!(check(0x2000, usize::MAX).is_err());
    }

    #[test]
    fn without_a_driver_opening_is_a_typed_error() {
        match device_count() {
            Err(DriverError::NoDriver { reason }) => {
                assert!(
                    reason.contains("libcuda") || reason.contains("too old") || reason.contains("cuInit")
                );
                let opened = CudaDriver::open(0, &Modules::Embedded);
                assert!(matches!(opened, Err(DriverError::NoDriver { .. })));
            }
            Err(other) => panic!("{other}"),
            Ok(count) => {
                let opened = CudaDriver::open(count, &Modules::Embedded);
                assert!(matches!(opened, Err(DriverError::NoDevice { .. })));
            }
        }
    }
}
