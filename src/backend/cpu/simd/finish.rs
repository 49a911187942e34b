//! Epilogues: from accumulators to the output, everything fused.
//!
//! `out = act(c + bias + time_bias)·scale + residual`, or value·gelu(gate) for
//! GEGLU, whose panels hold 16 values and their 16 gates.

use super::element::Element;
use super::product::PANEL;
use super::shared::TileMut;
use super::{Kernel, Simd, math};
use crate::tensor::Activation;

/// What happens to accumulators on their way out, for a whole layer.
pub struct Epilogue<'a, E> {
    /// Per-sample bias.
    pub time_bias: Option<SampleBias<'a, E>>,
    /// Activation.
    pub act: Activation,
    /// Panels hold 16 values and 16 gates.
    pub is_geglu: bool,
    /// Factor before the residual.
    pub scale: f32,
    /// Residual of the output's shape.
    pub residual: Option<&'a [E]>,
    /// Channels of the output.
    pub width: usize,
}

/// A bias for every sample and channel.
pub struct SampleBias<'a, E> {
    /// Rows of `stride` values, one a sample; the bias begins at the slice's start.
    pub data: &'a [E],
    /// Distance between samples.
    pub stride: usize,
    /// Output rows of a sample.
    pub positions: usize,
}

/// One panel's accumulators.
pub struct Finish<'a, 'o, E> {
    /// The layer's epilogue.
    pub layer: &'a Epilogue<'a, E>,
    /// `tile.rows × PANEL` accumulators.
    pub c: &'a [f32],
    /// Bias of the panel, `PANEL` long.
    pub bias: &'a [f32],
    /// Output of the task.
    pub tile: &'a mut TileMut<'o, E>,
    /// First column of the panel's output, relative to the tile.
    pub column: usize,
    /// Output columns of the panel.
    pub columns: usize,
}

impl<E: Element> Kernel for Finish<'_, '_, E> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (n, layer, tile) = (self.columns, self.layer, self.tile);
        assert!(self.c.len() >= tile.rows * PANEL && self.bias.len() >= PANEL);
        assert!(n <= if layer.is_geglu { PANEL / 2 } else { PANEL });
        let at = tile.column + self.column;
        for r in 0..tile.rows {
            let m = tile.row + r;
            let residual = layer.residual.map(|s| &s[m * layer.width + at..][..n]);
            let time_bias = layer.time_bias.as_ref().map(|t| &t.data[m / t.positions * t.stride + at..][..n]);
            let out = tile.row_mut(r, self.column, n);
            let c = &self.c[r * PANEL..][..PANEL];
            let mut i = 0;
            while i < n {
                // SAFETY: i < n ≤ PANEL; slices are n long, partial vectors are
                // cut at n; c and bias are PANEL long, a multiple of the lanes.
                unsafe {
                    let part = (n - i).min(S::LANES);
                    let c = c.as_ptr().add(i);
                    let bias = self.bias.as_ptr().add(i);
                    let mut v = S::add(S::load(c), S::load(bias));
                    if let Some(t) = time_bias {
                        v = S::add(v, read::<S, E>(t, i, part));
                    }
                    if layer.is_geglu {
                        let gate = S::add(S::load(c.add(PANEL / 2)), S::load(bias.add(PANEL / 2)));
                        v = S::mul(v, math::gelu::<S>(gate));
                    } else {
                        v = math::activate::<S>(layer.act, v);
                    }
                    if let Some(t) = residual {
                        v = S::fma(v, S::splat(layer.scale), read::<S, E>(t, i, part));
                    } else {
                        v = S::mul(v, S::splat(layer.scale));
                    }
                    let out = out.as_mut_ptr().add(i);
                    if part == S::LANES {
                        E::store::<S>(out, v);
                    } else {
                        E::store_part::<S>(out, part, v);
                    }
                }
                i += S::LANES;
            }
        }
    }
}

/// # Safety
/// `i + part ≤ s.len()`.
#[inline(always)]
pub(super) unsafe fn read<S: Simd, E: Element>(s: &[E], i: usize, part: usize) -> S::V {
    // SAFETY: the function's contract.
    unsafe {
        let p = s.as_ptr().add(i);
        if part == S::LANES { E::load::<S>(p) } else { E::load_part::<S>(p, part) }
    }
}

/// # Safety
/// `i + part ≤ s.len()`.
#[inline(always)]
pub(super) unsafe fn write<S: Simd, E: Element>(s: &mut [E], i: usize, part: usize, v: S::V) {
    // SAFETY: the function's contract.
    unsafe {
        let p = s.as_mut_ptr().add(i);
        if part == S::LANES { E::store::<S>(p, v) } else { E::store_part::<S>(p, part, v) }
    }
}
