// targets: sm_75
// Linear layers: out[M,N] = epilogue((x | x2) * W^T), half or bfloat16 operands, float sums (epilogue.cuh).
//
// x is [M][pitch] with k1 columns, x2 the columns behind them if there are two inputs, W [N][w_pitch] with w_pitch = K rounded
// up to 8, zero filled. The main loop is tile.cuh's. Tiles: 128x160 and 128x80 because the widths of diffusion models (320, 640,
// 1280) are their multiples, so that nothing is computed in vain; 128x128 for the powers of two of autoencoders, 64x64 for the
// small. `any` takes what has no 16-byte vectors (odd pitches, K or addresses); `few` takes up to 16 rows.
//
//   tile     K  stages  shared  registers  blocks/SM  tensor / shared / L2 cycles of 32 K   operations a byte loaded
//   128x160  32   4     72 KB     252         2           640 / 432 / 460                            71
//   128x128  32   4     64 KB     244         2           512 / 384 / 410                            64
//   128x80   32   4     52 KB     156         3           320 / 328 / 333                            49
//   64x64    64   4     64 KB     112       2 to 3        128 / 192 / 205                            32
// (On Turing 3 stages: 62, 50, 39 and 48 KB, one block a multiprocessor.)
// (sm_80: 1024 multiply-adds and 128 bytes of shared memory a cycle; 40 bytes of L2 taken as a multiprocessor's share.)
#include "gemm_tile.cuh"

namespace gemm {

// ---- few rows ------------------------------------------------------------------------------------------------------
// A block makes eight columns of out: its threads share K, each reading 16 bytes of eight rows of W at a time, all of them on
// their way at once. Bound by reading W, for which 4 rows of x cost nothing; more rows read W from L1 again.
constexpr int kFewThreads = 128, kFewRows = 4, kFewColumns = 8;

struct FewSmem {
    float sums[kFewThreads / 32][kFewRows * kFewColumns];
};

template <class T> __device__ __forceinline__ void few_rows(const GemmArgs& args) {
    auto& smem = dynamic_smem<FewSmem>();
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, n0 = blockIdx.x * kFewColumns;
    const T* w = static_cast<const T*>(args.w) + int64_t(n0) * args.w_pitch;
    for (int m0 = 0; m0 < args.m; m0 += kFewRows) {
        float v[kFewRows * kFewColumns] = {};
        for (int k = tid * 8; k < args.k; k += kFewThreads * 8) {
            uint4 packed[kFewColumns];
#pragma unroll
            for (int j = 0; j < kFewColumns; j++) {
                packed[j] = make_uint4(0, 0, 0, 0);
                if (n0 + j < args.n) packed[j] = *reinterpret_cast<const uint4*>(w + int64_t(j) * args.w_pitch + k);
            }
            float x[kFewRows][8];
#pragma unroll
            for (int r = 0; r < kFewRows; r++) {
                const int64_t row = min(m0 + r, args.m - 1);
                load8(x[r], k < args.k1 ? static_cast<const T*>(args.x) + row * args.pitch + k
                                        : static_cast<const T*>(args.x2) + row * args.pitch2 + k - args.k1);
            }
#pragma unroll
            for (int j = 0; j < kFewColumns; j++) {
                float u[8];
                unpack2<T>(u[0], u[1], packed[j].x), unpack2<T>(u[2], u[3], packed[j].y);
                unpack2<T>(u[4], u[5], packed[j].z), unpack2<T>(u[6], u[7], packed[j].w);
#pragma unroll
                for (int r = 0; r < kFewRows; r++)
#pragma unroll
                    for (int q = 0; q < 8; q++) v[r * kFewColumns + j] += x[r][q] * u[q];
            }
        }
        // Half of the sums go to the lane across at each step; in the end lane i has the warp's i-th sum in v[0].
#pragma unroll
        for (int step = 0; step < 5; step++) {
            const int half = 16 >> step;
            const bool is_upper = lane & half;
#pragma unroll
            for (int i = 0; i < 16; i++) {
                if (i >= half) continue;
                const float given = is_upper ? v[i] : v[i + half], kept = is_upper ? v[i + half] : v[i];
                v[i] = kept + __shfl_xor_sync(~0u, given, half);
            }
        }
        __syncthreads();  // the rows before these have been stored
        smem.sums[warp][lane] = v[0];
        __syncthreads();
        if (tid < kFewRows && m0 + tid < args.m) {
            float sums[8], bias[8];
            for (int i = 0; i < 8; i++) {
                sums[i] = 0.0f;
                for (int u = 0; u < kFewThreads / 32; u++) sums[i] += smem.sums[u][tid * kFewColumns + i];
            }
            epilogue::load_bias(bias, args.epilogue, n0);
            epilogue::finish8<T>(args.epilogue, m0 + tid, n0, sums, bias, nullptr);
        }
    }
}

}  // namespace gemm

#define GEMM_FEW(name, T)                                                                                                        \
    extern "C" __global__ __launch_bounds__(128) void name(const __grid_constant__ GemmArgs args) { begin_kernel(); gemm::few_rows<T>(args); } \
    SIMT_KERNEL(name)
#define GEMM(name, T, M, N, K, WM, WN, BLOCKS)                                                                \
    extern "C" __global__ __launch_bounds__(128, BLOCKS) void name(const __grid_constant__ GemmArgs args) {                 \
        begin_kernel();                    \
        using S = tile::Shape<T, M, N, K, WM, WN, tile::kRing>;                                               \
        static_assert(S::kThreads == 128);                                                                    \
        gemm::run<S>(args, gemm::Rows<S>{});                                                                  \
    }                                                                                                         \
    SIMT_KERNEL(name)
#define GEMM_ANY(name, T)                                                                                    \
    extern "C" __global__ __launch_bounds__(128, 2) void name(const __grid_constant__ GemmArgs args) {                 \
        begin_kernel();                    \
        using S = tile::Shape<T, 64, 64, 64, 32, 32, tile::kRing>;                                            \
        gemm::run<S>(args, gemm::AnyRows<S>{args, 0, 0});                                                     \
    }                                                                                                         \
    SIMT_KERNEL(name)

GEMM(gemm_sm80_128x160_f16, __half, 128, 160, 32, 64, 80, 2)
GEMM(gemm_sm80_128x128_f16, __half, 128, 128, 32, 64, 64, 2)
GEMM(gemm_sm80_128x80_f16, __half, 128, 80, 32, 32, 80, 3)
GEMM(gemm_sm80_64x64_f16, __half, 64, 64, 64, 32, 32, 3)
GEMM_ANY(gemm_sm80_any_f16, __half)
GEMM_FEW(gemm_sm80_few_f16, __half)
GEMM(gemm_sm80_128x160_bf16, __nv_bfloat16, 128, 160, 32, 64, 80, 2)
GEMM(gemm_sm80_128x128_bf16, __nv_bfloat16, 128, 128, 32, 64, 64, 2)
GEMM(gemm_sm80_128x80_bf16, __nv_bfloat16, 128, 80, 32, 32, 80, 3)
GEMM(gemm_sm80_64x64_bf16, __nv_bfloat16, 64, 64, 64, 32, 32, 3)
GEMM_ANY(gemm_sm80_any_bf16, __nv_bfloat16)
GEMM_FEW(gemm_sm80_few_bf16, __nv_bfloat16)
