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
    /// The output won't stay in the caches: write past them.
    pub is_large: bool,
}

/// Outputs from this size on are written past the caches, which saves reading
/// every line before it is overwritten (measured: 10–15% of a layer).
pub const LARGE_OUTPUT_BYTES: usize = 4 << 20;

/// A bias for every sample and channel.
pub struct SampleBias<'a, E> {
    /// Rows of `stride` values, one a sample; the bias begins at the slice's start.
    pub data: &'a [E],
    /// Distance between samples.
    pub stride: usize,
    /// Output rows of a sample.
    pub positions: usize,
}

/// The accumulators of a task.
pub struct Finish<'a, 'o, E> {
    /// The layer's epilogue.
    pub layer: &'a Epilogue<'a, E>,
    /// `[panel][row][PANEL]` accumulators of all rows of the tile.
    pub c: &'a [f32],
    /// Bias of each panel, `PANEL` long.
    pub bias: &'a [f32],
    /// Output of the task.
    pub tile: &'a mut TileMut<'o, E>,
    /// What the tile's rows and columns are.
    pub place: Place,
}

/// How output positions lie in a tile.
#[derive(Clone, Copy)]
pub struct Place {
    /// Positions in a row of the tile.
    pub run: usize,
    /// Positions in a row of the whole matrix.
    pub positions: usize,
    /// First position of the tile in a row.
    pub first: usize,
    /// First channel.
    pub channel: usize,
    /// Channels.
    pub channels: usize,
}

impl Place {
    /// A row is a position, and the tile has some of its channels.
    pub fn rows<T>(tile: &TileMut<'_, T>) -> Self {
        Self { run: 1, positions: 1, first: 0, channel: tile.column, channels: tile.columns }
    }

    /// A row is a line of a picture, and the tile has all channels of some of its pixels.
    pub fn pixels<T>(tile: &TileMut<'_, T>, width: usize, channels: usize) -> Self {
        let (run, first) = (tile.columns / channels, tile.column / channels);
        Self { run, positions: width, first, channel: 0, channels }
    }
}

impl<E: Element> Kernel for Finish<'_, '_, E> {
    type Output = ();

    /// Row by row, so that memory sees long writes.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: passed on. One loop for each activation keeps the choice out of it.
        unsafe {
            match (self.layer.is_geglu, self.layer.act) {
                (true, _) => self.rows::<S, true>(|v| v),
                (_, Activation::None) => self.rows::<S, false>(|v| v),
                (_, Activation::Silu) => self.rows::<S, false>(|v| math::silu::<S>(v)),
                (_, Activation::Gelu) => self.rows::<S, false>(|v| math::gelu::<S>(v)),
                (_, Activation::QuickGelu) => self.rows::<S, false>(|v| math::quick_gelu::<S>(v)),
                (_, Activation::Relu) => self.rows::<S, false>(|v| math::relu::<S>(v)),
                (_, Activation::LeakyRelu) => self.rows::<S, false>(|v| math::leaky_relu::<S>(v)),
            }
        }
    }
}

impl<E: Element> Finish<'_, '_, E> {
    /// # Safety
    /// The CPU must have the instructions of `S`.
    #[inline(always)]
    unsafe fn rows<S: Simd, const GEGLU: bool>(self, act: impl Fn(S::V) -> S::V) {
        let (layer, tile) = (self.layer, self.tile);
        let width = if GEGLU { PANEL / 2 } else { PANEL };
        let place = self.place;
        let (n, rows, panels) = (place.channels, tile.rows * place.run, place.channels.div_ceil(width));
        assert!(self.c.len() >= panels * rows * PANEL && self.bias.len() >= panels * PANEL);
        for r in 0..rows {
            let (line, pixel) = if place.run == 1 { (r, 0) } else { (r / place.run, r % place.run) };
            let m = (tile.row + line) * place.positions + place.first + pixel;
            let residual = layer.residual.map(|s| &s[m * layer.width + place.channel..][..n]);
            let time_bias =
                layer.time_bias.as_ref().map(|t| &t.data[m / t.positions * t.stride + place.channel..][..n]);
            let out = tile.row_mut(line, pixel * n, n);
            for panel in 0..panels {
                let (first, end) = (panel * width, ((panel + 1) * width).min(n));
                let mut i = first;
                while i < end {
                    // SAFETY: i < n, the length of all row slices, and partial
                    // vectors are cut there; accumulators and biases are PANEL
                    // long, a multiple of the lanes (checked above).
                    unsafe {
                        let part = (end - i).min(S::LANES);
                        let c = self.c.as_ptr().add((panel * rows + r) * PANEL + i - first);
                        let bias = self.bias.as_ptr().add(panel * PANEL + i - first);
                        let mut v = S::add(S::load(c), S::load(bias));
                        if let Some(t) = time_bias {
                            v = S::add(v, read::<S, E>(t, i, part));
                        }
                        v = act(v);
                        if GEGLU {
                            let gate = S::add(S::load(c.add(width)), S::load(bias.add(width)));
                            v = S::mul(v, math::gelu::<S>(gate));
                        }
                        if let Some(t) = residual {
                            v = S::fma(v, S::splat(layer.scale), read::<S, E>(t, i, part));
                        } else {
                            v = S::mul(v, S::splat(layer.scale));
                        }
                        if layer.is_large && part == S::LANES {
                            E::stream::<S>(out.as_mut_ptr().add(i), v);
                        } else {
                            write::<S, E>(out, i, part, v);
                        }
                    }
                    i += S::LANES;
                }
            }
        }
        // SAFETY: needs nothing but the instruction set.
        unsafe { S::fence() };
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
