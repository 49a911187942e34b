// targets: sm_90a
// What the tensor cores of Hopper do through wgmma when nothing is loaded: both operands lie in shared memory from the start,
// as in the product kernels (hopper_tile.cuh). The ceiling that kernels are measured against there.
//
// Two warpgroups of 64 x 256 x 16: 10 KB of operands in 128 cycles, 80 of the 128 bytes a cycle that shared memory delivers.
#include "element.cuh"
#include "wgmma.cuh"

struct CeilingSm90Args {
    float* out;      // one number a thread, so that nothing is optimised away
    int32_t rounds;  // times kDepth / 16 products a warpgroup
    int32_t unused;
};

namespace {
constexpr int kColumns = 256, kDepth = 64, kGroups = 2;

template <class T> struct alignas(1024) CeilingSmem {
    T a[kGroups][64 * kDepth], b[kColumns * kDepth];
};

template <class T> PTX void ceiling(const CeilingSm90Args& args) {
    auto& s = dynamic_smem<CeilingSmem<T>>();
    // Values that differ and change sign: constant operands draw less power and run faster.
    T* all = s.a[0];
    for (int i = threadIdx.x; i < (kGroups * 64 + kColumns) * kDepth; i += blockDim.x)
        all[i] = from_float<T>(0.001f * float(i * 37 % 61) - 0.03f);
    fence_proxy_async();
    __syncthreads();
    const int group = __shfl_sync(~0u, int(threadIdx.x) / 128, 0);
    const uint64_t a = wgmma_desc_k128(s.a[group], 0), b = wgmma_desc_k128(s.b, 0);
    float acc[kColumns / 2];
    for (int r = 0; r < args.rounds; r++) {
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < kDepth / 16; i++) wgmma_m64k16<T, kColumns>(acc, a + 2 * i, b + 2 * i, r > 0 || i > 0);
        wgmma_commit();
        wgmma_wait<1>();
    }
    wgmma_wait<0>();
    float sum = 0;
    for (int i = 0; i < kColumns / 2; i++) sum += acc[i];
    args.out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}
}  // namespace

// grid: one block a multiprocessor, 256 threads.
#define CEILING_SM90(T, name)                                                                                                      \
    extern "C" __global__ __launch_bounds__(128 * kGroups, 1) void name(const __grid_constant__ CeilingSm90Args args) { begin_kernel(); ceiling<T>(args); } \
    SIMT_KERNEL(name)
CEILING_SM90(__half, ceiling_sm90_f16)
CEILING_SM90(__nv_bfloat16, ceiling_sm90_bf16)
