//! Nonlinearities that are ops of their own: no epilogue of a product has them.
//!
//! Epilogues keep the functions that large networks are full of ([`Activation`](super::Activation)); these stand in
//! small ones, where a pass over memory more costs nothing.

/// A nonlinearity of [`Backend::curve`](super::Backend::curve).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Curve {
    /// x, or 0.01·x where x is negative
    LeakyRelu,
    /// x, or eˣ − 1 where x is negative
    Elu,
    /// x·min(max(x + 3, 0), 6)/6
    HardSwish,
    /// tanh x
    Tanh,
    /// 1/(1 + e⁻ˣ)
    Sigmoid,
    /// x/(1 + |x|)
    Softsign,
    /// x·tanh(ln(1 + eˣ))
    Mish,
}

impl Curve {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::LeakyRelu, Self::Elu, Self::HardSwish, Self::Tanh, Self::Sigmoid, Self::Softsign, Self::Mish];

    /// The value at `x`.
    pub fn value(self, x: f32) -> f32 {
        match self {
            Self::LeakyRelu => {
                if x > 0.0 {
                    x
                } else {
                    0.01 * x
                }
            }
            Self::Elu => {
                if x > 0.0 {
                    x
                } else {
                    x.exp_m1()
                }
            }
            Self::HardSwish => x * (x + 3.0).clamp(0.0, 6.0) / 6.0,
            Self::Tanh => x.tanh(),
            Self::Sigmoid => 1.0 / (1.0 + (-x).exp()),
            Self::Softsign => x / (1.0 + x.abs()),
            Self::Mish => x * (x.exp().ln_1p()).tanh(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Curve;

    /// Values of torch 2.15 at -2, -0.5 and 1.5.
    #[test]
    fn curves_are_those_of_torch() {
        let expected: [[f32; 3]; 7] = [
            [-0.02, -0.005, 1.5],
            [-0.864_664_7, -0.393_469_3, 1.5],
            [-0.333_333_34, -0.208_333_33, 1.125],
            [-0.964_027_6, -0.462_117_16, 0.905_148_3],
            [0.119_202_92, 0.377_540_7, 0.817_574_5],
            [-0.666_666_7, -0.333_333_34, 0.6],
            [-0.252_501_46, -0.220_743_76, 1.403_378_3],
        ];
        for (curve, expected) in Curve::ALL.into_iter().zip(expected) {
            for (x, want) in [-2.0, -0.5, 1.5].into_iter().zip(expected) {
                let got = curve.value(x);
                assert!((got - want).abs() < 1e-6, "{curve:?}({x}) = {got}, torch {want}");
            }
        }
    }
}
