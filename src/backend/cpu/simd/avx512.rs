//! AVX-512 leaf: 16 lanes, 32 registers, so a tile of 14 rows × 2 vectors.

use std::arch::x86_64::*;

use super::{Block, Kernel, Simd};

/// AVX-512 F, BW, DQ, VL.
#[derive(Clone, Copy)]
pub struct Avx512;

/// Runs `kernel` compiled for AVX-512.
///
/// # Safety
/// The CPU must have the features named here.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub unsafe fn launch<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: the caller vouches for the instruction set.
    unsafe { kernel.run::<Avx512>() }
}

#[inline(always)]
fn mask(n: usize) -> __mmask16 {
    ((1u32 << n) - 1) as __mmask16
}

// SAFETY: every function forwards to intrinsics of the features that `launch`
// enables; pointer validity is the caller's part of the contract.
#[allow(clippy::undocumented_unsafe_blocks)]
unsafe impl Simd for Avx512 {
    const LANES: usize = 16;
    const ROWS: usize = 14;
    type V = __m512;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn load_part(p: *const f32, n: usize) -> __m512 {
        unsafe { _mm512_maskz_loadu_ps(mask(n), p) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: __m512) {
        unsafe { _mm512_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn stream(p: *mut f32, v: __m512) {
        unsafe {
            if (p as usize).is_multiple_of(64) {
                _mm512_stream_ps(p, v);
            } else {
                _mm512_storeu_ps(p, v);
            }
        }
    }
    #[inline(always)]
    unsafe fn fence() {
        unsafe { _mm_sfence() }
    }
    #[inline(always)]
    unsafe fn store_part(p: *mut f32, n: usize, v: __m512) {
        unsafe { _mm512_mask_storeu_ps(p, mask(n), v) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> __m512 {
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    unsafe fn store_bf16(p: *mut u16, v: __m512) {
        unsafe {
            let bits = _mm512_castps_si512(v);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
            let kept = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0_0000));
            let half = _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(kept));
            _mm256_storeu_si256(p.cast(), half);
        }
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn div(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn recip(a: __m512) -> __m512 {
        // Division takes 16 cycles a vector; an estimate of 14 bits and one
        // Newton step take 2.
        unsafe {
            let r = _mm512_rcp14_ps(a);
            _mm512_fmadd_ps(_mm512_fnmadd_ps(a, r, _mm512_set1_ps(1.0)), r, r)
        }
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn min(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn abs(a: __m512) -> __m512 {
        unsafe { _mm512_abs_ps(a) }
    }
    #[inline(always)]
    unsafe fn any_less(a: __m512, b: __m512) -> bool {
        unsafe { _mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b) != 0 }
    }
    #[inline(always)]
    unsafe fn scale_by_power(v: __m512, magic: __m512) -> __m512 {
        unsafe {
            let n = _mm512_slli_epi32::<23>(_mm512_castps_si512(magic));
            _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(v), n))
        }
    }
    #[inline(always)]
    unsafe fn sum(v: __m512) -> f32 {
        unsafe { _mm512_reduce_add_ps(v) }
    }
    #[inline(always)]
    unsafe fn transpose(b: Block) {
        unsafe {
            let m = mask(b.columns);
            let factor = _mm512_set1_ps(b.factor);
            let mut r = [_mm512_setzero_ps(); 16];
            for (i, r) in r.iter_mut().enumerate() {
                if i < b.rows {
                    *r = _mm512_mul_ps(_mm512_maskz_loadu_ps(m, b.from.add(i * b.stride)), factor);
                }
            }
            let mut s = r;
            // 1 → 2 → 4 consecutive rows in a 128-bit quarter …
            for i in (0..16).step_by(2) {
                s[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
                s[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
            }
            for i in (0..16).step_by(4) {
                let pd = |i: usize| _mm512_castps_pd(s[i]);
                r[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(pd(i), pd(i + 2)));
                r[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pd(i), pd(i + 2)));
                r[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(pd(i + 1), pd(i + 3)));
                r[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(pd(i + 1), pd(i + 3)));
            }
            // … then the quarters of four such groups change places.
            for i in 0..4 {
                let low = _mm512_shuffle_f32x4::<0x88>(r[i], r[i + 4]);
                let high = _mm512_shuffle_f32x4::<0xdd>(r[i], r[i + 4]);
                let low2 = _mm512_shuffle_f32x4::<0x88>(r[i + 8], r[i + 12]);
                let high2 = _mm512_shuffle_f32x4::<0xdd>(r[i + 8], r[i + 12]);
                s[i] = _mm512_shuffle_f32x4::<0x88>(low, low2);
                s[i + 8] = _mm512_shuffle_f32x4::<0xdd>(low, low2);
                s[i + 4] = _mm512_shuffle_f32x4::<0x88>(high, high2);
                s[i + 12] = _mm512_shuffle_f32x4::<0xdd>(high, high2);
            }
            for (i, s) in s.iter().enumerate() {
                if i < b.columns {
                    _mm512_storeu_ps(b.to.add(i * b.to_stride), *s);
                }
            }
        }
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }
}
