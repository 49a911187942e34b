//! The backend over a driver that does its work late: what was not waited for is seen.

use std::borrow::Cow;
use std::sync::Arc;

use kiln::backend::cuda::{CudaBackend, Element, Gpu, Shared};
use kiln::tensor::{Backend, DType, HostLayout, Linear, LinearParts, LinearWeight, RawTensor, Shape, Tensor};

use crate::{complete, in_child, in_child_with, open, stand_in_alive};

#[test]
fn weights_pass_through_the_pinned_buffers_whole() {
    in_child("late::child_uploads_weights", complete);
}

/// The same where nobody waits for a buffer before it is filled again: the test must see it.
#[test]
fn a_buffer_that_is_filled_too_early_is_seen() {
    in_child_with("late::child_uploads_weights", complete, &[("SIMULATED_CUDA_HASTY", "1")]);
}

#[test]
fn recorded_work_takes_its_inputs_in_time() {
    in_child("late::child_replays", complete);
}

fn backend() -> CudaBackend {
    CudaBackend::new(Shared::new(Arc::new(Gpu::new(Arc::new(open())).unwrap()), None), Element::F16)
}

/// A layer whose row `n` has a single one, in column `n % k`: whatever is out of place changes the result.
fn pack(backend: &CudaBackend, [n, k]: [usize; 2]) -> LinearWeight {
    let mut values = vec![0.0f32; n * k];
    for row in 0..n {
        values[row * k + row % k] = 1.0 + (row / k) as f32;
    }
    let raw =
        RawTensor { dtype: DType::F32, shape: &[n, k], bytes: Cow::Borrowed(bytemuck::cast_slice(&values)) };
    let weight = backend.pack_linear(&LinearParts { weights: &[raw], biases: &[], is_geglu: false }).unwrap();
    // Nobody reads the memory any more once the call has returned.
    values.fill(f32::NAN);
    weight
}

fn input(backend: &CudaBackend, [rows, columns]: [usize; 2], seed: usize) -> (Tensor, Vec<f32>) {
    let values: Vec<f32> = (0..rows * columns).map(|i| ((i * 7 + seed) % 251) as f32 / 8.0).collect();
    let mut x = backend.alloc(Shape { n: 1, h: 1, w: rows, c: columns }).unwrap();
    let mut given = values.clone();
    backend.upload(&given, HostLayout::Nhwc, &mut x).unwrap();
    given.fill(f32::NAN);
    (x, values)
}

fn read(backend: &CudaBackend, x: &Tensor) -> Vec<f32> {
    let mut host = vec![0.0; x.shape().len()];
    backend.download(x, HostLayout::Nhwc, &mut host).unwrap();
    host
}

#[test]
#[ignore = "a child of weights_pass_through_the_pinned_buffers_whole"]
fn child_uploads_weights() {
    let backend = backend();
    // 18 MB: both buffers of 4 MiB are used again and again.
    let [n, k] = [3000, 1536];
    let weight = pack(&backend, [n, k]);
    let (x, values) = input(&backend, [2, k], 3);
    let mut out = backend.alloc(Shape { n: 1, h: 1, w: 2, c: n }).unwrap();
    backend.linear(&Linear::new(&x, &weight), &mut out).unwrap();
    let got = read(&backend, &out);
    let wrong = got.iter().enumerate().find(|(i, value)| {
        let (row, column) = (i / n, i % n);
        **value != values[row * k + column % k] * (1.0 + (column / k) as f32)
    });
    assert_eq!(wrong.is_some(), std::env::var_os("SIMULATED_CUDA_HASTY").is_some(), "{wrong:?}");
    drop((x, out, weight, backend));
    assert_eq!(stand_in_alive(), 0, "objects were left behind");
}

#[test]
#[ignore = "a child of recorded_work_takes_its_inputs_in_time"]
fn child_replays() {
    let backend = backend();
    let side = 64;
    let weight = pack(&backend, [side, side]);
    let shape = Shape { n: 1, h: 1, w: side, c: side };
    // Every call has another input, and all are queued before the first result is read.
    let mut results = Vec::new();
    for seed in 0..5 {
        let (x, values) = input(&backend, [side, side], seed);
        let out = backend
            .record(7, &[&x], &mut |inputs| {
                let mut between = backend.alloc(shape)?;
                backend.linear(&Linear::new(inputs[0], &weight), &mut between)?;
                let mut out = backend.alloc(shape)?;
                backend.linear(&Linear::new(&between, &weight), &mut out)?;
                Ok(out.into())
            })
            .unwrap()
            .result;
        results.push((out, values));
    }
    // Plainly, captured, and three times replayed.
    for (i, (out, values)) in results.iter().enumerate() {
        assert!(read(&backend, out) == *values, "call {i}");
    }
    drop((results, weight, backend));
    assert_eq!(stand_in_alive(), 0, "objects were left behind");
}
