//! What happens to a block of sums on its way out.
//!
//! `out = activation(sum + bias + row_bias) · scale + residual`, rounded to
//! bf16 or kept in f32. GEGLU takes two sums a and b to `a · gelu(b)`.

use super::pack::PackedB;
use super::{KernelError, Tier};
use half::bf16;
use std::ops::Range;

/// The function between the biased sum and the scale.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activation {
    /// Identity.
    #[default]
    None,
    /// x · sigmoid(x).
    Silu,
    /// x · Φ(x), with the exact normal distribution.
    Gelu,
    /// x · sigmoid(1.702 x).
    QuickGelu,
    /// max(x, 0).
    Relu,
    /// x, or 0.2 x where x is negative.
    LeakyRelu,
    /// a · gelu(b) over weights packed by [`PackedB::geglu`].
    Geglu,
}

/// A row-major bf16 matrix whose rows are `stride` values apart.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    /// Values; the last row needs no padding behind it.
    pub data: &'a [bf16],
    /// Values from one row to the next.
    pub stride: usize,
}

/// Values added to all rows of a group: a time embedding per sample.
#[derive(Clone, Copy)]
pub enum GroupBias<'a> {
    /// `[groups, columns]` in f32.
    F32(&'a [f32]),
    /// `[groups, columns]` in bf16.
    Bf16(&'a [bf16]),
}

/// The epilogue of a product or a convolution.
#[derive(Clone, Copy)]
pub struct Epilogue<'a> {
    /// One value a weight row.
    pub bias: Option<&'a [f32]>,
    /// One row of values for each group of `rows` output rows.
    pub group_bias: Option<(GroupBias<'a>, usize)>,
    /// Activation.
    pub activation: Activation,
    /// Factor on the activation's value.
    pub scale: f32,
    /// Added last.
    pub residual: Option<Rows<'a>>,
}

impl Default for Epilogue<'_> {
    fn default() -> Self {
        Epilogue { bias: None, group_bias: None, activation: Activation::None, scale: 1.0, residual: None }
    }
}

/// Values of an output, in the precision wanted.
pub enum OutputData<'a> {
    /// Rounded to bf16.
    Bf16(&'a mut [bf16]),
    /// The f32 sums.
    F32(&'a mut [f32]),
}

/// A row-major output matrix.
pub struct Output<'a> {
    /// Values; the last row needs no padding behind it.
    pub data: OutputData<'a>,
    /// Values from one row to the next.
    pub stride: usize,
}

impl<'a> Output<'a> {
    /// A bf16 output with dense or spaced rows.
    pub fn bf16(data: &'a mut [bf16], stride: usize) -> Output<'a> {
        Output { data: OutputData::Bf16(data), stride }
    }

    /// An f32 output with dense or spaced rows.
    pub fn f32(data: &'a mut [f32], stride: usize) -> Output<'a> {
        Output { data: OutputData::F32(data), stride }
    }
}

/// Marks a block row that writes nothing.
pub(super) const SKIP: u32 = u32::MAX;

/// The epilogue with all checks done, as the kernels read it.
#[derive(Clone, Copy)]
pub(super) struct Finish {
    pub bias: *const f32,
    /// From the bias of a GEGLU's first factor to that of its second.
    pub gate_offset: usize,
    pub group_bias: *const u8,
    pub group_bias_is_f32: bool,
    pub group_rows: usize,
    pub columns: usize,
    pub activation: Activation,
    pub scale: f32,
    pub residual: *const bf16,
    pub residual_stride: usize,
    pub out: *mut u8,
    pub out_stride: usize,
    pub out_is_f32: bool,
}

// SAFETY: read-only but for `out`, whose rows and columns the drivers divide
// among tasks without overlap.
unsafe impl Send for Finish {}
// SAFETY: as above.
unsafe impl Sync for Finish {}

/// A block of sums and where they go.
pub(super) struct FinishBlock<'a> {
    /// Sums, [`C_COLUMNS`] to a row.
    pub sums: *const f32,
    /// Output row of each row of sums, or [`SKIP`].
    pub rows: &'a [u32],
    /// Output columns.
    pub columns: Range<usize>,
}

/// Columns of a block of sums in scratch memory.
pub(super) const C_COLUMNS: usize = 32;

fn rows_needed(rows: usize, stride: usize, columns: usize) -> usize {
    if rows == 0 { 0 } else { (rows - 1) * stride + columns }
}

impl Finish {
    /// Checks an epilogue and an output of `rows` rows against the weights.
    pub fn new(
        epilogue: &Epilogue,
        weights: &PackedB,
        rows: usize,
        out: Output,
    ) -> Result<Finish, KernelError> {
        let columns = weights.columns();
        if (epilogue.activation == Activation::Geglu) != weights.is_geglu() {
            return Err(KernelError::GegluPacking { packed: weights.is_geglu() });
        }
        let n = weights.shape().cout;
        if let Some(bias) = epilogue.bias {
            KernelError::check("bias", bias.len() == n, bias.len(), n)?;
        }
        let (data, len, is_f32) = match out.data {
            OutputData::Bf16(data) => (data.as_mut_ptr().cast::<u8>(), data.len(), false),
            OutputData::F32(data) => (data.as_mut_ptr().cast::<u8>(), data.len(), true),
        };
        KernelError::check("output row stride", out.stride >= columns, out.stride, columns)?;
        let needed = rows_needed(rows, out.stride, columns);
        KernelError::check("output", len >= needed, len, needed)?;
        if let Some(residual) = epilogue.residual {
            KernelError::check("residual row stride", residual.stride >= columns, residual.stride, columns)?;
            let needed = rows_needed(rows, residual.stride, columns);
            KernelError::check("residual", residual.data.len() >= needed, residual.data.len(), needed)?;
        }
        let mut finish = Finish {
            bias: epilogue.bias.map_or(std::ptr::null(), <[f32]>::as_ptr),
            gate_offset: columns,
            group_bias: std::ptr::null(),
            group_bias_is_f32: false,
            group_rows: usize::MAX,
            columns,
            activation: epilogue.activation,
            scale: epilogue.scale,
            residual: epilogue.residual.map_or(std::ptr::null(), |r| r.data.as_ptr()),
            residual_stride: epilogue.residual.map_or(0, |r| r.stride),
            out: data,
            out_stride: out.stride,
            out_is_f32: is_f32,
        };
        if let Some((bias, group_rows)) = epilogue.group_bias {
            let (data, len, is_f32) = match bias {
                GroupBias::F32(values) => (values.as_ptr().cast(), values.len(), true),
                GroupBias::Bf16(values) => (values.as_ptr().cast(), values.len(), false),
            };
            let needed = rows.div_ceil(group_rows.max(1)) * columns;
            KernelError::check("group bias", group_rows > 0 && len >= needed, len, needed)?;
            finish.group_bias = data;
            finish.group_bias_is_f32 = is_f32;
            finish.group_rows = group_rows;
        }
        Ok(finish)
    }

    /// Finishes one block.
    ///
    /// # Safety
    ///
    /// The tier is available; the sums are valid for `rows.len()` rows; rows
    /// and columns lie inside the checked output and no other task has them.
    #[inline(always)]
    pub unsafe fn run(&self, tier: Tier, block: &FinishBlock) {
        match tier {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: passed on from the caller.
            Tier::Amx | Tier::Avx512Bf16 => unsafe { super::avx512_epilogue::finish(self, block) },
            // SAFETY: passed on from the caller.
            _ => unsafe { super::portable::finish(self, block) },
        }
    }
}
