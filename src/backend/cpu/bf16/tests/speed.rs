//! Speed tables in CPU time of one worker: `cargo test --release -- --ignored
//! --nocapture bf16::tests::speed`. The assertions are the floor below which a
//! change has broken something, far under what an idle core gives.

use super::super::*;

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
