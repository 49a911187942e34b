//! Turning, mirroring, cutting and pasting planes, for pictures (`[B, H, W, C]`:
//! cells of C values) and latents (`[B, C, h, w]`: B·C planes of single values)
//! alike.

use super::NodeError;
use super::shapes::{check_size, repeat_to, resize_masks, tensor};
use crate::image::{Crop, Method, Resize, upscale};
use crate::tensor::HostTensor;

/// A tensor seen as planes of cells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Planes {
    pub count: usize,
    pub h: usize,
    pub w: usize,
    /// Values a cell.
    pub cell: usize,
}

impl Planes {
    /// Of a picture batch.
    pub fn of_images([b, h, w, c]: [usize; 4]) -> Self {
        Self { count: b, h, w, cell: c }
    }

    /// Of a latent batch.
    pub fn of_latents([b, c, h, w]: [usize; 4]) -> Self {
        Self { count: b * c, h, w, cell: 1 }
    }

    /// New planes of `h × w`, whose cell (y, x) is this one's `from(y, x)`.
    pub fn map(
        self,
        x: &[f32],
        [h, w]: [usize; 2],
        from: impl Fn(usize, usize) -> (usize, usize),
    ) -> Vec<f32> {
        let mut out = Vec::with_capacity(self.count * h * w * self.cell);
        for plane in x.chunks_exact((self.h * self.w * self.cell).max(1)) {
            for y in 0..h {
                for x in 0..w {
                    let (fy, fx) = from(y, x);
                    out.extend_from_slice(&plane[(fy * self.w + fx) * self.cell..][..self.cell]);
                }
            }
        }
        out
    }

    /// Turned clockwise by quarter turns; with the new height and width.
    pub fn rotate(self, x: &[f32], quarters: usize) -> (Vec<f32>, [usize; 2]) {
        let Self { h, w, .. } = self;
        let size = if quarters % 2 == 1 { [w, h] } else { [h, w] };
        let turned = self.map(x, size, |row, column| match quarters % 4 {
            1 => (h - 1 - column, row),
            2 => (h - 1 - row, w - 1 - column),
            3 => (column, w - 1 - row),
            _ => (row, column),
        });
        (turned, size)
    }

    /// Mirrored top to bottom or left to right.
    pub fn flip(self, x: &[f32], vertically: bool) -> Vec<f32> {
        let Self { h, w, .. } = self;
        self.map(
            x,
            [h, w],
            |row, column| if vertically { (h - 1 - row, column) } else { (row, w - 1 - column) },
        )
    }

    /// The rectangle of `size` whose first cell is `at`, both `[y, x]`.
    pub fn crop(self, x: &[f32], at: [usize; 2], size: [usize; 2]) -> Vec<f32> {
        self.map(x, size, |row, column| (at[0] + row, at[1] + column))
    }
}

/// The quarter turns named by a combo value (`90 degrees`).
pub(super) fn quarters(rotation: &str) -> usize {
    match rotation.split(' ').next() {
        Some("90") => 1,
        Some("180") => 2,
        Some("270") => 3,
        _ => 0,
    }
}

/// What is pasted where by [`paste_masked`].
pub(super) struct Paste<'a> {
    /// `[B, C, h, w]`; batch and size may differ from the destination's.
    pub source: &'a HostTensor,
    /// Where (1) the source shows; any size, `[B, H, W]`.
    pub mask: Option<&'a HostTensor>,
    /// Place of the source's first cell, in units of `1 / unit` cells.
    pub x: usize,
    /// As `x`, down.
    pub y: usize,
    /// Pixels to a cell: 8 for latents, 1 for pictures.
    pub unit: usize,
    /// Whether the source is first resized to the destination.
    pub resize_source: bool,
}

/// `destination` (`[B, C, h, w]`) with another tensor pasted through a mask.
pub(super) fn paste_masked(destination: &HostTensor, paste: &Paste<'_>) -> Result<HostTensor, NodeError> {
    let (b, c, h, w) = (destination.dim(0), destination.dim(1), destination.dim(2), destination.dim(3));
    let mut source = paste.source.clone();
    if source.dim(1) != c {
        let message = format!("source has {} channels, destination {c}: they must agree", source.dim(1));
        return Err(NodeError::input("source", &message));
    }
    if paste.resize_source && (source.dim(2), source.dim(3)) != (h, w) {
        source =
            upscale(&source, Resize { width: w, height: h, method: Method::Bilinear, crop: Crop::Disabled })?;
    }
    let source = repeat_to(&source, b)?;
    let (sh, sw) = (source.dim(2), source.dim(3));
    let mask = match paste.mask {
        Some(mask) => Some(repeat_to(&resize_masks(mask, sh, sw)?, b)?),
        None => None,
    };
    let (left, top) = ((paste.x / paste.unit).min(w), (paste.y / paste.unit).min(h));
    let (width, height) = (sw.min(w - left), sh.min(h - top));
    let mut out = destination.clone();
    for plane in 0..b * c {
        for row in 0..height {
            let from = &source.data()[(plane * sh + row) * sw..][..width];
            let to = &mut out.data_mut()[(plane * h + top + row) * w + left..][..width];
            match &mask {
                None => to.copy_from_slice(from),
                Some(mask) => {
                    let weights = &mask.data()[(plane / c * sh + row) * sw..][..width];
                    for ((t, &f), &m) in to.iter_mut().zip(from).zip(weights) {
                        *t = m * f + (1.0 - m) * *t;
                    }
                }
            }
        }
    }
    Ok(out)
}

/// `[B, H, W, C]` → `[B, C, H, W]`.
pub(super) fn to_nchw(x: &HostTensor) -> Result<HostTensor, NodeError> {
    let (b, h, w, c) = (x.dim(0), x.dim(1), x.dim(2), x.dim(3));
    check_size(x.shape())?;
    tensor(&[b, c, h, w], transpose(x.data(), h * w, c))
}

/// `[B, C, H, W]` → `[B, H, W, C]`.
pub(super) fn to_nhwc(x: &HostTensor) -> Result<HostTensor, NodeError> {
    let (b, c, h, w) = (x.dim(0), x.dim(1), x.dim(2), x.dim(3));
    tensor(&[b, h, w, c], transpose(x.data(), c, h * w))
}

/// Transposes every `rows × columns` block.
fn transpose(x: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(x.len());
    for block in x.chunks_exact((rows * columns).max(1)) {
        for column in 0..columns {
            out.extend(block.iter().skip(column).step_by(columns));
        }
    }
    out
}

/// A square filter with weights exp(−d²/2σ²) over −1..1, normalised.
///
/// Coordinates run from −1 to 1 whatever the radius, so sigma counts in radii.
pub(super) fn gaussian(radius: usize, sigma: f32) -> Vec<f32> {
    let size = 2 * radius + 1;
    let at = |i: usize| if radius == 0 { -1.0 } else { (i as f32 - radius as f32) / radius as f32 };
    let mut kernel: Vec<f32> = (0..size * size)
        .map(|i| {
            let (x, y) = (at(i % size), at(i / size));
            (-(x * x + y * y) / (2.0 * sigma * sigma)).exp()
        })
        .collect();
    let sum: f32 = kernel.iter().sum();
    kernel.iter_mut().for_each(|v| *v /= sum);
    kernel
}

/// A sharpening filter: the negative Gaussian, with the centre such that all sum up to 1.
pub(super) fn sharpener(radius: usize, sigma: f32, alpha: f32) -> Vec<f32> {
    let mut kernel = gaussian(radius, sigma);
    kernel.iter_mut().for_each(|v| *v *= -(alpha * 10.0));
    let sum: f32 = kernel.iter().sum();
    let center = kernel.len() / 2;
    kernel[center] = kernel[center] - sum + 1.0;
    kernel
}

/// Convolves every plane with a square kernel; the border is mirrored
/// without repeating the edge.
///
/// # Errors
/// If a side is not longer than the radius: nothing is left to mirror.
pub(super) fn convolve(x: &[f32], planes: Planes, kernel: &[f32]) -> Result<Vec<f32>, NodeError> {
    use rayon::prelude::*;
    let size = kernel.len().isqrt();
    let radius = size / 2;
    let Planes { h, w, cell, .. } = planes;
    if radius >= h || radius >= w {
        let message =
            format!("radius {radius} needs a side of at least {} but the input is {w}x{h}", radius + 1);
        return Err(NodeError::failed("ValueError", message));
    }
    let mirror = |i: usize, length: usize| {
        // i counts from −radius.
        let i = i as isize - radius as isize;
        let last = length as isize - 1;
        (if i < 0 {
            -i
        } else if i > last {
            2 * last - i
        } else {
            i
        }) as usize
    };
    let columns: Vec<usize> = (0..w + 2 * radius).map(|i| mirror(i, w) * cell).collect();
    let rows: Vec<usize> = (0..h + 2 * radius).map(|i| mirror(i, h)).collect();
    let mut out = vec![0.0; x.len()];
    out.par_chunks_exact_mut(w * cell).enumerate().for_each(|(n, target)| {
        let plane = &x[n / h * h * w * cell..][..h * w * cell];
        let y = n % h;
        for (k, weights) in kernel.chunks_exact(size).enumerate() {
            let row = &plane[rows[y + k] * w * cell..][..w * cell];
            for (column, values) in target.chunks_exact_mut(cell).enumerate() {
                for (weight, &at) in weights.iter().zip(&columns[column..]) {
                    values.iter_mut().zip(&row[at..at + cell]).for_each(|(t, v)| *t += weight * v);
                }
            }
        }
    });
    Ok(out)
}
