// tile_f32.cuh: products of floats without tensor cores, which would round them to fewer digits: the main loop of gemm_f32.cu
// and conv_f32.cu, for networks that are asked to run in float.
//
// out[M,N] = A * B^T over slabs of 16 columns of K. A thread makes kRows rows of eight neighbouring columns, so that the epilogue
// (epilogue.cuh) takes its sums as they are. Both operands lie in shared memory by column of K; eight columns of B are two
// halves of four that are apart, so that the threads of a quarter warp read 16 bytes each from different banks. Two slabs: while
// one is multiplied, the next is on its way through registers.
//
//   tile     threads  sums a thread  shared  multiply-adds a 16-byte read of shared memory
//   128x128    256        8 x 8       33 KB                 16
//   64x64      128        4 x 8       17 KB                 11
#pragma once
#include "epilogue.cuh"

namespace tile_f32 {

constexpr int kK = 16;

template <int M, int N, int ROWS> struct Shape {
    static constexpr int kM = M, kN = N, kRows = ROWS, kAcross = N / 8, kThreads = M / ROWS * kAcross;
    static constexpr int kPitchA = M + 4, kPitchB = N + 8;
    static_assert(kThreads == 2 * M && kThreads == 2 * N, "a thread loads eight columns of one row of A and of B");
};

template <class S> struct Smem {
    float a[2][kK][S::kPitchA];
    float b[2][kK][S::kPitchB];
};

// Where column n of B lies.
template <class S> PTX int place(int n) { return n / 4 % 2 * (S::kN / 2 + 4) + n / 8 * 4 + n % 4; }

// The block's part of the product.
struct Part {
    int m0, n0, first, slabs, split;
};

template <class S> PTX Part part_of_block(int tiles_m, int k, int slabs_per_split) {
    const int slabs = (k + kK - 1) / kK, first = int(blockIdx.y) * slabs_per_split;
    return {int(blockIdx.x) % tiles_m * S::kM, int(blockIdx.x) / tiles_m * S::kN, first * kK, min(slabs_per_split, slabs - first), int(blockIdx.y)};
}

// Eight columns of a row of weights [n][pitch], whose pitch is a multiple of 8 and filled with zeros.
struct Weights {
    const float* w;
    int n, pitch;
    PTX void load(float (&v)[8], int row, int k) const {
        if (row < n && k < pitch) load8(v, w + int64_t(row) * pitch + k);
        else
            for (int i = 0; i < 8; i++) v[i] = 0.0f;
    }
};

template <class S, class A> PTX void multiply(float (&acc)[S::kRows][8], Smem<S>& s, const A& a, const Weights& w, const Part& part) {
    const int tid = threadIdx.x, row = tid / 2, half = tid % 2 * 8;
    const int tx = tid % S::kAcross, ty = tid / S::kAcross;
    float next_a[8], next_b[8];
    const auto fetch = [&](int slab) {
        const int k = part.first + slab * kK + half;
        a.load(next_a, part.m0 + row, k);
        w.load(next_b, part.n0 + row, k);
    };
    const auto put = [&](int buffer) {
        for (int i = 0; i < 8; i++) {
            s.a[buffer][half + i][row] = next_a[i];
            s.b[buffer][half + i][place<S>(row)] = next_b[i];
        }
    };
    for (int r = 0; r < S::kRows; r++)
        for (int c = 0; c < 8; c++) acc[r][c] = 0.0f;
    if (part.slabs <= 0) return;
    fetch(0);
    put(0);
    __syncthreads();
    for (int slab = 0; slab < part.slabs; slab++) {
        const int buffer = slab % 2;
        const bool is_last = slab + 1 == part.slabs;
        if (!is_last) fetch(slab + 1);
#pragma unroll
        for (int k = 0; k < kK; k++) {
            float x[S::kRows], y[8];
#pragma unroll
            for (int r = 0; r < S::kRows; r += 4) {
                const float4 v = *reinterpret_cast<const float4*>(&s.a[buffer][k][ty * S::kRows + r]);
                x[r] = v.x, x[r + 1] = v.y, x[r + 2] = v.z, x[r + 3] = v.w;
            }
#pragma unroll
            for (int c = 0; c < 8; c += 4) {
                const float4 v = *reinterpret_cast<const float4*>(&s.b[buffer][k][place<S>(tx * 8 + c)]);
                y[c] = v.x, y[c + 1] = v.y, y[c + 2] = v.z, y[c + 3] = v.w;
            }
#pragma unroll
            for (int r = 0; r < S::kRows; r++)
#pragma unroll
                for (int c = 0; c < 8; c++) acc[r][c] = fmaf(x[r], y[c], acc[r][c]);
        }
        // The other buffer was read before the barrier of the last round.
        if (!is_last) put(1 - buffer);
        __syncthreads();
    }
}

template <class S> PTX void finish(const EpilogueArgs& e, float (&acc)[S::kRows][8], const Part& part) {
    const int tid = threadIdx.x, tx = tid % S::kAcross, ty = tid / S::kAcross;
    const int column = part.n0 + tx * 8, row0 = part.m0 + ty * S::kRows;
    const bool is_geglu = e.flags & kEpilogueGeglu;
    float bias[8], gate_bias[8];
    if (!e.partial) epilogue::load_bias(bias, e, column);
    if (is_geglu && !e.partial)
        for (int i = 0; i < 8; i++) gate_bias[i] = __shfl_down_sync(~0u, bias[i], 1);
#pragma unroll
    for (int r = 0; r < S::kRows; r++) {
        const int row = row0 + r;
        if (e.partial) {
            const int pitch = epilogue::partial_pitch(e);
            if (row < e.rows && column < pitch) store8(e.partial + (int64_t(part.split) * e.rows + row) * pitch + column, acc[r]);
            continue;
        }
        if (is_geglu) {
            // Values and gates of eight columns are neighbours: even threads have values.
            float gate[8];
            for (int i = 0; i < 8; i++) gate[i] = __shfl_down_sync(~0u, acc[r][i], 1);
            if (tx % 2 == 0 && row < e.rows && column < e.columns)
                epilogue::finish8_geglu<float>(e, row, column / 2, acc[r], gate, bias, gate_bias, nullptr);
        } else if (row < e.rows && column < e.columns) epilogue::finish8<float>(e, row, column, acc[r], bias, nullptr);
    }
}

}  // namespace tile_f32
