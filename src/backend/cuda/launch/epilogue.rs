//! What products do to their sums before they are stored (`kernels/include/epilogue.cuh`).
//!
//! `out = act(x·Wᵀ + bias + time_bias)·scale + residual`, or with GEGLU
//! `out = (value + bias)·gelu(gate + bias)·scale + residual`.

use bytemuck::{Pod, Zeroable};

use super::super::{CudaError, Element};
use super::elementwise::Act;
use crate::driver::DevicePtr;

/// A matrix in device memory: rows of elements, `pitch` elements from one to the next.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rows {
    /// First element.
    pub ptr: DevicePtr,
    /// Elements from one row to the next.
    pub pitch: usize,
}

impl Rows {
    /// Rows at `ptr`, `pitch` elements apart.
    pub fn new(ptr: DevicePtr, pitch: usize) -> Self {
        Self { ptr, pitch }
    }

    /// Whether every row begins at a multiple of 16 bytes (of two-byte elements).
    pub fn is_vector(&self) -> bool {
        self.ptr.0.is_multiple_of(16) && self.pitch.is_multiple_of(8)
    }
}

/// Epilogue of a product.
#[derive(Clone, Copy, Debug)]
pub struct Epilogue {
    /// One f32 a column of the product (with GEGLU interleaved as the weights), or null.
    pub bias: DevicePtr,
    /// One row a sample, added to all rows of the sample.
    pub time_bias: Option<Rows>,
    /// Activation; none with GEGLU.
    pub act: Act,
    /// Columns come in blocks of eight, values and gates in turn; the result has half of them.
    pub geglu: bool,
    /// Factor after the activation.
    pub scale: f32,
    /// Added last; may be the result's own memory.
    pub residual: Option<Rows>,
    /// Result.
    pub out: Rows,
    /// The result is f32 instead of the operands' element.
    pub out_f32: bool,
}

impl Epilogue {
    /// Stores the product as it is.
    pub fn to(out: Rows) -> Self {
        Self {
            bias: DevicePtr::NULL,
            time_bias: None,
            act: Act::None,
            geglu: false,
            scale: 1.0,
            residual: None,
            out,
            out_f32: false,
        }
    }

    /// Columns of the result of a product of `columns`.
    pub fn out_columns(&self, columns: usize) -> usize {
        if self.geglu { columns / 2 } else { columns }
    }
}

const FLAG_GEGLU: i32 = 1;
const FLAG_F32: i32 = 2;
const FLAG_VECTOR: i32 = 4;

/// `EpilogueArgs` of `epilogue.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub struct EpilogueArgs {
    out: DevicePtr,
    residual: DevicePtr,
    bias: DevicePtr,
    time_bias: DevicePtr,
    /// Where splits leave their sums; null: the kernel does the epilogue itself.
    pub(super) partial: DevicePtr,
    out_pitch: i64,
    residual_pitch: i64,
    time_pitch: i64,
    rows: i32,
    columns: i32,
    rows_per_sample: i32,
    act: i32,
    flags: i32,
    scale: f32,
}

/// The product that an epilogue belongs to.
#[derive(Clone, Copy, Debug)]
pub struct Product {
    /// Operation, for messages.
    pub op: &'static str,
    /// Rows of the product.
    pub rows: usize,
    /// Columns of the product.
    pub columns: usize,
    /// Rows of one sample; counts only with a time bias.
    pub rows_per_sample: usize,
}

impl EpilogueArgs {
    /// Checks an epilogue and makes the kernels' argument of it.
    pub fn new(epilogue: &Epilogue, product: &Product) -> Result<Self, CudaError> {
        let unsupported = |reason: String| CudaError::Unsupported { op: product.op, reason };
        let Product { rows, columns, rows_per_sample, .. } = *product;
        if epilogue.geglu {
            if columns % 16 != 0 {
                return Err(unsupported(format!(
                    "GEGLU of {columns} columns; blocks of 8 need a multiple of 16"
                )));
            }
            if epilogue.act != Act::None || epilogue.time_bias.is_some() {
                return Err(unsupported("GEGLU with an activation or a time bias".into()));
            }
        }
        if epilogue.time_bias.is_some() && (rows_per_sample == 0 || rows % rows_per_sample != 0) {
            return Err(unsupported(format!("{rows} rows are not samples of {rows_per_sample} rows")));
        }
        let width = epilogue.out_columns(columns);
        for (name, matrix) in
            [("out", Some(epilogue.out)), ("residual", epilogue.residual), ("time bias", epilogue.time_bias)]
        {
            if let Some(matrix) = matrix
                && matrix.pitch < width
            {
                return Err(unsupported(format!(
                    "{name} has a pitch of {} for {width} columns",
                    matrix.pitch
                )));
            }
        }
        let optional = |matrix: Option<Rows>| matrix.unwrap_or_default();
        let (residual, time_bias) = (optional(epilogue.residual), optional(epilogue.time_bias));
        let is_vector = epilogue.out.is_vector()
            && residual.is_vector()
            && time_bias.is_vector()
            && epilogue.bias.0.is_multiple_of(16);
        let flag = |on: bool, bit: i32| if on { bit } else { 0 };
        Ok(Self {
            out: epilogue.out.ptr,
            residual: residual.ptr,
            bias: epilogue.bias,
            time_bias: time_bias.ptr,
            partial: DevicePtr::NULL,
            out_pitch: epilogue.out.pitch as i64,
            residual_pitch: residual.pitch as i64,
            time_pitch: time_bias.pitch as i64,
            rows: int(product.op, "rows", rows)?,
            columns: int(product.op, "columns", columns)?,
            rows_per_sample: int(product.op, "rows of a sample", rows_per_sample.max(1))?,
            act: epilogue.act as i32,
            flags: flag(epilogue.geglu, FLAG_GEGLU)
                | flag(epilogue.out_f32, FLAG_F32)
                | flag(is_vector, FLAG_VECTOR),
            scale: epilogue.scale,
        })
    }
}

impl EpilogueArgs {
    /// No 16-byte vectors: not all results begin at a multiple of them.
    pub(super) fn store_single_elements(&mut self) {
        self.flags &= !FLAG_VECTOR;
    }
}

/// `value` as the kernels' 32-bit extent.
pub(super) fn int(op: &'static str, what: &str, value: usize) -> Result<i32, CudaError> {
    // Kernels round up to tiles and work out indices in 32 bits.
    i32::try_from(value).ok().filter(|v| *v <= i32::MAX - 4096).ok_or_else(|| CudaError::Unsupported {
        op,
        reason: format!("{value} {what} are more than 32-bit indices reach"),
    })
}

/// Element of the operands, which tensor cores take in two types.
pub(super) fn check_element(op: &'static str, element: Element) -> Result<(), CudaError> {
    match element {
        Element::F16 | Element::BF16 => Ok(()),
        Element::F32 => {
            Err(CudaError::Unsupported { op, reason: "operands are f16 or bf16, not f32".into() })
        }
    }
}
