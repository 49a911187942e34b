//! The register-tiled product that convolution, linear layers and attention
//! share: C[rows × 32] (+)= A[rows × K] · B[K × 32].
//!
//! ```text
//!            B panel: K × 32 f32, first-level cache
//!            ┌──────────┐
//!   A tile   │  b0  b1  │  two vectors a k
//!  R × K  →  ├──────────┤
//!  broadcast │ R×2 accu-│  R = 14 (AVX-512): 28 of 32 registers
//!            │ mulators │  per k: 2 loads + R broadcasts for 2R FMAs
//!            └──────────┘
//! ```
//! 28 FMAs take 14 cycles on two units, the 16 loads 8 cycles on two ports, so
//! the product is bound by the FMA units. A comes in two layouts: rows at a
//! constant stride ([`A_STRIDE`]) for gathered activations, and k-major for
//! attention operands. Row counts that are no multiple of R are spread evenly:
//! 128 rows run as 8×13 + 2×12, which keeps all tiles at full speed.
//! Weights stay in their file type until here; a block of K × 32 is
//! widened to f32 once and used by all row tiles.

use half::{bf16, f16};

use super::{Kernel, Simd};

/// Columns of a panel.
pub const PANEL: usize = 32;
/// Distance between rows of a gathered A block; the largest K of a block.
pub const A_STRIDE: usize = 320;

/// Elements of a panel block in the type the weights are stored in.
#[derive(Clone, Copy)]
pub enum PanelSlice<'a> {
    /// Used in place.
    F32(&'a [f32]),
    /// Widened exactly.
    F16(&'a [f16]),
    /// Widened exactly.
    BF16(&'a [bf16]),
}

impl PanelSlice<'_> {
    fn len(&self) -> usize {
        match self {
            PanelSlice::F32(s) => s.len(),
            PanelSlice::F16(s) => s.len(),
            PanelSlice::BF16(s) => s.len(),
        }
    }
}

/// Which rows of an A block a product takes: `count` runs of `len` rows that
/// follow each other, `step` rows from the start of one run to the next.
#[derive(Clone, Copy)]
pub struct Runs {
    /// Number of runs.
    pub count: usize,
    /// Rows of a run.
    pub len: usize,
    /// Rows from run to run.
    pub step: usize,
}

impl Runs {
    /// The first `rows` rows.
    pub fn one(rows: usize) -> Self {
        Self { count: 1, len: rows, step: rows }
    }
}

/// `c (+)= a · b` for one panel block and all rows of an A block.
pub struct PanelProduct<'a> {
    /// Rows of `kc ≤ A_STRIDE` values, `A_STRIDE` apart.
    pub a: &'a [f32],
    /// Which of them.
    pub runs: Runs,
    /// Depth of the block.
    pub kc: usize,
    /// `kc × PANEL` weights.
    pub b: PanelSlice<'a>,
    /// What will be needed next; fetched ahead.
    pub next: &'a [u8],
    /// Room for `kc × PANEL` widened weights.
    pub wide: &'a mut [f32],
    /// `[run][row][PANEL]` results.
    pub c: &'a mut [f32],
    /// Add to `c` instead of overwriting it.
    pub accumulate: bool,
}

impl Kernel for PanelProduct<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { a, runs, kc, b, next, wide, c, accumulate } = self;
        assert!(runs.count > 0 && runs.len > 0 && kc <= A_STRIDE);
        assert!(a.len() >= ((runs.count - 1) * runs.step + runs.len - 1) * A_STRIDE + kc);
        assert!(b.len() == kc * PANEL && wide.len() >= kc * PANEL);
        assert!(c.len() >= runs.count * runs.len * PANEL);
        // SAFETY: the lengths were checked above; tiles cover rows 0..len of each run.
        unsafe {
            let b = widen::<S>(b, wide);
            let tiles = runs.len.div_ceil(S::ROWS);
            let (base, longer) = (runs.len / tiles, runs.len % tiles);
            // Fetched evenly while the tiles are computed: a burst would stall.
            let ahead = next.len().div_ceil(runs.count * tiles * kc.max(1));
            let mut next = next.as_ptr();
            for run in 0..runs.count {
                let mut row = 0;
                for t in 0..tiles {
                    let r = base + usize::from(t < longer);
                    let tile = Tile {
                        a: a.as_ptr().add((run * runs.step + row) * A_STRIDE),
                        a_step: 1,
                        b,
                        kc,
                        c: c.as_mut_ptr().add((run * runs.len + row) * PANEL),
                        accumulate,
                        next,
                        next_step: ahead,
                    };
                    if ahead > 0 {
                        tile_of::<S, A_STRIDE, true>(r, tile);
                    } else {
                        tile_of::<S, A_STRIDE, false>(r, tile);
                    }
                    next = next.wrapping_add(kc * ahead);
                    row += r;
                }
            }
        }
    }
}

/// # Safety
/// `wide` must have room for all of `b`.
#[inline(always)]
unsafe fn widen<S: Simd>(b: PanelSlice<'_>, wide: &mut [f32]) -> *const f32 {
    let n = b.len();
    let to = wide.as_mut_ptr();
    // SAFETY: panel lengths are multiples of 32, hence of the lanes.
    unsafe {
        match b {
            PanelSlice::F32(s) => return s.as_ptr(),
            PanelSlice::F16(s) => {
                for i in (0..n).step_by(S::LANES) {
                    S::store(to.add(i), S::load_f16(s.as_ptr().add(i).cast()));
                }
            }
            PanelSlice::BF16(s) => {
                for i in (0..n).step_by(S::LANES) {
                    S::store(to.add(i), S::load_bf16(s.as_ptr().add(i).cast()));
                }
            }
        }
    }
    to
}

/// Operands of one register tile.
#[derive(Clone, Copy)]
pub struct Tile {
    /// First value of the tile's first row.
    pub a: *const f32,
    /// Distance between consecutive k.
    pub a_step: usize,
    /// `kc` rows of `PANEL` values.
    pub b: *const f32,
    /// Depth.
    pub kc: usize,
    /// Rows of `PANEL` results.
    pub c: *mut f32,
    /// Add to `c` instead of overwriting it.
    pub accumulate: bool,
    /// What to fetch ahead …
    pub next: *const u8,
    /// … and how many bytes further at each k.
    pub next_step: usize,
}

/// A tile of `rows ≤ S::ROWS` rows, `ROW` apart in A.
///
/// # Safety
/// The CPU must have the instructions of `S`; pointers must be valid for the
/// extents that [`Tile`] names.
#[inline(always)]
pub unsafe fn tile_of<S: Simd, const ROW: usize, const FETCH: bool>(rows: usize, t: Tile) {
    macro_rules! by_rows {
        ($($r:literal)*) => {
            match rows {
                // SAFETY: the function's contract.
                $($r if $r <= S::ROWS => unsafe { tile::<S, $r, ROW, FETCH>(t) },)*
                _ => unreachable!("tile of {rows} rows"),
            }
        };
    }
    by_rows!(1 2 3 4 5 6 7 8 9 10 11 12 13 14)
}

/// # Safety
/// As [`tile_of`] with `R` rows.
#[inline(always)]
unsafe fn tile<S: Simd, const R: usize, const ROW: usize, const FETCH: bool>(t: Tile) {
    let mut column = 0;
    let mut next = t.next;
    while column < PANEL {
        // SAFETY: the function's contract; column + 2·lanes ≤ PANEL.
        unsafe {
            let zero = S::splat(0.0);
            let mut acc = [[zero; 2]; R];
            let (mut a, mut b) = (t.a, t.b.add(column));
            for _ in 0..t.kc {
                let (b0, b1) = (S::load(b), S::load(b.add(S::LANES)));
                for (r, acc) in acc.iter_mut().enumerate() {
                    let x = S::splat(*a.add(r * ROW));
                    acc[0] = S::fma(x, b0, acc[0]);
                    acc[1] = S::fma(x, b1, acc[1]);
                }
                if FETCH {
                    S::prefetch(next);
                    next = next.wrapping_add(t.next_step);
                }
                a = a.add(t.a_step);
                b = b.add(PANEL);
            }
            for (r, acc) in acc.iter().enumerate() {
                let c = t.c.add(r * PANEL + column);
                if t.accumulate {
                    S::store(c, S::add(S::load(c), acc[0]));
                    S::store(c.add(S::LANES), S::add(S::load(c.add(S::LANES)), acc[1]));
                } else {
                    S::store(c, acc[0]);
                    S::store(c.add(S::LANES), acc[1]);
                }
            }
        }
        column += 2 * S::LANES;
    }
}
