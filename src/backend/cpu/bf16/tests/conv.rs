use super::super::*;
use super::{Expected, Random, expect_close};
use half::bf16;

#[derive(Clone, Copy, Debug)]
struct Case {
    batch: usize,
    size: [usize; 2],
    channels: [usize; 2],
    cout: usize,
    window: [usize; 2],
    geometry: Geometry,
    is_upsampled: bool,
    seed: u64,
}

const PLAIN: Case = Case {
    batch: 1,
    size: [8, 8],
    channels: [32, 0],
    cout: 32,
    window: [3, 3],
    geometry: Geometry { stride: 1, top: 1, left: 1, bottom: 1, right: 1 },
    is_upsampled: false,
    seed: 1,
};

/// A buffer that ends in NaN, so that reading past the data shows.
fn poisoned_tail(random: &mut Random, len: usize) -> Vec<bf16> {
    let mut data = random.bf16s(len);
    data.extend([bf16::NAN; 64]);
    data
}

fn check_case(tier: Tier, case: Case) {
    let Case { batch, size: [h, w], channels: [c1, c2], cout, window: [kh, kw], geometry, .. } = case;
    let mut random = Random(case.seed * 31 + 7);
    let cin = c1 + c2;
    let first = poisoned_tail(&mut random, batch * h * w * c1);
    let second = poisoned_tail(&mut random, batch * h * w * c2);
    let weights = random.bf16s(cout * cin * kh * kw);
    let shape = KernelShape { cout, cin, height: kh, width: kw };
    let packed = PackedB::conv(Weights::Bf16(&weights), shape).unwrap();
    let up = if case.is_upsampled { 2 } else { 1 };
    let [ho, wo] = geometry.output_size([kh, kw], h * up, w * up).unwrap();
    let (bias, time) = (random.f32s(cout), random.bf16s(batch * cout));
    let residual = random.bf16s(batch * ho * wo * cout);
    let has = random.next();
    let epilogue = Epilogue {
        bias: (has & 1 == 1).then_some(&bias),
        group_bias: (has & 2 == 2).then_some((GroupBias::Bf16(&time), 1)),
        activation: if has & 4 == 4 { Activation::Silu } else { Activation::None },
        scale: if has & 8 == 8 { 0.5 } else { 1.0 },
        residual: (has & 16 == 16).then_some(Rows { data: &residual, stride: cout }),
    };
    let input = ConvInput {
        batch,
        height: h,
        width: w,
        first: &first,
        first_channels: c1,
        second: (c2 > 0).then_some(&second),
        is_upsampled: case.is_upsampled,
    };
    let is_f32 = has & 32 == 32;
    let mut out16 = vec![bf16::NAN; batch * ho * wo * cout];
    let mut out32 = vec![f32::NAN; batch * ho * wo * cout];
    let out = if is_f32 { Output::f32(&mut out32, cout) } else { Output::bf16(&mut out16, cout) };
    conv2d(tier, &input, geometry, &packed, &epilogue, out).unwrap();
    let pixel = |n: usize, y: isize, x: isize, c: usize| {
        if y < 0 || x < 0 || y >= (h * up) as isize || x >= (w * up) as isize {
            return 0.0;
        }
        let at = (n * h + y as usize / up) * w + x as usize / up;
        if c < c1 { first[at * c1 + c].to_f64() } else { second[at * c2 + c - c1].to_f64() }
    };
    // Large cases are sampled: every 97th output, and both ends.
    let total = batch * ho * wo * cout;
    let step = if total * cin * kh * kw > 1 << 24 { 97 } else { 1 };
    for at in (0..total).filter(|i| i % step == 0 || *i < 64 || total - i < 64) {
        let (o, p) = (at % cout, at / cout);
        let (n, y, x) = (p / (ho * wo), p / wo % ho, p % wo);
        let mut s = Expected::default();
        for (ky, kx, c) in
            (0..kh).flat_map(|ky| (0..kw).flat_map(move |kx| (0..cin).map(move |c| (ky, kx, c))))
        {
            let yy = (y * geometry.stride + ky) as isize - geometry.top as isize;
            let xx = (x * geometry.stride + kx) as isize - geometry.left as isize;
            let product = pixel(n, yy, xx, c) * weights[((o * cin + c) * kh + ky) * kw + kx].to_f64();
            s = Expected { value: s.value + product, magnitude: s.magnitude + product.abs() };
        }
        let mut v = s.value + epilogue.bias.map_or(0.0, |b| f64::from(b[o]));
        v += if epilogue.group_bias.is_some() { time[n * cout + o].to_f64() } else { 0.0 };
        v = if epilogue.activation == Activation::Silu { v / (1.0 + (-v).exp()) } else { v };
        v *= f64::from(epilogue.scale);
        s.magnitude += v.abs();
        v += if epilogue.residual.is_some() { residual[at].to_f64() } else { 0.0 };
        let got = if is_f32 { out32[at] } else { out16[at].to_f32() };
        let place = format!("{tier:?} {case:?} at n {n} y {y} x {x} o {o}");
        expect_close(got, Expected { value: v, magnitude: s.magnitude }, is_f32, &place);
    }
}

fn cases() -> Vec<Case> {
    let down = Geometry { stride: 2, top: 1, left: 1, bottom: 1, right: 1 };
    let vae_down = Geometry { stride: 2, top: 0, left: 0, bottom: 1, right: 1 };
    vec![
        PLAIN,
        Case { size: [5, 7], channels: [4, 0], cout: 3, seed: 2, ..PLAIN },
        Case { size: [64, 64], channels: [4, 0], cout: 320, seed: 3, ..PLAIN },
        Case { size: [16, 16], channels: [64, 0], cout: 48, batch: 3, seed: 4, ..PLAIN },
        Case { size: [8, 8], channels: [320, 0], cout: 64, batch: 2, seed: 5, ..PLAIN },
        Case { size: [16, 16], channels: [96, 40], cout: 50, batch: 2, seed: 6, ..PLAIN },
        Case { size: [16, 16], channels: [64, 0], cout: 32, geometry: down, batch: 2, seed: 7, ..PLAIN },
        Case { size: [31, 17], channels: [20, 0], cout: 20, geometry: vae_down, seed: 8, ..PLAIN },
        Case { size: [9, 12], channels: [40, 24], cout: 36, is_upsampled: true, seed: 9, ..PLAIN },
        Case { size: [20, 300], channels: [512, 0], cout: 16, seed: 10, ..PLAIN },
        Case { size: [70, 70], channels: [256, 64], cout: 4, batch: 2, seed: 11, ..PLAIN },
        Case {
            size: [6, 6],
            channels: [33, 0],
            cout: 17,
            window: [1, 1],
            geometry: Geometry::same(0),
            seed: 12,
            ..PLAIN
        },
        Case {
            size: [6, 6],
            channels: [16, 17],
            cout: 17,
            window: [1, 1],
            geometry: Geometry::same(0),
            seed: 13,
            ..PLAIN
        },
        Case {
            size: [12, 12],
            channels: [8, 0],
            cout: 8,
            window: [5, 4],
            geometry: Geometry::same(2),
            seed: 14,
            ..PLAIN
        },
        Case { size: [8, 8], channels: [1280, 0], cout: 64, batch: 2, seed: 15, ..PLAIN },
        Case { size: [40, 24], channels: [48, 0], cout: 32, seed: 16, is_upsampled: true, batch: 2, ..PLAIN },
        Case { size: [9, 9], channels: [1300, 700], cout: 40, batch: 2, seed: 19, ..PLAIN },
        Case { size: [3, 3], channels: [32, 0], cout: 32, batch: 5, seed: 17, ..PLAIN },
        Case {
            size: [16, 16],
            channels: [16, 0],
            cout: 16,
            window: [1, 1],
            geometry: Geometry { stride: 2, ..Geometry::same(0) },
            seed: 18,
            ..PLAIN
        },
    ]
}

fn check_tier(tier: Tier) {
    if !tier.is_available() {
        eprintln!("{tier:?} skipped: not available on this CPU");
        return;
    }
    for case in cases() {
        check_case(tier, case);
    }
    let mut random = Random(77);
    for seed in 100..140 {
        let mut draw = |limit: u64| 1 + (random.next() % limit) as usize;
        let case = Case {
            batch: draw(3),
            size: [draw(20), draw(40)],
            channels: [draw(70), draw(50) - 1],
            cout: draw(70),
            window: [draw(3), draw(3)],
            geometry: Geometry {
                stride: draw(2),
                top: draw(3),
                left: draw(3),
                bottom: draw(3),
                right: draw(3),
            },
            is_upsampled: draw(3) == 1,
            seed,
        };
        check_case(tier, case);
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
fn mismatched_operands_are_errors() {
    let packed =
        PackedB::conv(Weights::F32(&[0.0; 72]), KernelShape { cout: 2, cin: 4, height: 3, width: 3 })
            .unwrap();
    let data = [bf16::ONE; 16];
    let call = |shape, geometry| {
        let mut out = [bf16::ZERO; 64];
        let input = ConvInput::plain(&data, shape);
        conv2d(Tier::detect(), &input, geometry, &packed, &Epilogue::default(), Output::bf16(&mut out, 2))
    };
    assert!(call([1, 2, 2, 4], Geometry::same(1)).is_ok());
    assert!(call([1, 2, 2, 4], Geometry::same(0)).is_err_and(|e| e.to_string().contains("3x3 window")));
    assert!(call([1, 2, 2, 3], Geometry::same(1)).is_err_and(|e| e.to_string().contains("input channels")));
    assert!(call([1, 2, 3, 4], Geometry::same(1)).is_err_and(|e| e.to_string().contains("first input")));
}
