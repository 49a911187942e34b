// targets: sm_75
// Linear layers in float: out[M,N] = epilogue((x | x2) * W^T), every operand and sum a float (tile_f32.cuh).
//
// The arguments are those of gemm_sm80.cu; a tile of K is 16 columns here. `any` takes what has no 16-byte vectors.
#include "product.cuh"
#include "tile_f32.cuh"

namespace gemm_f32 {

template <bool kAny> struct Rows {
    const GemmArgs& args;
    PTX void load(float (&v)[8], int row, int k) const {
        if (row >= args.m || k >= args.k) {
            for (int i = 0; i < 8; i++) v[i] = 0.0f;
        } else if constexpr (kAny) {
            for (int i = 0; i < 8; i++) {
                const int column = k + i;
                v[i] = 0.0f;
                if (column < args.k1) v[i] = static_cast<const float*>(args.x)[row * args.pitch + column];
                else if (column < args.k) v[i] = static_cast<const float*>(args.x2)[row * args.pitch2 + column - args.k1];
            }
        } else load8(v, k < args.k1 ? static_cast<const float*>(args.x) + row * args.pitch + k : static_cast<const float*>(args.x2) + row * args.pitch2 + k - args.k1);
    }
};

template <class S, bool kAny> __device__ __forceinline__ void run(const GemmArgs& args) {
    auto& smem = dynamic_smem<tile_f32::Smem<S>>();
    const auto part = tile_f32::part_of_block<S>(args.tiles_m, args.k, args.k_tiles_per_split);
    float acc[S::kRows][8];
    tile_f32::multiply<S>(acc, smem, Rows<kAny>{args}, tile_f32::Weights{static_cast<const float*>(args.w), args.n, args.w_pitch}, part);
    tile_f32::finish<S>(args.epilogue, acc, part);
}

}  // namespace gemm_f32

#define GEMM(name, ANY, M, N, ROWS)                                                                                      \
    extern "C" __global__ __launch_bounds__(2 * M) void name(const __grid_constant__ GemmArgs args) {                    \
        begin_kernel();                                                                                                  \
        gemm_f32::run<tile_f32::Shape<M, N, ROWS>, ANY>(args);                                                           \
    }                                                                                                                    \
    SIMT_KERNEL(name)
GEMM(gemm_f32_128x128, false, 128, 128, 8)
GEMM(gemm_f32_64x64, false, 64, 64, 4)
GEMM(gemm_f32_any, true, 64, 64, 4)
