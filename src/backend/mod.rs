//! Backends: implementations of the op set.
pub mod cpu;
