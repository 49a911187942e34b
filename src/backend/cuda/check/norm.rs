//! Cases of GroupNorm and LayerNorm.

use super::{Case, Context, Measured};
use crate::backend::cuda::launch::norm::{GroupNorm, LayerNorm, group_norm, layer_norm};
use crate::backend::cuda::{CudaError, Element};
use crate::driver::DevicePtr;

const ELEMENTS: [Element; 3] = [Element::F16, Element::BF16, Element::F32];

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
        let offset = if element == Element::F32 { 3000.0 } else { 24.0 };
        for m in [map(2, 256, 64, 0, 8), map(1, 2048, 64, 32, 4), map(1, 601, 9, 0, 3)] {
            cases.push(group_norm_case(Map { offset, silu: false, ..m }, element));
        }
    }
    cases.extend(real_maps().into_iter().map(|m| group_norm_case(m, Element::F16)));
    for element in ELEMENTS {
        for (rows, channels, extra) in ROWS {
            cases.push(layer_norm_case(rows, channels, extra, 0.25, element));
        }
        let offset = if element == Element::F32 { 3000.0 } else { 24.0 };
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

/// One rounding of the result; float arithmetic before it, where a mean of `offset` deviations carries its own rounding.
fn tolerance(element: Element, offset: f32) -> f64 {
    element.rounding() * 1.01 + 3e-6 + 4.0 * f64::from(offset) * Element::F32.rounding()
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
        flops: 0.0,
        bytes: (2 * count * element.size()) as f64,
        tolerance: tolerance(element, offset),
        run: Box::new(move |cx| run_group_norm(cx, m, element)),
    }
}

/// Input with a mean, one that differs between the groups a little.
fn shifted(cx: &mut Context<'_>, count: usize, offset: f32, element: Element) -> Vec<f32> {
    cx.values(count, 1.0, Element::F32).iter().map(|v| element.round(v + offset)).collect()
}

fn run_group_norm(cx: &mut Context<'_>, m: Map, element: Element) -> Result<Measured, CudaError> {
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
    cx.measure(out, element, &want, || group_norm(gpu, &op))
}

fn layer_norm_case(rows: usize, channels: usize, extra: usize, offset: f32, element: Element) -> Case {
    let count = rows * channels;
    Case {
        family: "norm",
        name: format!("layernorm_{} {rows}x{channels}+{extra} mean {offset}", element.suffix()),
        quick: count < 100_000,
        needs_gpu: count > 3_000_000,
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
