//! Weight files: checked headers of `.safetensors` and PyTorch files, and views into memory maps.
//!
//! [`WeightsFile`] opens a file, checks every number in its header against the
//! file before trusting it, and then hands out [`RawTensor`](crate::tensor::RawTensor)s
//! that borrow the map: opening an 8 GB checkpoint costs a page or two of
//! memory. [`synth`] writes checkpoints of real architectures with
//! deterministic random weights, for tests and benchmarks on machines that
//! have no model to load.
//!
//! PyTorch's own files (`.ckpt`, `.pt`, `.pth`, `.bin`) are pickles, which can run
//! code when Python opens them. [`pickle`] reads them without running anything.

#[forbid(unsafe_code)]
mod error;
#[forbid(unsafe_code)]
mod file;
#[forbid(unsafe_code)]
mod header;
mod mmap;
#[forbid(unsafe_code)]
mod pickle;
#[forbid(unsafe_code)]
mod save;
#[forbid(unsafe_code)]
mod sniff;
#[forbid(unsafe_code)]
pub mod synth;

pub use error::{HeaderFault, WeightsError};
pub use file::{OpenOptions, TensorInfo, WeightsFile};
pub use pickle::PickleFault;
pub use save::{SaveEntry, SaveError, save};
