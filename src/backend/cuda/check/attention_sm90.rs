//! Cases of attention on Hopper: edges of its tiles, random shapes, the real ones. Same operands and reference as
//! those of [`attention`](super::attention).

use super::Case;
use super::attention::{Spec, case};
use crate::backend::cuda::launch::attention::Attention;
use crate::backend::cuda::launch::attention_sm90;
use crate::backend::cuda::{CudaError, Element, Gpu};

const DIMS: [usize; 5] = [40, 64, 80, 128, 160];

/// Batch, heads, head dim, queries and keys of real layers: SD1.5 at 512², SDXL at 1024², diffusion transformers.
const LAYERS: [[usize; 5]; 12] = [
    [2, 8, 40, 4096, 4096],
    [2, 8, 40, 4096, 77],
    [2, 8, 80, 1024, 1024],
    [2, 8, 80, 1024, 77],
    [2, 8, 160, 256, 256],
    [2, 8, 160, 64, 64],
    [2, 10, 64, 4096, 4096],
    [2, 10, 64, 4096, 77],
    [2, 20, 64, 1024, 1024],
    [2, 20, 64, 1024, 77],
    [1, 24, 64, 4250, 4250],
    [1, 24, 128, 4352, 4352],
];

pub(super) fn cases() -> Vec<Case> {
    let mut specs = Vec::new();
    for element in [Element::F16, Element::BF16] {
        for dim in DIMS {
            edges(&mut specs, element, dim);
            random(&mut specs, element, dim);
        }
        specs.extend(LAYERS.iter().map(|shape| Spec::new(element, *shape)));
    }
    specs.into_iter().map(|spec| case(spec, "attention_sm90", launch)).collect()
}

fn launch(gpu: &Gpu, op: &Attention, _: &Spec) -> Result<(), CudaError> {
    attention_sm90::attention(gpu, op)
}

/// Lengths at the edges of tiles, masks, shared keys, moving maxima.
fn edges(specs: &mut Vec<Spec>, element: Element, dim: usize) {
    let base =
        |[batch, heads, queries, keys]: [usize; 4]| Spec::new(element, [batch, heads, dim, queries, keys]);
    for [queries, keys] in
        [[1, 1], [64, 128], [65, 129], [128, 96], [129, 97], [257, 300], [130, 384], [70, 500], [64, 80]]
    {
        specs.push(base([1, 2, queries, keys]));
    }
    for [queries, keys] in [[77, 77], [400, 400], [300, 130], [130, 300], [250, 500], [300, 350]] {
        specs.push(Spec { is_causal: true, ..base([1, 2, queries, keys]) });
    }
    specs.push(Spec { key_batch: 2, ..base([6, 1, 50, 77]) });
    specs.push(Spec { key_batch: 1, is_causal: true, ..base([3, 1, 70, 140]) });
    // The maximum moves in many tiles, by less and by more than what is tolerated without rescaling.
    specs.push(Spec { spread: 3.0, ..base([1, 2, 90, 1000]) });
    specs.push(Spec { spread: 60.0, ..base([1, 2, 90, 700]) });
    // More tiles than the simulated device has multiprocessors: blocks go on to further tiles.
    specs.push(Spec { is_fused: true, ..base([3, 3, 300, 150]) });
    specs.push(Spec { is_fused: true, is_causal: true, ..base([2, 3, 300, 300]) });
}

/// Random shapes, the same in every run.
fn random(specs: &mut Vec<Spec>, element: Element, dim: usize) {
    let mut state = 0x9e37_79b9_u64 ^ dim as u64;
    let mut below = move |n: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % n
    };
    for _ in 0..6 {
        let (key_batch, sharing) = (1 + below(2), 1 + below(2));
        let shape = [key_batch * sharing, 1 + below(3), dim, 1 + below(260), 1 + below(420)];
        let (is_causal, is_fused) = (below(4) == 0, below(2) == 0);
        let spread = [1.0, 0.1, 20.0][below(3)];
        specs.push(Spec { key_batch, is_causal, is_fused, spread, ..Spec::new(element, shape) });
    }
}
