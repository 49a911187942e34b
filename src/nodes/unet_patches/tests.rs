//! The attention hooks against f64 references written from the definitions, on
//! the CPU: 2e-6 absolute on values of size 1, as for the ops themselves.

use std::sync::Arc;

use super::hypertile::HyperTile;
use super::perturbed_attention::ValuesOnly;
use super::token_merging::TokenMerging;
use crate::backend::{self, Device, DeviceOptions};
use crate::models::layers::Ops;
use crate::models::unet::hooks::{HookCall, SelfAttention, Site, UnetHook};
use crate::tensor::{Backend, HostTensor};

const TOLERANCE: f64 = 2e-6;
const HEADS: usize = 2;
const WIDTH: usize = 8;
const C: usize = HEADS * WIDTH;

fn cpu() -> Arc<dyn Backend> {
    let options = DeviceOptions { device: Device::Cpu, threads: Some(1), ..DeviceOptions::default() };
    backend::open(options).unwrap().diffusion
}

/// Values of size 1 that repeat nowhere near.
fn values(shape: &[usize], salt: u64) -> HostTensor {
    let mut state = salt.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    HostTensor::from_fn(shape, |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    })
}

/// The answer of a hook to two samples of `size` tokens: normalised tokens, projection, result.
fn ask(
    hook: &dyn UnetHook,
    size: (usize, usize),
    stage: &str,
) -> (HostTensor, HostTensor, Option<HostTensor>) {
    let backend = cpu();
    let ops = Ops(backend.as_ref());
    let places = size.0 * size.1;
    let (normed, qkv) = (values(&[2, places, C], 1), values(&[2, places, 3 * C], 2));
    let (on_device, projected) = (ops.upload_tokens(&normed).unwrap(), ops.upload_tokens(&qkv).unwrap());
    let call = HookCall { ops, sigma: 1.0, size, sides: &[1, 0] };
    let attention = SelfAttention { normed: &on_device, qkv: &projected, heads: HEADS };
    let answer = hook.self_attention(&call, Site { stage, index: 0 }, &attention).unwrap();
    (normed, qkv, answer.map(|x| ops.download_tokens(&x).unwrap()))
}

/// Attention of one query over the tokens `keys` of a sample, in f64.
fn attend(query: &[f64], qkv: &[f32], keys: &[usize]) -> Vec<f64> {
    let part = |place: usize, which: usize, i: usize| f64::from(qkv[place * 3 * C + which * C + i]);
    let mut out = vec![0.0; C];
    for head in 0..HEADS {
        let span = head * WIDTH..(head + 1) * WIDTH;
        let score = |k: &usize| {
            let dot: f64 = span.clone().map(|i| query[i] * part(*k, 1, i)).sum();
            (dot / (WIDTH as f64).sqrt()).exp()
        };
        let scores: Vec<f64> = keys.iter().map(score).collect();
        let total: f64 = scores.iter().sum();
        for (k, s) in keys.iter().zip(&scores) {
            span.clone().for_each(|i| out[i] += s / total * part(*k, 2, i));
        }
    }
    out
}

fn query(qkv: &[f32], place: usize) -> Vec<f64> {
    qkv[place * 3 * C..place * 3 * C + C].iter().map(|v| f64::from(*v)).collect()
}

fn worst(got: &HostTensor, want: impl Fn(usize, usize) -> Vec<f64>) -> f64 {
    let places = got.dim(1);
    let mut worst = 0f64;
    for sample in 0..got.dim(0) {
        for place in 0..places {
            let row = &got.row(sample)[place * C..(place + 1) * C];
            let differences = row.iter().zip(want(sample, place)).map(|(a, b)| (f64::from(*a) - b).abs());
            worst = differences.fold(worst, f64::max);
        }
    }
    worst
}

/// Query tile `i` looks at run `i` of neighbouring tokens.
#[test]
fn hypertile_attends_by_tiles() {
    let (h, w) = (8, 8);
    let (_, qkv, got) = ask(&HyperTile::new(4, 1, 0, false), (h, w), "input_blocks.1");
    let got = got.expect("a tiled block");
    let want = |sample: usize, place: usize| {
        let tile = place / w / 4 * 2 + place % w / 4;
        let keys: Vec<usize> = (tile * 16..(tile + 1) * 16).collect();
        attend(&query(qkv.row(sample), place), qkv.row(sample), &keys)
    };
    let worst = worst(&got, want);
    println!("HyperTile: {worst:.1e}");
    assert!(worst < TOLERANCE, "{worst:e}");
    let (.., small) = ask(&HyperTile::new(16, 1, 0, false), (h, w), "input_blocks.1");
    assert!(small.is_none(), "one tile is no tiling");
}

/// With nothing merged away but equal tokens, the result is that of plain attention.
#[test]
fn merging_shares_the_mean_query() {
    let (h, w) = (6, 4);
    let (normed, qkv, got) = ask(&TokenMerging::new(0.5), (h, w), "input_blocks.1");
    let got = got.expect("a block at full size");
    // The groups that share a result, told by equal rows.
    let row = |sample: usize, place: usize| &got.row(sample)[place * C..(place + 1) * C];
    let all: Vec<usize> = (0..h * w).collect();
    let want = |sample: usize, place: usize| {
        let group: Vec<usize> =
            all.iter().copied().filter(|p| row(sample, *p) == row(sample, place)).collect();
        let mut mean = vec![0.0; C];
        for member in &group {
            mean.iter_mut()
                .zip(query(qkv.row(sample), *member))
                .for_each(|(m, v)| *m += v / group.len() as f64);
        }
        attend(&mean, qkv.row(sample), &all)
    };
    let worst = worst(&got, want);
    println!("token merging: {worst:.1e}");
    assert!(worst < TOLERANCE, "{worst:e}");
    for sample in 0..2 {
        let mut results: Vec<Vec<u32>> =
            all.iter().map(|p| row(sample, *p).iter().map(|v| v.to_bits()).collect()).collect();
        results.sort_unstable();
        results.dedup();
        assert_eq!(results.len(), h * w / 2, "half of the tokens are merged away");
    }
    assert_eq!(normed.dim(1), h * w);
}

#[test]
fn perturbed_attention_passes_values() {
    let (_, qkv, got) = ask(&ValuesOnly, (3, 5), "middle_block.0");
    let value = |sample: usize, place: usize| {
        qkv.row(sample)[place * 3 * C + 2 * C..(place + 1) * 3 * C].iter().map(|v| f64::from(*v)).collect()
    };
    assert_eq!(worst(&got.unwrap(), value), 0.0);
    assert!(ask(&ValuesOnly, (3, 5), "input_blocks.4").2.is_none());
}
