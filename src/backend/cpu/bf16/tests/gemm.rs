use super::super::*;
use super::{Expected, Random, expect_close, normal_cdf};
use half::bf16;

fn activate(activation: Activation, x: f64, gate: f64) -> f64 {
    match activation {
        Activation::None => x,
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::QuickGelu => x / (1.0 + (-1.702 * x).exp()),
        Activation::Gelu => x * normal_cdf(x),
        Activation::Relu => x.max(0.0),
        Activation::LeakyRelu => x.max(f64::from(0.2f32) * x),
        Activation::Geglu => x * gate * normal_cdf(gate),
    }
}

/// Padding between the rows is poisoned: it must never reach a sum.
fn poison(stride: usize, used: usize, mut data: Vec<bf16>) -> Vec<bf16> {
    data.iter_mut().enumerate().filter(|(i, _)| i % stride >= used).for_each(|(_, v)| *v = bf16::NAN);
    data
}

fn dot(a: impl Fn(usize) -> bf16, weights: &[bf16]) -> Expected {
    let mut s = Expected::default();
    for (i, weight) in weights.iter().enumerate() {
        let product = a(i).to_f64() * weight.to_f64();
        s = Expected { value: s.value + product, magnitude: s.magnitude + product.abs() };
    }
    s
}

/// One random case: which parts of the epilogue it has is drawn from `seed`.
fn check_case(tier: Tier, (m, n, k): (usize, usize, usize), activation: Activation, seed: u64) {
    let n = if activation == Activation::Geglu { n.next_multiple_of(2) } else { n };
    let mut random = Random(seed * 7919 + 17);
    let pick = random.next();
    let split = if pick & 1 == 1 && k > 1 { k / 2 } else { k };
    let (lda, lda2) = (split + (pick >> 1 & 7) as usize, k - split + (pick >> 4 & 7) as usize);
    let a1 = poison(lda, split, random.bf16s(m * lda));
    let a2 = if split < k { poison(lda2, k - split, random.bf16s(m * lda2)) } else { Vec::new() };
    let weights = random.bf16s(n * k);
    let is_geglu = activation == Activation::Geglu;
    let columns = if is_geglu { n / 2 } else { n };
    let packed = if is_geglu {
        PackedB::geglu(Weights::Bf16(&weights), n, k).unwrap()
    } else {
        PackedB::linear(Weights::Bf16(&weights), n, k).unwrap()
    };
    let bias = random.f32s(n);
    let group_rows = m.div_ceil(3);
    let groups = random.bf16s(3 * columns);
    let groups_f32: Vec<f32> = groups.iter().map(|v| v.to_f32()).collect();
    let ldr = columns + 3;
    let residual = poison(ldr, columns, random.bf16s(m * ldr));
    let scale = if pick >> 8 & 1 == 1 { 0.75 } else { 1.0 };
    let has = |bit: u64| pick >> bit & 1 == 1;
    let group_bias = if has(12) { GroupBias::F32(&groups_f32) } else { GroupBias::Bf16(&groups) };
    let epilogue = Epilogue {
        bias: has(9).then_some(&bias),
        group_bias: (has(10) && !is_geglu).then_some((group_bias, group_rows)),
        activation,
        scale,
        residual: has(11).then_some(Rows { data: &residual, stride: ldr }),
    };
    let input = GemmInput {
        rows: m,
        first: Rows { data: &a1, stride: lda },
        first_columns: split,
        second: (split < k).then_some(Rows { data: &a2, stride: lda2 }),
    };
    let is_f32 = has(13);
    let ldo = columns + 5;
    let mut out16 = vec![bf16::NAN; m * ldo];
    let mut out32 = vec![f32::NAN; m * ldo];
    let out = if is_f32 { Output::f32(&mut out32, ldo) } else { Output::bf16(&mut out16, ldo) };
    gemm(tier, &input, &packed, &epilogue, out).unwrap();
    let a = |row: usize, i: usize| if i < split { a1[row * lda + i] } else { a2[row * lda2 + i - split] };
    let sum = |row: usize, column: usize| {
        let mut s = dot(|i| a(row, i), &weights[column * k..][..k]);
        s.value += epilogue.bias.map_or(0.0, |b| f64::from(b[column]));
        s
    };
    for row in 0..m {
        for column in 0..columns {
            let mut s = sum(row, column);
            if epilogue.group_bias.is_some() {
                s.value += groups[row / group_rows * columns + column].to_f64();
            }
            let gate = if is_geglu { sum(row, columns + column) } else { Expected::default() };
            let mut value = activate(activation, s.value, gate.value) * f64::from(scale);
            if is_geglu {
                s.magnitude = s.magnitude * gate.value.abs().max(1.0) + gate.magnitude * s.value.abs();
            }
            if epilogue.residual.is_some() {
                s.magnitude += value.abs();
                value += residual[row * ldr + column].to_f64();
            }
            let at = row * ldo + column;
            let got = if is_f32 { out32[at] } else { out16[at].to_f32() };
            let expected = Expected { value, magnitude: s.magnitude };
            let place = format!("{tier:?} {m}x{n}x{k} {activation:?} seed {seed} at ({row}, {column})");
            expect_close(got, expected, is_f32, &place);
        }
        // The gap between output rows is untouched.
        let gap = row * ldo + columns..(row + 1) * ldo;
        assert!(if is_f32 {
            out32[gap].iter().all(|v| v.is_nan())
        } else {
            out16[gap].iter().all(|v| v.is_nan())
        });
    }
}

const ACTIVATIONS: [Activation; 7] = [
    Activation::None,
    Activation::Silu,
    Activation::Gelu,
    Activation::QuickGelu,
    Activation::Relu,
    Activation::LeakyRelu,
    Activation::Geglu,
];

fn check_tier(tier: Tier) {
    if !tier.is_available() {
        eprintln!("{tier:?} skipped: not available on this CPU");
        return;
    }
    let shapes = [
        (1, 2, 1),
        (2, 320, 320),
        (3, 4, 31),
        (16, 16, 32),
        (17, 33, 33),
        (32, 64, 64),
        (77, 50, 100),
        (100, 98, 320),
        (154, 64, 768),
        (70, 40, 5000),
        (130, 34, 5200),
        (1100, 34, 40),
    ];
    for (i, shape) in shapes.into_iter().enumerate() {
        for (j, activation) in ACTIVATIONS.into_iter().enumerate() {
            check_case(tier, shape, activation, (i * 8 + j) as u64);
        }
    }
    let mut random = Random(5);
    for seed in 100..140 {
        let mut draw = |limit: u64| 1 + (random.next() % limit) as usize;
        check_case(tier, (draw(90), 2 * draw(40), draw(150)), ACTIVATIONS[seed as usize % 7], seed);
    }
}

#[test]
fn amx_matches_f64() {
    check_tier(Tier::Amx);
}

#[test]
fn avx512_matches_f64() {
    check_tier(Tier::Avx512Bf16);
}

#[test]
fn portable_matches_f64() {
    check_tier(Tier::Portable);
}

#[test]
fn all_weight_types_pack_alike() {
    let mut random = Random(9);
    let rounded = random.bf16s(40 * 70);
    let f32s: Vec<f32> = rounded.iter().map(|v| v.to_f32()).collect();
    let f16s: Vec<half::f16> = f32s.iter().map(|&v| half::f16::from_f32(v)).collect();
    let a = random.bf16s(20 * 70);
    let run = |weights: Weights| {
        let b = PackedB::linear(weights, 40, 70).unwrap();
        let mut out = vec![f32::NAN; 20 * 40];
        let out_ref = Output::f32(&mut out, 40);
        gemm(Tier::detect(), &GemmInput::dense(&a, 20, 70), &b, &Epilogue::default(), out_ref).unwrap();
        out
    };
    let from_bf16 = run(Weights::Bf16(&rounded));
    assert_eq!(from_bf16, run(Weights::F32(&f32s)));
    // bf16 values in ±1 lose low bits in f16 only below 2⁻¹⁴.
    let worst =
        run(Weights::F16(&f16s)).iter().zip(&from_bf16).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 1e-3, "{worst}");
}

#[test]
fn short_slices_are_errors() {
    let b = PackedB::linear(Weights::F32(&[1.0; 12]), 3, 4).unwrap();
    let a = [bf16::ONE; 8];
    let mut out = [bf16::ZERO; 5];
    let call = |rows, out: &mut [bf16]| {
        gemm(Tier::detect(), &GemmInput::dense(&a, rows, 4), &b, &Epilogue::default(), Output::bf16(out, 3))
    };
    assert!(call(2, &mut out).is_err_and(|e| e.to_string().contains("output is 5, needs 6")));
    assert!(
        call(3, &mut [bf16::ZERO; 9]).is_err_and(|e| e.to_string().contains("first input is 8, needs 12"))
    );
    assert!(call(1, &mut out).is_ok());
}

#[test]
fn results_do_not_depend_on_the_thread_count() {
    let mut random = Random(3);
    let (m, n, k) = (200, 320, 320);
    let (a, w) = (random.bf16s(m * k), random.bf16s(n * k));
    let b = PackedB::linear(Weights::Bf16(&w), n, k).unwrap();
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let mut out = vec![bf16::NAN; m * n];
        let input = GemmInput::dense(&a, m, k);
        pool.install(|| {
            gemm(Tier::detect(), &input, &b, &Epilogue::default(), Output::bf16(&mut out, n)).unwrap()
        });
        out
    };
    assert_eq!(run(1), run(2));
    assert_eq!(run(1), run(5));
}
