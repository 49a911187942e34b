//! AMX leaf: tile configuration and the block product, in inline assembly.
//!
//! The AMX intrinsics are unstable; inline assembly with the tile registers as
//! clobbers is not. Tiles 0–3 hold C, 4–5 A, 6–7 B.
//!
//! Cycles (Intel optimization manual, ch. "AMX"): `tdpbf16ps` 16 for 16 rows,
//! `tileloadd` 8 from the first-level cache. A 2 × 2 block does four products
//! (64 cycles) for four loads (32 cycles, 4 KiB), so it is bound by the
//! products as long as half of the operands come from the first-level cache
//! and by the second level's ≈ 48 bytes a cycle otherwise.

use super::block::BlockArgs;
use std::arch::asm;
use std::mem::offset_of;

/// 64-byte tile configuration: palette 1, all tiles 16 rows of 64 bytes.
#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes_per_row: [u16; 16],
    rows: [u8; 16],
}

static CONFIG: TileConfig = TileConfig {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    bytes_per_row: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// Whether the CPU has bf16 tiles and the kernel lets this process use them.
#[cfg(target_os = "linux")]
pub(super) fn is_supported() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    const AMX_BF16_AND_TILE: u32 = 1 << 22 | 1 << 24;
    if __cpuid(0).eax < 7 || __cpuid_count(7, 0).edx & AMX_BF16_AND_TILE != AMX_BF16_AND_TILE {
        return false;
    }
    // SAFETY: asks for the permission of a register state; touches no memory.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

/// Only Linux hands out the tile state by a documented call.
#[cfg(not(target_os = "linux"))]
pub(super) fn is_supported() -> bool {
    false
}

/// Configures this thread's tiles.
///
/// # Safety
///
/// [`is_supported`] returned true.
pub(super) unsafe fn configure() {
    // SAFETY: a valid 64-byte configuration; the state is permitted.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &CONFIG, options(nostack, readonly, preserves_flags)) }
}

/// Returns this thread's tiles to their initial state.
///
/// # Safety
///
/// [`is_supported`] returned true.
pub(super) unsafe fn release() {
    // SAFETY: the state is permitted.
    unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) }
}

macro_rules! prefetch_text {
    (0) => {
        "/* no prefetch: {pf} */"
    };
    (2) => {
        "prefetcht1 [{pf}]\n prefetcht1 [{pf}+64]\n add {pf}, 128\n"
    };
    (8) => {
        concat!(
            "prefetcht1 [{pf}]\n prefetcht1 [{pf}+64]\n prefetcht1 [{pf}+128]\n prefetcht1 [{pf}+192]\n",
            "prefetcht1 [{pf}+256]\n prefetcht1 [{pf}+320]\n prefetcht1 [{pf}+384]\n",
            "prefetcht1 [{pf}+448]\n add {pf}, 512\n"
        )
    };
    (32) => {
        concat!(prefetch_text!(8), prefetch_text!(8), prefetch_text!(8), prefetch_text!(8))
    };
}

/// Defines one block kernel. `$load`, `$zero`, `$store` act on its C tiles
/// (`{p}` is C's corner, `{t}` its row stride, `{q}` row 16 of C).
macro_rules! block_kernel {
    ($name:ident, $prefetch:tt, zero: $zero:expr, load: $load:expr, store: $store:expr, step: $step:expr) => {
        unsafe fn $name(args: &BlockArgs) {
            // SAFETY: the caller vouches for every address and for the tiles.
            unsafe {
                asm!(
                    "cmp qword ptr [{args} + {o_acc}], 0",
                    "je 2f",
                    "mov {p}, [{args} + {o_c}]",
                    "mov {t}, [{args} + {o_ldc}]",
                    "mov {q}, {t}",
                    "shl {q}, 4",
                    "add {q}, {p}",
                    $load,
                    "jmp 3f",
                    "2:",
                    $zero,
                    "3:",
                    "xor {i:e}, {i:e}",
                    "4:",
                    "mov {t:e}, dword ptr [{koff} + {i}*4]",
                    "lea {p}, [{a0} + {t}]",
                    "add {t}, {a1}",
                    $step,
                    prefetch_text!($prefetch),
                    "inc {i}",
                    "cmp {i}, qword ptr [{args} + {o_steps}]",
                    "jb 4b",
                    "mov {p}, [{args} + {o_c}]",
                    "mov {t}, [{args} + {o_ldc}]",
                    "mov {q}, {t}",
                    "shl {q}, 4",
                    "add {q}, {p}",
                    $store,
                    args = in(reg) args,
                    a0 = in(reg) args.a[0],
                    a1 = in(reg) args.a[1],
                    sa = in(reg) args.row_stride,
                    koff = in(reg) args.k_offsets,
                    b = inout(reg) args.b => _,
                    s64 = in(reg) 64usize,
                    pf = inout(reg) args.prefetch => _,
                    i = out(reg) _,
                    t = out(reg) _,
                    p = out(reg) _,
                    q = out(reg) _,
                    o_acc = const offset_of!(BlockArgs, accumulate),
                    o_c = const offset_of!(BlockArgs, c),
                    o_ldc = const offset_of!(BlockArgs, c_stride),
                    o_steps = const offset_of!(BlockArgs, k_steps),
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }
    };
}

macro_rules! block_2x2 {
    ($name:ident, $prefetch:tt) => {
        block_kernel!($name, $prefetch,
            zero: "tilezero tmm0\n tilezero tmm1\n tilezero tmm2\n tilezero tmm3",
            load: "tileloadd tmm0, [{p} + {t}*1]\n tileloadd tmm1, [{p} + {t}*1 + 64]\n\
                   tileloadd tmm2, [{q} + {t}*1]\n tileloadd tmm3, [{q} + {t}*1 + 64]",
            store: "tilestored [{p} + {t}*1], tmm0\n tilestored [{p} + {t}*1 + 64], tmm1\n\
                    tilestored [{q} + {t}*1], tmm2\n tilestored [{q} + {t}*1 + 64], tmm3",
            step: "tileloadd tmm6, [{b} + {s64}*1]\n tileloadd tmm4, [{p} + {sa}*1]\n\
                   tileloadd tmm7, [{b} + {s64}*1 + 1024]\n tdpbf16ps tmm0, tmm4, tmm6\n\
                   tileloadd tmm5, [{t} + {sa}*1]\n tdpbf16ps tmm1, tmm4, tmm7\n\
                   tdpbf16ps tmm2, tmm5, tmm6\n tdpbf16ps tmm3, tmm5, tmm7\n add {b}, 2048\n");
    };
}

macro_rules! block_1x2 {
    ($name:ident, $prefetch:tt) => {
        block_kernel!($name, $prefetch,
            zero: "tilezero tmm0\n tilezero tmm1",
            load: "tileloadd tmm0, [{p} + {t}*1]\n tileloadd tmm1, [{p} + {t}*1 + 64]",
            store: "tilestored [{p} + {t}*1], tmm0\n tilestored [{p} + {t}*1 + 64], tmm1",
            step: "tileloadd tmm6, [{b} + {s64}*1]\n tileloadd tmm4, [{p} + {sa}*1]\n\
                   tileloadd tmm7, [{b} + {s64}*1 + 1024]\n tdpbf16ps tmm0, tmm4, tmm6\n\
                   tdpbf16ps tmm1, tmm4, tmm7\n add {b}, 2048\n");
    };
}

block_2x2!(block_2x2_p0, 0);
block_2x2!(block_2x2_p2, 2);
block_2x2!(block_2x2_p8, 8);
block_2x2!(block_2x2_p32, 32);
block_1x2!(block_1x2_p0, 0);
block_1x2!(block_1x2_p8, 8);
block_1x2!(block_1x2_p32, 32);
block_kernel!(block_2x1, 0,
    zero: "tilezero tmm0\n tilezero tmm2",
    load: "tileloadd tmm0, [{p} + {t}*1]\n tileloadd tmm2, [{q} + {t}*1]",
    store: "tilestored [{p} + {t}*1], tmm0\n tilestored [{q} + {t}*1], tmm2",
    step: "tileloadd tmm6, [{b} + {s64}*1]\n tileloadd tmm4, [{p} + {sa}*1]\n\
           tdpbf16ps tmm0, tmm4, tmm6\n tileloadd tmm5, [{t} + {sa}*1]\n\
           tdpbf16ps tmm2, tmm5, tmm6\n add {b}, 1024\n");
block_kernel!(block_1x1, 0,
    zero: "tilezero tmm0",
    load: "tileloadd tmm0, [{p} + {t}*1]",
    store: "tilestored [{p} + {t}*1], tmm0",
    step: "tileloadd tmm6, [{b} + {s64}*1]\n tileloadd tmm4, [{p} + {sa}*1]\n\
           tdpbf16ps tmm0, tmm4, tmm6\n add {b}, 1024\n");

/// [`multiply_block`](super::block::multiply_block) on tiles.
///
/// # Safety
///
/// As there; [`configure`] has run on this thread.
#[inline(always)]
pub(super) unsafe fn block(args: &BlockArgs) {
    // SAFETY: passed on from the caller.
    unsafe {
        match (args.row_tiles, args.column_tiles, args.prefetch_lines) {
            (2, 2, 0) => block_2x2_p0(args),
            (2, 2, 2) => block_2x2_p2(args),
            (2, 2, 8) => block_2x2_p8(args),
            (2, 2, _) => block_2x2_p32(args),
            (2, _, _) => block_2x1(args),
            (_, 2, 0) => block_1x2_p0(args),
            (_, 2, 2 | 8) => block_1x2_p8(args),
            (_, 2, _) => block_1x2_p32(args),
            _ => block_1x1(args),
        }
    }
}

/// `rounds` × 8 independent products on zeroed registers: the peak probe.
///
/// # Safety
///
/// [`configure`] has run on this thread.
pub(super) unsafe fn spin_products(rounds: u64) {
    // SAFETY: registers only.
    unsafe {
        asm!(
            "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
            "tilezero tmm4", "tilezero tmm5", "tilezero tmm6", "tilezero tmm7",
            "2:",
            "tdpbf16ps tmm0, tmm4, tmm6", "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6", "tdpbf16ps tmm3, tmm5, tmm7",
            "tdpbf16ps tmm0, tmm4, tmm6", "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6", "tdpbf16ps tmm3, tmm5, tmm7",
            "dec {n}",
            "jnz 2b",
            n = inout(reg) rounds.max(1) => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, nomem),
        );
    }
}
