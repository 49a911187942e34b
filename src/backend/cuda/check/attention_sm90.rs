//! Cases of attention on Hopper: edges of its tiles, random shapes, the real ones. Same operands and reference as
//! those of [`attention`](super::attention).

use super::Case;
use super::attention::{Spec, case, variant};
use super::random::{HALVES, Shapes, distinct};
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
    for element in HALVES {
        for dim in DIMS {
            edges(&mut specs, element, dim);
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

/// Numbers of keys that leave least of tiles of 80 keys unused, of 128 and of 96, by head dims that have such tiles.
const KEYS: [(&[usize], &[std::ops::RangeInclusive<usize>]); 3] = [
    (&[40, 64, 80], &[1..=80, 129..=160]),
    (&[40, 64, 80, 128], &[81..=128, 161..=256]),
    (&[160], &[1..=96, 97..=200]),
];

/// Of every tile as many.
pub(super) fn random(shapes: &mut Shapes) -> Vec<Case> {
    let mut cases = Vec::new();
    for element in HALVES {
        for (dims, keys) in KEYS {
            for dim in dims {
                cases.extend(distinct(shapes, |s| {
                    let range = s.below(keys.len());
                    let keys = s.of(keys[range].clone());
                    let shape = [1, s.of(1..=2), *dim, s.of(1..=200), keys];
                    case(variant(s, element, shape), "attention_sm90", launch)
                }));
            }
        }
    }
    cases
}
