//! Rotations of a weight's outputs: OFT (Qiu et al. 2023) and BOFT (Liu et al. 2024).
//!
//! A file holds square blocks B. With the skew Q = B − Bᵀ, the Cayley transform R = (I + Q)(I − Q)⁻¹
//! is a rotation. OFT turns groups of neighbouring outputs, each by the transpose of its R. BOFT turns them
//! in several rounds, between which a butterfly permutation brings others together. A given alpha is the largest norm
//! that all Q may have together. The strength counts as in the reference: once between I and R, once more for the
//! difference to the weight.

use super::Values;
use super::low_rank::Matrix;

/// Square matrices of one size, row-major, in a row.
struct Blocks {
    size: usize,
    data: Vec<f32>,
}

impl Blocks {
    fn get(&self, i: usize) -> &[f32] {
        let area = self.size * self.size;
        &self.data[i * area..(i + 1) * area]
    }
}

/// The difference that an OFT makes: blocks `[blocks, n, n]` for a weight of `blocks · n` rows.
pub(super) fn turned(
    blocks: &Values,
    limit: Option<f64>,
    strength: f64,
    weight: &Matrix,
) -> Result<Vec<f32>, String> {
    let shape = blocks.shape();
    let &[count, size, _] = shape.as_slice() else { return Err(format!("{blocks:?} has shape {shape:?}")) };
    let rotations = rotations(blocks, size, limit)?;
    if count * size != weight.rows || size == 0 {
        return Err(format!("{count} blocks of {size} outputs for a weight of {}", weight.rows));
    }
    let mut out = vec![0.0f32; weight.data.len()];
    for (i, row) in out.chunks_exact_mut(weight.columns.max(1)).enumerate() {
        let (block, m) = (i / size, i % size);
        let rotation = rotations.get(block);
        for n in 0..size {
            let identity = f32::from(u8::from(n == m));
            let factor = (rotation[n * size + m] - identity) * strength as f32;
            row.iter_mut().zip(weight.row(block * size + n)).for_each(|(o, w)| *o += factor * w);
        }
    }
    Ok(out)
}

/// The difference that a BOFT makes: blocks `[rounds, blocks, n, n]`, and factors on the outputs at the end.
pub(super) fn butterfly(
    blocks: &Values,
    rescale: Option<&Values>,
    limit: Option<f64>,
    strength: f64,
    weight: &Matrix,
) -> Result<Vec<f32>, String> {
    let shape = blocks.shape();
    let &[rounds, count, size, _] = shape.as_slice() else {
        return Err(format!("{blocks:?} has shape {shape:?}"));
    };
    let rotations = rotations(blocks, size, limit)?;
    if count * size != weight.rows || size < 2 {
        return Err(format!("{count} blocks of {size} outputs for a weight of {}", weight.rows));
    }
    let mut turned = weight.clone();
    for round in 0..rounds {
        let half = 1usize.checked_shl(round as u32).and_then(|k| k.checked_mul(size / 2)).unwrap_or(0);
        if half == 0 || !weight.rows.is_multiple_of(2 * half) {
            return Err(format!(
                "{rounds} rounds of blocks of {size} for a weight of {} outputs",
                weight.rows
            ));
        }
        // Output `half` further on becomes the neighbour.
        let place = |at: usize| at / (2 * half) * 2 * half + at % 2 * half + at % (2 * half) / 2;
        let before = turned.clone();
        for at in 0..weight.rows {
            let (block, i) = (at / size, at % size);
            let rotation = rotations.get(round * count + block);
            let row = &mut turned.data[place(at) * weight.columns..][..weight.columns];
            row.fill(0.0);
            for j in 0..size {
                let identity = f32::from(u8::from(i == j));
                let factor = match strength {
                    1.0 => rotation[i * size + j],
                    _ => rotation[i * size + j] * strength as f32 + (1.0 - strength) as f32 * identity,
                };
                let from = before.row(place(block * size + j));
                row.iter_mut().zip(from).for_each(|(o, w)| *o += factor * w);
            }
        }
    }
    if let Some(rescale) = rescale {
        let factors = rescale.read();
        if factors.len() != weight.rows && factors.len() != 1 {
            return Err(format!("{rescale:?} has {} factors for {} outputs", factors.len(), weight.rows));
        }
        for (i, row) in turned.data.chunks_exact_mut(weight.columns.max(1)).enumerate() {
            let factor = factors.get(i).or(factors.first()).copied().unwrap_or(1.0);
            row.iter_mut().for_each(|v| *v *= factor);
        }
    }
    Ok(turned.data.iter().zip(&weight.data).map(|(a, b)| a - b).collect())
}

/// The rotations of all blocks `[…, size, size]`, computed in f64.
fn rotations(blocks: &Values, size: usize, limit: Option<f64>) -> Result<Blocks, String> {
    let (given, area) = (blocks.read(), size * size);
    if blocks.shape().last() != Some(&size) || given.len() != blocks.count() || area == 0 {
        return Err(format!("{blocks:?} has shape {:?}: its blocks must be squares", blocks.shape()));
    }
    let skew = |i: usize| {
        let (block, row, column) = (i / area, i % area / size, i % size);
        f64::from(given[i]) - f64::from(given[block * area + column * size + row])
    };
    let mut q: Vec<f64> = (0..given.len()).map(skew).collect();
    if let Some(limit) = limit.filter(|limit| *limit > 0.0) {
        let norm = q.iter().map(|v| v * v).sum::<f64>().sqrt() + 1e-8;
        if norm > limit {
            q.iter_mut().for_each(|v| *v *= limit / norm);
        }
    }
    let data = q.chunks_exact(area).flat_map(|q| cayley(q, size)).map(|v| v as f32).collect();
    Ok(Blocks { size, data })
}

/// (I + Q)(I − Q)⁻¹ of one skew Q. Both factors commute, so it solves (I − Q) R = I + Q. I − Q has no eigenvalue
/// below 1 in size: there is always a pivot.
fn cayley(q: &[f64], n: usize) -> Vec<f64> {
    let identity = |i: usize| f64::from(u8::from(i / n == i % n));
    let mut left: Vec<f64> = q.iter().enumerate().map(|(i, q)| identity(i) - q).collect();
    let mut right: Vec<f64> = q.iter().enumerate().map(|(i, q)| identity(i) + q).collect();
    for k in 0..n {
        let size = |row: &usize| left[row * n + k].abs();
        let pivot = (k..n).max_by(|a, b| size(a).total_cmp(&size(b))).unwrap_or(k);
        for j in 0..n {
            left.swap(k * n + j, pivot * n + j);
            right.swap(k * n + j, pivot * n + j);
        }
        let scale = 1.0 / left[k * n + k];
        for j in 0..n {
            left[k * n + j] *= scale;
            right[k * n + j] *= scale;
        }
        for i in (0..n).filter(|i| *i != k) {
            let factor = left[i * n + k];
            for j in 0..n {
                left[i * n + j] -= factor * left[k * n + j];
                right[i * n + j] -= factor * right[k * n + j];
            }
        }
    }
    right
}
