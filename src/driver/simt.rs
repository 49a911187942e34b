//! The SIMT layer as a driver: kernels compiled by a C++ compiler, run by fibers on the CPU.
//!
//! A test instrument, not a backend: strict, not fast. The library that holds
//! the kernels is loaded at run time ([`toolchain::build_simt`] makes it), so
//! the product does not carry it. What the layer emulates and what it cannot
//! catch stands in `kernels/simt/README.md`.
//!
//! Streams are in order and work is done when the call returns; a graph is a
//! list of calls.
//!
//! [`toolchain::build_simt`]: super::toolchain::build_simt

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::kernel_folder::build_simt_over;
use super::toolchain::SimtVariant;
use super::{
    Capability, DeviceInfo, DeviceMemory, DevicePtr, Driver, DriverError, Event, Function, FunctionInfo,
    Graph, Instruments, Launch, PinnedBuffer, Stream, TensorMap, TensorMapDesc,
};

/// Order in which the threads of a block run when several could.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// Lowest thread first.
    #[default]
    Forward,
    /// Highest thread first, last block first.
    Reverse,
    /// At random from a seed; copies land at random moments.
    Random(u64),
}

/// The library that was built with this binary, or the one that `KILN_SIMT_LIB` names; if it is there.
pub fn built_library(variant: SimtVariant) -> Option<PathBuf> {
    let built = match variant {
        SimtVariant::Fast => option_env!("KILN_SIMT_FAST"),
        SimtVariant::Checked => option_env!("KILN_SIMT_CHECKED"),
        SimtVariant::Turing => None,
    };
    let named = std::env::var_os("KILN_SIMT_LIB").filter(|name| !name.is_empty());
    named.map(PathBuf::from).or_else(|| built.map(PathBuf::from)).filter(|path| path.is_file())
}

/// The library with the kernels of a folder in place of the binary's own, compiled now; else the one that was built.
pub fn library(kernels: Option<&Path>, variant: SimtVariant) -> Result<PathBuf, DriverError> {
    if let Some(kernels) = kernels {
        return Ok(build_simt_over(kernels, built_library(variant).as_deref(), variant)?);
    }
    built_library(variant).ok_or_else(|| DriverError::NoKernels {
        device: "the SIMT layer".into(),
        reason: "the library is not where the build put it; name it in KILN_SIMT_LIB, or the sources with \
                 --kernels-dir"
            .into(),
    })
}

/// How to open the SIMT layer.
#[derive(Clone, Copy, Debug)]
pub struct SimtOptions {
    /// Order of threads.
    pub order: Order,
    /// OS threads that run blocks.
    pub workers: usize,
    /// Capability to claim: decides which kernels a launcher chooses.
    pub capability: Capability,
    /// Multiprocessors to claim: decides split-K and persistent grids.
    pub multiprocessors: u32,
    /// Device memory to claim, in bytes.
    pub memory: u64,
    /// Most shared memory of a block to claim, in bytes; that of the capability if not given.
    pub shared_memory: Option<u32>,
}

impl Default for SimtOptions {
    fn default() -> Self {
        Self {
            order: Order::Forward,
            workers: std::thread::available_parallelism().map_or(1, usize::from),
            capability: Capability { major: 8, minor: 0 },
            multiprocessors: 8,
            memory: 8 << 30,
            shared_memory: None,
        }
    }
}

type LaunchFn = unsafe extern "C" fn(
    *const c_void,
    *const u32, // grid, block, cluster: nine numbers
    u32,
    *mut *mut c_void,
    *const Schedule,
) -> c_int;

/// `simt_schedule` of `kernels/simt/simt.h`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Schedule {
    order: u32,
    workers: u32,
    seed: u64,
}

impl Schedule {
    fn new(order: Order, workers: usize) -> Self {
        let (order, seed) = match order {
            Order::Forward => (0, 1),
            Order::Reverse => (1, 1),
            Order::Random(seed) => (2, seed),
        };
        Self { order, workers: u32::try_from(workers).unwrap_or(1), seed }
    }
}

/// The functions of `kernels/simt/simt.h`.
struct Api {
    get_function: unsafe extern "C" fn(*const c_char, *const c_char) -> *const c_void,
    has_module: unsafe extern "C" fn(*const c_char) -> c_int,
    kernel_name: unsafe extern "C" fn(c_int) -> *const c_char,
    param_count: unsafe extern "C" fn(*const c_void) -> c_int,
    param_size: unsafe extern "C" fn(*const c_void, c_int) -> u32,
    alloc: unsafe extern "C" fn(usize) -> u64,
    free: unsafe extern "C" fn(u64) -> c_int,
    memcpy: unsafe extern "C" fn(u64, u64, usize) -> c_int,
    memset: unsafe extern "C" fn(u64, c_int, usize) -> c_int,
    drain: unsafe extern "C" fn(),
    launch: LaunchFn,
    last_error: unsafe extern "C" fn() -> *const c_char,
    bank_conflicts: unsafe extern "C" fn() -> u64,
    tensor_map: unsafe extern "C" fn(*mut c_void, *const MapDesc) -> c_int,
    /// Never unloaded: its signal handler, its fibers and their stacks outlive a driver, and the next one uses them again.
    /// Loaded anew for every driver they would pile up until the process may map no more memory.
    _library: ManuallyDrop<libloading::Library>,
}

/// `simt_map_desc` of `kernels/simt/simt.h`.
#[repr(C)]
#[derive(Default)]
struct MapDesc {
    base: u64,
    extents: [u64; 5],
    strides: [u64; 4],
    boxes: [u32; 5],
    rank: u32,
    element_bytes: u32,
    swizzle_bytes: u32,
    is_im2col: u32,
    lower: [i32; 2],
    upper: [i32; 2],
    pixels: u32,
    pixel_stride: [u32; 2],
}

/// One call of a captured graph.
#[derive(Clone)]
enum Call {
    Launch { launch: Launch, params: Vec<Vec<u8>> },
    Copy { dst: DevicePtr, src: u64, bytes: usize },
    Fill { dst: DevicePtr, value: u8, bytes: usize },
}

#[derive(Default)]
struct State {
    sizes: HashMap<u64, usize>,
    in_use: u64,
    functions: HashMap<String, HashMap<String, Function>>,
    names: HashMap<u64, String>,
    events: HashMap<u64, std::time::Instant>,
    next: u64,
    capturing: HashMap<u64, Vec<Call>>,
    graphs: HashMap<u64, Vec<Call>>,
}

/// The SIMT layer.
pub struct SimtDriver {
    api: Api,
    info: DeviceInfo,
    instruments: Instruments,
    state: Mutex<State>,
    /// The layer runs one launch at a time; in this order.
    running: Mutex<Schedule>,
}

impl SimtDriver {
    /// Loads a library that [`toolchain::build_simt`](super::toolchain::build_simt) made.
    pub fn open(library: &Path, options: SimtOptions) -> Result<Self, DriverError> {
        let fail = |error: libloading::Error| DriverError::NoKernels {
            device: "the SIMT layer".into(),
            reason: format!("{}: {error}", library.display()),
        };
        // SAFETY: the library is ours; its constructors only fill the table of kernels.
        let library = unsafe { libloading::Library::new(library) }.map_err(fail)?;
        // SAFETY: the types are those of simt.h, and the library stays loaded as long as `Api` lives.
        let api = unsafe {
            Api {
                get_function: *library.get(b"simt_get_function").map_err(fail)?,
                has_module: *library.get(b"simt_has_module").map_err(fail)?,
                kernel_name: *library.get(b"simt_kernel_name").map_err(fail)?,
                param_count: *library.get(b"simt_param_count").map_err(fail)?,
                param_size: *library.get(b"simt_param_size").map_err(fail)?,
                alloc: *library.get(b"simt_alloc").map_err(fail)?,
                free: *library.get(b"simt_free").map_err(fail)?,
                memcpy: *library.get(b"simt_memcpy").map_err(fail)?,
                memset: *library.get(b"simt_memset").map_err(fail)?,
                drain: *library.get(b"simt_drain").map_err(fail)?,
                launch: *library.get(b"simt_launch").map_err(fail)?,
                last_error: *library.get(b"simt_last_error").map_err(fail)?,
                bank_conflicts: *library.get(b"simt_last_bank_conflicts").map_err(fail)?,
                tensor_map: *library.get(b"simt_tensor_map").map_err(fail)?,
                _library: ManuallyDrop::new(library),
            }
        };
        let info = DeviceInfo {
            name: format!("SIMT layer ({} workers)", options.workers),
            ordinal: 0,
            capability: options.capability,
            multiprocessors: options.multiprocessors,
            shared_memory: options.shared_memory.unwrap_or(options.capability.shared_memory()),
            memory: options.memory,
            l2_cache: 0,
            driver_version: 0,
            is_simulated: true,
        };
        Ok(Self {
            api,
            info,
            instruments: Instruments::default(),
            state: Mutex::default(),
            running: Mutex::new(Schedule::new(options.order, options.workers)),
        })
    }

    /// Changes the order of threads for the launches to come.
    pub fn set_order(&self, order: Order, workers: usize) {
        *self.running.lock().unwrap_or_else(PoisonError::into_inner) = Schedule::new(order, workers);
    }

    /// The names of all kernels of the library, sorted.
    pub fn kernels(&self) -> Vec<String> {
        let mut names: Vec<String> = (0..)
            // SAFETY: no preconditions.
            .map(|i| unsafe { (self.api.kernel_name)(i) })
            .take_while(|name| !name.is_null())
            // SAFETY: a C string of the library, which is never unloaded.
            .map(|name| unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned())
            .collect();
        names.sort_unstable();
        names
    }

    /// Bank conflicts of `ldmatrix` in this thread's last launch: wavefronts beyond one per 8×8 matrix.
    pub fn last_bank_conflicts(&self) -> u64 {
        // SAFETY: no preconditions.
        unsafe { (self.api.bank_conflicts)() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn last_error(&self) -> DriverError {
        // SAFETY: the layer returns a C string that lives until this thread's next call.
        let text = unsafe { CStr::from_ptr((self.api.last_error)()) };
        DriverError::Kernel(text.to_string_lossy().into_owned())
    }

    fn check(&self, result: c_int) -> Result<(), DriverError> {
        if result == 0 { Ok(()) } else { Err(self.last_error()) }
    }

    /// Takes `call` into the graph that `stream` records, if it does.
    fn captured(&self, stream: Stream, call: impl FnOnce() -> Call) -> bool {
        match self.state().capturing.get_mut(&stream.0) {
            Some(calls) => {
                calls.push(call());
                true
            }
            None => false,
        }
    }

    fn run(&self, call: &Call) -> Result<(), DriverError> {
        match call {
            Call::Launch { launch, params } => {
                let params: Vec<&[u8]> = params.iter().map(Vec::as_slice).collect();
                self.run_kernel(launch, &params)
            }
            Call::Copy { dst, src, bytes } => {
                // SAFETY: device ranges are checked by the layer; host sources outlive the call or, in a
                // graph, are pinned buffers that the caller keeps.
                self.check(unsafe { (self.api.memcpy)(dst.0, *src, *bytes) })
            }
            Call::Fill { dst, value, bytes } => {
                // SAFETY: the range is checked by the layer.
                self.check(unsafe { (self.api.memset)(dst.0, c_int::from(*value), *bytes) })
            }
        }
    }

    /// Kernels from here on begin when those before are over: launches do not overlap across this.
    fn drain(&self) {
        // SAFETY: no preconditions.
        unsafe { (self.api.drain)() }
    }

    fn name(&self, function: Function) -> String {
        self.state().names.get(&function.0).cloned().unwrap_or_default()
    }

    fn check_params(&self, launch: &Launch, params: &[&[u8]]) -> Result<(), DriverError> {
        let function = launch.function.0 as *const c_void;
        let wrong = |reason| DriverError::Parameters { kernel: self.name(launch.function), reason };
        let (asked, limit) = (launch.shared, self.info.shared_memory);
        if asked > limit {
            return Err(wrong(format!("{asked} bytes of shared memory, {limit} are possible")));
        }
        // SAFETY: a `Function` of this driver is a kernel of the loaded library.
        let declared = unsafe { (self.api.param_count)(function) };
        if declared as usize != params.len() {
            return Err(wrong(format!("{} parameters given, {declared} declared", params.len())));
        }
        for (i, param) in params.iter().enumerate() {
            // SAFETY: as above; `i` is below the count.
            let size = unsafe { (self.api.param_size)(function, i as c_int) };
            if size as usize != param.len() {
                return Err(wrong(format!(
                    "parameter {i} has {} bytes, the kernel declares {size}",
                    param.len()
                )));
            }
        }
        Ok(())
    }

    /// Runs a kernel whose parameters were checked.
    fn run_kernel(&self, launch: &Launch, params: &[&[u8]]) -> Result<(), DriverError> {
        let function = launch.function.0 as *const c_void;
        let mut pointers: Vec<*mut c_void> = params.iter().map(|p| p.as_ptr() as *mut c_void).collect();
        let geometry: Vec<u32> = [launch.grid, launch.block, launch.cluster].concat();
        let schedule = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let params = pointers.as_mut_ptr();
        // SAFETY: every parameter has the declared size; the layer copies them and checks the kernel's accesses.
        self.check(unsafe {
            (self.api.launch)(function, geometry.as_ptr(), launch.shared, params, &*schedule)
        })
    }
}

impl Driver for SimtDriver {
    fn device(&self) -> &DeviceInfo {
        &self.info
    }

    fn instruments(&self) -> &Instruments {
        &self.instruments
    }

    fn function(&self, module: &str, name: &str) -> Result<Function, DriverError> {
        let mut state = self.state();
        if let Some(function) = state.functions.get(module).and_then(|names| names.get(name)) {
            return Ok(*function);
        }
        let missing = || DriverError::NoFunction { module: module.to_owned(), name: name.to_owned() };
        let c_module = CString::new(module).map_err(|_| missing())?;
        let c_name = CString::new(name).map_err(|_| missing())?;
        // SAFETY: C strings.
        let found = unsafe { (self.api.get_function)(c_module.as_ptr(), c_name.as_ptr()) };
        if found.is_null() {
            return Err(missing());
        }
        let function = Function(found as u64);
        state.functions.entry(module.to_owned()).or_default().insert(name.to_owned(), function);
        state.names.insert(function.0, name.to_owned());
        Ok(function)
    }

    fn has_module(&self, module: &str) -> Result<bool, DriverError> {
        let Ok(module) = CString::new(module) else { return Ok(false) };
        // SAFETY: a C string.
        Ok(unsafe { (self.api.has_module)(module.as_ptr()) } == 1)
    }

    fn function_info(&self, _function: Function) -> Result<FunctionInfo, DriverError> {
        Ok(FunctionInfo { max_threads: 1024, ..FunctionInfo::default() })
    }

    fn alloc(&self, bytes: usize, _stream: Stream) -> Result<DevicePtr, DriverError> {
        let mut state = self.state();
        let free = self.info.memory.saturating_sub(state.in_use);
        if self.instruments.is_failing() || bytes as u64 > free {
            return Err(DriverError::OutOfMemory { requested: bytes, free, in_use: state.in_use as usize });
        }
        // SAFETY: no preconditions; the limit above keeps the size within the layer's reserve.
        let ptr = unsafe { (self.api.alloc)(bytes) };
        if ptr == 0 {
            return Err(self.last_error());
        }
        state.sizes.insert(ptr, bytes);
        state.in_use += bytes as u64;
        self.instruments.allocated(bytes);
        Ok(DevicePtr(ptr))
    }

    fn free(&self, ptr: DevicePtr, _stream: Stream) -> Result<(), DriverError> {
        let mut state = self.state();
        let Some(bytes) = state.sizes.remove(&ptr.0) else {
            let reason = format!("{:#x} is not an allocation, or was freed before", ptr.0);
            return Err(DriverError::Invalid { what: "free", reason });
        };
        state.in_use -= bytes as u64;
        self.instruments.freed(bytes);
        // SAFETY: `ptr` came from `alloc` and was not freed since.
        self.check(unsafe { (self.api.free)(ptr.0) })
    }

    fn memory(&self) -> Result<DeviceMemory, DriverError> {
        let in_use = self.state().in_use;
        Ok(DeviceMemory { free: self.info.memory.saturating_sub(in_use), total: self.info.memory })
    }

    fn trim(&self) -> Result<(), DriverError> {
        Ok(())
    }

    fn pinned(&self, bytes: usize) -> Result<PinnedBuffer, DriverError> {
        fn release(ptr: *mut u8, bytes: usize) {
            // SAFETY: made from a boxed slice of this length below.
            drop(unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(ptr, bytes)) });
        }
        let memory = Box::into_raw(vec![0u8; bytes].into_boxed_slice());
        // SAFETY: a leaked box, zeroed, freed by `release`.
        Ok(unsafe { PinnedBuffer::new(memory.cast(), bytes, Box::new(release)) })
    }

    fn upload(&self, dst: DevicePtr, src: &[u8], stream: Stream) -> Result<(), DriverError> {
        self.instruments.copied_up(src.len());
        if self.state().capturing.contains_key(&stream.0) {
            let reason = "memory that may change cannot be copied inside a graph".into();
            return Err(DriverError::Invalid { what: "upload", reason });
        }
        self.run(&Call::Copy { dst, src: src.as_ptr() as u64, bytes: src.len() })
    }

    fn upload_pinned(
        &self,
        dst: DevicePtr,
        src: &PinnedBuffer,
        bytes: usize,
        stream: Stream,
    ) -> Result<(), DriverError> {
        let Some(src) = src.bytes().get(..bytes) else {
            let reason = format!("{bytes} bytes of a pinned buffer of {}", src.len());
            return Err(DriverError::Invalid { what: "upload", reason });
        };
        self.instruments.copied_up(bytes);
        let call = Call::Copy { dst, src: src.as_ptr() as u64, bytes };
        if self.captured(stream, || call.clone()) { Ok(()) } else { self.run(&call) }
    }

    fn download(&self, dst: &mut [u8], src: DevicePtr, _stream: Stream) -> Result<(), DriverError> {
        self.instruments.copied_down(dst.len());
        self.instruments.synced();
        // SAFETY: `dst` is writable for its length; the layer checks the device range.
        self.check(unsafe { (self.api.memcpy)(dst.as_mut_ptr() as u64, src.0, dst.len()) })
    }

    fn copy(&self, dst: DevicePtr, src: DevicePtr, bytes: usize, stream: Stream) -> Result<(), DriverError> {
        let call = Call::Copy { dst, src: src.0, bytes };
        if self.captured(stream, || call.clone()) { Ok(()) } else { self.run(&call) }
    }

    fn fill(&self, dst: DevicePtr, value: u8, bytes: usize, stream: Stream) -> Result<(), DriverError> {
        let call = Call::Fill { dst, value, bytes };
        if self.captured(stream, || call.clone()) { Ok(()) } else { self.run(&call) }
    }

    fn create_stream(&self) -> Result<Stream, DriverError> {
        let mut state = self.state();
        state.next += 1;
        Ok(Stream(state.next))
    }

    fn synchronize(&self, _stream: Stream) -> Result<(), DriverError> {
        self.instruments.synced();
        self.drain();
        Ok(())
    }

    fn create_event(&self, _timing: bool) -> Result<Event, DriverError> {
        let mut state = self.state();
        state.next += 1;
        Ok(Event(state.next))
    }

    fn destroy_event(&self, event: Event) -> Result<(), DriverError> {
        self.state().events.remove(&event.0);
        Ok(())
    }

    fn record(&self, event: Event, _stream: Stream) -> Result<(), DriverError> {
        self.state().events.insert(event.0, std::time::Instant::now());
        Ok(())
    }

    fn wait(&self, _stream: Stream, _event: Event) -> Result<(), DriverError> {
        Ok(())
    }

    fn is_done(&self, _event: Event) -> Result<bool, DriverError> {
        Ok(true)
    }

    fn synchronize_event(&self, _event: Event) -> Result<(), DriverError> {
        self.instruments.synced();
        Ok(())
    }

    fn elapsed_ms(&self, from: Event, to: Event) -> Result<f32, DriverError> {
        let state = self.state();
        match (state.events.get(&from.0), state.events.get(&to.0)) {
            (Some(from), Some(to)) => Ok(to.duration_since(*from).as_secs_f32() * 1e3),
            _ => Err(DriverError::Invalid {
                what: "elapsed time",
                reason: "an event was never recorded".into(),
            }),
        }
    }

    fn begin_capture(&self, stream: Stream) -> Result<(), DriverError> {
        if self.state().capturing.insert(stream.0, Vec::new()).is_some() {
            let reason = "the stream records already".into();
            return Err(DriverError::Invalid { what: "graph capture", reason });
        }
        Ok(())
    }

    fn end_capture(&self, stream: Stream) -> Result<Graph, DriverError> {
        let mut state = self.state();
        let Some(calls) = state.capturing.remove(&stream.0) else {
            let reason = "the stream does not record".into();
            return Err(DriverError::Invalid { what: "graph capture", reason });
        };
        state.next += 1;
        let graph = Graph(state.next);
        state.graphs.insert(graph.0, calls);
        Ok(graph)
    }

    fn launch_graph(&self, graph: Graph, _stream: Stream) -> Result<(), DriverError> {
        let Some(calls) = self.state().graphs.get(&graph.0).cloned() else {
            return Err(DriverError::Invalid {
                what: "graph launch",
                reason: "the graph was destroyed".into(),
            });
        };
        self.instruments.graph_launched();
        self.drain();
        let run = calls.iter().try_for_each(|call| self.run(call));
        self.drain();
        run
    }

    fn destroy_graph(&self, graph: Graph) -> Result<(), DriverError> {
        self.state().graphs.remove(&graph.0);
        Ok(())
    }

    fn tensor_map(&self, desc: &TensorMapDesc) -> Result<TensorMap, DriverError> {
        let invalid =
            |reason: &str| DriverError::Invalid { what: "tensor map", reason: format!("{reason}: {desc:?}") };
        let rank = desc.extents.len();
        if rank == 0 || rank > 5 || desc.strides.len() + 1 != rank || desc.box_extents.len() != rank {
            return Err(invalid("one to five dimensions, one stride less"));
        }
        let mut out = MapDesc {
            base: desc.base.0,
            rank: rank as u32,
            element_bytes: desc.element.size(),
            swizzle_bytes: match desc.swizzle {
                super::Swizzle::None => 0,
                super::Swizzle::B32 => 32,
                super::Swizzle::B64 => 64,
                super::Swizzle::B128 => 128,
            },
            ..MapDesc::default()
        };
        out.extents[..rank].copy_from_slice(&desc.extents);
        out.strides[..rank - 1].copy_from_slice(&desc.strides);
        out.boxes[..rank].copy_from_slice(&desc.box_extents);
        if let Some(im2col) = &desc.im2col {
            out.is_im2col = 1;
            out.lower = im2col.lower;
            out.upper = im2col.upper;
            out.pixels = im2col.pixels;
            out.pixel_stride = im2col.stride;
        }
        let mut map = TensorMap([0; 16]);
        // SAFETY: `map` has the 128 bytes that the layer writes.
        match unsafe { (self.api.tensor_map)(map.0.as_mut_ptr().cast(), &out) } {
            0 => Ok(map),
            _ => Err(invalid("the encoder refuses")),
        }
    }

    fn launch(&self, launch: &Launch, params: &[&[u8]]) -> Result<(), DriverError> {
        self.check_params(launch, params)?;
        let record = || Call::Launch { launch: *launch, params: params.iter().map(|p| p.to_vec()).collect() };
        self.instruments.launched(&self.name(launch.function), launch, || {
            if self.captured(launch.stream, record) {
                return Ok(((), None));
            }
            let start = std::time::Instant::now();
            self.run_kernel(launch, params)?;
            Ok(((), Some(start.elapsed().as_secs_f64() * 1e6)))
        })
    }
}
