//! Latents of a run: in host memory, or on the device that the model runs on.
//!
//! Samplers are written once, over [`Field`]s. On the host a field is a [`HostTensor`] and every update is computed
//! at once. On a device it stays there from the first step to the last, and nothing waits: noise is copied to it,
//! the network reads it, and what the network gives is not yet worked on. A prediction is *pending* until somebody
//! needs it; if that is the sampler's update, one kernel does the prediction, guidance, the noise mask and the
//! update together.
//!
//! A field of one place may be combined with fields of the other: the sum is on the device.

use std::borrow::Cow;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::DiffusionError;
use crate::tensor::latents::{BlurWhere, Guide, MAX_OPERANDS, Part, Rule, Samples, ScaledError, Update};
use crate::tensor::{Backend, HostTensor, LatentOps, Planes, Tensor, TensorError};

/// A latent of a run, `[samples, channels, height, width]`. Cloning one on a device shares it.
#[derive(Clone, Debug)]
pub enum Field {
    /// In host memory.
    Host(HostTensor),
    /// On a device.
    Device(DeviceField),
}

/// A latent on a device.
#[derive(Clone)]
pub struct DeviceField {
    device: Arc<dyn Backend>,
    shape: [usize; 4],
    content: Arc<Mutex<Content>>,
}

enum Content {
    Ready(Arc<Planes>),
    Pending(Pending),
}

/// A prediction that is still the network's output.
#[derive(Clone)]
struct Pending {
    cond: Output,
    /// The negative side's output, the field of that side alone, and the guidance scale.
    uncond: Option<(Output, DeviceField, f32)>,
    x: Arc<Planes>,
    skip: f32,
    scale: f32,
    /// A mask of one channel, and what is under it.
    inpaint: Option<(Arc<Planes>, Arc<Planes>)>,
}

/// A network's output, from one sample on.
#[derive(Clone)]
struct Output {
    output: Arc<Tensor>,
    first: usize,
}

impl Output {
    fn samples(&self) -> Samples<'_> {
        Samples { output: &self.output, first: self.first }
    }
}

/// How predictions follow from a network's output for `x`: `skip·x + scale·output`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PredictionFactors {
    /// Factor of x.
    pub skip: f32,
    /// Factor of the output.
    pub scale: f32,
}

impl Pending {
    fn guide<'a>(&'a self, step: Option<Update<'a>>) -> Guide<'a> {
        Guide {
            cond: self.cond.samples(),
            uncond: self.uncond.as_ref().map(|(output, ..)| output.samples()),
            x: &self.x,
            skip: self.skip,
            scale: self.scale,
            cfg: self.uncond.as_ref().map_or(1.0, |(.., scale)| *scale),
            inpaint: self.inpaint.as_ref().map(|(mask, original)| (mask.as_ref(), original.as_ref())),
            step,
        }
    }

    /// Whether both are predictions of one call's kind for the same latent, neither guided nor masked.
    fn is_other_side_of(&self, other: &Self) -> bool {
        let is_plain = |p: &Self| p.uncond.is_none() && p.inpaint.is_none();
        let is_alike = (self.skip, self.scale) == (other.skip, other.scale);
        is_plain(self) && is_plain(other) && is_alike && Arc::ptr_eq(&self.x, &other.x)
    }
}

impl fmt::Debug for DeviceField {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceField {:?} on {}", self.shape, self.device.info().name)
    }
}

impl DeviceField {
    fn ready(device: &Arc<dyn Backend>, planes: Planes) -> Self {
        let shape = planes.shape();
        Self::of(device, shape, Content::Ready(Arc::new(planes)))
    }

    fn of(device: &Arc<dyn Backend>, shape: [usize; 4], content: Content) -> Self {
        Self { device: device.clone(), shape, content: Arc::new(Mutex::new(content)) }
    }

    fn content(&self) -> MutexGuard<'_, Content> {
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pending(&self) -> Option<Pending> {
        match &*self.content() {
            Content::Pending(pending) => Some(pending.clone()),
            Content::Ready(_) => None,
        }
    }

    fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.content, &other.content)
    }

    /// The device's arithmetic.
    fn ops(&self) -> Result<&dyn LatentOps, DiffusionError> {
        self.device.latent_ops().ok_or_else(|| {
            let what = "a latent on a device that samples in host memory".into();
            failed(TensorError::Unsupported { op: "sampling", what })
        })
    }

    /// The memory, computed if it is pending.
    pub fn planes(&self) -> Result<Arc<Planes>, DiffusionError> {
        let mut content = self.content();
        let pending = match &*content {
            Content::Ready(planes) => return Ok(planes.clone()),
            Content::Pending(pending) => pending,
        };
        let guided = self.ops()?.guide(&pending.guide(None)).map_err(failed)?;
        let planes = Arc::new(guided.denoised);
        *content = Content::Ready(planes.clone());
        Ok(planes)
    }

    fn settle(&self, planes: Planes) {
        *self.content() = Content::Ready(Arc::new(planes));
    }

    /// The part that begins at this row and column and has this height and width.
    pub fn crop(&self, at: [usize; 2], size: [usize; 2]) -> Result<Self, DiffusionError> {
        let part = self.ops()?.crop(&*self.planes()?, at, size).map_err(failed)?;
        Ok(Self::ready(&self.device, part))
    }

    /// Filtered where a map says so: see [`LatentOps::blur_where`].
    pub fn blur_where(&self, op: &BlurWhere<'_>) -> Result<Self, DiffusionError> {
        let blurred = self.ops()?.blur_where(&*self.planes()?, op).map_err(failed)?;
        Ok(Self::ready(&self.device, blurred))
    }

    /// Its frequencies scaled: see [`LatentOps::scale_bands`].
    pub fn scale_bands(&self, cutoff: usize, low: f32, high: f32) -> Result<Self, DiffusionError> {
        let scaled = self.ops()?.scale_bands(&*self.planes()?, cutoff, low, high).map_err(failed)?;
        Ok(Self::ready(&self.device, scaled))
    }

    /// Samples, channels, height and width.
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// The device.
    pub fn device(&self) -> &Arc<dyn Backend> {
        &self.device
    }
}

/// A prediction of a part of the picture.
#[derive(Debug)]
pub struct Placed {
    /// The prediction.
    pub field: Field,
    /// Row and column of the picture where it begins.
    pub at: [usize; 2],
    /// Its weight everywhere, if there are no weights by place.
    pub strength: f32,
    /// Its weights by place, `[any, 1, height, width]`.
    pub weights: Option<Field>,
}

fn failed(error: TensorError) -> DiffusionError {
    DiffusionError::model(error)
}

impl From<HostTensor> for Field {
    fn from(x: HostTensor) -> Self {
        Field::Host(x)
    }
}

impl Field {
    /// A latent for a run on `device`; in host memory without one.
    pub fn on(device: Option<&Arc<dyn Backend>>, x: HostTensor) -> Result<Self, DiffusionError> {
        let Some((device, ops)) = device.and_then(|d| Some((d, d.latent_ops()?))) else {
            return Ok(Field::Host(x));
        };
        let planes = ops.upload_latent(&x).map_err(failed)?;
        Ok(Field::Device(DeviceField::ready(device, planes)))
    }

    /// The predictions for `x` from equal shares of the samples of a network's output.
    pub fn predictions(
        x: &DeviceField,
        output: Tensor,
        factors: PredictionFactors,
    ) -> Result<Vec<Self>, DiffusionError> {
        let (planes, output) = (x.planes()?, Arc::new(output));
        let shares = output.shape().n / x.shape[0].max(1);
        let share = |i: usize| {
            let pending = Pending {
                cond: Output { output: output.clone(), first: i * x.shape[0] },
                uncond: None,
                x: planes.clone(),
                skip: factors.skip,
                scale: factors.scale,
                inpaint: None,
            };
            Field::Device(DeviceField::of(&x.device, x.shape, Content::Pending(pending)))
        };
        Ok((0..shares).map(share).collect())
    }

    /// Extent of every dimension.
    pub fn shape(&self) -> &[usize] {
        match self {
            Field::Host(x) => x.shape(),
            Field::Device(x) => &x.shape,
        }
    }

    /// Extent of dimension `i`; 1 if there is no such dimension.
    pub fn dim(&self, i: usize) -> usize {
        self.shape().get(i).copied().unwrap_or(1)
    }

    /// The latent on its device, if it is on one.
    pub fn on_device(&self) -> Option<&DeviceField> {
        match self {
            Field::Host(_) => None,
            Field::Device(x) => Some(x),
        }
    }

    /// Whether both are one and the same latent on a device.
    pub fn is_same_on_device(&self, other: &Self) -> bool {
        match (self, other) {
            (Field::Device(a), Field::Device(b)) => a.is(b),
            _ => false,
        }
    }

    /// The latent in host memory; waits for the device if it is there.
    pub fn to_host(&self) -> Result<Cow<'_, HostTensor>, DiffusionError> {
        match self {
            Field::Host(x) => Ok(Cow::Borrowed(x)),
            Field::Device(x) => Ok(Cow::Owned(x.ops()?.download_latent(&*x.planes()?).map_err(failed)?)),
        }
    }

    /// The same, giving up the field.
    pub fn into_host(self) -> Result<HostTensor, DiffusionError> {
        match self {
            Field::Host(x) => Ok(x),
            Field::Device(_) => self.to_host().map(Cow::into_owned),
        }
    }

    /// The memory on `device`, copied there if it is on the host.
    fn planes_on(&self, device: &DeviceField) -> Result<Arc<Planes>, DiffusionError> {
        match self {
            Field::Device(x) => x.planes(),
            Field::Host(x) => device.ops()?.upload_latent(x).map(Arc::new).map_err(failed),
        }
    }

    /// The latent where `other` is: copied to its device if it is on the host and `other` is not.
    pub fn beside(self, other: &Self) -> Result<Self, DiffusionError> {
        match (self, other) {
            (Field::Host(x), Field::Device(other)) => Self::on(Some(&other.device), x),
            (x, _) => Ok(x),
        }
    }

    /// Σ coefficient · field with f64 coefficients, each rounded once; at least one term.
    ///
    /// On a device a pending prediction among the terms is worked out by the same kernel.
    pub fn lincomb(terms: &[(f64, &Self)]) -> Result<Self, DiffusionError> {
        let Some(device) = terms.iter().find_map(|(_, x)| x.on_device()) else {
            let on_host = terms.iter().filter_map(|&(c, x)| match x {
                Field::Host(x) => Some((c as f32, x)),
                Field::Device(_) => None,
            });
            return Ok(Field::Host(HostTensor::lincomb(&on_host.collect::<Vec<_>>())));
        };
        if let Some(next) = Self::step(device, terms)? {
            return Ok(next);
        }
        let planes = terms.iter().map(|(_, x)| x.planes_on(device)).collect::<Result<Vec<_>, _>>()?;
        let terms: Vec<(f32, &Planes)> =
            terms.iter().zip(&planes).map(|(&(c, _), x)| (c as f32, x.as_ref())).collect();
        let sum = device.ops()?.lincomb(&terms).map_err(failed)?;
        Ok(Field::Device(DeviceField::ready(&device.device, sum)))
    }

    /// The sum together with the first pending prediction among its terms; `None` if there is none, or too many
    /// other terms.
    fn step(device: &DeviceField, terms: &[(f64, &Self)]) -> Result<Option<Self>, DiffusionError> {
        let pending = terms.iter().filter_map(|(_, x)| x.on_device());
        // A guided prediction first: the negative side alone is part of it.
        let mut pending: Vec<(&DeviceField, Pending)> =
            pending.filter_map(|x| x.pending().map(|p| (x, p))).collect();
        pending.sort_by_key(|(_, p)| p.uncond.is_none());
        let Some((field, pending)) = pending.into_iter().next() else { return Ok(None) };
        let (mut of_x, mut of_denoised, mut of_uncond) = (0.0, 0.0, 0.0);
        let mut rest: Vec<(f64, &Self)> = Vec::new();
        for &(factor, term) in terms {
            let is = |other: &DeviceField| term.on_device().is_some_and(|x| x.is(other));
            let is_x = term.on_device().is_some_and(|x| match &*x.content() {
                Content::Ready(planes) => Arc::ptr_eq(planes, &pending.x),
                Content::Pending(_) => false,
            });
            match () {
                () if is(field) => of_denoised += factor,
                () if is_x => of_x += factor,
                () if pending.uncond.as_ref().is_some_and(|(_, uncond, _)| is(uncond)) => of_uncond += factor,
                () => rest.push((factor, term)),
            }
        }
        if rest.len() > MAX_OPERANDS {
            return Ok(None);
        }
        let planes = rest.iter().map(|(_, x)| x.planes_on(device)).collect::<Result<Vec<_>, _>>()?;
        let operands: Vec<(f32, &Planes)> =
            rest.iter().zip(&planes).map(|(&(c, _), x)| (c as f32, x.as_ref())).collect();
        let (of_x, of_denoised, of_uncond) = (of_x as f32, of_denoised as f32, of_uncond as f32);
        let update = Update { of_x, of_denoised, of_uncond, operands: &operands };
        let guided = device.ops()?.guide(&pending.guide(Some(update))).map_err(failed)?;
        field.settle(guided.denoised);
        Ok(guided.next.map(|next| Field::Device(DeviceField::ready(&device.device, next))))
    }

    /// Zeros, where `self` is.
    pub fn zeros(&self) -> Result<Self, DiffusionError> {
        match self {
            Field::Host(x) => Ok(HostTensor::zeros(x.shape()).into()),
            Field::Device(_) => Self::lincomb(&[(0.0, self)]),
        }
    }

    /// `self + factor·(to − from)`.
    pub fn plus(&self, factor: f64, (to, from): (&Self, &Self)) -> Result<Self, DiffusionError> {
        if let (Field::Host(x), Field::Host(to), Field::Host(from)) = (self, to, from) {
            let change = to.zip(from, |t, f| (t - f) * factor as f32);
            return Ok(Field::Host(x.zip(&change, |x, c| x + c)));
        }
        Self::lincomb(&[(1.0, self), (factor, to), (-factor, from)])
    }

    /// Predictions combined by a rule, or in host memory by `on_host`, which does the same.
    pub fn combined<const N: usize>(
        rule: Rule,
        inputs: [&Self; N],
        on_host: impl FnOnce([&HostTensor; N]) -> HostTensor,
    ) -> Result<Self, DiffusionError> {
        let Some(device) = inputs.iter().find_map(|x| x.on_device()) else {
            let inputs = inputs.iter().map(|x| x.to_host()).collect::<Result<Vec<_>, _>>()?;
            return Ok(Field::Host(on_host(std::array::from_fn(|i| &*inputs[i]))));
        };
        let planes = inputs.iter().map(|x| x.planes_on(device)).collect::<Result<Vec<_>, _>>()?;
        let planes: Vec<&Planes> = planes.iter().map(AsRef::as_ref).collect();
        let combined = device.ops()?.combine(rule, &planes).map_err(failed)?;
        Ok(Field::Device(DeviceField::ready(&device.device, combined)))
    }

    /// `Σ weight·part / (least + Σ weight)` at every place of a picture like `like`, on the parts' device.
    pub fn mean_by_place(parts: &[Placed], like: &Self, least: f32) -> Result<Self, DiffusionError> {
        let place = parts.iter().map(|part| &part.field).chain([like]).find_map(Field::on_device);
        let (Some(device), &[n, c, h, w]) = (place, like.shape()) else {
            let what = "parts of a picture in host memory".into();
            return Err(failed(TensorError::Unsupported { op: "mean by place", what }));
        };
        let planes = |x: &Self| x.planes_on(device);
        let on_device = parts.iter().map(|part| {
            let weights = part.weights.as_ref().map(planes).transpose()?;
            Ok((part, planes(&part.field)?, weights))
        });
        let on_device = on_device.collect::<Result<Vec<_>, DiffusionError>>()?;
        let placed = on_device.iter().map(|(part, x, weights)| {
            let (at, strength) = (part.at, part.strength);
            Part { x, at, strength, weights: weights.as_deref() }
        });
        let placed: Vec<Part<'_>> = placed.collect();
        let mean = device.ops()?.mean_by_place(&placed, [n, c, h, w], least).map_err(failed)?;
        Ok(Field::Device(DeviceField::ready(&device.device, mean)))
    }

    /// Classifier-free guidance: `uncond + scale·(cond − uncond)`.
    pub fn guided(cond: &Self, uncond: &Self, scale: f64) -> Result<Self, DiffusionError> {
        if let (Field::Device(cond), Field::Device(uncond)) = (cond, uncond)
            && let (Some(positive), Some(negative)) = (cond.pending(), uncond.pending())
            && positive.is_other_side_of(&negative)
        {
            let uncond = Some((negative.cond, uncond.clone(), scale as f32));
            let pending = Content::Pending(Pending { uncond, ..positive });
            return Ok(Field::Device(DeviceField::of(&cond.device, cond.shape, pending)));
        }
        if let (Field::Host(_), Field::Host(_)) = (cond, uncond) {
            return uncond.plus(scale, (cond, uncond));
        }
        Self::lincomb(&[(1.0 - scale, uncond), (scale, cond)])
    }

    /// `self·mask + other·(1 − mask)`; the mask has one channel or all.
    pub fn blended(&self, other: &Self, mask: &Self) -> Result<Self, DiffusionError> {
        let Some(device) = [self, other, mask].into_iter().find_map(Field::on_device) else {
            let (x, other, mask) = (self.to_host()?, other.to_host()?, mask.to_host()?);
            let masked = x.zip(&mask, |v, m| v * m);
            return Ok(Field::Host(masked.zip(&other.zip(&mask, |v, m| v * (1.0 - m)), |a, b| a + b)));
        };
        let (under, mask) = (other.planes_on(device)?, mask.planes_on(device)?);
        if let Some(pending) = self.on_device().and_then(DeviceField::pending)
            && pending.inpaint.is_none()
            && mask.extent().c == 1
        {
            let pending = Content::Pending(Pending { inpaint: Some((mask, under)), ..pending });
            return Ok(Field::Device(DeviceField::of(&device.device, device.shape, pending)));
        }
        let x = self.planes_on(device)?;
        let blended = device.ops()?.blend(&x, &under, &mask).map_err(failed)?;
        Ok(Field::Device(DeviceField::ready(&device.device, blended)))
    }

    /// `Σ ((high − low)/max(atol, rtol·max(|low|, |previous|)))²`; waits for it.
    pub fn error_sum(
        low: &Self,
        high: &Self,
        previous: &Self,
        (atol, rtol): (f64, f64),
    ) -> Result<f64, DiffusionError> {
        if let Some(device) = [low, high, previous].into_iter().find_map(Field::on_device) {
            let (low, high) = (low.planes_on(device)?, high.planes_on(device)?);
            let previous = previous.planes_on(device)?;
            let (atol, rtol) = (atol as f32, rtol as f32);
            let error = ScaledError { low: &low, high: &high, previous: &previous, atol, rtol };
            return device.ops()?.error_sum(&error).map_err(failed);
        }
        let (low, high, previous) = (low.to_host()?, high.to_host()?, previous.to_host()?);
        let values = low.data().iter().zip(high.data()).zip(previous.data());
        let errors = values.map(|((&l, &h), &p)| {
            let allowed = (rtol * f64::from(l.abs().max(p.abs()))).max(atol);
            (f64::from(l - h) / allowed).powi(2)
        });
        Ok(errors.sum())
    }

    /// Whether noise for it that is drawn on the way comes from its device's generator.
    pub fn draws_noise(&self) -> bool {
        self.on_device().and_then(|x| x.ops().ok()).is_some_and(LatentOps::draws_noise)
    }

    /// Noise of an NVIDIA GPU's generator, on the device of `self`; `None` in host memory.
    pub fn gpu_noise(&self, seed: u64, offset: u64) -> Result<Option<(Self, u64)>, DiffusionError> {
        let Some(x) = self.on_device() else { return Ok(None) };
        let (noise, offset) = x.ops()?.randn(x.shape, seed, offset).map_err(failed)?;
        Ok(Some((Field::Device(DeviceField::ready(&x.device, noise)), offset)))
    }

    /// Called once a model call: keeps the host from running far ahead of the device.
    pub fn pace(&self) -> Result<(), DiffusionError> {
        match self.on_device() {
            Some(x) => x.ops()?.pace().map_err(failed),
            None => Ok(()),
        }
    }
}
