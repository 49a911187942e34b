//! Which tile a product is cut into and over how many blocks its K is split.
//!
//! A pure function of the shape and the number of multiprocessors. It estimates
//! every choice in cycles: a multiprocessor takes one block after the other (two
//! blocks at a time share its tensor cores, which comes to the same), so the
//! longest queue decides. A block costs its K steps, each the slowest of the
//! tensor cores, shared memory and L2, and a filling and draining of the
//! pipeline; a split costs the sums it writes and a second kernel.

use crate::driver::Capability;

/// Tile of the kernels in `gemm_sm80.cu` and `conv_sm80.cu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Tile {
    /// 128 rows, 160 columns.
    T128x160,
    /// 128 rows, 128 columns.
    T128x128,
    /// 128 rows, 80 columns.
    T128x80,
    /// 64 rows, 64 columns.
    T64x64,
    /// 64 rows, 64 columns, operands of any alignment.
    Any,
}

/// What a tile is made of.
#[derive(Clone, Copy, Debug)]
pub struct TileShape {
    /// Rows.
    pub m: usize,
    /// Columns.
    pub n: usize,
    /// Elements of K in a stage.
    pub k: usize,
    /// Columns of one of the four warps.
    pub warp_n: usize,
    /// Name in kernel names.
    pub name: &'static str,
    /// Cycles of 32 elements of K on one multiprocessor of sm_80: the largest of tensor cores
    /// (1024 multiply-adds a cycle), shared memory (128 bytes) and L2 (40 bytes).
    cycles: f64,
}

impl Tile {
    /// All that take aligned operands.
    pub const ALIGNED: [Self; 4] = [Self::T128x160, Self::T128x128, Self::T128x80, Self::T64x64];

    /// What it is made of.
    pub fn shape(self) -> TileShape {
        let (m, n, k, warp_n, cycles, name) = match self {
            Self::T128x160 => (128, 160, 32, 80, 640.0, "128x160"),
            Self::T128x128 => (128, 128, 32, 64, 512.0, "128x128"),
            Self::T128x80 => (128, 80, 32, 80, 333.0, "128x80"),
            Self::T64x64 => (64, 64, 64, 32, 205.0, "64x64"),
            Self::Any => (64, 64, 64, 32, 1000.0, "any"),
        };
        TileShape { m, n, k, warp_n, name, cycles }
    }

    /// Dynamic shared memory of a block in bytes, without what a convolution adds: `sizeof(tile::Smem)`, in which the ring
    /// of stages is followed, in the same place, by the turning of the warps' sums and the residual.
    pub fn shared_bytes(self, capability: Capability) -> usize {
        let TileShape { m, n, k, warp_n, .. } = self.shape();
        let stages = if capability.major < 8 { 3 } else { 4 };
        let ring = stages * (m + n) * k * 2;
        let turn = WARPS * 16 * (warp_n + 8) * 4 + m * n * 2;
        ring.max(turn).next_multiple_of(128)
    }
}

/// Warps of a block.
const WARPS: usize = THREADS as usize / 32;
/// Threads of a block, whatever the tile.
pub const THREADS: u32 = 128;
/// Most splits of K.
const MAX_SPLITS: usize = 16;
/// Fewest elements of K that a split is worth.
const MIN_SPLIT_K: usize = 128;
/// Cycles until a block's first tile has landed.
const FILL: f64 = 1000.0;
/// Elements of a tile that a block's epilogue stores in a cycle.
const STORE_RATE: f64 = 16.0;
/// Cycles between a kernel and the next, and bytes that a multiprocessor reads of partial sums in a cycle.
const SECOND_KERNEL: f64 = 2500.0;
const PARTIAL_RATE: f64 = 30.0;
/// A block alone on its multiprocessor has nobody to work while it waits.
const ALONE: f64 = 1.08;

/// Shape of a product: `m` x `n` over `k`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Problem {
    /// Rows.
    pub m: usize,
    /// Columns.
    pub n: usize,
    /// Length of the sums.
    pub k: usize,
}

/// How a product is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Plan {
    /// Tile.
    pub tile: Tile,
    /// Blocks that share one tile's K; none of them is without work.
    pub splits: usize,
}

impl Plan {
    /// `tile` with K in about `splits` parts, as many as have work.
    pub fn new(problem: &Problem, tile: Tile, splits: usize) -> Self {
        let k_tiles = problem.k.div_ceil(tile.shape().k).max(1);
        Self { tile, splits: k_tiles.div_ceil(k_tiles.div_ceil(splits.max(1))) }
    }

    /// Tiles along M and N.
    pub fn tiles(&self, problem: &Problem) -> (usize, usize) {
        let shape = self.tile.shape();
        (problem.m.div_ceil(shape.m), problem.n.div_ceil(shape.n))
    }

    /// Tiles of K of one split (the last may have fewer).
    pub fn k_tiles_per_split(&self, problem: &Problem) -> usize {
        problem.k.div_ceil(self.tile.shape().k).max(1).div_ceil(self.splits)
    }

    /// Bytes of the splits' sums.
    pub fn partial_bytes(&self, problem: &Problem) -> usize {
        if self.splits == 1 { 0 } else { self.splits * problem.m * problem.n.next_multiple_of(8) * 4 }
    }

    /// Cycles it takes by the model.
    fn cycles(&self, problem: &Problem, multiprocessors: usize) -> f64 {
        let shape = self.tile.shape();
        let (tiles_m, tiles_n) = self.tiles(problem);
        let queue = (tiles_m * tiles_n * self.splits).div_ceil(multiprocessors) as f64;
        let steps = (self.k_tiles_per_split(problem) * shape.k) as f64 / 32.0;
        let alone = if queue == 1.0 { ALONE } else { 1.0 };
        let block = steps * shape.cycles * alone + FILL + (shape.m * shape.n) as f64 / STORE_RATE;
        let second = if self.splits == 1 {
            0.0
        } else {
            SECOND_KERNEL + self.partial_bytes(problem) as f64 / (multiprocessors as f64 * PARTIAL_RATE)
        };
        queue * block + second
    }
}

/// The fastest plan by the model; `is_aligned` if the operands have 16-byte vectors.
pub fn plan(problem: &Problem, multiprocessors: usize, is_aligned: bool) -> Plan {
    let tiles: &[Tile] = if is_aligned { &Tile::ALIGNED } else { &[Tile::Any] };
    let most = (problem.k / MIN_SPLIT_K).clamp(1, MAX_SPLITS);
    let mut best = Plan::new(problem, tiles[0], 1);
    let mut least = f64::INFINITY;
    for tile in tiles {
        for splits in 1..=most {
            let plan = Plan::new(problem, *tile, splits);
            let cycles = plan.cycles(problem, multiprocessors.max(1));
            if cycles < least {
                (best, least) = (plan, cycles);
            }
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Matrix operators of SD1.5's UNet at 512², cfg pair: calls, M, N, K.
    const SD15: [(usize, usize, usize, usize); 49] = [
        (7, 512, 1280, 11520),
        (7, 8192, 320, 2880),
        (6, 2048, 640, 5760),
        (5, 8192, 2560, 320),
        (5, 512, 10240, 1280),
        (5, 2048, 5120, 640),
        (2, 512, 1280, 23040),
        (1, 2048, 1280, 11520),
        (2, 8192, 320, 5760),
        (1, 8192, 640, 5760),
        (30, 8192, 320, 320),
        (30, 2048, 640, 640),
        (30, 512, 1280, 1280),
        (1, 2048, 640, 17280),
        (1, 8192, 320, 8640),
        (11, 128, 1280, 11520),
        (5, 8192, 320, 1280),
        (5, 512, 1280, 5120),
        (5, 2048, 640, 2560),
        (1, 2048, 640, 11520),
        (3, 128, 1280, 23040),
        (1, 512, 1280, 17280),
        (1, 2048, 640, 8640),
        (10, 8192, 320, 320),
        (10, 2048, 640, 640),
        (10, 512, 1280, 1280),
        (1, 512, 1280, 5760),
        (1, 2048, 640, 2880),
        (2, 8192, 320, 640),
        (2, 512, 1280, 2560),
        (1, 8192, 320, 960),
        (1, 2048, 640, 1920),
        (1, 128, 1280, 11520),
        (1, 512, 640, 5760),
        (1, 2048, 320, 2880),
        (12, 154, 1280, 768),
        (1, 128, 10240, 1280),
        (1, 2048, 640, 1280),
        (6, 128, 1280, 1280),
        (3, 128, 1280, 2560),
        (1, 512, 1280, 1920),
        (1, 2048, 640, 960),
        (1, 128, 1280, 5120),
        (10, 154, 640, 768),
        (2, 128, 1280, 1280),
        (1, 2048, 640, 320),
        (1, 512, 1280, 640),
        (10, 154, 320, 768),
        (1, 8192, 4, 2880),
    ];

    /// Microseconds at 790 TFLOP/s and 4.3 TB/s: of the operator itself, of the plan's waves of whole tiles, and
    /// of the traffic of its partial sums.
    fn floor_and_waves(problem: &Problem, sms: usize) -> [f64; 3] {
        let Problem { m, n, k } = *problem;
        let bytes = (m * k + n * k + m * n) as f64 * 2.0 / 4.3e6;
        let plan = plan(problem, sms, true);
        let shape = plan.tile.shape();
        let (tiles_m, tiles_n) = plan.tiles(problem);
        let waves = (tiles_m * tiles_n * plan.splits).div_ceil(sms) * sms;
        let flop = (shape.m * shape.n * plan.k_tiles_per_split(problem) * shape.k * 2 * waves) as f64;
        let partial = 2.0 * plan.partial_bytes(problem) as f64 / 4.3e6;
        [(2.0 * (m * n * k) as f64 / 790e6).max(bytes), (flop / 790e6).max(bytes), partial]
    }

    #[test]
    fn sd15_at_batch_one_fills_four_fifths_of_132_multiprocessors() {
        let (mut floor, mut filled, mut waves, mut unsplit) = (0.0, 0.0, 0.0, 0.0);
        for (calls, m, n, k) in SD15 {
            let problem = Problem { m, n, k };
            let [least, whole, partial] = floor_and_waves(&problem, 132);
            floor += calls as f64 * least;
            filled += calls as f64 * whole;
            waves += calls as f64 * (whole + partial);
            let tiles = m.div_ceil(128) * n.div_ceil(128);
            unsplit += calls as f64 * (tiles.div_ceil(132) * 132 * 128 * 128 * k * 2) as f64 / 790e6;
        }
        // 1.8 ms are the floor; whole tiles of 128x128 without splits would fill half of the machine. Partial
        // sums count as if they went through memory, though most of them stay in L2.
        assert!((1700.0..1900.0).contains(&floor), "floor {floor} us");
        assert!(floor / filled >= 0.95, "{floor} of {filled} us");
        assert!(floor / waves >= 0.82, "{floor} of {waves} us");
        assert!(floor / unsplit < 0.65, "{floor} of {unsplit} us");
    }

    /// Gemms and convolutions: what a convolution adds is 16 bytes a row.
    #[test]
    fn every_tile_fits_every_device() {
        for (major, minor) in
            [(7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)]
        {
            let capability = Capability { major, minor };
            for tile in Tile::ALIGNED.into_iter().chain([Tile::Any]) {
                let bytes = tile.shared_bytes(capability) + tile.shape().m * 16;
                let most = capability.shared_memory() as usize;
                assert!(bytes <= most, "{tile:?}: {bytes} of {most} on {capability}");
            }
        }
        let of = |major| Tile::T128x160.shared_bytes(Capability { major, minor: 0 });
        assert_eq!((of(7), of(8)), (63_488, 73_728));
    }

    #[test]
    fn every_split_has_work_and_all_of_k_is_covered() {
        for (_, m, n, k) in
            SD15.into_iter().chain([(1, 2, 1280, 1280), (1, 77, 768, 3072), (1, 1, 1, 1), (1, 5, 9, 129)])
        {
            let problem = Problem { m, n, k };
            for sms in [1, 8, 46, 108, 132, 148] {
                for is_aligned in [true, false] {
                    let plan = plan(&problem, sms, is_aligned);
                    let (k_tiles, per) = (k.div_ceil(plan.tile.shape().k), plan.k_tiles_per_split(&problem));
                    assert!(
                        (plan.splits - 1) * per < k_tiles && k_tiles <= plan.splits * per,
                        "{problem:?} {plan:?}"
                    );
                    assert!(plan.splits <= MAX_SPLITS);
                    assert_eq!(plan.tile == Tile::Any, !is_aligned);
                }
            }
        }
    }

    #[test]
    fn large_products_are_not_split_and_small_ones_are() {
        let of = |m, n, k| plan(&Problem { m, n, k }, 132, true);
        assert_eq!(of(8192, 5120, 640).splits, 1);
        assert_eq!(of(262_144, 128, 1152), Plan { tile: Tile::T128x128, splits: 1 });
        assert_eq!(of(8192, 5120, 320).tile, Tile::T128x160);
        assert_eq!(of(8192, 320, 2880).splits, 1);
        assert!(of(128, 1280, 11520).splits >= 6);
        assert_eq!(of(2048, 640, 5760), Plan { tile: Tile::T128x80, splits: 1 });
        assert!(of(512, 1280, 11520).splits >= 4);
    }
}
