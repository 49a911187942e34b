//! Applying one patch to one weight.

use super::decompose::decompose;
use super::generalised;
use super::low_rank::{Matrix, tucker};
use super::orthogonal;
use super::{Change, Factor, Patch, Scale, Values};

/// Changes `weight` of `shape`.
///
/// # Errors
/// Why the change doesn't fit; the weight has then been scaled by `strength_model` at most.
pub(super) fn apply(patch: &Patch, weight: &mut [f32], shape: &[usize]) -> Result<(), String> {
    if patch.strength_model != 1.0 {
        let factor = patch.strength_model as f32;
        weight.iter_mut().for_each(|w| *w *= factor);
    }
    let strength = patch.strength;
    match &*patch.change {
        Change::Set(values) => {
            weight.copy_from_slice(&fitting(values, weight.len())?);
            Ok(())
        }
        Change::Add(_) if strength == 0.0 => Ok(()),
        Change::Add(values) => {
            add(weight, &fitting(values, weight.len())?, strength as f32);
            Ok(())
        }
        Change::LowRank { up, down, mid, scale } => {
            let rank = down.shape().first().copied().unwrap_or(1);
            let delta = low_rank(up, down, mid.as_ref())?;
            scaled(delta, Some(rank), scale, strength, (weight, shape))
        }
        Change::Hadamard { factors: [one, two], cores, scale } => {
            let rank = one[1].shape().first().copied().unwrap_or(1);
            let core = |i: usize| cores.as_ref().map(|c| &c[i]);
            let mut delta = hadamard_part(one, core(0))?;
            let other = hadamard_part(two, core(1))?;
            if delta.len() != other.len() {
                return Err(format!("products of {} and {} elements", delta.len(), other.len()));
            }
            delta.iter_mut().zip(&other).for_each(|(a, b)| *a *= b);
            scaled(delta, Some(rank), scale, strength, (weight, shape))
        }
        Change::Kronecker { first, second, scale } => {
            // The rank of the fine factor wins where both are products.
            let rank = second.rank().or(first.rank());
            let taps = if shape.len() == 4 { shape[2] * shape[3] } else { 1 };
            let delta = kronecker(&factor(first)?.0, &factor(second)?, taps)?;
            scaled(delta, rank, scale, strength, (weight, shape))
        }
        Change::Generalised { factors, scale } => {
            let inputs = shape.get(1).copied().unwrap_or(1);
            let (delta, rank) = generalised::difference(factors, &as_matrix(weight, shape), inputs)?;
            scaled(delta, Some(rank), scale, strength, (weight, shape))
        }
        Change::Orthogonal { blocks, rescale, scale } => {
            let (matrix, limit) = (as_matrix(weight, shape), scale.alpha);
            let delta = match blocks.shape().len() {
                3 => orthogonal::turned(blocks, limit, strength, &matrix)?,
                _ => orthogonal::butterfly(blocks, rescale.as_ref(), limit, strength, &matrix)?,
            };
            // Norms of its own are for the change times alpha, which is 0 where there is no limit, as in the reference.
            let factor = scale.magnitude.as_ref().map(|_| scale.alpha.unwrap_or(0.0));
            let scale = Scale { alpha: factor, magnitude: scale.magnitude.clone() };
            scaled(delta, Some(1), &scale, strength, (weight, shape))
        }
    }
}

/// A weight as rows of outputs.
fn as_matrix(weight: &[f32], shape: &[usize]) -> Matrix {
    let (rows, columns) = (shape.first().copied().unwrap_or(1), shape.iter().skip(1).product());
    Matrix { rows, columns, data: weight.to_vec() }
}

/// The elements of `values`, if there are `count`.
fn fitting(values: &Values, count: usize) -> Result<Vec<f32>, String> {
    let read = values.read();
    if read.len() == count {
        return Ok(read);
    }
    Err(format!("{values:?} has {} elements where the weight has {count}", read.len()))
}

fn add(weight: &mut [f32], delta: &[f32], factor: f32) {
    weight.iter_mut().zip(delta).for_each(|(w, d)| *w += factor * d);
}

/// Adds `strength · alpha/rank · delta`, or replaces the norms as DoRA does.
fn scaled(
    mut delta: Vec<f32>,
    rank: Option<usize>,
    scale: &Scale,
    strength: f64,
    (weight, shape): (&mut [f32], &[usize]),
) -> Result<(), String> {
    if delta.len() != weight.len() {
        return Err(format!("a change of {} elements for a weight of {}", delta.len(), weight.len()));
    }
    let alpha = match (scale.alpha, rank) {
        (Some(alpha), Some(rank)) => alpha / rank.max(1) as f64,
        _ => 1.0,
    };
    match &scale.magnitude {
        None => {
            add(weight, &delta, (strength * alpha) as f32);
            Ok(())
        }
        Some(magnitude) => {
            delta.iter_mut().for_each(|d| *d *= alpha as f32);
            decompose(&delta, magnitude, strength as f32, weight, shape)
        }
    }
}

fn low_rank(up: &Values, down: &Values, mid: Option<&Values>) -> Result<Vec<f32>, String> {
    let (up, mut right) = (up.matrix(), down.matrix());
    if let Some(mid) = mid {
        // down [rank, in] and mid [rank, rank, kh, kw]: columns of the joint matrix are (in, kh, kw).
        let (shape, core) = (mid.shape(), mid.matrix());
        let &[_, inner, kh, kw] = shape.as_slice() else {
            return Err(format!("a core of shape {shape:?}"));
        };
        let identity = Matrix {
            rows: core.rows,
            columns: core.rows,
            data: (0..core.rows * core.rows).map(|i| f32::from(u8::from(i % (core.rows + 1) == 0))).collect(),
        };
        right = tucker(&core, (inner, kh * kw), &identity, &right)?;
    }
    Ok(up.times(&right)?.data)
}

fn hadamard_part([a, b]: &[Values; 2], core: Option<&Values>) -> Result<Vec<f32>, String> {
    let (a, b) = (a.matrix(), b.matrix());
    let Some(core) = core else { return Ok(a.times(&b)?.data) };
    let shape = core.shape();
    let taps = shape.iter().skip(2).product();
    let inner = shape.get(1).copied().unwrap_or(1);
    Ok(tucker(&core.matrix(), (inner, taps), &a, &b)?.data)
}

impl Factor {
    /// The rank, if the factor is a product.
    fn rank(&self) -> Option<usize> {
        match self {
            Factor::Whole(_) => None,
            Factor::Product { b, .. } => b.shape().first().copied(),
        }
    }
}

/// A factor as a matrix `[rows, columns·taps]`, and its taps.
fn factor(factor: &Factor) -> Result<(Matrix, usize), String> {
    match factor {
        Factor::Whole(values) => Ok((values.matrix(), values.shape().iter().skip(2).product())),
        Factor::Product { a, b, core: None } => Ok((a.matrix().times(&b.matrix())?, 1)),
        Factor::Product { a, b, core: Some(core) } => {
            let shape = core.shape();
            let taps = shape.iter().skip(2).product();
            let inner = shape.get(1).copied().unwrap_or(1);
            Ok((tucker(&core.matrix(), (inner, taps), &a.matrix(), &b.matrix())?, taps))
        }
    }
}

/// `first ⊗ second` over rows and columns; the taps of a convolution stay innermost.
fn kronecker(first: &Matrix, second: &(Matrix, usize), weight_taps: usize) -> Result<Vec<f32>, String> {
    let (second, taps) = (&second.0, second.1.max(1));
    if taps != 1 && taps != weight_taps {
        return Err(format!("a factor of {taps} taps for a weight of {weight_taps}"));
    }
    let mut out = Vec::with_capacity(first.data.len() * second.data.len());
    for i in 0..first.rows {
        for k in 0..second.rows {
            for &a in first.row(i) {
                out.extend(second.row(k).iter().map(|b| a * b));
            }
        }
    }
    Ok(out)
}
