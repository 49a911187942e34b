//! Pixels to channels and back, on the host: pictures enter and leave the device here anyway.

use crate::tensor::HostTensor;

/// `[B, C, H, W]` to `[B, C·s², H/s, W/s]`; sides are multiples of `s`.
pub(in crate::models) fn unshuffle(x: &HostTensor, s: usize) -> HostTensor {
    let (b, c, h, w) = (x.dim(0), x.dim(1), x.dim(2) / s, x.dim(3) / s);
    HostTensor::from_fn(&[b, c * s * s, h, w], |i| {
        let (n, channel, y, k) = (i / (c * s * s * h * w), i / (h * w) % (c * s * s), i / w % h, i % w);
        let (ch, dy, dx) = (channel / (s * s), channel / s % s, channel % s);
        x.data()[((n * c + ch) * h * s + y * s + dy) * w * s + k * s + dx]
    })
}

/// `[B, C·s², H, W]` to `[B, C, H·s, W·s]`.
pub(super) fn shuffle(x: &HostTensor, s: usize) -> HostTensor {
    let (b, c, h, w) = (x.dim(0), x.dim(1) / (s * s), x.dim(2), x.dim(3));
    HostTensor::from_fn(&[b, c, h * s, w * s], |i| {
        let (n, ch, y, k) =
            (i / (c * h * s * w * s), i / (h * s * w * s) % c, i / (w * s) % (h * s), i % (w * s));
        let channel = ch * s * s + (y % s) * s + k % s;
        x.data()[((n * c * s * s + channel) * h + y / s) * w + k / s]
    })
}

/// Grows both sides to multiples of `unit` at the bottom and right: mirrored, then repeated if the picture is smaller
/// than what is missing.
pub(super) fn padded(x: &HostTensor, unit: usize) -> HostTensor {
    let (b, c, h, w) = (x.dim(0), x.dim(1), x.dim(2), x.dim(3));
    let (ph, pw) = (h.next_multiple_of(unit), w.next_multiple_of(unit));
    if (ph, pw) == (h, w) {
        return x.clone();
    }
    let from = |i: usize, n: usize| if i < n { i } else { (2 * (n - 1)).saturating_sub(i.min(2 * (n - 1))) };
    HostTensor::from_fn(&[b, c, ph, pw], |i| {
        let (plane, y, k) = (i / (ph * pw), i / pw % ph, i % pw);
        x.data()[(plane * h + from(y, h)) * w + from(k, w)]
    })
}

/// The top left `h`×`w` pixels.
pub(super) fn cropped(x: &HostTensor, h: usize, w: usize) -> HostTensor {
    let (b, c, xh, xw) = (x.dim(0), x.dim(1), x.dim(2), x.dim(3));
    if (xh, xw) == (h, w) {
        return x.clone();
    }
    HostTensor::from_fn(&[b, c, h, w], |i| {
        let (plane, y, k) = (i / (h * w), i / w % h, i % w);
        x.data()[(plane * xh + y) * xw + k]
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shuffle_undoes_unshuffle() {
        let x = HostTensor::from_fn(&[2, 3, 4, 6], |i| i as f32);
        let packed = unshuffle(&x, 2);
        assert_eq!(packed.shape(), [2, 12, 2, 3]);
        // Channel 1 of the first colour is the pixel to the right.
        assert_eq!(packed.data()[6], 1.0);
        assert_eq!(shuffle(&packed, 2), x);
    }

    #[test]
    fn padding_mirrors_and_then_repeats() {
        let x = HostTensor::from_fn(&[1, 1, 1, 3], |i| i as f32);
        let y = padded(&x, 4);
        assert_eq!(y.shape(), [1, 1, 4, 4]);
        assert_eq!(&y.data()[..4], &[0.0, 1.0, 2.0, 1.0]);
        assert_eq!(cropped(&y, 1, 3), x);
    }
}
