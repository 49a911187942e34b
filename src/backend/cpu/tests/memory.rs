//! Memory accounts, steady state, and determinism.

use super::*;

/// A few layers of different shapes, as a denoise step would run them.
fn step(b: &CpuBackend, w: &(ConvWeight, LinearWeight, NormWeight)) -> Vec<f32> {
    let mut rng = Rng(20);
    let x = b.random(Shape::nhwc(2, 16, 16, 64), &mut rng);
    let mut normed = b.poisoned(x.shape());
    b.group_norm(&GroupNorm { x: &x, x2: None, w: &w.2, groups: 32, eps: 1e-5, silu: true }, &mut normed)
        .unwrap();
    let mut y = b.poisoned(x.shape());
    b.conv2d(&Conv2d { residual: Some(&x), ..Conv2d::new(&normed, &w.0) }, &mut y).unwrap();
    y.reshape(y.shape().as_tokens()).unwrap();
    let mut qkv = b.poisoned(y.shape().with_channels(192));
    b.linear(&Linear::new(&y, &w.1), &mut qkv).unwrap();
    let mut out = b.poisoned(y.shape());
    let cols = |start| Cols::range(&qkv, start, 64);
    let op = Attention { q: cols(0), k: cols(64), v: cols(128), heads: 2, is_causal: false, scale: 0.2 };
    b.attention(&op, &mut out).unwrap();
    b.get(&out)
}

fn weights(b: &CpuBackend) -> (ConvWeight, LinearWeight, NormWeight) {
    let mut rng = Rng(21);
    let conv = Stored::random(DType::F16, &[64, 64, 3, 3], &mut rng);
    let linear = Stored::random(DType::F16, &[192, 64], &mut rng);
    let norm = Stored::random(DType::F32, &[64], &mut rng);
    let parts = LinearParts { weights: &[linear.raw()], biases: &[], is_geglu: false };
    (
        b.pack_conv(&conv.raw(), None).unwrap(),
        b.pack_linear(&parts).unwrap(),
        b.pack_norm(&norm.raw(), &norm.raw()).unwrap(),
    )
}

#[test]
fn a_repeated_step_allocates_nothing() {
    let b = CpuBackend::new(CpuOptions { threads: Some(2), ..CpuOptions::default() }).unwrap();
    let w = weights(&b);
    let first = step(&b, &w);
    let after_first = b.memory();
    for _ in 0..4 {
        assert_eq!(step(&b, &w), first);
    }
    let m = b.memory();
    assert_eq!(m.system_allocations, after_first.system_allocations);
    assert_eq!((m.activations, m.peak), (0, after_first.peak));
    b.trim();
    assert_eq!(b.memory().cached, 0);
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    for isa in Isa::available() {
        for bf16 in [false, true] {
            let run = |threads| {
                let options = CpuOptions { threads: Some(threads), bf16, memory_limit: None };
                let b = CpuBackend::with_isa(options, isa).unwrap();
                let w = weights(&b);
                step(&b, &w)
            };
            let one = run(1);
            for threads in [2, 3, 7] {
                let same = one.iter().zip(&run(threads)).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same, "{isa:?}, bf16 {bf16}: {threads} threads differ from 1");
            }
        }
    }
}

#[test]
fn large_convolutions_do_not_depend_on_the_number_of_threads() {
    let run = |threads| {
        let options = CpuOptions { threads: Some(threads), ..CpuOptions::default() };
        let b = CpuBackend::new(options).unwrap();
        let mut rng = Rng(23);
        let weight = Stored::random(DType::F16, &[40, 400, 3, 3], &mut rng);
        let w = b.pack_conv(&weight.raw(), None).unwrap();
        let x = b.random(Shape::nhwc(1, 9, 40, 400), &mut rng);
        let mut out = b.poisoned(Shape::nhwc(1, 9, 40, 40));
        b.conv2d(&Conv2d::new(&x, &w), &mut out).unwrap();
        b.get(&out)
    };
    let one = run(1);
    for threads in [2, 5, 16, 64] {
        assert_eq!(one, run(threads), "{threads} threads differ from 1");
    }
}

#[test]
fn weights_are_counted_while_alive() {
    let b = CpuBackend::new(CpuOptions { threads: Some(1), ..CpuOptions::default() }).unwrap();
    let weight = Stored::random(DType::F16, &[40, 8, 3, 3], &mut Rng(22));
    let w = b.pack_conv(&weight.raw(), None).unwrap();
    // 40 outputs are two panels of 32; 72 inputs; two bytes.
    assert_eq!(b.memory().weights, 64 * 72 * 2);
    drop(w);
    assert_eq!(b.memory().weights, 0);
}

#[test]
fn the_memory_limit_is_an_error() {
    let options = CpuOptions { threads: Some(1), bf16: false, memory_limit: Some(1 << 20) };
    let b = CpuBackend::new(options).unwrap();
    let t = b.alloc(Shape::nhwc(1, 256, 256, 4));
    assert!(t.is_ok());
    assert!(matches!(b.alloc(Shape::nhwc(1, 1, 1, 1)), Err(TensorError::OutOfMemory { .. })));
    assert!(matches!(b.alloc(Shape::nhwc(usize::MAX, 2, 2, 2)), Err(TensorError::OutOfMemory { .. })));
}
