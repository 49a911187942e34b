//! What the two sm_90a product kernels share (`kernels/include/hopper_tile.cuh`): how a product is cut into
//! tiles, and the tensor maps of its operands.

use bytemuck::{Pod, Zeroable};

use super::super::{CudaError, Element, Geometry, Gpu, Kernel};
use super::elementwise::Act;
use super::epilogue::{Epilogue, Rows};
use crate::driver::{MapElement, Swizzle, TensorMap, TensorMapDesc};

/// The kernel files that only Hopper runs.
pub(in super::super) const MODULES: [&str; 5] =
    ["attention_sm90", "ceiling_sm90", "conv_sm90", "gemm_sm90", "groupnorm_sm90"];
/// Rows of a tile.
pub(super) const ROWS: usize = 128;
/// Depth of a step along K, in elements.
pub(super) const DEPTH: usize = 64;
/// Threads of a block: a producer warpgroup and two consumers.
pub(super) const THREADS: u32 = 384;
/// Most tiles above each other that share their right operand.
const MOST_IN_PAIR: usize = 2;
/// Most blocks of a cluster that every device of compute capability 9.0 has.
const MOST_IN_CLUSTER: usize = 8;
/// Columns of the tiles that there are kernels for.
const WIDTHS: [usize; 3] = [128, 160, 256];
/// Fewest steps of K in a split.
const LEAST_STEPS: usize = 4;
/// Costs on an H200 in cycles of 1.755 GHz, fitted to the measured times of 106 layers of SD1.5 and SDXL
/// (`benches/results/2026-11-27-h200.md`): 7% rms over times from 6 to 2000 µs. How often they are paid: [`cycles`].
mod cost {
    /// Floating-point operations a cycle and multiprocessor: 80% of what the tensor cores can do.
    pub const OPERATIONS: f64 = 0.8 * 4096.0;
    /// Bytes a cycle that a multiprocessor gets from the L2 cache while all of them ask, and at most.
    pub const L2_BYTES: f64 = 32.6;
    pub const L2_BYTES_ALONE: f64 = 41.7;
    /// A kernel, from one to the next.
    pub const LAUNCH: f64 = 4670.0;
    /// Writing out a column of a tile.
    pub const COLUMN: f64 = 22.3;
    /// Summing up in a cluster: the launch, a wave of blocks, and one part of K of it.
    pub const CLUSTER_LAUNCH: f64 = 2000.0;
    pub const CLUSTER_WAVE: f64 = 5200.0;
    pub const CLUSTER_SPLIT: f64 = 1084.0;
}

/// `HopperTiles` of `hopper_tile.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub(super) struct Tiles {
    pub steps: i32,
    pub tiles_m: i32,
    pub tiles_n: i32,
    pub band: i32,
    pub splits: i32,
    pub pair: i32,
    pub constant_b: i32,
    pub unused: i32,
}

/// How a product is cut up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Columns of a tile: 128, 160 or 256.
    pub width: usize,
    /// Parts of K.
    pub splits: usize,
    /// Tiles above each other that share their right operand: 1 or 2.
    pub pair: usize,
}

/// How many clusters of one to eight blocks of a product kernel run at a time, by their number of blocks; 0 where the device
/// has no such clusters.
#[derive(Clone, Copy, Debug)]
pub struct Room([usize; MOST_IN_CLUSTER + 1]);

impl Room {
    /// Asks the driver, but for single blocks: one takes a multiprocessor for itself, whatever the driver says of clusters.
    pub fn measure(gpu: &Gpu) -> Self {
        let mut room = [0; MOST_IN_CLUSTER + 1];
        room[1] = gpu.multiprocessors().max(1);
        let kernel = Kernel { module: "gemm_sm90", name: "gemm_sm90_128x160_any_f16" };
        for (blocks, count) in room.iter_mut().enumerate().skip(2) {
            let cluster = blocks as u32;
            let geometry =
                Geometry { grid: [cluster, 1, 1], threads: THREADS, shared: shared_bytes(160), cluster };
            *count = gpu.clusters(&kernel, &geometry).unwrap_or_else(|error| {
                tracing::warn!(%error, blocks, "clusters cannot be counted: products do without");
                0
            });
        }
        tracing::debug!(?room, "clusters that run at a time");
        Self(room)
    }

    /// Clusters of this many blocks.
    fn clusters(&self, blocks: usize) -> usize {
        self.0[blocks]
    }
}

impl std::fmt::Display for Cut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{} x{}", self.width, self.splits, self.pair)
    }
}

impl Cut {
    /// Blocks of a cluster: the pairs of all parts of K.
    fn cluster(self) -> usize {
        self.splits * self.pair
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
    /// Nobody writes the right operand while the kernel before may still run.
    pub is_right_constant: bool,
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
    pub fn new(product: &Product, cut: Cut, finish: Finish, room: &Room) -> Result<Self, CudaError> {
        let Product { tiles_m, columns, steps, is_right_constant } = *product;
        if !WIDTHS.contains(&cut.width)
            || !(1..=steps).contains(&cut.splits)
            || !(1..=MOST_IN_PAIR).contains(&cut.pair)
            || cut.cluster() > MOST_IN_CLUSTER
            || room.clusters(cut.cluster()) == 0
            || (cut.splits > 1 && finish != Finish::Any)
        {
            let reason = format!(
                "{cut:?} of {product:?}, then {finish:?}: widths {WIDTHS:?}, 1 to {steps} splits (more than 1 with \
                 any epilogue only), a pair of 1 or 2, clusters of at most {MOST_IN_CLUSTER} that fit ({room:?})"
            );
            return Err(CudaError::Unsupported { op: "sm_90a product", reason });
        }
        let tiles_n = columns.div_ceil(cut.width);
        let rows = tiles_m.div_ceil(cut.pair);
        let units = rows * tiles_n * cut.splits;
        if units > i32::MAX as usize / 2 || steps > i32::MAX as usize / 64 {
            let reason = format!("{units} tiles of {steps} steps are more than 32-bit indices reach");
            return Err(CudaError::Unsupported { op: "sm_90a product", reason });
        }
        let tiles = Tiles {
            steps: steps as i32,
            tiles_m: tiles_m as i32,
            tiles_n: tiles_n as i32,
            band: band(rows, &cut, room.clusters(1)) as i32,
            splits: cut.splits as i32,
            pair: cut.pair as i32,
            constant_b: i32::from(is_right_constant),
            unused: 0,
        };
        let at_a_time = if finish == Finish::Any { units } else { room.clusters(cut.pair) };
        let blocks = units.min(at_a_time) * cut.pair;
        Ok(Self { cut, blocks, tiles })
    }

    /// Launch geometry; the shared memory is `sizeof(hopper::Smem)`.
    pub fn geometry(&self) -> Geometry {
        Geometry {
            grid: [self.blocks as u32, 1, 1],
            threads: THREADS,
            shared: shared_bytes(self.cut.width),
            cluster: self.cut.cluster() as u32,
        }
    }

    /// Rows of a box of the right operand.
    pub fn box_rows(&self) -> usize {
        self.cut.width / self.cut.pair
    }
}

/// `sizeof(hopper::Smem)` for tiles of `width` columns.
fn shared_bytes(width: usize) -> u32 {
    let stages = if width > 160 { 4 } else { 6 };
    (stages * ((ROWS + width) * DEPTH * 2 + 16)).next_multiple_of(1024) as u32
}

/// The best way to cut up a product: the least of the estimates.
pub(super) fn best_cut(product: &Product, room: &Room) -> Cut {
    let plain = Cut { width: WIDTHS[0], splits: 1, pair: 1 };
    let estimate = |cut: &Cut| cycles(product, *cut, room);
    cuts(product, room).min_by(|a, b| estimate(a).total_cmp(&estimate(b))).unwrap_or(plain)
}

/// All of [`cuts`], by their estimates.
pub(super) fn ranked_cuts(product: &Product, room: &Room) -> Vec<Cut> {
    let mut all: Vec<Cut> = cuts(product, room).collect();
    all.sort_by(|a, b| cycles(product, *a, room).total_cmp(&cycles(product, *b, room)));
    all
}

/// All ways to cut up a product that can make sense and fit the device.
pub(super) fn cuts(product: &Product, room: &Room) -> impl Iterator<Item = Cut> {
    let pairs = if product.tiles_m > 1 { MOST_IN_PAIR } else { 1 };
    let (most, room) = ((product.steps / LEAST_STEPS).max(1), *room);
    let all = WIDTHS.into_iter().flat_map(move |width| {
        (1..=pairs).flat_map(move |pair| {
            (1..=most.min(MOST_IN_CLUSTER / pair)).map(move |splits| Cut { width, splits, pair })
        })
    });
    all.filter(move |cut| room.clusters(cut.cluster()) > 0)
}

/// Estimate of the time that a product takes.
///
/// A step costs what the tensor cores need for it or what the L2 cache needs to deliver it (a pair asks only once for what
/// its tiles share); tiles come in waves of as many as there is room for; writing out is either hidden behind the next
/// tile's loads or, for parts of K that add up in a cluster, is not.
fn cycles(product: &Product, cut: Cut, room: &Room) -> f64 {
    let Cut { width, splits, pair } = cut;
    let tiles = product.tiles_m.div_ceil(pair) * pair * product.columns.div_ceil(width);
    let multiprocessors = room.clusters(1);
    let active = (tiles * splits).min(multiprocessors) as f64;
    let bytes = ((ROWS + width / pair) * DEPTH * 2) as f64;
    let from_l2 = bytes / cost::L2_BYTES_ALONE.min(cost::L2_BYTES * multiprocessors as f64 / active);
    let step = from_l2.max((ROWS * width * DEPTH * 2) as f64 / cost::OPERATIONS);
    let sums = product.steps.div_ceil(splits) as f64 * step;
    let waves = tiles.div_ceil(room.clusters(cut.cluster()) * pair) as f64;
    if splits == 1 {
        cost::LAUNCH + waves * (sums + width as f64 * cost::COLUMN)
    } else {
        cost::CLUSTER_LAUNCH + waves * (sums + cost::CLUSTER_WAVE + splits as f64 * cost::CLUSTER_SPLIT)
    }
}

/// Rows of pairs to walk together: the tiles under way at one time then cover about a square of the product, which needs
/// the fewest different rows of both operands.
fn band(rows: usize, cut: &Cut, multiprocessors: usize) -> usize {
    let square = (multiprocessors * cut.width) as f64 / ROWS as f64;
    ((square.sqrt() / cut.pair as f64).round() as usize).clamp(1, rows.max(1))
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
pub enum Finish {
    /// Bias, leaky relu, scale and residual.
    Plain,
    /// Bias and the bias of the sample.
    Time,
    /// Value times gate, with their bias.
    Geglu,
    /// Any epilogue, and parts of K that the blocks of a cluster have.
    Any,
}

impl Finish {
    /// The one for this epilogue; kernels of `has_time` have [`Finish::Time`], the others [`Finish::Geglu`].
    pub fn of(epilogue: &Epilogue, cut: Cut, has_time: bool) -> Self {
        let Epilogue { act, geglu, out_f32, scale, .. } = *epilogue;
        let (residual, time) = (epilogue.residual.is_some(), epilogue.time_bias.is_some());
        let is_plain = matches!(act, Act::None | Act::LeakyRelu);
        match (geglu, residual, time) {
            _ if cut.splits > 1 || out_f32 => Self::Any,
            (false, _, false) if is_plain => Self::Plain,
            _ if act != Act::None || scale != 1.0 => Self::Any,
            (true, false, false) if !has_time => Self::Geglu,
            (false, false, true) if has_time => Self::Time,
            _ => Self::Any,
        }
    }

    /// As a part of the kernel's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "",
            Self::Time => "_time",
            Self::Geglu => "_geglu",
            Self::Any => "_any",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 132 multiprocessors, clusters in groups of sixteen.
    const H200: Room = Room([0, 132, 66, 40, 32, 24, 16, 16, 16]);

    fn cut(tiles_m: usize, columns: usize, steps: usize) -> (usize, usize, usize) {
        let cut = best_cut(&Product { tiles_m, columns, steps, is_right_constant: true }, &H200);
        (cut.width, cut.splits, cut.pair)
    }

    #[test]
    fn the_files_for_hopper_are_all_named() {
        let kernels = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
        let sources = crate::driver::toolchain::kernel_sources(&kernels).unwrap();
        let named = sources.iter().map(|source| crate::driver::toolchain::module_name(source));
        let mut for_hopper: Vec<String> = named.filter(|name| name.ends_with("_sm90")).collect();
        for_hopper.sort();
        assert_eq!(for_hopper, MODULES);
    }

    #[test]
    fn widths_of_the_unets_fill_the_machine() {
        // SDXL 2048 x 1280: 16 x 8 tiles of 160 on 132 multiprocessors, nothing to split; also over K = 11520.
        assert_eq!(cut(16, 1280, 20), (160, 1, 2));
        assert_eq!(cut(16, 1280, 180), (160, 1, 2));
        // Feed-forward 2048 x 10240: waves of wide tiles.
        assert_eq!(cut(16, 10240, 20), (256, 1, 2));
        // SD1.5 512 x 1280 over K = 11520, and half of that again over 5760: few tiles, so they are split until most
        // multiprocessors have one part each, and the parts meet in clusters of eight and of four.
        assert_eq!(cut(4, 1280, 180), (160, 4, 2));
        assert_eq!(cut(16, 640, 90), (160, 2, 2));
        // Two images of 8 x 8 pixels: as many parts as a cluster holds.
        assert_eq!(cut(1, 1280, 180), (128, 8, 1));
    }

    #[test]
    fn a_device_with_room_for_few_clusters_gets_other_tiles() {
        let product = Product { tiles_m: 16, columns: 640, steps: 90, is_right_constant: true };
        let crowded = Room([0, 132, 66, 20, 16, 12, 8, 8, 8]);
        let (roomy, crowded) = (best_cut(&product, &H200), best_cut(&product, &crowded));
        assert!(roomy.splits > 1 && crowded != roomy, "{roomy} and {crowded}");
    }

    #[test]
    fn clusters_that_the_device_does_not_have_are_not_chosen() {
        // Powers of two alone, as on a device that refuses the others; and a slice of a device too small for eight.
        for room in [
            Room([0, 132, 66, 0, 32, 0, 0, 0, 16]),
            Room([0, 7, 3, 2, 1, 0, 0, 0, 0]),
            Room([0, 1, 0, 0, 0, 0, 0, 0, 0]),
        ] {
            for tiles_m in [1, 2, 4, 16] {
                let product = Product { tiles_m, columns: 1280, steps: 180, is_right_constant: true };
                let all: Vec<Cut> = cuts(&product, &room).collect();
                assert!(!all.is_empty() && all.iter().all(|cut| room.clusters(cut.cluster()) > 0), "{all:?}");
                assert!(Plan::new(&product, best_cut(&product, &room), Finish::Any, &room).is_ok());
            }
            let product = Product { tiles_m: 2, columns: 1280, steps: 180, is_right_constant: true };
            let seven = Cut { width: 160, splits: 7, pair: 1 };
            assert!(Plan::new(&product, seven, Finish::Any, &room).is_err());
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
            let product = Product { tiles_m: 1, columns: 128, steps: 1, is_right_constant: true };
            let plan = Plan::new(&product, Cut { width, splits: 1, pair: 1 }, Finish::Plain, &H200)
                .map(|plan| plan.geometry().shared);
            assert!(matches!(plan, Ok(shared) if shared == bytes && bytes <= 227 * 1024));
        }
    }
}
