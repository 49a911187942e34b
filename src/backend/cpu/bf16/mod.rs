//! bf16 matrix kernels: products, convolution, attention.
//!
//! Three instruction-set tiers behind the same drivers, chosen at run time
//! ([`Tier::detect`]): AMX tiles, AVX512-BF16, portable Rust. Inputs and weights
//! are bf16, every sum is f32, outputs are bf16 or f32. The kernels know slices
//! and strides, not tensors; activations are NHWC or row-major.
//!
//! | module | what |
//! | --- | --- |
//! | [`tier`] | which instructions this process may use |
//! | [`pack`] | weights → tile order, once |
//! | [`gemm`](mod@gemm), [`conv`], [`attention`](mod@attention) | drivers: blocking, threads, operand addressing |
//! | [`epilogue`] | bias, activation, scale, residual, rounding |
//! | `tiles`, `block` | block driver and the seam to the tiers |
//! | `amx`, `avx512*`, `portable` | leaves: the only code that differs by tier |
//! | `attention_stream`, `softmax` | attention's inner loop, and its exponentials' seam to the tiers |
//! | `parallel` | division among threads |
//! | `memory` | aligned buffers, per-thread scratch |
//! | [`probe`] | measured peak and GEMM ceiling |

#[cfg(target_arch = "x86_64")]
mod amx;
pub mod attention;
mod attention_stream;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512_epilogue;
#[cfg(target_arch = "x86_64")]
mod avx512_softmax;
mod block;
pub mod conv;
mod convert;
pub mod epilogue;
mod error;
pub mod gemm;
mod memory;
pub(in crate::backend::cpu) use memory::release_scratch;
pub mod pack;
mod parallel;
mod polynomial;
mod portable;
pub mod probe;
mod softmax;
pub mod tier;
mod tiles;

pub use attention::{Attention, Heads, attention};
pub use conv::{ConvInput, Geometry, conv2d};
pub use epilogue::{Activation, Epilogue, GroupBias, Output, OutputData, Rows};
pub use error::KernelError;
pub use gemm::{GemmInput, gemm};
pub use pack::{KernelShape, PackedB, Weights};
pub use probe::{gemm_rate, measure_peak};
pub use tier::Tier;

#[cfg(test)]
mod tests;
