//! What the two sm_90a product kernels share (`kernels/include/hopper_tile.cuh`): how a product is cut into
//! tiles, and the tensor maps of its operands.

use bytemuck::{Pod, Zeroable};

use super::super::{CudaError, Element, Gpu};
use crate::driver::{DevicePtr, MapElement, Swizzle, TensorMap, TensorMapDesc};

/// Rows of a tile.
pub(super) const ROWS: usize = 128;
/// Depth of a step along K, in elements.
pub(super) const DEPTH: usize = 64;
/// Threads of a block: a producer warpgroup and two consumers.
pub(super) const THREADS: u32 = 384;
/// Columns of the tiles that there are kernels for.
const WIDTHS: [usize; 3] = [128, 160, 256];
/// Bytes a cycle that a multiprocessor gets from the L2 cache while all of them ask.
const L2_BYTES_PER_CYCLE: usize = 30;
/// Cycles to write a tile out, a column of it each.
const CYCLES_PER_COLUMN: usize = 10;
/// Cycles of one more launch, for the sum of a split product.
const CYCLES_OF_LAUNCH: usize = 4000;

/// `HopperTiles` of `hopper_tile.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub(super) struct Tiles {
    pub steps: i32,
    pub tiles_m: i32,
    pub tiles_n: i32,
    pub band: i32,
    pub splits: i32,
}

/// How a product is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// Columns of a tile.
    pub width: usize,
    /// Parts of K.
    pub splits: usize,
    /// Blocks.
    pub blocks: usize,
    /// For the kernel.
    pub tiles: Tiles,
}

impl Plan {
    /// Bytes of dynamic shared memory: `sizeof(hopper::Smem)`.
    pub fn shared(&self) -> u32 {
        let stages = if self.width > 160 { 4 } else { 6 };
        let bytes = stages * ((ROWS + self.width) * DEPTH * 2 + 16);
        bytes.next_multiple_of(1024) as u32
    }
}

/// Plans a product of `tiles_m` tile rows and `columns` columns over `steps` steps of K.
///
/// Estimates every width and split in cycles and takes the least: a step costs what the tensor cores need for it or what the
/// L2 cache needs to deliver it, tiles come in waves of as many as there are multiprocessors, and a split product writes and
/// reads its partial sums and launches once more.
pub(super) fn plan(tiles_m: usize, columns: usize, steps: usize, multiprocessors: usize) -> Plan {
    let mut best: Option<(usize, Plan)> = None;
    for width in WIDTHS {
        let tiles_n = columns.div_ceil(width);
        let tiles = tiles_m * tiles_n;
        // 4096 floating-point operations a cycle and multiprocessor.
        let arithmetic = ROWS * width * DEPTH * 2 / 4096;
        let step = arithmetic.max((ROWS + width) * DEPTH * 2 / L2_BYTES_PER_CYCLE);
        for splits in 1..=(steps / 4).clamp(1, 16) {
            let waves = (tiles * splits).div_ceil(multiprocessors);
            let mut cycles = waves * (steps.div_ceil(splits) * step + width * CYCLES_PER_COLUMN);
            if splits > 1 {
                let partial = tiles * ROWS * width * 4 * splits;
                cycles += CYCLES_OF_LAUNCH + 2 * partial / (L2_BYTES_PER_CYCLE * multiprocessors);
            }
            if best.is_some_and(|(least, _)| least <= cycles) {
                continue;
            }
            let tiles = Tiles {
                steps: steps as i32,
                tiles_m: tiles_m as i32,
                tiles_n: tiles_n as i32,
                band: band(tiles_m, width, multiprocessors) as i32,
                splits: splits as i32,
            };
            let blocks = (tiles_m * tiles_n * splits).min(multiprocessors);
            best = Some((cycles, Plan { width, splits, blocks, tiles }));
        }
    }
    best.map(|(_, plan)| plan).unwrap_or(Plan {
        width: WIDTHS[0],
        splits: 1,
        blocks: 0,
        tiles: Tiles { steps: 0, tiles_m: 0, tiles_n: 0, band: 1, splits: 1 },
    })
}

/// Tile rows to walk together: the tiles under way at one time then cover about a square of the product, which needs the
/// fewest different rows of both operands.
fn band(tiles_m: usize, width: usize, multiprocessors: usize) -> usize {
    let square = (multiprocessors * width) as f64 / ROWS as f64;
    (square.sqrt().round() as usize).clamp(1, tiles_m.max(1))
}

/// Element type of a tensor map; only half-sized ones have kernels here.
pub(super) fn map_element(element: Element) -> MapElement {
    match element {
        Element::F16 => MapElement::F16,
        Element::BF16 => MapElement::BF16,
        Element::F32 => MapElement::F32,
    }
}

/// A matrix in memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Matrix {
    pub base: DevicePtr,
    pub columns: usize,
    pub rows: usize,
    /// Elements from one row to the next.
    pub pitch: usize,
}

/// Map of boxes of `box_rows` rows by one step of a matrix.
pub(super) fn matrix_map(
    gpu: &Gpu,
    matrix: &Matrix,
    box_rows: usize,
    element: Element,
) -> Result<TensorMap, CudaError> {
    Ok(gpu.driver().tensor_map(&TensorMapDesc {
        base: matrix.base,
        element: map_element(element),
        extents: vec![matrix.columns as u64, matrix.rows as u64],
        strides: vec![(matrix.pitch * element.size()) as u64],
        box_extents: vec![DEPTH as u32, box_rows as u32],
        swizzle: Swizzle::B128,
        im2col: None,
    })?)
}

/// Whether copies in pieces of 16 bytes can take this address and these element counts.
pub(super) fn in_vectors(ptr: DevicePtr, counts: &[usize]) -> bool {
    ptr.0.is_multiple_of(16) && counts.iter().all(|count| count.is_multiple_of(8))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widths_of_the_unets_fill_the_machine() {
        // SDXL 2048 x 1280: 16 x 8 tiles of 160 on 132 multiprocessors, nothing to split.
        let sdxl = plan(16, 1280, 20, 132);
        assert_eq!((sdxl.width, sdxl.splits, sdxl.blocks), (160, 1, 128));
        // Feed-forward 2048 x 10240: five waves of wide tiles.
        assert_eq!((plan(16, 10240, 20, 132).width, plan(16, 10240, 20, 132).splits), (256, 1));
        // SD1.5 512 x 1280 over K = 11520: 32 tiles alone would leave three quarters idle.
        let deep = plan(4, 1280, 180, 132);
        assert_eq!((deep.width, deep.splits, deep.blocks), (160, 4, 128));
    }

    #[test]
    fn splits_leave_every_part_some_steps() {
        for steps in 1..40 {
            let plan = plan(1, 128, steps, 132);
            assert!(plan.splits <= steps.div_ceil(4), "{steps} steps in {} parts", plan.splits);
        }
    }

    #[test]
    fn shared_memory_fits() {
        for (width, bytes) in [(128, 197_632), (160, 222_208), (256, 197_632)] {
            let plan = Plan { width, ..plan(1, 128, 1, 1) };
            assert_eq!(plan.shared(), bytes);
            assert!(bytes <= 227 * 1024);
        }
    }
}
