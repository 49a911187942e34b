//! Host tensors, element types, op descriptors and the backend trait.

mod dtype;
mod host;

pub use dtype::DType;
pub use host::HostTensor;
