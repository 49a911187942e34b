//! The best approximation of a matrix by one of low rank: what turns a difference of models into a LoRA.
//!
//! Truncated singular value decomposition by subspace iteration (Halko, Martinsson &
//! Tropp 2011): a few passes over the matrix, where a full decomposition of a model
//! would take hours. Columns that are carried along beyond the rank make it converge.

use super::low_rank::Matrix;

/// Columns beyond the rank.
const BESIDES: usize = 16;
/// Most passes.
const PASSES: usize = 60;
/// Passes end when the kept energy grows by less than this share.
const SETTLED: f64 = 1e-9;

/// `up [rows, rank]` and `down [rank, columns]` whose product is nearest to `values`; singular values are in `up`.
/// The rank is cut to the shorter side.
pub fn low_rank_factors(
    values: Vec<f32>,
    (rows, columns): (usize, usize),
    rank: usize,
) -> Result<(Vec<f32>, Vec<f32>), String> {
    if values.len() != rows * columns || values.iter().any(|v| !v.is_finite()) {
        return Err(format!("{} values that are no matrix of {rows}x{columns} numbers", values.len()));
    }
    let rank = rank.min(rows).min(columns);
    let width = (rank + BESIDES).min(rows).min(columns);
    let matrix = Matrix { rows, columns, data: values };
    let turned = matrix.transposed();
    // Any start will do that is not orthogonal to the matrix's own directions.
    let start =
        (0..columns * width).map(|i| ((i as f64 * 0.754_877_666).fract() * 2.0 - 1.0) as f32).collect();
    let mut basis = orthonormal(Matrix { rows: columns, columns: width, data: start });
    let mut energy = 0.0;
    for _ in 0..PASSES {
        let image = orthonormal(matrix.times(&basis)?);
        let back = turned.times(&image)?;
        let now: f64 = back.data.iter().map(|v| f64::from(*v).powi(2)).sum();
        basis = orthonormal(back);
        if now - energy <= now * SETTLED {
            break;
        }
        energy = now;
    }
    // Within the subspace: eigenvectors of the small Gram matrix, largest first.
    let image = matrix.times(&basis)?;
    let order = eigenvectors(gram(&image), width);
    let pick = Matrix {
        rows: width,
        columns: rank,
        data: (0..width * rank).map(|i| order[i % rank][i / rank] as f32).collect(),
    };
    Ok((image.times(&pick)?.data, basis.times(&pick)?.transposed().data))
}

/// Columns made orthonormal one after the other, twice for accuracy; those without a direction of their own become zero.
fn orthonormal(matrix: Matrix) -> Matrix {
    let mut columns: Vec<Vec<f64>> = (0..matrix.columns)
        .map(|j| (0..matrix.rows).map(|i| f64::from(matrix.row(i)[j])).collect())
        .collect();
    for j in 0..columns.len() {
        let (done, rest) = columns.split_at_mut(j);
        let Some(column) = rest.first_mut() else { continue };
        let before = norm(column);
        for _ in 0..2 {
            for other in done.iter() {
                let along: f64 = column.iter().zip(other).map(|(a, b)| a * b).sum();
                column.iter_mut().zip(other).for_each(|(a, b)| *a -= along * b);
            }
        }
        let after = norm(column);
        let scale = if after > before * 1e-10 && after > 0.0 { 1.0 / after } else { 0.0 };
        column.iter_mut().for_each(|v| *v *= scale);
    }
    let (rows, width) = (matrix.rows, matrix.columns);
    let data = (0..rows * width).map(|i| columns[i % width][i / width] as f32).collect();
    Matrix { rows, columns: width, data }
}

fn norm(values: &[f64]) -> f64 {
    values.iter().map(|v| v * v).sum::<f64>().sqrt()
}

/// `xᵀ·x`.
fn gram(x: &Matrix) -> Vec<f64> {
    let n = x.columns;
    let mut out = vec![0.0; n * n];
    for i in 0..x.rows {
        let row = x.row(i);
        for (a, out) in row.iter().zip(out.chunks_exact_mut(n)) {
            out.iter_mut().zip(row).for_each(|(o, b)| *o += f64::from(*a) * f64::from(*b));
        }
    }
    out
}

/// Eigenvectors of a symmetric matrix `n`×`n` by Jacobi's rotations, that of the largest value first.
fn eigenvectors(mut a: Vec<f64>, n: usize) -> Vec<Vec<f64>> {
    let mut vectors: Vec<Vec<f64>> =
        (0..n).map(|i| (0..n).map(|j| f64::from(u8::from(i == j))).collect()).collect();
    let total: f64 = a.iter().map(|v| v * v).sum();
    for _ in 0..60 {
        let off: f64 = (0..n * n).filter(|i| i % n != i / n).map(|i| a[i] * a[i]).sum();
        if off <= total * 1e-28 {
            break;
        }
        for p in 0..n {
            for q in p + 1..n {
                rotate(&mut a, &mut vectors, n, (p, q));
            }
        }
    }
    let mut order: Vec<(f64, Vec<f64>)> =
        vectors.into_iter().enumerate().map(|(i, vector)| (a[i * n + i], vector)).collect();
    order.sort_by(|x, y| y.0.total_cmp(&x.0));
    order.into_iter().map(|(_, vector)| vector).collect()
}

/// Makes `a[p, q]` zero. Row `i` of `vectors` is the `i`th eigenvector.
fn rotate(a: &mut [f64], vectors: &mut [Vec<f64>], n: usize, (p, q): (usize, usize)) {
    let apq = a[p * n + q];
    if apq == 0.0 {
        return;
    }
    let theta = (a[q * n + q] - a[p * n + p]) / (2.0 * apq);
    let t = theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt());
    let t = if theta == 0.0 { 1.0 } else { t };
    let c = 1.0 / (t * t + 1.0).sqrt();
    let s = t * c;
    for k in 0..n {
        let (x, y) = (a[k * n + p], a[k * n + q]);
        (a[k * n + p], a[k * n + q]) = (c * x - s * y, s * x + c * y);
    }
    for k in 0..n {
        let (x, y) = (a[p * n + k], a[q * n + k]);
        (a[p * n + k], a[q * n + k]) = (c * x - s * y, s * x + c * y);
        let (x, y) = (vectors[p][k], vectors[q][k]);
        (vectors[p][k], vectors[q][k]) = (c * x - s * y, s * x + c * y);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wave(count: usize, step: f64) -> Vec<f32> {
        (0..count).map(|i| (i as f64 * step).sin() as f32).collect()
    }

    fn product(up: &[f32], down: &[f32], (rows, columns): (usize, usize)) -> Vec<f32> {
        let rank = up.len() / rows;
        let up = Matrix { rows, columns: rank, data: up.to_vec() };
        up.times(&Matrix { rows: rank, columns, data: down.to_vec() }).unwrap().data
    }

    fn distance(a: &[f32], b: &[f32]) -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt()
    }

    /// A matrix of rank 3 is found again, in both orientations.
    #[test]
    fn matrices_of_low_rank_are_found_again() {
        for (rows, columns) in [(40, 25), (25, 40), (40, 4)] {
            let rank = 3;
            let whole = product(&wave(rows * rank, 1.3), &wave(rank * columns, 0.7), (rows, columns));
            let (up, down) = low_rank_factors(whole.clone(), (rows, columns), rank).unwrap();
            let error = distance(&product(&up, &down, (rows, columns)), &whole);
            assert!(error < 1e-4, "{rows}x{columns}: {error}");
            // Rows of `down` are orthonormal.
            let first: f32 = down[..columns].iter().map(|v| v * v).sum();
            assert!((first - 1.0).abs() < 1e-5, "{first}");
        }
    }

    /// With known singular values 8, 4, 2, 1, ½ the rest beyond rank 3 is √(1 + ¼).
    #[test]
    fn the_rest_is_that_of_the_singular_values() {
        let (rows, columns, count) = (30, 20, 5);
        let basis = |n: usize, step: f64| {
            orthonormal(Matrix { rows: n, columns: count, data: wave(n * count, step) })
        };
        let (left, right) = (basis(rows, 1.7), basis(columns, 2.9));
        let scaled: Vec<f32> =
            left.data.iter().enumerate().map(|(i, v)| v * [8.0, 4.0, 2.0, 1.0, 0.5][i % count]).collect();
        let whole = product(&scaled, &right.transposed().data, (rows, columns));
        let (up, down) = low_rank_factors(whole.clone(), (rows, columns), 3).unwrap();
        let rest = distance(&product(&up, &down, (rows, columns)), &whole);
        assert!((rest - 1.25f64.sqrt()).abs() < 1e-4, "{rest}");
        let largest: f64 = (0..rows).map(|i| f64::from(up[i * 3]).powi(2)).sum::<f64>().sqrt();
        assert!((largest - 8.0).abs() < 1e-4, "{largest}");
    }

    #[test]
    fn nothing_and_nonsense() {
        let (up, down) = low_rank_factors(vec![0.0; 12], (3, 4), 8).unwrap();
        assert_eq!((up, down.len()), (vec![0.0; 9], 12));
        assert!(low_rank_factors(vec![f32::NAN; 4], (2, 2), 1).is_err());
    }
}
