// simt.hpp: CUDA C++ for g++. A kernel source that includes ptx.cuh gets this header instead of nvcc's
// built-ins, and each CUDA thread then runs as a fiber (simt.cpp). Only what kernels use is here; add more
// as they need it, each with the rule of the CUDA programming guide that it follows.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstddef>
#include <cstring>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __forceinline__ inline __attribute__((always_inline))
// __shared__ is left undefined on purpose: shared memory comes from dynamic_smem<T>() (ptx.cuh), where it is
// poisoned, bounds-checked and race-checked.

// ---- vector types ------------------------------------------------------------------------------------
struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x = 1, y = 1, z = 1; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

// ---- half and bfloat16: storage and conversion only; kernels compute in float ---------------------------
struct __half { _Float16 v; };
struct alignas(4) __half2 { __half x, y; };
struct __nv_bfloat16 { uint16_t bits; };
inline float __half2float(__half h) { return (float)h.v; }
inline __half __float2half_rn(float f) { return {(_Float16)f}; }
inline float2 __half22float2(__half2 h) { return {(float)h.x.v, (float)h.y.v}; }
inline __half2 __floats2half2_rn(float x, float y) { return {{(_Float16)x}, {(_Float16)y}}; }
inline float __bfloat162float(__nv_bfloat16 b) {
    uint32_t u = (uint32_t)b.bits << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    if ((u & 0x7fffffff) > 0x7f800000) return {0x7fff};
    return {(uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}

// ---- device math ---------------------------------------------------------------------------------------
inline int __ffs(int x) { return __builtin_ffs(x); }
inline double sinpi(double x) { return sin(M_PI * x); }
inline double cospi(double x) { return cos(M_PI * x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float a, float b) { return a / b; }
// Never fused with what comes next: the result goes through memory that the compiler can't see into.
inline float __fmul_rn(float a, float b) {
    float product = a * b;
    asm("" : "+m"(product));
    return product;
}
inline float __fadd_rn(float a, float b) {
    float sum = a + b;
    asm("" : "+m"(sum));
    return sum;
}
inline void __sincosf(float x, float* s, float* c) { *s = sinf(x), *c = cosf(x); }
template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class T> T max(T a, T b) { return a < b ? b : a; }

// ---- the runtime's side ----------------------------------------------------------------------------------
namespace simt {

struct Loc {  // a place in a kernel source; as a default argument it names the caller's line
    const char* file;
    int line;
    static constexpr Loc here(const char* f = __builtin_FILE(), int l = __builtin_LINE()) { return {f, l}; }
};

struct Thread {  // what a kernel can see of its own fiber
    uint3 tid, bid;
    dim3 bdim, gdim;
    unsigned linear, warp, lane;
};
extern __thread Thread* self;

[[noreturn]] void fault(Loc at, const char* format, ...);  // ends the launch with this message

// A collective: every named thread brings `arg`; the last to arrive runs act(args, mask) for all of them, with
// args[i] what thread i of the warp (or warpgroup) brought; then all go on.
using Act = void (*)(void* const* args, unsigned mask);
void warp_collective(const char* op, unsigned mask, void* arg, Act act, Loc at);
void warpgroup_collective(const char* op, void* arg, Act act, Loc at);
void barrier_sync(int id, int threads, Loc at);  // threads 0: the whole block
void barrier_arrive(int id, int threads, Loc at);
void cluster_sync(Loc at);  // all threads of the cluster
void grid_wait();           // griddepcontrol.wait
unsigned cluster_rank();
void warp_fence(unsigned mask, Loc at);  // __syncwarp

void* smem_base();
uint32_t smem_u32(const void* p, Loc at);                  // address in the shared window
uint8_t* smem_at(uint32_t addr, unsigned bytes, Loc at);   // and back, with bounds and alignment checked

template <class T> T atomic_add(T* p, T v, Loc at);

// Kernels by file and name, with a thunk that unpacks CUDA's void** kernelParams.
struct Kernel {
    const char* file;  // the path of the source
    const char* name;
    void (*run)(void** params);
    int count;
    const uint32_t* sizes;
    Kernel* next;
    Kernel(const char* f, const char* n, void (*r)(void**), int c, const uint32_t* s);
};
template <auto F> struct Thunk;
template <class... A, void (*F)(A...)> struct Thunk<F> {
    static constexpr uint32_t sizes[sizeof...(A) + 1] = {sizeof(A)...};
    static constexpr int count = sizeof...(A);
    static void run(void** p) { call(p, std::index_sequence_for<A...>{}); }
    template <size_t... I> static void call(void** p, std::index_sequence<I...>) { F(load<A>(p[I])...); }
    template <class T> static T load(const void* p) {
        T t;
        memcpy(&t, p, sizeof t);
        return t;
    }
};
#define SIMT_KERNEL(f) static simt::Kernel simt_kernel_##f(__BASE_FILE__, #f, simt::Thunk<f>::run, simt::Thunk<f>::count, simt::Thunk<f>::sizes);

struct Shfl {
    uint64_t in, out;
    unsigned src;
};
void shfl_act(void* const* args, unsigned mask);
template <class T> T shfl(const char* op, unsigned mask, T v, unsigned src, Loc at) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
    Shfl s{0, 0, src};
    memcpy(&s.in, &v, sizeof v);
    warp_collective(op, mask, &s, shfl_act, at);
    memcpy(&v, &s.out, sizeof v);
    return v;
}
struct Shfl4 {
    uint32_t in[4], out[4];
    int src[4];
};
void shfl4_act(void* const* args, unsigned mask);
unsigned vote(const char* op, unsigned mask, bool predicate, Loc at);  // the ballot of the lanes in mask
}  // namespace simt

#define SIMT_LOC , simt::Loc at = simt::Loc::here()
#define SIMT_LOC1 simt::Loc at = simt::Loc::here()
#define SIMT_AT , at
#define threadIdx (simt::self->tid)
#define blockIdx (simt::self->bid)
#define blockDim (simt::self->bdim)
#define gridDim (simt::self->gdim)

// ---- intrinsics ---------------------------------------------------------------------------------------------
inline void __syncthreads(SIMT_LOC1) { simt::barrier_sync(0, 0, at); }
inline void __syncwarp(unsigned mask = ~0u SIMT_LOC) { simt::warp_fence(mask, at); }
inline void __threadfence() {}
// Source lane per PTX shfl.sync: segments of `width` lanes; an out-of-segment source yields the own value.
template <class T> T __shfl_sync(unsigned mask, T v, int src, int width = 32 SIMT_LOC) {
    unsigned l = simt::self->lane;
    return simt::shfl("shfl.idx", mask, v, (l & ~(width - 1)) | (src & (width - 1)), at);
}
template <class T> T __shfl_xor_sync(unsigned mask, T v, int x, int width = 32 SIMT_LOC) {
    unsigned l = simt::self->lane, s = l ^ x;
    return simt::shfl("shfl.bfly", mask, v, s > (l | (width - 1)) ? l : s, at);
}
template <class T> T __shfl_down_sync(unsigned mask, T v, unsigned d, int width = 32 SIMT_LOC) {
    unsigned l = simt::self->lane, s = l + d;
    return simt::shfl("shfl.down", mask, v, s > (l | (width - 1)) ? l : s, at);
}
template <class T> T __shfl_up_sync(unsigned mask, T v, unsigned d, int width = 32 SIMT_LOC) {
    int l = simt::self->lane, s = l - (int)d;
    return simt::shfl("shfl.up", mask, v, s < (l & ~(width - 1)) ? l : s, at);
}
inline unsigned __ballot_sync(unsigned mask, bool p SIMT_LOC) { return simt::vote("vote.ballot", mask, p, at); }
inline bool __any_sync(unsigned mask, bool p SIMT_LOC) { return simt::vote("vote.any", mask, p, at) != 0; }
inline bool __all_sync(unsigned mask, bool p SIMT_LOC) { return simt::vote("vote.all", mask, !p, at) == 0; }
template <class T> T atomicAdd(T* p, T v SIMT_LOC) { return simt::atomic_add(p, v, at); }
