//! Speed tables in CPU time of one worker: `cargo test --release -- --ignored
//! --nocapture bf16::tests::speed`. The assertions are the floor below which a
//! change has broken something, far under what an idle core gives.

use super::super::*;
use super::super::probe::ThreadClock;

fn single(work: impl FnOnce() + Send) {
    rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap().install(work);
}

#[test]
#[ignore = "speed table"]
fn gemm_table() {
    single(|| {
        let tier = Tier::detect();
        let peak = measure_peak(tier);
        println!("{tier:?} peak {peak:.0} GFLOP/s");
        for shape in [
            (8192, 320, 320),
            (8192, 2560, 320),
            (8192, 320, 1280),
            (2048, 640, 640),
            (2048, 5120, 640),
            (2048, 640, 2560),
            (512, 1280, 1280),
            (512, 10240, 1280),
            (512, 1280, 5120),
            (154, 1280, 768),
            (154, 768, 3072),
            (128, 1280, 1280),
            (128, 10240, 1280),
            (128, 1280, 5120),
            (2, 1280, 1280),
            (2048, 2048, 2048),
        ] {
            let rate = gemm_rate(tier, shape, 7).unwrap();
            let seconds = 2.0 * (shape.0 * shape.1 * shape.2) as f64 / rate / 1e9;
            let weights = (shape.1 * shape.2 * 2) as f64 / seconds / 1e9;
            println!("{shape:?}: {rate:.0} GFLOP/s, {:.0} %, weights {weights:.1} GB/s", 100.0 * rate / peak);
            assert!(rate > 1.0);
        }
    });
}

#[test]
#[ignore = "micro"]
fn micro() {
    use super::super::block::*;
    use super::super::memory::AlignedBytes;
    single(|| {
        let _s = TileSession::new(Tier::Amx);
        let mut a = AlignedBytes::zeroed(16 << 20);
        let b = AlignedBytes::zeroed(16 << 20);
        let mut c = vec![0f32; 4096];
        a.as_mut_slice::<u8>()[0] = 0;
        // (m tiles pairs, k steps, row stride, koff step)
        for (pairs, steps, contiguous, lines) in [
            (1, 8, true, 0),
            (8, 10, true, 0),
            (8, 10, false, 0),
            (32, 10, false, 0),
            (16, 20, true, 0),
            (16, 20, false, 0),
            (16, 40, false, 0),
            (8, 40, false, 0),
            (8, 80, true, 0),
            (8, 80, false, 0),
            (8, 80, false, 2),
            (4, 160, false, 0),
        ] {
            let stride = if contiguous { 64 } else { 64 * (steps | 1) };
            let koff: Vec<u32> = (0..steps).map(|s| (if contiguous { s * 1024 } else { s * 64 }) as u32).collect();
            let tile = if contiguous { 1024 * steps } else { 16 * stride };
            let panels = 10;
            let mut best = f64::MAX;
            for _ in 0..30 {
                let t = ThreadClock::start();
                for panel in 0..panels {
                    for pair in 0..pairs {
                        let base = a.as_ptr().wrapping_add(pair * 2 * tile);
                        let args = BlockArgs {
                            a: [base, base.wrapping_add(tile)],
                            row_stride: stride,
                            k_offsets: koff.as_ptr(),
                            k_steps: steps,
                            b: b.as_ptr().wrapping_add(panel * steps * 2048),
                            c: c.as_mut_ptr(),
                            c_stride: 128,
                            prefetch: b.as_ptr(),
                            accumulate: 0,
                            prefetch_lines: lines,
                            row_tiles: 2,
                            column_tiles: 2,
                        };
                        unsafe { multiply_block(Tier::Amx, &args) };
                    }
                }
                best = best.min(t.elapsed().as_secs_f64());
            }
            let flop = (panels * pairs * steps * 4 * 16 * 16 * 32 * 2) as f64;
            println!("pairs {pairs} steps {steps} contiguous {contiguous} pf {lines}: A {} KB B panel {} KB all B {} KB: {:.0}", pairs*2*tile/1024, steps*2, steps*2*panels, flop / best / 1e9);
        }
    });
}

#[test]
#[ignore = "one"]
fn one() {
    single(|| {
        let v: Vec<usize> = std::env::var("SHAPE").unwrap().split(',').map(|s| s.parse().unwrap()).collect();
        println!("{:.0}", gemm_rate(Tier::Amx, (v[0], v[1], v[2]), v[3]).unwrap());
    });
}

/// Seconds of one 3×3 convolution, best of several.
fn conv_seconds(tier: Tier, [batch, size, cin, cout]: [usize; 4], runs: usize) -> f64 {
    let mut random = super::Random(1);
    let weights = random.bf16s(cout * cin * 9);
    let packed = PackedB::conv(Weights::Bf16(&weights), KernelShape { cout, cin, height: 3, width: 3 }).unwrap();
    let input = random.bf16s(batch * size * size * cin);
    let bias = random.f32s(cout);
    let mut out = vec![half::bf16::ZERO; batch * size * size * cout];
    let epilogue = Epilogue { bias: Some(&bias), ..Epilogue::default() };
    let input = ConvInput::plain(&input, [batch, size, size, cin]);
    let mut best = f64::MAX;
    let cold = std::env::var("COLD").is_ok();
    let mut ev = vec![1u64; if cold { 64 << 20 } else { 8 }];
    for _ in 0..runs {
        ev.iter_mut().step_by(8).for_each(|v| *v += 1);
        let clock = ThreadClock::start();
        conv2d(tier, &input, Geometry::same(1), &packed, &epilogue, Output::bf16(&mut out, cout)).unwrap();
        best = best.min(clock.elapsed().as_secs_f64());
    }
    best
}

#[test]
#[ignore = "speed table"]
fn conv_table() {
    single(|| {
        let peak = measure_peak(Tier::detect());
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
            let [b, s, cin, cout] = shape;
            let flop = 2.0 * (b * s * s * cin * cout * 9) as f64;
            let rate = flop / conv_seconds(Tier::detect(), shape, 4) / 1e9;
            println!("{shape:?}: {rate:.0} GFLOP/s, {:.0} %", 100.0 * rate / peak);
        }
    });
}

#[test]
#[ignore = "bw"]
fn bw() {
    use super::super::memory::AlignedBytes;
    single(|| {
        for mb in [1usize, 8, 16, 32, 64, 128, 512] {
            let mut a = AlignedBytes::zeroed(mb << 20);
            a.as_mut_slice::<u64>().iter_mut().enumerate().for_each(|(i, v)| *v = i as u64);
            let mut best = f64::MAX;
            let mut x = 0u64;
            for _ in 0..6 {
                let t = ThreadClock::start();
                for c in a.as_slice::<u64>().chunks_exact(8) {
                    x = x.wrapping_add(c[0]);
                }
                best = best.min(t.elapsed().as_secs_f64());
            }
            std::hint::black_box(x);
            println!("bw {mb} MB: {:.1} GB/s", (mb << 20) as f64 / best / 1e9);
        }
    });
}

#[test]
#[ignore = "speed table"]
fn attention_table() {
    single(|| {
        let peak = measure_peak(Tier::detect());
        for (batch, heads, dim, queries, keys) in [
            (2, 8, 40, 4096, 4096),
            (2, 8, 80, 1024, 1024),
            (2, 8, 160, 256, 256),
            (2, 8, 160, 64, 64),
            (2, 8, 40, 4096, 77),
            (2, 8, 80, 1024, 77),
            (2, 8, 160, 256, 77),
            (1, 1, 512, 4096, 4096),
            (2, 12, 64, 77, 77),
            (1, 10, 64, 4096, 4096),
            (1, 4, 128, 2048, 2048),
        ] {
            let width = heads * dim;
            let mut random = super::Random(1);
            let (q, kv) = (random.bf16s(batch * queries * width), random.bf16s(batch * keys * 2 * width));
            let mut out = vec![half::bf16::ZERO; batch * queries * width];
            let heads_at = |offset| Heads { data: &kv, stride: 2 * width, offset };
            let call = Attention {
                batch,
                heads,
                head_dim: dim,
                queries,
                keys,
                q: Heads { data: &q, stride: width, offset: 0 },
                k: heads_at(0),
                v: heads_at(width),
                scale: 1.0 / (dim as f32).sqrt(),
                is_causal: false,
            };
            let mut best = f64::MAX;
            if let Ok(d) = std::env::var("DIM") && d != format!("{dim}-{keys}") {
                continue;
            }
            for _ in 0..if std::env::var("DIM").is_ok() { 60 } else { 5 } {
                let clock = ThreadClock::start();
                attention(Tier::detect(), &call, &mut out, width).unwrap();
                best = best.min(clock.elapsed().as_secs_f64());
            }
            let rate = 4.0 * (batch * heads * queries * keys * dim) as f64 / best / 1e9;
            println!("({batch}, {heads}, {dim}, {queries}, {keys}): {rate:.0} GFLOP/s, {:.0} %", 100.0 * rate / peak);
        }
    });
}
