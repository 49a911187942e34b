//! Attention on Hopper (`kernels/attention/attention_sm90.cu`).
//!
//! Takes the descriptor of [`attention`](super::attention) where [`supports`] says so: the head dims of diffusion
//! models, half precision, operands that bulk copies can address. Everything else is for the sm_80 kernels.

use bytemuck::{Pod, Zeroable, bytes_of};

use super::super::{CudaError, Element, Geometry, Gpu, Kernel};
use super::attention::Attention;
use crate::driver::{DevicePtr, MapElement, Swizzle, TensorMap, TensorMapDesc};

const OP: &str = "attention";
const MODULE: &str = "attention_sm90";
/// Query rows of a warpgroup, which loads them by itself.
const ROWS: usize = 64;
/// Warpgroups that compute; one more copies.
const CONSUMERS: usize = 2;
const THREADS: usize = 128 * (CONSUMERS + 1);
/// Columns of a panel in shared memory: 128 bytes, the width of the swizzle.
const PANEL: usize = 64;

/// A kernel: the numbers of an instantiation in the kernel file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tile {
    /// Head dim.
    dim: usize,
    /// Key rows of a step.
    keys: usize,
    /// Stages of keys and values.
    stages: usize,
}

const fn tile(dim: usize, keys: usize, stages: usize) -> Tile {
    Tile { dim, keys, stages }
}

const TILES: [Tile; 8] = [
    tile(40, 128, 4),
    tile(64, 128, 4),
    tile(80, 128, 2),
    tile(128, 128, 2),
    tile(160, 96, 2),
    tile(40, 80, 4),
    tile(64, 80, 4),
    tile(80, 80, 2),
];

impl Tile {
    /// Bytes of `Smem` in the kernel file.
    fn shared(&self) -> usize {
        let panels = self.dim.div_ceil(PANEL);
        let barriers = 2 * CONSUMERS + 4 * self.stages;
        (CONSUMERS * ROWS + 2 * self.stages * self.keys) * panels * PANEL * 2 + barriers * 8
    }
}

/// The tile that leaves least of its last step unused.
fn best_tile(head_dim: usize, keys: usize) -> Option<Tile> {
    // What a step costs apart from its keys: barriers, maxima, rescaling.
    const STEP: usize = 32;
    let cost = |t: &Tile| keys.div_ceil(t.keys) * (t.keys + STEP);
    TILES.iter().filter(|t| t.dim == head_dim).copied().min_by_key(cost)
}

/// Whether the kernels take `op`.
pub fn supports(op: &Attention) -> bool {
    refusal(op).is_none()
}

/// Why the kernels do not take `op`.
fn refusal(op: &Attention) -> Option<String> {
    const LIMIT: usize = i32::MAX as usize;
    if op.element == Element::F32 || best_tile(op.head_dim, op.keys).is_none() {
        return Some(format!("no kernel for head dim {} in {:?}", op.head_dim, op.element));
    }
    if [op.q, op.k, op.v, op.out].iter().any(|p| !p.0.is_multiple_of(16)) {
        return Some(format!("operands must begin at multiples of 16 bytes: {op:?}"));
    }
    let width = op.heads.saturating_mul(op.head_dim);
    let pitches = [op.q_pitch, op.k_pitch, op.v_pitch, op.out_pitch];
    if pitches.iter().any(|p| !p.is_multiple_of(8) || *p < width || *p > LIMIT) {
        return Some(format!("pitches {pitches:?} must be multiples of 8, at least {width} and below 2^31"));
    }
    if op.keys == 0 || op.heads == 0 || op.key_batch == 0 || !op.batch.is_multiple_of(op.key_batch) {
        return Some(format!(
            "{} keys, {} heads, {} samples on {}",
            op.keys, op.heads, op.batch, op.key_batch
        ));
    }
    if !(op.scale > 0.0 && op.scale.is_finite()) {
        return Some(format!("the scale must be positive and finite, not {}", op.scale));
    }
    let rows = |n: usize, samples: usize| n.checked_mul(samples).is_some_and(|n| n <= LIMIT / 2);
    let tiles = op.queries.div_ceil(ROWS).checked_mul(op.batch).and_then(|n| n.checked_mul(op.heads));
    if !rows(op.queries, op.batch) || !rows(op.keys, op.key_batch) || tiles.is_none_or(|n| n > LIMIT) {
        return Some(format!("more than 2^30 rows: {op:?}"));
    }
    None
}

/// `AttentionSm90Args` of the kernel file.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Args {
    out: DevicePtr,
    out_pitch: u64,
    queries: i32,
    keys: i32,
    heads: i32,
    sharing: i32,
    row_tiles: i32,
    tiles: i32,
    is_causal: i32,
    scale: f32,
}

/// Queues the attention; [`supports`] must hold and the device be of compute capability 9.0.
pub fn attention(gpu: &Gpu, op: &Attention) -> Result<(), CudaError> {
    gpu.label(|| op.label());
    let unsupported = |reason| CudaError::Unsupported { op: OP, reason };
    if let Some(reason) = refusal(op) {
        return Err(unsupported(reason));
    }
    let Some(tile) = best_tile(op.head_dim, op.keys) else {
        return Err(unsupported(format!("no kernel for head dim {}", op.head_dim)));
    };
    if op.batch == 0 || op.queries == 0 {
        return Ok(());
    }
    let op = &merged(op);
    let row_tiles = op.queries.div_ceil(ROWS * CONSUMERS);
    let tiles = row_tiles * op.heads * op.batch;
    let args = Args {
        out: op.out,
        out_pitch: op.out_pitch as u64,
        queries: op.queries as i32,
        keys: op.keys as i32,
        heads: op.heads as i32,
        sharing: (op.batch / op.key_batch) as i32,
        row_tiles: row_tiles as i32,
        tiles: tiles as i32,
        is_causal: i32::from(op.is_causal),
        scale: op.scale * std::f32::consts::LOG2_E,
    };
    let map = |base, pitch, rows, samples, box_rows| {
        gpu.driver().tensor_map(&rows_of_heads(op, base, pitch, [rows, samples], box_rows))
    };
    let q: TensorMap = map(op.q, op.q_pitch, op.queries, op.batch, ROWS)?;
    let k: TensorMap = map(op.k, op.k_pitch, op.keys, op.key_batch, tile.keys)?;
    let v: TensorMap = map(op.v, op.v_pitch, op.keys, op.key_batch, tile.keys)?;
    let geometry = Geometry {
        shared: tile.shared() as u32,
        ..Geometry::line(tiles.min(gpu.multiprocessors().max(1)), THREADS as u32)
    };
    let rows = ROWS * CONSUMERS;
    let name = format!("attention_sm90_{rows}x{}_d{}_{}", tile.keys, tile.dim, op.element.suffix());
    let params = [bytes_of(&args), bytes_of(&q), bytes_of(&k), bytes_of(&v)];
    gpu.launch(&Kernel { module: MODULE, name: &name }, &geometry, &params)
}

/// Samples that share keys are neighbours: without a mask they are one longer sample, with fewer partial tiles.
fn merged(op: &Attention) -> Attention {
    if op.is_causal {
        return *op;
    }
    Attention { batch: op.key_batch, queries: op.queries * (op.batch / op.key_batch), ..*op }
}

/// The tensor map of `[samples][rows]` rows of heads. Columns of a head are a dimension of their own, so that what a
/// box takes beyond the head reads as zeros and not as the next head.
fn rows_of_heads(
    op: &Attention,
    base: DevicePtr,
    pitch: usize,
    [rows, samples]: [usize; 2],
    box_rows: usize,
) -> TensorMapDesc {
    let element = if op.element == Element::BF16 { MapElement::BF16 } else { MapElement::F16 };
    let bytes = |elements: usize| (elements * op.element.size()) as u64;
    TensorMapDesc {
        base,
        element,
        extents: vec![op.head_dim as u64, op.heads as u64, rows as u64, samples as u64],
        strides: vec![bytes(op.head_dim), bytes(pitch), bytes(pitch * rows)],
        box_extents: vec![PANEL as u32, 1, box_rows as u32, 1],
        swizzle: Swizzle::B128,
        im2col: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn op() -> Attention {
        Attention {
            q: DevicePtr(16),
            k: DevicePtr(32),
            v: DevicePtr(48),
            out: DevicePtr(64),
            q_pitch: 320,
            k_pitch: 320,
            v_pitch: 320,
            out_pitch: 320,
            batch: 4,
            key_batch: 2,
            queries: 4096,
            keys: 77,
            heads: 8,
            head_dim: 40,
            is_causal: false,
            scale: 0.158,
            element: Element::F16,
        }
    }

    #[test]
    fn what_is_supported() {
        assert!(supports(&op()));
        assert!(!supports(&Attention { element: Element::F32, ..op() }));
        assert!(!supports(&Attention { heads: 10, head_dim: 32, ..op() }));
        assert!(!supports(&Attention { k: DevicePtr(24), ..op() }));
        assert!(!supports(&Attention { v_pitch: 324, ..op() }));
        assert!(!supports(&Attention { q_pitch: 312, ..op() }));
        assert!(!supports(&Attention { scale: 0.0, ..op() }));
        assert!(!supports(&Attention { key_batch: 3, ..op() }));
    }

    #[test]
    fn shared_memory_fits_a_block() {
        let shared = TILES.map(|t| t.shared());
        assert!(shared.iter().all(|bytes| *bytes <= 227 * 1024), "{shared:?}");
        assert_eq!(shared[1], 16384 + 4 * 32768 + 20 * 8);
    }

    #[test]
    fn prompts_take_the_narrow_tile() {
        let keys = |dim, keys| best_tile(dim, keys).map(|t| t.keys);
        assert_eq!([77, 154, 231, 1024, 4096].map(|n| keys(40, n)), [80, 80, 128, 128, 128].map(Some));
        assert_eq!([77, 256].map(|n| keys(160, n)), [96, 96].map(Some));
        assert_eq!(keys(48, 77), None);
    }

    #[test]
    fn samples_with_the_same_keys_are_merged_unless_causal() {
        let one = merged(&op());
        assert_eq!((one.batch, one.queries), (2, 8192));
        let causal = merged(&Attention { is_causal: true, ..op() });
        assert_eq!((causal.batch, causal.queries), (4, 4096));
    }

    #[test]
    fn map_ends_at_the_head() {
        let map = rows_of_heads(&op(), DevicePtr(16), 960, [4096, 2], 64);
        assert_eq!(map.extents, [40, 8, 4096, 2]);
        assert_eq!(map.strides, [80, 1920, 1920 * 4096]);
        assert_eq!(map.box_extents, [64, 1, 64, 1]);
    }
}
