//! Linear layers.

use super::super::Element;
use super::epilogue::Epilogue;
use crate::driver::DevicePtr;

/// `product = (x ‖ x2)·wᵀ` and the epilogue.
#[derive(Clone, Copy, Debug)]
pub struct Gemm {
    /// First operand, `[rows][x_pitch]`.
    pub x: DevicePtr,
    /// Elements from one row of `x` to the next.
    pub x_pitch: usize,
    /// Columns of `x`.
    pub k: usize,
    /// Columns `k` on of the first operand, `[rows][x2_pitch]`, or null.
    pub x2: DevicePtr,
    /// Elements from one row of `x2` to the next.
    pub x2_pitch: usize,
    /// Columns of `x2`.
    pub k2: usize,
    /// Weights, `[columns][w_pitch]`.
    pub w: DevicePtr,
    /// Elements from one row of `w` to the next.
    pub w_pitch: usize,
    /// Rows of the product.
    pub rows: usize,
    /// Columns of the product.
    pub columns: usize,
    /// Element type of operands, residual and time bias.
    pub element: Element,
    /// What happens to the product.
    pub epilogue: Epilogue,
}
