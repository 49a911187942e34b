//! Storage types of activations: `f32` and `bf16`, computed with as `f32`.

use half::bf16;

use super::{Kernel, Simd};
use crate::tensor::DType;

/// An element type that activations are stored in.
pub trait Element: bytemuck::Pod + Send + Sync {
    /// Its name.
    const DTYPE: DType;
    /// The value.
    fn to_f32(self) -> f32;
    /// The nearest element.
    fn from_f32(x: f32) -> Self;
    /// Reads a vector.
    ///
    /// # Safety
    /// The CPU must have the instructions of `S`, `p` must be valid for
    /// `S::LANES` elements.
    unsafe fn load<S: Simd>(p: *const Self) -> S::V;
    /// Writes a vector.
    ///
    /// # Safety
    /// As [`Element::load`].
    unsafe fn store<S: Simd>(p: *mut Self, v: S::V);

    /// Writes a vector past the caches, see [`Simd::stream`].
    ///
    /// # Safety
    /// As [`Element::load`].
    #[inline(always)]
    unsafe fn stream<S: Simd>(p: *mut Self, v: S::V) {
        // SAFETY: the function's contract.
        unsafe { Self::store::<S>(p, v) }
    }

    /// Reads `n < S::LANES` elements, the other lanes are zero.
    ///
    /// # Safety
    /// As [`Element::load`], for `n` elements.
    #[inline(always)]
    unsafe fn load_part<S: Simd>(p: *const Self, n: usize) -> S::V {
        let mut lanes = [0f32; 16];
        for (i, lane) in lanes.iter_mut().enumerate().take(n) {
            // SAFETY: i < n.
            *lane = unsafe { *p.add(i) }.to_f32();
        }
        // SAFETY: vectors have at most 16 lanes.
        unsafe { S::load(lanes.as_ptr()) }
    }

    /// Writes the first `n < S::LANES` elements.
    ///
    /// # Safety
    /// As [`Element::load`], for `n` elements.
    #[inline(always)]
    unsafe fn store_part<S: Simd>(p: *mut Self, n: usize, v: S::V) {
        let mut lanes = [0f32; 16];
        // SAFETY: vectors have at most 16 lanes.
        unsafe { S::store(lanes.as_mut_ptr(), v) };
        for (i, lane) in lanes.iter().enumerate().take(n) {
            // SAFETY: i < n.
            unsafe { *p.add(i) = Self::from_f32(*lane) };
        }
    }

    /// Copies elements to `f32`.
    fn widen_into(isa: super::Isa, from: &[Self], to: &mut [f32]) {
        isa.launch(Widen { from, to });
    }

    /// Copies `f32` to elements.
    fn narrow_into(isa: super::Isa, from: &[f32], to: &mut [Self]) {
        isa.launch(Narrow { from, to });
    }
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(x: f32) -> f32 {
        x
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const f32) -> S::V {
        // SAFETY: the trait's contract.
        unsafe { S::load(p) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(p: *mut f32, v: S::V) {
        // SAFETY: the trait's contract.
        unsafe { S::store(p, v) }
    }
    #[inline(always)]
    unsafe fn stream<S: Simd>(p: *mut f32, v: S::V) {
        // SAFETY: the trait's contract.
        unsafe { S::stream(p, v) }
    }
    #[inline(always)]
    unsafe fn load_part<S: Simd>(p: *const f32, n: usize) -> S::V {
        // SAFETY: the trait's contract.
        unsafe { S::load_part(p, n) }
    }
    #[inline(always)]
    unsafe fn store_part<S: Simd>(p: *mut f32, n: usize, v: S::V) {
        // SAFETY: the trait's contract.
        unsafe { S::store_part(p, n, v) }
    }
    fn widen_into(_isa: super::Isa, from: &[f32], to: &mut [f32]) {
        to.copy_from_slice(from);
    }
    fn narrow_into(_isa: super::Isa, from: &[f32], to: &mut [f32]) {
        to.copy_from_slice(from);
    }
}

impl Element for bf16 {
    const DTYPE: DType = DType::BF16;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
    #[inline(always)]
    fn from_f32(x: f32) -> bf16 {
        bf16::from_f32(x)
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const bf16) -> S::V {
        // SAFETY: the trait's contract; bf16 is a transparent u16.
        unsafe { S::load_bf16(p.cast()) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(p: *mut bf16, v: S::V) {
        // SAFETY: the trait's contract; bf16 is a transparent u16.
        unsafe { S::store_bf16(p.cast(), v) }
    }
}

struct Widen<'a, E> {
    from: &'a [E],
    to: &'a mut [f32],
}

impl<E: Element> Kernel for Widen<'_, E> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        assert_eq!(self.from.len(), self.to.len());
        let n = self.from.len();
        let mut i = 0;
        // SAFETY: i + lanes ≤ n in the loop and i + rest = n behind it.
        unsafe {
            while i + S::LANES <= n {
                S::store(self.to.as_mut_ptr().add(i), E::load::<S>(self.from.as_ptr().add(i)));
                i += S::LANES;
            }
            if i < n {
                let v = E::load_part::<S>(self.from.as_ptr().add(i), n - i);
                S::store_part(self.to.as_mut_ptr().add(i), n - i, v);
            }
        }
    }
}

struct Narrow<'a, E> {
    from: &'a [f32],
    to: &'a mut [E],
}

impl<E: Element> Kernel for Narrow<'_, E> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        assert_eq!(self.from.len(), self.to.len());
        let n = self.from.len();
        for i in (0..n).step_by(S::LANES) {
            let part = (n - i).min(S::LANES);
            // SAFETY: i + part ≤ n, the length of both.
            unsafe {
                let v = super::finish::read::<S, f32>(self.from, i, part);
                super::finish::write::<S, E>(self.to, i, part, v);
            }
        }
    }
}
