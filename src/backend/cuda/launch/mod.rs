//! Launchers, one file a kernel family.
//!
//! A launcher takes a descriptor of plain device addresses and extents, checks
//! what its kernels assume, chooses kernel and geometry, and queues the launch.

pub mod attention;
pub mod attention_drawn;
pub mod attention_sm90;
pub mod band;
pub mod bislerp;
pub mod blur;
pub mod ceiling;
pub mod combine;
pub mod conv;
pub mod conv_f32;
pub mod conv_sm90;
pub mod copy;
pub mod elementwise;
pub mod embed;
pub mod epilogue;
pub mod gemm;
pub mod gemm_batched;
pub mod gemm_f32;
pub mod gemm_sm90;
pub mod hopper;
pub mod image;
pub mod latent;
pub mod layout;
pub mod merge;
pub mod norm;
pub mod philox;
pub mod plan;
pub mod reduce;
pub mod region;
pub mod reweight;
