//! Predictions combined by what they have in common (`kernels/sampling/combine.cu`).

use bytemuck::{Pod, Zeroable, bytes_of};

use super::super::{CudaError, Geometry, Gpu, Kernel};
use crate::driver::DevicePtr;
use crate::tensor::latents::Rule;

const MODULE: &str = "combine";
const THREADS: u32 = 256;
const WARPS: u32 = THREADS / 32;
/// Most latents of a rule.
const MAX_INPUTS: usize = 4;
/// Sums and dot products of a chunk, in f64.
const SUMS: usize = 9;
/// Least elements of a chunk, or places if a thread walks over their channels.
const CHUNK: usize = 4096;
const CHUNK_OF_PLACES: usize = 1024;
/// Most chunks of a sample: every block of the second launch adds them up.
const MAX_CHUNKS: usize = 64;
/// Sums of every warp.
const CHUNK_SMEM: u32 = 8 * SUMS as u32 * WARPS;
/// Sums and factors.
const COMBINE_SMEM: u32 = 8 * SUMS as u32 + 4 * MAX_INPUTS as u32;

/// A combination by a rule.
#[derive(Clone, Copy, Debug)]
pub struct Combine<'a> {
    /// The rule.
    pub rule: Rule,
    /// f32 latents `[samples, channels, pixels]`, as many as the rule says.
    pub inputs: &'a [DevicePtr],
    /// Result; none of the inputs.
    pub out: DevicePtr,
    /// Samples.
    pub samples: usize,
    /// Channels.
    pub channels: usize,
    /// Pixels of a sample.
    pub pixels: usize,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct CombineArgs {
    x: [DevicePtr; MAX_INPUTS],
    out: DevicePtr,
    partial: DevicePtr,
    count: i64,
    chunk: i64,
    pixels: i64,
    chunks: i32,
    inputs: i32,
    measured: i32,
    channels: i32,
    rule: i32,
    unused: i32,
    p: [f64; 3],
}

/// What the kernels know of a rule: its number, the latents that are measured, and its parameters.
fn coded(rule: Rule) -> (i32, i32, [f64; 3]) {
    match rule {
        Rule::Rescale { variance, scale, multiplier } => (0, 3, [variance, scale, multiplier]),
        Rule::Renorm { scale, limit } => (1, 2, [scale, limit, 0.0]),
        Rule::FitUncond { scale } => (2, 3, [scale, 0.0, 0.0]),
        Rule::DampTangents => (3, 3, [0.0; 3]),
        Rule::Project { eta, limit, scale } => (4, 2, [eta, limit, scale]),
        Rule::Perpendicular { scale, negative_scale } => (5, 3, [scale, negative_scale, 0.0]),
        Rule::Agree { scale } => (6, 0, [scale, 0.0, 0.0]),
        Rule::LimitNorms { strength } => (7, 0, [strength, 0.0, 0.0]),
    }
}

/// Queues a combination.
pub fn combine(gpu: &Gpu, op: &Combine<'_>) -> Result<(), CudaError> {
    gpu.label(|| format!("combine {}x{}x{} {:?}", op.samples, op.channels, op.pixels, op.rule));
    let (places, all) = (op.samples * op.pixels, op.samples * op.channels * op.pixels);
    if all == 0 {
        return Ok(());
    }
    if op.inputs.len() != op.rule.inputs() || op.samples > 65_535 || op.channels > i32::MAX as usize {
        let reason = format!("{} latents of {} samples by {:?}", op.inputs.len(), op.samples, op.rule);
        return Err(CudaError::Unsupported { op: "combine", reason });
    }
    // Whether the whole batch has one set of factors.
    let is_joint = matches!(op.rule, Rule::Perpendicular { .. } | Rule::Agree { .. });
    let groups = if is_joint { 1 } else { op.samples };
    let (rule, measured, p) = coded(op.rule);
    let mut args = CombineArgs {
        x: [DevicePtr::NULL; MAX_INPUTS],
        out: op.out,
        partial: DevicePtr::NULL,
        count: (all / groups) as i64,
        chunk: 0,
        pixels: op.pixels as i64,
        chunks: 0,
        inputs: op.inputs.len() as i32,
        measured,
        channels: op.channels as i32,
        rule,
        unused: 0,
        p,
    };
    args.x[..op.inputs.len()].copy_from_slice(op.inputs);
    let launch = |name: &str, geometry: &Geometry, args: &CombineArgs| {
        gpu.launch(&Kernel { module: MODULE, name }, geometry, &[bytes_of(args)])
    };
    if matches!(op.rule, Rule::LimitNorms { .. }) {
        let args = CombineArgs { count: places as i64, ..args };
        return launch("limit_norms", &Geometry::strided(gpu, places, THREADS), &args);
    }
    let (kernel, count, least) = match op.rule {
        Rule::Agree { .. } => ("cosine_chunks", places, CHUNK_OF_PLACES),
        _ => ("gram_chunks", all / groups, CHUNK),
    };
    let chunk = count.div_ceil(MAX_CHUNKS).max(least);
    let chunks = count.div_ceil(chunk);
    (args.chunk, args.chunks) = (chunk as i64, chunks as i32);
    args.partial = gpu.workspace(8 * SUMS * chunks * groups)?;
    let grid = [chunks as u32, groups as u32, 1];
    let geometry = Geometry { grid, threads: THREADS, shared: CHUNK_SMEM, cluster: 1 };
    launch(kernel, &geometry, &CombineArgs { count: count as i64, ..args })?;
    let blocks = (all / groups).div_ceil(4 * THREADS as usize).min(MAX_CHUNKS);
    let grid = [blocks as u32, groups as u32, 1];
    launch("combine_by_rule", &Geometry { grid, shared: COMBINE_SMEM, ..geometry }, &args)
}
