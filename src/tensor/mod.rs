//! Host tensors, element types, op descriptors and the backend trait.

mod dtype;
mod host;
mod raw;

pub use dtype::DType;
pub use host::HostTensor;
pub use raw::RawTensor;
