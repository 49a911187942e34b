//! Stored tensors: element type, shape and little-endian bytes, as a file holds them.
//!
//! A [`RawTensor`] borrows its bytes (usually from a memory map) and may start
//! at any address: safetensors aligns the data section to eight bytes but not
//! the tensors in it, so nothing here casts a byte slice to a wider type.
//! Conversions go through small aligned blocks on the stack instead, which the
//! compiler turns into the same vector loads.

use std::borrow::Cow;

use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use super::DType;

/// Elements converted as one piece of work; tensors up to this size stay on the calling thread.
const BLOCK: usize = 1 << 16;
/// Elements staged on the stack for the half-precision conversion instructions.
const STAGE: usize = 256;

/// A tensor as stored: raw little-endian bytes with their meaning.
#[derive(Clone, Debug)]
pub struct RawTensor<'a> {
    /// Element type of `bytes`.
    pub dtype: DType,
    /// Extents, outermost first; empty for a scalar.
    pub shape: &'a [usize],
    /// Elements, row-major, little-endian, at any alignment.
    pub bytes: Cow<'a, [u8]>,
}

impl RawTensor<'_> {
    /// Number of elements: the product of the extents (1 for a scalar).
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// Every element as f32, rounded to nearest where f32 cannot hold it.
    ///
    /// Converts as many elements as `bytes` holds in full; for tensors from a
    /// checked file that is [`numel`](Self::numel).
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0f32; self.bytes.len() / self.dtype.size()];
        self.to_f32_into(&mut out);
        out
    }

    /// The first `out.len()` elements as f32, into memory of the caller: for
    /// large tensors most of [`to_f32`](Self::to_f32)'s time goes into fresh pages.
    ///
    /// Places of `out` beyond the last element stay as they are. More than 65,536
    /// elements are converted on rayon's pool.
    pub fn to_f32_into(&self, out: &mut [f32]) {
        let size = self.dtype.size();
        if out.len() <= BLOCK {
            convert(self.dtype, &self.bytes, out);
        } else {
            out.par_chunks_mut(BLOCK)
                .zip(self.bytes.par_chunks(BLOCK * size))
                .for_each(|(out, bytes)| convert(self.dtype, bytes, out));
        }
    }
}

/// Converts elements of `bytes` until one side is at its end.
fn convert(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        DType::F32 => each(bytes, out, f32::from_le_bytes),
        DType::F16 => convert_f16(bytes, out),
        // A bf16 is the upper half of an f32: a shift is the whole conversion.
        DType::BF16 => each(bytes, out, |b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16)),
        DType::F64 => each(bytes, out, |b| f64::from_le_bytes(b) as f32),
        DType::F8E4M3 => each(bytes, out, |[b]: [u8; 1]| F8E4M3_VALUES[usize::from(b)]),
        // An E5M2 is the upper half of an f16.
        DType::F8E5M2 => each(bytes, out, |[b]: [u8; 1]| f16::from_bits(u16::from(b) << 8).to_f32()),
        DType::I8 => each(bytes, out, |b| f32::from(i8::from_le_bytes(b))),
        DType::U8 => each(bytes, out, |b| f32::from(u8::from_le_bytes(b))),
        DType::I16 => each(bytes, out, |b| f32::from(i16::from_le_bytes(b))),
        DType::U16 => each(bytes, out, |b| f32::from(u16::from_le_bytes(b))),
        DType::I32 => each(bytes, out, |b| i32::from_le_bytes(b) as f32),
        DType::U32 => each(bytes, out, |b| u32::from_le_bytes(b) as f32),
        DType::I64 => each(bytes, out, |b| i64::from_le_bytes(b) as f32),
        DType::U64 => each(bytes, out, |b| u64::from_le_bytes(b) as f32),
        DType::Bool => each(bytes, out, |[b]: [u8; 1]| f32::from(u8::from(b != 0))),
    }
}

/// `f` of every `N`-byte element.
fn each<const N: usize>(bytes: &[u8], out: &mut [f32], f: impl Fn([u8; N]) -> f32) {
    let (elements, _) = bytes.as_chunks::<N>();
    for (o, &b) in out.iter_mut().zip(elements) {
        *o = f(b);
    }
}

/// f16 through an aligned stage, so that the processor's own conversion instruction is used.
fn convert_f16(bytes: &[u8], out: &mut [f32]) {
    let mut stage = [f16::ZERO; STAGE];
    let (elements, _) = bytes.as_chunks::<2>();
    for (out, elements) in out.chunks_mut(STAGE).zip(elements.chunks(STAGE)) {
        for (s, &b) in stage.iter_mut().zip(elements) {
            *s = f16::from_le_bytes(b);
        }
        let count = out.len().min(elements.len());
        stage[..count].convert_to_f32_slice(&mut out[..count]);
    }
}

/// The 256 values of OCP `E4M3FN`: bias 7, no infinity, NaN only where all seven low bits are set.
static F8E4M3_VALUES: [f32; 256] = {
    let mut values = [0.0; 256];
    let mut i = 0;
    while i < 256 {
        values[i] = f8_e4m3(i as u8);
        i += 1;
    }
    values
};

const fn f8_e4m3(byte: u8) -> f32 {
    let exponent = ((byte >> 3) & 15) as u32;
    let mantissa = (byte & 7) as u32;
    let magnitude = match (exponent, mantissa) {
        (15, 7) => f32::NAN,
        // Subnormal: mantissa / 8 * 2^-6.
        (0, m) => m as f32 / 512.0,
        (e, m) => f32::from_bits((e + 120) << 23 | m << 20),
    };
    if byte & 0x80 == 0 { magnitude } else { -magnitude }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(dtype: DType, shape: &[usize], bytes: &[u8]) -> Vec<f32> {
        RawTensor { dtype, shape, bytes: Cow::Borrowed(bytes) }.to_f32()
    }

    #[test]
    fn every_element_type_widens_to_its_value() {
        let cases: &[(DType, &[u8], &[f32])] = &[
            (DType::F32, &[0, 0, 0x80, 0x3f, 0, 0, 0x20, 0xc1], &[1.0, -10.0]),
            (DType::F16, &[0x00, 0x3c, 0x01, 0x00, 0xff, 0x7b], &[1.0, 5.960_464_5e-8, 65504.0]),
            (DType::BF16, &[0x80, 0x3f, 0x49, 0x40], &[1.0, 3.140_625]),
            (DType::F64, &0.1f64.to_le_bytes(), &[0.1]),
            (
                DType::F8E4M3,
                &[0x38, 0x7e, 0x01, 0x08, 0xb8, 0x00],
                &[1.0, 448.0, 0.001_953_125, 0.015_625, -1.0, 0.0],
            ),
            (
                DType::F8E5M2,
                &[0x3c, 0x7b, 0x01, 0xbc, 0x7c],
                &[1.0, 57344.0, 1.525_878_9e-5, -1.0, f32::INFINITY],
            ),
            (DType::I8, &[0x80, 0x7f], &[-128.0, 127.0]),
            (DType::U8, &[0x80, 0xff], &[128.0, 255.0]),
            (DType::I16, &[0x00, 0x80], &[-32768.0]),
            (DType::U16, &[0xff, 0xff], &[65535.0]),
            (DType::I32, &(-7i32).to_le_bytes(), &[-7.0]),
            (DType::U32, &u32::MAX.to_le_bytes(), &[4_294_967_296.0]),
            (DType::I64, &(-(1i64 << 40)).to_le_bytes(), &[-1_099_511_627_776.0]),
            (DType::U64, &u64::MAX.to_le_bytes(), &[18_446_744_073_709_551_616.0]),
            (DType::Bool, &[0, 1, 2], &[0.0, 1.0, 1.0]),
        ];
        for &(dtype, bytes, expected) in cases {
            assert_eq!(raw(dtype, &[expected.len()], bytes), expected, "{dtype:?}");
        }
        assert!(raw(DType::F8E4M3, &[2], &[0x7f, 0xff]).iter().all(|v| v.is_nan()));
    }

    #[test]
    fn f8_agrees_with_the_formula_of_the_specification() {
        for byte in 0..=255u8 {
            let (e, m) = (i32::from(byte >> 3 & 15), f64::from(byte & 7));
            let magnitude = if e == 0 { m / 8.0 * 2f64.powi(-6) } else { (1.0 + m / 8.0) * 2f64.powi(e - 7) };
            let expected = if byte & 0x80 == 0 { magnitude } else { -magnitude };
            if byte & 0x7f != 0x7f {
                assert_eq!(f64::from(F8E4M3_VALUES[usize::from(byte)]), expected, "{byte:#04x}");
            }
        }
    }

    #[test]
    fn unaligned_and_large_tensors_convert_like_small_ones() {
        let count = BLOCK * 2 + 77;
        let values: Vec<f16> = (0..count).map(|i| f16::from_f32((i as f32 * 0.37).sin())).collect();
        let mut bytes = vec![0u8];
        bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
        let got = raw(DType::F16, &[count], &bytes[1..]);
        assert_eq!(got.len(), count);
        assert!(got.iter().zip(&values).all(|(g, v)| *g == v.to_f32()));
    }

    #[test]
    fn memory_of_the_caller_is_filled_as_far_as_elements_go() {
        for dtype in [DType::F16, DType::F32, DType::U8] {
            let raw = RawTensor { dtype, shape: &[3], bytes: Cow::Owned(vec![0; 3 * dtype.size()]) };
            let mut out = [9.0; 5];
            raw.to_f32_into(&mut out);
            assert_eq!(out, [0.0, 0.0, 0.0, 9.0, 9.0], "{dtype:?}");
            let mut out = [9.0; 2];
            raw.to_f32_into(&mut out);
            assert_eq!(out, [0.0, 0.0], "{dtype:?}");
        }
    }

    #[test]
    fn scalars_have_one_element_and_empty_tensors_none() {
        let one = RawTensor { dtype: DType::F32, shape: &[], bytes: Cow::Owned(vec![0; 4]) };
        assert_eq!((one.numel(), one.to_f32().len()), (1, 1));
        let none = RawTensor { dtype: DType::F32, shape: &[3, 0], bytes: Cow::Owned(vec![]) };
        assert_eq!((none.numel(), none.to_f32().len()), (0, 0));
    }
}
