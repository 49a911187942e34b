//! Convolution and linear layers.

use super::*;

/// A convolution test case.
#[derive(Clone, Copy, Debug)]
struct Case {
    x: (usize, usize, usize, usize),
    c2: usize,
    cout: usize,
    kernel: usize,
    stride: usize,
    pad: Pad,
    up: bool,
    time_bias: bool,
    residual: bool,
    act: Activation,
    scale: f32,
    dtype: DType,
}

const PLAIN: Case = Case {
    x: (1, 8, 8, 16),
    c2: 0,
    cout: 32,
    kernel: 3,
    stride: 1,
    pad: Pad { top: 1, left: 1, bottom: 1, right: 1 },
    up: false,
    time_bias: false,
    residual: false,
    act: Activation::None,
    scale: 1.0,
    dtype: DType::F16,
};

fn conv_case(b: &CpuBackend, case: Case, rng: &mut Rng) {
    let (n, h, w, c) = case.x;
    let x = b.random(Shape::nhwc(n, h, w, c), rng);
    let x2 = (case.c2 > 0).then(|| b.random(Shape::nhwc(n, h, w, case.c2), rng));
    let cin = c + case.c2;
    let weight = Stored::random(case.dtype, &[case.cout, cin, case.kernel, case.kernel], rng);
    let bias = Stored::random(case.dtype, &[case.cout], rng);
    let packed = b.pack_conv(&weight.raw(), Some(&bias.raw())).unwrap();
    let time = b.random(Shape::nhwc(n, 1, 1, case.cout + 7), rng);
    let mut op = Conv2d { stride: case.stride, pad: case.pad, act: case.act, ..Conv2d::new(&x, &packed) };
    op.x2 = x2.as_ref();
    op.upsample2x = case.up;
    op.scale = case.scale;
    op.time_bias = case.time_bias.then(|| Cols::range(&time, 5, case.cout));
    let s = op.out_shape().unwrap();
    let residual = b.random(s, rng);
    op.residual = case.residual.then_some(&residual);
    let mut out = b.poisoned(s);
    b.conv2d(&op, &mut out).unwrap();

    let (xv, x2v) = (b.get(&x), x2.as_ref().map(|t| b.get(t)).unwrap_or_default());
    let (tv, rv) = (b.get(&time), b.get(&residual));
    let up = if case.up { 2 } else { 1 };
    let wv = b.seen(&weight.values);
    let mut reference = Vec::with_capacity(s.len());
    for i in 0..s.rows() {
        let (sample, oy, ox) = (i / s.positions(), i / s.w % s.h, i % s.w);
        for o in 0..case.cout {
            let mut sum = f64::from(bias.values[o]);
            for ky in 0..case.kernel {
                for kx in 0..case.kernel {
                    let (y, x) = (oy * case.stride + ky, ox * case.stride + kx);
                    if y < case.pad.top || x < case.pad.left {
                        continue;
                    }
                    let (y, x) = ((y - case.pad.top) / up, (x - case.pad.left) / up);
                    if y >= h || x >= w {
                        continue;
                    }
                    let pixel = (sample * h + y) * w + x;
                    for ci in 0..cin {
                        let v = if ci < c { xv[pixel * c + ci] } else { x2v[pixel * case.c2 + ci - c] };
                        let k = ((o * cin + ci) * case.kernel + ky) * case.kernel + kx;
                        sum += f64::from(v) * f64::from(wv[k]);
                    }
                }
            }
            if case.time_bias {
                sum += f64::from(tv[sample * (case.cout + 7) + 5 + o]);
            }
            let mut v = activation(case.act, sum) * f64::from(case.scale);
            if case.residual {
                v += f64::from(rv[i * case.cout + o]);
            }
            reference.push(v);
        }
    }
    // Sums of up to a few thousand products, each rounded to 2⁻²⁴, in blocks.
    b.check(&format!("{case:?}"), &out, &reference, 2e-6);
}

#[test]
fn convolutions_match_the_reference() {
    let none = Pad::same(0);
    let down = Pad { top: 0, left: 0, bottom: 1, right: 1 };
    let silu = Activation::Silu;
    let cases = [
        PLAIN,
        Case { x: (2, 9, 7, 5), cout: 33, ..PLAIN },
        Case { x: (2, 8, 8, 4), cout: 320, dtype: DType::F32, ..PLAIN },
        Case { x: (1, 8, 8, 320), cout: 4, dtype: DType::BF16, ..PLAIN },
        Case { x: (2, 6, 6, 24), stride: 2, residual: true, ..PLAIN },
        Case { x: (1, 9, 9, 24), stride: 2, pad: down, ..PLAIN },
        Case { x: (1, 6, 5, 24), up: true, act: silu, ..PLAIN },
        Case { x: (2, 5, 6, 40), c2: 24, cout: 70, time_bias: true, residual: true, ..PLAIN },
        Case { x: (2, 4, 4, 200), c2: 130, cout: 96, scale: 0.5, residual: true, ..PLAIN },
        Case { x: (2, 7, 7, 48), kernel: 1, pad: none, cout: 31, act: Activation::Gelu, ..PLAIN },
        Case { x: (1, 7, 7, 8), kernel: 1, pad: none, c2: 8, cout: 3, stride: 2, ..PLAIN },
        Case { x: (2, 1, 1, 64), cout: 64, time_bias: true, act: silu, residual: true, ..PLAIN },
        Case { x: (2, 5, 70, 40), c2: 300, cout: 70, time_bias: true, residual: true, ..PLAIN },
        Case { x: (1, 6, 15, 24), up: true, act: silu, cout: 40, residual: true, ..PLAIN },
        Case { x: (3, 7, 25, 350), kernel: 2, pad: down, cout: 3, time_bias: true, ..PLAIN },
        Case { x: (1, 3, 140, 330), kernel: 5, pad: Pad::same(3), cout: 33, ..PLAIN },
        Case { x: (1, 20, 30, 3), kernel: 4, pad: none, cout: 16, dtype: DType::F64, ..PLAIN },
        Case { x: (1, 12, 3, 8), kernel: 5, pad: Pad::same(2), cout: 16, dtype: DType::F8E5M2, ..PLAIN },
    ];
    let mut rng = Rng(1);
    for b in backends() {
        for case in cases {
            conv_case(&b, case, &mut rng);
        }
    }
}

#[test]
fn random_convolutions_match_the_reference() {
    let mut rng = Rng(2);
    let backends = backends();
    for i in 0..60 {
        let kernel = rng.range(1, 4);
        let case = Case {
            x: (rng.range(1, 3), rng.range(kernel, 12), rng.range(kernel, 12), rng.range(1, 70)),
            c2: if rng.range(0, 1) == 1 { rng.range(1, 40) } else { 0 },
            cout: rng.range(1, 100),
            kernel,
            stride: rng.range(1, 2),
            pad: Pad {
                top: rng.range(0, 2),
                left: rng.range(0, 2),
                bottom: rng.range(0, 2),
                right: rng.range(0, 2),
            },
            up: rng.range(0, 3) == 0,
            time_bias: rng.range(0, 1) == 1,
            residual: rng.range(0, 1) == 1,
            act: ACTIVATIONS[rng.range(0, 5)],
            scale: rng.value(),
            dtype: [DType::F16, DType::F32, DType::BF16][rng.range(0, 2)],
        };
        conv_case(&backends[i % backends.len()], case, &mut rng);
    }
}

/// A linear test case.
#[derive(Clone, Copy, Debug)]
struct LinearCase {
    m: usize,
    k: usize,
    k2: usize,
    parts: &'static [usize],
    has_bias: bool,
    is_geglu: bool,
    act: Activation,
    residual: bool,
    dtype: DType,
}

fn linear_case(b: &CpuBackend, case: LinearCase, rng: &mut Rng) {
    let (start, k) = (3, case.k + case.k2);
    let x = b.random(Shape::tokens(1, case.m, case.k + 10), rng);
    let x2 = b.random(Shape::tokens(1, case.m, case.k2 + 1), rng);
    let weights: Vec<Stored> = case.parts.iter().map(|&n| Stored::random(case.dtype, &[n, k], rng)).collect();
    let biases: Vec<Stored> = case.parts.iter().map(|&n| Stored::random(DType::F32, &[n], rng)).collect();
    let raw: Vec<RawTensor<'_>> = weights.iter().map(Stored::raw).collect();
    let raw_biases: Vec<RawTensor<'_>> = biases.iter().filter(|_| case.has_bias).map(Stored::raw).collect();
    let parts = LinearParts { weights: &raw, biases: &raw_biases, is_geglu: case.is_geglu };
    let w = b.pack_linear(&parts).unwrap();
    let rows: usize = case.parts.iter().sum();
    let n = if case.is_geglu { rows / 2 } else { rows };
    assert_eq!((w.n, w.k, w.is_geglu), (n, k, case.is_geglu));
    let shape = Shape::tokens(1, case.m, n);
    let residual = b.random(shape, rng);
    let op = Linear {
        x: Cols::range(&x, start, case.k),
        x2: (case.k2 > 0).then(|| Cols::range(&x2, 1, case.k2)),
        w: &w,
        act: case.act,
        scale: if case.residual { 0.7 } else { 1.0 },
        residual: case.residual.then_some(&residual),
    };
    let mut out = b.poisoned(shape);
    b.linear(&op, &mut out).unwrap();

    let (xv, x2v, rv) = (b.get(&x), b.get(&x2), b.get(&residual));
    let values: Vec<f32> = weights.iter().flat_map(|w| b.seen(&w.values)).collect();
    let bias: Vec<f32> = biases.iter().flat_map(|w| w.values.iter().copied()).collect();
    let dot = |i: usize, o: usize| {
        let mut sum = if case.has_bias { f64::from(bias[o]) } else { 0.0 };
        for j in 0..k {
            let a = if j < case.k {
                xv[i * (case.k + 10) + start + j]
            } else {
                x2v[i * (case.k2 + 1) + 1 + j - case.k]
            };
            sum += f64::from(a) * f64::from(values[o * k + j]);
        }
        sum
    };
    let mut reference = Vec::new();
    for i in 0..case.m {
        for o in 0..n {
            let mut v = activation(case.act, dot(i, o));
            if case.is_geglu {
                v *= activation(Activation::Gelu, dot(i, o + n));
            }
            v *= f64::from(op.scale);
            if case.residual {
                v += f64::from(rv[i * n + o]);
            }
            reference.push(v);
        }
    }
    b.check(&format!("{case:?}"), &out, &reference, 2e-6);
}

#[test]
fn linear_layers_match_the_reference() {
    let plain = LinearCase {
        m: 64,
        k: 96,
        k2: 0,
        parts: &[64],
        has_bias: true,
        is_geglu: false,
        act: Activation::None,
        residual: false,
        dtype: DType::F16,
    };
    let cases = [
        plain,
        LinearCase { m: 2, k: 1280, parts: &[320], act: Activation::Silu, ..plain },
        LinearCase { m: 77, k: 768, parts: &[48, 48, 48], residual: true, ..plain },
        LinearCase { m: 1, k: 7, parts: &[1], has_bias: false, ..plain },
        LinearCase { m: 33, k: 40, k2: 300, parts: &[50], act: Activation::Gelu, ..plain },
        LinearCase { m: 30, k: 40, parts: &[80], is_geglu: true, residual: true, ..plain },
        LinearCase { m: 15, k: 321, parts: &[150], is_geglu: true, dtype: DType::BF16, ..plain },
        LinearCase { m: 300, k: 20, parts: &[700], act: Activation::QuickGelu, dtype: DType::F32, ..plain },
        LinearCase { m: 16, k: 64, parts: &[32], dtype: DType::F8E5M2, ..plain },
    ];
    let mut rng = Rng(3);
    for b in backends() {
        for case in cases {
            linear_case(&b, case, &mut rng);
        }
        for m in 1..40 {
            linear_case(&b, LinearCase { m, k: 24, ..plain }, &mut rng);
        }
    }
}

#[test]
fn fp8_e4m3_is_exact() {
    let b = CpuBackend::new(CpuOptions { threads: Some(1), ..CpuOptions::default() }).unwrap();
    // 0x38 = 1, 0x01 = 2⁻⁹, 0x7e = 448, 0xb8 = −1, 0x08 = 2⁻⁶, 0x43 = 2.75
    let bytes = [0x38, 0x01, 0x7e, 0xb8, 0x08, 0x43];
    let raw = RawTensor { dtype: DType::F8E4M3, shape: &[6, 1], bytes: Cow::Borrowed(&bytes) };
    let parts = LinearParts { weights: &[raw], biases: &[], is_geglu: false };
    let w = b.pack_linear(&parts).unwrap();
    let x = b.put(Shape::tokens(1, 1, 1), &[1.0]);
    let mut out = b.poisoned(Shape::tokens(1, 1, 6));
    b.linear(&Linear::new(&x, &w), &mut out).unwrap();
    assert_eq!(b.get(&out), [1.0, 1.0 / 512.0, 448.0, -1.0, 1.0 / 64.0, 2.75]);
}

#[test]
fn wrong_shapes_and_types_are_errors() {
    let b = CpuBackend::new(CpuOptions { threads: Some(1), ..CpuOptions::default() }).unwrap();
    let mut rng = Rng(4);
    let weight = Stored::random(DType::F32, &[8, 4, 3, 3], &mut rng);
    let w = b.pack_conv(&weight.raw(), None).unwrap();
    let x = b.random(Shape::nhwc(1, 4, 4, 5), &mut rng);
    let mut out = b.poisoned(Shape::nhwc(1, 4, 4, 8));
    assert!(matches!(b.conv2d(&Conv2d::new(&x, &w), &mut out), Err(TensorError::Size { .. })));
    let x = b.random(Shape::nhwc(1, 4, 4, 4), &mut rng);
    let mut small = b.poisoned(Shape::nhwc(1, 4, 4, 7));
    assert!(matches!(b.conv2d(&Conv2d::new(&x, &w), &mut small), Err(TensorError::Shape { .. })));
    let op = Conv2d { stride: 0, ..Conv2d::new(&x, &w) };
    assert!(matches!(
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| b.conv2d(&op, &mut out))),
        Ok(Err(_))
    ));
    let ints = RawTensor { dtype: DType::I32, shape: &[1, 1], bytes: Cow::Borrowed(&[0; 4]) };
    let parts = LinearParts { weights: &[ints], biases: &[], is_geglu: false };
    assert!(matches!(b.pack_linear(&parts), Err(TensorError::WeightType(DType::I32))));
    let short = RawTensor { dtype: DType::F32, shape: &[2, 2], bytes: Cow::Borrowed(&[0; 12]) };
    let parts = LinearParts { weights: &[short], biases: &[], is_geglu: false };
    assert!(matches!(b.pack_linear(&parts), Err(TensorError::Size { .. })));
    let other = CpuBackend::new(CpuOptions { threads: Some(1), bf16: true, memory_limit: None }).unwrap();
    assert!(matches!(
        other.conv2d(&Conv2d::new(&x, &w), &mut out),
        Err(TensorError::Unsupported { .. } | TensorError::ForeignWeight { .. })
    ));
}
