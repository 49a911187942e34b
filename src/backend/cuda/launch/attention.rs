//! Attention (`kernels/attention/`): which kernel takes which shape.
//!
//! Three kernels of one semantics: tiles of query rows for head dims up to 160,
//! a block that spreads its columns over the warps for dims up to 512, and a
//! plain one for everything else. The first two can split the keys over
//! several blocks, whose parts a last kernel joins in a fixed order; [`plan`]
//! weighs tile sizes and splits by an estimate of the time.

use bytemuck::{Pod, Zeroable, bytes_of};

use super::super::{CudaError, Element, Geometry, Gpu, Kernel};
use super::attention_sm90;
use crate::driver::DevicePtr;

const OP: &str = "attention";

/// `out = softmax(q·kᵀ·scale)·v`, per sample and head.
///
/// Rows of `q` and `out` are `[batch][queries]`, of `k` and `v` `[key_batch][keys]`, each with its pitch in
/// elements; head `h` has columns `h·head_dim ..`. Operands may be column slices of one tensor.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    /// Queries.
    pub q: DevicePtr,
    /// Keys.
    pub k: DevicePtr,
    /// Values.
    pub v: DevicePtr,
    /// Result.
    pub out: DevicePtr,
    /// Elements from one row of `q` to the next.
    pub q_pitch: usize,
    /// Elements from one row of `k` to the next.
    pub k_pitch: usize,
    /// Elements from one row of `v` to the next.
    pub v_pitch: usize,
    /// Elements from one row of `out` to the next.
    pub out_pitch: usize,
    /// Samples.
    pub batch: usize,
    /// Samples of keys and values; divides `batch`: sample `i` uses keys `i / (batch / key_batch)`.
    pub key_batch: usize,
    /// Query rows of a sample.
    pub queries: usize,
    /// Key rows of a sample.
    pub keys: usize,
    /// Heads.
    pub heads: usize,
    /// Columns of a head.
    pub head_dim: usize,
    /// Query `i` sees keys `0..=i` only.
    pub is_causal: bool,
    /// Factor on the scores, positive.
    pub scale: f32,
    /// Element type of all four.
    pub element: Element,
}

impl Attention {
    /// Its shape in words, for traces.
    pub(super) fn label(&self) -> String {
        let Self { batch, heads, queries, keys, head_dim, .. } = self;
        format!("attention {batch} x {heads} heads, {queries} queries, {keys} keys, d {head_dim}")
    }
}

/// What the choice of a kernel depends on besides the shape.
#[derive(Clone, Copy, Debug)]
pub struct Device {
    /// Streaming multiprocessors.
    pub multiprocessors: usize,
    /// Most shared memory of a block, in bytes.
    pub shared_memory: usize,
}

/// A kernel by its blocking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    /// Query rows of a block.
    pub rows: usize,
    /// Key rows of a step.
    pub keys: usize,
    /// Largest head dim.
    pub dim: usize,
    /// Threads of a block.
    pub threads: usize,
    /// Shared memory of a block, in bytes.
    pub shared: usize,
    /// Blocks that fit into the registers of a multiprocessor.
    pub resident: usize,
    /// Percent of its best rate when the multiprocessor is full (estimate: narrow tiles read keys and values
    /// from shared memory twice as often).
    pub rate: usize,
    module: &'static str,
}

const fn tile(rows: usize, keys: usize, dim: usize, resident: usize) -> Tile {
    // Two stages of keys and values; queries that do not fit into registers stay in shared memory.
    let query = if rows / 64 * dim > 160 { rows * dim * 2 } else { 0 };
    let shared = 8 * keys * dim + query;
    let rate = if rows == 128 { 100 } else { 75 };
    Tile { rows, keys, dim, threads: 128, shared, resident, rate, module: "attention_sm80" }
}

const fn spread(keys: usize, shared: usize, rate: usize) -> Tile {
    Tile { rows: 64, keys, dim: 512, threads: 256, shared, resident: 1, rate, module: "attention_sm80_d512" }
}

/// Every tiled kernel; the numbers are those of the instantiations in the kernel files.
pub const TILES: [Tile; 15] = [
    tile(64, 64, 32, 4),
    tile(64, 64, 40, 4),
    tile(64, 64, 64, 3),
    tile(64, 64, 80, 3),
    tile(64, 32, 128, 3),
    tile(64, 32, 160, 2),
    tile(64, 80, 40, 3),
    tile(64, 80, 64, 3),
    tile(64, 80, 80, 3),
    tile(128, 64, 40, 3),
    tile(128, 64, 64, 2),
    tile(128, 64, 80, 2),
    tile(128, 32, 128, 2),
    spread(64, 99_328, 100),
    spread(128, 148_480, 130),
];

impl Tile {
    fn kernel(&self, element: Element) -> String {
        format!("attention_sm80_{}x{}_d{}_{}", self.rows, self.keys, self.dim, element.suffix())
    }
}

/// How one attention is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plan {
    /// By a tiled kernel.
    Tiled {
        /// The kernel.
        tile: Tile,
        /// Parts of the keys, each for blocks of its own.
        splits: usize,
        /// Keys of a part, a multiple of the tile's.
        split_keys: usize,
    },
    /// One warp a query row: any head dim, pitch, alignment and element type.
    Rows,
}

impl Plan {
    /// `tile` with the keys in about `splits` parts, none of them empty.
    pub fn tiled(tile: Tile, keys: usize, splits: usize) -> Self {
        let steps = keys.div_ceil(tile.keys).max(1);
        let steps_each = steps.div_ceil(splits.clamp(1, steps));
        Self::Tiled { tile, splits: steps.div_ceil(steps_each), split_keys: steps_each * tile.keys }
    }
}

/// Most bytes of partial results that a plan may need.
const MAX_PARTIAL: usize = 128 << 20;
/// Most parts of the keys.
const MAX_SPLITS: usize = 16;

/// Chooses kernel and split; `op` has been checked.
pub fn plan(op: &Attention, device: &Device) -> Plan {
    if !takes_tiles(op) {
        return Plan::Rows;
    }
    let fits = |t: &&Tile| t.dim >= op.head_dim && t.shared <= device.shared_memory;
    let Some(dim) = TILES.iter().filter(fits).map(|t| t.dim).min() else { return Plan::Rows };
    let mut best: Option<(u64, Plan)> = None;
    for tile in TILES.iter().filter(fits).filter(|t| t.dim == dim) {
        for splits in 1..=op.keys.div_ceil(tile.keys).clamp(1, MAX_SPLITS) {
            let candidate = Plan::tiled(*tile, op.keys, splits);
            if partial_bytes(op, splits).is_some_and(|bytes| splits == 1 || bytes <= MAX_PARTIAL) {
                let clocks = estimate(op, device, &candidate);
                if best.is_none_or(|(least, _)| clocks < least) {
                    best = Some((clocks, candidate));
                }
            }
        }
    }
    best.map_or(Plan::Rows, |(_, plan)| plan)
}

/// Whether the tiled kernels can read and write the operands.
fn takes_tiles(op: &Attention) -> bool {
    let aligned = [op.q, op.k, op.v, op.out].iter().all(|p| p.0.is_multiple_of(16));
    let vectors = [op.q_pitch, op.k_pitch, op.v_pitch, op.out_pitch, op.head_dim];
    aligned && vectors.iter().all(|n| n.is_multiple_of(8)) && op.element != Element::F32
}

fn partial_bytes(op: &Attention, splits: usize) -> Option<usize> {
    let rows = op.batch.checked_mul(op.heads)?.checked_mul(op.queries)?.checked_mul(splits)?;
    rows.checked_mul((op.head_dim + 2) * size_of::<f32>())
}

/// Clock cycles of a plan, roughly: multiplications at the rate of an A100, in whole rounds of blocks, and the
/// traffic of queries, result and partial results. Only the order of such estimates matters.
fn estimate(op: &Attention, device: &Device, plan: &Plan) -> u64 {
    const PRODUCTS_PER_CLOCK: usize = 1024;
    const BYTES_PER_CLOCK: usize = 1000;
    const BLOCK_START: usize = 500;
    const LAUNCH: usize = 5000;
    let Plan::Tiled { tile, splits, split_keys } = *plan else { return u64::MAX };
    let multiprocessors = device.multiprocessors.max(1);
    let blocks = op.queries.div_ceil(tile.rows) * op.heads * op.batch * splits;
    let per_sm = blocks.div_ceil(multiprocessors);
    let by_memory = (device.shared_memory + 1024) / (tile.shared + 1024);
    let resident = per_sm.min(tile.resident).min(by_memory.max(1)).max(1);
    // Few warps do not hide each other's latencies.
    let busy = match resident * tile.threads / 32 {
        0..=4 => 55,
        5..=8 => 85,
        _ => 100,
    };
    let keys = split_keys.min(op.keys.next_multiple_of(tile.keys));
    let products = tile.rows * keys * 2 * tile.dim;
    let row_bytes = tile.rows * op.head_dim * 2 * op.element.size();
    let block = products * 100 / tile.rate / PRODUCTS_PER_CLOCK
        + row_bytes * multiprocessors / BYTES_PER_CLOCK
        + BLOCK_START / resident;
    let mut clocks = per_sm * block * 100 / busy;
    if splits > 1 {
        clocks += LAUNCH + 2 * partial_bytes(op, splits).unwrap_or(usize::MAX / 4) / BYTES_PER_CLOCK;
    }
    clocks as u64
}

/// Queues the attention.
pub fn attention(gpu: &Gpu, op: &Attention) -> Result<(), CudaError> {
    check(op)?;
    if gpu.is_hopper() && attention_sm90::supports(op) {
        return attention_sm90::attention(gpu, op);
    }
    let device = Device { multiprocessors: gpu.multiprocessors(), shared_memory: gpu.shared_memory() };
    attention_as(gpu, op, &plan(op, &device))
}

/// Queues the attention by a given plan.
pub fn attention_as(gpu: &Gpu, op: &Attention, plan: &Plan) -> Result<(), CudaError> {
    gpu.label(|| op.label());
    check(op)?;
    if op.batch == 0 || op.queries == 0 {
        return Ok(());
    }
    match plan {
        Plan::Tiled { tile, splits, split_keys } => {
            if !takes_tiles(op) || op.head_dim > tile.dim {
                return Err(unsupported(format!("{tile:?} cannot take {op:?}")));
            }
            tiled(gpu, op, tile, *splits, *split_keys)
        }
        Plan::Rows => rows(gpu, op),
    }
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Args {
    q: DevicePtr,
    k: DevicePtr,
    v: DevicePtr,
    out: DevicePtr,
    partial: DevicePtr,
    stats: DevicePtr,
    q_pitch: i32,
    k_pitch: i32,
    v_pitch: i32,
    out_pitch: i32,
    queries: i32,
    keys: i32,
    heads: i32,
    dim: i32,
    share: i32,
    causal: i32,
    splits: i32,
    batch: i32,
    split_keys: i32,
    scale_log2: f32,
    slack: f32,
    unused: i32,
}

impl Args {
    fn new(op: &Attention) -> Self {
        /// How far a score may exceed its row's reference, in powers of two.
        const SLACK_LOG2: f32 = 8.0;
        let scale_log2 = op.scale * std::f32::consts::LOG2_E;
        Self {
            q: op.q,
            k: op.k,
            v: op.v,
            out: op.out,
            partial: DevicePtr::NULL,
            stats: DevicePtr::NULL,
            q_pitch: op.q_pitch as i32,
            k_pitch: op.k_pitch as i32,
            v_pitch: op.v_pitch as i32,
            out_pitch: op.out_pitch as i32,
            queries: op.queries as i32,
            keys: op.keys as i32,
            heads: op.heads as i32,
            dim: op.head_dim as i32,
            share: (op.batch / op.key_batch) as i32,
            causal: i32::from(op.is_causal),
            splits: 1,
            batch: op.batch as i32,
            split_keys: op.keys as i32,
            scale_log2,
            slack: SLACK_LOG2 / scale_log2,
            unused: 0,
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct CombineArgs {
    partial: DevicePtr,
    stats: DevicePtr,
    out: DevicePtr,
    out_pitch: i32,
    queries: i32,
    heads: i32,
    dim: i32,
    splits: i32,
    batch: i32,
}

fn tiled(gpu: &Gpu, op: &Attention, tile: &Tile, splits: usize, split_keys: usize) -> Result<(), CudaError> {
    let grid = [op.queries.div_ceil(tile.rows), op.heads, op.batch * splits];
    if grid[1] > 65_535 || grid[2] > 65_535 {
        return Err(unsupported(format!("grid {grid:?} has more than 65535 blocks along y or z")));
    }
    let mut args = Args { splits: splits as i32, split_keys: split_keys as i32, ..Args::new(op) };
    if splits > 1 {
        let rows = splits * op.batch * op.heads * op.queries;
        let bytes = partial_bytes(op, splits).ok_or_else(|| unsupported(format!("{rows} partial rows")))?;
        args.partial = gpu.workspace(bytes)?;
        args.stats = args.partial.offset(rows * op.head_dim * size_of::<f32>());
    }
    let geometry = Geometry {
        grid: grid.map(|n| n as u32),
        threads: tile.threads as u32,
        shared: tile.shared as u32,
        cluster: 1,
    };
    let name = tile.kernel(op.element);
    gpu.launch(&Kernel { module: tile.module, name: &name }, &geometry, &[bytes_of(&args)])?;
    if splits > 1 { combine(gpu, op, &args) } else { Ok(()) }
}

fn combine(gpu: &Gpu, op: &Attention, args: &Args) -> Result<(), CudaError> {
    const THREADS: usize = 256;
    let combine = CombineArgs {
        partial: args.partial,
        stats: args.stats,
        out: args.out,
        out_pitch: args.out_pitch,
        queries: args.queries,
        heads: args.heads,
        dim: args.dim,
        splits: args.splits,
        batch: args.batch,
    };
    let vectors = op.batch * op.heads * op.queries * op.head_dim / 8;
    let name = format!("attention_combine_{}", op.element.suffix());
    let geometry = Geometry::line(vectors.div_ceil(THREADS), THREADS as u32);
    gpu.launch(&Kernel { module: "attention_sm80", name: &name }, &geometry, &[bytes_of(&combine)])
}

fn rows(gpu: &Gpu, op: &Attention) -> Result<(), CudaError> {
    const WARPS: usize = 4;
    let name = format!("attention_rows_{}", op.element.suffix());
    // One query row a warp, which keeps it and the row of the result in shared memory.
    let shared = WARPS * 2 * op.head_dim.next_multiple_of(2) * size_of::<f32>();
    let most = gpu.shared_memory();
    if shared > most {
        return Err(unsupported(format!("{} columns a head need {shared} bytes of {most}", op.head_dim)));
    }
    let blocks = (op.batch * op.heads * op.queries).div_ceil(WARPS);
    let geometry = Geometry { shared: shared as u32, ..Geometry::line(blocks, (WARPS * 32) as u32) };
    gpu.launch(&Kernel { module: "attention_rows", name: &name }, &geometry, &[bytes_of(&Args::new(op))])
}

fn unsupported(reason: String) -> CudaError {
    CudaError::Unsupported { op: OP, reason }
}

/// What every kernel assumes.
fn check(op: &Attention) -> Result<(), CudaError> {
    let wrong = |reason: String| Err(unsupported(reason));
    if op.key_batch == 0 || !op.batch.is_multiple_of(op.key_batch) {
        return wrong(format!("{} samples cannot share the keys of {}", op.batch, op.key_batch));
    }
    if op.keys == 0 || op.heads == 0 || op.head_dim == 0 {
        return wrong(format!("{} keys, {} heads of {} columns", op.keys, op.heads, op.head_dim));
    }
    if !(op.scale > 0.0 && op.scale.is_finite()) {
        return wrong(format!("the scale must be positive and finite, not {}", op.scale));
    }
    let width = op.heads.saturating_mul(op.head_dim);
    for (what, pitch) in [("q", op.q_pitch), ("k", op.k_pitch), ("v", op.v_pitch), ("out", op.out_pitch)] {
        if pitch < width || pitch > i32::MAX as usize {
            return wrong(format!("{what} has a pitch of {pitch}, its rows {width} elements"));
        }
    }
    const LIMIT: usize = 1 << 30;
    if [op.queries, op.keys, op.batch, width].iter().any(|n| *n > LIMIT) {
        return wrong(format!("an extent beyond 2^30: {op:?}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use super::*;
    use crate::driver::simt::{SimtDriver, SimtOptions};
    use crate::driver::toolchain::{SimtVariant, build_simt};
    use crate::driver::{DevicePtr, Driver};

    const A100: Device = Device { multiprocessors: 108, shared_memory: 163 << 10 };
    const RTX_4090: Device = Device { multiprocessors: 128, shared_memory: 99 << 10 };
    const T4: Device = Device { multiprocessors: 40, shared_memory: 64 << 10 };
    /// Columns that the tiles of a T4 take.
    const T4_DIM: usize = 160;

    fn op([batch, heads, head_dim, queries, keys]: [usize; 5]) -> Attention {
        let pitch = heads * head_dim;
        Attention {
            q: DevicePtr(4096),
            k: DevicePtr(4096),
            v: DevicePtr(4096),
            out: DevicePtr(4096),
            q_pitch: pitch,
            k_pitch: pitch,
            v_pitch: pitch,
            out_pitch: pitch,
            batch,
            key_batch: batch,
            queries,
            keys,
            heads,
            head_dim,
            is_causal: false,
            scale: 1.0,
            element: Element::F16,
        }
    }

    /// Rows, keys and splits of the plan.
    fn planned(shape: [usize; 5], device: &Device) -> (usize, usize, usize) {
        match plan(&op(shape), device) {
            Plan::Tiled { tile, splits, .. } => (tile.rows, tile.keys, splits),
            Plan::Rows => (1, 1, 1),
        }
    }

    #[test]
    fn real_shapes_get_the_tiles_made_for_them() {
        // Self attention of large levels: wide tiles, unsplit.
        assert_eq!(planned([2, 8, 40, 4096, 4096], &A100), (128, 64, 1));
        assert_eq!(planned([2, 10, 64, 4096, 4096], &A100), (128, 64, 1));
        // Prompts: one tile holds all 77 tokens.
        for dim in [40, 64, 80] {
            assert_eq!(planned([2, 8, dim, 4096, 77], &A100), (64, 80, 1), "head dim {dim}");
        }
        // The VAE: 64 blocks would leave 44 multiprocessors idle.
        let (rows, keys, splits) = planned([1, 1, 512, 4096, 4096], &A100);
        assert_eq!((rows, keys), (64, 128));
        assert!((2..=8).contains(&splits), "{splits} splits");
        let (_, keys, _) = planned([1, 1, 512, 4096, 4096], &RTX_4090);
        assert_eq!(keys, 64, "99 KiB of shared memory");
    }

    #[test]
    fn odd_operands_get_the_plain_kernel() {
        assert_eq!(plan(&op([1, 2, 12, 8, 8]), &A100), Plan::Rows);
        assert_eq!(plan(&op([1, 2, 640, 8, 8]), &A100), Plan::Rows);
        assert_eq!(plan(&Attention { element: Element::F32, ..op([1, 2, 64, 8, 8]) }, &A100), Plan::Rows);
        assert_eq!(plan(&Attention { q: DevicePtr(4098), ..op([1, 2, 64, 8, 8]) }, &A100), Plan::Rows);
        assert_eq!(plan(&Attention { k_pitch: 130, ..op([1, 2, 64, 8, 8]) }, &A100), Plan::Rows);
    }

    #[test]
    fn every_plan_covers_all_keys_within_the_device() {
        for device in [A100, RTX_4090, T4] {
            for dim in (8..=512).step_by(8) {
                for (queries, keys) in [(1, 1), (64, 64), (77, 77), (1000, 154), (4096, 4096), (16384, 16384)]
                {
                    let shape = [1, 2, dim, queries, keys];
                    let Plan::Tiled { tile, splits, split_keys } = plan(&op(shape), &device) else {
                        assert!(
                            device.shared_memory == T4.shared_memory && dim > T4_DIM,
                            "{shape:?} has no tile"
                        );
                        continue;
                    };
                    assert!(tile.dim >= dim && tile.shared <= device.shared_memory);
                    assert!(splits <= MAX_SPLITS && split_keys % tile.keys == 0);
                    assert!(splits * split_keys >= keys, "{shape:?}: keys are left out");
                    assert!((splits - 1) * split_keys < keys, "{shape:?}: a part is empty");
                    let partial = partial_bytes(&op(shape), splits).unwrap();
                    assert!(splits == 1 || partial <= MAX_PARTIAL, "{shape:?}: {partial} bytes");
                }
            }
        }
    }

    #[test]
    fn wrong_operands_are_refused() {
        let good = op([4, 2, 64, 8, 8]);
        assert!(check(&good).is_ok());
        for bad in [
            Attention { key_batch: 3, ..good },
            Attention { key_batch: 0, ..good },
            Attention { keys: 0, ..good },
            Attention { q_pitch: 120, ..good },
            Attention { scale: 0.0, ..good },
            Attention { scale: f32::NAN, ..good },
        ] {
            assert!(matches!(check(&bad), Err(CudaError::Unsupported { .. })), "{bad:?}");
        }
    }

    /// `ldmatrix` of every tile at its full head dim reads without bank conflicts.
    #[test]
    fn shared_memory_has_no_bank_conflicts() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let library =
            build_simt(&root.join("kernels"), &[], &root.join("target/simt-objects"), SimtVariant::Fast)
                .unwrap();
        let driver = Arc::new(SimtDriver::open(&library, SimtOptions::default()).unwrap());
        let gpu = Gpu::new(driver.clone()).unwrap();
        for tile in TILES {
            let shape = [1, 1, tile.dim, 2 * tile.rows, 2 * tile.keys];
            let elements = tile.dim * shape[3].max(shape[4]);
            let memory = driver.alloc(elements * 4, gpu.stream()).unwrap();
            driver.fill(memory, 0, elements * 4, gpu.stream()).unwrap();
            let out = memory.offset(elements * 2);
            let op = Attention { q: memory, k: memory, v: memory, out, ..op(shape) };
            attention_as(&gpu, &op, &Plan::tiled(tile, op.keys, 1)).unwrap();
            assert_eq!(driver.last_bank_conflicts(), 0, "{tile:?}");
            driver.free(memory, gpu.stream()).unwrap();
        }
    }
}
