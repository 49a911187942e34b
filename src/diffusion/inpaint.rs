//! Inpainting: masks in latent cells, and the model wrapper that keeps what is
//! outside the mask.

use super::schedule::ModelSampling;
use super::{DiffusionError, Field};
use crate::tensor::HostTensor;

/// Resizes every `[h, w]` plane of `mask` bilinearly (half-pixel centres, edges
/// repeated, no antialiasing) to `size` (height, width). The result is `[B, h, w]`
/// with all leading dimensions merged.
pub fn resize_mask(mask: &HostTensor, size: (usize, usize)) -> HostTensor {
    let rank = mask.shape().len();
    let (h, w) = (mask.dim(rank.saturating_sub(2)), mask.dim(rank.saturating_sub(1)));
    let planes = mask.len().checked_div(h * w).unwrap_or(0);
    if (h, w) == size {
        return mask.clone().reshape(&[planes, h, w]).unwrap_or_default();
    }
    let (rows, columns) = (taps(h, size.0), taps(w, size.1));
    let mut out = Vec::with_capacity(planes * size.0 * size.1);
    for plane in mask.data().chunks_exact((h * w).max(1)) {
        for &(y0, y1, fy) in &rows {
            for &(x0, x1, fx) in &columns {
                let top = plane[y0 * w + x0] * (1.0 - fx) + plane[y0 * w + x1] * fx;
                let bottom = plane[y1 * w + x0] * (1.0 - fx) + plane[y1 * w + x1] * fx;
                out.push(top * (1.0 - fy) + bottom * fy);
            }
        }
    }
    HostTensor::new(&[planes, size.0, size.1], out).unwrap_or_default()
}

/// For every output place the two input places and the second one's weight.
fn taps(from: usize, to: usize) -> Vec<(usize, usize, f32)> {
    let scale = from as f32 / to as f32;
    (0..to)
        .map(|i| {
            let place = ((i as f32 + 0.5) * scale - 0.5).max(0.0);
            let first = (place as usize).min(from - 1);
            (first, (first + 1).min(from - 1), place - first as f32)
        })
        .collect()
}

/// A noise mask at the size of a latent `[B, C, h, w]`: resized, not rounded,
/// samples repeated in turn, the same for all channels unless it has them all.
pub fn prepare_mask(mask: &HostTensor, shape: &[usize]) -> Result<HostTensor, DiffusionError> {
    let &[batch, channels, h, w] = shape else {
        let want = vec![0, 0, 0, 0];
        return Err(DiffusionError::Shape { what: "latent under a noise mask", got: shape.to_vec(), want });
    };
    let resized = resize_mask(mask, (h, w));
    // A four-dimensional mask may carry one plane a channel.
    let per_sample = match mask.shape() {
        [_, c, _, _] if *c == channels => channels,
        _ => 1,
    };
    let samples = resized.dim(0) / per_sample;
    if samples == 0 {
        return Err(DiffusionError::Empty { what: "noise mask", hint: "attach a mask with pixels" });
    }
    let mut out = Vec::with_capacity(batch * channels * h * w);
    for b in 0..batch {
        for c in 0..channels {
            let plane = (b % samples) * per_sample + c.min(per_sample - 1);
            out.extend_from_slice(resized.row(plane));
        }
    }
    HostTensor::new(shape, out).ok_or_else(|| DiffusionError::Shape {
        what: "noise mask",
        got: mask.shape().to_vec(),
        want: shape.to_vec(),
    })
}

/// The kept part of an inpainted latent. All fields are where the sampler works.
pub struct Inpaint {
    /// 1 where the sampler works, 0 where the original stays; shaped like the latent, or one channel for all.
    pub mask: Field,
    /// The original in the model's scale.
    pub original: Field,
    /// The noise that the original is noised with.
    pub noise: Field,
}

impl Inpaint {
    /// The model's input: outside the mask the original, noised to `sigma`.
    ///
    /// # Errors
    /// What the device reports.
    pub fn before(
        &self,
        x: &Field,
        mask: &Field,
        sigma: f32,
        sampling: &ModelSampling,
    ) -> Result<Field, DiffusionError> {
        let noised = match (&self.noise, &self.original) {
            (Field::Host(noise), Field::Host(original)) => {
                sampling.noise_scaling(sigma, noise, original, false).into()
            }
            (noise, original) => {
                let (of_noise, of_original) = sampling.noise_factors(sigma);
                Field::lincomb(&[(of_noise.into(), noise), (of_original.into(), original)])?
            }
        };
        x.blended(&noised, mask)
    }

    /// The prediction: outside the mask the original.
    ///
    /// # Errors
    /// What the device reports.
    pub fn after(&self, denoised: &Field, mask: &Field) -> Result<Field, DiffusionError> {
        denoised.blended(&self.original, mask)
    }
}

/// The one plane of a mask whose channels are all alike, as `[B, 1, h, w]`; the mask as it is otherwise.
pub(super) fn one_channel(mask: &HostTensor) -> HostTensor {
    let (channels, h, w) = (mask.dim(1).max(1), mask.dim(2), mask.dim(3));
    let planes = || (0..mask.dim(0)).map(|i| mask.row(i).chunks_exact((h * w).max(1)));
    let is_alike = planes().all(|mut planes| {
        let first = planes.next();
        planes.all(|plane| Some(plane) == first)
    });
    if !is_alike || channels == 1 {
        return mask.clone();
    }
    let data = planes().flat_map(|mut planes| planes.next().into_iter().flatten().copied());
    HostTensor::new(&[mask.dim(0), 1, h, w], data.collect()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::{one_channel, resize_mask};
    use crate::tensor::HostTensor;

    #[test]
    fn alike_channels_are_one() {
        let alike = HostTensor::from_fn(&[2, 3, 1, 2], |i| (i / 6 * 2 + i % 2) as f32);
        let one = one_channel(&alike);
        assert_eq!((one.shape(), one.data()), (&[2, 1, 1, 2][..], &[0.0, 1.0, 2.0, 3.0][..]));
        let other = HostTensor::from_fn(&[1, 2, 1, 2], |i| i as f32);
        assert_eq!(one_channel(&other), other);
    }

    /// Halving with half-pixel centres takes the mean of two neighbours.
    #[test]
    fn halving_is_the_mean() {
        let mask = HostTensor::from_fn(&[1, 1, 4], |i| i as f32);
        assert_eq!(resize_mask(&mask, (1, 2)).data(), [0.5, 2.5]);
        assert_eq!(resize_mask(&mask, (1, 8)).data(), [0.0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.0]);
    }
}
