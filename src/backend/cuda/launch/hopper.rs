//! What the two sm_90a product kernels share (`kernels/include/hopper_tile.cuh`): how a product is cut into
//! tiles, and the tensor maps of its operands.

use bytemuck::{Pod, Zeroable, bytes_of};

use super::super::{CudaError, Element, Geometry, Gpu, Kernel};
use super::elementwise::Act;
use super::epilogue::{Epilogue, EpilogueArgs, Rows};
use crate::driver::{DevicePtr, MapElement, Swizzle, TensorMap, TensorMapDesc};

/// Rows of a tile.
pub(super) const ROWS: usize = 128;
/// Depth of a step along K, in elements.
pub(super) const DEPTH: usize = 64;
/// Threads of a block: a producer warpgroup and two consumers.
pub(super) const THREADS: u32 = 384;
/// Threads of a block that adds partial sums.
const REDUCE_THREADS: usize = 256;
/// Most blocks of a cluster.
const CLUSTER: usize = 2;
/// Columns of the tiles that there are kernels for.
const WIDTHS: [usize; 3] = [128, 160, 256];
/// Bytes a cycle that a multiprocessor gets from the L2 cache while all of them ask.
const L2_BYTES_PER_CYCLE: usize = 30;
/// Cycles to write a tile out, a column of it each.
const CYCLES_PER_COLUMN: usize = 10;
/// The same where the blocks of a cluster add their sums up first.
const CYCLES_PER_CLUSTER_COLUMN: usize = 22;
/// Cycles of one more launch, for the sum of a split product.
const CYCLES_OF_LAUNCH: usize = 5000;

/// `HopperTiles` of `hopper_tile.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub(super) struct Tiles {
    pub steps: i32,
    pub tiles_m: i32,
    pub tiles_n: i32,
    pub band: i32,
    pub splits: i32,
    pub cluster: i32,
}

/// How a product is cut up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Columns of a tile: 128, 160 or 256.
    pub width: usize,
    /// Parts of K.
    pub splits: usize,
    /// Tiles above each other that share their right operand: 1 or 2.
    pub cluster: usize,
}

impl Cut {
    /// Whether the splits of a tile meet in a cluster of blocks instead of in device memory.
    fn adds_in_cluster(self) -> bool {
        self.cluster == 1 && self.width < 256 && [2, 4, 8].contains(&self.splits)
    }
}

/// A product to cut up.
#[derive(Clone, Copy, Debug)]
pub(super) struct Product {
    /// Rows of tiles.
    pub tiles_m: usize,
    /// Columns.
    pub columns: usize,
    /// Steps of [`DEPTH`] over all of K.
    pub steps: usize,
}

/// How a product is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// Tiles and splits.
    pub cut: Cut,
    /// Blocks.
    pub blocks: usize,
    /// For the kernel.
    pub tiles: Tiles,
}

impl Plan {
    /// A product cut up as the caller says.
    pub fn new(product: &Product, cut: Cut, multiprocessors: usize) -> Result<Self, CudaError> {
        let Product { tiles_m, columns, steps } = *product;
        if !WIDTHS.contains(&cut.width)
            || !(1..=steps).contains(&cut.splits)
            || !(1..=CLUSTER).contains(&cut.cluster)
        {
            let reason =
                format!("{cut:?} of {product:?}: widths {WIDTHS:?}, 1 to {steps} splits, cluster 1 or 2");
            return Err(CudaError::Unsupported { op: "sm_90a product", reason });
        }
        let tiles_n = columns.div_ceil(cut.width);
        let rows = tiles_m.div_ceil(cut.cluster);
        let units = rows * tiles_n * cut.splits;
        if units > i32::MAX as usize / 2 || steps > i32::MAX as usize / 64 {
            let reason = format!("{units} tiles of {steps} steps are more than 32-bit indices reach");
            return Err(CudaError::Unsupported { op: "sm_90a product", reason });
        }
        let tiles = Tiles {
            steps: steps as i32,
            tiles_m: tiles_m as i32,
            tiles_n: tiles_n as i32,
            band: band(rows, &cut, multiprocessors) as i32,
            splits: cut.splits as i32,
            cluster: cut.cluster as i32,
        };
        let clusters = units.min((multiprocessors / cut.cluster).max(1));
        let blocks = if cut.adds_in_cluster() { units } else { clusters * cut.cluster };
        Ok(Self { cut, blocks, tiles })
    }

    /// Launch geometry; the shared memory is `sizeof(hopper::Smem)`.
    pub fn geometry(&self) -> Geometry {
        let stages = if self.cut.width > 160 { 4 } else { 6 };
        let bytes = stages * ((ROWS + self.cut.width) * DEPTH * 2 + 16);
        let shared = bytes.next_multiple_of(1024) as u32;
        Geometry {
            grid: [self.blocks as u32, 1, 1],
            threads: THREADS,
            shared,
            cluster: if self.cut.adds_in_cluster() { self.cut.splits } else { self.cut.cluster } as u32,
        }
    }

    /// Rows of a box of the right operand.
    pub fn box_rows(&self) -> usize {
        self.cut.width / self.cut.cluster
    }
}

/// The best way to cut up a product.
///
/// Estimates every width and split in cycles and takes the least: a step costs what the tensor cores need for it or what the
/// L2 cache needs to deliver it (a cluster asks only once for what its tiles share), tiles come in waves of as many as there
/// are multiprocessors, and a split product either adds up in clusters or writes and reads its partial sums and launches
/// once more.
pub(super) fn best_cut(product: &Product, multiprocessors: usize) -> Cut {
    let mut best = (usize::MAX, Cut { width: WIDTHS[0], splits: 1, cluster: 1 });
    let clusters = if product.tiles_m > 1 && multiprocessors > 1 { CLUSTER } else { 1 };
    for (width, cluster) in WIDTHS.into_iter().flat_map(|w| (1..=clusters).map(move |c| (w, c))) {
        let rows = product.tiles_m.div_ceil(cluster);
        let tiles = rows * cluster * product.columns.div_ceil(width);
        // 4096 floating-point operations a cycle and multiprocessor.
        let arithmetic = ROWS * width * DEPTH * 2 / 4096;
        let step = arithmetic.max((ROWS + width / cluster) * DEPTH * 2 / L2_BYTES_PER_CYCLE);
        for splits in 1..=(product.steps / 4).clamp(1, 16) {
            let cut = Cut { width, splits, cluster };
            let sums = product.steps.div_ceil(splits) * step;
            let cycles = if cut.adds_in_cluster() {
                // Clusters of eight leave some multiprocessors of a graphics processing cluster without one.
                let at_a_time = (multiprocessors - multiprocessors / 16) / splits;
                tiles.div_ceil(at_a_time.max(1)) * (sums + width * CYCLES_PER_CLUSTER_COLUMN)
            } else {
                let waves = (tiles / cluster * splits).div_ceil(multiprocessors / cluster);
                let partial = tiles * ROWS * width * 4 * splits;
                let second = CYCLES_OF_LAUNCH + 2 * partial / (L2_BYTES_PER_CYCLE * multiprocessors);
                waves * (sums + width * CYCLES_PER_COLUMN) + if splits > 1 { second } else { 0 }
            };
            if cycles < best.0 {
                best = (cycles, cut);
            }
        }
    }
    best.1
}

/// Rows of clusters to walk together: the tiles under way at one time then cover about a square of the product, which needs
/// the fewest different rows of both operands.
fn band(rows: usize, cut: &Cut, multiprocessors: usize) -> usize {
    let square = (multiprocessors * cut.width) as f64 / ROWS as f64;
    ((square.sqrt() / cut.cluster as f64).round() as usize).clamp(1, rows.max(1))
}

/// Element type of a tensor map; only half-sized ones have kernels here.
pub(super) fn map_element(element: Element) -> MapElement {
    match element {
        Element::F16 => MapElement::F16,
        Element::BF16 => MapElement::BF16,
        Element::F32 => MapElement::F32,
    }
}

/// Map of boxes of `box_rows` rows by one step of K of a matrix of `extent` rows and columns.
pub(super) fn matrix_map(
    gpu: &Gpu,
    matrix: Rows,
    extent: [usize; 2],
    box_rows: usize,
    element: Element,
) -> Result<TensorMap, CudaError> {
    let [rows, columns] = extent;
    Ok(gpu.driver().tensor_map(&TensorMapDesc {
        base: matrix.ptr,
        element: map_element(element),
        extents: vec![columns as u64, rows as u64],
        strides: vec![(matrix.pitch * element.size()) as u64],
        box_extents: vec![DEPTH as u32, box_rows as u32],
        swizzle: Swizzle::B128,
        im2col: None,
    })?)
}

/// Whether a product of `columns` columns can be stored eight columns at a time, and its epilogue's operands read so.
pub(super) fn epilogue_in_vectors(epilogue: &Epilogue, columns: usize) -> bool {
    columns.is_multiple_of(if epilogue.geglu { 16 } else { 8 })
        && epilogue.bias.0.is_multiple_of(16)
        && epilogue.out.is_vector()
        && epilogue.residual.is_none_or(|rows| rows.is_vector())
        && epilogue.time_bias.is_none_or(|rows| rows.is_vector())
}

/// What a kernel does with a tile's sums: `Finish` in `hopper_tile.cuh`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Finish {
    /// Bias and residual.
    Plain,
    /// Bias and the bias of the sample.
    Time,
    /// Value times gate, with their bias.
    Geglu,
    /// Sums as they are, which a second kernel adds up and finishes.
    Partial,
    /// The splits of a tile are the blocks of a cluster, which add their sums up and do any epilogue.
    Cluster,
}

impl Finish {
    /// The one for this epilogue; kernels of `has_time` have [`Finish::Time`], the others [`Finish::Geglu`].
    pub fn of(epilogue: &Epilogue, cut: Cut, has_time: bool) -> Self {
        let Epilogue { act, geglu, out_f32, scale, .. } = *epilogue;
        let (residual, time) = (epilogue.residual.is_some(), epilogue.time_bias.is_some());
        match (geglu, residual, time) {
            _ if cut.adds_in_cluster() => Self::Cluster,
            _ if cut.splits > 1 || act != Act::None || out_f32 || scale != 1.0 => Self::Partial,
            (false, _, false) => Self::Plain,
            (true, false, false) if !has_time => Self::Geglu,
            (false, false, true) if has_time => Self::Time,
            _ => Self::Partial,
        }
    }

    /// As a part of the kernel's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "",
            Self::Time => "_time",
            Self::Geglu => "_geglu",
            Self::Partial => "_partial",
            Self::Cluster => "_cluster",
        }
    }
}

/// Memory for the partial sums of a product that a second kernel finishes; null for others.
pub(super) fn partial_memory(
    gpu: &Gpu,
    plan: &Plan,
    finish: Finish,
    rows: usize,
    columns: usize,
) -> Result<DevicePtr, CudaError> {
    match finish {
        Finish::Partial => gpu.workspace(plan.cut.splits * rows * columns * size_of::<f32>()),
        _ => Ok(DevicePtr::NULL),
    }
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct ReduceArgs {
    epilogue: EpilogueArgs,
    splits: i32,
    unused: i32,
}

/// Adds the partial sums of a split product of `rows` rows that has `columns` columns after its epilogue.
pub(super) fn reduce(
    gpu: &Gpu,
    epilogue: &EpilogueArgs,
    plan: &Plan,
    extent: [usize; 2],
    element: Element,
) -> Result<(), CudaError> {
    if epilogue.partial.is_null() {
        return Ok(());
    }
    let [rows, columns] = extent;
    let args = ReduceArgs { epilogue: *epilogue, splits: plan.cut.splits as i32, unused: 0 };
    let name = format!("gemm_sm90_reduce_{}", element.suffix());
    let geometry = Geometry::line((rows * (columns / 8)).div_ceil(REDUCE_THREADS), REDUCE_THREADS as u32);
    gpu.launch(&Kernel { module: "gemm_sm90", name: &name }, &geometry, &[bytes_of(&args)])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(tiles_m: usize, columns: usize, steps: usize) -> (usize, usize, usize) {
        let cut = best_cut(&Product { tiles_m, columns, steps }, 132);
        (cut.width, cut.splits, cut.cluster)
    }

    #[test]
    fn widths_of_the_unets_fill_the_machine() {
        // SDXL 2048 x 1280: 16 x 8 tiles of 160 on 132 multiprocessors, nothing to split.
        assert_eq!(cut(16, 1280, 20), (160, 1, 2));
        // Feed-forward 2048 x 10240: five waves of wide tiles.
        assert_eq!(cut(16, 10240, 20), (256, 1, 2));
        // SD1.5 512 x 1280 over K = 11520, and half of that again over 5760: few tiles, so they are split until most
        // multiprocessors have one part each.
        for product in [(4, 1280, 180), (16, 640, 90), (1, 1280, 180)] {
            let (width, splits, _) = cut(product.0, product.1, product.2);
            let units = product.0 * product.1.div_ceil(width) * splits;
            assert!((112..=132).contains(&units), "{product:?}: {units} parts");
        }
    }

    #[test]
    fn splits_leave_every_part_some_steps() {
        for steps in 1..40 {
            assert!(cut(1, 128, steps).1 <= steps.div_ceil(4), "{steps} steps");
        }
    }

    #[test]
    fn shared_memory_fits() {
        for (width, bytes) in [(128, 197_632), (160, 222_208), (256, 197_632)] {
            let product = Product { tiles_m: 1, columns: 128, steps: 1 };
            let plan = Plan::new(&product, Cut { width, splits: 1, cluster: 1 }, 1)
                .map(|plan| plan.geometry().shared);
            assert!(matches!(plan, Ok(shared) if shared == bytes && bytes <= 227 * 1024));
        }
    }
}
