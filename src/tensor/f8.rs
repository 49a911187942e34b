//! Rounding to 8-bit floats (OCP `E4M3FN` and `E5M2`), to nearest, ties to even.
//!
//! Beyond the largest value `E4M3` gives NaN and `E5M2` infinity: nothing saturates, as in PyTorch.

use std::borrow::Cow;

use super::{DType, RawTensor};

/// One of the two formats.
#[derive(Clone, Copy)]
struct Format {
    mantissa_bits: i32,
    bias: i32,
    max: f64,
    overflow: u8,
}

const E4M3: Format = Format { mantissa_bits: 3, bias: 7, max: 448.0, overflow: 0x7f };
const E5M2: Format = Format { mantissa_bits: 2, bias: 15, max: 57344.0, overflow: 0x7c };
/// Not a number in both.
const NAN: u8 = 0x7f;

impl Format {
    fn encode(self, value: f32) -> u8 {
        let sign = if value.is_sign_negative() { 0x80 } else { 0 };
        let size = f64::from(value.abs());
        if size.is_nan() {
            return sign | NAN;
        }
        let lowest = 1 - self.bias;
        // f32 subnormals lie far below both formats' smallest step.
        let exponent = if size > 0.0 { (size.to_bits() >> 52) as i32 - 1023 } else { lowest };
        let exponent = exponent.max(lowest);
        let step = 2f64.powi(exponent - self.mantissa_bits);
        let steps = (size / step).round_ties_even();
        if steps * step > self.max {
            return sign | self.overflow;
        }
        // A full count of steps carries into the exponent by itself.
        let hidden = 1 << self.mantissa_bits;
        let field = (exponent - lowest) * hidden + steps as i32;
        sign | field as u8
    }
}

impl RawTensor<'_> {
    /// The tensor rounded to `F8E4M3` or `F8E5M2`; as it is for any other type.
    pub fn rounded_to(self, dtype: DType) -> Self {
        let format = match dtype {
            DType::F8E4M3 => E4M3,
            DType::F8E5M2 => E5M2,
            _ => return self,
        };
        if self.dtype == dtype {
            return self;
        }
        let bytes = self.to_f32().into_iter().map(|v| format.encode(v)).collect();
        Self { dtype, shape: self.shape, bytes: Cow::Owned(bytes) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(dtype: DType, bytes: Vec<u8>) -> Vec<f32> {
        RawTensor { dtype, shape: &[bytes.len()], bytes: Cow::Owned(bytes) }.to_f32()
    }

    /// Every value of the format is itself, and what lies between two goes to the nearer, ties to even.
    #[test]
    fn rounding_is_to_the_nearest_value() {
        for (dtype, format, last) in [(DType::F8E4M3, E4M3, 0x7eu8), (DType::F8E5M2, E5M2, 0x7b)] {
            let values = decoded(dtype, (0..=last).collect());
            for (i, pair) in values.windows(2).enumerate() {
                let (low, high) = (pair[0], pair[1]);
                let (low_code, high_code) = (i as u8, i as u8 + 1);
                let middle = ((f64::from(low) + f64::from(high)) / 2.0) as f32;
                let even = if low_code.is_multiple_of(2) { low_code } else { high_code };
                assert_eq!(format.encode(low), low_code);
                assert_eq!(format.encode(-low), low_code | 0x80);
                assert_eq!(format.encode(middle), even, "{low} {high}");
                assert_eq!(format.encode(middle.next_down()), low_code, "{low} {high}");
                assert_eq!(format.encode(middle.next_up()), high_code, "{low} {high}");
            }
            assert_eq!(format.encode(format.max as f32), last);
            assert_eq!(format.encode(f32::INFINITY), format.overflow);
            assert_eq!(format.encode(f32::NAN) & 0x7f, 0x7f);
            assert_eq!(format.encode(1e-30), 0);
        }
        // Halfway beyond the largest value: 464 is a tie with the even 448, 465 is NaN.
        assert_eq!((E4M3.encode(464.0), E4M3.encode(465.0)), (0x7e, 0x7f));
        assert_eq!((E5M2.encode(61439.0), E5M2.encode(61440.0)), (0x7b, 0x7c));
    }

    #[test]
    fn a_tensor_is_rounded_as_a_whole() {
        let bytes: Vec<u8> = [1.0f32, 0.3, -500.0].iter().flat_map(|v| v.to_le_bytes()).collect();
        let raw = RawTensor { dtype: DType::F32, shape: &[3], bytes: Cow::Owned(bytes) };
        let rounded = raw.clone().rounded_to(DType::F8E4M3);
        let values = rounded.to_f32();
        assert_eq!((rounded.dtype, values[0], values[1]), (DType::F8E4M3, 1.0, 0.3125));
        assert!(values[2].is_nan());
        assert_eq!(raw.clone().rounded_to(DType::F8E5M2).to_f32(), [1.0, 0.3125, -512.0]);
        assert_eq!(raw.rounded_to(DType::F16).dtype, DType::F32);
    }
}
