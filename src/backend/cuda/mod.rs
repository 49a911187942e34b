//! The CUDA backend: our own kernels, launched through [`crate::driver`].
//!
//! - [`launch`]: one file a kernel family, the twin of `kernels/<family>/`:
//!   argument structs, choice of kernel and tile, geometry;
//! - [`check`]: every kernel against a reference in f64, for tests and `kiln check`.

pub mod check;
mod element;
mod error;
mod gpu;
pub mod launch;
mod pool;
mod upload;

pub use element::Element;
pub use error::CudaError;
pub use gpu::{Geometry, Gpu, Kernel};
