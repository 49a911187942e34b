//! Epilogue of a product: `out = act(product + bias + time_bias)·scale + residual` (`kernels/include/epilogue.cuh`).

use bytemuck::{Pod, Zeroable};

use super::elementwise::Act;
use crate::driver::DevicePtr;

/// What happens to a product before it is stored.
#[derive(Clone, Copy, Debug)]
pub struct Epilogue {
    /// Result, `[rows][out_pitch]`.
    pub out: DevicePtr,
    /// Elements from one row of `out` to the next.
    pub out_pitch: usize,
    /// `out` is single precision whatever the operands are.
    pub out_float: bool,
    /// Single-precision bias of every column, or null.
    pub bias: DevicePtr,
    /// One more bias for every sample, `[rows / rows_per_sample][time_pitch]`, or null.
    pub time_bias: DevicePtr,
    /// Elements from one row of `time_bias` to the next.
    pub time_pitch: usize,
    /// Rows of one sample.
    pub rows_per_sample: usize,
    /// Activation.
    pub act: Act,
    /// Columns alternate in eights, values and gates: `out` has half of them, `value·gelu(gate)`.
    pub geglu: bool,
    /// Factor.
    pub scale: f32,
    /// Added last, `[rows][residual_pitch]`, or null.
    pub residual: DevicePtr,
    /// Elements from one row of `residual` to the next.
    pub residual_pitch: usize,
}

/// `EpilogueArgs` of `epilogue.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct EpilogueArgs {
    pub out: DevicePtr,
    pub residual: DevicePtr,
    pub bias: DevicePtr,
    pub time_bias: DevicePtr,
    pub partial: DevicePtr,
    pub out_pitch: i64,
    pub residual_pitch: i64,
    pub time_pitch: i64,
    pub rows: i32,
    pub columns: i32,
    pub rows_per_sample: i32,
    pub act: i32,
    pub flags: i32,
    pub scale: f32,
}
