//! Products of small matrices: what decomposed changes are made of.

use rayon::prelude::*;

/// A row-major matrix.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Matrix {
    pub rows: usize,
    pub columns: usize,
    pub data: Vec<f32>,
}

impl Matrix {
    /// Row `i`.
    pub fn row(&self, i: usize) -> &[f32] {
        &self.data[i * self.columns..(i + 1) * self.columns]
    }

    pub fn transposed(&self) -> Self {
        let (rows, columns) = (self.columns, self.rows);
        let data = (0..rows * columns).map(|i| self.data[(i % columns) * self.columns + i / columns]);
        Self { rows, columns, data: data.collect() }
    }

    /// `self · other`, a row a task: the rank is small, so rows of `other` stay in the cache.
    pub fn times(&self, other: &Self) -> Result<Self, String> {
        if self.columns != other.rows || self.data.len() != self.rows * self.columns {
            return Err(format!(
                "a matrix of {}x{} can't be multiplied by one of {}x{}",
                self.rows, self.columns, other.rows, other.columns
            ));
        }
        let mut data = vec![0.0f32; self.rows * other.columns];
        data.par_chunks_mut(other.columns.max(1)).enumerate().for_each(|(i, out)| {
            for (k, &a) in self.row(i).iter().enumerate() {
                out.iter_mut().zip(other.row(k)).for_each(|(o, b)| *o += a * b);
            }
        });
        Ok(Self { rows: self.rows, columns: other.columns, data })
    }
}

/// `Σᵢⱼ core[i, j, ·] · first[i, r] · second[j, s]` as `[r, s, ·]`: a Tucker
/// decomposition of a convolution. `core` is `[i, j, taps]`.
pub(super) fn tucker(
    core: &Matrix,
    (inner, taps): (usize, usize),
    first: &Matrix,
    second: &Matrix,
) -> Result<Matrix, String> {
    if core.columns != inner * taps {
        return Err(format!("a core of {} columns is not {inner}x{taps}", core.columns));
    }
    // [r, j·taps], then for every r: [s, taps].
    let half = first.transposed().times(core)?;
    let by_output = second.transposed();
    let mut data = Vec::with_capacity(half.rows * by_output.rows * taps);
    for r in 0..half.rows {
        let slice = Matrix { rows: inner, columns: taps, data: half.row(r).to_vec() };
        data.extend(by_output.times(&slice)?.data);
    }
    Ok(Matrix { rows: half.rows, columns: by_output.rows * taps, data })
}

#[cfg(test)]
mod tests {
    use super::{Matrix, tucker};

    fn matrix(rows: usize, columns: usize) -> Matrix {
        Matrix { rows, columns, data: (0..rows * columns).map(|i| (i % 7) as f32 - 2.5).collect() }
    }

    #[test]
    fn products_are_those_of_the_definition() {
        let (a, b) = (matrix(3, 4), matrix(4, 5));
        let product = a.times(&b).unwrap();
        for i in 0..3 {
            for j in 0..5 {
                let sum: f32 = (0..4).map(|k| a.row(i)[k] * b.row(k)[j]).sum();
                assert_eq!(product.row(i)[j], sum);
            }
        }
        assert!(a.times(&a).is_err());
        assert_eq!(a.transposed().row(3)[2], a.row(2)[3]);
    }

    #[test]
    fn tucker_sums_over_both_ranks() {
        let (core, first, second) = (matrix(2, 3 * 4), matrix(2, 5), matrix(3, 6));
        let got = tucker(&core, (3, 4), &first, &second).unwrap();
        for (r, s, t) in [(0, 0, 0), (4, 5, 3), (2, 3, 1)] {
            let mut sum = 0.0;
            for i in 0..2 {
                for j in 0..3 {
                    sum += core.row(i)[j * 4 + t] * first.row(i)[r] * second.row(j)[s];
                }
            }
            assert_eq!(got.row(r)[s * 4 + t], sum);
        }
    }
}
