//! The bodies for Turing: copies through registers, products of half the depth, bfloat16 by multiply-adds.
//!
//! A build of its own of the SIMT layer, on a device with Turing's 64 KB of shared memory.

use kiln::backend::cuda::check::{self, Case, EACH};
use kiln::driver::Capability;
use kiln::driver::simt::{Order, SimtOptions};
use kiln::driver::toolchain::SimtVariant;

use crate::checks::{assert_each, pass_of};

/// What kernels are called whose bodies are others here; all that is left is the same code.
const OTHERS: [&str; 5] =
    ["gemm_sm80_", "gemm_batched_", "conv_sm80_", "attention_sm80_", "groupnorm_fused_"];

/// Families that these belong to.
const FAMILIES: [&str; 4] = ["gemm", "conv", "attention", "norm"];

/// Of these the wide tiles need more shared memory than there is.
const ABSENT: &str = "_d512_";

/// Draws of which the cheap ones are taken: a product of bfloat16 is eight meetings of a warp here, one elsewhere.
const DRAWS: u64 = 4;

/// Of every kernel the cheapest random shapes of several draws. A draw has [`EACH`] of a kernel in a row, every draw in
/// the same order.
fn cheap_shapes() -> Vec<Case> {
    let draw = |seed| check::cases_of(seed).into_iter().filter(|case| case.is_random).collect::<Vec<_>>();
    let mut draws: Vec<_> = (0..DRAWS).map(|seed| draw(seed).into_iter()).collect();
    let mut chosen = Vec::new();
    loop {
        let mut shapes: Vec<Case> = draws.iter_mut().flat_map(|draw| draw.take(EACH)).collect();
        let Some(first) = shapes.first() else { return chosen };
        assert!(shapes.len() == EACH * DRAWS as usize && shapes.iter().all(|s| s.family == first.family));
        if FAMILIES.contains(&first.family) {
            shapes.sort_by(|a, b| a.flops.total_cmp(&b.flops));
            shapes.dedup_by(|a, b| a.name == b.name);
            // What moves memory costs little, and some of it takes another kernel with so little shared memory.
            let is_product = shapes.iter().all(|shape| shape.flops > 0.0);
            let count = if is_product { EACH } else { 2 * EACH };
            chosen.extend(shapes.into_iter().take(count));
        }
    }
}

#[test]
fn the_kernels_of_turing_equal_their_references() {
    let capability = Capability { major: 7, minor: 5 };
    assert_eq!(capability.shared_memory(), 64 << 10);
    let options = SimtOptions { capability, order: Order::Random(5), ..SimtOptions::default() };
    let coverage = pass_of(SimtVariant::Turing, options, cheap_shapes().into_iter());
    let is_other = |name: &&String| OTHERS.iter().any(|other| name.starts_with(other));
    let (absent, names): (Vec<&String>, Vec<&String>) =
        coverage.keys().filter(is_other).partition(|name| name.contains(ABSENT));
    assert!(absent.iter().all(|name| coverage[name.as_str()].is_empty()), "one of {absent:?} runs after all");
    for other in OTHERS {
        assert!(names.iter().any(|name| name.starts_with(other)), "no kernel is called {other}…");
    }
    assert_each(&coverage, &names, EACH);
}
