//! Embeddings of tokens and timesteps (`kernels/embed/embed.cu`).

use bytemuck::{Pod, Zeroable, bytes_of};

use super::super::{CudaError, Element, Geometry, Gpu, Kernel};
use crate::driver::DevicePtr;

const MODULE: &str = "embed";
const THREADS: u32 = 256;
const VECTOR: usize = 8;

/// `out[t] = table[ids[t]] + positions[t mod seq]`.
///
/// An id outside its table gives NaN; whoever makes the ids checks them.
#[derive(Clone, Copy, Debug)]
pub struct Embed {
    /// Token table `[rows, width]`.
    pub table: DevicePtr,
    /// Position table, at least `[seq, width]`.
    pub positions: DevicePtr,
    /// i32 `[tokens]`: a row of `table`, or −1−j for row j of `vectors`.
    pub ids: DevicePtr,
    /// f32 `[vector_rows, width]`: textual inversion; null if there are none.
    pub vectors: DevicePtr,
    /// Result `[tokens, width]`.
    pub out: DevicePtr,
    /// Tokens of all sequences.
    pub tokens: usize,
    /// Tokens of a sequence.
    pub seq: usize,
    /// Width of a row.
    pub width: usize,
    /// Rows of `table`.
    pub rows: usize,
    /// Rows of `vectors`.
    pub vector_rows: usize,
    /// Type of both tables: that of `out`, or f32.
    pub table_element: Element,
    /// Type of `out`.
    pub element: Element,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct EmbedArgs {
    table: DevicePtr,
    positions: DevicePtr,
    ids: DevicePtr,
    vectors: DevicePtr,
    out: DevicePtr,
    tokens: i32,
    seq: i32,
    width: i32,
    rows: i32,
    vector_rows: i32,
    unused: i32,
}

/// Queues an embedding.
pub fn embed(gpu: &Gpu, op: &Embed) -> Result<(), CudaError> {
    gpu.label(|| format!("embed {}x{} of {} rows", op.tokens, op.width, op.rows));
    if op.tokens == 0 || op.width == 0 {
        return Ok(());
    }
    let fail = |reason: String| Err(CudaError::Unsupported { op: "embed", reason });
    if op.table_element != op.element && op.table_element != Element::F32 {
        return fail(format!("a table of {:?} for results of {:?}", op.table_element, op.element));
    }
    if op.seq == 0 || [op.tokens, op.width, op.rows, op.vector_rows].iter().any(|n| *n > i32::MAX as usize) {
        let (tokens, seq, width, rows) = (op.tokens, op.seq, op.width, op.rows);
        return fail(format!("{tokens} tokens in sequences of {seq}, a table of {rows} rows of {width}"));
    }
    let pointers = op.table.0 | op.positions.0 | op.vectors.0 | op.out.0;
    let is_vector = op.width.is_multiple_of(VECTOR) && pointers.is_multiple_of(16);
    let args = EmbedArgs {
        table: op.table,
        positions: op.positions,
        ids: op.ids,
        vectors: op.vectors,
        out: op.out,
        tokens: op.tokens as i32,
        seq: op.seq as i32,
        width: op.width as i32,
        rows: op.rows as i32,
        vector_rows: op.vector_rows as i32,
        unused: 0,
    };
    let path = if is_vector { "" } else { "_scalar" };
    let name = format!("embed_{}_{}{path}", op.table_element.suffix(), op.element.suffix());
    let work = op.tokens * op.width / if is_vector { VECTOR } else { 1 };
    let geometry = Geometry::strided(gpu, work, THREADS);
    gpu.launch(&Kernel { module: MODULE, name: &name }, &geometry, &[bytes_of(&args)])
}

/// Cosines, then sines of `t · 10000^(−i/half)`; a zero at the end if `dim` is odd.
#[derive(Clone, Copy, Debug)]
pub struct TimestepEmbedding {
    /// Magnitudes below 2²⁰.
    pub timesteps: Timesteps,
    /// Result `[count, dim]`.
    pub out: DevicePtr,
    /// Timesteps.
    pub count: usize,
    /// Width of a row.
    pub dim: usize,
    /// Type of `out`.
    pub element: Element,
}

/// What is embedded.
#[derive(Clone, Copy, Debug)]
pub enum Timesteps {
    /// The same for every row, as a step of a sampler has it: nothing is copied to the device.
    Same(f32),
    /// f32 `[count]`.
    Each(DevicePtr),
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct TimestepArgs {
    timesteps: DevicePtr,
    out: DevicePtr,
    count: i32,
    dim: i32,
    timestep: f32,
    unused: i32,
}

/// Queues a timestep embedding.
pub fn timestep_embedding(gpu: &Gpu, op: &TimestepEmbedding) -> Result<(), CudaError> {
    gpu.label(|| format!("timestep_embedding {}x{}", op.count, op.dim));
    let places = op.count * op.dim.div_ceil(2);
    if places == 0 {
        return Ok(());
    }
    if places > (i32::MAX / 2) as usize {
        let reason = format!("{} timesteps of width {}", op.count, op.dim);
        return Err(CudaError::Unsupported { op: "timestep_embedding", reason });
    }
    let (timesteps, timestep) = match op.timesteps {
        Timesteps::Same(timestep) => (DevicePtr::NULL, timestep),
        Timesteps::Each(timesteps) => (timesteps, 0.0),
    };
    let (count, dim) = (op.count as i32, op.dim as i32);
    let args = TimestepArgs { timesteps, out: op.out, count, dim, timestep, unused: 0 };
    let name = format!("timestep_embedding_{}", op.element.suffix());
    let geometry = Geometry::line(places.div_ceil(THREADS as usize), THREADS);
    gpu.launch(&Kernel { module: MODULE, name: &name }, &geometry, &[bytes_of(&args)])
}
