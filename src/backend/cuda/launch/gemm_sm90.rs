//! Linear layers on Hopper (`kernels/gemm/gemm_sm90.cu`): TMA and wgmma.
//!
//! Takes what TMA can take, 16-byte aligned operands in multiples of eight
//! elements; [`supports`] says no to the rest, which the sm_80 kernels do.

use bytemuck::{Pod, Zeroable, bytes_of};

use super::super::{CudaError, Element, Gpu, Kernel};
use super::epilogue::{self, EpilogueArgs, Rows};
use super::gemm::Gemm;
use super::hopper::{
    Cut, DEPTH, Finish, Plan, Product, ROWS, Room, Tiles, best_cut, epilogue_in_vectors, matrix_map,
    ranked_cuts,
};

const OP: &str = "gemm_sm90";
/// Fewer rows leave most of a tile of 128 empty.
const LEAST_ROWS: usize = 64;
/// Fewer columns leave most of the narrowest tile empty.
const LEAST_COLUMNS: usize = 64;

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct GemmArgs {
    epilogue: EpilogueArgs,
    tiles: Tiles,
    k1: i32,
    k1_steps: i32,
}

/// Whether the Hopper kernels take this layer and are the better choice for it.
pub fn supports(op: &Gemm) -> bool {
    op.m >= LEAST_ROWS
        && op.n >= LEAST_COLUMNS
        && op.k1 > 0
        && op.element != Element::F32
        && op.is_aligned()
        && op.w.0.is_multiple_of(16)
        && epilogue_in_vectors(&op.epilogue, op.n)
}

fn product(op: &Gemm) -> Product {
    Product {
        tiles_m: op.m.div_ceil(ROWS),
        columns: op.n,
        steps: op.k1.div_ceil(DEPTH) + op.k2.div_ceil(DEPTH),
        is_right_constant: op.w_is_constant,
    }
}

/// The ways to cut up a layer that can make sense, the launcher's choice first.
pub fn cuts_of(op: &Gemm, room: &Room) -> Vec<Cut> {
    ranked_cuts(&product(op), room)
}

/// Queues a linear layer.
pub fn gemm(gpu: &Gpu, op: &Gemm) -> Result<(), CudaError> {
    gemm_by(gpu, op, best_cut(&product(op), gpu.room()))
}

/// Queues a linear layer, cut up as the caller says.
pub fn gemm_by(gpu: &Gpu, op: &Gemm, cut: Cut) -> Result<(), CudaError> {
    gpu.label(|| op.label());
    if !supports(op) || op.x2.is_none() != (op.k2 == 0) {
        return Err(CudaError::Unsupported { op: OP, reason: format!("not for the sm_90a kernels: {op:?}") });
    }
    let finish = Finish::of(&op.epilogue, cut, false);
    let plan = Plan::new(&product(op), cut, finish, gpu.room())?;
    let map_x = matrix_map(gpu, op.x, [op.m, op.k1], ROWS, op.element)?;
    let map_x2 = match op.x2 {
        Some(x2) => matrix_map(gpu, x2, [op.m, op.k2], ROWS, op.element)?,
        None => map_x,
    };
    let k = op.k1 + op.k2;
    let map_w = matrix_map(gpu, Rows::new(op.w, k), [op.n, k], plan.box_rows(), op.element)?;
    let whole = epilogue::Product { op: OP, rows: op.m, columns: op.n, rows_per_sample: op.rows_per_sample };
    let args = GemmArgs {
        epilogue: EpilogueArgs::new(&op.epilogue, &whole)?,
        tiles: plan.tiles,
        k1: epilogue::int(OP, "columns of x", op.k1)?,
        k1_steps: op.k1.div_ceil(DEPTH) as i32,
    };
    let name = format!("gemm_sm90_128x{}{}_{}", cut.width, finish.name(), op.element.suffix());
    let params = [bytes_of(&args), bytes_of(&map_x), bytes_of(&map_x2), bytes_of(&map_w)];
    gpu.launch(&Kernel { module: "gemm_sm90", name: &name }, &plan.geometry(), &params)
}
