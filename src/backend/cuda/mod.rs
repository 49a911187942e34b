//! The CUDA backend: our own kernels, launched through [`crate::driver`].
//!
//! - [`launch`]: one file a kernel family, the twin of `kernels/<family>/`:
//!   argument structs, choice of kernel and tile, geometry;
//! - [`check`]: every kernel against a reference in f64, for tests and `kiln check`.

mod backend;
pub mod check;
mod element;
mod error;
mod gpu;
mod latents;
pub mod launch;
pub mod layers;
mod merge;
mod open;
mod pool;
mod record;
mod transfer;
mod upload;
mod weights;

pub use backend::{CudaBackend, Shared};
pub use element::Element;
pub use error::CudaError;
pub use gpu::{Geometry, Gpu, Kernel};
pub use open::{open, open_driver, open_on};
