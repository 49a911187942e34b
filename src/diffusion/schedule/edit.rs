//! Cutting and reshaping finished schedules: the sigma-editing nodes.

/// Splits before step `step`; both halves contain the sigma at the cut. Beyond
/// the end the first half is everything and the second is empty.
pub fn split_sigmas(sigmas: &[f32], step: usize) -> (Vec<f32>, Vec<f32>) {
    let head = step.saturating_add(1).min(sigmas.len());
    (sigmas[..head].to_vec(), sigmas[step.min(sigmas.len())..].to_vec())
}

/// Splits so that the second half does the last `denoise` share of the steps
/// (rounded half to even). If that is no step at all the first half is empty
/// and the second holds the last sigma alone, as in ComfyUI.
pub fn split_sigmas_denoise(sigmas: &[f32], denoise: f64) -> (Vec<f32>, Vec<f32>) {
    let steps = sigmas.len().saturating_sub(1);
    let tail = (steps as f64 * denoise).round_ties_even().max(0.0) as usize;
    let head = if tail == 0 { 0 } else { sigmas.len().saturating_sub(tail) };
    let start = sigmas.len().saturating_sub(tail.saturating_add(1));
    (sigmas[..head].to_vec(), sigmas[start..].to_vec())
}

/// Reverses a schedule ("unsampling"); a leading 0 becomes 0.0001, because the
/// model cannot be asked at 0.
pub fn flip_sigmas(sigmas: &[f32]) -> Vec<f32> {
    let mut flipped: Vec<f32> = sigmas.iter().rev().copied().collect();
    if let Some(first) = flipped.first_mut().filter(|first| **first == 0.0) {
        *first = 0.0001;
    }
    flipped
}

/// Replaces the first sigma.
pub fn set_first_sigma(sigmas: &[f32], sigma: f32) -> Vec<f32> {
    let mut out = sigmas.to_vec();
    if let Some(first) = out.first_mut() {
        *first = sigma;
    }
    out
}

/// How inserted sigmas are spread between two neighbours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spacing {
    /// Evenly.
    Linear,
    /// sin(πx/2): denser towards the next sigma.
    Cosine,
    /// 1 - cos(πx/2): denser towards the current sigma.
    Sine,
}

impl Spacing {
    /// The spacing of a node's option: `linear`, `cosine` or `sine`.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "linear" => Some(Self::Linear),
            "cosine" => Some(Self::Cosine),
            "sine" => Some(Self::Sine),
            _ => None,
        }
    }

    fn apply(self, x: f32) -> f32 {
        let angle = x * std::f32::consts::PI / 2.0;
        match self {
            Self::Linear => x,
            Self::Cosine => angle.sin(),
            Self::Sine => 1.0 - angle.cos(),
        }
    }
}

/// Divides every step whose sigma lies within `end_at ..= start_at` into
/// `steps` steps. A negative `start_at` means no upper limit.
pub fn extend_intermediate_sigmas(
    sigmas: &[f32],
    steps: usize,
    start_at: f32,
    end_at: f32,
    spacing: Spacing,
) -> Vec<f32> {
    let start_at = if start_at < 0.0 { f32::INFINITY } else { start_at };
    let points = super::linspace(0.0, 1.0, steps.saturating_add(1));
    let inner = points.get(1..steps).unwrap_or_default();
    let mut out = Vec::with_capacity(sigmas.len() * steps.max(1));
    for pair in sigmas.windows(2) {
        let (current, next) = (pair[0], pair[1]);
        out.push(current);
        if (end_at..=start_at).contains(&current) {
            out.extend(inner.iter().map(|&x| spacing.apply(x) * (next - current) + current));
        }
    }
    out.extend(sigmas.last());
    out
}
