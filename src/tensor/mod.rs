//! Host tensors, element types, op descriptors and the backend trait.
//!
//! [`HostTensor`] is what crosses node borders (f32, ComfyUI's layouts);
//! [`Tensor`] is an activation on a device (NHWC, the device's element type),
//! worked on through the op set of [`Backend`].

pub mod backend;
pub mod bislerp;
pub mod buffer;
pub mod check;
mod curve;
mod device;
mod dtype;
mod error;
mod f8;
mod host;
pub mod latents;
mod memory;
pub mod merge;
mod placement;
mod raw;
pub mod reference;
pub mod resample;

pub use backend::{
    Activation, Attention, AttentionDrawn, Backend, BackendInfo, Body, BodyError, Conv2d, ConvWeight, Embed,
    EmbedRow, Embedding, GroupNorm, HostLayout, LayerNorm, Linear, LinearParts, LinearWeight, MemoryUse,
    NormWeight, Outcome, Packed, Pad, PressureHook, ScaleHalf, SwapTokens,
};
pub use curve::Curve;
pub use device::{Cols, Shape, Storage, Tensor};
pub use dtype::DType;
pub use error::TensorError;
pub use host::HostTensor;
pub use latents::{LatentOps, ModelInput, Planes};
pub use memory::system_available;
pub use merge::{MatchTokens, RowNumbers, TokenRows};
pub use placement::Placement;
pub use raw::RawTensor;
pub use resample::Filter;
