//! GLoRA (Chavan et al. 2023): a change that also depends on the weight, W·A + B, both of low rank.
//!
//! Files of LyCORIS have A = a1·a2 and B = b1·b2; those of its first versions have A = a2·a1 and B = b2·b1. Shapes
//! tell which it is, as in the reference.

use super::Values;
use super::low_rank::Matrix;

/// The factors in the order `a1`, `a2`, `b1`, `b2`.
pub(super) type Factors = [Values; 4];

/// The difference that the factors make, and their rank. `inputs`: the weight's second extent.
pub(super) fn difference(
    factors: &Factors,
    weight: &Matrix,
    inputs: usize,
) -> Result<(Vec<f32>, usize), String> {
    let [a1, a2, b1, b2] = factors;
    let all_equal = |extents: [usize; 4]| extents.iter().all(|e| *e == extents[0]);
    let is_old = all_equal([b2.extent(1), b1.extent(0), a1.extent(0), a2.extent(1)]);
    let is_new = all_equal([b2.extent(0), b1.extent(1), a1.extent(1), a2.extent(0)]);
    // As long as wide as the rank, a square weight's factors fit both ways.
    let is_both = is_old && a2.extent(0) == weight.rows && weight.rows == inputs;
    let (rank, [first, second, left, right]) = match (is_old, is_new) {
        (true, false) => (a1.extent(0), [a2, a1, b2, b1]),
        (true, true) if is_both => (a1.extent(0), [a2, a1, b2, b1]),
        (_, true) => (a2.extent(0), [a1, a2, b1, b2]),
        (false, false) => return Err(format!("{a1:?}, {a2:?}, {b1:?}, {b2:?} have no rank in common")),
    };
    let mut sum = left.matrix().times(&right.matrix())?.data;
    let (first, second) = (first.matrix(), second.matrix());
    let of_weight = match weight.columns == first.rows {
        true => weight.times(&first)?.times(&second)?.data,
        false => by_taps(weight, inputs, &first, &second)?,
    };
    if sum.len() != of_weight.len() {
        return Err(format!("products of {} and {} elements", sum.len(), of_weight.len()));
    }
    sum.iter_mut().zip(&of_weight).for_each(|(a, b)| *a += b);
    Ok((sum, rank))
}

/// `Σᵢ W[o, i, t] · A[i, j]` for a convolution's weight, A = first·second.
fn by_taps(weight: &Matrix, inputs: usize, first: &Matrix, second: &Matrix) -> Result<Vec<f32>, String> {
    let (first, second) = (first.transposed(), second.transposed());
    let columns = weight.columns / inputs.max(1);
    let mut out = Vec::with_capacity(weight.data.len());
    for o in 0..weight.rows {
        let row = Matrix { rows: inputs, columns, data: weight.row(o).to_vec() };
        out.extend(second.times(&first.times(&row)?)?.data);
    }
    Ok(out)
}
