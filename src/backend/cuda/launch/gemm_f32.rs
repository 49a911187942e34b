//! Linear layers in f32 (`kernels/gemm/gemm_f32.cu`), and the plan of products in f32 that convolutions share.

use bytemuck::bytes_of;

use super::super::{CudaError, Element, Geometry, Gpu, Kernel};
use super::epilogue::int;
use super::gemm::{Gemm, arguments, sum_splits};
use super::plan::Problem;
use crate::driver::DevicePtr;

const OP: &str = "gemm";
/// Elements of K in a tile.
const TILE_K: usize = 16;
/// Fewest tiles of K that a split is worth.
const MIN_SPLIT: usize = 16;
/// Most splits of K.
const MAX_SPLITS: usize = 16;

/// Tile of the kernels in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tile {
    /// 128 rows and columns.
    T128x128,
    /// 64 rows and columns.
    T64x64,
    /// 64 rows and columns, operands of any alignment.
    Any,
}

impl Tile {
    fn side(self) -> usize {
        if self == Self::T128x128 { 128 } else { 64 }
    }

    /// Name in kernel names.
    pub fn name(self) -> &'static str {
        match self {
            Self::T128x128 => "128x128",
            Self::T64x64 => "64x64",
            Self::Any => "any",
        }
    }

    /// Two slabs of both operands, whose rows are longer than the tile so that banks differ.
    fn shared(self) -> usize {
        2 * TILE_K * (2 * self.side() + 12) * size_of::<f32>()
    }
}

/// How a product in f32 is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Tile.
    pub tile: Tile,
    /// Blocks that share one tile's K; none of them is without work.
    pub splits: usize,
}

/// Large tiles where they fill the device, small ones elsewhere, with K split while multiprocessors are idle.
pub fn plan(problem: &Problem, multiprocessors: usize, is_aligned: bool) -> Plan {
    let tiles = |tile: Tile| problem.m.div_ceil(tile.side()) * problem.n.div_ceil(tile.side());
    let tile = match is_aligned {
        true if tiles(Tile::T128x128) >= multiprocessors => Tile::T128x128,
        true => Tile::T64x64,
        false => Tile::Any,
    };
    let k_tiles = problem.k.div_ceil(TILE_K).max(1);
    let wanted = (2 * multiprocessors / tiles(tile).max(1)).clamp(1, MAX_SPLITS);
    let splits = wanted.min((k_tiles / MIN_SPLIT).max(1));
    Plan { tile, splits: k_tiles.div_ceil(k_tiles.div_ceil(splits)) }
}

impl Plan {
    /// Tiles along M and N.
    pub fn tiles(&self, problem: &Problem) -> (usize, usize) {
        (problem.m.div_ceil(self.tile.side()), problem.n.div_ceil(self.tile.side()))
    }

    /// Tiles of K of one split (the last may have fewer).
    pub fn k_tiles_per_split(&self, problem: &Problem) -> usize {
        problem.k.div_ceil(TILE_K).max(1).div_ceil(self.splits)
    }

    /// Where the splits' sums wait; null if there are none.
    pub fn partial(&self, gpu: &Gpu, problem: &Problem) -> Result<DevicePtr, CudaError> {
        match self.splits {
            1 => Ok(DevicePtr::NULL),
            splits => gpu.workspace(splits * problem.m * problem.n.next_multiple_of(8) * size_of::<f32>()),
        }
    }

    /// The launch of a product.
    pub fn geometry(&self, op: &'static str, problem: &Problem) -> Result<Geometry, CudaError> {
        let (tiles_m, tiles_n) = self.tiles(problem);
        Ok(Geometry {
            grid: [int(op, "tiles", tiles_m * tiles_n)? as u32, self.splits as u32, 1],
            threads: 2 * self.tile.side() as u32,
            shared: self.tile.shared() as u32,
            cluster: 1,
        })
    }
}

/// Queues `op`, whose element is f32.
pub fn gemm(gpu: &Gpu, op: &Gemm) -> Result<(), CudaError> {
    gpu.label(|| op.label());
    let problem = op.problem();
    if problem.m == 0 || problem.n == 0 {
        return Ok(());
    }
    let plan = plan(&problem, gpu.multiprocessors(), op.is_aligned());
    let mut args = arguments(op)?;
    let (tiles_m, tiles_n) = plan.tiles(&problem);
    args.tiles_m = int(OP, "tiles", tiles_m)?;
    args.tiles_n = int(OP, "tiles", tiles_n)?;
    args.k_tiles_per_split = int(OP, "tiles of K", plan.k_tiles_per_split(&problem))?;
    args.epilogue.partial = plan.partial(gpu, &problem)?;
    let name = format!("gemm_f32_{}", plan.tile.name());
    let geometry = plan.geometry(OP, &problem)?;
    gpu.launch(&Kernel { module: "gemm_f32", name: &name }, &geometry, &[bytes_of(&args)])?;
    sum_splits(gpu, Element::F32, &args.epilogue, &op.epilogue, plan.splits, &problem)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_products_split_k_and_large_ones_do_not() {
        let at = |m, n, k| plan(&Problem { m, n, k }, 132, true);
        assert_eq!(at(8192, 2560, 320), Plan { tile: Tile::T128x128, splits: 1 });
        assert_eq!(at(128, 1280, 11520), Plan { tile: Tile::T64x64, splits: 6 });
        assert_eq!(at(2, 1280, 320).splits, 1);
        assert_eq!(plan(&Problem { m: 8192, n: 320, k: 36 }, 132, false).tile, Tile::Any);
    }

    #[test]
    fn every_split_has_work_and_all_of_k_is_covered() {
        for (m, n, k) in [(128, 1280, 11520), (1, 1, 1), (5, 9, 1000), (77, 768, 3072), (64, 64, 272)] {
            let problem = Problem { m, n, k };
            for multiprocessors in [1, 8, 46, 132] {
                let plan = plan(&problem, multiprocessors, true);
                let (k_tiles, per) = (k.div_ceil(TILE_K), plan.k_tiles_per_split(&problem));
                assert!((plan.splits - 1) * per < k_tiles && k_tiles <= plan.splits * per, "{plan:?}");
            }
        }
    }
}
