//! Token merging as a recorded pass: the demo model has no attention at full size, where tokens are merged.

use std::sync::Arc;

use kiln::backend::cuda::{CudaBackend, Element, Gpu, Shared};
use kiln::driver::Driver;
use kiln::driver::simt::{SimtDriver, SimtOptions};
use kiln::driver::toolchain::SimtVariant;
use kiln::tensor::{Attention, Backend, BodyError, Cols, HostLayout, MatchTokens, Shape, Tensor};

use crate::library;
use crate::pipeline::cpu;

const SIZE: (usize, usize) = (9, 12);
const CHANNELS: usize = 32;
const MERGED: usize = 40;

fn values(seed: usize, count: usize) -> Vec<f32> {
    let mut state = seed as u64 * 977 + 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn upload(backend: &dyn Backend, data: &[f32], channels: usize) -> Tensor {
    let mut x = backend.alloc(Shape::tokens(2, SIZE.0 * SIZE.1, channels)).unwrap();
    backend.upload(data, HostLayout::Nhwc, &mut x).unwrap();
    x
}

/// Attention of merged queries, as the patch does it.
fn attend(backend: &dyn Backend, normed: &Tensor, qkv: &Tensor) -> Result<Tensor, BodyError> {
    let targets: Vec<u8> = (0..(SIZE.0 / 2) * (SIZE.1 / 2)).map(|i| (i * 7 % 4) as u8).collect();
    let rows =
        backend.match_tokens(&MatchTokens { x: normed, size: SIZE, targets: &targets, merged: MERGED })?;
    let mut q = backend.alloc(rows.merged_shape(CHANNELS))?;
    backend.merge_tokens(&Cols::range(qkv, 0, CHANNELS), &rows, &mut q)?;
    let mut attended = backend.alloc(q.shape())?;
    let attention = Attention {
        q: Cols::all(&q),
        k: Cols::range(qkv, CHANNELS, CHANNELS),
        v: Cols::range(qkv, 2 * CHANNELS, CHANNELS),
        heads: 2,
        is_causal: false,
        scale: 0.25,
    };
    backend.attention(&attention, &mut attended)?;
    let mut out = backend.alloc(rows.spread_shape(CHANNELS))?;
    backend.spread_tokens(&attended, &rows, &mut out)?;
    Ok(out)
}

fn download(backend: &dyn Backend, x: &Tensor) -> Vec<f32> {
    let mut out = vec![0.0; x.shape().len()];
    backend.download(x, HostLayout::Nhwc, &mut out).unwrap();
    out
}

/// Plain, captured and replayed, each time with other tokens, the same as on the CPU: in f32, within 1e-5 of values of
/// size 1. A replay is one graph and asks for nothing.
#[test]
fn merged_tokens_are_those_of_the_cpu() {
    let driver = Arc::new(SimtDriver::open(&library(SimtVariant::Fast), SimtOptions::default()).unwrap());
    let on_device =
        CudaBackend::new(Shared::new(Arc::new(Gpu::new(driver.clone()).unwrap()), None), Element::F32);
    let on_cpu = cpu().diffusion;
    let count = 2 * SIZE.0 * SIZE.1 * CHANNELS;
    for round in 0..4 {
        let (normed, qkv) = (values(2 * round, count), values(2 * round + 1, 3 * count));
        let want = {
            let (normed, qkv) = (upload(&*on_cpu, &normed, CHANNELS), upload(&*on_cpu, &qkv, 3 * CHANNELS));
            download(&*on_cpu, &attend(&*on_cpu, &normed, &qkv).unwrap())
        };
        let (normed, qkv) = (upload(&on_device, &normed, CHANNELS), upload(&on_device, &qkv, 3 * CHANNELS));
        let before = driver.instruments().counts();
        let mut body = |inputs: &[&Tensor]| Ok(attend(&on_device, inputs[0], inputs[1])?.into());
        let out = on_device.record(11, &[&normed, &qkv], &mut body).unwrap().result;
        let after = driver.instruments().counts();
        if round >= 2 {
            let asked = [after.allocations - before.allocations, after.syncs - before.syncs];
            assert_eq!((after.graph_launches - before.graph_launches, asked), (1, [0, 0]), "round {round}");
        }
        let got = download(&on_device, &out);
        let worst = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        println!("round {round}: {worst:.1e}");
        assert!(worst < 1e-5, "round {round}: {worst:.1e}");
    }
}
