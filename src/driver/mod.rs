//! The seam to a GPU: one trait, two implementations.
//!
//! [`cuda::CudaDriver`] drives a real device through the CUDA driver API,
//! loaded at run time; [`simt::SimtDriver`] runs the same kernels, compiled by
//! a C++ compiler, with every CUDA thread as a fiber. Everything above this
//! module (memory pool, launch geometry, graphs, kernels) is the same code for
//! both, which is what lets it be tested without a GPU.
//!
//! All work is ordered by [`Stream`]. Device memory is addressed by plain
//! numbers ([`DevicePtr`]): a wrong one can fault the device, never the host.

pub mod cuda;
mod embedded;
mod error;
mod instruments;
pub mod kernel_folder;
pub mod nvcc;
mod pinned;
pub mod simt;
pub mod toolchain;
mod types;

pub use embedded::{KernelBuild, Module, embedded};
pub use error::DriverError;
pub use instruments::{Counts, Instruments, LaunchRecord};
pub use pinned::PinnedBuffer;
pub use types::{
    Capability, DeviceInfo, DeviceMemory, DevicePtr, Event, Function, FunctionInfo, Graph, Im2col, Launch,
    MapElement, Stream, Swizzle, TensorMap, TensorMapDesc,
};

/// A GPU, or what stands in for one. Every method may be called from any thread.
pub trait Driver: Send + Sync {
    /// What the device is.
    fn device(&self) -> &DeviceInfo;

    /// Counters, fault injection and trace of this driver.
    fn instruments(&self) -> &Instruments;

    /// The kernel `name` of the kernel file `module` (its file stem). Loads the module on first use.
    fn function(&self, module: &str, name: &str) -> Result<Function, DriverError>;

    /// Whether the device can run what the kernel file `module` became: it is in this build, and has code for the device.
    fn has_module(&self, module: &str) -> Result<bool, DriverError>;

    /// What the compiler made of a kernel.
    fn function_info(&self, function: Function) -> Result<FunctionInfo, DriverError>;

    /// Device memory, ordered on `stream`.
    fn alloc(&self, bytes: usize, stream: Stream) -> Result<DevicePtr, DriverError>;

    /// Gives memory back once `stream` has reached this point.
    fn free(&self, ptr: DevicePtr, stream: Stream) -> Result<(), DriverError>;

    /// Free and total memory of the device.
    fn memory(&self) -> Result<DeviceMemory, DriverError>;

    /// Gives memory that the driver keeps for reuse back to the device.
    fn trim(&self) -> Result<(), DriverError>;

    /// Page-locked host memory, which the device copies from and to without a detour.
    fn pinned(&self, bytes: usize) -> Result<PinnedBuffer, DriverError>;

    /// Copies host memory to the device; `src` may change once this returns.
    fn upload(&self, dst: DevicePtr, src: &[u8], stream: Stream) -> Result<(), DriverError>;

    /// Copies the first `bytes` of `src` to the device without waiting. `src` must
    /// stay unchanged until `stream` has passed this point: record an [`Event`] behind it.
    fn upload_pinned(
        &self,
        dst: DevicePtr,
        src: &PinnedBuffer,
        bytes: usize,
        stream: Stream,
    ) -> Result<(), DriverError>;

    /// Copies device memory to the host and waits for it.
    fn download(&self, dst: &mut [u8], src: DevicePtr, stream: Stream) -> Result<(), DriverError>;

    /// Copies on the device.
    fn copy(&self, dst: DevicePtr, src: DevicePtr, bytes: usize, stream: Stream) -> Result<(), DriverError>;

    /// Sets `bytes` bytes to `value`.
    fn fill(&self, dst: DevicePtr, value: u8, bytes: usize, stream: Stream) -> Result<(), DriverError>;

    /// A new stream.
    fn create_stream(&self) -> Result<Stream, DriverError>;

    /// Waits until all work on `stream` is done and reports errors of it.
    fn synchronize(&self, stream: Stream) -> Result<(), DriverError>;

    /// A new event, with timing if asked for.
    fn create_event(&self, timing: bool) -> Result<Event, DriverError>;

    /// Destroys an event.
    fn destroy_event(&self, event: Event) -> Result<(), DriverError>;

    /// Marks the present end of `stream`.
    fn record(&self, event: Event, stream: Stream) -> Result<(), DriverError>;

    /// Lets `stream` wait for `event`.
    fn wait(&self, stream: Stream, event: Event) -> Result<(), DriverError>;

    /// Whether all work before `event` is done.
    fn is_done(&self, event: Event) -> Result<bool, DriverError>;

    /// Waits on the host for `event`.
    fn synchronize_event(&self, event: Event) -> Result<(), DriverError>;

    /// Milliseconds from one timed event to another, both done.
    fn elapsed_ms(&self, from: Event, to: Event) -> Result<f32, DriverError>;

    /// Work on `stream` is recorded from here on, not run.
    fn begin_capture(&self, stream: Stream) -> Result<(), DriverError>;

    /// Ends the recording; the graph can be launched any number of times.
    fn end_capture(&self, stream: Stream) -> Result<Graph, DriverError>;

    /// Runs a recorded graph.
    fn launch_graph(&self, graph: Graph, stream: Stream) -> Result<(), DriverError>;

    /// Destroys a graph that is not running.
    fn destroy_graph(&self, graph: Graph) -> Result<(), DriverError>;

    /// Encodes a tensor map, the descriptor of a bulk tensor copy (TMA).
    fn tensor_map(&self, desc: &TensorMapDesc) -> Result<TensorMap, DriverError>;

    /// How many clusters of this launch run at a time; 0 if not even one fits.
    ///
    /// A cluster lives inside one of the device's groups of multiprocessors, of which some are smaller than others, so
    /// there are fewer large clusters than a division says. Where nobody can ask, groups of sixteen are a fair guess.
    fn clusters(&self, launch: &Launch) -> Result<usize, DriverError> {
        let blocks = launch.cluster.iter().product::<u32>().max(1) as usize;
        let multiprocessors = self.device().multiprocessors as usize;
        let is_small = blocks <= 2 || multiprocessors < 16;
        Ok(if is_small { multiprocessors / blocks } else { multiprocessors / 16 * (16 / blocks) })
    }

    /// Launches a kernel. `params` are its parameters by value, each as long as
    /// the kernel declares it (checked).
    fn launch(&self, launch: &Launch, params: &[&[u8]]) -> Result<(), DriverError>;
}
