//! What one core can do at best: the yardstick that benchmarks print beside their figures.
//!
//! Both on the shape that holds most of SD1.5's convolution work, written as a
//! matrix product. f32: the `gemm` crate, which is a peer and not a part of the
//! product. bf16: the bare packed product, without epilogue.

use super::bf16::probe::ThreadClock;
use super::bf16::{Activation, Tier, gemm_rate};
use crate::tensor::TensorError;

/// A measured ceiling.
#[derive(Clone, Debug)]
pub struct Ceiling {
    /// GFLOP/s of one core.
    pub gflops: f64,
    /// How it was measured.
    pub what: String,
}

/// The best of this many runs counts, in CPU time: the machine may be busy.
const RUNS: usize = 7;

/// Runs the yardstick for f32 or bf16 on one core.
///
/// # Errors
/// If the system can't start a thread.
pub fn measure(is_bf16: bool) -> Result<Ceiling, TensorError> {
    let one_core = rayon::ThreadPoolBuilder::new().num_threads(1).build();
    let one_core = one_core.map_err(|e| unsupported(format!("starting a thread ({e})")))?;
    one_core.install(|| if is_bf16 { bf16() } else { Ok(f32()) })
}

/// 320→320 channels, 3×3, at 64×64, batch 2.
const SHAPE: (usize, usize, usize) = (8192, 320, 2880);

fn f32() -> Ceiling {
    let (m, n, k) = SHAPE;
    let fill =
        |len: usize| -> Vec<f32> { (0..len).map(|i| ((i * 37 + i / 64) % 61) as f32 / 61.0 - 0.5).collect() };
    let (a, b) = (fill(m * k), fill(n * k));
    let mut c = vec![0.0f32; m * n];
    let mut best = f64::INFINITY;
    for _ in 0..RUNS {
        let began = ThreadClock::start();
        // SAFETY: a is m×k row-major, b is n×k row-major (read as k×n through
        // its strides), c is m×n row-major; all live through the call and c overlaps neither.
        unsafe {
            gemm::gemm(
                m,
                n,
                k,
                c.as_mut_ptr(),
                1,
                n as isize,
                false,
                a.as_ptr(),
                1,
                k as isize,
                b.as_ptr(),
                k as isize,
                1,
                0.0f32,
                1.0f32,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
        best = best.min(began.elapsed().as_secs_f64());
    }
    let gflops = 2.0 * (m * n * k) as f64 / best / 1e9;
    Ceiling { gflops, what: format!("gemm crate, f32, {m}x{n}x{k}") }
}

fn unsupported(what: String) -> TensorError {
    TensorError::Unsupported { op: "ceiling", what }
}

fn bf16() -> Result<Ceiling, TensorError> {
    let tier = Tier::detect();
    let (m, n, k) = SHAPE;
    let rate = gemm_rate(tier, [m, n, k], Activation::None, RUNS);
    let gflops = rate.map_err(|e| unsupported(e.to_string()))?;
    Ok(Ceiling { gflops, what: format!("packed bf16 matrix product, {tier:?}, {m}x{n}x{k}") })
}
