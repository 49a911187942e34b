//! Samplers' arithmetic on the device: [`LatentOps`] by the kernels of `kernels/sampling/`.

use std::collections::VecDeque;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Mutex, PoisonError};

use super::backend::{CudaBackend, Operand, operand};
use super::launch::copy::{self, Window};
use super::launch::latent::{self, MAX_TERMS, Term};
use super::launch::layout::{self, ToNhwc};
use super::launch::philox::{self, PhiloxNormal, PhiloxState};
use super::launch::reduce::{self, Reduce};
use super::launch::{band, blur, combine, region};
use super::{CudaError, Element, Gpu, transfer};
use crate::driver::{DevicePtr, Event};
use crate::tensor::check::{shape as same_shape, size};
use crate::tensor::latents::{
    BlurWhere, Guide, GuideOutput, LatentOps, ModelInput, Part, Planes, Rule, Samples, ScaledError,
};
use crate::tensor::{DType, HostTensor, Shape, TensorError};

/// Steps that the host may be ahead of the device.
const STEPS_AHEAD: usize = 2;

/// Keeps the host from running ahead of the device.
#[derive(Default)]
pub struct Pace(Mutex<VecDeque<Event>>);

impl Pace {
    /// Marks this place of the stream, and waits for the place of the last but one call.
    fn step(&self, gpu: &Gpu) -> Result<(), CudaError> {
        let mut marks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let driver = gpu.driver();
        let oldest = if marks.len() < STEPS_AHEAD { None } else { marks.pop_front() };
        let mark = match oldest {
            None => driver.create_event(false)?,
            Some(mark) => {
                if !driver.is_done(mark)? {
                    driver.synchronize_event(mark)?;
                }
                mark
            }
        };
        driver.record(mark, gpu.stream())?;
        marks.push_back(mark);
        Ok(())
    }

    /// Gives the events back.
    pub fn release(&self, gpu: &Gpu) -> Result<(), CudaError> {
        let marks = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        Ok(marks.into_iter().try_for_each(|mark| gpu.driver().destroy_event(mark))?)
    }
}

fn address(x: &Planes) -> Result<DevicePtr, TensorError> {
    f32_address("latent", x.tensor())
}

fn f32_address(op: &'static str, x: &crate::tensor::Tensor) -> Result<DevicePtr, TensorError> {
    let Operand { ptr, element, .. } = operand(op, x)?;
    match element {
        Element::F32 => Ok(ptr),
        other => Err(TensorError::Unsupported { op, what: format!("numbers of type {}", other.suffix()) }),
    }
}

/// A sample's output, from its first element on.
fn samples(op: &'static str, from: Samples<'_>, x: Shape) -> Result<Operand, TensorError> {
    let s = from.output.shape();
    same_shape(op, Shape { n: s.n, ..x }, s)?;
    if from.first + x.n > s.n {
        let (what, expected, found) = ("samples of a network's output", from.first + x.n, s.n);
        return Err(TensorError::Size { op, what, expected, found });
    }
    let whole = operand(op, from.output)?;
    let skipped = from.first * s.positions() * s.c * whole.element.size();
    Ok(Operand { ptr: whole.ptr.offset(skipped), ..whole })
}

fn four(x: &HostTensor) -> Result<Shape, TensorError> {
    size("latent", "number of dimensions", 4, x.shape().len())?;
    Ok(Shape::nhwc(x.dim(0), x.dim(2), x.dim(3), x.dim(1)))
}

impl CudaBackend {
    fn planes(&self, extent: Shape) -> Result<Planes, TensorError> {
        self.alloc_as(extent, DType::F32).map(Planes::new)
    }
}

impl LatentOps for CudaBackend {
    fn upload_latent(&self, x: &HostTensor) -> Result<Planes, TensorError> {
        let out = self.planes(four(x)?)?;
        let shared = self.shared();
        shared.uploader.upload(shared.gpu(), address(&out)?, bytemuck::cast_slice(x.data()))?;
        Ok(out)
    }

    fn download_latent(&self, x: &Planes) -> Result<HostTensor, TensorError> {
        let mut out = HostTensor::zeros(&x.shape());
        if !out.is_empty() {
            let (gpu, from) = (self.shared().gpu(), address(x)?);
            let bytes = bytemuck::cast_slice_mut(out.data_mut());
            gpu.driver().download(bytes, from, gpu.stream()).map_err(CudaError::from)?;
        }
        Ok(out)
    }

    fn lincomb(&self, terms: &[(f32, &Planes)]) -> Result<Planes, TensorError> {
        const OP: &str = "lincomb";
        let Some((_, first)) = terms.first() else {
            let (what, expected, found) = ("number of terms", 1, 0);
            return Err(TensorError::Size { op: OP, what, expected, found });
        };
        let out = self.planes(first.extent())?;
        let to = address(&out)?;
        let mut all = Vec::with_capacity(terms.len());
        for (factor, x) in terms {
            same_shape(OP, first.extent(), x.extent())?;
            all.push(Term { factor: *factor, x: address(x)? });
        }
        let count = first.extent().len();
        let (head, rest) = all.split_at(all.len().min(MAX_TERMS));
        latent::lincomb(self.shared().gpu(), &latent::Lincomb { terms: head, out: to, count })?;
        // The sum so far is the first term of the next part.
        for part in rest.chunks(MAX_TERMS - 1) {
            let terms = [&[Term { factor: 1.0, x: to }], part].concat();
            latent::lincomb(self.shared().gpu(), &latent::Lincomb { terms: &terms, out: to, count })?;
        }
        Ok(out)
    }

    fn blend(&self, x: &Planes, other: &Planes, mask: &Planes) -> Result<Planes, TensorError> {
        const OP: &str = "blend";
        let (s, m) = (x.extent(), mask.extent());
        same_shape(OP, s, other.extent())?;
        let channels = if m.c == 1 { 1 } else { s.c };
        same_shape(OP, s.with_channels(channels), m)?;
        let out = self.planes(s)?;
        let launch = latent::Blend {
            x: address(x)?,
            other: address(other)?,
            mask: address(mask)?,
            out: address(&out)?,
            samples: s.n,
            channels: s.c,
            pixels: s.positions(),
            mask_samples: m.n,
            mask_channels: m.c,
        };
        latent::blend(self.shared().gpu(), &launch)?;
        Ok(out)
    }

    fn combine(&self, rule: Rule, inputs: &[&Planes]) -> Result<Planes, TensorError> {
        const OP: &str = "combine";
        size(OP, "number of latents", rule.inputs(), inputs.len())?;
        let s = inputs.first().map_or(Shape::nhwc(0, 0, 0, 0), |x| x.extent());
        let mut all = Vec::with_capacity(inputs.len());
        for x in inputs {
            same_shape(OP, s, x.extent())?;
            all.push(address(x)?);
        }
        let out = self.planes(s)?;
        let launch = combine::Combine {
            rule,
            inputs: &all,
            out: address(&out)?,
            samples: s.n,
            channels: s.c,
            pixels: s.positions(),
        };
        combine::combine(self.shared().gpu(), &launch)?;
        Ok(out)
    }

    fn scale_bands(&self, x: &Planes, cutoff: usize, low: f32, high: f32) -> Result<Planes, TensorError> {
        let s = x.extent();
        let out = self.planes(s)?;
        let (planes, size) = (s.n * s.c, [s.h, s.w]);
        let launch =
            band::ScaleBands { x: address(x)?, out: address(&out)?, planes, size, cutoff, low, high };
        band::scale_bands(self.shared().gpu(), &launch)?;
        Ok(out)
    }

    fn blur_where(&self, x: &Planes, op: &BlurWhere<'_>) -> Result<Planes, TensorError> {
        const OP: &str = "blur_where";
        let (s, cells) = (x.extent(), op.map_size[0] * op.map_size[1]);
        let maps = op.map.shape();
        size(OP, "samples of the latent", s.n, op.map_of.len())?;
        size(OP, "cells of the map", cells, maps.positions() * maps.c)?;
        if let Some(sample) = op.map_of.iter().find(|sample| **sample >= maps.n) {
            return Err(TensorError::Size {
                op: OP,
                what: "samples of the map",
                expected: sample + 1,
                found: maps.n,
            });
        }
        let out = self.planes(s)?;
        let launch = blur::BlurWhere {
            x: address(x)?,
            out: address(&out)?,
            channels: s.c,
            size: [s.h, s.w],
            map: f32_address(OP, op.map)?,
            map_size: op.map_size,
            map_of: op.map_of,
            threshold: op.threshold,
            taps: op.taps,
        };
        blur::blur_where(self.shared().gpu(), &launch)?;
        Ok(out)
    }

    fn crop(&self, x: &Planes, at: [usize; 2], size: [usize; 2]) -> Result<Planes, TensorError> {
        let s = x.extent();
        let out = self.planes(Shape::nhwc(s.n, size[0], size[1], s.c))?;
        // Planes are maps of one channel.
        let launch = Window {
            x: address(x)?,
            out: address(&out)?,
            samples: s.n * s.c,
            from: [s.h, s.w],
            to: size,
            shift: at.map(|place| -(place as i32)),
            channels: 1,
            element: Element::F32,
        };
        copy::window(self.shared().gpu(), &launch)?;
        Ok(out)
    }

    fn mean_by_place(
        &self,
        parts: &[Part<'_>],
        shape: [usize; 4],
        least: f32,
    ) -> Result<Planes, TensorError> {
        const OP: &str = "mean_by_place";
        let [n, c, h, w] = shape;
        let out = self.planes(Shape::nhwc(n, h, w, c))?;
        let mut all = Vec::with_capacity(parts.len());
        for part in parts {
            let s = part.x.extent();
            same_shape(OP, Shape { n, c, ..s }, s)?;
            if let Some(weights) = part.weights {
                let m = weights.extent();
                same_shape(OP, Shape { n: m.n, ..s.with_channels(1) }, m)?;
            }
            all.push(region::Part {
                x: address(part.x)?,
                weights: part.weights.map_or(Ok(DevicePtr::NULL), address)?,
                weight_samples: part.weights.map_or(0, |weights| weights.extent().n),
                strength: part.strength,
                at: part.at,
                size: [s.h, s.w],
            });
        }
        let launch = region::MeanByPlace {
            parts: &all,
            out: address(&out)?,
            samples: n,
            channels: c,
            size: [h, w],
            least,
        };
        region::mean_by_place(self.shared().gpu(), &launch)?;
        Ok(out)
    }

    fn model_input(&self, op: &ModelInput<'_>) -> Result<crate::tensor::Tensor, TensorError> {
        const OP: &str = "model_input";
        let s = op.x.extent();
        let samples = s.n * op.copies;
        let more = op.beside.map_or(0, |beside| beside.extent().c);
        let extent = Shape { n: samples, c: s.c + more, ..s };
        let out = self.alloc_as(extent, self.dtype())?;
        let Operand { ptr, element, pitch } = operand(OP, &out)?;
        let launch = ToNhwc {
            src: address(op.x)?,
            dst: ptr,
            samples: s.n,
            channels: s.c,
            pixels: s.positions(),
            width: s.c,
            pitch,
            copies: op.copies,
            factor: op.factor,
            element,
        };
        layout::to_nhwc(self.shared().gpu(), &launch)?;
        if let Some(beside) = op.beside {
            same_shape(OP, Shape { n: samples, c: more, ..s }, beside.extent())?;
            let src = address(beside)?;
            let dst = ptr.offset(s.c * element.size());
            let (channels, width) = (more, more);
            let launch = ToNhwc { src, dst, samples, channels, width, copies: 1, factor: 1.0, ..launch };
            layout::to_nhwc(self.shared().gpu(), &launch)?;
        }
        Ok(out)
    }

    fn guide(&self, op: &Guide<'_>) -> Result<GuideOutput, TensorError> {
        const OP: &str = "guide";
        let s = op.x.extent();
        let cond = samples(OP, op.cond, s)?;
        let uncond = op.uncond.map(|side| samples(OP, side, s)).transpose()?;
        if let Some(uncond) = uncond.as_ref().filter(|side| side.element != cond.element) {
            let what = format!("outputs of type {} and {}", cond.element.suffix(), uncond.element.suffix());
            return Err(TensorError::Unsupported { op: OP, what });
        }
        let inpaint = match op.inpaint {
            None => None,
            Some((mask, original)) => {
                same_shape(OP, s.with_channels(1), mask.extent())?;
                same_shape(OP, s, original.extent())?;
                let (mask, original) = (address(mask)?, address(original)?);
                Some(latent::Inpaint { mask, samples: s.n, original })
            }
        };
        let denoised = self.planes(s)?;
        let next = op.step.map(|_| self.planes(s)).transpose()?;
        let mut operands = Vec::new();
        for (factor, x) in op.step.iter().flat_map(|step| step.operands) {
            same_shape(OP, s, x.extent())?;
            operands.push(Term { factor: *factor, x: address(x)? });
        }
        let step = match (&op.step, &next) {
            (Some(step), Some(next)) => Some(latent::Step {
                next: address(next)?,
                of_x: step.of_x,
                of_denoised: step.of_denoised,
                of_uncond: step.of_uncond,
                operands: &operands,
            }),
            _ => None,
        };
        let launch = latent::Guide {
            cond: cond.ptr,
            uncond: uncond.map_or(DevicePtr::NULL, |side| side.ptr),
            element: cond.element,
            pitch: cond.pitch,
            x: address(op.x)?,
            samples: s.n,
            channels: s.c,
            pixels: s.positions(),
            prediction: latent::Prediction { skip: op.skip, scale: op.scale },
            cfg: op.cfg,
            inpaint,
            denoised: address(&denoised)?,
            uncond_denoised: DevicePtr::NULL,
            step,
        };
        latent::guide(self.shared().gpu(), &launch)?;
        Ok(GuideOutput { denoised, next })
    }

    fn randn(&self, shape: [usize; 4], seed: u64, offset: u64) -> Result<(Planes, u64), TensorError> {
        let [n, c, h, w] = shape;
        let out = self.planes(Shape::nhwc(n, h, w, c))?;
        let gpu = self.shared().gpu();
        let (device, count) = (gpu.driver().device(), out.extent().len());
        let threads = philox::torch_threads(count, device.multiprocessors as usize, device.capability);
        let state = PhiloxState { seed, offset };
        let launch = PhiloxNormal { out: address(&out)?, count, state, threads };
        let state = philox::philox_normal(gpu, &launch)?;
        Ok((out, state.offset))
    }

    fn draws_noise(&self) -> bool {
        self.shared().draws_noise.load(Relaxed)
    }

    fn error_sum(&self, op: &ScaledError<'_>) -> Result<f64, TensorError> {
        const OP: &str = "error_sum";
        let s = op.high.extent();
        same_shape(OP, s, op.low.extent())?;
        same_shape(OP, s, op.previous.extent())?;
        let shared = self.shared();
        let sums = shared.lend(12 * s.n.max(1))?;
        let error = reduce::ScaledError {
            low: address(op.low)?,
            previous: address(op.previous)?,
            atol: op.atol,
            rtol: op.rtol,
        };
        let launch = Reduce {
            x: address(op.high)?,
            error: Some(error),
            out: DevicePtr(sums.address()),
            samples: s.n,
            count: s.positions() * s.c,
        };
        reduce::reduce(shared.gpu(), &launch)?;
        // Sum, sum of squares and largest magnitude of every sample.
        let sums = transfer::read(shared, &sums, 3 * s.n)?;
        Ok(sums.chunks_exact(3).map(|sums| f64::from(sums[1])).sum())
    }

    fn pace(&self) -> Result<(), TensorError> {
        Ok(self.shared().pace.step(self.shared().gpu())?)
    }
}
