//! DoRA (Liu et al. 2024): a change of direction, and norms of its own.

use super::Values;

/// `weight + strength · (m · (weight + delta) / ‖·‖ − weight)`.
///
/// `magnitude` holds a norm for each output channel or each input channel. Norms
/// by output are taken of the *unchanged* weight, norms by input of the changed
/// one: that is what ComfyUI does with such files.
pub(super) fn decompose(
    delta: &[f32],
    magnitude: &Values,
    strength: f32,
    weight: &mut [f32],
    shape: &[usize],
) -> Result<(), String> {
    let rows = shape.first().copied().unwrap_or(1);
    let inputs = shape.get(1).copied().unwrap_or(1);
    let taps: usize = shape.iter().skip(2).product();
    let is_by_output = magnitude.shape().first() == Some(&rows);
    let scales = magnitude.read();
    let groups = if is_by_output { rows } else { inputs };
    if scales.len() != groups && scales.len() != 1 {
        return Err(format!("{magnitude:?} holds {} norms for {groups} channels", scales.len()));
    }
    let group_of = |i: usize| if is_by_output { i / (inputs * taps) } else { i / taps % inputs };
    let mut squares = vec![0.0f64; groups];
    for (i, (w, d)) in weight.iter().zip(delta).enumerate() {
        let value = if is_by_output { *w } else { w + d };
        squares[group_of(i)] += f64::from(value).powi(2);
    }
    let factor_of = |g: usize| {
        let scale = scales.get(g).or(scales.first()).copied().unwrap_or(1.0);
        scale / (squares[g].sqrt() as f32 + f32::EPSILON)
    };
    let factors: Vec<f32> = (0..groups).map(factor_of).collect();
    for (i, (w, d)) in weight.iter_mut().zip(delta).enumerate() {
        let changed = (*w + d) * factors[group_of(i)];
        *w = if strength == 1.0 { changed } else { *w + strength * (changed - *w) };
    }
    Ok(())
}
