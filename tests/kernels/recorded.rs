//! Recorded work: products that fetch weights while the kernels before them still run, no such kernel being the one that makes
//! the weights; and what it leaves beside its result.

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;

use kiln::backend::cuda::launch::elementwise::{Axpby, axpby};
use kiln::backend::cuda::launch::epilogue::{Epilogue, Rows};
use kiln::backend::cuda::launch::gemm::Gemm;
use kiln::backend::cuda::launch::gemm_sm90;
use kiln::backend::cuda::{CudaBackend, Element, Gpu, Shared};
use kiln::driver::simt::{SimtDriver, SimtOptions};
use kiln::driver::toolchain::SimtVariant;
use kiln::driver::{Capability, Driver};
use kiln::tensor::{
    Backend, DType, HostLayout, Linear, LinearParts, LinearWeight, Outcome, RawTensor, Shape, Tensor,
};

use crate::library;

/// Rows and columns of all matrices.
const SIDE: usize = 128;

/// A Hopper device under the checked build.
fn hopper() -> Arc<SimtDriver> {
    let capability = Capability { major: 9, minor: 0 };
    let options = SimtOptions { capability, ..SimtOptions::default() };
    Arc::new(SimtDriver::open(&library(SimtVariant::Checked), options).expect("the library loads"))
}

fn backend() -> CudaBackend {
    CudaBackend::new(Shared::new(Arc::new(Gpu::new(hopper()).unwrap()), None), Element::F16)
}

fn values(seed: usize) -> Vec<f32> {
    (0..SIDE * SIDE).map(|i| ((i * 7 + seed) % 23) as f32 / 64.0 - 0.17).collect()
}

fn pack(backend: &CudaBackend, seed: usize) -> Result<LinearWeight, kiln::tensor::TensorError> {
    let bytes = Cow::Owned(bytemuck::cast_slice(&values(seed)).to_vec());
    let raw = RawTensor { dtype: DType::F32, shape: &[SIDE, SIDE], bytes };
    backend.pack_linear(&LinearParts { weights: &[raw], biases: &[], is_geglu: false })
}

/// Weights that the device packed are complete when a recording that fetches them early begins.
#[test]
fn recorded_products_may_fetch_packed_weights_early() {
    let backend = backend();
    let shape = Shape { n: 1, h: 1, w: SIDE, c: SIDE };
    let mut x = backend.alloc(shape).unwrap();
    backend.upload(&values(3), HostLayout::Nhwc, &mut x).unwrap();
    let weights = [1, 2].map(|seed| pack(&backend, seed).unwrap());
    let mut results = Vec::new();
    for _ in 0..3 {
        let out = backend
            .record(7, &[&x], &mut |inputs| {
                let mut between = backend.alloc(shape)?;
                backend.linear(&Linear::new(inputs[0], &weights[0]), &mut between)?;
                let mut out = backend.alloc(shape)?;
                backend.linear(&Linear::new(&between, &weights[1]), &mut out)?;
                Ok(out.into())
            })
            .unwrap()
            .result;
        let mut host = vec![0.0; SIDE * SIDE];
        backend.download(&out, HostLayout::Nhwc, &mut host).unwrap();
        results.push(host);
    }
    assert!(results[0].iter().any(|v| *v != 0.0));
    assert!(results[1] == results[0] && results[2] == results[0], "plain, captured, replayed");
}

/// What a part of the work leaves is every call's own, whether that was run, captured or replayed.
#[test]
fn what_recorded_work_leaves_is_the_caller_s() {
    let backend = backend();
    let shape = Shape { n: 1, h: 1, w: SIDE, c: SIDE };
    let mut calls = Vec::new();
    for seed in 3..8 {
        let mut x = backend.alloc(shape).unwrap();
        backend.upload(&values(seed), HostLayout::Nhwc, &mut x).unwrap();
        let outcome = backend.record(9, &[&x], &mut |inputs| {
            let [mut result, mut left] = [backend.alloc(shape)?, backend.alloc(shape)?];
            backend.axpby(2.0, inputs[0], 0.0, inputs[0], &mut result)?;
            backend.axpby(1.0, &result, 1.0, inputs[0], &mut left)?;
            Ok(Outcome { result, beside: vec![None, Some(left)] })
        });
        calls.push((x, outcome.unwrap()));
    }
    // All were queued before the first is read.
    let read = |t: &Tensor| {
        let mut host = vec![0.0; SIDE * SIDE];
        backend.download(t, HostLayout::Nhwc, &mut host).unwrap();
        host
    };
    for (x, Outcome { result, beside }) in &calls {
        let [None, Some(left)] = beside.as_slice() else { panic!("one of two parts left something") };
        let (x, result, left) = (read(x), read(result), read(left));
        assert!(x.iter().zip(&result).all(|(x, y)| *y == 2.0 * x) && x.iter().any(|v| *v != 0.0));
        // 3x has two bits more than x, and is rounded once.
        assert!(x.iter().zip(&left).all(|(x, y)| (y - 3.0 * x).abs() <= x.abs() * 2f32.powi(-9)));
    }
}

/// A weight that is packed during a capture would be written by a kernel of the graph: such work runs plainly.
#[test]
fn no_weight_is_packed_while_work_is_captured() {
    let backend = backend();
    let shape = Shape { n: 1, h: 1, w: SIDE, c: SIDE };
    let mut x = backend.alloc(shape).unwrap();
    backend.upload(&values(3), HostLayout::Nhwc, &mut x).unwrap();
    let runs = AtomicUsize::new(0);
    let run = || {
        backend.record(8, &[&x], &mut |inputs| {
            let weight = pack(&backend, 1)?;
            let mut out = backend.alloc(shape)?;
            backend.linear(&Linear::new(inputs[0], &weight), &mut out)?;
            runs.fetch_add(1, Relaxed);
            Ok(out.into())
        })
    };
    let results = [(); 3].map(|()| {
        let mut host = vec![0.0; SIDE * SIDE];
        backend.download(&run().unwrap().result, HostLayout::Nhwc, &mut host).unwrap();
        host
    });
    assert_eq!(runs.load(Relaxed), 3, "each was run plainly to its end, none captured");
    assert!(results[0].iter().any(|v| *v != 0.0) && results[1] == results[0] && results[2] == results[0]);
}

/// The layer sees it when a product calls constant what the kernel before it writes.
#[test]
fn a_weight_that_is_not_constant_is_found() {
    let driver = hopper();
    let gpu = Gpu::new(driver.clone()).unwrap();
    let stream = gpu.stream();
    let [x, w, out] = [0; 3].map(|_| driver.alloc(2 * SIDE * SIDE, stream).unwrap());
    driver.upload(x, &[0x00, 0x38].repeat(SIDE * SIDE), stream).unwrap();
    let run = |w_is_constant| {
        axpby(&gpu, &Axpby { x, y: x, out: w, count: SIDE * SIDE, a: 0.5, b: 0.25, element: Element::F16 })?;
        let rows = |ptr| Rows::new(ptr, SIDE);
        gemm_sm90::gemm(
            &gpu,
            &Gemm {
                x: rows(x),
                x2: None,
                w,
                w_is_constant,
                m: SIDE,
                n: SIDE,
                k1: SIDE,
                k2: 0,
                rows_per_sample: SIDE,
                element: Element::F16,
                epilogue: Epilogue::to(rows(out)),
            },
        )
    };
    run(false).unwrap();
    driver.synchronize(stream).unwrap();
    let error = run(true).unwrap_err().to_string();
    assert!(error.contains("read after unordered write"), "{error}");
}
