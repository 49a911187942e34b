//! CUDA kernels without a GPU: under the SIMT layer, and the layer itself.

mod adapters;
mod bank_conflicts;
mod checks;
mod merged;
mod pipeline;
mod planted;
mod recorded;
mod samplers;
mod steady;
mod turing;

use std::path::{Path, PathBuf};

use kiln::driver::toolchain::{SimtVariant, build_simt};

/// The library that the build script made, or one made here.
fn library(variant: SimtVariant) -> PathBuf {
    kiln::driver::simt::built_library(variant).unwrap_or_else(|| {
        let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
        let out = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("simt");
        build_simt(&kernels, &[], &out, variant).expect("the kernels compile")
    })
}
