//! Brownian noise for SDE samplers: one path per seed, whatever is asked of it.
//!
//! An SDE sampler needs increments W(b) - W(a) of one Brownian motion over the
//! sigma axis, so that more steps refine the same path instead of drawing new
//! noise. The path is a *virtual* tree: the root's increment is one normal
//! draw; an interval is halved at its midpoint, whose value is drawn from the
//! Brownian bridge with a generator seeded by the node's place in the tree. A
//! query walks down to its two ends and adds up the intervals in between, so
//! neither the order nor the number of queries changes a value.
//!
//! Values equal those of torchsde 0.2.6 (`BrownianTree`), which ComfyUI uses:
//! end points are rounded to 6 decimals, seeds come from [`SeedSequence`] with
//! a pool of 24 words keyed by (index in level, level), bridge coefficients are
//! computed in f64 and applied in f32.
//!
//! A query halves up to about sixty nodes. Their normals do not depend on each
//! other and are drawn in parallel; only the bridge itself goes level by level.
//!
//! Sources: P. Lévy's bridge construction; J. Gaines and T. Lyons, "Variable
//! step size control in the numerical solution of SDEs", 1997 (Brownian tree);
//! X. Li et al., "Scalable gradients for stochastic differential equations",
//! 2020 (virtual tree over splittable seeds).

use std::collections::HashMap;

use rayon::prelude::*;
use thiserror::Error;

use super::{Generator, SeedSequence};
use crate::tensor::HostTensor;

/// Words of hashed entropy per node.
const POOL: usize = 24;

/// Why a Brownian path cannot be made.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum BrownianError {
    /// The axis is not a finite, ascending range.
    #[error("Brownian noise needs finite ends with {t0} <= {t1}; check the schedule's sigmas")]
    Range {
        /// Lower end as given.
        t0: f32,
        /// Upper end as given.
        t1: f32,
    },
    /// One seed for each sample was asked for, but the counts differ.
    #[error("{seeds} seeds for a batch of {batch} samples; give one seed for each sample")]
    Seeds {
        /// Number of seeds given.
        seeds: usize,
        /// Extent of the batch dimension.
        batch: usize,
    },
}

/// Where a node is: its distance from the root and index within that level.
type Place = (u64, u64);

/// A node of the virtual tree: an interval and its place.
#[derive(Clone, Copy)]
struct Node {
    start: f64,
    end: f64,
    /// Index within its level, from the left.
    index: u64,
    /// Distance from the root.
    level: u64,
}

impl Node {
    fn middle(&self) -> f64 {
        round_6(0.5 * (self.end + self.start))
    }

    fn place(&self) -> Place {
        (self.level, self.index)
    }

    /// Where this node must be halved to answer for `[ta, tb]`: nowhere if it
    /// lies within, or if its middle rounds to an end (resolution exhausted).
    fn halving(&self, ta: f64, tb: f64) -> Option<f64> {
        let middle = self.middle();
        let is_within = ta <= self.start && tb >= self.end;
        (!is_within && middle > self.start && middle < self.end).then_some(middle)
    }

    /// This node and those below it that a query of `[ta, tb]` halves.
    fn halved_for(self, ta: f64, tb: f64, out: &mut Vec<Self>) {
        let Some(middle) = self.halving(ta, tb) else { return };
        out.push(self);
        if ta < middle {
            self.left().halved_for(ta, tb.min(middle), out);
        }
        if tb > middle {
            self.right().halved_for(ta.max(middle), tb, out);
        }
    }

    fn left(&self) -> Self {
        let index = self.index.wrapping_mul(2);
        Self { end: self.middle(), index, level: self.level + 1, ..*self }
    }

    fn right(&self) -> Self {
        let index = self.index.wrapping_mul(2).wrapping_add(1);
        Self { start: self.middle(), index, level: self.level + 1, ..*self }
    }
}

/// One Brownian path of `len` independent components over `[t0, t1]`.
pub struct BrownianTree {
    len: usize,
    entropy: u64,
    root: Node,
    root_increment: Vec<f32>,
    /// Increments of left halves by the place of the halved node: what
    /// the last query touched, because the next one begins where it ended.
    left_halves: HashMap<Place, Vec<f32>>,
}

impl BrownianTree {
    /// The path that `entropy` (all 64 bits) stands for.
    ///
    /// # Errors
    /// [`BrownianError::Range`] unless `t0 <= t1` and both are finite.
    pub fn new(len: usize, t0: f32, t1: f32, entropy: u64) -> Result<Self, BrownianError> {
        if !(t0.is_finite() && t1.is_finite() && t0 <= t1) {
            return Err(BrownianError::Range { t0, t1 });
        }
        let (low, high) = (f64::from(t0), f64::from(t1));
        let mut root_increment = normals(&SeedSequence::new(entropy, &[], POOL), len);
        let scale = (high - low).sqrt() as f32;
        root_increment.iter_mut().for_each(|w| *w *= scale);
        let root = Node { start: round_6(low), end: round_6(high), index: 0, level: 0 };
        Ok(Self { len, entropy, root, root_increment, left_halves: HashMap::new() })
    }

    /// W(tb) - W(ta) for `ta <= tb`; both are first clamped to the axis. Zeros
    /// if nothing lies in between at the tree's resolution of 1e-6.
    pub fn increment(&mut self, ta: f32, tb: f32) -> Vec<f32> {
        let clamped = |t: f32| round_6(f64::from(t).max(self.root.start).min(self.root.end));
        let (ta, tb) = (clamped(ta), clamped(tb));
        if ta >= tb {
            return vec![0.0; self.len];
        }
        let mut halved = Vec::new();
        self.root.halved_for(ta, tb, &mut halved);
        halved.retain(|node| !self.left_halves.contains_key(&node.place()));
        let (entropy, len) = (self.entropy, self.len);
        let draw = |node: &Node| {
            let seeds = SeedSequence::new(entropy, &[node.index, node.level], POOL);
            (node.place(), normals(&seeds, len))
        };
        let mut walk = Walk {
            drawn: halved.par_iter().map(draw).collect(),
            known: std::mem::take(&mut self.left_halves),
            touched: HashMap::new(),
            sum: None,
        };
        walk.visit(self.root, &self.root_increment, ta, tb);
        self.left_halves = walk.touched;
        walk.sum.unwrap_or_else(|| vec![0.0; self.len])
    }
}

/// One query on its way down the tree.
struct Walk {
    /// Normals of the nodes that are halved for the first time.
    drawn: HashMap<Place, Vec<f32>>,
    /// Left halves the last query left behind.
    known: HashMap<Place, Vec<f32>>,
    touched: HashMap<Place, Vec<f32>>,
    sum: Option<Vec<f32>>,
}

impl Walk {
    /// Adds the increment over `[ta, tb]`, which lies within `node`.
    fn visit(&mut self, node: Node, increment: &[f32], ta: f64, tb: f64) {
        let Some(middle) = node.halving(ta, tb) else {
            self.add(increment);
            return;
        };
        let left = self.left_half(node, increment);
        if ta < middle {
            self.visit(node.left(), &left, ta, tb.min(middle));
        }
        if tb > middle {
            let right: Vec<f32> = increment.iter().zip(&left).map(|(w, l)| w - l).collect();
            self.visit(node.right(), &right, ta.max(middle), tb);
        }
        self.touched.insert(node.place(), left);
    }

    fn add(&mut self, increment: &[f32]) {
        match &mut self.sum {
            Some(sum) => sum.iter_mut().zip(increment).for_each(|(s, w)| *s += w),
            None => self.sum = Some(increment.to_vec()),
        }
    }

    /// The bridge: given the whole increment, that of the left half is normal
    /// with mean proportional to its length and variance left·right/whole.
    fn left_half(&mut self, node: Node, increment: &[f32]) -> Vec<f32> {
        if let Some(known) = self.known.remove(&node.place()) {
            return known;
        }
        let per_length = 1.0 / (node.end - node.start);
        let (left, right) = (node.middle() - node.start, node.end - node.middle());
        let deviation = (left * right * per_length).sqrt() as f32;
        let (left, per_length) = (left as f32, per_length as f32);
        let mut half = self.drawn.remove(&node.place()).unwrap_or_default();
        half.iter_mut().zip(increment).for_each(|(n, w)| *n = left * w * per_length + deviation * *n);
        half
    }
}

fn normals(seeds: &SeedSequence, len: usize) -> Vec<f32> {
    let seed = seeds.generate(1).first().copied().unwrap_or(0);
    Generator::new(u64::from(seed)).randn(&[len]).into_data()
}

/// The nearest number with 6 decimals, judged on the exact decimal expansion.
fn round_6(t: f64) -> f64 {
    format!("{t:.6}").parse().unwrap_or(t)
}

/// Brownian noise over a sigma axis as k-diffusion's SDE samplers draw it:
/// increments divided by the square root of their length, so that each sample
/// has unit variance.
pub struct BrownianNoise {
    shape: Vec<usize>,
    /// One tree for the whole tensor, or one a sample.
    trees: Vec<BrownianTree>,
}

impl BrownianNoise {
    /// One path for a whole batch of `shape`. `sigma_min` and `sigma_max` are
    /// the smallest positive and the largest sigma of the run's schedule, in
    /// either order; all 64 bits of `seed` count.
    ///
    /// # Errors
    /// [`BrownianError::Range`] if a sigma is not finite.
    pub fn new(shape: &[usize], sigma_min: f32, sigma_max: f32, seed: u64) -> Result<Self, BrownianError> {
        let tree = sorted_tree(shape.iter().product(), sigma_min, sigma_max, seed)?;
        Ok(Self { shape: shape.to_vec(), trees: vec![tree] })
    }

    /// One path a sample, each with its own seed: a sample's noise then does not
    /// depend on the batch it runs in.
    ///
    /// # Errors
    /// [`BrownianError::Seeds`] unless there is one seed for each of `shape[0]`
    /// samples; [`BrownianError::Range`] if a sigma is not finite.
    pub fn per_sample(
        shape: &[usize],
        sigma_min: f32,
        sigma_max: f32,
        seeds: &[u64],
    ) -> Result<Self, BrownianError> {
        let batch = shape.first().copied().unwrap_or(0);
        if seeds.len() != batch {
            return Err(BrownianError::Seeds { seeds: seeds.len(), batch });
        }
        let len = shape.iter().skip(1).product();
        let tree = |&seed: &u64| sorted_tree(len, sigma_min, sigma_max, seed);
        let trees = seeds.iter().map(tree).collect::<Result<_, _>>()?;
        Ok(Self { shape: shape.to_vec(), trees })
    }

    /// Unit-variance noise for the step from `sigma` to `sigma_next`.
    ///
    /// Sigmas outside the axis count as its ends, but the length divided by is
    /// the one asked for; `sigma == sigma_next` therefore gives NaN, as 0/0.
    pub fn sample(&mut self, sigma: f32, sigma_next: f32) -> HostTensor {
        let (low, high, sign) =
            if sigma < sigma_next { (sigma, sigma_next, 1.0) } else { (sigma_next, sigma, -1.0) };
        let length = (sigma_next - sigma).abs().sqrt();
        let increments = self.trees.iter_mut().flat_map(|tree| tree.increment(low, high));
        let values: Vec<f32> = increments.map(|w| sign * w / length).collect();
        HostTensor::new(&self.shape, values).unwrap_or_default()
    }
}

fn sorted_tree(len: usize, a: f32, b: f32, seed: u64) -> Result<BrownianTree, BrownianError> {
    let (t0, t1) = if b < a { (b, a) } else { (a, b) };
    BrownianTree::new(len, t0, t1, seed)
}

#[cfg(test)]
mod tests {
    use super::{BrownianError, BrownianNoise, round_6};

    /// 1/128 lies exactly between two numbers of 6 decimals: ties go to even.
    #[test]
    fn rounding_is_by_the_decimal_expansion() {
        assert_eq!(round_6(0.007_812_5), 0.007_812);
        assert_eq!(round_6(0.023_437_5), 0.023_438);
        assert_eq!(round_6(14.614_642_143_249_512), 14.614_642);
        assert_eq!(round_6(-0.000_000_4), 0.0);
    }

    /// Refining a step keeps the path: increments add up. 2e-5 covers the f32
    /// rounding of about thirty summed intervals of size up to 15.
    #[test]
    fn finer_steps_follow_the_same_path() {
        let noise = |sigmas: &[f32]| {
            let mut path = BrownianNoise::new(&[1, 4, 8, 8], 0.03, 14.6, 7).expect("a range");
            let mut sum = vec![0.0f32; 256];
            for pair in sigmas.windows(2) {
                let step = path.sample(pair[0], pair[1]);
                let length = (pair[0] - pair[1]).sqrt();
                sum.iter_mut().zip(step.data()).for_each(|(s, v)| *s += v * length);
            }
            sum
        };
        let coarse = noise(&[14.6, 0.5]);
        let fine = noise(&[14.6, 9.0, 3.3, 1.234_567, 0.5]);
        let apart = coarse.iter().zip(&fine).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(apart < 2e-5, "{apart}");
    }

    #[test]
    fn samples_with_their_own_seeds_do_not_depend_on_the_batch() {
        let mut both = BrownianNoise::per_sample(&[2, 4, 4, 4], 0.03, 14.6, &[5, 6]).expect("a range");
        let mut one = BrownianNoise::new(&[1, 4, 4, 4], 14.6, 0.03, 6).expect("a range");
        assert_eq!(both.sample(10.0, 2.0).row(1), one.sample(10.0, 2.0).data());
    }

    #[test]
    fn bad_input_is_an_error() {
        let nan = BrownianNoise::new(&[1], f32::NAN, 1.0, 0).err();
        assert!(matches!(nan, Some(BrownianError::Range { .. })), "{nan:?}");
        let infinite = BrownianNoise::new(&[1], 0.0, f32::INFINITY, 0).err();
        assert!(matches!(infinite, Some(BrownianError::Range { .. })), "{infinite:?}");
        let seeds = BrownianNoise::per_sample(&[2, 1], 0.0, 1.0, &[1]).err();
        assert_eq!(seeds, Some(BrownianError::Seeds { seeds: 1, batch: 2 }));
    }

    /// Ranges far beyond any schedule end in a finite number of halvings.
    #[test]
    fn wide_ranges_terminate() {
        let mut path = BrownianNoise::new(&[3], 0.0, 1e20, 1).expect("a range");
        assert!(path.sample(1e20, 1e-6).data().iter().all(|v| v.is_finite()));
        assert!(path.sample(1e19, 1.5).data().iter().all(|v| v.is_finite()));
        let mut widest = BrownianNoise::new(&[3], 0.0, f32::MAX, 1).expect("a range");
        assert_eq!(widest.sample(f32::MAX, 1e-6).len(), 3);
    }
}
