//! How much attention every key draws (`kernels/attention/attention_drawn.cu`).

use std::f32::consts::LOG2_E;

use bytemuck::{Pod, Zeroable, bytes_of};

use super::super::{CudaError, Element, Geometry, Gpu, Kernel};
use super::epilogue::Rows;
use crate::driver::DevicePtr;

const OP: &str = "attention_drawn";
const MODULE: &str = "attention_drawn";
const THREADS: u32 = 128;
/// Queries that a block takes at a time.
const ROWS: usize = 8;
/// Most blocks that share the queries of a head.
const MAX_CHUNKS: usize = 64;

/// For every key the sum over queries of its share of attention, averaged over heads.
///
/// Rows of `q` are `[samples][queries]`, of `k` `[samples][keys]`; head `h` has columns `h·head_dim ..`.
#[derive(Clone, Copy, Debug)]
pub struct Drawn {
    /// Queries.
    pub q: Rows,
    /// Keys.
    pub k: Rows,
    /// f32 `[samples, keys]`.
    pub out: DevicePtr,
    /// Samples.
    pub samples: usize,
    /// Query rows of a sample.
    pub queries: usize,
    /// Key rows of a sample.
    pub keys: usize,
    /// Heads.
    pub heads: usize,
    /// Columns of a head.
    pub head_dim: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// Type of queries and keys.
    pub element: Element,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Args {
    q: DevicePtr,
    k: DevicePtr,
    partial: DevicePtr,
    out: DevicePtr,
    q_pitch: i32,
    k_pitch: i32,
    queries: i32,
    keys: i32,
    heads: i32,
    dim: i32,
    chunk: i32,
    chunks: i32,
    is_vector: i32,
    scale_log2: f32,
}

/// Queues the sums of all blocks, and theirs.
pub fn drawn(gpu: &Gpu, op: &Drawn) -> Result<(), CudaError> {
    gpu.label(|| {
        let Drawn { samples, heads, queries, keys, head_dim, .. } = op;
        format!("attention drawn {samples} x {heads} heads, {queries} queries, {keys} keys, d {head_dim}")
    });
    if op.samples * op.keys == 0 {
        return Ok(());
    }
    let shared = (2 * THREADS as usize / 32 + op.head_dim) * ROWS * size_of::<f32>();
    check(op, shared, gpu.shared_memory())?;
    let chunk = op.queries.div_ceil(MAX_CHUNKS).next_multiple_of(ROWS);
    let chunks = op.queries.div_ceil(chunk);
    let bytes = [chunks, op.samples, op.heads, op.keys]
        .iter()
        .try_fold(size_of::<f32>(), |product, &n| product.checked_mul(n))
        .ok_or_else(|| unsupported(format!("{chunks} partial sums of {op:?}")))?;
    let is_vector = op.k.is_vector() && op.head_dim.is_multiple_of(8);
    let args = Args {
        q: op.q.ptr,
        k: op.k.ptr,
        partial: gpu.workspace(bytes)?,
        out: op.out,
        q_pitch: op.q.pitch as i32,
        k_pitch: op.k.pitch as i32,
        queries: op.queries as i32,
        keys: op.keys as i32,
        heads: op.heads as i32,
        dim: op.head_dim as i32,
        chunk: chunk as i32,
        chunks: chunks as i32,
        is_vector: i32::from(is_vector),
        scale_log2: op.scale * LOG2_E,
    };
    let name = format!("attention_drawn_{}", op.element.suffix());
    let grid = [chunks as u32, op.heads as u32, op.samples as u32];
    let geometry = Geometry { grid, threads: THREADS, shared: shared as u32, cluster: 1 };
    gpu.launch(&Kernel { module: MODULE, name: &name }, &geometry, &[bytes_of(&args)])?;
    let grid = [op.keys.div_ceil(THREADS as usize) as u32, op.samples as u32, 1];
    let geometry = Geometry { grid, threads: THREADS, shared: 0, cluster: 1 };
    gpu.launch(&Kernel { module: MODULE, name: "attention_drawn_sum" }, &geometry, &[bytes_of(&args)])
}

fn unsupported(reason: String) -> CudaError {
    CudaError::Unsupported { op: OP, reason }
}

fn check(op: &Drawn, shared: usize, most: usize) -> Result<(), CudaError> {
    if op.queries == 0 || op.heads == 0 || op.head_dim == 0 {
        let Drawn { queries, heads, head_dim, .. } = op;
        return Err(unsupported(format!("{queries} queries, {heads} heads of {head_dim} columns")));
    }
    if shared > most {
        let reason = format!("{} columns a head need {shared} bytes of {most}", op.head_dim);
        return Err(unsupported(reason));
    }
    let width = op.heads.saturating_mul(op.head_dim);
    for (what, pitch) in [("q", op.q.pitch), ("k", op.k.pitch)] {
        if pitch < width || pitch > i32::MAX as usize {
            return Err(unsupported(format!("{what} has a pitch of {pitch}, its rows {width} elements")));
        }
    }
    const LIMIT: usize = 1 << 30;
    if [op.queries, op.keys].iter().any(|n| *n > LIMIT) || [op.heads, op.samples].iter().any(|n| *n > 65_535)
    {
        return Err(unsupported(format!("an extent that is too large: {op:?}")));
    }
    Ok(())
}
