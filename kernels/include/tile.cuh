// tile.cuh: the tensor-core main loop of sm_80 and later, shared by linear layers and convolutions.
//
// A block computes kM x kN of a product A * B^T whose operands both run along K. Tiles of kK come through a ring of
// kStages in shared memory by cp.async (on Turing, sm_75, through registers); a warp takes kWM x kWN of the block's tile with ldmatrix and mma.m16n8k16.
//
// Shared memory: a row of a tile is 4 or 8 chunks of 16 bytes without padding; the chunk's place is its number XOR the
// row, so any eight consecutive rows of one chunk column lie in all banks once: neither ldmatrix nor cp.async conflicts.
// Registers: the sums, two sets of A fragments and two pairs of B fragments: the loads of the next fragments, across the
// boundary of stages too, are issued before the products of the present ones. A warp of 64x80 (64x64) reads 9 (8) KB by
// ldmatrix for 80 (64) mma of a stage: with the copies 432 (384) cycles of shared memory against 640 (512) of the tensor cores
// of sm_80. That is why a warp's tile is large and a block has only four warps.
#pragma once
#include "element.cuh"
#include "epilogue.cuh"

namespace tile {

// Turing has 64 KB of shared memory, and copies that nobody waits for need no long ring. The host knows: Tile::shared_bytes.
constexpr int kRing = PTX_TURING ? 3 : 4;
// Copies between two products: those through registers one after the other, or the largest tiles would spill.
constexpr int kCopies = PTX_TURING ? 1 : 32;

template <class Element, int M, int N, int K, int WarpM, int WarpN, int Stages> struct Shape {
    using T = Element;
    static constexpr int kM = M, kN = N, kK = K, kWM = WarpM, kWN = WarpN, kStages = Stages;
    static constexpr int kWarpsM = M / WarpM, kWarps = kWarpsM * (N / WarpN), kThreads = kWarps * 32;
    static constexpr int kChunks = K / 8, kRowBytes = K * 2;
    static constexpr int kPass = kThreads / kChunks;  // rows that all threads copy at once, a chunk each
    static constexpr int kRowsA = M / kPass, kRowsB = (N + kPass - 1) / kPass;
    static constexpr int kStageA = M * kRowBytes, kStageB = N * kRowBytes;
    static_assert(sizeof(T) == 2 && (K == 32 || K == 64) && Stages >= 3);
    static_assert(M % WarpM == 0 && N % WarpN == 0 && WarpM % 16 == 0 && WarpN % 16 == 0);
    static_assert(M % kPass == 0 && kPass % 8 == 0 && kRowsA <= 32 && kRowsB <= 32);
};

// Bytes from the start of a tile to chunk `chunk` of row `row`.
template <class S> PTX int place(int row, int chunk) {
    return row * S::kRowBytes + (S::kK == 64 ? chunk ^ (row & 7) : chunk ^ (row >> 1 & 3)) * 16;
}

// After the main loop a warp turns 16 rows of fragments into rows here, and keeps its part of the residual behind them.
template <class S> struct Turn {
    static constexpr int kPitch = S::kWN + 8;  // floats: the float2 of 4 x 4 lanes then lie in all banks once
    float rows[16 * kPitch];
    typename S::T residual[S::kWM * S::kWN];
};

template <class S> struct alignas(128) Smem {
    union {
        unsigned char stages[S::kStages][S::kStageA + S::kStageB];
        Turn<S> turn[S::kWarps];
    };
};

// A thread's chunk of rows tid / kChunks, + kPass, ... of the weights [n][pitch]. load copies the present tile of K, or writes
// zeros and reads nothing if it is not needed: a branch would keep the compiler from spreading the copies between products.
template <class S> struct Weights {
    const typename S::T* row;
    int64_t pass;  // elements from one of the rows to the next
    int left;      // elements from this chunk to the end of the row
    uint32_t valid;

    PTX void init(const typename S::T* w, int n, int pitch, int n0, int k0) {
        const int first = n0 + int(threadIdx.x) / S::kChunks, k = k0 + int(threadIdx.x) % S::kChunks * 8;
        row = w + int64_t(first) * pitch + k;
        pass = int64_t(S::kPass) * pitch;
        left = pitch - k;
        valid = 0;
        for (int i = 0; i < S::kRowsB; i++) valid |= uint32_t(first + i * S::kPass < n) << i;
    }
    PTX void load(uint32_t tile, bool is_needed) {
        const int tid = threadIdx.x;
        const uint32_t to = tile + place<S>(tid / S::kChunks, tid % S::kChunks);
        const uint32_t in = is_needed && left > 0 ? valid : 0;
#pragma unroll kCopies
        for (int i = 0; i < S::kRowsB; i++)
            if ((i + 1) * S::kPass <= S::kN || tid / S::kChunks + i * S::kPass < S::kN)
                cp_async_16_line(to + i * S::kPass * S::kRowBytes, row + i * pass, in >> i & 1 ? 16 : 0);
    }
    PTX void advance() { row += S::kK, left -= S::kK; }
};

template <class S> using Sums = float[S::kWM / 16][S::kWN / 8][4];

// The part of the product that a block computes.
struct Part {
    int m0, n0;
    int first_tile, tiles;  // of K
};

// Which part is this block's. grid: (tiles_m * tiles_n, splits). Blocks that run at the same time share rows of both operands:
// they walk down kGroup tiles of M before they go on along N.
template <class S> PTX Part part_of_block(int tiles_m, int tiles_n, int k_tiles, int k_tiles_per_split) {
    constexpr int kGroup = 16;
    const int block = blockIdx.x, group = block / (kGroup * tiles_n), in_group = block % (kGroup * tiles_n);
    const int height = min(kGroup, tiles_m - group * kGroup);
    Part part;
    part.m0 = (group * kGroup + in_group % height) * S::kM;
    part.n0 = in_group / height * S::kN;
    part.first_tile = int(blockIdx.y) * k_tiles_per_split;
    part.tiles = min(k_tiles_per_split, k_tiles - part.first_tile);
    return part;
}

// acc = the product over `tiles` (at least one) tiles of kK. A has load and advance as Weights has, for the rows of A.
template <class S, class A> PTX void multiply(Sums<S>& acc, Smem<S>& smem, A& a, Weights<S>& b, int tiles) {
    using T = typename S::T;
    constexpr int kSteps = S::kK / 16, kPairs = S::kWN / 16, kRows = S::kWM / 16, kStage = S::kStageA + S::kStageB;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int m0 = warp % S::kWarpsM * S::kWM, n0 = warp / S::kWarpsM * S::kWN;
    const uint32_t ring = smem_u32(smem.stages[0]);
    // ldmatrix of A: rows 0-7 and 8-15 of 16, then the same of the next chunk. Of B: both chunks of 8 rows, then of the next 8.
    // Step s of kK is 2 * s chunks on, which is an XOR of the address.
    const uint32_t from_a = place<S>(m0 + lane % 16, lane / 16);
    const uint32_t from_b = S::kStageA + place<S>(n0 + lane % 8 + lane / 16 * 8, lane / 8 % 2);
    uint32_t fa[2][kRows][4], fb[2][4];
    auto fetch_a = [&](uint32_t stage, int step) {
#pragma unroll
        for (int i = 0; i < kRows; i++) ldmatrix_x4(fa[step & 1][i], ((stage + from_a) ^ step * 32) + i * 16 * S::kRowBytes);
    };
    auto fetch_b = [&](uint32_t stage, int step, int pair) {
        ldmatrix_x4(fb[(step * kPairs + pair) & 1], ((stage + from_b) ^ step * 32) + pair * 16 * S::kRowBytes);
    };

#pragma unroll
    for (int i = 0; i < kRows; i++)
#pragma unroll
        for (int j = 0; j < S::kWN / 8; j++)
#pragma unroll
            for (int q = 0; q < 4; q++) acc[i][j][q] = 0.0f;

#pragma unroll 1
    for (int t = 0; t < S::kStages - 1; t++) {
        a.load(smem.stages[t], t < tiles);
        b.load(ring + t * kStage + S::kStageA, t < tiles);
        cp_async_commit();
        a.advance(), b.advance();
    }
    cp_async_wait<S::kStages - 2>();
    __syncthreads();
    int stage = 0, refill = S::kStages - 1;
    fetch_a(ring, 0);
    fetch_b(ring, 0, 0);

#pragma unroll 1
    for (int t = 0; t < tiles; t++) {
        const uint32_t here = ring + stage * kStage;
        uint32_t next = here;
#pragma unroll
        for (int step = 0; step < kSteps; step++) {
            if (step == kSteps - 1) {
                // The next tile has landed, and all warps are done with the one before this: its stage is refilled. On the
                // last tile the fragments fetched below are its own first ones, and unused.
                cp_async_wait<S::kStages - 3>();
                __syncthreads();
                a.load(smem.stages[refill], t + S::kStages - 1 < tiles);
                b.load(ring + refill * kStage + S::kStageA, t + S::kStages - 1 < tiles);
                cp_async_commit();
                refill = stage;
                stage = stage + 1 == S::kStages ? 0 : stage + 1;
                if (t + 1 < tiles) next = ring + stage * kStage;
            }
            const uint32_t ahead = step == kSteps - 1 ? next : here;
#pragma unroll
            for (int pair = 0; pair < kPairs; pair++) {
                if (pair == 0) fetch_a(ahead, (step + 1) % kSteps);
                if (PTX_TURING) fetch_b(here, step, pair);  // when it is needed: registers are short
                else if (pair < kPairs - 1) fetch_b(here, step, pair + 1);
                else fetch_b(ahead, (step + 1) % kSteps, 0);
                const uint32_t(&w)[4] = fb[(step * kPairs + pair) & 1];
#pragma unroll
                for (int i = 0; i < kRows; i++) {
                    mma_m16n8k16<T>(acc[i][2 * pair], fa[step & 1][i], w[0], w[1]);
                    mma_m16n8k16<T>(acc[i][2 * pair + 1], fa[step & 1][i], w[2], w[3]);
                }
            }
        }
        a.advance(), b.advance();
    }
    cp_async_wait<0>();
    __syncthreads();
}

// Stores the sums of one split as they are.
template <class S> PTX void store_partial(const EpilogueArgs& e, const Sums<S>& acc, int m0, int n0) {
    const int lane = threadIdx.x % 32, pitch = epilogue::partial_pitch(e);
    float* out = e.partial + size_t(blockIdx.y) * e.rows * pitch;
#pragma unroll
    for (int i = 0; i < S::kWM / 16; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = m0 + i * 16 + half * 8 + lane / 4;
            if (row >= e.rows) continue;
#pragma unroll
            for (int j = 0; j < S::kWN / 8; j++) {
                const int column = n0 + j * 8 + lane % 4 * 2;
                if (column < pitch)
                    *reinterpret_cast<float2*>(out + size_t(row) * pitch + column) = make_float2(acc[i][j][half * 2], acc[i][j][half * 2 + 1]);
            }
        }
}

// Eight floats of shared memory; lanes with an odd chunk / 4 take the halves in the other order, against bank conflicts.
PTX void read8(float (&v)[8], const float* from, int chunk) {
    const bool swap = chunk >> 2 & 1;
    const float4 a = *reinterpret_cast<const float4*>(from + swap * 4), b = *reinterpret_cast<const float4*>(from + !swap * 4);
    const float4 lo = swap ? b : a, hi = swap ? a : b;
    v[0] = lo.x, v[1] = lo.y, v[2] = lo.z, v[3] = lo.w, v[4] = hi.x, v[5] = hi.y, v[6] = hi.z, v[7] = hi.w;
}

// The epilogue on a warp's sums, whose first row and column are m0 and n0. A lane keeps to eight columns, so their bias is loaded
// once; the residual is fetched as a whole first, because one line at a time would leave the memory idle.
template <class S, bool kGeglu> PTX void store_rows(const EpilogueArgs& e, const Sums<S>& acc, Turn<S>& turn, int m0, int n0) {
    using T = typename S::T;
    constexpr int kChunks = S::kWN / (kGeglu ? 16 : 8), kPass = 32 / kChunks, kPitch = Turn<S>::kPitch;
    const int lane = threadIdx.x % 32, chunk = lane % kChunks, first = lane / kChunks, columns = epilogue::out_columns(e);
    const int column = n0 / (kGeglu ? 2 : 1) + chunk * 8;
    const bool is_active = first < kPass && column < columns;
    const bool is_staged = is_active && e.residual && e.flags & kEpilogueVector && column + 8 <= columns;

    if (is_staged) {
        const T* from = static_cast<const T*>(e.residual) + size_t(m0) * e.residual_pitch + column;
        for (int r = first; r < S::kWM && m0 + r < e.rows; r += kPass)
            cp_async_16(smem_u32(&turn.residual[(r * kChunks + chunk) * 8]), from + r * e.residual_pitch, 16);
    }
    cp_async_commit();
    float bias[8], gate_bias[8];
    if (is_active) epilogue::load_bias(bias, e, kGeglu ? n0 + chunk * 16 : column);
    if (is_active && kGeglu) epilogue::load_bias(gate_bias, e, n0 + chunk * 16 + 8);
    cp_async_wait<0>();

#pragma unroll 1
    for (int i = 0; i < S::kWM / 16; i++) {
        __syncwarp();
#pragma unroll
        for (int u = 0; u < S::kWM / 16; u++)
            if (u == i) {
#pragma unroll
                for (int j = 0; j < S::kWN / 8; j++) {
                    float* to = &turn.rows[lane / 4 * kPitch + j * 8 + lane % 4 * 2];
                    *reinterpret_cast<float2*>(to) = make_float2(acc[u][j][0], acc[u][j][1]);
                    *reinterpret_cast<float2*>(to + 8 * kPitch) = make_float2(acc[u][j][2], acc[u][j][3]);
                }
            }
        __syncwarp();
        for (int r = first; r < 16; r += kPass) {
            const int row = m0 + i * 16 + r;
            if (!is_active || row >= e.rows) break;
            const T* residual = is_staged ? &turn.residual[((i * 16 + r) * kChunks + chunk) * 8] : nullptr;
            float v[8];
            if constexpr (kGeglu) {
                float gate[8];
                read8(v, &turn.rows[r * kPitch + chunk * 16], chunk);
                read8(gate, &turn.rows[r * kPitch + chunk * 16 + 8], chunk);
                epilogue::finish8_geglu<T>(e, row, column, v, gate, bias, gate_bias, residual);
            } else {
                read8(v, &turn.rows[r * kPitch + chunk * 8], chunk);
                epilogue::finish8<T>(e, row, column, v, bias, residual);
            }
        }
    }
}

// What a block does with its sums.
template <class S> PTX void finish(const EpilogueArgs& e, const Sums<S>& acc, Smem<S>& smem, const Part& part) {
    const int warp = threadIdx.x / 32;
    const int m0 = part.m0 + warp % S::kWarpsM * S::kWM, n0 = part.n0 + warp / S::kWarpsM * S::kWN;
    if (e.partial) store_partial<S>(e, acc, m0, n0);
    else if (e.flags & kEpilogueGeglu) store_rows<S, true>(e, acc, smem.turn[warp], m0, n0);
    else store_rows<S, false>(e, acc, smem.turn[warp], m0, n0);
}

}  // namespace tile
