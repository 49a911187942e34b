// gemm_tile.cuh: rows of linear layers for the main loop of tile.cuh; gemm_sm80.cu and gemm_batched.cu run it.
#pragma once
#include "product.cuh"
#include "tile.cuh"

namespace gemm {
using namespace tile;

// A thread's chunks of the rows of x | x2. Pitches and k1 are multiples of 8, addresses of 16 bytes.
template <class S> struct Rows {
    using T = typename S::T;
    const T* row;
    const T* row2;  // so that row2 + k is the element of column k
    int64_t pitch, pitch2;
    int k, k1, end;
    uint32_t valid;

    PTX void init(const GemmArgs& args, int m0, int k0) {
        const int first = m0 + int(threadIdx.x) / S::kChunks;
        pitch = args.pitch, pitch2 = args.pitch2;
        row = static_cast<const T*>(args.x) + first * pitch;
        row2 = static_cast<const T*>(args.x2) + first * pitch2 - args.k1;
        k = k0 + int(threadIdx.x) % S::kChunks * 8;
        k1 = args.k1, end = args.k;
        valid = 0;
        for (int i = 0; i < S::kRowsA; i++) valid |= uint32_t(first + i * S::kPass < args.m) << i;
    }
    PTX void load(unsigned char* tile, bool is_needed) {
        const int tid = threadIdx.x;
        const uint32_t to = smem_u32(tile) + place<S>(tid / S::kChunks, tid % S::kChunks);
        const T* from = (k < k1 ? row : row2) + k;
        const int64_t pass = S::kPass * (k < k1 ? pitch : pitch2);
        const uint32_t in = is_needed && k < end ? valid : 0;
#pragma unroll kCopies
        for (int i = 0; i < S::kRowsA; i++) cp_async_16_line(to + i * S::kPass * S::kRowBytes, from + i * pass, in >> i & 1 ? 16 : 0);
    }
    PTX void advance() { k += S::kK; }
};

// The same element by element.
template <class S> struct AnyRows {
    using T = typename S::T;
    const GemmArgs& args;
    int first, k;

    PTX void init(const GemmArgs&, int m0, int k0) {
        first = m0 + int(threadIdx.x) / S::kChunks;
        k = k0 + int(threadIdx.x) % S::kChunks * 8;
    }
    PTX float at(int row, int column) const {
        if (row >= args.m || column >= args.k) return 0.0f;
        return to_float(column < args.k1 ? static_cast<const T*>(args.x)[row * args.pitch + column]
                                         : static_cast<const T*>(args.x2)[row * args.pitch2 + column - args.k1]);
    }
    PTX void load(unsigned char* tile, bool is_needed) {
        if (!is_needed) return;
        const int tid = threadIdx.x;
        for (int i = 0; i < S::kRowsA; i++) {
            float v[8];
            for (int q = 0; q < 8; q++) v[q] = at(first + i * S::kPass, k + q);
            store8(reinterpret_cast<T*>(tile + place<S>(tid / S::kChunks, tid % S::kChunks) + i * S::kPass * S::kRowBytes), v);
        }
    }
    PTX void advance() { k += S::kK; }
};

template <class S, class A> __device__ __forceinline__ void run(const GemmArgs& args, A a) {
    using T = typename S::T;
    auto& smem = dynamic_smem<Smem<S>>();
    const Part part = part_of_block<S>(args.tiles_m, args.tiles_n, (args.k + S::kK - 1) / S::kK, args.k_tiles_per_split);
    a.init(args, part.m0, part.first_tile * S::kK);
    Weights<S> b;
    b.init(static_cast<const T*>(args.w), args.n, args.w_pitch, part.n0, part.first_tile * S::kK);
    Sums<S> acc;
    multiply<S>(acc, smem, a, b, part.tiles);
    finish<S>(args.epilogue, acc, smem, part);
}

}  // namespace gemm
