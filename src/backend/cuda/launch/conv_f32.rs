//! Convolutions in f32 (`kernels/conv/conv_f32.cu`) that are no linear layers.

use bytemuck::bytes_of;

use super::super::{CudaError, Element, Gpu, Kernel};
use super::conv::{Conv, arguments};
use super::epilogue::int;
use super::gemm::sum_splits;
use super::gemm_f32::plan;

const OP: &str = "conv";

/// Queues `op`, whose element is f32.
pub fn conv(gpu: &Gpu, op: &Conv) -> Result<(), CudaError> {
    gpu.label(|| op.label());
    let mut args = arguments(op)?;
    let problem = op.problem();
    if problem.m == 0 || problem.n == 0 {
        return Ok(());
    }
    let plan = plan(&problem, gpu.multiprocessors(), op.is_aligned());
    let (tiles_m, tiles_n) = plan.tiles(&problem);
    args.tiles_m = int(OP, "tiles", tiles_m)?;
    args.tiles_n = int(OP, "tiles", tiles_n)?;
    args.k_tiles_per_split = int(OP, "tiles of K", plan.k_tiles_per_split(&problem))?;
    args.epilogue.partial = plan.partial(gpu, &problem)?;
    let name = format!("conv_f32_{}", plan.tile.name());
    let geometry = plan.geometry(OP, &problem)?;
    gpu.launch(&Kernel { module: "conv_f32", name: &name }, &geometry, &[bytes_of(&args)])?;
    sum_splits(gpu, Element::F32, &args.epilogue, &op.epilogue, plan.splits, &problem)
}
