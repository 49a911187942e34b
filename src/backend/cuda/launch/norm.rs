//! GroupNorm and LayerNorm (`kernels/norm/groupnorm.cu`, `groupnorm_sm90.cu`, `layernorm.cu`).

use bytemuck::{Pod, Zeroable, bytes_of};

use super::super::{CudaError, Element, Geometry, Gpu, Kernel};
use crate::driver::DevicePtr;

const GROUPNORM: &str = "groupnorm";
const GROUPNORM_THREADS: u32 = 512;
/// Channels that fit the kernels' tables.
const MAX_CHANNELS: usize = 4096;
/// Elements of one access.
const VECTOR: usize = 8;
/// Largest slab of the one-pass kernel: above it one multiprocessor computes longer than two more launches take.
const FUSED_BYTES: usize = 40 << 10;
/// Table of (mean, M2) of a block: 8 bytes a channel of a thread, and one `Moments` a warp.
const STATS_BYTES: usize = 8 * GROUPNORM_THREADS as usize * VECTOR + 12 * GROUPNORM_THREADS as usize / 32;
/// What the one-pass kernel keeps beside its slab.
const FUSED_TABLES: usize = STATS_BYTES + 8 * 8;

/// `out = act(norm(x ‖ x2)·scale + shift)` over NHWC; rows are as wide as their channels.
#[derive(Clone, Copy, Debug)]
pub struct GroupNorm {
    /// Input `[samples, pixels, c1]`.
    pub x: DevicePtr,
    /// Further channels `[samples, pixels, c2]`; null if `c2` is 0.
    pub x2: DevicePtr,
    /// f32 `[c1 + c2]`.
    pub scale: DevicePtr,
    /// f32 `[c1 + c2]`.
    pub shift: DevicePtr,
    /// Result `[samples, pixels, c1 + c2]`.
    pub out: DevicePtr,
    /// Samples.
    pub samples: usize,
    /// Pixels of a sample.
    pub pixels: usize,
    /// Channels of `x`.
    pub c1: usize,
    /// Channels of `x2`.
    pub c2: usize,
    /// Groups; they divide `c1 + c2`.
    pub groups: usize,
    /// Added to the variance.
    pub eps: f32,
    /// SiLU afterwards.
    pub silu: bool,
    /// Type of `x`, `x2` and `out`.
    pub element: Element,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct GroupNormArgs {
    x: DevicePtr,
    x2: DevicePtr,
    scale: DevicePtr,
    shift: DevicePtr,
    out: DevicePtr,
    partial: DevicePtr,
    merged: DevicePtr,
    pixels: i32,
    c1: i32,
    c2: i32,
    groups: i32,
    run: i32,
    runs: i32,
    span: i32,
    slab: i32,
    eps: f32,
    silu: i32,
}

/// How a GroupNorm is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum GroupNormPlan {
    /// One kernel; a block takes `slab` channels of a sample.
    Fused { slab: usize },
    /// One kernel on Hopper; each of the `blocks` of a cluster takes `run` pixels of `slab` channels, `vectors` a thread
    /// at most.
    Cluster { slab: usize, blocks: usize, run: usize, vectors: usize },
    /// Statistics over runs of `run` pixels, then normalisation of spans of `span` pixels.
    TwoPass { run: usize, span: usize },
}

/// What the plan depends on.
struct GroupNormShape {
    samples: usize,
    pixels: usize,
    channels: usize,
    groups: usize,
    /// Bytes of an element; 0 forbids the one-pass kernel.
    element_bytes: usize,
    /// Elements of one access.
    vector: usize,
}

/// Channels of a slab at most, so that two threads share a channel's sum.
const CLUSTER_SLAB: usize = GROUPNORM_THREADS as usize / 2;
/// Groups of a slab at most.
const CLUSTER_GROUPS: usize = 8;
/// Vectors of a thread that there are kernels for.
const CLUSTER_VECTORS: [usize; 2] = [6, 16];
/// `ClusterSmem`: sums of threads and of channels, and what is known of the groups.
const CLUSTER_BYTES: usize = 4 * GROUPNORM_THREADS as usize * (VECTOR + 1) + CLUSTER_GROUPS * (4 + 4 + 8);

/// The plan on Hopper, if a cluster holds a slab.
fn cluster_plan(shape: &GroupNormShape, multiprocessors: usize) -> Option<GroupNormPlan> {
    if shape.element_bytes != 2 || shape.vector != VECTOR {
        return None;
    }
    let size = shape.channels / shape.groups;
    let mut slab = size * VECTOR / gcd(size, VECTOR);
    // Memory comes in sectors of 32 bytes.
    if slab < 16 && shape.channels.is_multiple_of(2 * slab) && 2 * slab / size <= CLUSTER_GROUPS {
        slab *= 2;
    }
    if slab > CLUSTER_SLAB {
        return None;
    }
    let lanes = GROUPNORM_THREADS as usize / (slab / VECTOR);
    let of = |blocks: usize| {
        let run = shape.pixels.div_ceil(blocks);
        (run, run.div_ceil(lanes))
    };
    // As few blocks as hold it in few registers, but enough for nearly all multiprocessors.
    let is_enough = |blocks: &usize| {
        let (_, vectors) = of(*blocks);
        let all = blocks * shape.channels / slab * shape.samples;
        vectors <= 2 || (vectors <= CLUSTER_VECTORS[0] && 10 * all >= 9 * multiprocessors)
    };
    let blocks = [1, 2, 4, 8].into_iter().find(is_enough).unwrap_or(8);
    let (run, needed) = of(blocks);
    let vectors = CLUSTER_VECTORS.into_iter().find(|v| needed <= *v)?;
    Some(GroupNormPlan::Cluster { slab, blocks, run, vectors })
}

fn plan(shape: &GroupNormShape, multiprocessors: usize, shared_memory: usize) -> GroupNormPlan {
    let size = shape.channels / shape.groups;
    let slab = size * VECTOR / gcd(size, VECTOR);
    let most = FUSED_BYTES.min(shared_memory.saturating_sub(FUSED_TABLES));
    let fits = slab * shape.pixels * shape.element_bytes <= most;
    if shape.vector == VECTOR && fits {
        return GroupNormPlan::Fused { slab };
    }
    // Pixels that a block's threads cover at once; a run is several such, so that the block's set-up is paid for.
    let lanes = (GROUPNORM_THREADS as usize / (shape.channels / shape.vector)).max(1);
    let even = (shape.pixels * shape.samples).div_ceil(2 * multiprocessors.max(1));
    GroupNormPlan::TwoPass {
        run: even.max(6 * lanes).min(shape.pixels),
        span: even.max(3 * lanes).min(shape.pixels),
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Queues a GroupNorm.
pub fn group_norm(gpu: &Gpu, op: &GroupNorm) -> Result<(), CudaError> {
    gpu.label(|| {
        format!("group_norm {}x{}x{} in {} groups", op.samples, op.pixels, op.c1 + op.c2, op.groups)
    });
    if op.samples == 0 || op.pixels == 0 || op.c1 + op.c2 == 0 {
        return Ok(());
    }
    check_group_norm(op)?;
    let (shape, multiprocessors) = (shape_of(op), gpu.multiprocessors());
    let on_hopper = if gpu.is_hopper() { cluster_plan(&shape, multiprocessors) } else { None };
    group_norm_as(gpu, op, on_hopper.unwrap_or_else(|| plan(&shape, multiprocessors, gpu.shared_memory())))
}

/// Queues a GroupNorm by the kernel for clusters, on a device of compute capability 9.0.
pub fn group_norm_in_clusters(gpu: &Gpu, op: &GroupNorm) -> Result<(), CudaError> {
    check_group_norm(op)?;
    let plan = cluster_plan(&shape_of(op), gpu.multiprocessors()).ok_or_else(|| CudaError::Unsupported {
        op: "group_norm",
        reason: format!("no cluster holds a slab of {op:?}"),
    })?;
    group_norm_as(gpu, op, plan)
}

fn shape_of(op: &GroupNorm) -> GroupNormShape {
    let pointers = op.x.0 | op.x2.0 | op.out.0;
    let is_vector =
        op.c1.is_multiple_of(VECTOR) && op.c2.is_multiple_of(VECTOR) && pointers.is_multiple_of(16);
    GroupNormShape {
        samples: op.samples,
        pixels: op.pixels,
        channels: op.c1 + op.c2,
        groups: op.groups,
        element_bytes: op.element.size(),
        vector: if is_vector { VECTOR } else { 1 },
    }
}

fn group_norm_as(gpu: &Gpu, op: &GroupNorm, plan: GroupNormPlan) -> Result<(), CudaError> {
    let channels = op.c1 + op.c2;
    let mut args = GroupNormArgs {
        x: op.x,
        x2: op.x2,
        scale: op.scale,
        shift: op.shift,
        out: op.out,
        partial: DevicePtr::NULL,
        merged: DevicePtr::NULL,
        pixels: op.pixels as i32,
        c1: op.c1 as i32,
        c2: op.c2 as i32,
        groups: op.groups as i32,
        run: 0,
        runs: 1,
        span: 0,
        slab: 0,
        eps: op.eps,
        silu: i32::from(op.silu),
    };
    match plan {
        GroupNormPlan::Cluster { slab, blocks, run, vectors } => {
            (args.slab, args.run, args.runs) = (slab as i32, run as i32, blocks as i32);
            let name = format!("groupnorm_cluster_{vectors}_{}", op.element.suffix());
            let geometry = Geometry {
                grid: [(channels / slab * blocks) as u32, op.samples as u32, 1],
                threads: GROUPNORM_THREADS,
                shared: CLUSTER_BYTES as u32,
                cluster: blocks as u32,
            };
            gpu.launch(&Kernel { module: "groupnorm_sm90", name: &name }, &geometry, &[bytes_of(&args)])
        }
        GroupNormPlan::Fused { slab } => {
            args.slab = slab as i32;
            let bytes = FUSED_TABLES + slab * op.pixels * op.element.size();
            let name = format!("groupnorm_fused_{}", op.element.suffix());
            launch_group_norm(gpu, &name, [channels / slab, op.samples], bytes, &args)
        }
        GroupNormPlan::TwoPass { run, span } => two_pass(gpu, op, args, run, span),
    }
}

fn two_pass(
    gpu: &Gpu,
    op: &GroupNorm,
    mut args: GroupNormArgs,
    run: usize,
    span: usize,
) -> Result<(), CudaError> {
    let (runs, moments) = (op.pixels.div_ceil(run), 8 * op.samples * op.groups);
    args.partial = gpu.workspace(moments * (runs + 1))?;
    args.merged = args.partial.offset(moments * runs);
    (args.run, args.runs, args.span) = (run as i32, runs as i32, span as i32);
    let path = if shape_of(op).vector == VECTOR { "" } else { "_scalar" };
    let suffix = op.element.suffix();
    let name = format!("groupnorm_stats{path}_{suffix}");
    launch_group_norm(gpu, &name, [runs, op.samples], STATS_BYTES, &args)?;
    // Every block would merge them again: above one run a multiprocessor a kernel of its own costs less.
    if runs > gpu.multiprocessors() {
        let geometry = Geometry {
            grid: [op.groups.div_ceil(8) as u32, op.samples as u32, 1],
            threads: 256,
            shared: 0,
            cluster: 1,
        };
        gpu.launch(&Kernel { module: GROUPNORM, name: "groupnorm_merge" }, &geometry, &[bytes_of(&args)])?;
        (args.partial, args.run, args.runs) = (args.merged, args.pixels, 1);
    }
    let name = format!("groupnorm_apply{path}_{suffix}");
    launch_group_norm(gpu, &name, [op.pixels.div_ceil(span), op.samples], 8 * op.groups, &args)
}

fn launch_group_norm(
    gpu: &Gpu,
    name: &str,
    grid: [usize; 2],
    shared: usize,
    args: &GroupNormArgs,
) -> Result<(), CudaError> {
    let geometry = Geometry {
        grid: [grid[0] as u32, grid[1] as u32, 1],
        threads: GROUPNORM_THREADS,
        shared: shared as u32,
        cluster: 1,
    };
    gpu.launch(&Kernel { module: GROUPNORM, name }, &geometry, &[bytes_of(args)])
}

fn check_group_norm(op: &GroupNorm) -> Result<(), CudaError> {
    let channels = op.c1 + op.c2;
    let fail = |reason: String| Err(CudaError::Unsupported { op: "group_norm", reason });
    if op.groups == 0 || !channels.is_multiple_of(op.groups) {
        return fail(format!("{} groups do not divide {channels} channels", op.groups));
    }
    if channels > MAX_CHANNELS {
        return fail(format!("{channels} channels; at most {MAX_CHANNELS}"));
    }
    if op.pixels > i32::MAX as usize || op.samples > 65_535 {
        return fail(format!("{} samples of {} pixels; at most 65535 of 2^31", op.samples, op.pixels));
    }
    if op.c2 > 0 && op.x2.is_null() {
        return fail(format!("{} further channels without a second input", op.c2));
    }
    Ok(())
}

/// `out = (x − mean)/√(var + eps)·scale + shift` of every row.
#[derive(Clone, Copy, Debug)]
pub struct LayerNorm {
    /// Input rows.
    pub x: DevicePtr,
    /// f32 `[channels]`.
    pub scale: DevicePtr,
    /// f32 `[channels]`.
    pub shift: DevicePtr,
    /// Result rows.
    pub out: DevicePtr,
    /// Rows.
    pub rows: usize,
    /// Width of a row.
    pub channels: usize,
    /// Elements from one row of `x` to the next.
    pub pitch: usize,
    /// Elements from one row of `out` to the next.
    pub out_pitch: usize,
    /// Added to the variance.
    pub eps: f32,
    /// Type of `x` and `out`.
    pub element: Element,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct LayerNormArgs {
    x: DevicePtr,
    scale: DevicePtr,
    shift: DevicePtr,
    out: DevicePtr,
    rows: i64,
    pitch: i64,
    out_pitch: i64,
    channels: i32,
    eps: f32,
}

const LAYERNORM_THREADS: usize = 128;

/// Width in the kernel's name and rows of a warp; 0 is the kernel for any width.
fn layer_norm_variant(channels: usize, is_vector: bool) -> (usize, usize) {
    match channels {
        _ if !is_vector => (0, 0),
        0..=512 => (512, 2),
        513..=768 => (768, 2),
        769..=1280 => (1280, 2),
        1281..=2048 => (2048, 1),
        _ => (0, 0),
    }
}

/// Queues a LayerNorm.
pub fn layer_norm(gpu: &Gpu, op: &LayerNorm) -> Result<(), CudaError> {
    gpu.label(|| format!("layer_norm {}x{}", op.rows, op.channels));
    if op.rows == 0 || op.channels == 0 {
        return Ok(());
    }
    let fail = |reason: String| Err(CudaError::Unsupported { op: "layer_norm", reason });
    if op.pitch < op.channels || op.out_pitch < op.channels {
        let (from, to) = (op.pitch, op.out_pitch);
        return fail(format!("rows of {} channels every {from} and {to} elements overlap", op.channels));
    }
    if op.channels > i32::MAX as usize || op.rows > i32::MAX as usize {
        return fail(format!("{} rows of {} channels; at most 2^31 of either", op.rows, op.channels));
    }
    let aligned = (op.x.0 | op.out.0 | op.scale.0 | op.shift.0).is_multiple_of(16);
    let is_vector = aligned && [op.channels, op.pitch, op.out_pitch].iter().all(|n| n.is_multiple_of(VECTOR));
    let args = LayerNormArgs {
        x: op.x,
        scale: op.scale,
        shift: op.shift,
        out: op.out,
        rows: op.rows as i64,
        pitch: op.pitch as i64,
        out_pitch: op.out_pitch as i64,
        channels: op.channels as i32,
        eps: op.eps,
    };
    let suffix = op.element.suffix();
    let (name, blocks, shared) = match layer_norm_variant(op.channels, is_vector) {
        (0, _) => {
            let most = gpu.multiprocessors() * 16;
            (format!("layernorm_any_{suffix}"), op.rows.min(most), 4 * LAYERNORM_THREADS / 32)
        }
        (width, rows) => {
            (format!("layernorm_{width}_{suffix}"), op.rows.div_ceil(LAYERNORM_THREADS / 32 * rows), 0)
        }
    };
    let geometry = Geometry { shared: shared as u32, ..Geometry::line(blocks, LAYERNORM_THREADS as u32) };
    gpu.launch(&Kernel { module: "layernorm", name: &name }, &geometry, &[bytes_of(&args)])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(samples: usize, pixels: usize, channels: usize) -> GroupNormShape {
        GroupNormShape { samples, pixels, channels, groups: 32, element_bytes: 2, vector: 8 }
    }

    #[test]
    fn small_maps_take_one_pass() {
        let plan = |shape| plan(&shape, 132, 227 << 10);
        assert_eq!(plan(shape(2, 256, 1280)), GroupNormPlan::Fused { slab: 40 });
        assert_eq!(plan(shape(2, 256, 2560)), GroupNormPlan::Fused { slab: 80 });
        assert_eq!(plan(shape(2, 1024, 640)), GroupNormPlan::TwoPass { run: 36, span: 18 });
    }

    #[test]
    fn one_pass_fits_the_device() {
        for limit in [64 << 10, 99 << 10, 163 << 10, 227 << 10] {
            let mut most = 0;
            for (pixels, channels) in (1..600).flat_map(|pixels| [32, 320, 1280, 2560].map(|c| (pixels, c))) {
                if let GroupNormPlan::Fused { slab } = plan(&shape(2, pixels, channels), 40, limit) {
                    most = most.max(FUSED_TABLES + slab * pixels * 2);
                }
            }
            assert!(
                most <= limit && most > (limit - 256).min(FUSED_TABLES + FUSED_BYTES - 256),
                "{most} of {limit}"
            );
        }
        const { assert!(STATS_BYTES <= 64 << 10 && CLUSTER_BYTES <= 227 << 10) };
    }

    #[test]
    fn clusters_hold_the_maps_of_the_unets() {
        let of = |samples, pixels, channels| match cluster_plan(&shape(samples, pixels, channels), 132) {
            Some(GroupNormPlan::Cluster { slab, blocks, run, vectors }) => Some((slab, blocks, run, vectors)),
            _ => None,
        };
        assert_eq!(of(2, 64, 1280), Some((40, 1, 64, 6)));
        assert_eq!(of(2, 256, 1280), Some((40, 2, 128, 6)));
        assert_eq!(of(2, 1024, 640), Some((40, 4, 256, 6)));
        assert_eq!(of(2, 4096, 320), Some((40, 8, 512, 6)));
        assert_eq!(of(2, 4096, 960), Some((120, 8, 512, 16)));
        assert_eq!(of(2, 16384, 320), None);
        assert_eq!(of(1, 4096, 512), Some((16, 4, 1024, 6)));
        assert_eq!(of(1, 512 * 512, 128), None);
    }

    #[test]
    fn large_maps_fill_the_device_twice() {
        let GroupNormPlan::TwoPass { run, span } = plan(&shape(1, 512 * 512, 128), 132, 227 << 10) else {
            panic!("one pass over 64 MB")
        };
        assert_eq!((run, span), (993, 993));
    }

    #[test]
    fn layer_norm_widths_of_real_models() {
        assert_eq!(layer_norm_variant(320, true), (512, 2));
        assert_eq!(layer_norm_variant(1280, true), (1280, 2));
        assert_eq!(layer_norm_variant(2048, true), (2048, 1));
        assert_eq!(layer_norm_variant(4096, true), (0, 0));
        assert_eq!(layer_norm_variant(640, false), (0, 0));
    }
}
