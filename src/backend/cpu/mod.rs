//! The CPU backend.

pub mod bf16;
