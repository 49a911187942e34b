//! Comparing values, and the tolerance of each kind.
//!
//! The reasons for the tolerances stand in the golden data's README: the
//! measured spread of the reference against itself and against float64, times a
//! margin of three to ten.

use kiln::tensor::HostTensor;
use serde_json::{Map, Value as Json};

use super::bench::link;
use super::report::Outcome;

/// How a difference is measured.
#[derive(Clone, Copy, PartialEq)]
pub enum Measure {
    /// max|a-b|
    Absolute(f64),
    /// max|a-b| / std(reference)
    RelativeToStd(f64),
    /// max(|a-b| / |b|)
    RelativeEach(f64),
    /// Pictures: 8-bit values may differ by 1 at most in 99.9 % of places.
    EightBit,
}

/// The tolerance for what a prompt gives on a link, by what stands upstream.
pub fn tolerance(prompt: &Map<String, Json>, id: &str, type_name: &str) -> Measure {
    use Measure::{Absolute, EightBit, RelativeToStd};
    let mut upstream = Vec::new();
    collect(prompt, id, &mut upstream);
    let has = |part: &str| upstream.iter().any(|n| class(n).contains(part));
    let says = |n: &Json, text: &str| n["inputs"].as_object().is_some_and(|i| i.values().any(|v| v == text));
    let is_only_loaded = upstream.iter().all(|n| class(n).starts_with("LoadImage"));
    match type_name {
        // Patched weights of the text encoder are rounded to f16.
        "CONDITIONING" if has("Lora") || has("CLIPMerge") => Absolute(2e-3),
        // Values up to 4.4; 4e-6 between thread counts.
        "CONDITIONING" => Absolute(1e-4),
        // Step-size control amplifies rounding.
        "LATENT" if upstream.iter().any(|n| says(n, "dpm_adaptive")) => RelativeToStd(1e-3),
        // The first x is noise times 4518, in f32 a multiple of 2^-10 (8192 to 16384). Euler's step leaves a picture of
        // size 1 of it after two roundings at that size, of x - denoised and of d * dt, and either may fall to the
        // next place where the last bits of denoised differ. The LATENT is that divided by 0.18215.
        "LATENT" if upstream.iter().any(|n| n["inputs"]["zsnr"] == true) => {
            Absolute(2.0 * FIRST_X_SPACING / 0.18215)
        }
        // The reference against itself: 1e-5.
        "LATENT" if has("Sampler") => RelativeToStd(1e-4),
        // Behind a sampler a picture carries the latent's error: 8-bit values decide.
        "IMAGE" if has("Sampler") => EightBit,
        // Networks: 3e-6 between implementations.
        _ if has("VAE") || has("WithModel") => Absolute(2e-5),
        // 8-bit data all the way.
        "IMAGE" | "MASK" if is_only_loaded || says(&prompt[id], "lanczos") => Absolute(0.0),
        _ => Absolute(1e-5),
    }
}

/// Distance of neighbouring f32 from 8192 to 16384.
const FIRST_X_SPACING: f64 = 1.0 / 1024.0;

/// The tolerance for conditioning of text encoders other than CLIP ViT-L, whose
/// values are larger (std 5.5).
pub const WIDE_CONDITIONING: Measure = Measure::RelativeToStd(1e-4);

fn class(node: &Json) -> &str {
    node["class_type"].as_str().unwrap_or_default()
}

/// Node `id` and everything upstream of it.
fn collect<'a>(prompt: &'a Map<String, Json>, id: &str, into: &mut Vec<&'a Json>) {
    let Some(node) = prompt.get(id).filter(|n| !into.iter().any(|seen| std::ptr::eq(*seen, *n))) else {
        return;
    };
    into.push(node);
    for (from, _) in node["inputs"].as_object().into_iter().flat_map(Map::values).filter_map(link) {
        collect(prompt, from, into);
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
    if ours.len() != golden.len() {
        return Outcome::Fail(format!("{} values, recorded {}", ours.len(), golden.len()));
    }
    if measure == Measure::EightBit {
        return pictures(&bytes(ours), &bytes(golden));
    }
    let is_each = matches!(measure, Measure::RelativeEach(_));
    let mut worst = 0.0f64;
    for (a, b) in ours.iter().zip(golden) {
        let error = match (a.is_nan(), b.is_nan()) {
            (true, true) => 0.0,
            (false, false) if a == b => 0.0,
            (false, false) => (f64::from(*a) - f64::from(*b)).abs(),
            _ => f64::INFINITY,
        };
        worst = worst.max(if is_each && error > 0.0 { error / f64::from(b.abs()) } else { error });
    }
    let (error, tolerance, measure) = match measure {
        Measure::Absolute(t) => (worst, t, "absolute"),
        Measure::RelativeToStd(t) => (worst / std_of(golden), t, "of std"),
        Measure::RelativeEach(t) => (worst, t, "relative"),
        Measure::EightBit => (worst, 0.0, "absolute"),
    };
    Outcome::Compared { error, tolerance, measure, detail: String::new() }
}

/// Something that is counted and must agree everywhere.
pub fn exact(differ: usize, what: &'static str, detail: String) -> Outcome {
    Outcome::Compared { error: differ as f64, tolerance: 0.0, measure: what, detail }
}

/// Values in 0..1 as the bytes that SaveImage writes: truncated.
pub fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().map(|v| (v * 255.0).clamp(0.0, 255.0) as u8).collect()
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
