//! The op set on the device: from tensors to launches.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use super::latents::Pace;
use super::launch::elementwise::{self, Act, Function};
use super::launch::epilogue::{Epilogue, Rows};
use super::launch::{attention, attention_drawn, bislerp, conv, copy, gemm, image, norm, reweight};
use super::pool::{Pool, Usage, WeightMemory};
use super::record::Recorder;
use super::upload::Uploader;
use super::weights::{self, LinearBuffers, NormBuffers};
use super::{Element, Gpu, transfer};
use crate::driver::DevicePtr;
use crate::tensor::check::{shape, size};
use crate::tensor::*;

/// What the backends of one device share.
pub struct Shared {
    pub(super) gpu: Arc<Gpu>,
    pub(super) usage: Arc<Usage>,
    pub(super) pool: Arc<Pool>,
    pub(super) weights: Arc<WeightMemory>,
    pub(super) uploader: Uploader,
    pub(super) pace: Pace,
    pub(super) draws_noise: AtomicBool,
    recorder: Recorder,
    pressure: Mutex<Vec<PressureHook>>,
}

impl Shared {
    /// A device in use; at most `memory_limit` bytes of activations.
    pub fn new(gpu: Arc<Gpu>, memory_limit: Option<usize>) -> Arc<Self> {
        let usage = Arc::<Usage>::default();
        let pool = || Pool::new(gpu.clone(), usage.clone(), memory_limit);
        let shared = Arc::new(Self {
            pool: pool(),
            recorder: Recorder::new(gpu.clone(), pool()),
            weights: WeightMemory::new(gpu.clone(), usage.clone()),
            uploader: Uploader::new(),
            pace: Pace::default(),
            draws_noise: AtomicBool::new(false),
            pressure: Mutex::default(),
            gpu: gpu.clone(),
            usage,
        });
        let relieved = Arc::downgrade(&shared);
        gpu.set_relief(Arc::new(move || {
            if let Some(shared) = relieved.upgrade() {
                shared.relieve();
            }
        }));
        shared
    }

    /// Whether noise that samplers draw on the way comes from the device's generator.
    pub fn set_draws_noise(&self, on: bool) {
        self.draws_noise.store(on, Relaxed);
    }

    /// Lets go of cached memory, recordings and idle models.
    fn relieve(&self) {
        let hooks = self.pressure.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let freed = hooks.iter().filter(|hook| hook()).count();
        tracing::debug!(freed, "idle models were asked to go");
        self.recorder.clear();
        self.pool.trim();
    }

    /// The device.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Recorded work.
    pub fn recorder(&self) -> &Recorder {
        &self.recorder
    }

    /// Memory for a weight, or for its stored form while it is packed.
    ///
    /// Not during a capture: recorded products fetch weights while the kernels before them still run
    /// (`w_is_constant`), so none of those may be the one that packs a weight.
    pub(super) fn lend_weight(&self, bytes: usize) -> Result<buffer::DeviceBuffer, TensorError> {
        if self.gpu.is_capturing() {
            let reason = "a weight was first asked for while its model's work was captured";
            return Err(TensorError::Device(reason.into()));
        }
        self.weights.lend(bytes)
    }

    /// Memory for an activation.
    pub(super) fn lend(&self, bytes: usize) -> Result<buffer::DeviceBuffer, TensorError> {
        if self.recorder.is_recording() { self.recorder.pool().lend(bytes) } else { self.pool.lend(bytes) }
    }

    /// Gives cached memory back.
    fn trim(&self) {
        self.recorder.clear();
        self.pool.trim();
        let given_back = self
            .uploader
            .release(&self.gpu)
            .and_then(|()| self.pace.release(&self.gpu))
            .and_then(|()| self.gpu.drop_workspace())
            .and_then(|()| Ok(self.gpu.driver().synchronize(self.gpu.stream())?))
            .and_then(|()| Ok(self.gpu.driver().trim()?));
        if let Err(error) = given_back {
            tracing::warn!(%error, "device memory was not given back");
        }
    }
}

/// Runs the op set on a GPU, with activations of one element type.
pub struct CudaBackend {
    shared: Arc<Shared>,
    element: Element,
}

/// An activation as a launcher takes it.
pub(super) struct Operand {
    pub ptr: DevicePtr,
    pub element: Element,
    /// Elements from one row to the next.
    pub pitch: usize,
}

impl Operand {
    /// As rows of a matrix.
    pub fn rows(&self) -> Rows {
        Rows::new(self.ptr, self.pitch)
    }
}

/// The device side of a tensor.
pub(super) fn operand(op: &'static str, t: &Tensor) -> Result<Operand, TensorError> {
    let Storage::Device(buffer) = t.storage() else {
        return Err(TensorError::Unsupported { op, what: "a tensor in host memory".into() });
    };
    let element = element_of(op, t.dtype())?;
    if buffer.bytes() < t.shape().len() * element.size() {
        let what = format!("a tensor whose memory is shorter than {}", t.shape());
        return Err(TensorError::Unsupported { op, what });
    }
    Ok(Operand { ptr: DevicePtr(buffer.address()), element, pitch: t.shape().c })
}

fn element_of(op: &'static str, dtype: DType) -> Result<Element, TensorError> {
    match dtype {
        DType::F16 => Ok(Element::F16),
        DType::BF16 => Ok(Element::BF16),
        DType::F32 => Ok(Element::F32),
        other => Err(TensorError::Unsupported { op, what: format!("an activation of type {other:?}") }),
    }
}

fn act(act: Activation) -> Act {
    match act {
        Activation::None => Act::None,
        Activation::Silu => Act::Silu,
        Activation::Gelu => Act::Gelu,
        Activation::QuickGelu => Act::QuickGelu,
        Activation::Relu => Act::Relu,
        Activation::LeakyRelu => Act::LeakyRelu,
    }
}

impl CudaBackend {
    /// A backend on a device in use.
    pub fn new(shared: Arc<Shared>, element: Element) -> Self {
        Self { shared, element }
    }

    /// What the backends of this device share.
    pub fn shared(&self) -> &Shared {
        &self.shared
    }

    /// Type of activations.
    pub(super) fn dtype(&self) -> DType {
        match self.element {
            Element::F16 => DType::F16,
            Element::BF16 => DType::BF16,
            Element::F32 => DType::F32,
        }
    }

    /// An activation of another type.
    pub(super) fn alloc_as(&self, shape: Shape, dtype: DType) -> Result<Tensor, TensorError> {
        let bytes = [shape.n, shape.h, shape.w, shape.c, dtype.size()]
            .iter()
            .try_fold(1usize, |a, &b| a.checked_mul(b))
            .unwrap_or(usize::MAX);
        Ok(Tensor::new(shape, dtype, Storage::Device(self.shared.lend(bytes)?)))
    }

    /// Fails unless `t` has the backend's own type.
    pub(super) fn own(&self, op: &'static str, t: &Tensor) -> Result<Operand, TensorError> {
        let operand = operand(op, t)?;
        if operand.element != self.element {
            let what = format!("a {:?} tensor where {:?} is the backend's type", t.dtype(), self.dtype());
            return Err(TensorError::Unsupported { op, what });
        }
        Ok(operand)
    }

    pub(super) fn own_columns(&self, op: &'static str, cols: &Cols<'_>) -> Result<Operand, TensorError> {
        let whole = self.own(op, cols.tensor)?;
        Ok(Operand { ptr: whole.ptr.offset(cols.start * whole.element.size()), ..whole })
    }

    /// `out = function(x)`.
    fn map(
        &self,
        op: &'static str,
        x: &Tensor,
        function: Function,
        out: &mut Tensor,
    ) -> Result<(), TensorError> {
        shape(op, x.shape(), out.shape())?;
        let launch = elementwise::Activate {
            x: self.own(op, x)?.ptr,
            out: self.own(op, out)?.ptr,
            count: x.shape().len(),
            function,
            element: self.element,
        };
        Ok(elementwise::activate(&self.shared.gpu, &launch)?)
    }

    /// The result of a product: the backend's own type or f32.
    fn epilogue(
        &self,
        op: &'static str,
        out: &Tensor,
        residual: Option<&Tensor>,
    ) -> Result<Epilogue, TensorError> {
        let result = operand(op, out)?;
        if result.element != self.element && result.element != Element::F32 {
            let what = format!("a {:?} result where {:?} is the backend's type", out.dtype(), self.dtype());
            return Err(TensorError::Unsupported { op, what });
        }
        Ok(Epilogue {
            residual: residual.map(|t| self.own(op, t).map(|t| t.rows())).transpose()?,
            out_f32: result.element == Element::F32,
            ..Epilogue::to(result.rows())
        })
    }
}

impl Backend for CudaBackend {
    fn info(&self) -> BackendInfo {
        let device = self.shared.gpu.driver().device();
        BackendInfo {
            kind: "cuda",
            name: format!("cuda:{} {} ({})", device.ordinal, device.name, self.element.suffix()),
            index: Some(device.ordinal),
            threads: 0,
            element_bytes: self.element.size(),
        }
    }

    fn memory(&self) -> MemoryUse {
        let shared = &self.shared;
        // A driver that no longer answers has nothing to give.
        let memory = shared.gpu.driver().memory().unwrap_or_default();
        shared.usage.report(memory, shared.gpu.workspace_bytes())
    }

    fn trim(&self) {
        self.shared.trim();
    }

    fn alloc(&self, shape: Shape) -> Result<Tensor, TensorError> {
        self.alloc_as(shape, self.dtype())
    }

    fn alloc_result(&self, shape: Shape) -> Result<Tensor, TensorError> {
        self.alloc_as(shape, DType::F32)
    }

    fn alloc_f32(&self, shape: Shape) -> Result<Tensor, TensorError> {
        self.alloc_as(shape, DType::F32)
    }

    fn pack_linear(&self, parts: &LinearParts<'_>) -> Result<LinearWeight, TensorError> {
        weights::pack_linear(&self.shared, self.element, parts)
    }

    fn pack_conv(
        &self,
        weight: &RawTensor<'_>,
        bias: Option<&RawTensor<'_>>,
    ) -> Result<ConvWeight, TensorError> {
        weights::pack_conv(&self.shared, self.element, weight, bias)
    }

    fn pack_norm(&self, scale: &RawTensor<'_>, shift: &RawTensor<'_>) -> Result<NormWeight, TensorError> {
        weights::pack_norm(&self.shared, scale, shift)
    }

    fn pack_embedding(&self, table: &RawTensor<'_>) -> Result<Embedding, TensorError> {
        weights::pack_embedding(&self.shared, self.element, table)
    }

    fn upload(&self, data: &[f32], layout: HostLayout, out: &mut Tensor) -> Result<(), TensorError> {
        transfer::upload(&self.shared, data, layout, out)
    }

    fn download(&self, x: &Tensor, layout: HostLayout, out: &mut [f32]) -> Result<(), TensorError> {
        transfer::download(&self.shared, x, layout, out)
    }

    fn conv2d(&self, op: &Conv2d<'_>, out: &mut Tensor) -> Result<(), TensorError> {
        const OP: &str = "conv2d";
        op.check(out.shape())?;
        if out.shape().is_empty() {
            return Ok(());
        }
        let w = op.w.packed.downcast::<LinearBuffers>().ok_or(TensorError::ForeignWeight { op: OP })?;
        let s = op.x.shape();
        let time_bias = match &op.time_bias {
            Some(cols) => Some(self.own_columns(OP, cols)?.rows()),
            None => None,
        };
        let epilogue = Epilogue {
            bias: w.bias(),
            time_bias,
            act: act(op.act),
            scale: op.scale,
            ..self.epilogue(OP, out, op.residual)?
        };
        let launch = conv::Conv {
            x: self.own(OP, op.x)?.rows(),
            x2: op.x2.map(|t| self.own(OP, t).map(|t| t.rows())).transpose()?,
            w: w.weight(),
            w_is_constant: self.shared.gpu.is_capturing(),
            batch: s.n,
            height: s.h,
            width: s.w,
            c1: s.c,
            c2: op.x2.map_or(0, |t| t.shape().c),
            cout: op.w.cout,
            kernel: [op.w.kh, op.w.kw],
            stride: op.stride,
            padding: conv::Padding {
                top: op.pad.top,
                bottom: op.pad.bottom,
                left: op.pad.left,
                right: op.pad.right,
            },
            upsample: op.upsample2x,
            element: self.element,
            epilogue,
        };
        Ok(conv::conv(&self.shared.gpu, &launch)?)
    }

    fn linear(&self, op: &Linear<'_>, out: &mut Tensor) -> Result<(), TensorError> {
        const OP: &str = "linear";
        op.check(out.shape())?;
        if out.shape().is_empty() {
            return Ok(());
        }
        let w = op.w.packed.downcast::<LinearBuffers>().ok_or(TensorError::ForeignWeight { op: OP })?;
        let s = op.x.tensor.shape();
        let epilogue = Epilogue {
            bias: w.bias(),
            act: act(op.act),
            geglu: op.w.is_geglu,
            scale: op.scale,
            ..self.epilogue(OP, out, op.residual)?
        };
        let launch = gemm::Gemm {
            x: self.own_columns(OP, &op.x)?.rows(),
            x2: op.x2.as_ref().map(|cols| self.own_columns(OP, cols).map(|t| t.rows())).transpose()?,
            w: w.weight(),
            w_is_constant: self.shared.gpu.is_capturing(),
            m: s.rows(),
            n: if op.w.is_geglu { 2 * op.w.n } else { op.w.n },
            k1: op.x.width,
            k2: op.x2.as_ref().map_or(0, |cols| cols.width),
            rows_per_sample: s.positions(),
            element: self.element,
            epilogue,
        };
        Ok(gemm::gemm(&self.shared.gpu, &launch)?)
    }

    fn attention(&self, op: &Attention<'_>, out: &mut Tensor) -> Result<(), TensorError> {
        const OP: &str = "attention";
        op.check(out.shape())?;
        if out.shape().is_empty() {
            return Ok(());
        }
        let (sq, sk) = (op.q.tensor.shape(), op.k.tensor.shape());
        let [q, k, v] =
            [self.own_columns(OP, &op.q)?, self.own_columns(OP, &op.k)?, self.own_columns(OP, &op.v)?];
        let result = self.own(OP, out)?;
        let launch = attention::Attention {
            q: q.ptr,
            k: k.ptr,
            v: v.ptr,
            out: result.ptr,
            q_pitch: q.pitch,
            k_pitch: k.pitch,
            v_pitch: v.pitch,
            out_pitch: result.pitch,
            batch: sq.n,
            key_batch: sk.n,
            queries: sq.positions(),
            keys: sk.positions(),
            heads: op.heads,
            head_dim: op.q.width / op.heads,
            is_causal: op.is_causal,
            scale: op.scale,
            element: self.element,
        };
        Ok(attention::attention(&self.shared.gpu, &launch)?)
    }

    fn attention_drawn(&self, op: &AttentionDrawn<'_>, out: &mut Tensor) -> Result<(), TensorError> {
        const OP: &str = "attention_drawn";
        op.check(out.shape())?;
        let result = operand(OP, out)?;
        if result.element != Element::F32 {
            let what = format!("a {:?} result; it is f32", out.dtype());
            return Err(TensorError::Unsupported { op: OP, what });
        }
        let from = |cols: &Cols<'_>| -> Result<Rows, TensorError> {
            let whole = self.own_columns(OP, cols)?;
            let before = op.first * cols.tensor.shape().positions() * whole.pitch;
            Ok(Rows::new(whole.ptr.offset(before * whole.element.size()), whole.pitch))
        };
        let launch = attention_drawn::Drawn {
            q: from(&op.q)?,
            k: from(&op.k)?,
            out: result.ptr,
            samples: out.shape().n,
            queries: op.q.tensor.shape().positions(),
            keys: op.k.tensor.shape().positions(),
            heads: op.heads,
            head_dim: op.q.width / op.heads,
            scale: op.scale,
            element: self.element,
        };
        Ok(attention_drawn::drawn(&self.shared.gpu, &launch)?)
    }

    fn group_norm(&self, op: &GroupNorm<'_>, out: &mut Tensor) -> Result<(), TensorError> {
        const OP: &str = "group_norm";
        op.check(out.shape())?;
        if out.shape().is_empty() {
            return Ok(());
        }
        let w = op.w.packed.downcast::<NormBuffers>().ok_or(TensorError::ForeignWeight { op: OP })?;
        let s = op.x.shape();
        let launch = norm::GroupNorm {
            x: self.own(OP, op.x)?.ptr,
            x2: op.x2.map_or(Ok(DevicePtr::NULL), |t| self.own(OP, t).map(|t| t.ptr))?,
            scale: w.scale(),
            shift: w.shift(),
            out: self.own(OP, out)?.ptr,
            samples: s.n,
            pixels: s.positions(),
            c1: s.c,
            c2: op.x2.map_or(0, |t| t.shape().c),
            groups: op.groups,
            eps: op.eps,
            silu: op.silu,
            element: self.element,
        };
        Ok(norm::group_norm(&self.shared.gpu, &launch)?)
    }

    fn layer_norm(&self, op: &LayerNorm<'_>, out: &mut Tensor) -> Result<(), TensorError> {
        const OP: &str = "layer_norm";
        op.check(out.shape())?;
        if out.shape().is_empty() {
            return Ok(());
        }
        let w = op.w.packed.downcast::<NormBuffers>().ok_or(TensorError::ForeignWeight { op: OP })?;
        let s = op.x.shape();
        let launch = norm::LayerNorm {
            x: self.own(OP, op.x)?.ptr,
            scale: w.scale(),
            shift: w.shift(),
            out: self.own(OP, out)?.ptr,
            rows: s.rows(),
            channels: s.c,
            pitch: s.c,
            out_pitch: s.c,
            eps: op.eps,
            element: self.element,
        };
        Ok(norm::layer_norm(&self.shared.gpu, &launch)?)
    }

    fn embed(&self, op: &Embed<'_>, out: &mut Tensor) -> Result<(), TensorError> {
        op.check(out.shape())?;
        if out.shape().is_empty() {
            return Ok(());
        }
        transfer::embed(&self.shared, op, out)
    }

    fn timestep_embedding(&self, timesteps: &[f32], out: &mut Tensor) -> Result<(), TensorError> {
        size("timestep_embedding", "rows", timesteps.len(), out.shape().rows())?;
        if out.shape().is_empty() {
            return Ok(());
        }
        transfer::timestep_embedding(&self.shared, timesteps, out)
    }

    fn activate(&self, x: &Tensor, function: Activation, out: &mut Tensor) -> Result<(), TensorError> {
        self.map("activate", x, Function::Act(act(function)), out)
    }

    fn curve(&self, x: &Tensor, curve: Curve, out: &mut Tensor) -> Result<(), TensorError> {
        self.map("curve", x, Function::Curve(curve), out)
    }

    fn axpby(&self, a: f32, x: &Tensor, b: f32, y: &Tensor, out: &mut Tensor) -> Result<(), TensorError> {
        const OP: &str = "axpby";
        shape(OP, x.shape(), y.shape())?;
        shape(OP, x.shape(), out.shape())?;
        let launch = elementwise::Axpby {
            x: self.own(OP, x)?.ptr,
            y: self.own(OP, y)?.ptr,
            out: self.own(OP, out)?.ptr,
            count: x.shape().len(),
            a,
            b,
            element: self.element,
        };
        Ok(elementwise::axpby(&self.shared.gpu, &launch)?)
    }

    fn resize(&self, x: &Tensor, filter: Filter, out: &mut Tensor) -> Result<(), TensorError> {
        let (from, to) = (x.shape(), out.shape());
        check::resize(from, to)?;
        if to.is_empty() {
            return Ok(());
        }
        let (gpu, samples, channels, element) = (&self.shared.gpu, from.n, to.c, self.element);
        let (x, out) = (self.own("resize", x)?.ptr, self.own("resize", out)?.ptr);
        let (from, to) = ([from.h, from.w], [to.h, to.w]);
        let filter = match filter {
            Filter::Nearest => image::Filter::Nearest,
            Filter::NearestExact => image::Filter::NearestExact,
            Filter::Bilinear => image::Filter::Bilinear,
            Filter::Bicubic => image::Filter::Bicubic,
            Filter::Area => image::Filter::Area,
            Filter::Bislerp => {
                let launch = bislerp::Bislerp { x, out, samples, from, to, channels, element };
                return Ok(bislerp::bislerp(gpu, &launch)?);
            }
        };
        let launch = image::Resize { x, out, samples, from, to, channels, filter, element };
        Ok(image::resize(gpu, &launch)?)
    }

    fn swap_tokens(&self, op: &SwapTokens<'_>, out: &mut Tensor) -> Result<(), TensorError> {
        const OP: &str = "swap_tokens";
        op.check(out.shape())?;
        let x = self.own_columns(OP, &op.x)?;
        let launch = copy::Swap {
            x: copy::Columns { ptr: x.ptr, width: op.x.width, pitch: x.pitch },
            out: self.own(OP, out)?.ptr,
            tokens: out.shape().rows(),
            rows: op.rows,
            columns: op.columns,
            run: op.run,
            element: self.element,
        };
        Ok(copy::swap(&self.shared.gpu, &launch)?)
    }

    fn match_tokens(&self, op: &MatchTokens<'_>) -> Result<TokenRows, TensorError> {
        self.rows_of_tokens(op)
    }

    fn merge_tokens(&self, x: &Cols<'_>, rows: &TokenRows, out: &mut Tensor) -> Result<(), TensorError> {
        self.rows_from_tokens(x, rows, out)
    }

    fn spread_tokens(&self, x: &Tensor, rows: &TokenRows, out: &mut Tensor) -> Result<(), TensorError> {
        self.tokens_from_rows(x, rows, out)
    }

    fn concat(&self, parts: &[Cols<'_>], out: &mut Tensor) -> Result<(), TensorError> {
        const OP: &str = "concat";
        check::concat(parts, out.shape())?;
        let Operand { ptr, element, pitch } = self.own(OP, out)?;
        let columns = |part: &Cols<'_>| -> Result<copy::Columns, TensorError> {
            let Operand { ptr, pitch, .. } = self.own_columns(OP, part)?;
            Ok(copy::Columns { ptr, width: part.width, pitch })
        };
        let mut first = 0;
        for pair in parts.chunks(2) {
            let (a, b) = (columns(&pair[0])?, pair.get(1).map(columns).transpose()?);
            let launch = copy::Concat {
                a,
                b,
                out: ptr.offset(first * element.size()),
                out_pitch: pitch,
                rows: out.shape().rows(),
                element,
            };
            copy::concat(&self.shared.gpu, &launch)?;
            first += a.width + b.map_or(0, |b| b.width);
        }
        Ok(())
    }

    fn scale_half(&self, op: &ScaleHalf<'_>, out: &mut Tensor) -> Result<(), TensorError> {
        const OP: &str = "scale_half";
        let s = op.x.shape();
        shape(OP, s, out.shape())?;
        // The means over channels, on loan like any activation: a recording keeps their place.
        let means = if op.is_by_place { Some(self.shared.lend(4 * s.rows().max(1))?) } else { None };
        let launch = reweight::ScaleHalf {
            x: self.own(OP, op.x)?.ptr,
            out: self.own(OP, out)?.ptr,
            means: means.as_ref().map(|m| DevicePtr(m.address())),
            samples: s.n,
            places: s.positions(),
            channels: s.c,
            factor: op.factor,
            element: self.element,
        };
        Ok(reweight::scale_half(&self.shared.gpu, &launch)?)
    }

    fn scale_low_band(&self, x: &Tensor, factor: f32, out: &mut Tensor) -> Result<(), TensorError> {
        const OP: &str = "scale_low_band";
        let s = x.shape();
        shape(OP, s, out.shape())?;
        let launch = reweight::ScaleLowBand {
            x: self.own(OP, x)?.ptr,
            out: self.own(OP, out)?.ptr,
            samples: s.n,
            size: [s.h, s.w],
            channels: s.c,
            factor,
            element: self.element,
        };
        Ok(reweight::scale_low_band(&self.shared.gpu, &launch)?)
    }

    fn record(&self, key: u64, inputs: &[&Tensor], body: &mut Body<'_>) -> Result<Outcome, BodyError> {
        let alloc = |shape, dtype| self.alloc_as(shape, dtype);
        self.shared.recorder.run((key, self.element), inputs, body, alloc)
    }

    fn latent_ops(&self) -> Option<&dyn LatentOps> {
        Some(self)
    }

    fn on_pressure(&self, hook: PressureHook) {
        self.shared.pressure.lock().unwrap_or_else(PoisonError::into_inner).push(hook);
    }
}
