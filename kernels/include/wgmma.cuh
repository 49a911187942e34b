// wgmma.cuh: the warpgroup matrix instructions of sm_90a as functions ("Asynchronous warpgroup-level matrix
// instructions"). Under nvcc inline assembly, under g++ the emulation in ../simt.
#pragma once
#include "ptx.cuh"

// "Matrix descriptor format" for a K-major tile of 128-byte rows with the 128-byte swizzle, 1024-byte aligned:
// 8-row groups follow each other every 1024 bytes. Step along K by adding bytes to `p`.
PTX uint64_t wgmma_desc_k128(const void* p, int byte_offset SIMT_LOC) {
#ifdef __CUDACC__
    uint64_t addr = smem_u32(p) + byte_offset;
#else
    uint64_t addr = simt::smem_u32(p, at) + byte_offset;
#endif
    return (addr & 0x3ffff) >> 4 | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}
PTX void wgmma_fence(SIMT_LOC1) {
#ifdef __CUDACC__
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
    ptx::wgmma_fence(at);
#endif
}
PTX void wgmma_commit(SIMT_LOC1) {
#ifdef __CUDACC__
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
    ptx::wgmma_commit(at);
#endif
}
template <int N> PTX void wgmma_wait(SIMT_LOC1) {
#ifdef __CUDACC__
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
#else
    ptx::wgmma_wait(N, at);
#endif
}

// Keeps the compiler from moving uses of registers across an asynchronous instruction or its wait: the assembly of
// those does not name the registers.
template <int N> PTX void wgmma_pin(float (&d)[N]) {
#ifdef __CUDACC__
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
#endif
}
template <int N> PTX void wgmma_pin(uint32_t (&a)[N][4]) {
#ifdef __CUDACC__
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+r"(a[i][0]), "+r"(a[i][1]), "+r"(a[i][2]), "+r"(a[i][3])::"memory");
#endif
}

// "wgmma.mma_async", both operands in shared memory: d (+)= a * b with a 64x16 and b 16xN, both K-major. Thread t of the
// warpgroup holds in d[i] row 16*(t/32) + t%32/4 + 8*(i/2%2), column 8*(i/4) + 2*(t%4) + i%2.
template <class T, int N> PTX void wgmma_m64k16(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate SIMT_LOC);
#ifdef __CUDACC__
#define WGMMA_D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define WGMMA_D16(i) WGMMA_D8(i), WGMMA_D8(i + 8)
#define WGMMA_D32(i) WGMMA_D16(i), WGMMA_D16(i + 16)
#define WGMMA_D64(i) WGMMA_D32(i), WGMMA_D32(i + 32)
#define WGMMA_R0 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define WGMMA_R32 "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define WGMMA_R64 "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define WGMMA_R80 "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define WGMMA_R96 "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
// registers: the list of d in the instruction; outs: the same as constraints; a, b, p: the numbers of the operands behind them
#define WGMMA_SS(T, type, n, registers, outs, a_index, b_index, p_index)                                                  \
    template <> PTX void wgmma_m64k16<T, n>(float (&d)[n / 2], uint64_t a, uint64_t b, bool accumulate) {                 \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p_index ", 0;\n"                                              \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type                                      \
                     " {" registers "}, %" #a_index ", %" #b_index ", p, 1, 1, 0, 0;\n}"                                  \
                     : outs : "l"(a), "l"(b), "r"(int(accumulate)));                                                      \
    }
#define WGMMA_LIST(...) __VA_ARGS__
#define WGMMA_SS_ALL(T, type)                                                                                             \
    WGMMA_SS(T, type, 64, WGMMA_R0, WGMMA_D32(0), 32, 33, 34)                                                             \
    WGMMA_SS(T, type, 128, WGMMA_R0 "," WGMMA_R32, WGMMA_D64(0), 64, 65, 66)                                              \
    WGMMA_SS(T, type, 160, WGMMA_R0 "," WGMMA_R32 "," WGMMA_R64, WGMMA_LIST(WGMMA_D64(0), WGMMA_D16(64)), 80, 81, 82)     \
    WGMMA_SS(T, type, 256, WGMMA_R0 "," WGMMA_R32 "," WGMMA_R64 "," WGMMA_R80 "," WGMMA_R96,                              \
             WGMMA_LIST(WGMMA_D64(0), WGMMA_D64(64)), 128, 129, 130)
WGMMA_SS_ALL(__half, "f16")
WGMMA_SS_ALL(__nv_bfloat16, "bf16")
#else
template <class T, int N> PTX void wgmma_m64k16(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate, simt::Loc at) {
    ptx::wgmma(d, N, a, b, accumulate, std::is_same_v<T, __nv_bfloat16>, at);
}
#endif
