//! Single-precision `ln`, `sin` and `cos` with the rounding of PyTorch's
//! vectorised normal fill.
//!
//! That code path evaluates the classic Cephes single-precision polynomials
//! (S. Moshier, *Methods and Programs for Mathematical Functions*, 1989) lane
//! by lane, with fused multiply-adds. The results differ from correctly rounded ones in
//! the last bit now and then; "same seed, same picture" wants those bits, so
//! the same polynomials are evaluated here in the same order. Nothing else
//! should use these functions: the standard library's are more accurate.

/// Natural logarithm of a positive normal number.
pub(super) fn ln(x: f32) -> f32 {
    let bits = x.max(f32::MIN_POSITIVE).to_bits();
    let mut exponent = (bits >> 23) as i32 - 126;
    // Mantissa in [0.5, 1), then moved to [sqrt(1/2), sqrt(2)) around 1.
    let mut m = f32::from_bits((bits & 0x007f_ffff) | 0.5f32.to_bits());
    if m < std::f32::consts::FRAC_1_SQRT_2 {
        exponent -= 1;
        m = m - 1.0 + m;
    } else {
        m -= 1.0;
    }
    let e = exponent as f32;
    let z = m * m;
    let mut y = 7.037_683_629_2e-2f32;
    for c in [
        -1.151_461_031_0e-1f32,
        1.167_699_874_0e-1,
        -1.242_014_084_6e-1,
        1.424_932_278_7e-1,
        -1.666_805_766_5e-1,
        2.000_071_476_5e-1,
        -2.499_999_399_3e-1,
        3.333_333_117_4e-1,
    ] {
        y = y.mul_add(m, c);
    }
    y *= m;
    // ln 2 in two parts, the larger one exact in few bits.
    y = y.mul_add(z, e * -2.121_944_40e-4);
    y = z.mul_add(-0.5, y);
    e.mul_add(0.693_359_375, m + y)
}

/// Sine and cosine of a non-negative number below 2^13.
pub(super) fn sin_cos(x: f32) -> (f32, f32) {
    // Octant, rounded up to even: the remainder lies in [-pi/4, pi/4].
    let octant = ((x * (4.0 / std::f32::consts::PI)) as i32 + 1) & !1;
    let k = octant as f32;
    // pi/4 in three parts (Cody-Waite).
    let mut r = k.mul_add(-0.785_156_25, x);
    r = k.mul_add(-2.418_756_484_985_351_6e-4, r);
    r = k.mul_add(-3.774_894_977_445_941e-8, r);
    let z = r * r;

    let mut c = 2.443_315_711_809_948e-5f32;
    c = c.mul_add(z, -1.388_731_625_493_765e-3);
    c = c.mul_add(z, 4.166_664_568_298_827e-2);
    c *= z;
    c = c.mul_add(z, z * -0.5) + 1.0;

    let mut s = -1.951_529_589_1e-4f32;
    s = s.mul_add(z, 8.332_160_873_6e-3);
    s = s.mul_add(z, -1.666_665_461_1e-1);
    s = (s * z).mul_add(r, r);

    let (sin, cos) = if octant & 2 == 0 { (s, c) } else { (c, s) };
    let sin = if octant & 4 == 0 { sin } else { -sin };
    let cos = if (octant - 2) & 4 == 0 { -cos } else { cos };
    (sin, cos)
}

#[cfg(test)]
mod tests {
    /// Both polynomials stay within a few units in the last place: 2.4e-7 is
    /// two units of a number near 1, and the logarithm is judged relative.
    #[test]
    fn close_to_the_double_precision_functions() {
        for i in 1..=20_000 {
            let u = i as f32 / 20_000.0;
            let exact = f64::from(u).ln();
            let error = (f64::from(super::ln(u)) - exact).abs();
            assert!(error <= 2.4e-7 * exact.abs().max(1e-3), "ln({u}): {error}");
            let angle = u * 2.0 * std::f32::consts::PI;
            let (sin, cos) = super::sin_cos(angle);
            assert!((f64::from(sin) - f64::from(angle).sin()).abs() < 2.4e-7, "sin({angle}) = {sin}");
            assert!((f64::from(cos) - f64::from(angle).cos()).abs() < 2.4e-7, "cos({angle}) = {cos}");
        }
    }
}
