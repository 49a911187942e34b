//! Linear layers (`kernels/gemm/gemm_sm80.cu`) and the sum of splits (`kernels/gemm/split_k.cu`).

use bytemuck::{Pod, Zeroable, bytes_of};

use super::super::{CudaError, Element, Geometry, Gpu, Kernel};
use super::epilogue::{Epilogue, EpilogueArgs, Product, Rows, check_element, int};
use super::plan::{Plan, Problem, THREADS, Tile, plan};
use super::{gemm_f32, gemm_sm90};
use crate::driver::DevicePtr;

const OP: &str = "gemm";
const MODULE: &str = "gemm_sm80";
/// Threads of a block of the summing kernel; a thread makes eight columns.
const SUM_THREADS: usize = 128;
/// Most rows that the kernel for few rows takes.
const FEW_ROWS: usize = 16;
/// Columns of a block of that kernel, its threads, and its shared memory: a sum for 4 rows and each column and warp.
const FEW_COLUMNS: usize = 8;
const FEW_THREADS: u32 = 128;
const FEW_SHARED: u32 = FEW_THREADS / 32 * 4 * FEW_COLUMNS as u32 * 4;

/// `out[M,N] = epilogue((x ‖ x2)·Wᵀ)`: rows of one or two inputs side by side times weights.
#[derive(Clone, Copy, Debug)]
pub struct Gemm {
    /// `m` rows of `k1` elements.
    pub x: Rows,
    /// `m` rows of `k2` elements, the columns behind those of `x`.
    pub x2: Option<Rows>,
    /// `[n][Kp]`, Kp being `k1 + k2` rounded up to 8, zero filled; begins at a multiple of 16 bytes.
    pub w: DevicePtr,
    /// Nobody writes `w` while the kernel before this one may still run, so it may be read that early.
    pub w_is_constant: bool,
    /// Rows.
    pub m: usize,
    /// Columns of the product (twice those of the result with GEGLU).
    pub n: usize,
    /// Columns of `x`.
    pub k1: usize,
    /// Columns of `x2`, 0 without.
    pub k2: usize,
    /// Rows that belong to one sample; counts only with a time bias.
    pub rows_per_sample: usize,
    /// Element of operands and, unless it is f32, result.
    pub element: Element,
    /// What becomes of the product.
    pub epilogue: Epilogue,
}

impl Gemm {
    /// Extents of the product.
    pub fn problem(&self) -> Problem {
        Problem { m: self.m, n: self.n, k: self.k1 + self.k2 }
    }

    /// Whether x and x2 consist of 16-byte vectors.
    pub fn is_aligned(&self) -> bool {
        self.x.is_vector()
            && self.x2.is_none_or(|x2| x2.is_vector())
            && self.k1.is_multiple_of(8)
            && self.k2.is_multiple_of(8)
    }

    /// Its shape in words, for traces.
    pub(super) fn label(&self) -> String {
        format!("linear {}x{}x{}", self.m, self.n, self.k1 + self.k2)
    }
}

/// Which kernel computes a product, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// mma.sync over tiles, sm_80 and later.
    Tiles(Plan),
    /// Multiply-adds on the way of W through the machine: a handful of rows.
    Few,
}

/// The choice for a device with this many multiprocessors.
pub fn choose(op: &Gemm, multiprocessors: usize) -> Choice {
    if op.m <= FEW_ROWS && op.is_aligned() && !op.epilogue.geglu {
        Choice::Few
    } else {
        Choice::Tiles(plan(&op.problem(), multiprocessors, op.is_aligned()))
    }
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct GemmArgs {
    x: DevicePtr,
    x2: DevicePtr,
    w: DevicePtr,
    pitch: i64,
    pitch2: i64,
    m: i32,
    n: i32,
    k: i32,
    k1: i32,
    w_pitch: i32,
    pub(super) tiles_m: i32,
    pub(super) tiles_n: i32,
    pub(super) k_tiles_per_split: i32,
    pub(super) epilogue: EpilogueArgs,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct SplitKArgs {
    epilogue: EpilogueArgs,
    splits: i32,
    unused: i32,
}

/// Queues `op`.
pub fn gemm(gpu: &Gpu, op: &Gemm) -> Result<(), CudaError> {
    if op.element == Element::F32 {
        return gemm_f32::gemm(gpu, op);
    }
    if gpu.is_hopper() && gemm_sm90::supports(op) {
        return gemm_sm90::gemm(gpu, op);
    }
    gemm_by(gpu, op, choose(op, gpu.multiprocessors()))
}

/// Queues `op` with a kernel of the caller's choice, which must fit its alignment.
pub fn gemm_by(gpu: &Gpu, op: &Gemm, choice: Choice) -> Result<(), CudaError> {
    gpu.label(|| op.label());
    if op.m == 0 || op.n == 0 {
        return Ok(());
    }
    check_element(OP, op.element)?;
    let mut args = arguments(op)?;
    match choice {
        Choice::Few => launch_few(gpu, op, &args),
        Choice::Tiles(plan) if plan.tile != Tile::Any && !op.is_aligned() => Err(CudaError::Unsupported {
            op: OP,
            reason: format!("{:?} for operands without 16-byte vectors", plan.tile),
        }),
        Choice::Tiles(plan) => {
            let problem = op.problem();
            let (tiles_m, tiles_n) = plan.tiles(&problem);
            args.tiles_m = int(OP, "tiles", tiles_m)?;
            args.tiles_n = int(OP, "tiles", tiles_n)?;
            args.k_tiles_per_split = int(OP, "tiles of K", plan.k_tiles_per_split(&problem))?;
            args.epilogue.partial = partial_memory(gpu, &plan, &problem)?;
            let name = format!("gemm_sm80_{}_{}", plan.tile.shape().name, op.element.suffix());
            let geometry = Geometry {
                grid: [int(OP, "tiles", tiles_m * tiles_n)? as u32, plan.splits as u32, 1],
                threads: THREADS,
                shared: plan.tile.shared_bytes(gpu.capability()) as u32,
                cluster: 1,
            };
            gpu.launch(&Kernel { module: MODULE, name: &name }, &geometry, &[bytes_of(&args)])?;
            sum_splits(gpu, op.element, &args.epilogue, &op.epilogue, plan.splits, &problem)
        }
    }
}

fn launch_few(gpu: &Gpu, op: &Gemm, args: &GemmArgs) -> Result<(), CudaError> {
    if !op.is_aligned() || op.epilogue.geglu {
        let reason = "few rows must be aligned and without GEGLU".into();
        return Err(CudaError::Unsupported { op: OP, reason });
    }
    let name = format!("gemm_sm80_few_{}", op.element.suffix());
    let geometry = Geometry { shared: FEW_SHARED, ..Geometry::line(op.n.div_ceil(FEW_COLUMNS), FEW_THREADS) };
    gpu.launch(&Kernel { module: MODULE, name: &name }, &geometry, &[bytes_of(args)])
}

/// Checks a product and makes the kernels' argument of it, but for tiles and splits.
pub(super) fn arguments(op: &Gemm) -> Result<GemmArgs, CudaError> {
    let unsupported = |reason: String| CudaError::Unsupported { op: OP, reason };
    let Problem { m, n, k } = op.problem();
    if k == 0 || op.x2.is_none() && op.k2 != 0 || op.x2.is_some() && op.k2 == 0 {
        return Err(unsupported(format!("inputs of {} and {} columns, second {:?}", op.k1, op.k2, op.x2)));
    }
    let x2 = op.x2.unwrap_or_default();
    if op.x.pitch < op.k1 || x2.pitch < op.k2 {
        let pitches = (op.x.pitch, x2.pitch);
        return Err(unsupported(format!("pitches {pitches:?} for {} and {} columns", op.k1, op.k2)));
    }
    if !op.w.0.is_multiple_of(16) {
        return Err(unsupported(format!("weights at {:#x}, not a multiple of 16", op.w.0)));
    }
    let product = Product { op: OP, rows: m, columns: n, rows_per_sample: op.rows_per_sample };
    Ok(GemmArgs {
        x: op.x.ptr,
        x2: x2.ptr,
        w: op.w,
        pitch: op.x.pitch as i64,
        pitch2: x2.pitch as i64,
        m: int(OP, "rows", m)?,
        n: int(OP, "columns", n)?,
        k: int(OP, "columns of x", k)?,
        k1: int(OP, "columns of x", op.k1)?,
        w_pitch: int(OP, "columns of x", k.next_multiple_of(8))?,
        tiles_m: 0,
        tiles_n: 0,
        k_tiles_per_split: 0,
        epilogue: EpilogueArgs::new(&op.epilogue, &product)?,
    })
}

/// Scratch memory for the sums of splits; null if there are none.
pub(super) fn partial_memory(gpu: &Gpu, plan: &Plan, problem: &Problem) -> Result<DevicePtr, CudaError> {
    match plan.partial_bytes(problem) {
        0 => Ok(DevicePtr::NULL),
        bytes => gpu.workspace(bytes),
    }
}

/// Queues the kernel that adds splits and does their epilogue, if there are several.
pub(super) fn sum_splits(
    gpu: &Gpu,
    element: Element,
    args: &EpilogueArgs,
    epilogue: &Epilogue,
    splits: usize,
    problem: &Problem,
) -> Result<(), CudaError> {
    if splits == 1 {
        return Ok(());
    }
    let args = SplitKArgs { epilogue: *args, splits: splits as i32, unused: 0 };
    let pieces = problem.m * epilogue.out_columns(problem.n).div_ceil(8);
    let name = format!("split_k_{}", element.suffix());
    let geometry = Geometry::line(pieces.div_ceil(SUM_THREADS), SUM_THREADS as u32);
    gpu.launch(&Kernel { module: "split_k", name: &name }, &geometry, &[bytes_of(&args)])
}
