//! Element by element: activations and linear combinations.

use super::element::Element;
use super::finish::{read, write};
use super::{Kernel, Simd, math};
use crate::tensor::Activation;

/// `out = act(x)`.
pub struct Activate<'a, E> {
    /// Input.
    pub x: &'a [E],
    /// Activation.
    pub act: Activation,
    /// Output, as long as the input.
    pub out: &'a mut [E],
}

impl<E: Element> Kernel for Activate<'_, E> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: passed on. One loop for each activation keeps the choice out of it.
        unsafe {
            match self.act {
                Activation::None => self.map::<S>(|v| v),
                Activation::Silu => self.map::<S>(|v| math::silu::<S>(v)),
                Activation::Gelu => self.map::<S>(|v| math::gelu::<S>(v)),
                Activation::QuickGelu => self.map::<S>(|v| math::quick_gelu::<S>(v)),
                Activation::Relu => self.map::<S>(|v| math::relu::<S>(v)),
                Activation::LeakyRelu => self.map::<S>(|v| math::leaky_relu::<S>(v)),
            }
        }
    }
}

impl<E: Element> Activate<'_, E> {
    /// # Safety
    /// The CPU must have the instructions of `S`.
    #[inline(always)]
    unsafe fn map<S: Simd>(self, f: impl Fn(S::V) -> S::V) {
        let n = self.out.len();
        assert_eq!(self.x.len(), n);
        for i in (0..n).step_by(S::LANES) {
            let part = (n - i).min(S::LANES);
            // SAFETY: i + part ≤ n, the length of both.
            unsafe { write::<S, E>(self.out, i, part, f(read::<S, E>(self.x, i, part))) };
        }
    }
}

/// `out = a·x + b·y`.
pub struct Axpby<'a, E> {
    /// Factor of `x`.
    pub a: f32,
    /// First input.
    pub x: &'a [E],
    /// Factor of `y`.
    pub b: f32,
    /// Second input.
    pub y: &'a [E],
    /// Output, as long as the inputs.
    pub out: &'a mut [E],
}

impl<E: Element> Kernel for Axpby<'_, E> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let n = self.out.len();
        assert!(self.x.len() == n && self.y.len() == n);
        for i in (0..n).step_by(S::LANES) {
            let part = (n - i).min(S::LANES);
            // SAFETY: i + part ≤ n, the length of all three.
            unsafe {
                let by = S::mul(S::splat(self.b), read::<S, E>(self.y, i, part));
                let v = S::fma(S::splat(self.a), read::<S, E>(self.x, i, part), by);
                write::<S, E>(self.out, i, part, v);
            }
        }
    }
}
