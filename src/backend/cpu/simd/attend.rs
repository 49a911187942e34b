//! Attention of one head, online softmax, with the queries in the lanes.
//!
//! ```text
//!   Sᵀ[keys × 32] = K · Qᵀ      rows of A = keys,     B = 32 queries
//!   P = 2^(S − max)             max and sum over keys are vertical: no shuffles
//!   Oᵀ[D × 32]   += Vᵀ · P      rows of A = channels, B = P, already a panel
//! ```
//! Both products are the register tiles of [`super::product`] with A k-major:
//! K packed as `[tile][D][rows]`, V as it comes, `[key][D]`. No dimension is
//! padded but the queries (to 32), so D = 40 wastes nothing. A block of scores
//! (keys × 32) never leaves the first-level cache. Online softmax: Milakov &
//! Gimelshein 2018; blocking over keys as in FlashAttention (Dao et al. 2022).

use super::product::{PANEL, Tile, tile_of};
use super::{Kernel, Simd, math};

/// Keys handled at a time; a multiple of every tile height.
pub const KEYS: usize = 168;

/// Attention of up to 32 queries to all keys of one head.
pub struct Attend<'a> {
    /// `[D][32]` queries, scaled by the score factor and log2(e).
    pub q: &'a [f32],
    /// Keys as `[tile][D][rows]`, see [`pack_keys`].
    pub k: &'a [f32],
    /// Values, `[key][D]`.
    pub v: &'a [f32],
    /// Number of keys.
    pub keys: usize,
    /// Channels of the head.
    pub d: usize,
    /// Under a causal mask: the position of the first query.
    pub causal_from: Option<usize>,
    /// Room for `KEYS × 32` scores.
    pub scores: &'a mut [f32],
    /// `[D][32]`: the result.
    pub out: &'a mut [f32],
}

/// Packs `[key][D]` rows into tiles of `rows` keys, k-major.
pub fn pack_keys(from: &[f32], d: usize, rows: usize, to: &mut [f32]) {
    for (tile, to) in from.chunks(rows * d).zip(to.chunks_mut(rows * d)) {
        for (r, key) in tile.chunks_exact(d).enumerate() {
            for (i, &x) in key.iter().enumerate() {
                to[i * rows + r] = x;
            }
        }
    }
}

impl Kernel for Attend<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (d, keys) = (self.d, self.keys);
        assert!(
            self.q.len() >= d * PANEL && self.out.len() >= d * PANEL && self.scores.len() >= KEYS * PANEL
        );
        assert!(self.k.len() >= keys.next_multiple_of(S::ROWS) * d && self.v.len() >= keys * d);
        let mut max = [f32::NEG_INFINITY; PANEL];
        let mut sum = [0f32; PANEL];
        let visible = self.causal_from.map_or(keys, |q| keys.min(q + PANEL));
        // SAFETY: lengths were checked above; key blocks and channel tiles
        // cover exactly 0..visible and 0..d.
        unsafe {
            for first in (0..visible).step_by(KEYS) {
                let count = (visible - first).min(KEYS);
                for key in (0..count).step_by(S::ROWS) {
                    let tile = Tile {
                        a: self.k.as_ptr().add((first + key) * d),
                        a_step: S::ROWS,
                        b: self.q.as_ptr(),
                        kc: d,
                        c: self.scores.as_mut_ptr().add(key * PANEL),
                        accumulate: false,
                    };
                    tile_of::<S, 1>((count - key).min(S::ROWS), tile);
                }
                if let Some(q) = self.causal_from {
                    mask_future(self.scores, first, count, q);
                }
                soften::<S>(&mut self.scores[..count * PANEL], self.out, &mut max, &mut sum, first == 0);
                let tiles = d.div_ceil(S::ROWS);
                let (base, longer) = (d / tiles, d % tiles);
                let mut channel = 0;
                for t in 0..tiles {
                    let rows = base + usize::from(t < longer);
                    let tile = Tile {
                        a: self.v.as_ptr().add(first * d + channel),
                        a_step: d,
                        b: self.scores.as_ptr(),
                        kc: count,
                        c: self.out.as_mut_ptr().add(channel * PANEL),
                        accumulate: first > 0,
                    };
                    tile_of::<S, 1>(rows, tile);
                    channel += rows;
                }
            }
            for column in (0..PANEL).step_by(S::LANES) {
                let inverse = S::div(S::splat(1.0), S::load(sum.as_ptr().add(column)));
                for i in 0..d {
                    let o = self.out.as_mut_ptr().add(i * PANEL + column);
                    S::store(o, S::mul(S::load(o), inverse));
                }
            }
        }
    }
}

/// Scores of keys behind the query become −∞.
fn mask_future(scores: &mut [f32], first: usize, count: usize, query: usize) {
    for (key, row) in scores.chunks_exact_mut(PANEL).take(count).enumerate() {
        let hidden = (first + key).saturating_sub(query).min(PANEL);
        row[..hidden].fill(f32::NEG_INFINITY);
    }
}

/// Turns a block of scores into weights relative to the running maximum and
/// rescales what was summed under the old one.
///
/// # Safety
/// `scores` must be whole rows of `PANEL`, `out` as well.
#[inline(always)]
unsafe fn soften<S: Simd>(
    scores: &mut [f32],
    out: &mut [f32],
    max: &mut [f32; PANEL],
    sum: &mut [f32; PANEL],
    is_first: bool,
) {
    let rows = scores.len() / PANEL;
    let s = scores.as_mut_ptr();
    for column in (0..PANEL).step_by(S::LANES) {
        // SAFETY: column + lanes ≤ PANEL; rows 0..rows exist.
        unsafe {
            let old = S::load(max.as_ptr().add(column));
            let mut new = old;
            for r in 0..rows {
                new = S::max(S::load(s.add(r * PANEL + column)), new);
            }
            S::store(max.as_mut_ptr().add(column), new);
            let mut total = S::splat(0.0);
            for r in 0..rows {
                let p = s.add(r * PANEL + column);
                let weight = math::exp2::<S>(S::sub(S::load(p), new));
                total = S::add(total, weight);
                S::store(p, weight);
            }
            let kept = sum.as_mut_ptr().add(column);
            if is_first {
                S::store(kept, total);
            } else {
                let factor = math::exp2::<S>(S::sub(old, new));
                S::store(kept, S::fma(S::load(kept), factor, total));
                for o in (column..out.len()).step_by(PANEL) {
                    let o = out.as_mut_ptr().add(o);
                    S::store(o, S::mul(S::load(o), factor));
                }
            }
        }
    }
}
