//! Vector leaves of the CPU backend: the only place with `unsafe`.
//!
//! Every inner loop is written once, generic over [`Simd`] (a vector of
//! `f32`), as a type that implements [`Kernel`]. [`Isa::launch`] runs it inside a
//! function compiled for the instruction set found at run time, into which
//! the whole loop is inlined. One algorithm, thin leaves for each ISA: a new
//! instruction set is one file with some twenty one-line functions.
//!
//! Kernels own slices, check their lengths once on entry and then go through
//! raw pointers; callers need no `unsafe`.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

pub mod attend;
pub mod attend_pack;
pub mod element;
pub mod finish;
pub mod map;
pub mod math;
pub mod norm;
pub mod product;
pub mod shared;

/// A vector of `f32` lanes and the operations that the kernels are made of.
///
/// # Safety
/// Implementations may use instructions that not every CPU has: functions may
/// be called only on a CPU with the instruction set, and pointers must be
/// valid for the lanes that a function names. All are `inline(always)`.
pub unsafe trait Simd: Copy + 'static {
    /// Lanes of a vector.
    const LANES: usize;
    /// Rows of a register tile of products (times two vectors).
    const ROWS: usize;
    /// The vector.
    type V: Copy;

    /// All lanes `x`.
    unsafe fn splat(x: f32) -> Self::V;
    /// Reads `LANES` values.
    unsafe fn load(p: *const f32) -> Self::V;
    /// Reads `n < LANES` values, the other lanes are zero.
    unsafe fn load_part(p: *const f32, n: usize) -> Self::V;
    /// Writes `LANES` values.
    unsafe fn store(p: *mut f32, v: Self::V);
    /// Writes `LANES` values past the caches where the CPU can and `p` is aligned;
    /// [`Simd::fence`] must follow before other threads read.
    #[inline(always)]
    unsafe fn stream(p: *mut f32, v: Self::V) {
        // SAFETY: the trait's contract.
        unsafe { Self::store(p, v) }
    }
    /// Orders streamed writes before later ones.
    #[inline(always)]
    unsafe fn fence() {}
    /// Writes the first `n < LANES` values.
    unsafe fn store_part(p: *mut f32, n: usize, v: Self::V);
    /// Reads `LANES` IEEE half values.
    unsafe fn load_f16(p: *const u16) -> Self::V;
    /// Reads `LANES` brain floats.
    unsafe fn load_bf16(p: *const u16) -> Self::V;
    /// Writes `LANES` brain floats, rounded to nearest even.
    unsafe fn store_bf16(p: *mut u16, v: Self::V);
    /// a + b
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    /// a − b
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    /// a · b
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// a / b
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    /// 1 / a for normal a and 1/a, within one unit in the last place.
    #[inline(always)]
    unsafe fn recip(a: Self::V) -> Self::V {
        // SAFETY: the trait's contract.
        unsafe { Self::div(Self::splat(1.0), a) }
    }
    /// a · b + c, rounded once where the CPU can
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger; `b` if one of them is NaN.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// The smaller; `b` if one of them is NaN.
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    /// |a|
    unsafe fn abs(a: Self::V) -> Self::V;
    /// Whether any lane has `a < b`.
    unsafe fn any_less(a: Self::V, b: Self::V) -> bool;
    /// `v · 2^n`, where `magic` is `n + 1.5·2²³` (so `n` stands in its low bits)
    /// and both `v` and the result are normal numbers.
    unsafe fn scale_by_power(v: Self::V, magic: Self::V) -> Self::V;
    /// Sum of the lanes, in one fixed order.
    unsafe fn sum(v: Self::V) -> f32;
    /// Transposes a block of `b.rows × b.columns ≤ LANES × LANES` values: for each
    /// column, in order, `LANES` values are written at `b.to_stride` (missing rows
    /// are zero; what lies behind is overwritten too).
    unsafe fn transpose(b: Block);
    /// Asks for the cache line at `p` to be fetched into the second-level cache.
    unsafe fn prefetch(p: *const u8);
}

/// Operands of [`Simd::transpose`].
#[derive(Clone, Copy)]
pub struct Block {
    /// First value.
    pub from: *const f32,
    /// Distance between rows.
    pub stride: usize,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub columns: usize,
    /// Multiplies every value.
    pub factor: f32,
    /// First result.
    pub to: *mut f32,
    /// Distance between results.
    pub to_stride: usize,
}

/// A leaf loop, generic over the vector type.
pub trait Kernel {
    /// What it returns.
    type Output;

    /// Runs the loop; must be `inline(always)` with all that it calls.
    ///
    /// # Safety
    /// The CPU must have the instructions of `S`.
    unsafe fn run<S: Simd>(self) -> Self::Output;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

/// An instruction set that this CPU has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(Level);

impl Isa {
    /// All that this CPU has, best first.
    pub fn available() -> Vec<Self> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
            {
                found.push(Self(Level::Avx512));
            }
            if is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c")
            {
                found.push(Self(Level::Avx2));
            }
        }
        found.push(Self(Level::Portable));
        found
    }

    /// The best that this CPU has.
    pub fn best() -> Self {
        Self::available().first().copied().unwrap_or(Self(Level::Portable))
    }

    /// Name for people.
    pub fn name(self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => "AVX-512",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => "AVX2",
            Level::Portable => "portable",
        }
    }

    /// Whether vectors are 512 bits wide.
    pub fn has_wide_vectors(self) -> bool {
        self.name() == "AVX-512"
    }

    /// Rows of a register tile.
    pub fn tile_rows(self) -> usize {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => <avx512::Avx512 as Simd>::ROWS,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => <avx2::Avx2 as Simd>::ROWS,
            Level::Portable => <portable::Portable as Simd>::ROWS,
        }
    }

    /// Runs a kernel with this instruction set.
    pub fn launch<K: Kernel>(self, kernel: K) -> K::Output {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a level exists only where `available` found its features.
            Level::Avx512 => unsafe { avx512::launch(kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Level::Avx2 => unsafe { avx2::launch(kernel) },
            // SAFETY: needs nothing beyond the compilation target.
            Level::Portable => unsafe { kernel.run::<portable::Portable>() },
        }
    }
}
