// wgmma_rs.cuh: the warpgroup matrix instructions of sm_90a with operand A in registers, as attention needs them
// ("Asynchronous warpgroup-level matrix instructions"; fence, commit and wait are in wgmma.cuh).
//
// Operand B lies in shared memory as TMA writes it with the 128-byte swizzle: panels of 64 columns, 128 bytes a row,
// rows one after the other, every panel 1024-byte aligned.
#pragma once
#include "wgmma.cuh"

// "Matrix descriptor format", 128-byte swizzle. `leading` and `stride` are the byte offsets of the canonical layouts:
// K-major (rows are columns of B): stride from 8 rows to the next 8, leading unused;
// MN-major (rows are k): stride from 8 rows to the next 8, leading from one panel of 64 columns to the next.
PTX uint64_t wgmma_b128_descriptor(const void* panel, uint32_t leading, uint32_t stride SIMT_LOC) {
#ifdef __CUDACC__
    const uint64_t address = smem_u32(panel);
#else
    const uint64_t address = simt::smem_u32(panel, at);
#endif
    return (address & 0x3ffff) >> 4 | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 | uint64_t(1) << 62;
}
// The descriptor of what lies `bytes` further on; shared addresses have 18 bits, so nothing carries out of the field.
PTX uint64_t wgmma_b128_advance(uint64_t descriptor, uint32_t bytes) { return descriptor + (bytes >> 4); }

// Work that x, never negative, depends on stays before the wait that follows in the source. Without a dependence the
// assembler moves waits up as far as it can, here above the exponentials that a product in flight should hide.
PTX void wgmma_wait_later(float x) {
#ifdef __CUDACC__
    asm volatile("{\n.reg .pred p;\nsetp.lt.f32 p, %0, 0f00000000;\n@p nanosleep.u32 20;\n}" ::"f"(x) : "memory");
#else
    (void)x;
#endif
}

// "wgmma.mma_async" with A in registers: d (+)= a * b, a 64x16, b 16xN; kMnMajor: rows of b in memory are k.
// With g = t%32/4 and c = t%4, thread t of the warpgroup holds of rows r = 16*(t/32) + g: a[0] = A[r][2c,2c+1],
// a[1] = A[r+8][same], a[2] = A[r][2c+8,2c+9], a[3] = A[r+8][same]; d[i] = D[r + 8*(i/2%2)][8*(i/4) + 2c + i%2].
// The registers of a must stay as they are until the wait.
template <class T, int N> struct WgmmaRegisterA;
#ifdef __CUDACC__
#define WGMMA_RS(T, type, n, registers, outs, a0, a1, a2, a3, b_index, p_index, t_index)                                   \
    template <> struct WgmmaRegisterA<T, n> {                                                                             \
        template <bool kMnMajor> static PTX void run(float (&d)[n / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) { \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p_index ", 0;\n"                                           \
                         "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" registers "}, "             \
                         "{%" #a0 ",%" #a1 ",%" #a2 ",%" #a3 "}, %" #b_index ", p, 1, 1, %" #t_index ";\n}"               \
                         : outs                                                                                           \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(kMnMajor))); \
        }                                                                                                                 \
    };
#define WGMMA_RS_LIST(...) __VA_ARGS__
#define WGMMA_RS_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WGMMA_RS_D8(i) WGMMA_RS_D4(i), WGMMA_RS_D4(i + 4)
#define WGMMA_RS_D16(i) WGMMA_RS_D8(i), WGMMA_RS_D8(i + 8)
#define WGMMA_RS_D32(i) WGMMA_RS_D16(i), WGMMA_RS_D16(i + 16)
#define WGMMA_RS_D64(i) WGMMA_RS_D32(i), WGMMA_RS_D32(i + 32)
#define WGMMA_Q0 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19"
#define WGMMA_Q20 "%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define WGMMA_Q32 "%32,%33,%34,%35,%36,%37,%38,%39"
#define WGMMA_Q40 "%40,%41,%42,%43,%44,%45,%46,%47"
#define WGMMA_Q48 "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define WGMMA_Q64 "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define WGMMA_Q80 "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define WGMMA_RS_ALL(T, type)                                                                                             \
    WGMMA_RS(T, type, 40, WGMMA_Q0, WGMMA_RS_LIST(WGMMA_RS_D16(0), WGMMA_RS_D4(16)), 20, 21, 22, 23, 24, 25, 26)                   \
    WGMMA_RS(T, type, 64, WGMMA_Q0 "," WGMMA_Q20, WGMMA_RS_D32(0), 32, 33, 34, 35, 36, 37, 38)                               \
    WGMMA_RS(T, type, 80, WGMMA_Q0 "," WGMMA_Q20 "," WGMMA_Q32, WGMMA_RS_LIST(WGMMA_RS_D32(0), WGMMA_RS_D8(32)),                   \
             40, 41, 42, 43, 44, 45, 46)                                                                                  \
    WGMMA_RS(T, type, 96, WGMMA_Q0 "," WGMMA_Q20 "," WGMMA_Q32 "," WGMMA_Q40, WGMMA_RS_LIST(WGMMA_RS_D32(0), WGMMA_RS_D16(32)),    \
             48, 49, 50, 51, 52, 53, 54)                                                                                  \
    WGMMA_RS(T, type, 128, WGMMA_Q0 "," WGMMA_Q20 "," WGMMA_Q32 "," WGMMA_Q40 "," WGMMA_Q48, WGMMA_RS_D64(0),                \
             64, 65, 66, 67, 68, 69, 70)                                                                                  \
    WGMMA_RS(T, type, 160, WGMMA_Q0 "," WGMMA_Q20 "," WGMMA_Q32 "," WGMMA_Q40 "," WGMMA_Q48 "," WGMMA_Q64,                \
             WGMMA_RS_LIST(WGMMA_RS_D64(0), WGMMA_RS_D16(64)), 80, 81, 82, 83, 84, 85, 86)                                \
    WGMMA_RS(T, type, 192, WGMMA_Q0 "," WGMMA_Q20 "," WGMMA_Q32 "," WGMMA_Q40 "," WGMMA_Q48 "," WGMMA_Q64 "," WGMMA_Q80,  \
             WGMMA_RS_LIST(WGMMA_RS_D64(0), WGMMA_RS_D32(64)), 96, 97, 98, 99, 100, 101, 102)
WGMMA_RS_ALL(__half, "f16")
WGMMA_RS_ALL(__nv_bfloat16, "bf16")
#endif
template <class T, int N, bool kMnMajor> PTX void wgmma_rs_m64k16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate SIMT_LOC) {
#ifdef __CUDACC__
    WgmmaRegisterA<T, N>::template run<kMnMajor>(d, a, b, accumulate);
#else
    ptx::wgmma_register_a(d, N, a, b, kMnMajor, accumulate, std::is_same_v<T, __nv_bfloat16>, at);
#endif
}
