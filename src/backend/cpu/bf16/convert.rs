//! Rounding of weights and activations to bf16 (nearest, ties to even).

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// Rounds f32 values.
pub(super) fn f32_to_bf16(from: &[f32], to: &mut [bf16]) {
    #[cfg(target_arch = "x86_64")]
    if super::Tier::Avx512Bf16.is_available() {
        // SAFETY: the tier is available.
        return unsafe { super::avx512::f32_to_bf16(from, to) };
    }
    for (to, from) in to.iter_mut().zip(from) {
        *to = bf16::from_f32(*from);
    }
}

/// Rounds f16 values.
pub(super) fn f16_to_bf16(from: &[f16], to: &mut [bf16]) {
    const CHUNK: usize = 256;
    let mut wide = [0f32; CHUNK];
    for (to, from) in to.chunks_mut(CHUNK).zip(from.chunks(CHUNK)) {
        let wide = &mut wide[..from.len()];
        from.convert_to_f32_slice(wide);
        f32_to_bf16(wide, to);
    }
}
