//! `bislerp`: resizing latents by spherical interpolation.
//!
//! A latent cell is a vector over channels. Between two neighbouring cells the
//! direction moves along the great circle (slerp: K. Shoemake, "Animating
//! rotation with quaternion curves", 1985) and the length moves linearly, so
//! that an enlarged latent keeps its variance, which `bilinear` does not.
//! First along x, then along y. Neighbours and ratios are those of `bilinear`.

use rayon::prelude::*;

use super::resample::{Grid, linear_position};

/// Vectors whose cosine is this close to ±1 are not interpolated on a circle.
pub const PARALLEL: f32 = 1e-5;

/// Resizes `[outer, h, w, inner]`; `inner` is the channel vector.
pub(super) fn resize(x: &[f32], grid: Grid, [height, width]: [usize; 2]) -> Vec<f32> {
    let wide = resize_axis(x, grid.outer * grid.h, (grid.w, width), 1, grid.inner);
    resize_axis(&wide, grid.outer, (grid.h, height), width, grid.inner)
}

/// Resizes the middle of `[outer, old, cells, channels]` from `old` to `new`.
fn resize_axis(
    x: &[f32],
    outer: usize,
    (old, new): (usize, usize),
    cells: usize,
    channels: usize,
) -> Vec<f32> {
    let step = cells * channels;
    let mut out = vec![0.0; outer * new * step];
    let neighbours: Vec<_> = (0..new).map(|i| neighbours(i, old, new)).collect();
    for (block, target) in x.chunks_exact(old * step).zip(out.chunks_exact_mut(new * step)) {
        neighbours.par_iter().zip(target.par_chunks_exact_mut(step)).for_each(|(&(at, next, ratio), row)| {
            let near = block[at * step..][..step].chunks_exact(channels);
            let far = block[next * step..][..step].chunks_exact(channels);
            for ((a, b), cell) in near.zip(far).zip(row.chunks_exact_mut(channels)) {
                slerp(a, b, ratio, cell);
            }
        });
    }
    out
}

/// The two source coordinates that output coordinate `i` lies between, and how far on the way it is.
///
/// The reference interpolates the *coordinates* bilinearly in `f32` and then
/// splits the result into an integer and a ratio; rounding decides which side
/// of an integer a position falls on, so the same detour is taken here.
pub fn neighbours(i: usize, old: usize, new: usize) -> (usize, usize, f32) {
    let (at, next, t) = linear_position(i, old, new);
    let position = at as f32 * (1.0 - t) + next as f32 * t;
    let ratio = position - position.floor();
    let last = (old - 1) as f32;
    let shifted = (at as f32 + 1.0).min(last) * (1.0 - t) + (next as f32 + 1.0).min(last) * t;
    let index = |v: f32| (v as usize).min(old - 1);
    (index(position), index(shifted), ratio)
}

/// Writes the point at `r` on the way from `a` to `b`.
fn slerp(a: &[f32], b: &[f32], r: f32, out: &mut [f32]) {
    let norm = |v: &[f32]| v.iter().map(|x| x * x).sum::<f32>().sqrt();
    let (a_norm, b_norm) = (norm(a), norm(b));
    // A zero vector has no direction: its direction counts as zero.
    let unit = |x: f32, n: f32| if n == 0.0 { 0.0 } else { x / n };
    let dot: f32 = a.iter().zip(b).map(|(&x, &y)| unit(x, a_norm) * unit(y, b_norm)).sum();
    if dot > 1.0 - PARALLEL {
        out.copy_from_slice(a);
        return;
    }
    if dot < PARALLEL - 1.0 {
        for ((o, x), y) in out.iter_mut().zip(a).zip(b) {
            *o = x * (1.0 - r) + y * r;
        }
        return;
    }
    let omega = dot.acos();
    let (wa, wb) = (((1.0 - r) * omega).sin() / omega.sin(), (r * omega).sin() / omega.sin());
    let length = a_norm * (1.0 - r) + b_norm * r;
    for ((o, &x), &y) in out.iter_mut().zip(a).zip(b) {
        *o = (wa * unit(x, a_norm) + wb * unit(y, b_norm)) * length;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halfway_between_orthogonal_vectors_keeps_the_length() {
        let mut out = [0.0; 2];
        slerp(&[2.0, 0.0], &[0.0, 4.0], 0.5, &mut out);
        let side = 3.0 / 2f32.sqrt();
        assert!((out[0] - side).abs() < 1e-6 && (out[1] - side).abs() < 1e-6, "{out:?}");
    }

    #[test]
    fn parallel_opposite_and_zero_vectors() {
        let mut out = [0.0; 2];
        slerp(&[1.0, 1.0], &[3.0, 3.0], 0.5, &mut out);
        assert_eq!(out, [1.0, 1.0]);
        slerp(&[1.0, 0.0], &[-3.0, 0.0], 0.25, &mut out);
        assert_eq!(out, [0.0, 0.0]);
        slerp(&[0.0, 0.0], &[0.0, 2.0], 0.5, &mut out);
        // dot 0: omega is π/2, the weight of the far end is sin(π/4).
        assert!((out[1] - 0.5f32.sqrt()).abs() < 1e-6 && out[0] == 0.0, "{out:?}");
    }
}
