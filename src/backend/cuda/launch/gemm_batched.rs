//! Many products of one shape, each with operands of its own (`kernels/gemm/gemm_batched.cu`).
//!
//! For products of activations with activations. A linear layer over a batch is not one: its weights are the same for
//! all samples, so their rows are rows of one product.

use bytemuck::{Pod, Zeroable, bytes_of};

use super::super::{CudaError, Element, Geometry, Gpu, Kernel};
use super::epilogue::int;
use super::gemm::{Gemm, GemmArgs, arguments};
use super::gemm_f32;
use super::plan::{Plan, THREADS, Tile};

const OP: &str = "batched gemm";
const MODULE: &str = "gemm_batched";
/// Most products of one launch: blocks of a grid along z.
const MOST: usize = 65_535;

/// `out[b] = epilogue(x[b]·W[b]ᵀ)` for `b` below `batch`.
#[derive(Clone, Copy, Debug)]
pub struct BatchedGemm {
    /// The product of b = 0: of one input, without residual and time bias. The bias is the same for all.
    pub first: Gemm,
    /// Number of products.
    pub batch: usize,
    /// Elements from one product's x to the next one's.
    pub x_stride: usize,
    /// Elements from one product's W to the next one's; a multiple of 8.
    pub w_stride: usize,
    /// Elements from one result to the next; may not be shorter than a result.
    pub out_stride: usize,
}

impl BatchedGemm {
    /// Whether the kernels for 16-byte vectors take the operands.
    pub fn is_aligned(&self) -> bool {
        self.first.is_aligned() && self.x_stride.is_multiple_of(8)
    }

    /// The tile: large ones where they fill the device.
    pub fn tile(&self, multiprocessors: usize) -> Tile {
        let problem = self.first.problem();
        let blocks = problem.m.div_ceil(128) * problem.n.div_ceil(128) * self.batch;
        let is_large = blocks >= multiprocessors && self.first.element != Element::F32;
        match self.is_aligned() {
            true if is_large => Tile::T128x128,
            true => Tile::T64x64,
            false => Tile::Any,
        }
    }

    fn check(&self) -> Result<(), CudaError> {
        let unsupported = |reason: String| Err(CudaError::Unsupported { op: OP, reason });
        let Gemm { m, n, x2, epilogue, .. } = &self.first;
        if x2.is_some() || epilogue.residual.is_some() || epilogue.time_bias.is_some() {
            return unsupported("a second input, a residual or a time bias".into());
        }
        if !self.w_stride.is_multiple_of(8) {
            return unsupported(format!("weights {} elements apart, no multiple of 8", self.w_stride));
        }
        let (pitch, columns) = (epilogue.out.pitch, epilogue.out_columns(*n));
        let result = m.saturating_sub(1) * pitch + columns;
        // Results may lie side by side, in columns of the same rows.
        let is_beside = self.out_stride >= columns && self.batch * self.out_stride <= pitch;
        if self.batch > 1 && self.out_stride < result && !is_beside {
            let reason = format!("results {} elements apart that have {result}", self.out_stride);
            return unsupported(reason);
        }
        if self.batch > MOST {
            return unsupported(format!("{} products, more than {MOST}", self.batch));
        }
        Ok(())
    }
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct BatchedArgs {
    first: GemmArgs,
    x_stride: i64,
    w_stride: i64,
    out_stride: i64,
}

/// Queues `op`.
pub fn gemm_batched(gpu: &Gpu, op: &BatchedGemm) -> Result<(), CudaError> {
    gemm_batched_by(gpu, op, op.tile(gpu.multiprocessors()))
}

/// Queues `op` with a tile of the caller's choice: 128×128 (not in f32), 64×64, or any.
pub fn gemm_batched_by(gpu: &Gpu, op: &BatchedGemm, tile: Tile) -> Result<(), CudaError> {
    gpu.label(|| format!("{}, {} times", op.first.label(), op.batch));
    let problem = op.first.problem();
    if problem.m == 0 || problem.n == 0 || op.batch == 0 {
        return Ok(());
    }
    op.check()?;
    let element = op.first.element;
    let is_known = match tile {
        Tile::T128x128 => element != Element::F32 && op.is_aligned(),
        Tile::T64x64 => op.is_aligned(),
        Tile::Any => true,
        Tile::T128x160 | Tile::T128x80 => false,
    };
    if !is_known {
        let reason = format!("{tile:?} for {} operands of this alignment", element.suffix());
        return Err(CudaError::Unsupported { op: OP, reason });
    }
    let mut args = arguments(&op.first)?;
    if !op.out_stride.is_multiple_of(8) {
        args.epilogue.store_single_elements();
    }
    let (tiles, k_tiles, shared) = if element == Element::F32 {
        let tile = if tile == Tile::Any { gemm_f32::Tile::Any } else { gemm_f32::Tile::T64x64 };
        let plan = gemm_f32::Plan { tile, splits: 1 };
        let geometry = plan.geometry(OP, &problem)?;
        (plan.tiles(&problem), plan.k_tiles_per_split(&problem), geometry.shared)
    } else {
        let plan = Plan::new(&problem, tile, 1);
        let shared = tile.shared_bytes(gpu.capability()) as u32;
        (plan.tiles(&problem), plan.k_tiles_per_split(&problem), shared)
    };
    args.tiles_m = int(OP, "tiles", tiles.0)?;
    args.tiles_n = int(OP, "tiles", tiles.1)?;
    args.k_tiles_per_split = int(OP, "tiles of K", k_tiles)?;
    let args = BatchedArgs {
        first: args,
        x_stride: op.x_stride as i64,
        w_stride: op.w_stride as i64,
        out_stride: op.out_stride as i64,
    };
    let name = format!("gemm_batched_{}_{}", tile.shape().name, element.suffix());
    let grid = [int(OP, "tiles", tiles.0 * tiles.1)? as u32, 1, op.batch as u32];
    let geometry = Geometry { grid, threads: THREADS, shared, cluster: 1 };
    gpu.launch(&Kernel { module: MODULE, name: &name }, &geometry, &[bytes_of(&args)])
}
