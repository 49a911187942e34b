//! Weights packed once for the tile products.
//!
//! A product's B operand is `[N, K]` in torch's layout. Packed, it is a run of
//! panels of 32 columns (the last one may have 16); a panel is a run of k-steps
//! of 32 values; a k-step is one 1 KiB tile for each 16 columns:
//!
//! ```text
//! panel 0: [step 0: tile 0, tile 1][step 1: …] …   panel 1: …
//! tile: row r = values k = 2r, 2r+1 of columns 0..16, interleaved (VNNI)
//! ```
//!
//! so the kernels stream weights with unit stride. Columns are padded to 16 and
//! values to 32 with zeros. A convolution's values are ordered (channel group,
//! kh, block of 32 input channels, kw, channel): neighbouring steps then read
//! the same pixels shifted by one, which stay in the first-level cache. Groups
//! are up to 40 blocks: the window over one group's channels fits the
//! second-level cache where that over 2,560 channels would not.
//!
//! GEGLU weights pair column j of the first half with column j of the second in
//! one panel, so that one block holds both factors of 16 outputs.

use super::block::{K_STEP, TILE, TILE_BYTES};
use super::memory::AlignedBytes;
use super::{KernelError, convert};
use half::{bf16, f16};
use rayon::prelude::*;

/// Most 32-channel blocks of a channel group.
const GROUP_BLOCKS: usize = 40;

/// Weights as they lie in a file: row-major `[N, K]`, torch's layout.
#[derive(Clone, Copy)]
pub enum Weights<'a> {
    /// 32-bit floats.
    F32(&'a [f32]),
    /// IEEE half precision.
    F16(&'a [f16]),
    /// bfloat16.
    Bf16(&'a [bf16]),
}

impl Weights<'_> {
    fn len(&self) -> usize {
        match self {
            Weights::F32(values) => values.len(),
            Weights::F16(values) => values.len(),
            Weights::Bf16(values) => values.len(),
        }
    }

    /// Rounds `out.len()` values from `start` on to bf16.
    fn read(&self, start: usize, out: &mut [bf16]) {
        let range = start..start + out.len();
        match self {
            Weights::F32(values) => convert::f32_to_bf16(&values[range], out),
            Weights::F16(values) => convert::f16_to_bf16(&values[range], out),
            Weights::Bf16(values) => out.copy_from_slice(&values[range]),
        }
    }
}

/// Shape of a convolution's weights `[cout, cin, height, width]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelShape {
    /// Output channels.
    pub cout: usize,
    /// Input channels, both inputs of a concatenation together.
    pub cin: usize,
    /// Window rows.
    pub height: usize,
    /// Window columns.
    pub width: usize,
}

/// The B operand of a product, packed to tiles.
pub struct PackedB {
    bytes: AlignedBytes,
    shape: KernelShape,
    is_paired: bool,
    column_tiles: usize,
    k_steps: usize,
    group_blocks: usize,
}

impl PackedB {
    /// Packs a linear layer's `[n, k]` weights.
    ///
    /// # Errors
    ///
    /// If the number of weights is not `n · k` or is zero.
    pub fn linear(weights: Weights, n: usize, k: usize) -> Result<PackedB, KernelError> {
        PackedB::conv(weights, KernelShape { cout: n, cin: k, height: 1, width: 1 })
    }

    /// Packs `[2h, k]` weights whose two halves meet in a GEGLU epilogue.
    ///
    /// # Errors
    ///
    /// As [`PackedB::linear`], or if `n` is odd.
    pub fn geglu(weights: Weights, n: usize, k: usize) -> Result<PackedB, KernelError> {
        if !n.is_multiple_of(2) {
            return Err(KernelError::OddGeglu { rows: n });
        }
        PackedB::pack(weights, KernelShape { cout: n, cin: k, height: 1, width: 1 }, true)
    }

    /// Packs a convolution's `[cout, cin, kh, kw]` weights.
    ///
    /// # Errors
    ///
    /// If the number of weights does not match the shape or is zero.
    pub fn conv(weights: Weights, shape: KernelShape) -> Result<PackedB, KernelError> {
        PackedB::pack(weights, shape, false)
    }

    fn pack(weights: Weights, shape: KernelShape, is_paired: bool) -> Result<PackedB, KernelError> {
        let expected = shape.cout * shape.cin * shape.height * shape.width;
        if expected == 0 || weights.len() != expected {
            return Err(KernelError::Weights { shape, found: weights.len() });
        }
        let column_tiles =
            if is_paired { 2 * (shape.cout / 2).div_ceil(TILE) } else { shape.cout.div_ceil(TILE) };
        let blocks = shape.cin.div_ceil(K_STEP);
        let k_steps = shape.height * shape.width * blocks;
        let group_blocks = blocks.div_ceil(blocks.div_ceil(GROUP_BLOCKS));
        let bytes = AlignedBytes::zeroed(column_tiles * k_steps * TILE_BYTES);
        let mut packed = PackedB { bytes, shape, is_paired, column_tiles, k_steps, group_blocks };
        let panel_values = 2 * k_steps * TILE_BYTES / size_of::<bf16>();
        let values = packed.column_tiles * k_steps * TILE_BYTES / size_of::<bf16>();
        let all = &mut packed.bytes.as_mut_slice::<bf16>()[..values];
        all.par_chunks_mut(panel_values).enumerate().for_each(|(panel, out)| {
            for tile in 0..out.len() / (panel_values / 2) {
                let (first, end) = source_rows(&shape, is_paired, 2 * panel + tile);
                let slot = TileSlot { out, tile, panel_values, group_blocks };
                pack_column_tile(&weights, &shape, first..end, slot);
            }
        });
        Ok(packed)
    }

    /// Columns that a product writes: N, or half of it for GEGLU weights.
    pub fn columns(&self) -> usize {
        if self.is_paired { self.shape.cout / 2 } else { self.shape.cout }
    }

    /// Length of the product's sum, without padding.
    pub fn depth(&self) -> usize {
        self.shape.cin * self.shape.height * self.shape.width
    }

    /// The weights' shape (a linear layer is a 1 × 1 window).
    pub fn shape(&self) -> KernelShape {
        self.shape
    }

    /// Whether the columns are paired for GEGLU.
    pub fn is_geglu(&self) -> bool {
        self.is_paired
    }

    /// Bytes held.
    pub fn size_bytes(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn k_steps(&self) -> usize {
        self.k_steps
    }

    /// 32-channel blocks of a channel group (the last group may have fewer).
    pub(super) fn group_blocks(&self) -> usize {
        self.group_blocks
    }

    pub(super) fn panels(&self) -> usize {
        self.column_tiles.div_ceil(2)
    }

    /// Column tiles of a panel: 2, or 1 for an odd last one.
    pub(super) fn tiles_in(&self, panel: usize) -> usize {
        (self.column_tiles - 2 * panel).min(2)
    }

    /// The first output column of a panel, and how many it writes.
    pub(super) fn columns_in(&self, panel: usize) -> (usize, usize) {
        let width = if self.is_paired { TILE } else { 2 * TILE };
        let first = panel * width;
        (first, (self.columns() - first).min(width))
    }

    /// A panel's tiles from k-step `step` on.
    pub(super) fn tiles_at(&self, panel: usize, step: usize) -> &[u8] {
        let start = (2 * panel * self.k_steps + step * self.tiles_in(panel)) * TILE_BYTES;
        &self.bytes.as_slice::<u8>()[start..]
    }
}

/// Weight rows (output channels) that a column tile holds.
fn source_rows(shape: &KernelShape, is_paired: bool, tile: usize) -> (usize, usize) {
    if !is_paired {
        return (tile * TILE, ((tile + 1) * TILE).min(shape.cout));
    }
    let half = shape.cout / 2;
    let first = tile / 2 * TILE;
    let end = (first + TILE).min(half);
    if tile.is_multiple_of(2) { (first, end) } else { (half + first, half + end) }
}

/// Where one column tile of a panel goes.
struct TileSlot<'a> {
    out: &'a mut [bf16],
    tile: usize,
    panel_values: usize,
    group_blocks: usize,
}

/// Packs up to 16 weight rows over all k-steps.
fn pack_column_tile(weights: &Weights, shape: &KernelShape, rows: std::ops::Range<usize>, slot: TileSlot) {
    const MAX_TAPS: usize = 9;
    let taps = shape.height * shape.width;
    let tile_values = TILE_BYTES / size_of::<bf16>();
    let step_values = if slot.out.len() == slot.panel_values { 2 * tile_values } else { tile_values };
    let channel_blocks = shape.cin.div_ceil(K_STEP);
    let mut row = vec![bf16::ZERO; K_STEP * taps];
    // One 16 × 32 stage for each tap; taps beyond nine go round by round.
    let mut stage = vec![bf16::ZERO; taps.min(MAX_TAPS) * tile_values];
    for block in 0..channel_blocks {
        let channels = (shape.cin - block * K_STEP).min(K_STEP);
        for first_tap in (0..taps).step_by(MAX_TAPS) {
            let round = (taps - first_tap).min(MAX_TAPS);
            stage.fill(bf16::ZERO);
            for (r, n) in rows.clone().enumerate() {
                let start = (n * shape.cin + block * K_STEP) * taps;
                weights.read(start, &mut row[..channels * taps]);
                for tap in 0..round {
                    let to = &mut stage[tap * tile_values + r * K_STEP..][..channels];
                    let from = row[first_tap + tap..].iter().step_by(taps);
                    to.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
                }
            }
            for tap in 0..round {
                let (y, x) = ((first_tap + tap) / shape.width, (first_tap + tap) % shape.width);
                let group = block / slot.group_blocks;
                let first = group * slot.group_blocks;
                let blocks = slot.group_blocks.min(channel_blocks - first);
                let step = first * taps + (y * blocks + block - first) * shape.width + x;
                let to = &mut slot.out[step * step_values + slot.tile * tile_values..][..tile_values];
                interleave_pairs(&stage[tap * tile_values..][..tile_values], to);
            }
        }
    }
}

/// 16 rows of 32 values → 16 k-pairs of 16 columns: a transpose of 32-bit pairs.
pub(super) fn interleave_pairs(rows: &[bf16], tile: &mut [bf16]) {
    let rows: &[[[bf16; 2]; TILE]] = bytemuck::cast_slice(rows);
    let tile: &mut [[[bf16; 2]; TILE]] = bytemuck::cast_slice_mut(tile);
    for (pair, out) in tile.iter_mut().enumerate() {
        for (to, row) in out.iter_mut().zip(rows) {
            *to = row[pair];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conv_weights_land_where_the_layout_says() {
        let shape = KernelShape { cout: 20, cin: 35, height: 2, width: 3 };
        let value = |n: usize, c: usize, y: usize, x: usize| (n * 7 + c * 3 + y * 2 + x) as f32 % 200.0;
        let mut weights = Vec::new();
        for n in 0..20 {
            for c in 0..35 {
                for tap in 0..6 {
                    weights.push(value(n, c, tap / 3, tap % 3));
                }
            }
        }
        let packed = PackedB::conv(Weights::F32(&weights), shape).unwrap();
        assert_eq!((packed.k_steps(), packed.panels(), packed.tiles_in(0)), (12, 1, 2));
        let all: &[bf16] = packed.bytes.as_slice();
        for (step, tile, pair, column, half) in
            [(0, 0, 0, 0, 0), (4, 0, 0, 3, 1), (11, 1, 1, 3, 0), (7, 1, 0, 0, 1)]
        {
            let (y, block, x) = (step / 6, step / 3 % 2, step % 3);
            let (n, c) = (tile * 16 + column, block * 32 + pair * 2 + half);
            let at = (step * 2 + tile) * 512 + pair * 32 + column * 2 + half;
            assert_eq!(all[at].to_f32(), value(n, c, y, x), "step {step} tile {tile}");
        }
        // Channel 35 and column 20 are padding.
        assert_eq!(all[(3 * 2) * 512 + 32 + 1], bf16::ZERO);
        assert_eq!(all[512 + 4 * 2], bf16::ZERO);
    }

    #[test]
    fn wrong_weight_count_is_an_error() {
        let error = PackedB::linear(Weights::F32(&[0.0; 7]), 2, 4).err().unwrap();
        assert!(error.to_string().contains("[2, 4, 1, 1]"), "{error}");
    }
}
