//! Lanczos-3 resampling of 8-bit pictures, bit for bit as Pillow does it.
//!
//! ComfyUI's `lanczos` turns a picture into 8-bit samples and hands it to
//! Pillow, so "the same picture" means Pillow's arithmetic: filter weights are
//! computed in `f64`, normalised, rounded to 22-bit fixed point; the first pass
//! rounds its result to 8 bits before the second reads it; four-channel
//! pictures are resampled with premultiplied alpha. A pass whose size does not
//! change is skipped. The x pass comes first, unless the height shrinks by
//! more than twice what the width shrinks by (Pillow 13; earlier releases
//! always began with x, which moves some samples by a few levels in such
//! cases). Filter: K. Turkowski, "Filters for common resampling
//! tasks", 1990.

use rayon::prelude::*;

use super::resample::Grid;

/// Half width of the filter in source pixels (at scale 1).
const LOBES: f64 = 3.0;
/// Fraction bits of a weight: 32 bits less 8 for the sample and 2 for overshoot.
const FRACTION_BITS: u32 = 22;

/// Resizes `[outer, h, w, inner]` samples in 0..=1 through 8 bits.
pub(super) fn resize_f32(x: &[f32], grid: Grid, width: usize, height: usize) -> Vec<f32> {
    let mut samples: Vec<u8> = x.iter().map(|&v| (v * 255.0).clamp(0.0, 255.0) as u8).collect();
    if (grid.w, grid.h) != (width, height) {
        if grid.inner == 4 {
            premultiply(&mut samples);
        }
        samples = resize_u8(&samples, grid, width, height);
        if grid.inner == 4 {
            unpremultiply(&mut samples);
        }
    }
    samples.into_iter().map(|v| f32::from(v) / 255.0).collect()
}

/// Resizes `[outer, h, w, inner]` bytes; every channel on its own.
pub(super) fn resize_u8(x: &[u8], grid: Grid, width: usize, height: usize) -> Vec<u8> {
    match (width == grid.w, height == grid.h) {
        (true, true) => x.to_vec(),
        (true, false) => pass_y(x, grid, height),
        (false, true) => pass_x(x, grid, width),
        (false, false) if is_y_first(grid, width, height) => {
            pass_x(&pass_y(x, grid, height), Grid { h: height, ..grid }, width)
        }
        (false, false) => pass_y(&pass_x(x, grid, width), Grid { w: width, ..grid }, height),
    }
}

fn is_y_first(grid: Grid, width: usize, height: usize) -> bool {
    let shrink = |old: usize, new: usize| old as i64 - new as i64;
    height < grid.h && shrink(grid.h, height) > 2 * shrink(grid.w, width)
}

/// Fixed-point weights of one output coordinate.
struct Window {
    start: usize,
    weights: Vec<i32>,
}

fn windows(old: usize, new: usize) -> Vec<Window> {
    let scale = old as f64 / new as f64;
    let filter_scale = scale.max(1.0);
    let support = LOBES * filter_scale;
    (0..new)
        .map(|i| {
            let center = (i as f64 + 0.5) * scale;
            // Truncation towards zero, then the clamp: as in Pillow.
            let start = ((center - support + 0.5) as i64).max(0) as usize;
            let end = ((center + support + 0.5) as usize).min(old);
            let raw: Vec<f64> =
                (start..end).map(|k| lanczos3((k as f64 - center + 0.5) * (1.0 / filter_scale))).collect();
            let sum: f64 = raw.iter().sum();
            let weights = raw.iter().map(|w| fixed_point(if sum == 0.0 { *w } else { w / sum })).collect();
            Window { start, weights }
        })
        .collect()
}

fn fixed_point(weight: f64) -> i32 {
    let scaled = weight * f64::from(1u32 << FRACTION_BITS);
    if weight < 0.0 { (scaled - 0.5) as i32 } else { (scaled + 0.5) as i32 }
}

fn lanczos3(x: f64) -> f64 {
    if (-LOBES..LOBES).contains(&x) { sinc(x) * sinc(x / LOBES) } else { 0.0 }
}

fn sinc(x: f64) -> f64 {
    if x == 0.0 {
        return 1.0;
    }
    let angle = x * std::f64::consts::PI;
    angle.sin() / angle
}

fn to_u8(sum: i32) -> u8 {
    (sum >> FRACTION_BITS).clamp(0, 255) as u8
}

const HALF: i32 = 1 << (FRACTION_BITS - 1);

fn pass_x(x: &[u8], grid: Grid, width: usize) -> Vec<u8> {
    let inner = grid.inner;
    let windows = windows(grid.w, width);
    let mut out = vec![0; grid.outer * grid.h * width * inner];
    out.par_chunks_exact_mut(width * inner).zip(x.par_chunks_exact(grid.w * inner)).for_each(
        |(new_row, row)| {
            for (cell, window) in new_row.chunks_exact_mut(inner).zip(&windows) {
                for (c, o) in cell.iter_mut().enumerate() {
                    let samples = row[window.start * inner + c..].iter().step_by(inner);
                    let sum = window
                        .weights
                        .iter()
                        .zip(samples)
                        .fold(HALF, |sum, (w, &v)| sum.wrapping_add(w.wrapping_mul(i32::from(v))));
                    *o = to_u8(sum);
                }
            }
        },
    );
    out
}

fn pass_y(x: &[u8], grid: Grid, height: usize) -> Vec<u8> {
    let row_len = grid.w * grid.inner;
    let windows = windows(grid.h, height);
    let mut out = vec![0; grid.outer * height * row_len];
    out.par_chunks_exact_mut(row_len).enumerate().for_each(|(n, row)| {
        let plane = &x[n / height * grid.h * row_len..][..grid.h * row_len];
        let window = &windows[n % height];
        let mut sums = vec![HALF; row_len];
        for (k, w) in window.weights.iter().enumerate() {
            for (sum, &v) in sums.iter_mut().zip(&plane[(window.start + k) * row_len..][..row_len]) {
                *sum = sum.wrapping_add(w.wrapping_mul(i32::from(v)));
            }
        }
        for (o, sum) in row.iter_mut().zip(sums) {
            *o = to_u8(sum);
        }
    });
    out
}

/// Colour · alpha / 255, rounded to nearest.
fn premultiply(rgba: &mut [u8]) {
    for pixel in rgba.chunks_exact_mut(4) {
        let alpha = u32::from(pixel[3]);
        for v in &mut pixel[..3] {
            let product = u32::from(*v) * alpha + 128;
            *v = ((product + (product >> 8)) >> 8) as u8;
        }
    }
}

/// Colour · 255 / alpha, rounded down and clamped; alpha 0 leaves the colour.
fn unpremultiply(rgba: &mut [u8]) {
    for pixel in rgba.chunks_exact_mut(4) {
        let alpha = u32::from(pixel[3]);
        if alpha == 0 || alpha == 255 {
            continue;
        }
        for v in &mut pixel[..3] {
            *v = (255 * u32::from(*v) / alpha).min(255) as u8;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    /// First six bytes and FNV-1a hash of the result.
    type Case = ((usize, usize, usize), (usize, usize), [u8; 6], u64);

    /// Made by Pillow 13.0 `resize(.., LANCZOS)` on the pattern below.
    const CASES: &[Case] = &[
        ((7, 5, 3), (4, 9), [14, 149, 168, 42, 43, 47], 0xd967c3fa253778d7),
        ((60, 44, 3), (33, 27), [53, 119, 126, 88, 98, 39], 0x121efb18aedea63e),
        ((37, 30, 4), (51, 41), [0, 74, 208, 55, 136, 178], 0x8d596a322e09e3b9),
        ((16, 9, 4), (5, 3), [98, 102, 145, 140, 147, 129], 0x52653604f380a62b),
        ((13, 11, 1), (13, 40), [0, 76, 178, 46, 237, 149], 0x4eadb7d6cce2f100),
        ((300, 2, 3), (17, 2), [127, 111, 132, 118, 129, 149], 0xbb3d40d05713e28d),
        ((60, 44, 3), (80, 20), [74, 93, 87, 67, 139, 114], 0x5153589f3915c466),
        ((60, 44, 3), (49, 22), [62, 105, 114, 76, 150, 104], 0x48e4046e93f055a0),
        ((60, 44, 3), (49, 21), [67, 109, 106, 75, 148, 109], 0x4e216cd5f6097046),
        ((20, 90, 4), (11, 30), [148, 94, 106, 89, 157, 132], 0x6d15a1bd6334db7c),
    ];

    fn fnv(bytes: &[u8]) -> u64 {
        bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, &b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3))
    }

    #[test]
    fn equals_pillow_bit_for_bit() {
        for &((w, h, c), (new_w, new_h), first, hash) in CASES {
            let pattern: Vec<f32> =
                (0..w * h * c).map(|i| ((i * 73 + i * i * 11) % 256) as f32 / 255.0).collect();
            let grid = Grid { outer: 1, h, w, inner: c };
            let out = resize_f32(&pattern, grid, new_w, new_h);
            let bytes: Vec<u8> = out.iter().map(|v| (v * 255.0).round() as u8).collect();
            assert_eq!(bytes.len(), new_w * new_h * c);
            assert_eq!(bytes[..6], first, "{w}x{h}x{c} to {new_w}x{new_h}");
            assert_eq!(fnv(&bytes), hash, "{w}x{h}x{c} to {new_w}x{new_h}");
        }
    }

    #[test]
    fn every_byte_survives_the_way_through_floats() {
        let all: Vec<f32> = (0..=255u8).map(|v| f32::from(v) / 255.0).collect();
        let grid = Grid { outer: 1, h: 16, w: 16, inner: 1 };
        assert_eq!(resize_f32(&all, grid, 16, 16), all);
    }
}
