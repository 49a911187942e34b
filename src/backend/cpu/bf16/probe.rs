//! What this core can do: the ceilings that benchmarks compare with.

use super::block::TileSession;
use super::{Activation, Epilogue, GemmInput, KernelError, Output, PackedB, Tier, Weights, gemm};
use half::bf16;
use std::time::{Duration, Instant};

/// GFLOP/s of one thread on register-resident products, best of several runs.
pub fn measure_peak(tier: Tier) -> f64 {
    let tier = tier.or_available();
    let _session = TileSession::new(tier);
    let mut best = 0f64;
    for _ in 0..8 {
        let (start, mut flop) = (ThreadClock::start(), 0.0);
        while start.elapsed() < Duration::from_millis(5) {
            flop += spin(tier);
        }
        best = best.max(flop / start.elapsed().as_secs_f64());
    }
    best / 1e9
}

/// Runs a burst of products; returns its FLOP.
fn spin(tier: Tier) -> f64 {
    const ROUNDS: u64 = 10_000;
    match tier {
        #[cfg(target_arch = "x86_64")]
        Tier::Amx => {
            // SAFETY: the tier is available and the caller holds the session.
            unsafe { super::amx::spin_products(ROUNDS) };
            (ROUNDS * 8 * 16 * 16 * 32 * 2) as f64
        }
        #[cfg(target_arch = "x86_64")]
        Tier::Avx512Bf16 => {
            // SAFETY: the tier is available.
            std::hint::black_box(unsafe { super::avx512::spin_products(ROUNDS) });
            (ROUNDS * 16 * 16 * 2 * 2) as f64
        }
        _ => {
            let mut sums = [0f32; 64];
            let factor = std::hint::black_box(0.5f32);
            for _ in 0..ROUNDS {
                sums.iter_mut().for_each(|s| *s = *s * factor + factor);
            }
            std::hint::black_box(sums);
            (ROUNDS * 64 * 2) as f64
        }
    }
}

/// GFLOP/s of a packed `m × n × k` product on the current pool, best of `runs`,
/// in the calling thread's CPU time when the pool has one thread and in wall
/// time otherwise. With GEGLU, n counts both halves.
///
/// # Errors
///
/// If the shape is empty.
pub fn gemm_rate(
    tier: Tier,
    [m, n, k]: [usize; 3],
    activation: Activation,
    runs: usize,
) -> Result<f64, KernelError> {
    let fill = |len: usize| -> Vec<bf16> {
        (0..len).map(|i| bf16::from_f32(((i * 37 + i / 64) % 61) as f32 / 61.0 - 0.5)).collect()
    };
    let weights = fill(n * k);
    let b = match activation {
        Activation::Geglu => PackedB::geglu(Weights::Bf16(&weights), n, k)?,
        _ => PackedB::linear(Weights::Bf16(&weights), n, k)?,
    };
    let (a, mut out) = (fill(m * k), vec![bf16::ZERO; m * b.columns()]);
    let epilogue = Epilogue { activation, ..Epilogue::default() };
    let mut best = f64::INFINITY;
    for _ in 0..runs + 1 {
        let start = ThreadClock::start();
        gemm(tier, &GemmInput::dense(&a, m, k), &b, &epilogue, Output::bf16(&mut out, b.columns()))?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(2.0 * (m * n * k) as f64 / best / 1e9)
}

/// The thread's CPU clock with one worker, the wall clock with more.
#[derive(Clone, Copy)]
pub struct ThreadClock {
    wall: Instant,
    cpu: Option<Duration>,
}

impl ThreadClock {
    /// Starts now.
    pub fn start() -> ThreadClock {
        ThreadClock { wall: Instant::now(), cpu: thread_time() }
    }

    /// Time since the start.
    pub fn elapsed(&self) -> Duration {
        match (self.cpu, thread_time()) {
            (Some(start), Some(now)) => now.saturating_sub(start),
            _ => self.wall.elapsed(),
        }
    }
}

#[cfg(unix)]
fn thread_time() -> Option<Duration> {
    if rayon::current_num_threads() > 1 {
        return None;
    }
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec.
    let status = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut now) };
    (status == 0).then(|| Duration::new(now.tv_sec as u64, now.tv_nsec as u32))
}

#[cfg(not(unix))]
fn thread_time() -> Option<Duration> {
    None
}
