//! Arithmetic of samplers on latents (`kernels/sampling/latent.cu`).
//!
//! Latents are f32 in the host's order `[samples, channels, pixels]`. A model's
//! input is made from one by [`to_nhwc`](super::layout::to_nhwc), which scales
//! it and writes it twice for classifier-free guidance. One [`guide`] then turns
//! the model's output into the prediction and takes the sampler's step;
//! samplers that need several predictions a step combine them by [`lincomb`].

use bytemuck::{Pod, Zeroable, bytes_of};

use super::super::{CudaError, Element, Geometry, Gpu, Kernel};
use crate::driver::DevicePtr;
pub use crate::tensor::latents::MAX_OPERANDS;

const MODULE: &str = "latent";
const THREADS: u32 = 256;
/// Terms of [`Lincomb`].
pub const MAX_TERMS: usize = 8;

/// A factor and the f32 latent that it multiplies.
#[derive(Clone, Copy, Debug)]
pub struct Term {
    /// Factor.
    pub factor: f32,
    /// Latent.
    pub x: DevicePtr,
}

/// How a side's denoised prediction follows from the model's output: `skip·x + scale·output`.
///
/// With s = σ: (1, −s) for noise and flow, (1/(s²+1), −s/√(s²+1)) for v, (0, 1) for x₀.
#[derive(Clone, Copy, Debug)]
pub struct Prediction {
    /// Factor of x.
    pub skip: f32,
    /// Factor of the output.
    pub scale: f32,
}

/// The mask of an inpainting: `denoised·mask + original·(1 − mask)`.
#[derive(Clone, Copy, Debug)]
pub struct Inpaint {
    /// f32 `[samples, pixels]`; its samples repeat.
    pub mask: DevicePtr,
    /// Samples of the mask.
    pub samples: usize,
    /// f32 latent.
    pub original: DevicePtr,
}

/// The sampler's step: `next = of_x·x + of_denoised·denoised + of_uncond·uncond + Σ operands`.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// Result; may be x or an operand.
    pub next: DevicePtr,
    /// Factor of x.
    pub of_x: f32,
    /// Factor of the guided prediction.
    pub of_denoised: f32,
    /// Factor of the negative side's prediction (CFG++).
    pub of_uncond: f32,
    /// Noise, earlier predictions, …: at most [`MAX_OPERANDS`].
    pub operands: &'a [Term],
}

/// Classifier-free guidance, and the step that follows it.
#[derive(Clone, Copy, Debug)]
pub struct Guide<'a> {
    /// The model's output for the positive side `[samples, pixels, pitch]`.
    pub cond: DevicePtr,
    /// The same for the negative side; null without one.
    pub uncond: DevicePtr,
    /// Type of both.
    pub element: Element,
    /// Elements from one pixel to the next in both.
    pub pitch: usize,
    /// f32 latent.
    pub x: DevicePtr,
    /// Samples.
    pub samples: usize,
    /// Channels.
    pub channels: usize,
    /// Pixels of a sample.
    pub pixels: usize,
    /// What the model predicts.
    pub prediction: Prediction,
    /// Guidance scale: `uncond + cfg·(cond − uncond)`.
    pub cfg: f32,
    /// Mask.
    pub inpaint: Option<Inpaint>,
    /// Gets the guided prediction; may be null.
    pub denoised: DevicePtr,
    /// Gets the negative side's prediction (the positive one's if there is none); may be null.
    pub uncond_denoised: DevicePtr,
    /// Step.
    pub step: Option<Step<'a>>,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct GuideArgs {
    cond: DevicePtr,
    uncond: DevicePtr,
    x: DevicePtr,
    mask: DevicePtr,
    original: DevicePtr,
    operand: [DevicePtr; MAX_OPERANDS],
    denoised: DevicePtr,
    uncond_denoised: DevicePtr,
    next: DevicePtr,
    pixels: i64,
    count: i64,
    channels: i32,
    pitch: i32,
    mask_samples: i32,
    operands: i32,
    skip: f32,
    scale: f32,
    cfg: f32,
    of_x: f32,
    of_denoised: f32,
    of_uncond: f32,
    of_operand: [f32; MAX_OPERANDS],
    unused: i32,
}

/// Queues guidance.
pub fn guide(gpu: &Gpu, op: &Guide<'_>) -> Result<(), CudaError> {
    gpu.label(|| {
        let step =
            op.step.as_ref().map_or(String::new(), |s| format!(", step of {} terms", s.operands.len()));
        format!("guide {}x{}x{}{step}", op.samples, op.channels, op.pixels)
    });
    const OP: &str = "guide";
    let count = op.samples * op.channels * op.pixels;
    if count == 0 {
        return Ok(());
    }
    extents(OP, [op.samples, op.channels, op.pixels])?;
    let operands = op.step.map_or(&[][..], |s| s.operands);
    let fail = |reason: String| Err(CudaError::Unsupported { op: OP, reason });
    if op.pitch < op.channels || op.pitch > i32::MAX as usize {
        return fail(format!("{} channels in rows of {}", op.channels, op.pitch));
    }
    if operands.len() > MAX_OPERANDS {
        return fail(format!("{} operands; at most {MAX_OPERANDS}", operands.len()));
    }
    if op.inpaint.is_some_and(|i| i.samples == 0 || i.samples > i32::MAX as usize) {
        return fail("a mask without samples".into());
    }
    let mut args = GuideArgs {
        cond: op.cond,
        uncond: op.uncond,
        x: op.x,
        mask: op.inpaint.map_or(DevicePtr::NULL, |i| i.mask),
        original: op.inpaint.map_or(DevicePtr::NULL, |i| i.original),
        operand: [DevicePtr::NULL; MAX_OPERANDS],
        denoised: op.denoised,
        uncond_denoised: op.uncond_denoised,
        next: op.step.map_or(DevicePtr::NULL, |s| s.next),
        pixels: op.pixels as i64,
        count: count as i64,
        channels: op.channels as i32,
        pitch: op.pitch as i32,
        mask_samples: op.inpaint.map_or(1, |i| i.samples as i32),
        operands: operands.len() as i32,
        skip: op.prediction.skip,
        scale: op.prediction.scale,
        cfg: op.cfg,
        of_x: op.step.map_or(0.0, |s| s.of_x),
        of_denoised: op.step.map_or(0.0, |s| s.of_denoised),
        of_uncond: op.step.map_or(0.0, |s| s.of_uncond),
        of_operand: [0.0; MAX_OPERANDS],
        unused: 0,
    };
    for (i, term) in operands.iter().enumerate() {
        (args.operand[i], args.of_operand[i]) = (term.x, term.factor);
    }
    let name = format!("guide_{}", op.element.suffix());
    let geometry = Geometry::strided(gpu, count, THREADS);
    gpu.launch(&Kernel { module: MODULE, name: &name }, &geometry, &[bytes_of(&args)])
}

/// `out = Σ factor·x`, f32, summed in the order of the terms; `out` may be one of them.
#[derive(Clone, Copy, Debug)]
pub struct Lincomb<'a> {
    /// One to [`MAX_TERMS`] terms.
    pub terms: &'a [Term],
    /// Result.
    pub out: DevicePtr,
    /// Elements.
    pub count: usize,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct LincombArgs {
    x: [DevicePtr; MAX_TERMS],
    factor: [f32; MAX_TERMS],
    out: DevicePtr,
    count: i64,
    terms: i32,
    is_vector: i32,
}

/// Queues a linear combination.
pub fn lincomb(gpu: &Gpu, op: &Lincomb<'_>) -> Result<(), CudaError> {
    gpu.label(|| format!("lincomb {} of {}", op.terms.len(), op.count));
    if op.count == 0 {
        return Ok(());
    }
    if op.terms.is_empty() || op.terms.len() > MAX_TERMS {
        let reason = format!("{} terms; one to {MAX_TERMS}", op.terms.len());
        return Err(CudaError::Unsupported { op: "lincomb", reason });
    }
    let pointers = op.terms.iter().fold(op.out.0, |all, t| all | t.x.0);
    let mut args = LincombArgs {
        x: [DevicePtr::NULL; MAX_TERMS],
        factor: [0.0; MAX_TERMS],
        out: op.out,
        count: op.count as i64,
        terms: op.terms.len() as i32,
        is_vector: i32::from(pointers.is_multiple_of(16)),
    };
    for (i, term) in op.terms.iter().enumerate() {
        (args.x[i], args.factor[i]) = (term.x, term.factor);
    }
    let geometry = Geometry::strided(gpu, op.count.div_ceil(4), THREADS);
    gpu.launch(&Kernel { module: MODULE, name: "lincomb" }, &geometry, &[bytes_of(&args)])
}

/// `out = x·mask + other·(1 − mask)` over f32 latents; `out` may be `x` or `other`.
#[derive(Clone, Copy, Debug)]
pub struct Blend {
    /// Where the mask is 1.
    pub x: DevicePtr,
    /// Where the mask is 0.
    pub other: DevicePtr,
    /// f32 `[mask_samples, mask_channels, pixels]`; samples and channels repeat.
    pub mask: DevicePtr,
    /// Result.
    pub out: DevicePtr,
    /// Samples.
    pub samples: usize,
    /// Channels.
    pub channels: usize,
    /// Pixels of a sample.
    pub pixels: usize,
    /// Samples of the mask.
    pub mask_samples: usize,
    /// Channels of the mask.
    pub mask_channels: usize,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct BlendArgs {
    x: DevicePtr,
    other: DevicePtr,
    mask: DevicePtr,
    out: DevicePtr,
    pixels: i64,
    count: i64,
    channels: i32,
    mask_samples: i32,
    mask_channels: i32,
    unused: i32,
}

/// Queues a blend.
pub fn blend(gpu: &Gpu, op: &Blend) -> Result<(), CudaError> {
    gpu.label(|| format!("blend {}x{}x{}", op.samples, op.channels, op.pixels));
    const OP: &str = "blend";
    let count = op.samples * op.channels * op.pixels;
    if count == 0 {
        return Ok(());
    }
    extents(OP, [op.samples, op.channels, op.pixels])?;
    if op.mask_samples == 0 || op.mask_channels == 0 {
        let reason = format!("a mask of {} samples of {} channels", op.mask_samples, op.mask_channels);
        return Err(CudaError::Unsupported { op: OP, reason });
    }
    let args = BlendArgs {
        x: op.x,
        other: op.other,
        mask: op.mask,
        out: op.out,
        pixels: op.pixels as i64,
        count: count as i64,
        channels: op.channels as i32,
        // More than there are of the latent's are never reached.
        mask_samples: op.mask_samples.min(op.samples) as i32,
        mask_channels: op.mask_channels as i32,
        unused: 0,
    };
    let geometry = Geometry::strided(gpu, count, THREADS);
    gpu.launch(&Kernel { module: MODULE, name: "blend" }, &geometry, &[bytes_of(&args)])
}

fn extents(op: &'static str, extents: [usize; 3]) -> Result<(), CudaError> {
    if extents.iter().all(|n| *n <= i32::MAX as usize) {
        return Ok(());
    }
    let reason = format!("a latent of {extents:?}; at most 2^31 of each");
    Err(CudaError::Unsupported { op, reason })
}
