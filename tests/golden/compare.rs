//! Comparing tensors, and the tolerance of each file.

use kiln::tensor::HostTensor;

use super::report::Outcome;

/// How a difference is measured.
#[derive(Clone, Copy, PartialEq)]
pub enum Measure {
    /// max|a-b|
    Absolute(f64),
    /// max|a-b| / std(reference)
    RelativeToStd(f64),
}

/// Tolerances for values of a type, by file; the reasons stand in the golden
/// data's README (measured spread of the reference against itself and against float64).
pub fn tolerance(file: &str, type_name: &str, case: &str) -> Measure {
    use Measure::{Absolute, RelativeToStd};
    match (file, type_name) {
        (_, "CONDITIONING") if file == "lora_merge" => Absolute(2e-3),
        (_, "CONDITIONING") if file == "sdxl" || file == "sd21_v" => RelativeToStd(1e-4),
        (_, "CONDITIONING") => Absolute(1e-4),
        ("image_ops" | "latent_ops" | "mask_ops", _) if case.starts_with("LoadImage") || case.contains("lanczos") => {
            Absolute(0.0)
        }
        ("image_ops" | "latent_ops" | "mask_ops", _) => Absolute(1e-5),
        ("vae_sd15", "LATENT") => Absolute(2e-5),
        // Step-size control and long SDE chains amplify rounding.
        (_, "LATENT") if ["dpm_adaptive", "dpm_fast", "_sde", "sa_solver", "seeds"].iter().any(|s| case.contains(s)) => {
            RelativeToStd(1e-3)
        }
        (_, "LATENT") => RelativeToStd(1e-4),
        // A picture is (raw + 1) / 2, and behind a sampler carries the latent's error.
        ("vae_sd15", "IMAGE") | ("small_models", "IMAGE") => Absolute(2e-5),
        (_, "IMAGE") => Absolute(1e-3),
        _ => Absolute(1e-5),
    }
}

/// Compares `ours` with the recorded `golden`.
pub fn tensors(ours: &HostTensor, golden: &HostTensor, measure: Measure) -> Outcome {
    if ours.shape() != golden.shape() {
        return Outcome::Fail(format!("shape {:?}, recorded {:?}", ours.shape(), golden.shape()));
    }
    values(ours.data(), golden.data(), measure)
}

/// Compares element by element; NaN equals NaN.
pub fn values(ours: &[f32], golden: &[f32], measure: Measure) -> Outcome {
    let mut worst = 0.0f64;
    for (a, b) in ours.iter().zip(golden) {
        let error = match (a.is_nan(), b.is_nan()) {
            (true, true) => 0.0,
            (false, false) if a == b => 0.0,
            (false, false) => (f64::from(*a) - f64::from(*b)).abs(),
            _ => f64::INFINITY,
        };
        worst = worst.max(error);
    }
    let (error, tolerance, measure) = match measure {
        Measure::Absolute(t) => (worst, t, "absolute"),
        Measure::RelativeToStd(t) => (worst / std_of(golden), t, "of std"),
    };
    Outcome::Compared { error, tolerance, measure, detail: String::new() }
}

/// Standard deviation; 1 for constant tensors.
pub fn std_of(v: &[f32]) -> f64 {
    let n = v.len().max(1) as f64;
    let mean = v.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
    let var = v.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n;
    if var > 0.0 { var.sqrt() } else { 1.0 }
}

/// Pictures of 8 bits: the share of values that differ by more than 1, as an error that may be 0.1 %.
pub fn pictures(ours: &[u8], golden: &[u8]) -> Outcome {
    if ours.len() != golden.len() {
        return Outcome::Fail(format!("{} values, recorded {}", ours.len(), golden.len()));
    }
    let differ = ours.iter().zip(golden).filter(|(a, b)| a.abs_diff(**b) > 1).count();
    let worst = ours.iter().zip(golden).map(|(a, b)| a.abs_diff(*b)).max().unwrap_or(0);
    Outcome::Compared {
        error: differ as f64 / golden.len().max(1) as f64,
        tolerance: 1e-3,
        measure: "share of 8-bit values off by more than 1",
        detail: format!(" worst {worst}/255"),
    }
}
