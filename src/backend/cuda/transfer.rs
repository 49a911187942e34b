//! Between host and device: tensors, tokens, timesteps.

use super::backend::{Operand, Shared, operand};
use super::launch::embed::{self, TimestepEmbedding, Timesteps};
use super::launch::layout::{self, Convert, Stored, ToNchw, ToNhwc};
use super::weights::EmbeddingBuffer;
use super::{CudaError, Element};
use crate::driver::DevicePtr;
use crate::tensor::buffer::DeviceBuffer;
use crate::tensor::check::size;
use crate::tensor::{Embed, EmbedRow, HostLayout, Tensor, TensorError};

fn stored(element: Element) -> Stored {
    match element {
        Element::F16 => Stored::F16,
        Element::BF16 => Stored::BF16,
        Element::F32 => Stored::F32,
    }
}

/// Host memory on the device, as long as the stream needs it.
fn staged(shared: &Shared, bytes: &[u8]) -> Result<DeviceBuffer, TensorError> {
    let memory = shared.lend(bytes.len())?;
    shared.uploader.upload(&shared.gpu, DevicePtr(memory.address()), bytes)?;
    Ok(memory)
}

/// See [`crate::tensor::Backend::upload`].
pub fn upload(
    shared: &Shared,
    data: &[f32],
    layout: HostLayout,
    out: &mut Tensor,
) -> Result<(), TensorError> {
    const OP: &str = "upload";
    let s = out.shape();
    size(OP, "number of values", s.len(), data.len())?;
    if s.is_empty() {
        return Ok(());
    }
    let Operand { ptr: dst, element, pitch } = operand(OP, out)?;
    let staging = staged(shared, bytemuck::cast_slice(data))?;
    let src = DevicePtr(staging.address());
    match layout {
        HostLayout::Nchw => layout::to_nhwc(
            &shared.gpu,
            &ToNhwc {
                src,
                dst,
                samples: s.n,
                channels: s.c,
                pixels: s.positions(),
                width: s.c,
                pitch,
                copies: 1,
                factor: 1.0,
                element,
            },
        )?,
        HostLayout::Nhwc => {
            let op = Convert { src, from: Stored::F32, dst, to: element, count: s.len() };
            layout::convert(&shared.gpu, &op)?;
        }
    }
    Ok(())
}

/// See [`crate::tensor::Backend::download`].
pub fn download(shared: &Shared, x: &Tensor, layout: HostLayout, out: &mut [f32]) -> Result<(), TensorError> {
    const OP: &str = "download";
    let s = x.shape();
    size(OP, "number of values", s.len(), out.len())?;
    if s.is_empty() {
        return Ok(());
    }
    let Operand { ptr: src, element, pitch } = operand(OP, x)?;
    let staging = shared.lend(s.len() * 4)?;
    let dst = DevicePtr(staging.address());
    match layout {
        HostLayout::Nchw => {
            let (samples, channels, pixels) = (s.n, s.c, s.positions());
            let op = ToNchw { src, dst, samples, channels, pixels, pitch, element };
            layout::to_nchw(&shared.gpu, &op)?;
        }
        HostLayout::Nhwc => {
            let op = Convert { src, from: stored(element), dst, to: Element::F32, count: s.len() };
            layout::convert(&shared.gpu, &op)?;
        }
    }
    let gpu = &shared.gpu;
    gpu.driver().download(bytemuck::cast_slice_mut(out), dst, gpu.stream()).map_err(CudaError::from)?;
    Ok(())
}

/// Numbers on the device, once they are there.
pub(super) fn read(shared: &Shared, from: &DeviceBuffer, count: usize) -> Result<Vec<f32>, TensorError> {
    let mut out = vec![0.0f32; count];
    let gpu = &shared.gpu;
    let from = DevicePtr(from.address());
    gpu.driver().download(bytemuck::cast_slice_mut(&mut out), from, gpu.stream()).map_err(CudaError::from)?;
    Ok(out)
}

/// See [`crate::tensor::Backend::embed`]; shapes are checked.
pub fn embed(shared: &Shared, op: &Embed<'_>, out: &mut Tensor) -> Result<(), TensorError> {
    const OP: &str = "embed";
    let foreign = TensorError::ForeignWeight { op: OP };
    let (Some(table), Some(positions)) =
        (op.table.packed.downcast::<EmbeddingBuffer>(), op.positions.packed.downcast::<EmbeddingBuffer>())
    else {
        return Err(foreign);
    };
    let mut ids = Vec::with_capacity(op.tokens.len());
    let mut vectors: Vec<f32> = Vec::new();
    for token in op.tokens {
        match *token {
            EmbedRow::Id(id) => ids.push(id as i32),
            EmbedRow::Vector(vector) => {
                ids.push(-1 - (vectors.len() / op.table.width) as i32);
                vectors.extend_from_slice(vector);
            }
        }
    }
    let device_ids = staged(shared, bytemuck::cast_slice(&ids))?;
    let device_vectors = match vectors.is_empty() {
        true => None,
        false => Some(staged(shared, bytemuck::cast_slice(&vectors))?),
    };
    let result = operand(OP, out)?;
    let launch = embed::Embed {
        table: table.table(),
        positions: positions.table(),
        ids: DevicePtr(device_ids.address()),
        vectors: device_vectors.as_ref().map_or(DevicePtr::NULL, |v| DevicePtr(v.address())),
        out: result.ptr,
        tokens: ids.len(),
        seq: out.shape().w,
        width: op.table.width,
        rows: op.table.rows,
        vector_rows: vectors.len() / op.table.width.max(1),
        table_element: table.element(),
        element: result.element,
    };
    Ok(embed::embed(&shared.gpu, &launch)?)
}

/// See [`crate::tensor::Backend::timestep_embedding`]; shapes are checked.
pub fn timestep_embedding(shared: &Shared, timesteps: &[f32], out: &mut Tensor) -> Result<(), TensorError> {
    let result = operand("timestep_embedding", out)?;
    let first = timesteps.first().copied().unwrap_or_default();
    let device = match timesteps.iter().all(|t| *t == first) {
        true => None,
        false => Some(staged(shared, bytemuck::cast_slice(timesteps))?),
    };
    let launch = TimestepEmbedding {
        timesteps: match &device {
            None => Timesteps::Same(first),
            Some(device) => Timesteps::Each(DevicePtr(device.address())),
        },
        out: result.ptr,
        count: timesteps.len(),
        dim: out.shape().c,
        element: result.element,
    };
    Ok(embed::timestep_embedding(&shared.gpu, &launch)?)
}
