//! The bodies for Turing: copies through registers, products of half the depth, bfloat16 by multiply-adds.
//!
//! A build of its own of the SIMT layer, on a device with Turing's 64 KB of shared memory.

use kiln::driver::Capability;
use kiln::driver::simt::{Order, SimtOptions};
use kiln::driver::toolchain::SimtVariant;

use crate::checks::pass;

#[test]
fn the_kernels_of_turing_equal_their_references() {
    let capability = Capability { major: 7, minor: 5 };
    assert_eq!(capability.shared_memory(), 64 << 10);
    let options = SimtOptions { capability, order: Order::Random(5), ..SimtOptions::default() };
    // Where the bodies differ, a random shape of every kernel; all that is left is the same code.
    let families = ["gemm", "conv", "attention", "norm"];
    pass(SimtVariant::Turing, options, |case| {
        case.quick && case.is_random && families.contains(&case.family)
    });
}
