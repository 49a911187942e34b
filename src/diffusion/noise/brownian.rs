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
//! Normals come from the CPU's generator, or, for the `_gpu` samplers on a GPU,
//! from the device's ([`GpuBrownianNoise`]): another path, which stays there.
//!
//! Sources: P. Lévy's bridge construction; J. Gaines and T. Lyons, "Variable
//! step size control in the numerical solution of SDEs", 1997 (Brownian tree);
//! X. Li et al., "Scalable gradients for stochastic differential equations",
//! 2020 (virtual tree over splittable seeds).

use std::collections::HashMap;
use std::convert::Infallible;

use rayon::prelude::*;
use thiserror::Error;

use super::{Generator, SeedSequence};
use crate::diffusion::{DiffusionError, Field};
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

/// Where a path's normals come from, and the arithmetic on what is made of them.
trait Normals {
    /// An increment of the path.
    type Increment: Clone;
    /// Why there may be none.
    type Error;

    /// Standard normals of each seed.
    fn draw(&self, seeds: &[u64]) -> Result<Vec<Self::Increment>, Self::Error>;
    /// No increment.
    fn zeros(&self) -> Result<Self::Increment, Self::Error>;
    /// `factor·w`.
    fn scaled(&self, factor: f32, w: Self::Increment) -> Result<Self::Increment, Self::Error>;
    /// `a + sign·b`.
    fn plus(
        &self,
        a: &Self::Increment,
        sign: f32,
        b: &Self::Increment,
    ) -> Result<Self::Increment, Self::Error>;
    /// `left·whole·per_length + deviation·normal` with `share = (left, per_length)`.
    fn bridge(
        &self,
        whole: &Self::Increment,
        share: (f32, f32),
        normal: Self::Increment,
        deviation: f32,
    ) -> Result<Self::Increment, Self::Error>;
}

/// `len` numbers of the CPU's generator.
struct HostNormals {
    len: usize,
}

impl Normals for HostNormals {
    type Increment = Vec<f32>;
    type Error = Infallible;

    fn draw(&self, seeds: &[u64]) -> Result<Vec<Vec<f32>>, Infallible> {
        let one = |seed: &u64| Generator::new(*seed).randn(&[self.len]).into_data();
        Ok(seeds.par_iter().map(one).collect())
    }

    fn zeros(&self) -> Result<Vec<f32>, Infallible> {
        Ok(vec![0.0; self.len])
    }

    fn scaled(&self, factor: f32, mut w: Vec<f32>) -> Result<Vec<f32>, Infallible> {
        w.iter_mut().for_each(|w| *w *= factor);
        Ok(w)
    }

    fn plus(&self, a: &Vec<f32>, sign: f32, b: &Vec<f32>) -> Result<Vec<f32>, Infallible> {
        Ok(a.iter().zip(b).map(|(a, b)| a + sign * b).collect())
    }

    fn bridge(
        &self,
        whole: &Vec<f32>,
        (left, per_length): (f32, f32),
        mut normal: Vec<f32>,
        deviation: f32,
    ) -> Result<Vec<f32>, Infallible> {
        let values = normal.iter_mut().zip(whole);
        values.for_each(|(n, w)| *n = left * w * per_length + deviation * *n);
        Ok(normal)
    }
}

/// Numbers of a GPU's generator, shaped like a latent there.
struct GpuNormals {
    like: Field,
}

impl Normals for GpuNormals {
    type Increment = Field;
    type Error = DiffusionError;

    fn draw(&self, seeds: &[u64]) -> Result<Vec<Field>, DiffusionError> {
        let one = |seed: &u64| match self.like.gpu_noise(*seed, 0)? {
            Some((noise, _)) => Ok(noise),
            None => self.zeros(),
        };
        seeds.iter().map(one).collect()
    }

    fn zeros(&self) -> Result<Field, DiffusionError> {
        Field::from(HostTensor::zeros(self.like.shape())).beside(&self.like)
    }

    fn scaled(&self, factor: f32, w: Field) -> Result<Field, DiffusionError> {
        Field::lincomb(&[(f64::from(factor), &w)])
    }

    fn plus(&self, a: &Field, sign: f32, b: &Field) -> Result<Field, DiffusionError> {
        Field::lincomb(&[(1.0, a), (f64::from(sign), b)])
    }

    fn bridge(
        &self,
        whole: &Field,
        (left, per_length): (f32, f32),
        normal: Field,
        deviation: f32,
    ) -> Result<Field, DiffusionError> {
        let share = f64::from(left) * f64::from(per_length);
        Field::lincomb(&[(share, whole), (f64::from(deviation), &normal)])
    }
}

/// One Brownian path over `[t0, t1]`.
struct Path<N: Normals> {
    normals: N,
    entropy: u64,
    root: Node,
    root_increment: N::Increment,
    /// Increments of left halves by the place of the halved node: what
    /// the last query touched, because the next one begins where it ended.
    left_halves: HashMap<Place, N::Increment>,
}

impl<N: Normals> Path<N> {
    /// The path that `entropy` (all 64 bits) stands for; `t0 <= t1`, both finite.
    fn new(normals: N, (t0, t1): (f32, f32), entropy: u64) -> Result<Self, N::Error> {
        let (low, high) = (f64::from(t0), f64::from(t1));
        let drawn = normals.draw(&[seed(entropy, &[])])?.pop();
        let root_increment = match drawn {
            Some(drawn) => normals.scaled((high - low).sqrt() as f32, drawn)?,
            None => normals.zeros()?,
        };
        let root = Node { start: round_6(low), end: round_6(high), index: 0, level: 0 };
        Ok(Self { normals, entropy, root, root_increment, left_halves: HashMap::new() })
    }

    /// W(tb) - W(ta), see [`BrownianTree::increment`].
    fn increment(&mut self, ta: f32, tb: f32) -> Result<N::Increment, N::Error> {
        let clamped = |t: f32| round_6(f64::from(t).max(self.root.start).min(self.root.end));
        let (ta, tb) = (clamped(ta), clamped(tb));
        if ta >= tb {
            return self.normals.zeros();
        }
        let mut halved = Vec::new();
        self.root.halved_for(ta, tb, &mut halved);
        halved.retain(|node| !self.left_halves.contains_key(&node.place()));
        let seeds: Vec<u64> = halved.iter().map(|n| seed(self.entropy, &[n.index, n.level])).collect();
        let drawn = self.normals.draw(&seeds)?;
        let mut walk = Walk {
            normals: &self.normals,
            drawn: halved.iter().map(Node::place).zip(drawn).collect(),
            known: std::mem::take(&mut self.left_halves),
            touched: HashMap::new(),
            sum: None,
        };
        walk.visit(self.root, &self.root_increment, ta, tb)?;
        self.left_halves = walk.touched;
        match walk.sum {
            Some(sum) => Ok(sum),
            None => self.normals.zeros(),
        }
    }
}

/// One query on its way down the tree.
struct Walk<'a, N: Normals> {
    normals: &'a N,
    /// Normals of the nodes that are halved for the first time.
    drawn: HashMap<Place, N::Increment>,
    /// Left halves the last query left behind.
    known: HashMap<Place, N::Increment>,
    touched: HashMap<Place, N::Increment>,
    sum: Option<N::Increment>,
}

impl<N: Normals> Walk<'_, N> {
    /// Adds the increment over `[ta, tb]`, which lies within `node`.
    fn visit(&mut self, node: Node, increment: &N::Increment, ta: f64, tb: f64) -> Result<(), N::Error> {
        let Some(middle) = node.halving(ta, tb) else {
            return self.add(increment);
        };
        let left = self.left_half(node, increment)?;
        if ta < middle {
            self.visit(node.left(), &left, ta, tb.min(middle))?;
        }
        if tb > middle {
            let right = self.normals.plus(increment, -1.0, &left)?;
            self.visit(node.right(), &right, ta.max(middle), tb)?;
        }
        self.touched.insert(node.place(), left);
        Ok(())
    }

    fn add(&mut self, increment: &N::Increment) -> Result<(), N::Error> {
        let sum = match self.sum.take() {
            Some(sum) => self.normals.plus(&sum, 1.0, increment)?,
            None => increment.clone(),
        };
        self.sum = Some(sum);
        Ok(())
    }

    /// The bridge: given the whole increment, that of the left half is normal
    /// with mean proportional to its length and variance left·right/whole.
    fn left_half(&mut self, node: Node, increment: &N::Increment) -> Result<N::Increment, N::Error> {
        if let Some(known) = self.known.remove(&node.place()) {
            return Ok(known);
        }
        let per_length = 1.0 / (node.end - node.start);
        let (left, right) = (node.middle() - node.start, node.end - node.middle());
        let deviation = (left * right * per_length).sqrt() as f32;
        let share = (left as f32, per_length as f32);
        match self.drawn.remove(&node.place()) {
            Some(normal) => self.normals.bridge(increment, share, normal, deviation),
            None => self.normals.zeros(),
        }
    }
}

/// The seed of a node's generator.
fn seed(entropy: u64, place: &[u64]) -> u64 {
    SeedSequence::new(entropy, place, POOL).generate(1).first().copied().unwrap_or(0).into()
}

/// The finite, ascending range between two ends.
fn range(a: f32, b: f32) -> Result<(f32, f32), BrownianError> {
    let (t0, t1) = if b < a { (b, a) } else { (a, b) };
    if t0.is_finite() && t1.is_finite() { Ok((t0, t1)) } else { Err(BrownianError::Range { t0, t1 }) }
}

/// Unit-variance noise is `sign·W/length` for the increment W over `low..high`: `(low, high, sign, length)`.
fn step(sigma: f32, sigma_next: f32) -> (f32, f32, f32, f32) {
    let (low, high, sign) =
        if sigma < sigma_next { (sigma, sigma_next, 1.0) } else { (sigma_next, sigma, -1.0) };
    (low, high, sign, (sigma_next - sigma).abs().sqrt())
}

fn infallible<T>(result: Result<T, Infallible>) -> T {
    match result {
        Ok(value) => value,
        Err(never) => match never {},
    }
}

/// One Brownian path of `len` independent components over `[t0, t1]`.
pub struct BrownianTree(Path<HostNormals>);

impl BrownianTree {
    /// The path that `entropy` (all 64 bits) stands for.
    ///
    /// # Errors
    /// [`BrownianError::Range`] unless `t0 <= t1` and both are finite.
    pub fn new(len: usize, t0: f32, t1: f32, entropy: u64) -> Result<Self, BrownianError> {
        if !(t0.is_finite() && t1.is_finite() && t0 <= t1) {
            return Err(BrownianError::Range { t0, t1 });
        }
        Ok(Self(infallible(Path::new(HostNormals { len }, (t0, t1), entropy))))
    }

    /// W(tb) - W(ta) for `ta <= tb`; both are first clamped to the axis. Zeros
    /// if nothing lies in between at the tree's resolution of 1e-6.
    pub fn increment(&mut self, ta: f32, tb: f32) -> Vec<f32> {
        infallible(self.0.increment(ta, tb))
    }
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
        let (low, high, sign, length) = step(sigma, sigma_next);
        let increments = self.trees.iter_mut().flat_map(|tree| tree.increment(low, high));
        let values: Vec<f32> = increments.map(|w| sign * w / length).collect();
        HostTensor::new(&self.shape, values).unwrap_or_default()
    }
}

fn sorted_tree(len: usize, a: f32, b: f32, seed: u64) -> Result<BrownianTree, BrownianError> {
    let (t0, t1) = range(a, b)?;
    BrownianTree::new(len, t0, t1, seed)
}

/// Brownian noise of a GPU's generator, as the `_gpu` samplers draw it there: it is made on the device and stays.
pub struct GpuBrownianNoise(Path<GpuNormals>);

impl GpuBrownianNoise {
    /// One path for a latent on a GPU; see [`BrownianNoise::new`]. Zeros for a latent in host memory.
    ///
    /// # Errors
    /// [`BrownianError::Range`] if a sigma is not finite, and what the device reports.
    pub fn new(like: &Field, sigma_min: f32, sigma_max: f32, seed: u64) -> Result<Self, DiffusionError> {
        let range = range(sigma_min, sigma_max)?;
        Path::new(GpuNormals { like: like.clone() }, range, seed).map(Self)
    }

    /// Unit-variance noise for the step from `sigma` to `sigma_next`; see [`BrownianNoise::sample`].
    ///
    /// # Errors
    /// What the device reports.
    pub fn sample(&mut self, sigma: f32, sigma_next: f32) -> Result<Field, DiffusionError> {
        let (low, high, sign, length) = step(sigma, sigma_next);
        let increment = self.0.increment(low, high)?;
        Field::lincomb(&[(f64::from(sign / length), &increment)])
    }
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
