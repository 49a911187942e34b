//! CUDA kernels without a GPU: under the SIMT layer, and the layer itself.

mod checks;
mod planted;
