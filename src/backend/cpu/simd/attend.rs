//! Attention of one head, online softmax, with the queries in the lanes.
//!
//! ```text
//!   Sᵀ[keys × 32] = K · Qᵀ      rows of A = keys,     B = 32 queries
//!   P = 2^(S − reference)       sum over keys is vertical: no shuffles
//!   Oᵀ[D × 32]   += Vᵀ · P      rows of A = channels, B = P, already a panel
//! ```
//! Both products are register tiles as in [`super::product`] with A k-major, K
//! and V packed in tiles ([`super::attend_pack`]). No dimension is padded but
//! the queries (to 32), so D = 40 wastes nothing. A tile of scores
//! becomes weights while it is still in registers; a block of weights
//! (keys × 32) stays in the nearest caches.
//!
//! The reference need not be the maximum: floats keep their relative precision
//! under any power of two. It is raised, and what was summed rescaled, only
//! when a score exceeds it by [`HEADROOM`] — in practice once, at the first
//! tile. Weights below 2^-126 of the reference, hence of the maximum, vanish.
//!
//! Online softmax: Milakov & Gimelshein 2018; blocking over keys as in
//! FlashAttention (Dao et al. 2022), which also rescales lazily in its later
//! versions.

use super::attend_pack::channel_tiles;
use super::product::{PANEL, Tile, tile_of};
use super::{Kernel, Simd, math};

/// Tiles of keys handled at a time.
pub const KEY_TILES: usize = 16;
/// Keys handled at a time, at most (the tallest tile).
pub const MAX_KEYS: usize = KEY_TILES * 14;
/// How far scores (in powers of two) may exceed the reference. Sums over 2³²
/// keys of 2^64 stay finite.
const HEADROOM: f32 = 64.0;

/// Attention of some panels of 32 queries to all keys of one head.
pub struct Attend<'a> {
    /// `[panel][D][32]` queries, scaled by the score factor and log2(e).
    pub q: &'a [f32],
    /// Number of panels.
    pub panels: usize,
    /// Keys as `[tile][D][rows]`.
    pub k: &'a [f32],
    /// Values as `[tile][key][channels]`.
    pub v: &'a [f32],
    /// Number of keys.
    pub keys: usize,
    /// Channels of the head.
    pub d: usize,
    /// Under a causal mask: the position of the first query.
    pub causal_from: Option<usize>,
    /// Room for `MAX_KEYS × 32` weights.
    pub weights: &'a mut [f32],
    /// Room for `[panel][2][32]`: references and sums.
    pub state: &'a mut [f32],
    /// `[panel][D][32]`: the result.
    pub out: &'a mut [f32],
}

/// One panel of queries against one block of keys.
struct Panel<'a> {
    q: *const f32,
    d: usize,
    weights: *mut f32,
    reference: *mut f32,
    sum: *mut f32,
    out: &'a mut [f32],
    /// Nothing has been added to `out` yet.
    is_first: bool,
}

impl Kernel for Attend<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (d, keys) = (self.d, self.keys);
        let step = KEY_TILES * S::ROWS;
        assert!(self.q.len() >= self.panels * d * PANEL && self.out.len() >= self.panels * d * PANEL);
        assert!(self.weights.len() >= step * PANEL && self.state.len() >= self.panels * 2 * PANEL);
        assert!(self.k.len() >= keys.next_multiple_of(S::ROWS) * d && self.v.len() >= keys * d);
        for state in self.state.chunks_exact_mut(2 * PANEL).take(self.panels) {
            state[..PANEL].fill(f32::NEG_INFINITY);
            state[PANEL..].fill(0.0);
        }
        for first in (0..keys).step_by(step) {
            for p in 0..self.panels {
                let query = self.causal_from.map(|q| q + p * PANEL);
                let visible = query.map_or(keys, |q| keys.min(q + PANEL));
                if first >= visible {
                    continue;
                }
                let count = (visible - first).min(step);
                // SAFETY: panel p of every buffer exists (lengths checked above).
                unsafe {
                    let state = self.state.as_mut_ptr().add(p * 2 * PANEL);
                    let mut panel = Panel {
                        q: self.q.as_ptr().add(p * d * PANEL),
                        d,
                        weights: self.weights.as_mut_ptr(),
                        reference: state,
                        sum: state.add(PANEL),
                        out: &mut self.out[p * d * PANEL..][..d * PANEL],
                        is_first: first == 0,
                    };
                    let hidden_from = query.map_or(usize::MAX, |q| (q + 1).saturating_sub(first));
                    panel.weigh::<S>(self.k.as_ptr().add(first * d), count, hidden_from);
                    panel.gather::<S>(self.v.as_ptr(), keys, first, count);
                }
            }
        }
        for p in 0..self.panels {
            for column in (0..PANEL).step_by(S::LANES) {
                // SAFETY: as above; column + lanes ≤ PANEL.
                unsafe {
                    let sum = S::load(self.state.as_ptr().add((p * 2 + 1) * PANEL + column));
                    let inverse = S::div(S::splat(1.0), sum);
                    for i in 0..d {
                        let o = self.out.as_mut_ptr().add((p * d + i) * PANEL + column);
                        S::store(o, S::mul(S::load(o), inverse));
                    }
                }
            }
        }
    }
}

impl Panel<'_> {
    /// Weights of `count` keys; from key `hidden_from` on the causal mask bites.
    ///
    /// # Safety
    /// The CPU must have the instructions of `S`; `k` must point to the packed
    /// tiles of the keys; so for all functions here.
    #[inline(always)]
    unsafe fn weigh<S: Simd>(&mut self, k: *const f32, count: usize, hidden_from: usize) {
        for key in (0..count).step_by(S::ROWS) {
            let rows = (count - key).min(S::ROWS);
            // SAFETY: the function's contract.
            unsafe {
                let a = k.add(key * self.d);
                if rows < S::ROWS || key + rows > hidden_from {
                    self.partial_tile::<S>(a, key, rows, hidden_from);
                } else {
                    match S::ROWS {
                        14 => self.tile::<S, 14>(a, key),
                        6 => self.tile::<S, 6>(a, key),
                        _ => self.tile::<S, 4>(a, key),
                    }
                }
            }
        }
    }

    /// A full tile: scores become weights in registers.
    ///
    /// # Safety
    /// As [`Panel::weigh`].
    #[inline(always)]
    unsafe fn tile<S: Simd, const R: usize>(&mut self, k: *const f32, key: usize) {
        let mut column = 0;
        while column < PANEL {
            // SAFETY: the function's contract; column + 2·lanes ≤ PANEL.
            unsafe {
                let mut acc = [[S::splat(0.0); 2]; R];
                let (mut a, mut b) = (k, self.q.add(column));
                for _ in 0..self.d {
                    let (b0, b1) = (S::load(b), S::load(b.add(S::LANES)));
                    for (r, acc) in acc.iter_mut().enumerate() {
                        let x = S::splat(*a.add(r));
                        acc[0] = S::fma(x, b0, acc[0]);
                        acc[1] = S::fma(x, b1, acc[1]);
                    }
                    a = a.add(R);
                    b = b.add(PANEL);
                }
                for half in 0..2 {
                    let at = column + half * S::LANES;
                    let mut top = acc[0][half];
                    for acc in &acc[1..] {
                        top = S::max(acc[half], top);
                    }
                    let reference = self.raise_if_needed::<S>(at, top, key);
                    let mut sum = S::load(self.sum.add(at));
                    for (r, acc) in acc.iter().enumerate() {
                        let weight = math::exp2::<S>(S::sub(acc[half], reference));
                        S::store(self.weights.add((key + r) * PANEL + at), weight);
                        sum = S::add(sum, weight);
                    }
                    S::store(self.sum.add(at), sum);
                }
            }
            column += 2 * S::LANES;
        }
    }

    /// A tile with fewer keys, or with keys that some queries must not see.
    ///
    /// # Safety
    /// As [`Panel::weigh`].
    #[inline(always)]
    unsafe fn partial_tile<S: Simd>(&mut self, k: *const f32, key: usize, rows: usize, hidden_from: usize) {
        // SAFETY: the function's contract; rows key..key + rows of the weights exist.
        unsafe {
            let c = self.weights.add(key * PANEL);
            let tile = Tile { a: k, a_step: S::ROWS, b: self.q, kc: self.d, c, accumulate: false };
            tile_of::<S, 1>(rows, tile);
            for r in 0..rows {
                let hidden = (key + r + 1).saturating_sub(hidden_from).min(PANEL);
                for lane in 0..hidden {
                    *c.add(r * PANEL + lane) = f32::NEG_INFINITY;
                }
            }
            for at in (0..PANEL).step_by(S::LANES) {
                let mut top = S::load(c.add(at));
                for r in 1..rows {
                    top = S::max(S::load(c.add(r * PANEL + at)), top);
                }
                let reference = self.raise_if_needed::<S>(at, top, key);
                let mut sum = S::load(self.sum.add(at));
                for r in 0..rows {
                    let p = c.add(r * PANEL + at);
                    let weight = math::exp2::<S>(S::sub(S::load(p), reference));
                    S::store(p, weight);
                    sum = S::add(sum, weight);
                }
                S::store(self.sum.add(at), sum);
            }
        }
    }

    /// The reference of lanes `at..`; if `top` exceeds it by too much it is
    /// raised, and the sums, this block's first `rows` weights and the output
    /// are rescaled.
    ///
    /// # Safety
    /// As [`Panel::weigh`].
    #[inline(always)]
    unsafe fn raise_if_needed<S: Simd>(&mut self, at: usize, top: S::V, rows: usize) -> S::V {
        // SAFETY: the function's contract.
        unsafe {
            let old = S::load(self.reference.add(at));
            if !S::any_less(S::add(old, S::splat(HEADROOM)), top) {
                return old;
            }
            let new = S::max(old, top);
            S::store(self.reference.add(at), new);
            let factor = math::exp2::<S>(S::sub(old, new));
            let scale = |p: *mut f32| S::store(p, S::mul(S::load(p), factor));
            scale(self.sum.add(at));
            for r in 0..rows {
                scale(self.weights.add(r * PANEL + at));
            }
            if !self.is_first {
                for i in 0..self.d {
                    scale(self.out.as_mut_ptr().add(i * PANEL + at));
                }
            }
            new
        }
    }

    /// Adds the values of keys `first..first + count` (of `keys`) to the output.
    ///
    /// # Safety
    /// As [`Panel::weigh`], for the packed values of all keys.
    #[inline(always)]
    unsafe fn gather<S: Simd>(&mut self, v: *const f32, keys: usize, first: usize, count: usize) {
        for (channel, rows) in channel_tiles(self.d, S::ROWS) {
            // SAFETY: the function's contract; tiles cover channels 0..D.
            unsafe {
                let tile = Tile {
                    a: v.add(channel * keys + first * rows),
                    a_step: rows,
                    b: self.weights,
                    kc: count,
                    c: self.out.as_mut_ptr().add(channel * PANEL),
                    accumulate: !self.is_first,
                };
                tile_of::<S, 1>(rows, tile);
            }
        }
    }
}
