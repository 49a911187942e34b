//! Which instruction set the kernels run on, decided once per process.

use std::sync::OnceLock;

/// Instruction-set tier of the bf16 kernels, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Tier {
    /// AMX tile products (1,024 FLOP per cycle and core) with AVX-512 epilogues.
    Amx,
    /// `vdpbf16ps` on 512-bit registers.
    Avx512Bf16,
    /// Plain Rust on any CPU.
    Portable,
}

impl Tier {
    /// The best tier this process may use.
    ///
    /// AMX needs CPUID leaf 7 (EDX bits 22 and 24) *and* the kernel's
    /// permission for the tile data state, which a virtual machine or an old
    /// kernel may refuse; the request is made once and covers all threads.
    pub fn detect() -> Tier {
        static FOUND: OnceLock<Tier> = OnceLock::new();
        *FOUND.get_or_init(|| {
            if has_amx() {
                Tier::Amx
            } else if has_avx512_bf16() {
                Tier::Avx512Bf16
            } else {
                Tier::Portable
            }
        })
    }

    /// Whether this process may run kernels of this tier.
    pub fn is_available(self) -> bool {
        match (self, Tier::detect()) {
            (Tier::Portable, _) | (_, Tier::Amx) => true,
            (Tier::Avx512Bf16, best) => best == Tier::Avx512Bf16,
            (Tier::Amx, _) => false,
        }
    }

    /// Every tier this process may run, best first.
    pub fn available() -> impl Iterator<Item = Tier> {
        [Tier::Amx, Tier::Avx512Bf16, Tier::Portable].into_iter().filter(|t| t.is_available())
    }

    /// This tier, or the best available one below it: the kernels call it on
    /// entry, so that a caller can never reach an instruction the CPU lacks.
    pub(super) fn or_available(self) -> Tier {
        if self.is_available() { self } else { Tier::detect() }
    }
}

#[cfg(target_arch = "x86_64")]
fn has_avx512_bf16() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512bf16")
}

#[cfg(target_arch = "x86_64")]
fn has_amx() -> bool {
    has_avx512_bf16() && super::amx::is_supported()
}

#[cfg(not(target_arch = "x86_64"))]
fn has_avx512_bf16() -> bool {
    false
}

#[cfg(not(target_arch = "x86_64"))]
fn has_amx() -> bool {
    false
}
