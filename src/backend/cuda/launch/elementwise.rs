//! Elementwise operations on flat arrays (`kernels/elementwise/elementwise.cu`).

use bytemuck::{Pod, Zeroable, bytes_of};

use super::super::{CudaError, Element, Geometry, Gpu, Kernel};
use crate::driver::DevicePtr;
use crate::tensor::Curve;

const MODULE: &str = "elementwise";
const THREADS: u32 = 256;
/// Elements of one thread.
const VECTOR: usize = 8;

/// Activation functions of epilogues, numbered as in `kernels/include/activation.cuh`.
#[repr(i32)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Act {
    /// x
    #[default]
    None = 0,
    /// x·σ(x)
    Silu = 1,
    /// x·Φ(x)
    Gelu = 2,
    /// x·σ(1.702·x)
    QuickGelu = 3,
    /// max(x, 0)
    Relu = 4,
    /// x, or 0.2·x where x is negative
    LeakyRelu = 5,
}

/// What [`activate`] applies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Function {
    /// A function that epilogues have too.
    Act(Act),
    /// One that they have not.
    Curve(Curve),
}

impl Function {
    /// Its number in `kernels/elementwise/elementwise.cu`.
    fn code(self) -> i32 {
        match self {
            Self::Act(act) => act as i32,
            Self::Curve(Curve::LeakyRelu) => 6,
            Self::Curve(Curve::Elu) => 7,
            Self::Curve(Curve::HardSwish) => 8,
            Self::Curve(Curve::Tanh) => 9,
            Self::Curve(Curve::Sigmoid) => 10,
            Self::Curve(Curve::Softsign) => 11,
            Self::Curve(Curve::Mish) => 12,
        }
    }
}

/// `out = a·x + b·y` over `count` elements; arrays begin at multiples of 16 bytes and may be the same.
#[derive(Clone, Copy, Debug)]
pub struct Axpby {
    /// First operand.
    pub x: DevicePtr,
    /// Second operand.
    pub y: DevicePtr,
    /// Result.
    pub out: DevicePtr,
    /// Elements.
    pub count: usize,
    /// Factor of `x`.
    pub a: f32,
    /// Factor of `y`.
    pub b: f32,
    /// Element type of all three.
    pub element: Element,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct AxpbyArgs {
    x: DevicePtr,
    y: DevicePtr,
    out: DevicePtr,
    count: u64,
    a: f32,
    b: f32,
}

/// Queues `out = a·x + b·y`.
pub fn axpby(gpu: &Gpu, op: &Axpby) -> Result<(), CudaError> {
    gpu.label(|| format!("axpby {}", op.count));
    if op.count == 0 {
        return Ok(());
    }
    let args = AxpbyArgs { x: op.x, y: op.y, out: op.out, count: op.count as u64, a: op.a, b: op.b };
    let name = format!("axpby_{}", op.element.suffix());
    gpu.launch(&Kernel { module: MODULE, name: &name }, &geometry(op.count), &[bytes_of(&args)])
}

/// `out = function(x)` over `count` elements; arrays begin at multiples of 16 bytes and may be the same.
#[derive(Clone, Copy, Debug)]
pub struct Activate {
    /// Operand.
    pub x: DevicePtr,
    /// Result.
    pub out: DevicePtr,
    /// Elements.
    pub count: usize,
    /// Function.
    pub function: Function,
    /// Element type of both.
    pub element: Element,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct ActivateArgs {
    x: DevicePtr,
    out: DevicePtr,
    count: u64,
    function: i32,
    unused: i32,
}

/// Queues `out = function(x)`.
pub fn activate(gpu: &Gpu, op: &Activate) -> Result<(), CudaError> {
    gpu.label(|| format!("activate {:?} {}", op.function, op.count));
    if op.count == 0 {
        return Ok(());
    }
    let function = op.function.code();
    let args = ActivateArgs { x: op.x, out: op.out, count: op.count as u64, function, unused: 0 };
    let name = format!("activate_{}", op.element.suffix());
    gpu.launch(&Kernel { module: MODULE, name: &name }, &geometry(op.count), &[bytes_of(&args)])
}

fn geometry(count: usize) -> Geometry {
    Geometry::line(count.div_ceil(VECTOR * THREADS as usize), THREADS)
}
