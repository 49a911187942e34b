//! AVX-512 leaf: block product with `vdpbf16ps`, rounding, the peak probe.

use super::block::{BlockArgs, TILE, TILE_BYTES};
use half::bf16;
use std::arch::x86_64::*;

/// Rounds f32 values to bf16.
///
/// # Safety
///
/// The CPU has AVX-512 with BW, VL and BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) unsafe fn f32_to_bf16(from: &[f32], to: &mut [bf16]) {
    for (from, to) in from.chunks(16).zip(to.chunks_mut(16)) {
        let count = from.len().min(to.len());
        let mask = ((1u32 << count) - 1) as __mmask16;
        // SAFETY: only the masked values, inside both slices, are touched.
        unsafe {
            let rounded = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, from.as_ptr()));
            _mm256_mask_storeu_epi16(
                to.as_mut_ptr().cast(),
                mask,
                std::mem::transmute::<__m256bh, __m256i>(rounded),
            );
        }
    }
}

/// [`multiply_block`](super::block::multiply_block) with `vdpbf16ps`: eight
/// rows × two column tiles of accumulators, 4 uses a loaded B vector pair.
///
/// # Safety
///
/// As there.
pub(super) unsafe fn block(args: &BlockArgs) {
    for rows in 0..2 * args.row_tiles {
        // SAFETY: passed on from the caller.
        unsafe {
            if args.column_tiles == 2 {
                strip::<2>(args, 8 * rows);
            } else {
                strip::<1>(args, 8 * rows);
            }
        }
    }
}

/// Eight rows of the block.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn strip<const COLUMN_TILES: usize>(args: &BlockArgs, row: usize) {
    const ROWS: usize = 8;
    // SAFETY: the caller vouches for every address the arguments describe.
    unsafe {
        let a = args.a[row / TILE].add(row % TILE * args.row_stride);
        let c = args.c.cast::<u8>().add(row * args.c_stride);
        let mut sums = [[_mm512_setzero_ps(); COLUMN_TILES]; ROWS];
        if args.accumulate != 0 {
            for (i, row) in sums.iter_mut().enumerate() {
                for (j, sum) in row.iter_mut().enumerate() {
                    *sum = _mm512_loadu_ps(c.add(i * args.c_stride).cast::<f32>().add(TILE * j));
                }
            }
        }
        let mut b = args.b;
        for step in 0..args.k_steps {
            let a = a.add(*args.k_offsets.add(step) as usize);
            for pair in 0..16 {
                let mut columns = [_mm512_setzero_si512(); COLUMN_TILES];
                for (j, column) in columns.iter_mut().enumerate() {
                    *column = _mm512_loadu_si512(b.add(j * TILE_BYTES + pair * 64).cast());
                }
                for (i, row) in sums.iter_mut().enumerate() {
                    let value = a.add(i * args.row_stride + 4 * pair).cast::<i32>().read_unaligned();
                    let value = as_pairs(_mm512_set1_epi32(value));
                    for (sum, column) in row.iter_mut().zip(columns) {
                        *sum = _mm512_dpbf16_ps(*sum, value, as_pairs(column));
                    }
                }
            }
            b = b.add(COLUMN_TILES * TILE_BYTES);
        }
        for (i, row) in sums.iter().enumerate() {
            for (j, sum) in row.iter().enumerate() {
                _mm512_storeu_ps(c.add(i * args.c_stride).cast::<f32>().add(TILE * j), *sum);
            }
        }
    }
}

/// `rounds` × 16 independent products in registers: the peak probe.
///
/// # Safety
///
/// The CPU has AVX512-BF16.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) unsafe fn spin_products(rounds: u64) -> f32 {
    let factor: __m512bh = as_pairs(std::hint::black_box(_mm512_setzero_si512()));
    let mut sums = [_mm512_setzero_ps(); 16];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_dpbf16_ps(*sum, factor, factor);
        }
    }
    let mut total = sums[0];
    for sum in &sums[1..] {
        total = _mm512_add_ps(total, *sum);
    }
    _mm512_reduce_add_ps(total)
}

/// Reinterprets integer lanes as bf16 pairs.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn as_pairs(lanes: __m512i) -> __m512bh {
    // SAFETY: both are 64 plain bytes.
    unsafe { std::mem::transmute(lanes) }
}
