//! Token merging: tokens of a picture that are alike share a row, so that attention has fewer queries.
//!
//! One token of every whole 2×2 square is a target. Of the others those most like a target, by cosine similarity, are
//! merged into the one they are most like; the rest stay alone. Rows are the tokens that stay alone, by falling
//! similarity, then the targets, square by square. Source: Bolya and Hoffman, "Token merging for fast Stable
//! Diffusion", 2023.

use rayon::prelude::*;

use super::check::{shape, size};
use super::reference::read;
use super::{Backend, Cols, HostLayout, Shape, Tensor, TensorError};

/// Which tokens share a row.
pub struct MatchTokens<'a> {
    /// Tokens `[B, 1, h·w, C]` or `[B, h, w, C]`.
    pub x: &'a Tensor,
    /// Height and width of the picture that they make up; both at least 2.
    pub size: (usize, usize),
    /// For every whole 2×2 square, row by row, which of its tokens (again row by row, 0 to 3) is the target.
    pub targets: &'a [u8],
    /// How many tokens are merged; those that are no targets, if there are no more of them.
    pub merged: usize,
}

impl MatchTokens<'_> {
    /// Fails unless the tokens are a picture with that many squares.
    pub fn check(&self) -> Result<(), TensorError> {
        const OP: &str = "match_tokens";
        let (h, w) = self.size;
        size(OP, "tokens of the picture", h * w, self.x.shape().positions())?;
        size(OP, "height and width (at least 2)", 2, h.min(w).min(2))?;
        size(OP, "targets", (h / 2) * (w / 2), self.targets.len())?;
        match self.targets.iter().find(|target| **target > 3) {
            Some(target) => size(OP, "place in a square (at most 3)", 3, usize::from(*target)),
            None => Ok(()),
        }
    }

    /// How many tokens are merged.
    pub fn merged(&self) -> usize {
        self.merged.min(self.x.shape().positions().saturating_sub(self.targets.len()))
    }
}

/// The row of every token.
pub struct TokenRows {
    /// Samples.
    pub samples: usize,
    /// Height and width of the picture.
    pub size: (usize, usize),
    /// Rows of a sample.
    pub rows: usize,
    /// The numbers.
    pub numbers: RowNumbers,
}

/// Where row numbers are.
pub enum RowNumbers {
    /// In host memory, sample after sample.
    Host(Vec<u32>),
    /// On the device: i32 numbers `[B, 1, h·w, 1]`, and the token of every target, i32 `[1, 1, targets, 1]`.
    Device {
        /// The row of every token.
        rows: Tensor,
        /// The token of every target.
        places: Tensor,
    },
}

impl TokenRows {
    /// Tokens of a sample.
    pub fn tokens(&self) -> usize {
        self.size.0 * self.size.1
    }

    /// Shape of the rows of tokens of `c` channels.
    pub fn merged_shape(&self, c: usize) -> Shape {
        Shape::nhwc(self.samples, 1, self.rows, c)
    }

    /// Shape of tokens of `c` channels.
    pub fn spread_shape(&self, c: usize) -> Shape {
        Shape::nhwc(self.samples, 1, self.tokens(), c)
    }

    /// Fails unless `x` are such tokens and `out` has their rows.
    pub fn check_merge(&self, x: &Cols<'_>, out: Shape) -> Result<(), TensorError> {
        const OP: &str = "merge_tokens";
        x.check(OP)?;
        let tokens = x.tensor.shape();
        shape(OP, self.spread_shape(tokens.c), Shape { h: 1, w: tokens.positions(), ..tokens })?;
        shape(OP, self.merged_shape(x.width), out)
    }

    /// Fails unless `x` has a row for every number and `out` the tokens.
    pub fn check_spread(&self, x: &Tensor, out: Shape) -> Result<(), TensorError> {
        const OP: &str = "spread_tokens";
        shape(OP, self.merged_shape(x.shape().c), x.shape())?;
        shape(OP, self.spread_shape(x.shape().c), out)
    }

    fn on_host(&self, op: &'static str) -> Result<&[u32], TensorError> {
        match &self.numbers {
            RowNumbers::Host(rows) => Ok(rows),
            RowNumbers::Device { .. } => {
                Err(TensorError::Unsupported { op, what: "rows of tokens on a device".into() })
            }
        }
    }
}

/// See [`Backend::match_tokens`].
pub(super) fn match_tokens<B: Backend + ?Sized>(
    backend: &B,
    op: &MatchTokens<'_>,
) -> Result<TokenRows, TensorError> {
    op.check()?;
    let (s, merged) = (op.x.shape(), op.merged());
    let x = read(backend, op.x)?;
    let sample = (s.positions() * s.c).max(1);
    let numbers = x.chunks_exact(sample).flat_map(|x| rows_of(x, op.size, op.targets, merged)).collect();
    let rows = s.positions() - merged;
    Ok(TokenRows { samples: s.n, size: op.size, rows, numbers: RowNumbers::Host(numbers) })
}

/// Targets' tokens, square by square.
pub fn target_places((_, w): (usize, usize), targets: &[u8]) -> Vec<usize> {
    let across = w / 2;
    let place = |(square, target): (usize, &u8)| {
        let (y, x) = (square / across * 2, square % across * 2);
        (y + usize::from(*target) / 2) * w + x + usize::from(*target) % 2
    };
    targets.iter().enumerate().map(place).collect()
}

/// The row of every token of `x` `[h·w, C]`.
pub fn rows_of(x: &[f32], size: (usize, usize), targets: &[u8], merged: usize) -> Vec<u32> {
    let tokens = size.0 * size.1;
    let c = x.len() / tokens.max(1);
    let places = target_places(size, targets);
    let unit = |place: usize| {
        let token = &x[place * c..(place + 1) * c];
        let norm = token.iter().map(|v| v * v).sum::<f32>().sqrt();
        token.iter().map(move |v| v / norm)
    };
    let aims: Vec<f32> = places.iter().flat_map(|t| unit(*t)).collect();
    let mut role = vec![None; tokens];
    places.iter().enumerate().for_each(|(square, place)| role[*place] = Some(square));
    let sources: Vec<usize> = (0..tokens).filter(|place| role[*place].is_none()).collect();
    let best = |place: &usize| {
        let token: Vec<f32> = unit(*place).collect();
        let similarity = |aim: &[f32]| -> f32 { aim.iter().zip(&token).map(|(a, b)| a * b).sum() };
        let scores = aims.chunks_exact(c.max(1)).map(similarity).enumerate();
        let top = scores.fold((0, f32::NEG_INFINITY), |best, at| if at.1 > best.1 { at } else { best });
        (*place, top.0, top.1)
    };
    let mut pairs: Vec<(usize, usize, f32)> = sources.par_iter().map(best).collect();
    pairs.sort_by(|a, b| b.2.total_cmp(&a.2));
    let alone = pairs.len() - merged.min(pairs.len());
    let mut rows = vec![0u32; tokens];
    for (rank, (place, target, _)) in pairs.into_iter().enumerate() {
        rows[place] = if rank < merged { alone + target } else { rank - merged } as u32;
    }
    for (square, place) in places.into_iter().enumerate() {
        rows[place] = (alone + square) as u32;
    }
    rows
}

/// See [`Backend::merge_tokens`].
pub(super) fn merge_tokens<B: Backend + ?Sized>(
    backend: &B,
    x: &Cols<'_>,
    rows: &TokenRows,
    out: &mut Tensor,
) -> Result<(), TensorError> {
    rows.check_merge(x, out.shape())?;
    let numbers = rows.on_host("merge_tokens")?;
    let (data, pitch) = (read(backend, x.tensor)?, x.tensor.shape().c);
    let mut sums = vec![0f32; out.shape().len()];
    let mut counts = vec![0f32; out.shape().rows()];
    for (token, row) in numbers.iter().enumerate() {
        let row = token / rows.tokens() * rows.rows + *row as usize;
        counts[row] += 1.0;
        let values = &data[token * pitch + x.start..][..x.width];
        sums[row * x.width..][..x.width].iter_mut().zip(values).for_each(|(sum, v)| *sum += v);
    }
    for (sums, count) in sums.chunks_exact_mut(x.width.max(1)).zip(&counts) {
        sums.iter_mut().for_each(|sum| *sum /= count);
    }
    backend.upload(&sums, HostLayout::Nhwc, out)
}

/// See [`Backend::spread_tokens`].
pub(super) fn spread_tokens<B: Backend + ?Sized>(
    backend: &B,
    x: &Tensor,
    rows: &TokenRows,
    out: &mut Tensor,
) -> Result<(), TensorError> {
    rows.check_spread(x, out.shape())?;
    let numbers = rows.on_host("spread_tokens")?;
    let (data, c) = (read(backend, x)?, x.shape().c);
    let mut spread = Vec::with_capacity(out.shape().len());
    for (token, row) in numbers.iter().enumerate() {
        let row = token / rows.tokens() * rows.rows + *row as usize;
        spread.extend_from_slice(&data[row * c..][..c]);
    }
    backend.upload(&spread, HostLayout::Nhwc, out)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Four tokens of which two point the same way: they share a row, behind those of the two that stay alone.
    #[test]
    fn similar_tokens_share_a_row() {
        let x = [1.0, 0.0, 2.0, 0.1, 0.0, 1.0, -1.0, 0.5];
        assert_eq!(rows_of(&x, (2, 2), &[0], 1), [2, 2, 0, 1]);
        assert_eq!(rows_of(&x, (2, 2), &[0], 0), [3, 0, 1, 2]);
        assert_eq!(rows_of(&x, (2, 2), &[0], 3), [0, 0, 0, 0]);
    }

    #[test]
    fn every_whole_square_has_one_target() {
        assert_eq!(target_places((5, 5), &[0, 1, 2, 3]), [0, 3, 15, 18]);
    }
}
