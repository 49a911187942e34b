//! What samplers do on a device: latents that stay there from the first step to the last.
//!
//! A latent crosses node borders as a [`HostTensor`]. On a device it keeps that order and type, f32
//! `[samples, channels, height, width]`, so that noise and results need no transpose; only the network's input and
//! output are NHWC in the backend's own type. All work is queued: nothing here waits for the device but
//! [`LatentOps::download_latent`] and [`LatentOps::error_sum`], which give numbers to the host, and
//! [`LatentOps::pace`], which keeps the host from running ahead of the device by more than a step or two.

use super::{HostTensor, Shape, Tensor, TensorError};

/// A latent in a device's memory, f32 `[samples, channels, height, width]`.
pub struct Planes(Tensor);

impl Planes {
    /// Wraps f32 memory in that order; its shape names the extents as those of a map. Called by backends.
    pub fn new(tensor: Tensor) -> Self {
        Self(tensor)
    }

    /// Extent, as that of a map.
    pub fn extent(&self) -> Shape {
        self.0.shape()
    }

    /// Samples, channels, height and width.
    pub fn shape(&self) -> [usize; 4] {
        let s = self.0.shape();
        [s.n, s.c, s.h, s.w]
    }

    /// The memory; for backends.
    pub fn tensor(&self) -> &Tensor {
        &self.0
    }
}

/// What a network is fed: `(x·factor ‖ beside)`, once for each copy.
pub struct ModelInput<'a> {
    /// The latent.
    pub x: &'a Planes,
    /// How often its samples are repeated, as a whole.
    pub copies: usize,
    /// Factor on the latent.
    pub factor: f32,
    /// Further channels of every sample of every copy, as they are.
    pub beside: Option<&'a Planes>,
}

/// Samples of a network's output.
#[derive(Clone, Copy)]
pub struct Samples<'a> {
    /// The output `[N, h, w, C]`.
    pub output: &'a Tensor,
    /// The first sample.
    pub first: usize,
}

/// A sampler's step from a prediction: `of_x·x + of_denoised·denoised + of_uncond·uncond + Σ factor·operand`.
#[derive(Clone, Copy, Default)]
pub struct Update<'a> {
    /// Factor of what the network saw.
    pub of_x: f32,
    /// Factor of the guided prediction.
    pub of_denoised: f32,
    /// Factor of the negative side's prediction.
    pub of_uncond: f32,
    /// Noise, earlier predictions, …: at most [`MAX_OPERANDS`].
    pub operands: &'a [(f32, &'a Planes)],
}

/// Further operands of an [`Update`].
pub const MAX_OPERANDS: usize = 5;

/// Classifier-free guidance, with a mask and the sampler's step if wanted.
///
/// A side's prediction is `skip·x + scale·output`; together they are `uncond + cfg·(cond − uncond)`.
pub struct Guide<'a> {
    /// The positive side's output.
    pub cond: Samples<'a>,
    /// The negative side's.
    pub uncond: Option<Samples<'a>>,
    /// What the network saw, before its input's factor.
    pub x: &'a Planes,
    /// Factor of x.
    pub skip: f32,
    /// Factor of an output.
    pub scale: f32,
    /// Guidance scale.
    pub cfg: f32,
    /// A mask of one channel, and what the prediction is where it is 0.
    pub inpaint: Option<(&'a Planes, &'a Planes)>,
    /// The step.
    pub step: Option<Update<'a>>,
}

/// What [`LatentOps::guide`] gives.
pub struct GuideOutput {
    /// The prediction.
    pub denoised: Planes,
    /// Where the step leads, if there is one.
    pub next: Option<Planes>,
}

/// Solutions of two orders and what they started from, for step size control.
pub struct ScaledError<'a> {
    /// Solution of lower order.
    pub low: &'a Planes,
    /// Solution of higher order.
    pub high: &'a Planes,
    /// Solution before the step.
    pub previous: &'a Planes,
    /// Absolute tolerance.
    pub atol: f32,
    /// Relative tolerance.
    pub rtol: f32,
}

/// A prediction of a part of the picture.
#[derive(Clone, Copy)]
pub struct Part<'a> {
    /// The prediction.
    pub x: &'a Planes,
    /// Row and column of the picture where it begins.
    pub at: [usize; 2],
    /// Its weight `[any, 1, height, width]` by place, whose samples repeat; without them `strength` everywhere.
    pub weights: Option<&'a Planes>,
    /// Its weight everywhere.
    pub strength: f32,
}

/// How predictions are combined: a sum whose factors follow from what the predictions have in common. Factors and dot
/// products are a sample's own, if nothing else is said; `g` is `uncond + scale·(cond − uncond)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule {
    /// `[x, cond, uncond]`: `x/v + f·(g − x/v)` with `f` between 1 and, at `multiplier` 1, the deviation of `x/v − cond`
    /// in units of that of `x/v − g`.
    Rescale {
        /// v.
        variance: f64,
        /// Guidance scale.
        scale: f64,
        /// Share of the deviations' ratio in the factor.
        multiplier: f64,
    },
    /// `[cond, uncond]`: g with its norm limited.
    Renorm {
        /// Guidance scale.
        scale: f64,
        /// Largest norm in units of cond's; 0 for any.
        limit: f64,
    },
    /// `[x, cond, uncond, guided]`: `guided + uncond·(a − 1)·(1 − scale)`, where a fits `x − uncond` to `x − cond` best.
    FitUncond {
        /// Guidance scale.
        scale: f64,
    },
    /// `[x, cond, uncond]`: x less the part of `x − uncond` along the main direction of `x − cond` and `x − uncond`, the
    /// first eigenvector of their dot products.
    DampTangents,
    /// `[direction, cond, uncond]`: `uncond + (cond − uncond)/scale` and the direction, its norm limited and its part
    /// along cond times `eta`.
    Project {
        /// Weight of the part along cond.
        eta: f64,
        /// Largest norm; 0 for any.
        limit: f64,
        /// Guidance scale.
        scale: f64,
    },
    /// `[positive, negative, empty]`: `empty + scale·(p − negative_scale·n⊥)` with p and n relative to empty and n⊥
    /// perpendicular to p; over the whole batch.
    Perpendicular {
        /// Guidance scale.
        scale: f64,
        /// Weight of the negative side.
        negative_scale: f64,
    },
    /// `[cond, uncond, guided]`: `(s·guided + (4 − s)·scale·cond)/4` with `s = 2·(m + 1)`, where m is the mean over all
    /// places of the cosine over channels between the roots of `scale·uncond` and of `(scale·cond + guided)/2`; a root
    /// keeps the sign.
    Agree {
        /// Guidance scale.
        scale: f64,
    },
    /// `[cond, guided]`: guided with its norm over channels limited to cond's at every place.
    LimitNorms {
        /// Factor on the result.
        strength: f64,
    },
}

impl Rule {
    /// Latents that are combined.
    pub fn inputs(self) -> usize {
        match self {
            Rule::FitUncond { .. } => 4,
            Rule::Renorm { .. } | Rule::LimitNorms { .. } => 2,
            _ => 3,
        }
    }
}

/// A filter at work where a map is above a threshold.
#[derive(Clone, Copy)]
pub struct BlurWhere<'a> {
    /// Weights along either side, of an odd number of places; edges are mirrored.
    pub taps: &'a [f32],
    /// f32 `[any, 1, rows · columns, 1]`.
    pub map: &'a Tensor,
    /// Rows and columns of the map, whose cells share the latent's places out evenly.
    pub map_size: [usize; 2],
    /// For every sample of the latent the map's.
    pub map_of: &'a [usize],
    /// Places of cells above it are filtered.
    pub threshold: f32,
}

/// Samplers' arithmetic on a device; see the module. Like ops, these may be called from any thread.
pub trait LatentOps: Send + Sync {
    /// Copies a latent to the device.
    fn upload_latent(&self, x: &HostTensor) -> Result<Planes, TensorError>;

    /// Copies a latent to the host, and waits for it.
    fn download_latent(&self, x: &Planes) -> Result<HostTensor, TensorError>;

    /// `Σ factor·term`, in this order; at least one term, all of one shape.
    fn lincomb(&self, terms: &[(f32, &Planes)]) -> Result<Planes, TensorError>;

    /// `x·mask + other·(1 − mask)`; the mask has one channel or all.
    fn blend(&self, x: &Planes, other: &Planes, mask: &Planes) -> Result<Planes, TensorError>;

    /// Predictions combined by a rule, which says which they are; all of one shape.
    fn combine(&self, rule: Rule, inputs: &[&Planes]) -> Result<Planes, TensorError>;

    /// The spatial frequencies of every plane in the square of half side `cutoff` around zero times `low`, all others
    /// times `high`; a side of n has the frequencies −cutoff to cutoff − 1, at most from −n/2.
    fn scale_bands(&self, x: &Planes, cutoff: usize, low: f32, high: f32) -> Result<Planes, TensorError>;

    /// Every plane filtered where a map says so, and elsewhere as it is; sides are longer than the taps beside the middle.
    fn blur_where(&self, x: &Planes, op: &BlurWhere<'_>) -> Result<Planes, TensorError>;

    /// The part of every plane that begins at this row and column and has this height and width.
    fn crop(&self, x: &Planes, at: [usize; 2], size: [usize; 2]) -> Result<Planes, TensorError>;

    /// `Σ weight·part / (least + Σ weight)` at every place of a latent of `shape`.
    fn mean_by_place(&self, parts: &[Part<'_>], shape: [usize; 4], least: f32)
    -> Result<Planes, TensorError>;

    /// What the network is fed: `[copies·N, h, w, C]` in the backend's own type.
    fn model_input(&self, op: &ModelInput<'_>) -> Result<Tensor, TensorError>;

    /// From the network's output to the prediction, and to the next latent.
    fn guide(&self, op: &Guide<'_>) -> Result<GuideOutput, TensorError>;

    /// Standard normal numbers as PyTorch's generator of an NVIDIA GPU draws them from a seed that is used up to
    /// `offset`, and the offset behind them.
    fn randn(&self, shape: [usize; 4], seed: u64, offset: u64) -> Result<(Planes, u64), TensorError>;

    /// Whether the noise that samplers draw on the way is the device's own, as in ComfyUI on a GPU, instead of the
    /// CPU generator's.
    fn draws_noise(&self) -> bool {
        false
    }

    /// `Σ ((high − low)/max(atol, rtol·max(|low|, |previous|)))²` over all elements; waits for it.
    fn error_sum(&self, op: &ScaledError<'_>) -> Result<f64, TensorError>;

    /// Called once a step: waits until what was queued before the last but one call is done.
    fn pace(&self) -> Result<(), TensorError>;
}
