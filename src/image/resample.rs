//! Resizing pictures, latents and masks with PyTorch's `interpolate` arithmetic.
//!
//! Every method but two is separable: an [`Axis`] lists, for each output
//! coordinate, the source coordinates and weights that make it up, and the two
//! axes are applied one after the other. That covers `nearest`,
//! `nearest-exact`, `bilinear`, `bicubic` (all with `align_corners = false`
//! and without antialiasing) and `area` (adaptive average pooling). Source
//! positions are computed in `f32`, as PyTorch does, because a position that
//! falls on the other side of an integer moves a whole pixel.
//!
//! `lanczos` goes through 8-bit samples and lives in [`super::lanczos`];
//! `bislerp` interpolates directions instead of values and lives in
//! [`crate::tensor::bislerp`]. Cubic kernel: R. Keys, "Cubic convolution interpolation
//! for digital image processing", 1981, with a = −0.75.

use thiserror::Error;

use super::lanczos;
use crate::tensor::HostTensor;
pub(super) use crate::tensor::resample::Grid;
use crate::tensor::resample::{Axis, Filter};

/// Largest number of elements a resize may produce: 2³¹ floats are 8 GiB.
const MAX_ELEMENTS: u64 = 1 << 31;

/// What can be wrong with a resize request.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ResampleError {
    /// The tensor does not have the number of dimensions the call works on.
    #[error("cannot resize a tensor of shape {got:?}: {want} dimensions are needed")]
    Rank {
        /// Shape of the tensor passed in.
        got: Vec<usize>,
        /// Number of dimensions the call works on.
        want: usize,
    },
    /// A side of the source or of the target is zero.
    #[error("cannot resize {from_width}x{from_height} to {to_width}x{to_height}: a side is zero")]
    Empty {
        /// Width of the source.
        from_width: usize,
        /// Height of the source.
        from_height: usize,
        /// Width asked for.
        to_width: usize,
        /// Height asked for.
        to_height: usize,
    },
    /// The result would be unreasonably large.
    #[error("a resize to {width}x{height} would make {elements} values; at most {MAX_ELEMENTS} are allowed")]
    TooLarge {
        /// Width asked for.
        width: usize,
        /// Height asked for.
        height: usize,
        /// Number of values the result would have.
        elements: u64,
    },
}

/// Interpolation method, by ComfyUI's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Source index `⌊dst · scale⌋`.
    Nearest,
    /// Source index `⌊(dst + ½) · scale⌋`.
    NearestExact,
    /// Two taps an axis.
    Bilinear,
    /// Four taps an axis; may overshoot the value range.
    Bicubic,
    /// As many taps as the scale asks for; PyTorch's `bicubic` with `antialias`.
    BicubicAntialias,
    /// Mean of all source pixels that an output pixel touches.
    Area,
    /// Spherical interpolation of the channel vectors, for latents.
    Bislerp,
    /// Pillow's 8-bit Lanczos, for pictures.
    Lanczos,
}

impl Method {
    /// The method of ComfyUI's name; `None` if there is none.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "nearest" => Self::Nearest,
            "nearest-exact" => Self::NearestExact,
            "bilinear" => Self::Bilinear,
            "bicubic" => Self::Bicubic,
            "area" => Self::Area,
            "bislerp" => Self::Bislerp,
            "lanczos" => Self::Lanczos,
            _ => return None,
        })
    }

    /// The same on feature maps, if devices have it.
    pub fn filter(self) -> Option<Filter> {
        match self {
            Self::Nearest => Some(Filter::Nearest),
            Self::NearestExact => Some(Filter::NearestExact),
            Self::Bilinear => Some(Filter::Bilinear),
            Self::Bicubic => Some(Filter::Bicubic),
            Self::Area => Some(Filter::Area),
            Self::Bislerp => Some(Filter::Bislerp),
            Self::BicubicAntialias | Self::Lanczos => None,
        }
    }
}

/// What happens when source and target have different aspect ratios.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crop {
    /// The picture is distorted.
    Disabled,
    /// The longer direction is cut at both ends first.
    Center,
}

impl Crop {
    /// The crop mode of ComfyUI's name; `None` if there is none.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "disabled" => Some(Self::Disabled),
            "center" => Some(Self::Center),
            _ => None,
        }
    }
}

/// Target of a resize.
#[derive(Clone, Copy, Debug)]
pub struct Resize {
    /// New width.
    pub width: usize,
    /// New height.
    pub height: usize,
    /// Interpolation method.
    pub method: Method,
    /// Treatment of a different aspect ratio.
    pub crop: Crop,
}

impl Resize {
    /// A resize without cropping.
    pub fn to(width: usize, height: usize, method: Method) -> Self {
        Self { width, height, method, crop: Crop::Disabled }
    }
}

/// Resizes the last two dimensions of a `[B, C, H, W]` tensor.
///
/// # Errors
/// [`ResampleError`] for another rank, an empty side or an absurd size.
pub fn upscale(x: &HostTensor, to: Resize) -> Result<HostTensor, ResampleError> {
    let [b, c, h, w] = dims::<4>(x)?;
    match to.method {
        Method::Bislerp | Method::Lanczos => {
            let nhwc = swap_inner(x.data(), b, c, h * w);
            let grid = Grid { outer: b, h, w, inner: c };
            let out = resize_grid(&nhwc, grid, to)?;
            let data = swap_inner(&out, b, to.height * to.width, c);
            Ok(tensor(&[b, c, to.height, to.width], data))
        }
        _ => {
            let grid = Grid { outer: b * c, h, w, inner: 1 };
            Ok(tensor(&[b, c, to.height, to.width], resize_grid(x.data(), grid, to)?))
        }
    }
}

/// Resizes the middle dimensions of a `[B, H, W, C]` tensor.
///
/// # Errors
/// As [`upscale`].
pub fn upscale_images(x: &HostTensor, to: Resize) -> Result<HostTensor, ResampleError> {
    let [b, h, w, c] = dims::<4>(x)?;
    let data = resize_grid(x.data(), Grid { outer: b, h, w, inner: c }, to)?;
    Ok(tensor(&[b, to.height, to.width, c], data))
}

/// Resizes the last two dimensions of a `[B, H, W]` tensor.
///
/// # Errors
/// As [`upscale`].
pub fn upscale_masks(x: &HostTensor, to: Resize) -> Result<HostTensor, ResampleError> {
    let [b, h, w] = dims::<3>(x)?;
    let data = resize_grid(x.data(), Grid { outer: b, h, w, inner: 1 }, to)?;
    Ok(tensor(&[b, to.height, to.width], data))
}

fn dims<const N: usize>(x: &HostTensor) -> Result<[usize; N], ResampleError> {
    x.shape().try_into().map_err(|_| ResampleError::Rank { got: x.shape().to_vec(), want: N })
}

fn tensor(shape: &[usize], data: Vec<f32>) -> HostTensor {
    HostTensor::new(shape, data).unwrap_or_default()
}

/// `[outer, a, b]` → `[outer, b, a]`.
fn swap_inner(x: &[f32], outer: usize, a: usize, b: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(x.len());
    for plane in x.chunks_exact((a * b).max(1)).take(outer) {
        for j in 0..b {
            out.extend(plane.iter().skip(j).step_by(b));
        }
    }
    out
}

fn resize_grid(x: &[f32], grid: Grid, to: Resize) -> Result<Vec<f32>, ResampleError> {
    if grid.h == 0 || grid.w == 0 || to.width == 0 || to.height == 0 {
        return Err(ResampleError::Empty {
            from_width: grid.w,
            from_height: grid.h,
            to_width: to.width,
            to_height: to.height,
        });
    }
    // The pass over x alone yields h · new width, which may be the larger one.
    let rows = to.height.max(grid.h) as u64;
    let elements = [to.width as u64, grid.inner as u64, grid.outer as u64]
        .iter()
        .fold(rows, |product, &n| product.saturating_mul(n));
    if elements > MAX_ELEMENTS {
        return Err(ResampleError::TooLarge { width: to.width, height: to.height, elements });
    }
    let (cropped, grid) = match to.crop {
        Crop::Disabled => (None, grid),
        Crop::Center => crop_center(x, grid, to.width, to.height),
    };
    let x = cropped.as_deref().unwrap_or(x);
    let size = [to.height, to.width];
    Ok(match (to.method.filter(), to.method) {
        (Some(filter), _) => Axis::resize(filter, x, grid, size),
        (None, Method::BicubicAntialias) => Axis::resize_antialiased(x, grid, size),
        (None, _) => lanczos::resize_f32(x, grid, to.width, to.height),
    })
}

/// Cuts the longer direction so that the aspect ratio becomes the target's.
fn crop_center(x: &[f32], grid: Grid, width: usize, height: usize) -> (Option<Vec<f32>>, Grid) {
    let (old_w, old_h) = (grid.w as f64, grid.h as f64);
    let old_aspect = old_w / old_h;
    let new_aspect = width as f64 / height as f64;
    let (mut cut_x, mut cut_y) = (0usize, 0usize);
    if old_aspect > new_aspect {
        cut_x = ((old_w - old_w * (new_aspect / old_aspect)) / 2.0).round_ties_even() as usize;
    } else if old_aspect < new_aspect {
        cut_y = ((old_h - old_h * (old_aspect / new_aspect)) / 2.0).round_ties_even() as usize;
    }
    // A very flat target would otherwise leave nothing to look at.
    cut_x = cut_x.min((grid.w - 1) / 2);
    cut_y = cut_y.min((grid.h - 1) / 2);
    if cut_x == 0 && cut_y == 0 {
        return (None, grid);
    }
    let new = Grid { h: grid.h - 2 * cut_y, w: grid.w - 2 * cut_x, ..grid };
    let mut out = Vec::with_capacity(new.outer * new.h * new.w * new.inner);
    for plane in x.chunks_exact(grid.h * grid.w * grid.inner) {
        for row in plane.chunks_exact(grid.w * grid.inner).skip(cut_y).take(new.h) {
            out.extend_from_slice(&row[cut_x * grid.inner..][..new.w * new.inner]);
        }
    }
    (Some(out), new)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ramp(shape: &[usize]) -> HostTensor {
        HostTensor::from_fn(shape, |i| i as f32)
    }

    fn row(method: Method, width: usize) -> Vec<f32> {
        upscale(&ramp(&[1, 1, 1, 4]), Resize::to(width, 1, method)).unwrap().into_data()
    }

    #[test]
    fn one_axis_against_hand_computed_values() {
        assert_eq!(row(Method::Nearest, 6), [0.0, 0.0, 1.0, 2.0, 2.0, 3.0]);
        assert_eq!(row(Method::NearestExact, 6), [0.0, 1.0, 1.0, 2.0, 3.0, 3.0]);
        assert_eq!(row(Method::Bilinear, 2), [0.5, 2.5]);
        assert_eq!(row(Method::Bilinear, 8), [0.0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.0]);
        assert_eq!(row(Method::Area, 2), [0.5, 2.5]);
        assert_eq!(row(Method::Area, 3), [0.5, 1.5, 2.5]);
        // Weights of Keys' kernel with a = −0.75 at t = ¼, by hand.
        let w = [-0.105_468_75, 0.878_906_25, 0.261_718_75, -0.035_156_25];
        let cubic = row(Method::Bicubic, 8);
        assert_eq!(cubic[3], w[1] + 2.0 * w[2] + 3.0 * w[3]);
        // Position −¼: t = ¾ reverses the weights; the taps are 0, 0, 0 and 1.
        assert_eq!(cubic[0], w[0]);
    }

    #[test]
    fn layouts_agree() {
        for method in [Method::NearestExact, Method::Bilinear, Method::Bicubic, Method::Area, Method::Bislerp]
        {
            let nchw = HostTensor::from_fn(&[2, 3, 5, 7], |i| ((i * 37) % 101) as f32 / 50.0 - 1.0);
            let nhwc = tensor(&[2, 5, 7, 3], swap_inner(nchw.data(), 2, 3, 35));
            let a = upscale(&nchw, Resize::to(4, 9, method)).unwrap();
            let b = upscale_images(&nhwc, Resize::to(4, 9, method)).unwrap();
            assert_eq!(swap_inner(a.data(), 2, 3, 36), b.data(), "{method:?}");
        }
    }

    #[test]
    fn same_size_is_identity() {
        let x = HostTensor::from_fn(&[2, 2, 3, 5], |i| (i as f32).sin());
        for method in [Method::Nearest, Method::NearestExact, Method::Bilinear, Method::Bicubic, Method::Area]
        {
            assert_eq!(upscale(&x, Resize::to(5, 3, method)).unwrap(), x, "{method:?}");
        }
    }

    #[test]
    fn center_crop_cuts_the_longer_side_only() {
        let x = ramp(&[1, 1, 2, 8]);
        let to = Resize { width: 2, height: 2, method: Method::Nearest, crop: Crop::Center };
        assert_eq!(upscale(&x, to).unwrap().into_data(), [3.0, 4.0, 11.0, 12.0]);
        let tall = ramp(&[1, 6, 2]);
        let out = upscale_masks(&tall, to).unwrap();
        assert_eq!(out.into_data(), [4.0, 5.0, 6.0, 7.0]);
    }

    #[test]
    fn absurd_requests_are_refused() {
        let x = ramp(&[1, 1, 2, 2]);
        let wide = upscale(&x, Resize::to(1 << 20, 1 << 20, Method::Bilinear));
        assert!(matches!(wide, Err(ResampleError::TooLarge { .. })));
        assert!(matches!(upscale(&x, Resize::to(0, 3, Method::Area)), Err(ResampleError::Empty { .. })));
        assert!(matches!(upscale_masks(&x, Resize::to(1, 3, Method::Area)), Err(ResampleError::Rank { .. })));
    }
}
