//! When a step may take its result from an earlier one.
//!
//! Source: Zhou et al., "Less is enough: training-free video diffusion acceleration via runtime-adaptive caching"
//! (EasyCache), 2025. How much a model's output changes for a change of its input is measured whenever the model
//! runs; while the changes that this predicts add up to less than a threshold, what the model last added to its
//! input is added again.

use crate::tensor::HostTensor;

/// Every so many cells of a side are looked at.
const EVERY: usize = 8;

/// What a node asks for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ReuseOptions {
    /// Largest sum of predicted relative changes before the model runs again.
    pub threshold: f64,
    /// Share of the sampling at which results may first be taken again.
    pub start_percent: f64,
    /// Share of the sampling from which on the model always runs.
    pub end_percent: f64,
}

/// Some cells of a tensor.
#[derive(Clone, Debug, PartialEq)]
struct Sample(Vec<f32>);

impl Sample {
    fn of(x: &HostTensor) -> Self {
        let (h, w) = (x.dim(2), x.dim(3));
        let planes = x.data().chunks_exact((h * w).max(1));
        let rows = planes.flat_map(|plane| plane.chunks_exact(w).step_by(EVERY));
        Self(rows.flat_map(|row| row.iter().step_by(EVERY).copied()).collect())
    }

    /// Mean distance.
    fn change(&self, to: &Self) -> f64 {
        mean_size(self.0.iter().zip(&to.0).map(|(a, b)| a - b))
    }
}

fn mean_size(values: impl ExactSizeIterator<Item = f32>) -> f64 {
    let count = values.len().max(1) as f64;
    values.map(|v| f64::from(v.abs())).sum::<f64>() / count
}

/// What the model last made of what.
#[derive(Clone, Debug)]
struct Seen {
    input: Sample,
    output: Sample,
    /// Mean size of the output.
    size: f64,
}

/// The changes of one run.
#[derive(Clone, Debug)]
pub struct Reuse {
    threshold: f64,
    /// The sigma from which on results may be taken again, and the one where that ends.
    range: (f64, f64),
    /// Change of the output for a change of the input.
    rate: Option<f64>,
    /// Predicted relative change since the model ran.
    sum: f64,
    seen: Option<Seen>,
    /// Change of the input that [`is_small`](Self::is_small) was asked about last.
    asked: Option<f64>,
    shape: Option<Vec<usize>>,
}

impl Reuse {
    /// For a run of a model with these noise levels.
    pub fn new(options: ReuseOptions, percent_to_sigma: impl Fn(f64) -> f64) -> Self {
        Self {
            threshold: options.threshold,
            range: (percent_to_sigma(options.start_percent), percent_to_sigma(options.end_percent)),
            rate: None,
            sum: 0.0,
            seen: None,
            asked: None,
            shape: None,
        }
    }

    /// Whether the model always runs from here on.
    pub fn is_over(&self, sigma: f32) -> bool {
        f64::from(sigma) <= self.range.1
    }

    /// Whether results may be taken again at this sigma.
    pub fn has_begun(&self, sigma: f32) -> bool {
        f64::from(sigma) <= self.range.0
    }

    /// Whether inputs have another shape than so far: everything seen is forgotten then.
    pub fn is_reset(&mut self, shape: &[usize]) -> bool {
        let is_other = self.shape.as_deref().is_some_and(|known| known != shape);
        self.shape = Some(shape.to_vec());
        if is_other {
            // The reference goes on with a rate of zero, not with none.
            (self.rate, self.sum, self.seen, self.asked) = (Some(0.0), 0.0, None, None);
        }
        is_other
    }

    /// Whether the result for this input is predicted to differ little from what the last one gives.
    /// `can_reuse`: whether there is a result to take.
    pub fn is_small(&mut self, input: &HostTensor, can_reuse: bool) -> bool {
        let Some(seen) = &self.seen else { return false };
        let change = Sample::of(input).change(&seen.input);
        self.asked = Some(change);
        let Some(rate) = self.rate else { return false };
        self.sum += rate * change / seen.size;
        let is_small = self.sum < self.threshold && can_reuse;
        if !is_small {
            self.sum = 0.0;
        }
        is_small
    }

    /// The model has run. `size` is of what the mean size is taken: all that was computed in the call.
    pub fn saw(&mut self, input: &HostTensor, output: &HostTensor, size: &HostTensor) {
        let (input, output) = (Sample::of(input), Sample::of(output));
        if let (Some(seen), Some(asked)) = (&self.seen, self.asked.take()) {
            self.rate = Some(output.change(&seen.output) / asked);
        }
        self.seen = Some(Seen { input, output, size: mean_size(size.data().iter().copied()) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flat(value: f32) -> HostTensor {
        HostTensor::full(&[1, 2, 16, 9], value)
    }

    /// Inputs rise by 1, outputs by 3 from 30: the rate is 3, a further step is predicted to change 3/33 of it.
    #[test]
    fn steps_are_taken_again_until_their_changes_add_up() {
        let options = ReuseOptions { threshold: 0.2, start_percent: 0.0, end_percent: 1.0 };
        let mut reuse = Reuse::new(options, |percent| 10.0 - 10.0 * percent);
        assert!(!reuse.is_small(&flat(0.0), true), "nothing is known");
        reuse.saw(&flat(0.0), &flat(30.0), &flat(30.0));
        assert!(!reuse.is_small(&flat(1.0), true), "no rate is known");
        reuse.saw(&flat(1.0), &flat(33.0), &flat(33.0));
        assert_eq!(reuse.rate, Some(3.0));
        assert!(reuse.is_small(&flat(2.0), true));
        assert!((reuse.sum - 3.0 / 33.0).abs() < 1e-9, "{}", reuse.sum);
        // The next input is two away from what was seen: 3/33 + 6/33 is too much.
        assert!(!reuse.is_small(&flat(3.0), true));
        assert_eq!(reuse.sum, 0.0);
        assert!(!reuse.is_over(0.5) && reuse.is_over(0.0) && reuse.has_begun(10.0) && !reuse.has_begun(10.5));
        assert!(!reuse.is_reset(&[1]) && !reuse.is_reset(&[1]) && reuse.is_reset(&[2]));
        assert_eq!(reuse.rate, Some(0.0));
    }

    #[test]
    fn every_eighth_cell_is_looked_at() {
        let x = HostTensor::from_fn(&[1, 1, 9, 17], |i| i as f32);
        assert_eq!(Sample::of(&x).0, [0.0, 8.0, 16.0, 136.0, 144.0, 152.0]);
    }
}
