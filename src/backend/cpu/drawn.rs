//! How much attention every key draws: no tiling, for the small maps of a network's lowest level.

use rayon::prelude::*;

use super::check::{columns, elements_mut};
use super::matmul::Input;
use super::simd::element::Element;
use crate::tensor::{AttentionDrawn, Tensor, TensorError};

/// See [`crate::tensor::Backend::attention_drawn`].
pub(super) fn attention_drawn<E: Element>(
    op: &AttentionDrawn<'_>,
    out: &mut Tensor,
) -> Result<(), TensorError> {
    const OP: &str = "attention_drawn";
    op.check(out.shape())?;
    let (queries, keys) = (op.q.tensor.shape().positions(), op.k.tensor.shape().positions());
    let (q, k) = (columns::<E>(OP, &op.q)?, columns::<E>(OP, &op.k)?);
    let width = op.q.width / op.heads;
    let row = |from: &Input<'_, E>, row: usize, head: usize| -> Vec<f32> {
        from.data[row * from.stride + head * width..][..width].iter().map(|v| v.to_f32()).collect()
    };
    for (i, out) in elements_mut::<f32>(OP, out)?.chunks_exact_mut(keys).enumerate() {
        let sample = op.first + i;
        let mut drawn = vec![0f64; keys];
        for head in 0..op.heads {
            let all: Vec<Vec<f32>> = (0..keys).map(|key| row(&k, sample * keys + key, head)).collect();
            let shares: Vec<Vec<f32>> = (0..queries)
                .into_par_iter()
                .map(|query| shares(&row(&q, sample * queries + query, head), &all, op.scale))
                .collect();
            // In one order, whatever the threads.
            for row in &shares {
                drawn.iter_mut().zip(row).for_each(|(d, s)| *d += f64::from(*s));
            }
        }
        out.iter_mut().zip(&drawn).for_each(|(o, d)| *o = (d / op.heads as f64) as f32);
    }
    Ok(())
}

/// One query's softmax over the keys.
fn shares(query: &[f32], keys: &[Vec<f32>], scale: f32) -> Vec<f32> {
    let score = |key: &Vec<f32>| query.iter().zip(key).map(|(q, k)| q * k).sum::<f32>() * scale;
    let mut shares: Vec<f32> = keys.iter().map(score).collect();
    let top = shares.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    shares.iter_mut().for_each(|s| *s = (*s - top).exp());
    let total: f32 = shares.iter().sum();
    shares.iter_mut().for_each(|s| *s /= total);
    shares
}
