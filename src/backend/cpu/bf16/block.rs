//! The innermost product: up to 32 × 32 outputs over a run of k-steps, and the
//! one place that picks the tier's kernel.
//!
//! ```text
//!            B: per k-step 1 or 2 tiles of 16 k-pairs × 16 columns (1 KiB each)
//!            ┌───────────┬───────────┐
//! A tile 0   │   C 0,0   │   C 0,1   │   A tile: 16 rows × 32 values, rows
//! 16 × 32    ├───────────┼───────────┤   `row_stride` bytes apart, at
//! A tile 1   │   C 1,0   │   C 1,1   │   `a[i] + k_offsets[step]`
//!            └───────────┴───────────┘
//! ```
//!
//! A is addressed indirectly: a table of byte offsets, one a k-step, shared by
//! all rows. A packed panel, a plain matrix and a convolution's window over an
//! image are then the same operand, and a convolution needs no im2col.

use super::tier::Tier;

/// Values of k that one step multiplies.
pub(super) const K_STEP: usize = 32;
/// Rows of an A tile, columns of a B tile.
pub(super) const TILE: usize = 16;
/// Bytes of a B tile.
pub(super) const TILE_BYTES: usize = 1024;
/// Rows and columns of a block.
pub(super) const BLOCK: usize = 2 * TILE;

/// One block product. The layout is fixed because assembly reads it.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct BlockArgs {
    /// First rows of the A tiles; `a[1]` counts only if `row_tiles` is 2.
    pub a: [*const u8; 2],
    /// Bytes from one row of an A tile to the next.
    pub row_stride: usize,
    /// Byte offset of each k-step from the first row's start.
    pub k_offsets: *const u32,
    /// Number of k-steps.
    pub k_steps: usize,
    /// B tiles, `column_tiles` for each k-step, without gaps.
    pub b: *const u8,
    /// Row-major f32 block.
    pub c: *mut f32,
    /// Bytes from one row of C to the next.
    pub c_stride: usize,
    /// Where to start prefetching into the second-level cache.
    pub prefetch: *const u8,
    /// Adds to C instead of overwriting it, if not 0.
    pub accumulate: usize,
    /// Cache lines to prefetch each k-step (0, 2, 8 or 32).
    pub prefetch_lines: usize,
    /// 1 or 2.
    pub row_tiles: usize,
    /// 1 or 2.
    pub column_tiles: usize,
}

/// Computes one block.
///
/// # Safety
///
/// The tier is available; on [`Tier::Amx`] the thread holds a
/// [`TileSession`]. All addresses of A (16 rows a tile), B and C that the
/// arguments describe are valid; C is exclusive.
#[inline(always)]
pub(super) unsafe fn multiply_block(tier: Tier, args: &BlockArgs) {
    match tier {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: passed on from the caller.
        Tier::Amx => unsafe { super::amx::block(args) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: passed on from the caller.
        Tier::Avx512Bf16 => unsafe { super::avx512::block(args) },
        // SAFETY: passed on from the caller.
        _ => unsafe { super::portable::block(args) },
    }
}

/// Tile registers configured for this thread while it lives.
///
/// Held for one task of a parallel region, not for the life of a worker: a
/// thread with live tile data carries 8 KiB more through every context switch.
pub(super) struct TileSession {
    is_configured: bool,
}

impl TileSession {
    /// Configures the tiles if the tier has them.
    pub fn new(tier: Tier) -> TileSession {
        #[cfg(target_arch = "x86_64")]
        if tier == Tier::Amx && Tier::Amx.is_available() {
            // SAFETY: the tier is available, so the state may be used.
            unsafe { super::amx::configure() };
            return TileSession { is_configured: true };
        }
        let _ = tier;
        TileSession { is_configured: false }
    }
}

impl Drop for TileSession {
    fn drop(&mut self) {
        #[cfg(target_arch = "x86_64")]
        if self.is_configured {
            // SAFETY: configured on this thread by `new`.
            unsafe { super::amx::release() };
        }
        let _ = self.is_configured;
    }
}
