//! Random shapes: of every kernel at least [`EACH`], drawn so that the launcher must take that kernel.

use std::collections::HashSet;
use std::ops::RangeInclusive;

use super::Case;
use crate::backend::cuda::Element;

/// Random shapes of every kernel.
pub const EACH: usize = 20;

pub(super) const HALVES: [Element; 2] = [Element::F16, Element::BF16];
pub(super) const ELEMENTS: [Element; 3] = [Element::F16, Element::BF16, Element::F32];

/// Where shapes come from: the same for a family and seed in every run.
pub(super) struct Shapes(u64);

impl Shapes {
    fn new(family: usize, seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ ((family as u64 + 1) << 32))
    }

    /// A number below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n
    }

    /// A number of a range.
    pub fn of(&mut self, range: RangeInclusive<usize>) -> usize {
        range.start() + self.below(range.end() - range.start() + 1)
    }

    /// An odd number of a range that has one; the upper end may be exceeded by one.
    pub fn odd(&mut self, range: RangeInclusive<usize>) -> usize {
        self.of(range) | 1
    }

    /// One of several.
    pub fn pick<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())]
    }

    /// True once in `n` times.
    pub fn once_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

/// Bytes that a copy moves at a time, the largest that divides all it has to do with.
pub(super) const UNITS: [usize; 3] = [2, 4, 16];

/// An element type, and its elements in `unit` bytes. An odd number of those is no multiple of a larger unit.
pub(super) fn unit_of(shapes: &mut Shapes, unit: usize) -> (Element, usize) {
    let element = if unit == 2 { shapes.pick(&HALVES) } else { shapes.pick(&ELEMENTS) };
    (element, unit / element.size())
}

/// Draws until there are [`EACH`] different cases; the first of them is quick.
pub(super) fn distinct(shapes: &mut Shapes, draw: impl Fn(&mut Shapes) -> Case) -> Vec<Case> {
    let mut names = HashSet::new();
    let mut cases: Vec<Case> = Vec::with_capacity(EACH);
    // A range too narrow for that many shapes ends with fewer, which the test of coverage sees.
    for _ in 0..50 * EACH {
        if cases.len() == EACH {
            break;
        }
        let case = draw(shapes);
        if names.insert(case.name.clone()) {
            cases.push(Case { quick: cases.is_empty(), needs_gpu: false, is_random: true, ..case });
        }
    }
    cases
}

/// The random shapes of all families.
pub(super) fn cases(seed: u64) -> Vec<Case> {
    let families: [fn(&mut Shapes) -> Vec<Case>; 21] = [
        super::elementwise::random,
        super::gemm::random,
        super::conv::random,
        super::attention::random,
        super::norm::random,
        super::layout::random,
        super::embed::random,
        super::sampling::random,
        super::image::random,
        super::reweight::random,
        super::attention_sm90::random,
        super::gemm_sm90::random,
        super::conv_sm90::random,
        super::gemm_batched::random,
        super::merge::random,
        super::bislerp::random,
        super::attention_drawn::random,
        super::combine::random,
        super::region::random,
        super::band::random,
        super::blur::random,
    ];
    families.iter().enumerate().flat_map(|(i, random)| random(&mut Shapes::new(i, seed))).collect()
}
