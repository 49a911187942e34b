//! Minimax polynomials shared by the tiers (Remez exchange on relative error).

/// 2^f on [0, 1), relative error 7.5e-8.
#[cfg(target_arch = "x86_64")]
pub(super) const EXP2: [f32; 6] =
    [0.999_999_94, 0.693_153_1, 0.240_153_61, 0.055_826_32, 0.008_989_338, 0.001_877_577_9];

/// 2^f on [0, 1), relative error 2.6e-6: for probabilities rounded to bf16.
#[cfg(target_arch = "x86_64")]
pub(super) const EXP2_SHORT: [f32; 5] =
    [1.000_002_6, 0.693_003_83, 0.241_442_75, 0.052_011_46, 0.013_534_169];

/// 2^f on [−½, ½], relative error 2.6e-6.
#[cfg(target_arch = "x86_64")]
pub(super) const EXP2_CENTRED: [f32; 5] =
    [0.999_999_3, 0.693_121_8, 0.240_247_44, 0.055_917_863, 0.009_570_102];

/// ½·exp(z²)·erfc(z) = t·(c₀ + c₁t + …), t = 1/(1 + 0.4 z), 0 ≤ z ≤ 10;
/// relative error 2.7e-6.
pub(super) const ERFCX: [f32; 7] =
    [0.112_962_36, 0.111_113_414, 0.112_620_38, 0.066_837_88, 0.067_932_025, 0.069_461_13, -0.040_928_528];

/// 0.4 / √2: takes |x| instead of z = |x| / √2.
pub(super) const ERFCX_SCALE: f32 = 0.282_842_73;
