//! The op set on the device: from tensors to launches.

use std::sync::{Arc, Mutex, PoisonError};

use super::launch::attention::{self as attention_launch};
use super::launch::elementwise::{self, Act};
use super::launch::{conv, embed as embed_launch, gemm, image, norm};
use super::pool::{Pool, Usage, WeightMemory};
use super::record::Recorder;
use super::upload::Uploader;
use super::weights::{ConvBuffers, EmbeddingBuffer, LinearBuffers, NormBuffers};
use super::{CudaError, Element, Gpu, transfer};
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
    recorder: Recorder,
    pub(super) pressure: Arc<Mutex<Option<PressureHook>>>,
}

impl Shared {
    /// A device in use; at most `memory_limit` bytes of activations.
    pub fn new(gpu: Arc<Gpu>, memory_limit: Option<usize>) -> Arc<Self> {
        let (usage, pressure) = (Arc::<Usage>::default(), Arc::<Mutex<_>>::default());
        let pool = || Pool::new(gpu.clone(), usage.clone(), memory_limit, pressure.clone());
        Arc::new(Self {
            pool: pool(),
            recorder: Recorder::new(gpu.clone(), pool()),
            weights: WeightMemory::new(gpu.clone(), usage.clone()),
            uploader: Uploader::new(),
            gpu: gpu.clone(),
            usage,
            pressure,
        })
    }

    /// The device.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Recorded work.
    pub fn recorder(&self) -> &Recorder {
        &self.recorder
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

fn columns(op: &'static str, cols: &Cols<'_>) -> Result<Operand, TensorError> {
    let whole = operand(op, cols.tensor)?;
    Ok(Operand { ptr: whole.ptr.offset(cols.start * whole.element.size()), ..whole })
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

    fn dtype(&self) -> DType {
        match self.element {
            Element::F16 => DType::F16,
            Element::BF16 => DType::BF16,
            Element::F32 => DType::F32,
        }
    }

    fn alloc_as(&self, shape: Shape, dtype: DType) -> Result<Tensor, TensorError> {
        let bytes = [shape.n, shape.h, shape.w, shape.c, dtype.size()]
            .iter()
            .try_fold(1usize, |a, &b| a.checked_mul(b))
            .unwrap_or(usize::MAX);
        Ok(Tensor::new(shape, dtype, Storage::Device(self.shared.lend(bytes)?)))
    }

    fn label(&self, text: impl FnOnce() -> String) {
        let instruments = self.shared.gpu.driver().instruments();
        if instruments.is_tracing() {
            instruments.set_label(text());
        }
    }

    /// Fails unless `t` has the backend's own type.
    fn own(&self, op: &'static str, t: &Tensor) -> Result<Operand, TensorError> {
        let operand = operand(op, t)?;
        if operand.element != self.element {
            let what = format!("a {:?} tensor where {:?} is the backend's type", t.dtype(), self.dtype());
            return Err(TensorError::Unsupported { op, what });
        }
        Ok(operand)
    }
}

fn foreign(op: &'static str) -> TensorError {
    TensorError::ForeignWeight { op }
}
