//! Group and layer normalisation over channels-last rows.

use super::element::Element;
use super::finish::{read, write};
use super::{Kernel, Simd, math};

/// Rows that are summed in one go.
const RUN: usize = 32;

/// Per-channel shifted sums over some rows: `Σ(x − pivot)` and `Σ(x − pivot)²`,
/// where the pivot is the channel's value in the first row. The shift keeps
/// the squares small; sums of [`RUN`] rows are summed in turn, so that a few
/// hundred rows lose no more than a unit or two.
pub struct ChannelSums<'a, E> {
    /// Rows of `width` channels.
    pub x: &'a [E],
    /// Channels.
    pub width: usize,
    /// Σ(x − pivot) of each channel.
    pub sum: &'a mut [f32],
    /// Σ(x − pivot)² of each channel.
    pub square: &'a mut [f32],
}

impl<E: Element> Kernel for ChannelSums<'_, E> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (n, rows) = (self.width, self.x.len() / self.width);
        assert!(rows > 0 && self.sum.len() == n && self.square.len() == n);
        let mut i = 0;
        while i < n {
            let part = (n - i).min(S::LANES);
            // SAFETY: columns i..i + part of rows 0..rows exist; sums are n long.
            unsafe {
                if i + 4 * S::LANES <= n {
                    let p = self.x.as_ptr().add(i);
                    let zero = [(S::splat(0.0), S::splat(0.0)); 4];
                    let mut total = zero;
                    for run in (0..rows).step_by(RUN) {
                        let mut acc = zero;
                        for r in run..(run + RUN).min(rows) {
                            for (v, acc) in acc.iter_mut().enumerate() {
                                let pivot = E::load::<S>(p.add(v * S::LANES));
                                let d = S::sub(E::load::<S>(p.add(r * n + v * S::LANES)), pivot);
                                *acc = (S::add(acc.0, d), S::fma(d, d, acc.1));
                            }
                        }
                        for (t, a) in total.iter_mut().zip(acc) {
                            *t = (S::add(t.0, a.0), S::add(t.1, a.1));
                        }
                    }
                    for (v, total) in total.iter().enumerate() {
                        S::store(self.sum.as_mut_ptr().add(i + v * S::LANES), total.0);
                        S::store(self.square.as_mut_ptr().add(i + v * S::LANES), total.1);
                    }
                    i += 4 * S::LANES;
                } else {
                    let pivot = read::<S, E>(self.x, i, part);
                    let (mut sum, mut square) = (S::splat(0.0), S::splat(0.0));
                    for run in (0..rows).step_by(RUN) {
                        let mut acc = (S::splat(0.0), S::splat(0.0));
                        for r in run..(run + RUN).min(rows) {
                            let d = S::sub(read::<S, E>(self.x, r * n + i, part), pivot);
                            acc = (S::add(acc.0, d), S::fma(d, d, acc.1));
                        }
                        (sum, square) = (S::add(sum, acc.0), S::add(square, acc.1));
                    }
                    write::<S, f32>(self.sum, i, part, sum);
                    write::<S, f32>(self.square, i, part, square);
                    i += part;
                }
            }
        }
    }
}

/// `out = x·factor + shift`, channel by channel, optionally through SiLU, into
/// columns `column..` of rows of `stride` channels.
pub struct ScaleShift<'a, E> {
    /// Rows of `width` channels.
    pub x: &'a [E],
    /// Channels.
    pub width: usize,
    /// Factor of each channel.
    pub factor: &'a [f32],
    /// Added to each channel.
    pub shift: &'a [f32],
    /// Apply SiLU.
    pub silu: bool,
    /// Output rows.
    pub out: &'a mut [E],
    /// Channels of an output row.
    pub stride: usize,
    /// First output channel.
    pub column: usize,
    /// The output won't stay in the caches.
    pub is_large: bool,
}

impl<E: Element> Kernel for ScaleShift<'_, E> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let n = self.width;
        let rows = self.x.len() / n;
        assert!(self.factor.len() == n && self.shift.len() == n);
        assert!(self.column + n <= self.stride && self.out.len() >= rows * self.stride);
        for r in 0..rows {
            let x = &self.x[r * n..][..n];
            let out = &mut self.out[r * self.stride + self.column..][..n];
            for i in (0..n).step_by(S::LANES) {
                let part = (n - i).min(S::LANES);
                // SAFETY: i + part ≤ n, the length of all slices.
                unsafe {
                    let factor = read::<S, f32>(self.factor, i, part);
                    let shift = read::<S, f32>(self.shift, i, part);
                    let mut v = S::fma(read::<S, E>(x, i, part), factor, shift);
                    if self.silu {
                        v = math::silu::<S>(v);
                    }
                    if self.is_large && part == S::LANES {
                        E::stream::<S>(out.as_mut_ptr().add(i), v);
                    } else {
                        write::<S, E>(out, i, part, v);
                    }
                }
            }
        }
        // SAFETY: needs nothing but the instruction set.
        unsafe { S::fence() };
    }
}

/// Layer normalisation of rows: two passes for the statistics, in f32 lanes.
pub struct LayerNormRows<'a, E> {
    /// Rows of `scale.len()` channels.
    pub x: &'a [E],
    /// Scale of each channel.
    pub scale: &'a [f32],
    /// Shift of each channel.
    pub shift: &'a [f32],
    /// Added to the variance.
    pub eps: f32,
    /// Output rows.
    pub out: &'a mut [E],
}

impl<E: Element> Kernel for LayerNormRows<'_, E> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let n = self.scale.len();
        assert!(n > 0 && self.shift.len() == n && self.x.len() == self.out.len());
        for (x, out) in self.x.chunks_exact(n).zip(self.out.chunks_exact_mut(n)) {
            // SAFETY: i + part ≤ n, the length of all slices.
            unsafe {
                let mut sum = S::splat(0.0);
                for i in (0..n).step_by(S::LANES) {
                    sum = S::add(sum, read::<S, E>(x, i, (n - i).min(S::LANES)));
                }
                let mean = S::sum(sum) / n as f32;
                let mut square = S::splat(0.0);
                let mut i = 0;
                while i + S::LANES <= n {
                    let d = S::sub(E::load::<S>(x.as_ptr().add(i)), S::splat(mean));
                    square = S::fma(d, d, square);
                    i += S::LANES;
                }
                let mut variance = S::sum(square);
                for x in &x[i..] {
                    let d = x.to_f32() - mean;
                    variance += d * d;
                }
                let rstd = 1.0 / (variance / n as f32 + self.eps).sqrt();
                for i in (0..n).step_by(S::LANES) {
                    let part = (n - i).min(S::LANES);
                    let d = S::sub(read::<S, E>(x, i, part), S::splat(mean));
                    let scaled = S::mul(S::mul(d, S::splat(rstd)), read::<S, f32>(self.scale, i, part));
                    write::<S, E>(out, i, part, S::add(scaled, read::<S, f32>(self.shift, i, part)));
                }
            }
        }
    }
}
