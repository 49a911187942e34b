//! Cases of GroupNorm and LayerNorm.

use super::random::{ELEMENTS, HALVES, Shapes, distinct};
use super::{Case, Context, Measured};
use crate::backend::cuda::launch::norm::{
    GroupNorm, LayerNorm, group_norm, group_norm_in_clusters, layer_norm,
};
use crate::backend::cuda::{CudaError, Element, Gpu};
use crate::driver::DevicePtr;

/// Shape of a GroupNorm.
#[derive(Clone, Copy)]
struct Map {
    samples: usize,
    pixels: usize,
    c1: usize,
    c2: usize,
    groups: usize,
    /// Common offset of all inputs, whose deviation is 1.
    offset: f32,
    silu: bool,
}

fn map(samples: usize, pixels: usize, c1: usize, c2: usize, groups: usize) -> Map {
    Map { samples, pixels, c1, c2, groups, offset: 0.25, silu: !pixels.is_multiple_of(2) }
}

/// Shapes that fit no tile, every path, and each kernel's limits.
fn small_maps() -> Vec<Map> {
    vec![
        map(1, 1, 8, 0, 1),
        map(1, 1, 1, 0, 1),
        map(2, 1, 320, 0, 32),
        map(3, 5, 32, 0, 32),
        map(1, 64, 64, 0, 8),
        map(2, 49, 96, 0, 3),
        map(1, 33, 24, 0, 4),
        map(2, 63, 40, 0, 5),
        map(1, 256, 80, 0, 2),
        map(2, 255, 320, 0, 32),
        map(1, 1024, 320, 0, 32),
        map(2, 333, 640, 320, 32),
        map(1, 77, 16, 24, 5),
        map(2, 400, 24, 8, 2),
        map(1, 513, 1280, 1280, 32),
        map(1, 100, 4096, 0, 32),
        map(1, 31, 4096, 0, 4096),
        map(1, 29, 2048, 2048, 1),
        map(2, 17, 30, 0, 5),
        map(1, 130, 7, 0, 7),
        map(2, 222, 13, 17, 6),
        map(1, 61, 4, 0, 2),
        map(1, 1000, 1023, 2, 25),
        map(1, 9, 4095, 0, 3),
        map(1, 4096, 128, 0, 32),
        map(1, 2500, 8, 0, 1),
        // Long spans: a thread's second and third round.
        map(1, 97, 2056, 0, 8),
        map(1, 100, 1023, 0, 31),
        map(3, 50, 4096, 0, 64),
    ]
}

/// SD1.5 at 512², SDXL at 1024², their VAE decoders; classifier-free guidance makes two samples.
fn real_maps() -> Vec<Map> {
    let unet = [
        (4096, 320, 0),
        (4096, 320, 320),
        (4096, 640, 320),
        (1024, 640, 0),
        (1024, 1280, 640),
        (256, 1280, 0),
        (256, 1280, 1280),
        (64, 1280, 1280),
        (16384, 320, 0),
        (16384, 640, 320),
        (4096, 640, 0),
        (4096, 1280, 640),
        (1024, 1280, 0),
        (1024, 1280, 1280),
        // The SDXL refiner: groups of 12 channels and more.
        (16384, 384, 0),
        (4096, 768, 384),
        (256, 1536, 1536),
    ];
    let vae = [(4096, 512), (16384, 512), (65536, 256), (262_144, 128)];
    let unet = unet.iter().map(|&(pixels, c1, c2)| map(2, pixels, c1, c2, 32));
    let vae = vae.iter().map(|&(pixels, c)| map(1, pixels, c, 0, 32));
    unet.chain(vae).map(|m| Map { silu: true, ..m }).collect()
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for element in ELEMENTS {
        cases.extend(small_maps().into_iter().map(|m| group_norm_case(m, element)));
        // Means far above the deviation, up to what the type can still tell apart.
        let offset = largest_offset(element);
        for m in [map(2, 256, 64, 0, 8), map(1, 2048, 64, 32, 4), map(1, 601, 9, 0, 3)] {
            cases.push(group_norm_case(Map { offset, silu: false, ..m }, element));
        }
    }
    cases.extend(real_maps().into_iter().map(|m| group_norm_case(m, Element::F16)));
    for element in ELEMENTS {
        for (rows, channels, extra) in ROWS {
            cases.push(layer_norm_case(rows, channels, extra, 0.25, element));
        }
        let offset = largest_offset(element);
        cases.push(layer_norm_case(5, 768, 0, offset, element));
        cases.push(layer_norm_case(3, 99, 0, offset, element));
    }
    for (rows, channels) in [
        (8192, 320),
        (2048, 640),
        (512, 1280),
        (154, 768),
        (154, 1024),
        (154, 1280),
        (8192, 640),
        (2048, 1280),
    ] {
        cases.push(layer_norm_case(rows, channels, 0, 0.25, Element::F16));
    }
    cases
}

/// Of every path as many: whole groups in a block, two passes over vectors and single elements, runs that a kernel of its
/// own merges, clusters; rows of every width.
pub(super) fn random(shapes: &mut Shapes) -> Vec<Case> {
    let mut cases = Vec::new();
    for element in ELEMENTS {
        cases.extend(distinct(shapes, |s| group_norm_case(fused_map(s, element), element)));
        cases.extend(distinct(shapes, |s| group_norm_case(two_pass_map(s, element), element)));
        cases.extend(distinct(shapes, |s| group_norm_case(scalar_map(s), element)));
        for vectors in [1..=64, 65..=96, 97..=160, 161..=256] {
            cases.extend(distinct(shapes, |s| {
                let channels = 8 * s.of(vectors.clone());
                layer_norm_case(s.of(1..=40), channels, 8 * s.below(3), offset(s, element), element)
            }));
        }
        cases.extend(distinct(shapes, |s| {
            let (channels, extra) = (s.odd(1..=400), s.below(5));
            layer_norm_case(s.of(1..=40), channels, extra, offset(s, element), element)
        }));
    }
    cases.extend(distinct(shapes, |s| {
        let element = s.pick(&ELEMENTS);
        group_norm_case(many_runs_map(s), element)
    }));
    for element in HALVES {
        for is_large in [false, true] {
            cases.extend(distinct(shapes, |s| cluster_case(cluster_map(s, is_large), element)));
        }
    }
    cases
}

/// Means near zero, or as far from it as the type can still tell apart.
fn offset(s: &mut Shapes, element: Element) -> f32 {
    s.pick(&[0.25, 0.25, largest_offset(element)])
}

fn largest_offset(element: Element) -> f32 {
    if element == Element::F32 { 3000.0 } else { 24.0 }
}

/// `channels` as those of one tensor, or of two that meet at a multiple of `unit`.
fn split(s: &mut Shapes, channels: usize, unit: usize) -> (usize, usize) {
    let c2 = if channels > unit && s.once_in(2) { unit * s.of(1..=(channels - 1) / unit) } else { 0 };
    (channels - c2, c2)
}

fn with_channels(s: &mut Shapes, m: Map, unit: usize) -> Map {
    let (c1, c2) = split(s, m.c1, unit);
    Map { c1, c2, silu: s.once_in(2), ..m }
}

/// Channels that are whole vectors and whole groups at once: the least of groups of `size`.
fn slab(size: usize) -> usize {
    (1..=8).map(|n| n * size).find(|n| n.is_multiple_of(8)).unwrap_or(8 * size)
}

fn fused_map(s: &mut Shapes, element: Element) -> Map {
    let size = s.of(1..=24);
    let (slab, slabs) = (slab(size), s.of(1..=3));
    let pixels = s.of(1..=(40_960 / element.size() / slab).min(90));
    let m = map(s.of(1..=2), pixels, slab * slabs, 0, slab * slabs / size);
    let m = Map { offset: offset(s, element), ..m };
    with_channels(s, m, 8)
}

/// Few groups, of which one alone is more than 40 KB.
fn two_pass_map(s: &mut Shapes, element: Element) -> Map {
    let (groups, size) = (s.of(1..=2), 8 * s.of(20..=60));
    let pixels = 40_960 / element.size() / size + s.of(1..=60);
    let m = Map { offset: offset(s, element), ..map(1, pixels, groups * size, 0, groups) };
    with_channels(s, m, 8)
}

/// Channels that are no vectors.
fn scalar_map(s: &mut Shapes) -> Map {
    let (groups, size) = (s.odd(1..=9), s.odd(1..=21));
    let m = map(s.of(1..=2), s.of(1..=150), groups * size, 0, groups);
    with_channels(s, m, 1)
}

/// More runs than the simulated device has multiprocessors.
fn many_runs_map(s: &mut Shapes) -> Map {
    let (groups, size) = (s.odd(3..=9), s.odd(21..=51));
    let lanes = (512 / (groups * size)).max(1);
    let m = map(1, lanes * s.of(55..=95), groups * size, 0, groups);
    with_channels(s, m, 1)
}

/// One slab, of whose pixels a thread has up to 6 vectors, or up to 16.
fn cluster_map(s: &mut Shapes, is_large: bool) -> Map {
    let size = s.of(5..=31);
    let slab = slab(size);
    let lanes = 512 / (slab / 8);
    let pixels = if is_large { s.odd(49 * lanes..=70 * lanes) } else { s.of(1..=5 * lanes) };
    let offset = offset(s, Element::F16);
    with_channels(s, Map { offset, ..map(1, pixels, slab, 0, slab / size) }, 8)
}

/// Rows, channels, and what the pitches have beyond them.
const ROWS: [(usize, usize, usize); 21] = [
    (1, 8, 0),
    (1, 1, 0),
    (2, 3, 0),
    (3, 64, 0),
    (9, 256, 0),
    (8, 264, 8),
    (17, 320, 0),
    (7, 512, 0),
    (5, 520, 16),
    (77, 768, 0),
    (1, 776, 0),
    (10, 1024, 0),
    (33, 1280, 0),
    (4, 1288, 0),
    (5, 2048, 24),
    (3, 2056, 0),
    (2, 4096, 0),
    (6, 640, 4),
    (5, 1001, 0),
    (300, 24, 0),
    (130, 5, 2),
];

/// One rounding of the result; float arithmetic before it.
///
/// Kernels take values as distances from a value of the same group. Far from zero that difference of two floats is exact
/// (they are within a factor of two), near zero its rounding is one of the difference itself; so however far the mean is
/// from zero, all that follows works on numbers as large as the deviation, d, or at most seven times that. There the mean
/// has the roundings of some 20 sums and merges of a tree, 2^-24·d each and independent: 3e-7·d. The result, 2.7·x at most
/// over an rms above 1, has those and four of its own: below 3e-6.
///
/// GroupNorms of halves keep means as distances from 0: those have four roundings of `offset`.
fn tolerance(element: Element, offset: f32) -> f64 {
    let far = if element == Element::F32 { 0.0 } else { 4.0 * f64::from(offset) * Element::F32.rounding() };
    element.rounding() * 1.01 + 3e-6 + far
}

/// By the kernel for clusters of Hopper, whatever the launcher would choose.
fn cluster_case(m: Map, element: Element) -> Case {
    let case = group_norm_case(m, element);
    Case {
        family: "norm_sm90",
        name: case.name.replace("groupnorm_", "groupnorm_cluster_"),
        run: Box::new(move |cx| run_group_norm(cx, m, element, group_norm_in_clusters)),
        ..case
    }
}

fn group_norm_case(m: Map, element: Element) -> Case {
    let count = m.samples * m.pixels * (m.c1 + m.c2);
    let Map { samples, pixels, c1, c2, groups, offset, silu } = m;
    let act = if silu { " silu" } else { "" };
    let suffix = element.suffix();
    Case {
        family: "norm",
        name: format!("groupnorm_{suffix} {samples}x{pixels} {c1}+{c2}/{groups} mean {offset}{act}"),
        quick: count < 200_000,
        needs_gpu: count > 3_000_000,
        is_random: false,
        flops: 0.0,
        bytes: (2 * count * element.size()) as f64,
        tolerance: tolerance(element, offset),
        run: Box::new(move |cx| run_group_norm(cx, m, element, group_norm)),
    }
}

/// Input with a mean, one that differs between the groups a little.
fn shifted(cx: &mut Context<'_>, count: usize, offset: f32, element: Element) -> Vec<f32> {
    cx.values(count, 1.0, Element::F32).iter().map(|v| element.round(v + offset)).collect()
}

fn run_group_norm(
    cx: &mut Context<'_>,
    m: Map,
    element: Element,
    launch: fn(&Gpu, &GroupNorm) -> Result<(), CudaError>,
) -> Result<Measured, CudaError> {
    let channels = m.c1 + m.c2;
    let x = shifted(cx, m.samples * m.pixels * m.c1, m.offset, element);
    let x2 = shifted(cx, m.samples * m.pixels * m.c2, -0.5 * m.offset, element);
    let scale: Vec<f32> = cx.values(channels, 0.5, Element::F32).iter().map(|v| v + 1.0).collect();
    let shift = cx.values(channels, 0.3, Element::F32);
    let eps = 1e-5f32;
    let mut want = vec![0.0; m.samples * m.pixels * channels];
    let at = |n: usize, p: usize, c: usize| {
        let pixel = n * m.pixels + p;
        f64::from(if c < m.c1 { x[pixel * m.c1 + c] } else { x2[pixel * m.c2 + c - m.c1] })
    };
    let size = channels / m.groups;
    let count = (m.pixels * size) as f64;
    for n in 0..m.samples {
        for g in 0..m.groups {
            let each = || (0..m.pixels).flat_map(|p| (g * size..(g + 1) * size).map(move |c| (p, c)));
            let mean = each().map(|(p, c)| at(n, p, c)).sum::<f64>() / count;
            let var = each().map(|(p, c)| (at(n, p, c) - mean).powi(2)).sum::<f64>() / count;
            let rstd = 1.0 / (var + f64::from(eps)).sqrt();
            for (p, c) in each() {
                let y = (at(n, p, c) - mean) * rstd * f64::from(scale[c]) + f64::from(shift[c]);
                want[(n * m.pixels + p) * channels + c] = if m.silu { y / (1.0 + (-y).exp()) } else { y };
            }
        }
    }
    let (dx, dx2) = (cx.upload(&x, element)?, cx.upload(&x2, element)?);
    let (dscale, dshift) = (cx.upload(&scale, Element::F32)?, cx.upload(&shift, Element::F32)?);
    let out = cx.output(want.len() * element.size())?;
    let gpu = cx.gpu;
    let op = GroupNorm {
        x: dx.ptr,
        x2: if m.c2 == 0 { DevicePtr::NULL } else { dx2.ptr },
        scale: dscale.ptr,
        shift: dshift.ptr,
        out: out.ptr,
        samples: m.samples,
        pixels: m.pixels,
        c1: m.c1,
        c2: m.c2,
        groups: m.groups,
        eps,
        silu: m.silu,
        element,
    };
    cx.measure(out, element, &want, || launch(gpu, &op))
}

fn layer_norm_case(rows: usize, channels: usize, extra: usize, offset: f32, element: Element) -> Case {
    let count = rows * channels;
    Case {
        family: "norm",
        name: format!("layernorm_{} {rows}x{channels}+{extra} mean {offset}", element.suffix()),
        quick: count < 100_000,
        needs_gpu: count > 3_000_000,
        is_random: false,
        flops: 0.0,
        bytes: (2 * count * element.size()) as f64,
        tolerance: tolerance(element, offset),
        run: Box::new(move |cx| run_layer_norm(cx, [rows, channels, extra], offset, element)),
    }
}

fn run_layer_norm(
    cx: &mut Context<'_>,
    [rows, channels, extra]: [usize; 3],
    offset: f32,
    element: Element,
) -> Result<Measured, CudaError> {
    let pitch = channels + extra;
    let x = shifted(cx, rows * pitch, offset, element);
    let scale: Vec<f32> = cx.values(channels, 0.5, Element::F32).iter().map(|v| v + 1.0).collect();
    let shift = cx.values(channels, 0.3, Element::F32);
    let eps = 1e-5f32;
    let mut want = Vec::with_capacity(rows * channels);
    for row in x.chunks_exact(pitch) {
        let row: Vec<f64> = row[..channels].iter().map(|v| f64::from(*v)).collect();
        let mean = row.iter().sum::<f64>() / channels as f64;
        let var = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / channels as f64;
        let rstd = 1.0 / (var + f64::from(eps)).sqrt();
        want.extend(
            row.iter()
                .zip(scale.iter().zip(&shift))
                .map(|(v, (s, b))| (v - mean) * rstd * f64::from(*s) + f64::from(*b)),
        );
    }
    let dx = cx.upload(&x, element)?;
    let (dscale, dshift) = (cx.upload(&scale, Element::F32)?, cx.upload(&shift, Element::F32)?);
    let out = cx.output(want.len() * element.size())?;
    let gpu = cx.gpu;
    let op = LayerNorm {
        x: dx.ptr,
        scale: dscale.ptr,
        shift: dshift.ptr,
        out: out.ptr,
        rows,
        channels,
        pitch,
        out_pitch: channels,
        eps,
        element,
    };
    cx.measure(out, element, &want, || layer_norm(gpu, &op))
}
