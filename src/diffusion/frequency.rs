//! Scaling of a latent's frequency bands.

use crate::tensor::HostTensor;

/// Multiplies the spatial frequencies of every `[h, w]` plane of `x`: those in the
/// square of half side `cutoff` around zero by `low`, the others by `high`.
///
/// With zero shifted to the centre `(h/2, w/2)`, the square covers rows
/// `h/2 − cutoff .. h/2 + cutoff`, hence one more negative frequency; the cutoff is
/// at most half a side. A plain separable transform: latents are small, and this
/// runs once a step.
pub(super) fn scale_bands(x: &HostTensor, low: f32, high: f32, cutoff: usize) -> HostTensor {
    let (h, w) = (x.dim(2), x.dim(3));
    // The low band is separable, so the result is high·x + (low − high)·band(x).
    let rows = band_kernel(h, cutoff);
    let columns = band_kernel(w, cutoff);
    let mut out = Vec::with_capacity(x.len());
    for plane in x.data().chunks_exact((h * w).max(1)) {
        let (re, im) = apply(plane, &columns, h, w);
        for y in 0..h {
            for i in 0..w {
                let band: f64 = (0..h)
                    .map(|k| {
                        let (cos, sin) = rows[(y + h - k) % h];
                        cos * re[k * w + i] - sin * im[k * w + i]
                    })
                    .sum();
                out.push(high * plane[y * w + i] + (low - high) * band as f32);
            }
        }
    }
    HostTensor::new(x.shape(), out).unwrap_or_default()
}

/// The circular convolution kernel of the band: `(1/n) Σ_f exp(2πi·f·d/n)` over
/// the frequencies kept, as real and imaginary part by distance `d`.
fn band_kernel(n: usize, cutoff: usize) -> Vec<(f64, f64)> {
    let centre = n / 2;
    let cutoff = cutoff.min(centre);
    let kept = centre - cutoff..centre + cutoff;
    (0..n)
        .map(|d| {
            let terms = kept.clone().map(|place| {
                let f = place as f64 - centre as f64;
                let angle = std::f64::consts::TAU * f * d as f64 / n as f64;
                (angle.cos(), angle.sin())
            });
            let (cos, sin) = terms.fold((0.0, 0.0), |(a, b), (c, s)| (a + c, b + s));
            (cos / n as f64, sin / n as f64)
        })
        .collect()
}

/// Convolves every row of a plane with a complex kernel.
fn apply(plane: &[f32], kernel: &[(f64, f64)], h: usize, w: usize) -> (Vec<f64>, Vec<f64>) {
    let mut re = vec![0.0; h * w];
    let mut im = vec![0.0; h * w];
    for y in 0..h {
        let row = &plane[y * w..(y + 1) * w];
        for i in 0..w {
            for (k, value) in row.iter().enumerate() {
                let (cos, sin) = kernel[(i + w - k) % w];
                re[y * w + i] += cos * f64::from(*value);
                im[y * w + i] += sin * f64::from(*value);
            }
        }
    }
    (re, im)
}

#[cfg(test)]
mod tests {
    use super::scale_bands;
    use crate::tensor::HostTensor;

    /// A constant plane is all low frequency.
    #[test]
    fn constant_is_low() {
        let x = HostTensor::full(&[1, 1, 4, 6], 2.0);
        let y = scale_bands(&x, 1.5, 9.0, 1);
        for v in y.data() {
            assert!((v - 3.0).abs() < 1e-5, "{v}");
        }
    }

    /// A cutoff past the side leaves no high frequency on an even side.
    #[test]
    fn wide_band_is_everything() {
        let x = HostTensor::from_fn(&[1, 2, 8, 6], |i| (i * i % 17) as f32 - 8.0);
        let y = scale_bands(&x, 0.5, 9.0, 7);
        for (x, y) in x.data().iter().zip(y.data()) {
            assert!((y - 0.5 * x).abs() < 1e-5, "{y} {x}");
        }
    }
}
