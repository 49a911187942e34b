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
    /// Pictures: 8-bit values may differ by 1 at most in 99.9 % of places.
    EightBit,
}

/// Tolerances for values of a type, by file; the reasons stand in the golden
/// data's README (measured spread of the reference against itself and against float64).
pub fn tolerance(file: &str, type_name: &str, case: &str) -> Measure {
    use Measure::{Absolute, EightBit, RelativeToStd};
    let is_ops = matches!(file, "image_ops" | "latent_ops" | "mask_ops");
    match type_name {
        "CONDITIONING" if file == "lora_merge" => Absolute(2e-3),
        "CONDITIONING" if file == "sdxl" || file == "sd21_v" => RelativeToStd(1e-4),
        "CONDITIONING" => Absolute(1e-4),
        _ if is_ops && (case.starts_with("LoadImage") || case.contains("lanczos")) => Absolute(0.0),
        _ if is_ops => Absolute(1e-5),
        "LATENT" | "IMAGE" if file == "vae_sd15" || file == "small_models" => Absolute(2e-5),
        // Step-size control and long SDE chains amplify rounding.
        "LATENT" if case.starts_with("dpm_adaptive") => RelativeToStd(1e-3),
        "LATENT" => RelativeToStd(1e-4),
        // Behind a sampler a picture carries the latent's error: 8-bit values decide.
        "IMAGE" => EightBit,
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
    if measure == Measure::EightBit {
        let bytes = |v: &[f32]| v.iter().map(|x| (x * 255.0).clamp(0.0, 255.0) as u8).collect::<Vec<_>>();
        return pictures(&bytes(ours), &bytes(golden));
    }
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
        Measure::EightBit => (worst, 0.0, "absolute"),
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
