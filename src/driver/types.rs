//! Handles and descriptors of the driver trait.

/// An address in device memory; 0 is null.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, bytemuck::Pod, bytemuck::Zeroable)]
pub struct DevicePtr(pub u64);

impl DevicePtr {
    /// No memory: an optional kernel operand that is absent.
    pub const NULL: Self = Self(0);

    /// The address `bytes` further on.
    pub fn offset(self, bytes: usize) -> Self {
        Self(self.0 + bytes as u64)
    }

    /// Whether this is [`NULL`](Self::NULL).
    pub fn is_null(self) -> bool {
        self.0 == 0
    }
}

/// An ordered queue of device work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Stream(pub(crate) u64);

/// A mark in a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Event(pub(crate) u64);

/// Recorded work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Graph(pub(crate) u64);

/// A kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Function(pub(crate) u64);

/// Compute capability, such as 9.0 for Hopper.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Capability {
    /// Major version.
    pub major: u32,
    /// Minor version.
    pub minor: u32,
}

impl Capability {
    /// Most dynamic shared memory of one block on such a device, in bytes (CUDA C++ Programming Guide, "Technical
    /// Specifications per Compute Capability"); of later devices what the least of them has.
    pub fn shared_memory(self) -> u32 {
        let kib = match (self.major, self.minor) {
            (0..=6, _) => 48,
            (7, 0 | 2) => 96,
            (7, _) => 64,
            (8, 0 | 7) => 163,
            (9..=11, _) => 227,
            _ => 99,
        };
        kib << 10
    }
}

impl std::fmt::Display for Capability {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// What a device is and can do.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// Name as the driver gives it.
    pub name: String,
    /// Index of the device.
    pub ordinal: usize,
    /// Compute capability.
    pub capability: Capability,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Most dynamic shared memory of one block, in bytes.
    pub shared_memory: u32,
    /// Device memory in bytes.
    pub memory: u64,
    /// Level 2 cache in bytes.
    pub l2_cache: u32,
    /// Version of the driver, such as 13000; 0 if simulated.
    pub driver_version: i32,
    /// The device is the SIMT layer: fresh memory must be poisoned, times mean nothing.
    pub is_simulated: bool,
}

/// Memory of the device, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceMemory {
    /// Free now.
    pub free: u64,
    /// In all.
    pub total: u64,
}

/// What the compiler made of a kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FunctionInfo {
    /// Registers of a thread.
    pub registers: u32,
    /// Local memory of a thread in bytes: spills and indexed arrays.
    pub local_bytes: u32,
    /// Statically allocated shared memory of a block, in bytes.
    pub static_shared: u32,
    /// Most threads of a block.
    pub max_threads: u32,
    /// Virtual architecture that the compiler wrote it for, such as 90: what `__CUDA_ARCH__` was, divided by ten. It is less
    /// than the device's capability where the driver translated PTX of an earlier one.
    pub compiled_for: u32,
}

/// How to launch a kernel.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    /// The kernel.
    pub function: Function,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Blocks of a cluster; `[1, 1, 1]` for none.
    pub cluster: [u32; 3],
    /// Dynamic shared memory in bytes.
    pub shared: u32,
    /// Where it is queued.
    pub stream: Stream,
    /// May start while the kernel before it on the stream still runs (programmatic dependent launch).
    pub overlaps: bool,
}

impl Launch {
    /// A launch without cluster and shared memory.
    pub fn new(function: Function, grid: [u32; 3], block: [u32; 3], stream: Stream) -> Self {
        Self { function, grid, block, cluster: [1, 1, 1], shared: 0, stream, overlaps: false }
    }
}

/// Element type of a tensor map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MapElement {
    /// IEEE half precision.
    F16,
    /// bfloat16.
    BF16,
    /// Single precision.
    F32,
}

impl MapElement {
    /// Bytes of one element.
    pub fn size(self) -> u32 {
        match self {
            Self::F16 | Self::BF16 => 2,
            Self::F32 => 4,
        }
    }
}

/// How a bulk copy permutes 16-byte pieces in shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Swizzle {
    /// Not at all.
    None,
    /// Within 32 bytes.
    B32,
    /// Within 64 bytes.
    B64,
    /// Within 128 bytes.
    B128,
}

/// What to encode as a tensor map: up to five dimensions, innermost first.
///
/// With `im2col` the map is in im2col mode: `extents` are C, W, H, N; a copy
/// brings `im2col.pixels` pixels of `box_extents[0]` channels each.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TensorMapDesc {
    /// Address of the first element; a multiple of 16.
    pub base: DevicePtr,
    /// Element type.
    pub element: MapElement,
    /// Elements along each dimension.
    pub extents: Vec<u64>,
    /// Bytes from one element to the next along each dimension but the innermost; multiples of 16.
    pub strides: Vec<u64>,
    /// Elements of the box along each dimension, at most 256.
    pub box_extents: Vec<u32>,
    /// Permutation in shared memory.
    pub swizzle: Swizzle,
    /// im2col mode: corners of the pixel box and pixels of a copy.
    pub im2col: Option<Im2col>,
}

/// The im2col part of a tensor map (PTX ISA, "im2col mode").
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Im2col {
    /// Offset of the bounding box's lower corner along W, H.
    pub lower: [i32; 2],
    /// Offset of its upper corner along W, H.
    pub upper: [i32; 2],
    /// Pixels of one copy.
    pub pixels: u32,
    /// Step along W, H.
    pub stride: [u32; 2],
}

/// An encoded tensor map; a kernel parameter (`const __grid_constant__ TensorMap`).
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct TensorMap(pub [u64; 16]);
