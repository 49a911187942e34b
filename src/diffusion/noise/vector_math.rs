//! Single-precision `ln`, `sin` and `cos` with the rounding of PyTorch's
//! vectorised normal fill, eight lanes at a time.
//!
//! That code path evaluates the classic Cephes single-precision polynomials
//! (S. Moshier, *Methods and Programs for Mathematical Functions*, 1989) with
//! fused multiply-adds. The results differ from correctly rounded ones in the
//! last bit now and then; "same seed, same picture" wants those bits, so the
//! same polynomials are evaluated here in the same order. Nothing else should
//! use these functions: the standard library's are more accurate.
//!
//! Lanes are plain arrays that the compiler turns into whatever vectors the
//! target has. A fused multiply-add is not among the baseline instructions, so
//! [`fused`] computes it in f64, where the product is exact, and redoes the one
//! case in which rounding twice differs from rounding once.

#![expect(clippy::excessive_precision, reason = "the constants keep their published digits")]

/// Lanes evaluated together.
pub(super) const LANES: usize = 8;

/// One value a lane.
pub(super) type Lanes = [f32; LANES];

#[inline(always)]
fn lanes(mut f: impl FnMut(usize) -> f32) -> Lanes {
    let mut out = [0.0; LANES];
    for (i, slot) in out.iter_mut().enumerate() {
        *slot = f(i);
    }
    out
}

/// `a·b + c` in every lane, rounded once.
#[inline(always)]
fn fused(a: Lanes, b: Lanes, c: Lanes) -> Lanes {
    /// f64 significand bits that an f32 has no room for; all in the low word.
    const DROPPED: u32 = (1 << 29) - 1;
    const HALF_WAY: u32 = 1 << 28;
    let mut wide = [0.0f64; LANES];
    for i in 0..LANES {
        wide[i] = f64::from(a[i]) * f64::from(b[i]) + f64::from(c[i]);
    }
    // The f64 sum may itself be rounded onto a tie between two f32.
    let mut is_half_way = false;
    for w in wide {
        is_half_way |= w.to_bits() as u32 & DROPPED == HALF_WAY;
    }
    if is_half_way { exactly_fused(a, b, c) } else { lanes(|i| wide[i] as f32) }
}

#[cold]
#[inline(never)]
fn exactly_fused(a: Lanes, b: Lanes, c: Lanes) -> Lanes {
    lanes(|i| a[i].mul_add(b[i], c[i]))
}

/// `((c0·x + c1)·x + c2)…`, each step rounded once.
#[inline(always)]
fn horner<const N: usize>(x: Lanes, coefficients: [f32; N]) -> Lanes {
    let mut rest = coefficients.into_iter();
    let first = [rest.next().unwrap_or(0.0); LANES];
    rest.fold(first, |sum, c| fused(sum, x, [c; LANES]))
}

/// Natural logarithms of positive normal numbers.
pub(super) fn ln(x: Lanes) -> Lanes {
    let bits = x.map(|v| v.max(f32::MIN_POSITIVE).to_bits());
    // Mantissa in [0.5, 1), then moved to [sqrt(1/2), sqrt(2)) around 1.
    let mantissa = bits.map(|b| f32::from_bits((b & 0x007f_ffff) | 0.5f32.to_bits()));
    let is_low = mantissa.map(|m| m < std::f32::consts::FRAC_1_SQRT_2);
    let e = lanes(|i| ((bits[i] >> 23) as i32 - 126 - i32::from(is_low[i])) as f32);
    let m = lanes(|i| mantissa[i] - 1.0 + if is_low[i] { mantissa[i] } else { 0.0 });
    let z = m.map(|m| m * m);
    let polynomial = horner(
        m,
        [
            7.037_683_629_2e-2,
            -1.151_461_031_0e-1,
            1.167_699_874_0e-1,
            -1.242_014_084_6e-1,
            1.424_932_278_7e-1,
            -1.666_805_766_5e-1,
            2.000_071_476_5e-1,
            -2.499_999_399_3e-1,
            3.333_333_117_4e-1,
        ],
    );
    // ln 2 in two parts, the larger one exact in few bits.
    let small = e.map(|e| e * -2.121_944_40e-4);
    let y = fused(lanes(|i| polynomial[i] * m[i]), z, small);
    // Halving is exact, so neither of these needs to be fused.
    let y = lanes(|i| y[i] - z[i] * 0.5);
    lanes(|i| m[i] + y[i] + e[i] * 0.693_359_375)
}

/// Sines and cosines of non-negative numbers below 2^13.
pub(super) fn sin_cos(x: Lanes) -> (Lanes, Lanes) {
    // Octant, rounded up to even: the remainder lies in [-pi/4, pi/4].
    let octant = x.map(|x| ((x * (4.0 / std::f32::consts::PI)) as i32 + 1) & !1);
    let k = octant.map(|o| o as f32);
    // pi/4 in three parts (Cody-Waite).
    let r = fused(k, [-0.785_156_25; LANES], x);
    let r = fused(k, [-2.418_756_484_985_351_6e-4; LANES], r);
    let r = fused(k, [-3.774_894_977_445_941e-8; LANES], r);
    let z = r.map(|r| r * r);

    let c = horner(z, [2.443_315_711_809_948e-5, -1.388_731_625_493_765e-3, 4.166_664_568_298_827e-2]);
    let c = fused(lanes(|i| c[i] * z[i]), z, z.map(|z| z * -0.5)).map(|c| c + 1.0);
    let s = horner(z, [-1.951_529_589_1e-4, 8.332_160_873_6e-3, -1.666_665_461_1e-1]);
    let s = fused(lanes(|i| s[i] * z[i]), r, r);

    let is_swapped = octant.map(|o| o & 2 != 0);
    let sin = lanes(|i| signed(if is_swapped[i] { c[i] } else { s[i] }, octant[i] & 4 != 0));
    let cos = lanes(|i| signed(if is_swapped[i] { s[i] } else { c[i] }, (octant[i] - 2) & 4 == 0));
    (sin, cos)
}

fn signed(value: f32, is_negative: bool) -> f32 {
    f32::from_bits(value.to_bits() ^ (u32::from(is_negative) << 31))
}

#[cfg(test)]
mod tests {
    use super::{LANES, exactly_fused, fused, ln, sin_cos};

    /// Both polynomials stay within a few units in the last place: 2.4e-7 is
    /// two units of a number near 1, and the logarithm is judged relative.
    #[test]
    fn close_to_the_double_precision_functions() {
        for i in 1..=20_000 {
            let u = i as f32 / 20_000.0;
            let exact = f64::from(u).ln();
            let error = (f64::from(ln([u; LANES])[0]) - exact).abs();
            assert!(error <= 2.4e-7 * exact.abs().max(1e-3), "ln({u}): {error}");
            let angle = u * 2.0 * std::f32::consts::PI;
            let (sin, cos) = sin_cos([angle; LANES]);
            assert!((f64::from(sin[7]) - f64::from(angle).sin()).abs() < 2.4e-7, "sin({angle})");
            assert!((f64::from(cos[7]) - f64::from(angle).cos()).abs() < 2.4e-7, "cos({angle})");
        }
    }

    /// 1·1 + 2^-24 is half way between two f32; a bit far below decides. In f64
    /// alone that bit would be lost and the tie would go to even.
    #[test]
    fn a_sum_near_a_tie_is_rounded_once() {
        let tiny = 2f32.powi(-24);
        let a = [1.0 + 2f32.powi(-23), 1.0, tiny, 1.0, 1.0, 1.0, 1.0, 1.0];
        let b = [1.0, 1.0, 1.0 + 2f32.powi(-23), 1.0, 1.0, 1.0, 1.0, 1.0];
        let c = [tiny, tiny, 1.0, -tiny, 0.0, 1e-30, -1e-30, 3.0];
        assert_eq!(fused(a, b, c), exactly_fused(a, b, c));
        let (a, b) = ([tiny + 2f32.powi(-47); LANES], [1.0 - 2f32.powi(-24); LANES]);
        for c in [1.0, -1.0, 1.0 + 2f32.powi(-23), 2.0, 0.5] {
            assert_eq!(fused(a, b, [c; LANES]), exactly_fused(a, b, [c; LANES]), "{c}");
        }
    }
}
