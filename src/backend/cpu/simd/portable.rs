//! Portable leaf: arrays of 8 lanes that the compiler turns into whatever the
//! target has (two NEON registers on aarch64).

use half::{bf16, f16};

use super::{Block, Simd};

/// Eight lanes in an array.
#[derive(Clone, Copy)]
pub struct Portable;

type Lanes = [f32; 8];

#[inline(always)]
fn zip(a: Lanes, b: Lanes, f: impl Fn(f32, f32) -> f32) -> Lanes {
    let mut out = [0.0; 8];
    for i in 0..8 {
        out[i] = f(a[i], b[i]);
    }
    out
}

// SAFETY: plain Rust, no special instructions; pointer validity is the
// caller's part of the contract.
#[allow(clippy::undocumented_unsafe_blocks)]
unsafe impl Simd for Portable {
    const LANES: usize = 8;
    const ROWS: usize = 4;
    type V = Lanes;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Lanes {
        [x; 8]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Lanes {
        unsafe { p.cast::<Lanes>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_part(p: *const f32, n: usize) -> Lanes {
        let mut out = [0.0; 8];
        for (i, o) in out.iter_mut().enumerate().take(n) {
            *o = unsafe { *p.add(i) };
        }
        out
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Lanes) {
        unsafe { p.cast::<Lanes>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn store_part(p: *mut f32, n: usize, v: Lanes) {
        for (i, x) in v.iter().enumerate().take(n) {
            unsafe { *p.add(i) = *x };
        }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Lanes {
        let bits = unsafe { p.cast::<[u16; 8]>().read_unaligned() };
        bits.map(|b| f16::from_bits(b).to_f32())
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Lanes {
        let bits = unsafe { p.cast::<[u16; 8]>().read_unaligned() };
        bits.map(|b| f32::from_bits(u32::from(b) << 16))
    }
    #[inline(always)]
    unsafe fn store_bf16(p: *mut u16, v: Lanes) {
        unsafe { p.cast::<[u16; 8]>().write_unaligned(v.map(|x| bf16::from_f32(x).to_bits())) }
    }
    #[inline(always)]
    unsafe fn add(a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |x, y| x + y)
    }
    #[inline(always)]
    unsafe fn sub(a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |x, y| x - y)
    }
    #[inline(always)]
    unsafe fn mul(a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |x, y| x * y)
    }
    #[inline(always)]
    unsafe fn div(a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |x, y| x / y)
    }
    #[inline(always)]
    unsafe fn fma(a: Lanes, b: Lanes, c: Lanes) -> Lanes {
        let mut out = [0.0; 8];
        for i in 0..8 {
            // Without the instruction `mul_add` is a slow library call.
            out[i] = if cfg!(any(target_feature = "fma", target_arch = "aarch64")) {
                a[i].mul_add(b[i], c[i])
            } else {
                a[i] * b[i] + c[i]
            };
        }
        out
    }
    #[inline(always)]
    unsafe fn max(a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |x, y| if x > y { x } else { y })
    }
    #[inline(always)]
    unsafe fn min(a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |x, y| if x < y { x } else { y })
    }
    #[inline(always)]
    unsafe fn abs(a: Lanes) -> Lanes {
        a.map(f32::abs)
    }
    #[inline(always)]
    unsafe fn any_less(a: Lanes, b: Lanes) -> bool {
        a.iter().zip(&b).any(|(x, y)| x < y)
    }
    #[inline(always)]
    unsafe fn scale_by_power(v: Lanes, magic: Lanes) -> Lanes {
        zip(v, magic, |x, m| f32::from_bits(x.to_bits().wrapping_add(m.to_bits() << 23)))
    }
    #[inline(always)]
    unsafe fn sum(v: Lanes) -> f32 {
        let [a, b, c, d, e, f, g, h] = v;
        ((a + e) + (c + g)) + ((b + f) + (d + h))
    }
    #[inline(always)]
    unsafe fn transpose(b: Block) {
        for column in 0..b.columns {
            let mut lanes = [0.0; 8];
            for (i, lane) in lanes.iter_mut().enumerate().take(b.rows) {
                *lane = unsafe { *b.from.add(i * b.stride + column) } * b.factor;
            }
            unsafe { Self::store(b.to.add(column * b.to_stride), lanes) };
        }
    }
    #[inline(always)]
    unsafe fn prefetch(_p: *const u8) {}
}
