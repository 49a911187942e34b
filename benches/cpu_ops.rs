//! The main layer shapes of Stable Diffusion 1.5 on the CPU backend, one
//! thread, in GFLOP/s, beside the `gemm` crate on the same product.
//!
//! Time is the process's CPU time, so that a busy machine doesn't falsify it.
//! After criterion's report a table gives the fastest fifth of each shape, the
//! ratio to the `gemm` crate, and the weighted sum over a cfg step.
//!
//! `cargo bench --bench cpu_ops [-- FILTER]`

use std::borrow::Cow;
use std::cell::RefCell;
use std::hint::black_box;
use std::time::Duration;

use criterion::measurement::{Measurement, ValueFormatter, WallTime};
use criterion::{Criterion, Throughput};
use half::f16;
use kiln::backend::cpu::{CpuBackend, CpuOptions};
use kiln::tensor::*;

/// Process CPU time as a criterion measurement.
struct CpuTime;

impl CpuTime {
    fn now() -> Duration {
        let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: `t` is a valid place for the result.
        unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut t) };
        Duration::new(t.tv_sec as u64, t.tv_nsec as u32)
    }
}

impl Measurement for CpuTime {
    type Intermediate = Duration;
    type Value = Duration;
    fn start(&self) -> Duration {
        Self::now()
    }
    fn end(&self, start: Duration) -> Duration {
        Self::now() - start
    }
    fn add(&self, a: &Duration, b: &Duration) -> Duration {
        *a + *b
    }
    fn zero(&self) -> Duration {
        Duration::ZERO
    }
    fn to_f64(&self, v: &Duration) -> f64 {
        v.as_nanos() as f64
    }
    fn formatter(&self) -> &dyn ValueFormatter {
        WallTime.formatter()
    }
}

/// What a shape is.
#[derive(Clone, Copy)]
enum Kind {
    /// 3×3 convolution: batch, side, input channels, output channels.
    Conv(usize, usize, usize, usize),
    /// Linear layer: rows, inputs, outputs.
    Linear(usize, usize, usize),
    /// GEGLU: rows, inputs, outputs.
    Geglu(usize, usize, usize),
    /// Attention: batch, heads, channels a head, queries, keys.
    Attention(usize, usize, usize, usize, usize),
    /// GroupNorm + SiLU: batch, side, channels.
    Norm(usize, usize, usize),
    /// LayerNorm: rows, channels.
    Layer(usize, usize),
}

use Kind::{Attention as Att, Conv, Geglu, Layer, Linear as Lin, Norm};

/// Shape and how often a 512² cfg step runs it (0: not in the UNet).
const SHAPES: &[(Kind, usize)] = &[
    (Conv(2, 64, 320, 320), 7),
    (Conv(2, 64, 640, 320), 2),
    (Conv(2, 64, 960, 320), 1),
    (Conv(2, 64, 640, 640), 1),
    (Conv(2, 32, 640, 640), 6),
    (Conv(2, 32, 1280, 640), 1),
    (Conv(2, 32, 1920, 640), 1),
    (Conv(2, 32, 1280, 1280), 1),
    (Conv(2, 16, 1280, 1280), 7),
    (Conv(2, 16, 2560, 1280), 2),
    (Conv(2, 8, 1280, 1280), 11),
    (Conv(2, 8, 2560, 1280), 3),
    (Lin(8192, 320, 320), 40),
    (Lin(2048, 640, 640), 40),
    (Lin(512, 1280, 1280), 40),
    (Lin(8192, 1280, 320), 5),
    (Lin(2048, 2560, 640), 5),
    (Lin(512, 5120, 1280), 5),
    (Geglu(8192, 320, 1280), 5),
    (Geglu(2048, 640, 2560), 5),
    (Geglu(512, 1280, 5120), 5),
    (Lin(154, 768, 320), 10),
    (Lin(2, 1280, 1280), 13),
    (Att(2, 8, 40, 4096, 4096), 5),
    (Att(2, 8, 80, 1024, 1024), 5),
    (Att(2, 8, 160, 256, 256), 5),
    (Att(2, 8, 40, 4096, 77), 5),
    (Norm(2, 64, 320), 13),
    (Norm(2, 32, 640), 11),
    (Layer(8192, 320), 15),
    (Layer(2048, 640), 15),
    (Att(1, 1, 512, 4096, 4096), 0),
    (Conv(1, 64, 512, 512), 0),
    (Conv(1, 128, 512, 512), 0),
    (Conv(1, 256, 256, 256), 0),
    (Conv(1, 512, 128, 128), 0),
];

fn name(kind: Kind) -> String {
    match kind {
        Conv(n, s, ci, co) => format!("conv3x3 b{n} {s}x{s} {ci}->{co}"),
        Lin(m, k, n) => format!("linear {m}x{n}x{k}"),
        Geglu(m, k, n) => format!("geglu {m}x2*{n}x{k}"),
        Att(b, h, d, q, k) => format!("attention b{b} h{h} d{d} {q}x{k}"),
        Norm(n, s, c) => format!("group_norm+silu b{n} {s}x{s} {c}"),
        Layer(m, c) => format!("layer_norm {m}x{c}"),
    }
}

/// FLOP of the products; norms count one an element.
fn flop(kind: Kind) -> f64 {
    let n = match kind {
        Conv(n, s, ci, co) => 2 * n * s * s * ci * co * 9,
        Lin(m, k, n) => 2 * m * k * n,
        Geglu(m, k, n) => 4 * m * k * n,
        Att(b, h, d, q, k) => 4 * b * h * d * q * k,
        Norm(n, s, c) => n * s * s * c,
        Layer(m, c) => m * c,
    };
    n as f64
}

/// The product that does the same work, for the `gemm` crate.
fn as_gemm(kind: Kind) -> Option<(usize, usize, usize)> {
    match kind {
        Conv(n, s, ci, co) => Some((n * s * s, co, 9 * ci)),
        Lin(m, k, n) => Some((m, n, k)),
        Geglu(m, k, n) => Some((m, 2 * n, k)),
        _ => None,
    }
}

fn values(n: usize) -> Vec<f32> {
    let mut state = 1u32;
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

/// f16 weights as a file holds them.
fn stored(n: usize) -> Vec<u8> {
    values(n).iter().flat_map(|&v| f16::from_f32(v * 0.05).to_le_bytes()).collect()
}

fn activation(b: &CpuBackend, shape: Shape) -> Tensor {
    let mut t = b.alloc(shape).expect("memory");
    b.upload(&values(shape.len()), HostLayout::Nhwc, &mut t).expect("upload");
    t
}

fn raw<'a>(bytes: &'a [u8], shape: &'a [usize]) -> RawTensor<'a> {
    RawTensor { dtype: DType::F16, shape, bytes: Cow::Borrowed(bytes) }
}

/// Prepares a shape; the closure runs it once.
fn prepare(b: &CpuBackend, kind: Kind) -> Box<dyn FnMut() + '_> {
    match kind {
        Conv(n, s, ci, co) => {
            let x = activation(b, Shape::nhwc(n, s, s, ci));
            let bytes = stored(co * ci * 9);
            let w = b.pack_conv(&raw(&bytes, &[co, ci, 3, 3]), None).expect("weights");
            let mut out = b.alloc(Shape::nhwc(n, s, s, co)).expect("memory");
            Box::new(move || b.conv2d(&Conv2d::new(&x, &w), &mut out).expect("conv2d"))
        }
        Lin(m, k, n) | Geglu(m, k, n) => {
            let is_geglu = matches!(kind, Geglu(..));
            let rows = if is_geglu { 2 * n } else { n };
            let x = activation(b, Shape::tokens(1, m, k));
            let bytes = stored(rows * k);
            let shape = [rows, k];
            let parts = LinearParts { weights: &[raw(&bytes, &shape)], biases: &[], is_geglu };
            let w = b.pack_linear(&parts).expect("weights");
            let mut out = b.alloc(Shape::tokens(1, m, n)).expect("memory");
            Box::new(move || b.linear(&Linear::new(&x, &w), &mut out).expect("linear"))
        }
        Att(n, heads, d, queries, keys) => {
            let q = activation(b, Shape::tokens(n, queries, heads * d));
            let kv = activation(b, Shape::tokens(n, keys, 2 * heads * d));
            let mut out = b.alloc(q.shape()).expect("memory");
            Box::new(move || {
                let op = Attention {
                    q: Cols::all(&q),
                    k: Cols::range(&kv, 0, heads * d),
                    v: Cols::range(&kv, heads * d, heads * d),
                    heads,
                    is_causal: false,
                    scale: (d as f32).sqrt().recip(),
                };
                b.attention(&op, &mut out).expect("attention");
            })
        }
        Norm(n, s, c) => {
            let x = activation(b, Shape::nhwc(n, s, s, c));
            let bytes = stored(c);
            let w = b.pack_norm(&raw(&bytes, &[c]), &raw(&bytes, &[c])).expect("weights");
            let mut out = b.alloc(x.shape()).expect("memory");
            Box::new(move || {
                let op = GroupNorm { x: &x, x2: None, w: &w, groups: 32, eps: 1e-5, silu: true };
                b.group_norm(&op, &mut out).expect("group_norm");
            })
        }
        Layer(m, c) => {
            let x = activation(b, Shape::tokens(1, m, c));
            let bytes = stored(c);
            let w = b.pack_norm(&raw(&bytes, &[c]), &raw(&bytes, &[c])).expect("weights");
            let mut out = b.alloc(x.shape()).expect("memory");
            Box::new(move || {
                b.layer_norm(&LayerNorm { x: &x, w: &w, eps: 1e-5 }, &mut out).expect("layer_norm")
            })
        }
    }
}

/// The `gemm` crate on the same product: f32 weights in file order `[n, k]`.
fn prepare_gemm((m, n, k): (usize, usize, usize)) -> impl FnMut() {
    let (a, w, mut c) = (values(m * k), values(n * k), vec![0f32; m * n]);
    move || {
        let (ks, ns) = (k as isize, n as isize);
        // SAFETY: the buffers hold m×k, n×k and m×n values with these strides.
        unsafe {
            gemm::gemm(
                m,
                n,
                k,
                c.as_mut_ptr(),
                1,
                ns,
                false,
                a.as_ptr(),
                1,
                ks,
                w.as_ptr(),
                ks,
                1,
                0.0,
                1.0,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
        black_box(&mut c);
    }
}

/// Runs one closure under criterion; the fastest fifth, if the filter let it run.
fn measure(
    c: &mut Criterion<CpuTime>,
    group: &str,
    what: &str,
    flop: f64,
    mut f: impl FnMut(),
) -> Option<f64> {
    let times = RefCell::new(Vec::new());
    let mut g = c.benchmark_group(group);
    g.throughput(Throughput::Elements(flop as u64));
    g.bench_function(what, |bencher| {
        bencher.iter_custom(|iterations| {
            let mut total = Duration::ZERO;
            for _ in 0..iterations {
                let start = CpuTime::now();
                f();
                let took = CpuTime::now() - start;
                total += took;
                times.borrow_mut().push(took);
            }
            total
        });
    });
    g.finish();
    // A virtual machine's CPU clock now and then loses time: no plain minimum.
    let mut times = times.into_inner();
    times.sort_unstable();
    times.get(times.len() / 5).map(Duration::as_secs_f64)
}

fn main() {
    let mut c = Criterion::default()
        .with_measurement(CpuTime)
        .sample_size(10)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(600))
        .without_plots()
        .configure_from_args();
    let bf16 = std::env::args().any(|a| a.contains("bf16"));
    let b = CpuBackend::new(CpuOptions { threads: Some(1), bf16, memory_limit: None }).expect("threads");
    let group = b.info().name;
    let mut lines = Vec::new();
    let (mut step, mut step_flop) = (0.0, 0.0);
    for &(kind, count) in SHAPES {
        let what = name(kind);
        let Some(own) = measure(&mut c, &group, &what, flop(kind), prepare(&b, kind)) else { continue };
        let peer =
            as_gemm(kind).and_then(|p| measure(&mut c, "gemm crate", &what, flop(kind), prepare_gemm(p)));
        let ratio = peer.map_or(String::new(), |p| format!("{:8.1} {:6.2}", flop(kind) / p / 1e9, p / own));
        lines.push(format!("{what:34} {:9.3} {:8.1} {ratio}", own * 1e3, flop(kind) / own / 1e9));
        step += own * count as f64;
        step_flop += flop(kind) * count as f64;
    }
    println!("\n{group}\n{:34} {:>9} {:>8} {:>8} {:>6}", "shape", "ms", "GFLOP/s", "gemm", "ratio");
    for line in lines {
        println!("{line}");
    }
    println!("these shapes in a 512² cfg step: {step:.3} CPU s, {:.1} GFLOP/s", step_flop / step / 1e9);
    c.final_summary();
}
