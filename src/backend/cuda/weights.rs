//! Weights on the device: uploaded as stored, packed there into the kernels' layouts.

use std::borrow::Cow;

use super::Element;
use super::backend::Shared;
use super::launch::layout::{self, Convert, PackConv, PackLinear, PackVector, Stored, padded};
use crate::driver::DevicePtr;
use crate::tensor::buffer::DeviceBuffer;
use crate::tensor::check::size;
use crate::tensor::{
    ConvWeight, DType, Embedding, LinearParts, LinearWeight, NormWeight, Packed, RawTensor, TensorError,
};

/// Weight and bias of a linear layer or a convolution.
pub struct LinearBuffers {
    weight: DeviceBuffer,
    bias: Option<DeviceBuffer>,
}

impl LinearBuffers {
    /// Rows of K, the kernels' layout.
    pub fn weight(&self) -> DevicePtr {
        DevicePtr(self.weight.address())
    }

    /// f32, or null.
    pub fn bias(&self) -> DevicePtr {
        self.bias.as_ref().map_or(DevicePtr::NULL, |b| DevicePtr(b.address()))
    }
}

/// Scale and shift of a norm, f32.
pub struct NormBuffers {
    scale: DeviceBuffer,
    shift: DeviceBuffer,
}

impl NormBuffers {
    /// Scale of each channel.
    pub fn scale(&self) -> DevicePtr {
        DevicePtr(self.scale.address())
    }

    /// Shift of each channel.
    pub fn shift(&self) -> DevicePtr {
        DevicePtr(self.shift.address())
    }
}

/// An embedding table in the backend's type.
pub struct EmbeddingBuffer {
    table: DeviceBuffer,
    element: Element,
}

impl EmbeddingBuffer {
    /// The rows.
    pub fn table(&self) -> DevicePtr {
        DevicePtr(self.table.address())
    }

    /// Their type.
    pub fn element(&self) -> Element {
        self.element
    }
}

/// A stored tensor on the device, until the stream has passed the kernel that packs it.
struct Staged {
    memory: DeviceBuffer,
    stored: Stored,
}

impl Staged {
    fn ptr(&self) -> DevicePtr {
        DevicePtr(self.memory.address())
    }
}

/// Types that the packing kernels read; others are widened on the host.
fn stored(dtype: DType) -> Option<Stored> {
    match dtype {
        DType::F32 => Some(Stored::F32),
        DType::F16 => Some(Stored::F16),
        DType::BF16 => Some(Stored::BF16),
        DType::F8E4M3 => Some(Stored::F8E4M3),
        DType::F8E5M2 => Some(Stored::F8E5M2),
        _ => None,
    }
}

fn stage(
    shared: &Shared,
    op: &'static str,
    raw: &RawTensor<'_>,
    count: usize,
) -> Result<Staged, TensorError> {
    size(op, "elements of a stored tensor", count, raw.numel())?;
    size(op, "bytes of a stored tensor", count * raw.dtype.size(), raw.bytes.len())?;
    if raw.dtype == DType::Bool {
        return Err(TensorError::WeightType(raw.dtype));
    }
    let (bytes, stored): (Cow<'_, [u8]>, Stored) = match stored(raw.dtype) {
        Some(stored) => (Cow::Borrowed(&raw.bytes), stored),
        None => (Cow::Owned(bytemuck::cast_slice(&raw.to_f32()).to_vec()), Stored::F32),
    };
    let memory = shared.lend_weight(bytes.len())?;
    shared.uploader.upload(&shared.gpu, DevicePtr(memory.address()), &bytes)?;
    Ok(Staged { memory, stored })
}

/// A vector as f32 at `offset` of `dst`.
fn pack_vector(
    shared: &Shared,
    op: &'static str,
    raw: &RawTensor<'_>,
    dst: &DeviceBuffer,
    (offset, is_geglu): (usize, bool),
) -> Result<(), TensorError> {
    let n = raw.numel();
    let staged = stage(shared, op, raw, n)?;
    let dst = DevicePtr(dst.address());
    let launch = PackVector { src: staged.ptr(), from: staged.stored, dst, n, offset, is_geglu };
    Ok(layout::pack_vector(&shared.gpu, &launch)?)
}

/// See [`crate::tensor::Backend::pack_linear`].
pub fn pack_linear(
    shared: &Shared,
    to: Element,
    parts: &LinearParts<'_>,
) -> Result<LinearWeight, TensorError> {
    const OP: &str = "pack_linear";
    let k = parts.weights.first().map_or(0, |w| w.shape.get(1).copied().unwrap_or(1));
    let heights: Vec<usize> = parts.weights.iter().map(|w| w.shape.first().copied().unwrap_or(0)).collect();
    let rows: usize = heights.iter().sum();
    let memory = shared.lend_weight(rows * padded(k) * to.size())?;
    let mut row_offset = 0;
    for (raw, &n) in parts.weights.iter().zip(&heights) {
        size(OP, "inputs of a matrix", k, raw.shape.iter().skip(1).product())?;
        let staged = stage(shared, OP, raw, n * k)?;
        let launch = PackLinear {
            src: staged.ptr(),
            from: staged.stored,
            dst: DevicePtr(memory.address()),
            to,
            n,
            k,
            row_offset,
            is_geglu: parts.is_geglu,
        };
        layout::pack_linear(&shared.gpu, &launch)?;
        row_offset += n;
    }
    let bias = match parts.biases {
        [] => None,
        biases => {
            size(OP, "biases", heights.len(), biases.len())?;
            let bias = shared.lend_weight(rows * 4)?;
            let mut offset = 0;
            for (raw, &n) in biases.iter().zip(&heights) {
                size(OP, "length of a bias", n, raw.numel())?;
                pack_vector(shared, OP, raw, &bias, (offset, parts.is_geglu))?;
                offset += n;
            }
            Some(bias)
        }
    };
    let n = if parts.is_geglu { rows / 2 } else { rows };
    let packed = Packed::new(LinearBuffers { weight: memory, bias });
    Ok(LinearWeight { n, k, is_geglu: parts.is_geglu, packed })
}

/// See [`crate::tensor::Backend::pack_conv`].
pub fn pack_conv(
    shared: &Shared,
    to: Element,
    weight: &RawTensor<'_>,
    bias: Option<&RawTensor<'_>>,
) -> Result<ConvWeight, TensorError> {
    const OP: &str = "pack_conv";
    let &[cout, cin, kh, kw] = weight.shape else {
        let found = weight.shape.len();
        return Err(TensorError::Size { op: OP, what: "dimensions of the weight", expected: 4, found });
    };
    let taps = kh * kw;
    let memory = shared.lend_weight(cout * taps * padded(cin) * to.size())?;
    let staged = stage(shared, OP, weight, cout * cin * taps)?;
    let launch = PackConv {
        src: staged.ptr(),
        from: staged.stored,
        dst: DevicePtr(memory.address()),
        to,
        cout,
        cin,
        taps,
    };
    layout::pack_conv(&shared.gpu, &launch)?;
    drop(staged);
    let bias = match bias {
        Some(raw) => {
            size(OP, "length of the bias", cout, raw.numel())?;
            let bias = shared.lend_weight(cout * 4)?;
            pack_vector(shared, OP, raw, &bias, (0, false))?;
            Some(bias)
        }
        None => None,
    };
    let packed = Packed::new(LinearBuffers { weight: memory, bias });
    Ok(ConvWeight { cout, cin, kh, kw, packed })
}

/// See [`crate::tensor::Backend::pack_norm`].
pub fn pack_norm(
    shared: &Shared,
    scale: &RawTensor<'_>,
    shift: &RawTensor<'_>,
) -> Result<NormWeight, TensorError> {
    const OP: &str = "pack_norm";
    let c = scale.numel();
    size(OP, "length of the shift", c, shift.numel())?;
    let buffers = NormBuffers { scale: shared.lend_weight(c * 4)?, shift: shared.lend_weight(c * 4)? };
    pack_vector(shared, OP, scale, &buffers.scale, (0, false))?;
    pack_vector(shared, OP, shift, &buffers.shift, (0, false))?;
    Ok(NormWeight { c, packed: Packed::new(buffers) })
}

/// See [`crate::tensor::Backend::pack_embedding`].
pub fn pack_embedding(shared: &Shared, to: Element, table: &RawTensor<'_>) -> Result<Embedding, TensorError> {
    const OP: &str = "pack_embedding";
    let &[rows, width] = table.shape else {
        let found = table.shape.len();
        return Err(TensorError::Size { op: OP, what: "dimensions of the table", expected: 2, found });
    };
    let count = rows * width;
    let memory = shared.lend_weight(count * to.size())?;
    let staged = stage(shared, OP, table, count)?;
    let dst = DevicePtr(memory.address());
    layout::convert(&shared.gpu, &Convert { src: staged.ptr(), from: staged.stored, dst, to, count })?;
    Ok(Embedding { rows, width, packed: Packed::new(EmbeddingBuffer { table: memory, element: to }) })
}
