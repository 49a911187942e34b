//! bf16 kernels on the shapes of SD1.5 at 512², in CPU time of one worker.
//!
//! `cargo bench --bench bf16` first prints every matrix operator of a UNet step
//! (cfg pair) and of a VAE decode, its count, GFLOP/s and share of the measured
//! tile peak, and the weighted sums; then criterion times the leading shapes.
//! CPU time, because a shared machine's wall clock says little; the weights of
//! an operator are cold in the table (evicted before each run), since a model's
//! weights do not fit a cache between two uses.

use criterion::measurement::{Measurement, ValueFormatter, WallTime};
use criterion::{Criterion, Throughput};
use half::bf16;
use kiln::backend::cpu::bf16::probe::ThreadClock;
use kiln::backend::cpu::bf16::{
    Activation, Attention, ConvInput, Epilogue, GemmInput, Geometry, Heads, KernelShape, Output, PackedB,
    Tier, Weights, attention, conv2d, gemm, measure_peak,
};
use std::hint::black_box;
use std::time::Duration;

/// One operator of the network.
#[derive(Clone, Copy, Debug)]
enum Op {
    /// batch, side, input channels, output channels of a 3 × 3 convolution.
    Conv(usize, usize, usize, usize),
    /// m, n, k.
    Gemm(usize, usize, usize),
    /// m, n (both halves), k.
    Geglu(usize, usize, usize),
    /// batch, heads, head size, queries, keys.
    Attention(usize, usize, usize, usize, usize),
}
use Op::{Attention as Att, Conv, Geglu, Gemm};

/// Operators of a UNet cfg step with their counts.
const UNET: &[(Op, usize)] = &[
    (Att(2, 8, 40, 4096, 4096), 5),
    (Att(2, 8, 80, 1024, 1024), 5),
    (Att(2, 8, 160, 256, 256), 5),
    (Att(2, 8, 160, 64, 64), 1),
    (Att(2, 8, 40, 4096, 77), 5),
    (Att(2, 8, 80, 1024, 77), 5),
    (Att(2, 8, 160, 256, 77), 5),
    (Att(2, 8, 160, 64, 77), 1),
    (Conv(2, 16, 1280, 1280), 7),
    (Conv(2, 64, 320, 320), 7),
    (Conv(2, 32, 640, 640), 6),
    (Conv(2, 16, 2560, 1280), 2),
    (Conv(2, 32, 1280, 1280), 1),
    (Conv(2, 64, 640, 320), 2),
    (Conv(2, 64, 640, 640), 1),
    (Conv(2, 32, 1920, 640), 1),
    (Conv(2, 64, 960, 320), 1),
    (Conv(2, 8, 1280, 1280), 12),
    (Conv(2, 32, 1280, 640), 1),
    (Conv(2, 8, 2560, 1280), 3),
    (Conv(2, 16, 1920, 1280), 1),
    (Conv(2, 32, 960, 640), 1),
    (Conv(2, 16, 640, 1280), 1),
    (Conv(2, 32, 320, 640), 1),
    (Conv(2, 64, 4, 320), 1),
    (Conv(2, 64, 320, 4), 1),
    (Geglu(8192, 2560, 320), 5),
    (Geglu(512, 10240, 1280), 5),
    (Geglu(2048, 5120, 640), 5),
    (Geglu(128, 10240, 1280), 1),
    (Gemm(8192, 320, 320), 40),
    (Gemm(2048, 640, 640), 40),
    (Gemm(512, 1280, 1280), 40),
    (Gemm(8192, 320, 1280), 5),
    (Gemm(512, 1280, 5120), 5),
    (Gemm(2048, 640, 2560), 5),
    (Gemm(8192, 320, 640), 2),
    (Gemm(512, 1280, 2560), 2),
    (Gemm(8192, 320, 960), 1),
    (Gemm(2048, 640, 1920), 1),
    (Gemm(154, 1280, 768), 12),
    (Gemm(2048, 640, 1280), 1),
    (Gemm(128, 1280, 1280), 8),
    (Gemm(128, 1280, 2560), 3),
    (Gemm(512, 1280, 1920), 1),
    (Gemm(2048, 640, 960), 1),
    (Gemm(128, 1280, 5120), 1),
    (Gemm(154, 640, 768), 10),
    (Gemm(2048, 640, 320), 1),
    (Gemm(512, 1280, 640), 1),
    (Gemm(154, 320, 768), 10),
    (Gemm(2, 1280, 1280), 13),
    (Gemm(2, 640, 1280), 5),
    (Gemm(2, 320, 1280), 5),
];

/// Operators of a VAE decode with their counts.
const VAE: &[(Op, usize)] = &[
    (Conv(1, 128, 512, 512), 7),
    (Conv(1, 512, 128, 128), 5),
    (Conv(1, 256, 256, 256), 5),
    (Conv(1, 512, 256, 256), 1),
    (Conv(1, 256, 512, 512), 1),
    (Conv(1, 64, 512, 512), 10),
    (Conv(1, 512, 256, 128), 1),
    (Conv(1, 256, 512, 256), 1),
    (Att(1, 1, 512, 4096, 4096), 1),
    (Gemm(262144, 128, 256), 1),
    (Gemm(65536, 256, 512), 1),
    (Gemm(4096, 512, 512), 4),
    (Conv(1, 512, 128, 3), 1),
    (Conv(1, 64, 4, 512), 1),
];

impl Op {
    fn flop(self) -> f64 {
        let product = |values: &[usize]| values.iter().map(|&v| v as f64).product::<f64>();
        match self {
            Conv(b, s, i, o) => 18.0 * product(&[b, s, s, i, o]),
            Gemm(m, n, k) | Geglu(m, n, k) => 2.0 * product(&[m, n, k]),
            Att(b, h, d, q, k) => 4.0 * product(&[b, h, d, q, k]),
        }
    }

    /// The operator with operands of its own, ready to run.
    fn prepare(self, tier: Tier) -> Box<dyn FnMut()> {
        match self {
            Conv(batch, side, cin, cout) => prepare_conv(tier, [batch, side, cin, cout]),
            Gemm(m, n, k) => prepare_gemm(tier, [m, n, k], Activation::None),
            Geglu(m, n, k) => prepare_gemm(tier, [m, n, k], Activation::Geglu),
            Att(batch, heads, dim, queries, keys) => {
                prepare_attention(tier, [batch, heads, dim, queries, keys])
            }
        }
    }
}

/// Values between −0.5 and 0.5 without a short period.
fn values(len: usize) -> Vec<bf16> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bf16::from_f32((state >> 40) as f32 / (1 << 24) as f32 - 0.5)
    };
    (0..len).map(|_| next()).collect()
}

fn prepare_conv(tier: Tier, [batch, side, cin, cout]: [usize; 4]) -> Box<dyn FnMut()> {
    let shape = KernelShape { cout, cin, height: 3, width: 3 };
    let weights = PackedB::conv(Weights::Bf16(&values(cout * cin * 9)), shape).expect("shape");
    let input = values(batch * side * side * cin);
    let bias = vec![0.1; cout];
    let mut out = vec![bf16::ZERO; batch * side * side * cout];
    Box::new(move || {
        let epilogue = Epilogue { bias: Some(&bias), ..Epilogue::default() };
        let input = ConvInput::plain(&input, [batch, side, side, cin]);
        let out = Output::bf16(&mut out, cout);
        conv2d(tier, &input, Geometry::same(1), &weights, &epilogue, out).expect("operands");
    })
}

fn prepare_gemm(tier: Tier, [m, n, k]: [usize; 3], activation: Activation) -> Box<dyn FnMut()> {
    let plain = values(n * k);
    let weights = match activation {
        Activation::Geglu => PackedB::geglu(Weights::Bf16(&plain), n, k),
        _ => PackedB::linear(Weights::Bf16(&plain), n, k),
    }
    .expect("shape");
    let (input, bias) = (values(m * k), vec![0.1; n]);
    let columns = weights.columns();
    let mut out = vec![bf16::ZERO; m * columns];
    Box::new(move || {
        let epilogue = Epilogue { bias: Some(&bias), activation, ..Epilogue::default() };
        let input = GemmInput::dense(&input, m, k);
        gemm(tier, &input, &weights, &epilogue, Output::bf16(&mut out, columns)).expect("operands");
    })
}

fn prepare_attention(tier: Tier, shape: [usize; 5]) -> Box<dyn FnMut()> {
    let [batch, heads, head_dim, queries, keys] = shape;
    let width = heads * head_dim;
    let (q, kv) = (values(batch * queries * width), values(batch * keys * 2 * width));
    let mut out = vec![bf16::ZERO; batch * queries * width];
    Box::new(move || {
        let at = |offset| Heads { data: &kv, stride: 2 * width, offset };
        let call = Attention {
            batch,
            heads,
            head_dim,
            queries,
            keys,
            q: Heads { data: &q, stride: width, offset: 0 },
            k: at(0),
            v: at(width),
            scale: 1.0 / (head_dim as f32).sqrt(),
            is_causal: false,
        };
        attention(tier, &call, &mut out, width).expect("operands");
    })
}

/// Fewest seconds of three runs with cold weights.
fn cold_seconds(op: Op, tier: Tier, evict: &[u64]) -> f64 {
    let mut run = op.prepare(tier);
    run();
    let mut best = f64::MAX;
    for _ in 0..3 {
        // Read, not written: dirty lines would charge their write-back to the operator.
        black_box(evict.iter().step_by(8).sum::<u64>());
        let clock = ThreadClock::start();
        run();
        best = best.min(clock.elapsed().as_secs_f64());
    }
    best
}

fn print_stage(name: &str, ops: &[(Op, usize)], tier: Tier, peak: f64) {
    let evict = vec![1u64; 64 << 20];
    let (mut seconds, mut flop) = (0.0, 0.0);
    for &(op, count) in ops {
        let each = cold_seconds(op, tier, &evict);
        let rate = op.flop() / each / 1e9;
        println!("{count:3} × {op:?}: {rate:.0} GFLOP/s, {:.0} % of peak", 100.0 * rate / peak);
        seconds += each * count as f64;
        flop += op.flop() * count as f64;
    }
    let rate = flop / seconds / 1e9;
    println!("{name}: {seconds:.3} core-seconds for {:.1} GFLOP, {rate:.0} GFLOP/s\n", flop / 1e9);
}

/// CPU time of the calling thread.
struct CpuTime;

impl Measurement for CpuTime {
    type Intermediate = ThreadClock;
    type Value = Duration;

    fn start(&self) -> ThreadClock {
        ThreadClock::start()
    }

    fn end(&self, clock: ThreadClock) -> Duration {
        clock.elapsed()
    }

    fn add(&self, a: &Duration, b: &Duration) -> Duration {
        *a + *b
    }

    fn zero(&self) -> Duration {
        Duration::ZERO
    }

    fn to_f64(&self, value: &Duration) -> f64 {
        value.as_nanos() as f64
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        WallTime.formatter()
    }
}

fn bench_leading(criterion: &mut Criterion<CpuTime>, tier: Tier) {
    let mut group = criterion.benchmark_group("bf16");
    group.sample_size(10).measurement_time(Duration::from_secs(1)).warm_up_time(Duration::from_millis(200));
    for op in [
        Conv(2, 64, 320, 320),
        Conv(2, 16, 1280, 1280),
        Conv(1, 256, 256, 256),
        Gemm(8192, 320, 320),
        Gemm(512, 1280, 5120),
        Geglu(8192, 2560, 320),
        Gemm(2, 1280, 1280),
        Att(2, 8, 40, 4096, 4096),
        Att(2, 8, 80, 1024, 1024),
        Att(1, 1, 512, 4096, 4096),
    ] {
        let mut run = op.prepare(tier);
        group.throughput(Throughput::Elements(op.flop() as u64));
        group.bench_function(format!("{op:?}"), |bench| bench.iter(&mut run));
    }
    group.finish();
}

fn main() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("one thread");
    // Everything runs on the one worker, whose CPU clock is read.
    pool.install(|| {
        let tier = Tier::detect();
        let peak = measure_peak(tier);
        println!("{tier:?}: {peak:.0} GFLOP/s register-resident");
        print_stage("UNet step 512², matrix operators", UNET, tier, peak);
        print_stage("VAE decode 512², matrix operators", VAE, tier, peak);
        let mut criterion = Criterion::default().with_measurement(CpuTime).configure_from_args();
        bench_leading(&mut criterion, tier);
        criterion.final_summary();
    });
}
