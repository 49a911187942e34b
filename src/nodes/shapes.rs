//! Shapes on links: pictures `[B, H, W, C]`, masks `[B, H, W]`, latents
//! `[B, C, h, w]`; checks, batches, and the words schemas have in common.

use std::sync::Arc;

use serde_json::Value as Json;

use super::{Inputs, NodeError, NodeOutput, Schema, Value};
use crate::diffusion::Latent;
use crate::image::{Crop, Method, ResampleError, Resize, upscale, upscale_images, upscale_masks};
use crate::tensor::{HostTensor, system_available};

/// Longest side of a picture, as in ComfyUI.
pub(super) const MAX_SIDE: i64 = 16_384;
/// Most values a node may put into one new tensor: 8 GiB of floats.
const MAX_VALUES: u64 = 1 << 31;
/// Tensors up to this size are made without asking how much memory there is.
const UNCHECKED_BYTES: usize = 64 << 20;

impl From<ResampleError> for NodeError {
    fn from(error: ResampleError) -> Self {
        NodeError::failed("ValueError", error)
    }
}

/// Checks that a tensor of this shape is of a reasonable size.
pub(super) fn check_size(shape: &[usize]) -> Result<(), NodeError> {
    let values = shape.iter().fold(1u64, |product, &n| product.saturating_mul(n as u64));
    if values > MAX_VALUES {
        let message =
            format!("a tensor of shape {shape:?} has {values} values; at most {MAX_VALUES} are allowed");
        return Err(NodeError::failed("ValueError", message));
    }
    let bytes = values as usize * size_of::<f32>();
    if bytes > UNCHECKED_BYTES && bytes > system_available() {
        let message = format!(
            "out of memory: a tensor of shape {shape:?} takes {bytes} bytes, the machine has {} left; \
             use a smaller picture or batch, or free models",
            system_available()
        );
        return Err(NodeError::failed("OutOfMemoryError", message));
    }
    Ok(())
}

/// A tensor of one value, after [`check_size`].
pub(super) fn filled(shape: &[usize], value: f32) -> Result<HostTensor, NodeError> {
    check_size(shape)?;
    Ok(HostTensor::full(shape, value))
}

/// A tensor from data whose length the caller made to fit.
pub(super) fn tensor(shape: &[usize], data: Vec<f32>) -> Result<HostTensor, NodeError> {
    let length = data.len();
    HostTensor::new(shape, data).ok_or_else(|| {
        NodeError::failed("ValueError", format!("{length} values do not fill the shape {shape:?}"))
    })
}

fn dims<const N: usize>(name: &str, x: &HostTensor, wanted: &str) -> Result<[usize; N], NodeError> {
    let shape = x.shape();
    let dims: [usize; N] = shape
        .try_into()
        .map_err(|_| NodeError::input(name, &format!("has shape {shape:?}, not {wanted}")))?;
    if dims.contains(&0) {
        return Err(NodeError::input(name, &format!("is empty: its shape is {shape:?}")));
    }
    Ok(dims)
}

/// A picture input with its `[B, H, W, C]`.
pub(super) fn image(inputs: &Inputs, name: &str) -> Result<(Arc<HostTensor>, [usize; 4]), NodeError> {
    let x = inputs.object::<HostTensor>(name)?;
    let dims = dims(name, &x, "[batch, height, width, channels]")?;
    Ok((x, dims))
}

/// A mask input as `[B, H, W]`, whatever leading dimensions it has.
pub(super) fn mask(inputs: &Inputs, name: &str) -> Result<(HostTensor, [usize; 3]), NodeError> {
    as_mask(name, &*inputs.object::<HostTensor>(name)?)
}

/// A mask input that may be left out.
pub(super) fn mask_opt(inputs: &Inputs, name: &str) -> Result<Option<HostTensor>, NodeError> {
    match inputs.object_opt::<HostTensor>(name)? {
        Some(x) => Ok(Some(as_mask(name, &x)?.0)),
        None => Ok(None),
    }
}

fn as_mask(name: &str, x: &HostTensor) -> Result<(HostTensor, [usize; 3]), NodeError> {
    let &[.., h, w] = x.shape() else {
        return Err(NodeError::input(
            name,
            &format!("has shape {:?}, not [batch, height, width]", x.shape()),
        ));
    };
    if x.is_empty() {
        return Err(NodeError::input(name, &format!("is empty: its shape is {:?}", x.shape())));
    }
    let dims = [x.len() / (h * w), h, w];
    Ok((tensor(&dims, x.data().to_vec())?, dims))
}

/// A latent input with the `[B, C, h, w]` of its samples.
pub(super) fn latent(inputs: &Inputs, name: &str) -> Result<(Arc<Latent>, [usize; 4]), NodeError> {
    let x = inputs.object::<Latent>(name)?;
    let dims = dims(name, &x.samples, "[batch, channels, height, width]")?;
    Ok((x, dims))
}

/// The method named by a combo input.
pub(super) fn method(inputs: &Inputs, name: &str) -> Result<Method, NodeError> {
    let value = inputs.string(name)?;
    Method::from_name(value).ok_or_else(|| NodeError::input(name, &format!("is no resize method: {value}")))
}

/// The crop mode named by the input `crop`.
pub(super) fn crop(inputs: &Inputs) -> Result<Crop, NodeError> {
    let value = inputs.string("crop")?;
    Crop::from_name(value).ok_or_else(|| NodeError::input("crop", &format!("is no crop mode: {value}")))
}

/// A failure because of a combo value that no branch knows.
pub(super) fn unknown(name: &str, value: &str) -> NodeError {
    NodeError::input(name, &format!("has an unknown value: {value}"))
}

/// Pictures resized; the size may be unchanged.
pub(super) fn resize_images(x: &HostTensor, to: Resize) -> Result<HostTensor, NodeError> {
    check_size(&[x.dim(0), to.height, to.width, x.dim(3)])?;
    Ok(upscale_images(x, to)?)
}

/// Masks `[B, H, W]` resized bilinearly.
pub(super) fn resize_masks(x: &HostTensor, height: usize, width: usize) -> Result<HostTensor, NodeError> {
    check_size(&[x.dim(0), height, width])?;
    Ok(upscale_masks(x, Resize::to(width, height, Method::Bilinear))?)
}

/// `[B, C, h, w]` resized with a central crop.
pub(super) fn fit_latent(x: &HostTensor, like: [usize; 4], method: Method) -> Result<HostTensor, NodeError> {
    if x.shape().get(1..) == Some(&like[1..]) {
        return Ok(x.clone());
    }
    Ok(upscale(x, Resize { width: like[3], height: like[2], method, crop: Crop::Center })?)
}

/// Smallest and largest value; `None` without values.
pub(super) fn extremes(x: &HostTensor) -> Option<(f32, f32)> {
    let first = *x.data().first()?;
    Some(x.data().iter().fold((first, first), |(low, high), &v| (low.min(v), high.max(v))))
}

/// Exactly `count` samples: cut, or repeated from the start.
pub(super) fn repeat_to(x: &HostTensor, count: usize) -> Result<HostTensor, NodeError> {
    let batch = x.dim(0).max(1);
    if batch == count {
        return Ok(x.clone());
    }
    let mut shape = x.shape().to_vec();
    if let Some(first) = shape.first_mut() {
        *first = count;
    }
    check_size(&shape)?;
    let data = (0..count).flat_map(|i| x.row(i % batch).iter().copied()).collect();
    tensor(&shape, data)
}

/// Two batches of one length: one alone is repeated, other lengths must agree. `name` is the second's input.
pub(super) fn broadcast(
    a: &HostTensor,
    b: &HostTensor,
    name: &'static str,
) -> Result<(HostTensor, HostTensor), NodeError> {
    let count = match (a.dim(0), b.dim(0)) {
        (1, n) | (n, 1) => n,
        (n, m) if n == m => n,
        (n, m) => {
            let what = format!("holds {m}, the first input {n}: there must be as many, or one of them alone");
            return Err(NodeError::input(name, &what));
        }
    };
    Ok((repeat_to(a, count)?, repeat_to(b, count)?))
}

/// The whole batch `times` over.
pub(super) fn repeat_batch(x: &HostTensor, times: usize) -> Result<HostTensor, NodeError> {
    repeat_to(x, x.dim(0).saturating_mul(times))
}

/// One batch after the other; all samples must have one shape.
pub(super) fn concat_batch(parts: &[&HostTensor]) -> Result<HostTensor, NodeError> {
    let Some(first) = parts.first() else {
        return Err(NodeError::failed("ValueError", "there is nothing to put into a batch"));
    };
    let mut shape = first.shape().to_vec();
    for part in parts {
        if part.shape().get(1..) != first.shape().get(1..) {
            let message =
                format!("samples of shape {:?} and {:?} cannot form a batch", first.shape(), part.shape());
            return Err(NodeError::failed("ValueError", message));
        }
    }
    if let Some(batch) = shape.first_mut() {
        *batch = parts.iter().map(|p| p.dim(0)).sum();
    }
    check_size(&shape)?;
    tensor(&shape, parts.iter().flat_map(|p| p.data().iter().copied()).collect())
}

/// Python's `round`: halves go to the even neighbour; at least 0.
pub(super) fn round(value: f64) -> usize {
    value.round_ties_even().max(0.0) as usize
}

/// An output of one `IMAGE`.
pub(super) fn image_output(x: HostTensor) -> Result<NodeOutput, NodeError> {
    Ok(NodeOutput::one(Value::object("IMAGE", x)))
}

/// An output of one `MASK`.
pub(super) fn mask_output(x: HostTensor) -> Result<NodeOutput, NodeError> {
    Ok(NodeOutput::one(Value::object("MASK", x)))
}

/// An output of one `LATENT`.
pub(super) fn latent_output(x: Latent) -> Result<NodeOutput, NodeError> {
    Ok(NodeOutput::one(Value::object("LATENT", x)))
}

/// The flags that ComfyUI's newer nodes carry in `/object_info`.
pub(super) fn newer(schema: Schema, is_experimental: bool) -> Schema {
    schema.flag("deprecated", false).flag("experimental", is_experimental).flag("api_node", false)
}

/// As [`newer`], for nodes without a display name.
pub(super) fn newer_unnamed(schema: Schema, is_experimental: bool) -> Schema {
    newer(schema.flag("display_name", Json::Null), is_experimental)
}
