//! Launchers, one file a kernel family.
//!
//! A launcher takes a descriptor of plain device addresses and extents, checks
//! what its kernels assume, chooses kernel and geometry, and queues the launch.

pub mod conv;
pub mod conv_sm90;
pub mod elementwise;
pub mod epilogue;
pub mod gemm;
pub mod gemm_sm90;
pub mod hopper;
pub mod plan;
