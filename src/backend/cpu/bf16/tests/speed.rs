//! Speed tables in CPU time of one worker, all tiers:
//! `cargo test --release --lib bf16::tests::speed -- --ignored --nocapture`.
//! `KILN_TIER=avx512` or `portable` picks a tier below the best. The assertions
//! are floors that only a broken kernel misses, far under an idle core's rate.

use super::super::probe::ThreadClock;
use super::super::*;
use super::Random;
use half::bf16;

fn single(work: impl FnOnce(Tier) + Send) {
    let tier = match std::env::var("KILN_TIER").as_deref() {
        Ok("avx512") => Tier::Avx512Bf16,
        Ok("portable") => Tier::Portable,
        _ => Tier::detect(),
    };
    rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap().install(|| work(tier));
}

/// Fewest seconds of several runs.
fn best_of(runs: usize, mut work: impl FnMut()) -> f64 {
    let mut best = f64::MAX;
    for _ in 0..runs {
        let clock = ThreadClock::start();
        work();
        best = best.min(clock.elapsed().as_secs_f64());
    }
    best
}

fn report(what: &dyn std::fmt::Debug, flop: f64, seconds: f64, peak: f64) {
    let rate = flop / seconds / 1e9;
    println!("{what:?}: {rate:.0} GFLOP/s, {:.0} %, {:.3} ms", 100.0 * rate / peak, seconds * 1e3);
    assert!(rate > 0.2);
}

#[test]
#[ignore = "speed table"]
fn gemm_table() {
    single(|tier| {
        let peak = measure_peak(tier);
        println!("{tier:?} peak {peak:.0} GFLOP/s");
        for (shape, activation) in [
            ([8192, 320, 320], Activation::None),
            ([8192, 2560, 320], Activation::Geglu),
            ([8192, 320, 1280], Activation::None),
            ([2048, 640, 640], Activation::None),
            ([2048, 5120, 640], Activation::Geglu),
            ([2048, 640, 2560], Activation::None),
            ([512, 1280, 1280], Activation::None),
            ([512, 10240, 1280], Activation::Geglu),
            ([512, 1280, 5120], Activation::None),
            ([154, 1280, 768], Activation::None),
            ([154, 3072, 768], Activation::QuickGelu),
            ([154, 768, 3072], Activation::None),
            ([128, 1280, 1280], Activation::None),
            ([128, 10240, 1280], Activation::Geglu),
            ([128, 1280, 5120], Activation::None),
            ([2, 1280, 1280], Activation::None),
            ([2048, 2048, 2048], Activation::None),
        ] {
            let rate = gemm_rate(tier, shape, activation, 7).unwrap();
            let flop = 2.0 * shape.iter().map(|&v| v as f64).product::<f64>();
            report(&(shape, activation), flop, flop / rate / 1e9, peak);
        }
    });
}

#[test]
#[ignore = "speed table"]
fn conv_table() {
    single(|tier| {
        let peak = measure_peak(tier);
        let mut random = Random(1);
        for shape in [
            [2, 64, 320, 320],
            [2, 64, 640, 320],
            [2, 64, 960, 320],
            [2, 64, 640, 640],
            [2, 32, 640, 640],
            [2, 32, 1280, 640],
            [2, 32, 1920, 640],
            [2, 32, 1280, 1280],
            [2, 16, 1280, 1280],
            [2, 16, 2560, 1280],
            [2, 8, 1280, 1280],
            [2, 8, 2560, 1280],
            [2, 64, 4, 320],
            [2, 64, 320, 4],
            [1, 64, 512, 512],
            [1, 128, 512, 512],
            [1, 256, 512, 256],
            [1, 256, 256, 256],
            [1, 512, 256, 128],
            [1, 512, 128, 128],
            [1, 512, 128, 3],
        ] {
            let [batch, size, cin, cout] = shape;
            let weights = random.bf16s(cout * cin * 9);
            let kernel = KernelShape { cout, cin, height: 3, width: 3 };
            let packed = PackedB::conv(Weights::Bf16(&weights), kernel).unwrap();
            let data = random.bf16s(batch * size * size * cin);
            let input = ConvInput::plain(&data, [batch, size, size, cin]);
            let mut out = vec![bf16::ZERO; batch * size * size * cout];
            let bias = random.f32s(cout);
            let epilogue = Epilogue { bias: Some(&bias), ..Epilogue::default() };
            let seconds = best_of(4, || {
                let out = Output::bf16(&mut out, cout);
                conv2d(tier, &input, Geometry::same(1), &packed, &epilogue, out).unwrap();
            });
            report(&shape, 18.0 * (batch * size * size * cin * cout) as f64, seconds, peak);
        }
    });
}

#[test]
#[ignore = "speed table"]
fn attention_table() {
    single(|tier| {
        let peak = measure_peak(tier);
        for spread in [1.0, 40.0] {
            println!("scores spread × {spread} (a wide spread takes the path with a running maximum)");
            for shape in [
                [2, 8, 40, 4096, 4096],
                [2, 8, 80, 1024, 1024],
                [2, 8, 160, 256, 256],
                [2, 8, 160, 64, 64],
                [2, 8, 40, 4096, 77],
                [2, 8, 80, 1024, 77],
                [2, 8, 160, 256, 77],
                [1, 1, 512, 4096, 4096],
                [2, 12, 64, 77, 77],
                [1, 10, 64, 4096, 4096],
                [1, 4, 128, 2048, 2048],
            ] {
                let [batch, heads, head_dim, queries, keys] = shape;
                let width = heads * head_dim;
                let mut random = Random(1);
                let q = random.bf16s(batch * queries * width);
                let kv = random.bf16s(batch * keys * 2 * width);
                let mut out = vec![bf16::ZERO; batch * queries * width];
                let heads_at = |offset| Heads { data: &kv, stride: 2 * width, offset };
                let call = Attention {
                    batch,
                    heads,
                    head_dim,
                    queries,
                    keys,
                    q: Heads { data: &q, stride: width, offset: 0 },
                    k: heads_at(0),
                    v: heads_at(width),
                    scale: spread / (head_dim as f32).sqrt(),
                    is_causal: false,
                };
                let seconds = best_of(4, || attention(tier, &call, &mut out, width).unwrap());
                let flop = 4.0 * (batch * heads * queries * keys * head_dim) as f64;
                report(&shape, flop, seconds, peak);
            }
        }
    });
}

#[test]
#[ignore = "speed table"]
fn packing_table() {
    single(|_| {
        let mut random = Random(1);
        for (cout, cin, taps) in [(1280, 1280, 3), (1280, 5120, 1), (320, 320, 3)] {
            let shape = KernelShape { cout, cin, height: taps, width: taps };
            let wide = random.f32s(cout * cin * taps * taps);
            let narrow: Vec<half::f16> = wide.iter().map(|&v| half::f16::from_f32(v)).collect();
            for (name, weights) in [("f32", Weights::F32(&wide)), ("f16", Weights::F16(&narrow))] {
                let seconds = best_of(3, || drop(PackedB::conv(weights, shape).unwrap()));
                let rate = wide.len() as f64 / seconds / 1e9;
                println!("{shape:?} from {name}: {:.2} ms, {rate:.2} G weights/s", seconds * 1e3);
                assert!(rate > 0.001);
            }
        }
    });
}

/// Total CPU seconds of the process.
fn process_seconds() -> f64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec.
    let status = unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut now) };
    assert_eq!(status, 0);
    now.tv_sec as f64 + now.tv_nsec as f64 * 1e-9
}

/// What two threads cost in total against one: 1.0 is a perfect split, and a
/// machine with two free cores is then twice as fast. Idle workers spin, so an
/// uneven split shows as well.
#[test]
#[ignore = "speed table"]
fn two_threads_cost_what_one_does() {
    let tier = Tier::detect();
    let mut random = Random(1);
    for [m, n, k] in [[8192, 320, 320], [512, 1280, 1280], [128, 1280, 5120], [2, 1280, 1280]] {
        let b = PackedB::linear(Weights::Bf16(&random.bf16s(n * k)), n, k).unwrap();
        let (a, mut out) = (random.bf16s(m * k), vec![bf16::ZERO; m * n]);
        let mut cost = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let mut best = f64::MAX;
                for _ in 0..9 {
                    let start = process_seconds();
                    for _ in 0..20 {
                        let out = Output::bf16(&mut out, n);
                        gemm(tier, &GemmInput::dense(&a, m, k), &b, &Epilogue::default(), out).unwrap();
                    }
                    best = best.min(process_seconds() - start);
                }
                best
            })
        };
        let ratio = cost(2) / cost(1);
        println!("{m} x {n} x {k}: two threads use {ratio:.2} times the CPU time of one");
        assert!(ratio < 4.0);
    }
}
