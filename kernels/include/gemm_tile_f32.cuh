// gemm_tile_f32.cuh: rows of linear layers for the main loop of tile_f32.cuh; gemm_f32.cu and gemm_batched.cu run it.
#pragma once
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
