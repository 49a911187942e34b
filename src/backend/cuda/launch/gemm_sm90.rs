//! Linear layers on Hopper (`kernels/gemm/gemm_sm90.cu`): TMA and wgmma.
//!
//! Takes what TMA can take, 16-byte aligned operands in multiples of eight
//! elements; [`supports`] says no to the rest, which the sm_80 kernels do.

use bytemuck::{Pod, Zeroable, bytes_of};

use super::super::{CudaError, Element, Geometry, Gpu, Kernel};
use super::epilogue::{Epilogue, EpilogueArgs};
use super::gemm::Gemm;
use super::hopper::{DEPTH, Matrix, Plan, ROWS, THREADS, Tiles, in_vectors, matrix_map, plan};
use crate::driver::DevicePtr;

const MODULE: &str = "gemm_sm90";
/// Threads of a block that adds partial sums.
const REDUCE_THREADS: u32 = 256;
/// Fewer rows leave most of a tile of 128 empty.
const LEAST_ROWS: usize = 64;
/// Fewer columns leave most of the narrowest tile empty.
const LEAST_COLUMNS: usize = 64;

const GEGLU: i32 = 1;
const FLOAT: i32 = 2;
const VECTOR: i32 = 4;

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct GemmArgs {
    epilogue: EpilogueArgs,
    tiles: Tiles,
    k1: i32,
    k1_steps: i32,
    unused: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct ReduceArgs {
    epilogue: EpilogueArgs,
    splits: i32,
    unused: i32,
}

/// Whether the Hopper kernels take this layer and are the better choice for it.
pub fn supports(op: &Gemm) -> bool {
    op.rows >= LEAST_ROWS
        && op.columns >= LEAST_COLUMNS
        && op.k > 0
        && op.element != Element::F32
        && in_vectors(op.x, &[op.k, op.x_pitch])
        && in_vectors(op.x2, &[op.k2, op.x2_pitch])
        && in_vectors(op.w, &[op.w_pitch])
        && epilogue_in_vectors(&op.epilogue, op.rows, op.columns)
}

/// Whether rows of the epilogue's operands can be read and written eight elements at a time.
pub(super) fn epilogue_in_vectors(op: &Epilogue, rows: usize, columns: usize) -> bool {
    let limit = i32::MAX as usize;
    rows <= limit
        && columns <= limit
        && columns.is_multiple_of(if op.geglu { 16 } else { 8 })
        && in_vectors(op.out, &[op.out_pitch])
        && in_vectors(op.residual, &[op.residual_pitch])
        && in_vectors(op.time_bias, &[op.time_pitch])
        && in_vectors(op.bias, &[])
}

/// Queues a linear layer.
pub fn gemm(gpu: &Gpu, op: &Gemm) -> Result<(), CudaError> {
    if !supports(op) {
        let reason = format!("not for the sm_90a kernels: {op:?}");
        return Err(CudaError::Unsupported { op: "gemm_sm90", reason });
    }
    let (k1_steps, k2_steps) = (op.k.div_ceil(DEPTH), op.k2.div_ceil(DEPTH));
    let plan = plan(op.rows.div_ceil(ROWS), op.columns, k1_steps + k2_steps, gpu.multiprocessors());
    let x = Matrix { base: op.x, columns: op.k, rows: op.rows, pitch: op.x_pitch };
    let x2 = Matrix { base: op.x2, columns: op.k2, rows: op.rows, pitch: op.x2_pitch };
    let w = Matrix { base: op.w, columns: op.w_pitch, rows: op.columns, pitch: op.w_pitch };
    let map_x = matrix_map(gpu, &x, ROWS, op.element)?;
    let map_x2 = if op.k2 > 0 { matrix_map(gpu, &x2, ROWS, op.element)? } else { map_x };
    let map_w = matrix_map(gpu, &w, plan.width, op.element)?;
    let args = GemmArgs {
        epilogue: epilogue_args(gpu, &op.epilogue, (op.rows, op.columns), &plan)?,
        tiles: plan.tiles,
        k1: op.k as i32,
        k1_steps: k1_steps as i32,
        unused: 0,
    };
    let name = format!("gemm_sm90_128x{}_{}", plan.width, op.element.suffix());
    let geometry =
        Geometry { grid: [plan.blocks as u32, 1, 1], threads: THREADS, shared: plan.shared(), cluster: 1 };
    let params = [bytes_of(&args), bytes_of(&map_x), bytes_of(&map_x2), bytes_of(&map_w)];
    gpu.launch(&Kernel { module: MODULE, name: &name }, &geometry, &params)?;
    reduce(gpu, &args.epilogue, &plan, op.element)
}

/// The epilogue for a kernel; `shape` is rows and columns of the product. A split product gets memory for its partial sums.
pub(super) fn epilogue_args(
    gpu: &Gpu,
    op: &Epilogue,
    shape: (usize, usize),
    plan: &Plan,
) -> Result<EpilogueArgs, CudaError> {
    let (rows, columns) = shape;
    let partial = match plan.splits {
        1 => DevicePtr::NULL,
        splits => gpu.workspace(splits * rows * columns * size_of::<f32>())?,
    };
    let flag = |set: bool, flag: i32| if set { flag } else { 0 };
    Ok(EpilogueArgs {
        out: op.out,
        residual: op.residual,
        bias: op.bias,
        time_bias: op.time_bias,
        partial,
        out_pitch: op.out_pitch as i64,
        residual_pitch: op.residual_pitch as i64,
        time_pitch: op.time_pitch as i64,
        rows: rows as i32,
        columns: columns as i32,
        rows_per_sample: op.rows_per_sample.max(1) as i32,
        act: op.act as i32,
        flags: flag(op.geglu, GEGLU) | flag(op.out_float, FLOAT) | VECTOR,
        scale: op.scale,
    })
}

/// Adds the partial sums of a split product, if it was split.
pub(super) fn reduce(
    gpu: &Gpu,
    epilogue: &EpilogueArgs,
    plan: &Plan,
    element: Element,
) -> Result<(), CudaError> {
    if plan.splits == 1 {
        return Ok(());
    }
    let args = ReduceArgs { epilogue: *epilogue, splits: plan.splits as i32, unused: 0 };
    let halves = if epilogue.flags & GEGLU != 0 { 2 } else { 1 };
    let vectors = epilogue.rows as usize * (epilogue.columns as usize / halves / 8);
    let name = format!("gemm_sm90_reduce_{}", element.suffix());
    let geometry = Geometry::line(vectors.div_ceil(REDUCE_THREADS as usize), REDUCE_THREADS);
    gpu.launch(&Kernel { module: MODULE, name: &name }, &geometry, &[bytes_of(&args)])
}
