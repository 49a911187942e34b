// targets: sm_75
// Attention with one wide head, up to 512 columns: that of the VAE.
//
// 64 query rows x 512 columns of accumulators are 128 registers of 256 threads, so a warp cannot own rows of its own as
// in attention_sm80.cu. Eight warps change roles instead:
//
//   scores   2 x 4 warps: 32 rows x a quarter of the keys, the whole depth; queries stay in shared memory
//   values   every warp takes all 64 rows of an eighth of the columns; p comes from shared memory
//
// Keys come as pieces of [kKeys][64 columns], values as pieces of [16 keys][kKeys * 4 columns]; both are kKeys * 128
// bytes and pass through one ring of cp.async stages, one barrier a piece (256 or 512 clocks of multiplications on an
// A100). kKeys = 64 needs 97 KB of shared memory and runs on sm_86 and sm_89; kKeys = 128 needs 145 KB.
#include "attention.cuh"

namespace attention {

template <class T_, int kKeys_, int kStages_> struct Wide {
    using T = T_;
    static constexpr int kKeys = kKeys_, kStages = kStages_;
    static constexpr int kDim = 512, kRows = 64, kThreads = 256, kChunks = kDim / 8;
    static constexpr int kColumns = kKeys * 4, kParts = kDim / kColumns;           // of a piece of values
    static constexpr int kWarpKeys = kKeys / 4, kWarpColumns = kColumns / 8;       // of a warp in its two roles
    static constexpr int kScoreTiles = kWarpKeys / 8, kColumnTiles = kWarpColumns / 8;
    struct Smem {
        T q[kRows * kDim];
        T p[kRows * kKeys];
        T ring[kStages][kKeys * 64];
        float rows[kRows][4];  // a number of each row and each quarter of the keys
    };
    using Scores = float[2][kScoreTiles][4];
    using Accumulator = float[4][kParts][kColumnTiles][4];
};

// Moves pieces into the ring: all keys' pieces of a tile, then its values'.
template <class S> struct Ring {
    using T = typename S::T;
    const Args& args;
    const T* k;  // at `key`
    const T* v;
    int key, end, piece_index = 0;
    int write = 0, read = 0;

    PTX int depth_pieces() const { return (args.dim + 63) / 64; }
    PTX uint32_t slot(int i) const { return smem_u32(dynamic_smem<typename S::Smem>().ring[i]); }

    PTX void issue() {
        if (key < end) {
            const int depth = depth_pieces();
            if (piece_index < depth) {
                const int column = piece_index * 64;
                load_rows<T, S::kKeys, 8, S::kThreads>(slot(write), k + column, args.k_pitch, end - key, args.dim - column);
            } else {
                const int i = piece_index - depth, row = i / S::kParts * 16, column = i % S::kParts * S::kColumns;
                load_rows<T, 16, S::kColumns / 8, S::kThreads>(slot(write), v + int64_t(row) * args.v_pitch + column, args.v_pitch,
                                                               end - key - row, args.dim - column);
            }
            write = write + 1 == S::kStages ? 0 : write + 1;
            if (++piece_index == depth + S::kKeys / 16 * S::kParts) {
                piece_index = 0, key += S::kKeys;
                k += int64_t(S::kKeys) * args.k_pitch, v += int64_t(S::kKeys) * args.v_pitch;
            }
        }
        cp_async_commit();  // also if empty: waiting counts groups
    }
    // Waits for the next piece and lets another one into the place of the last.
    PTX uint32_t next() {
        cp_async_wait<S::kStages - 2>();
        __syncthreads();
        issue();
        const uint32_t piece = slot(read);
        read = read + 1 == S::kStages ? 0 : read + 1;
        return piece;
    }
};

// s += q k^T over 64 columns from `column`.
template <class S> PTX void wide_scores(typename S::Scores& s, uint32_t q, uint32_t keys, int column) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int d = 0; d < 4; d++) {
        uint32_t fq[2][4];
#pragma unroll
        for (int m = 0; m < 2; m++)
            ldmatrix_x4(fq[m], q + column * 2 + piece<S::kChunks>(warp / 4 * 32 + m * 16 + lane % 16, d * 2, lane / 16));
#pragma unroll
        for (int j = 0; j < S::kWarpKeys / 16; j++) {
            uint32_t fk[4];
            ldmatrix_x4(fk, keys + piece<8>(warp % 4 * S::kWarpKeys + j * 16 + lane % 8 + lane / 16 * 8, d * 2, lane / 8 % 2));
#pragma unroll
            for (int m = 0; m < 2; m++) {
                mma_m16n8k16<typename S::T>(s[m][2 * j], fq[m], fk[0], fk[1]);
                mma_m16n8k16<typename S::T>(s[m][2 * j + 1], fq[m], fk[2], fk[3]);
            }
        }
    }
}

// Scores of keys that a row does not see become -inf; `first` is the tile's first key, row0 the block's first row.
template <class S> PTX void wide_mask(typename S::Scores& s, const Args& args, int row0, int first, int end) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = row0 + warp / 4 * 32 + m * 16 + half * 8 + lane / 4;
            const int visible = (args.causal ? min(end, row + 1) : end) - first - warp % 4 * S::kWarpKeys - lane % 4 * 2;
#pragma unroll
            for (int j = 0; j < S::kScoreTiles; j++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    if (j * 8 + e >= visible) s[m][j][half * 2 + e] = -INFINITY;
        }
}

// Renews the references of all 64 rows (rows lane/4 and lane/4 + 8 of four row tiles) from the maxima in shared memory,
// if a row exceeds its own by the slack, and brings accumulator and sums to them. Every warp comes to the same references.
template <class S>
PTX void wide_renew(float (&reference)[4][2], float (&sum)[2][2], typename S::Accumulator& acc, float scale, float slack) {
    const auto& smem = dynamic_smem<typename S::Smem>();
    const int lane = threadIdx.x % 32;
    const bool lower = threadIdx.x >= S::kThreads / 2;  // scores of rows 32..63
    float shrink[4][2];
    bool changes = false;
#pragma unroll
    for (int m = 0; m < 4; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float4 top4 = *reinterpret_cast<const float4*>(smem.rows[m * 16 + half * 8 + lane / 4]);
            const float top = fmaxf(fmaxf(top4.x, top4.y), fmaxf(top4.z, top4.w));
            const bool renews = top > reference[m][half] + slack;
            shrink[m][half] = renews ? exp2_approx((reference[m][half] - top) * scale) : 1.0f;
            if (renews) reference[m][half] = top, changes = true;
        }
    if (!__any_sync(~0u, changes)) return;
#pragma unroll
    for (int m = 0; m < 4; m++)
#pragma unroll
        for (int part = 0; part < S::kParts; part++)
#pragma unroll
            for (int n = 0; n < S::kColumnTiles; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) acc[m][part][n][e] *= shrink[m][e / 2];
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) sum[m][half] *= lower ? shrink[m + 2][half] : shrink[m][half];
}

// Maxima to shared memory, references, probabilities to shared memory.
template <class S>
PTX void wide_softmax(typename S::Scores& s, float (&reference)[4][2], float (&sum)[2][2], typename S::Accumulator& acc, float scale, float slack) {
    auto& smem = dynamic_smem<typename S::Smem>();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const bool lower = warp >= 4;
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float top = -INFINITY;
#pragma unroll
            for (int j = 0; j < S::kScoreTiles; j++) top = fmaxf(top, fmaxf(s[m][j][half * 2], s[m][j][half * 2 + 1]));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
            if (lane % 4 == 0) smem.rows[warp / 4 * 32 + m * 16 + half * 8 + lane / 4][warp % 4] = top;
        }
    __syncthreads();
    wide_renew<S>(reference, sum, acc, scale, slack);
    uint8_t* tile = reinterpret_cast<uint8_t*>(smem.p);
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float r = lower ? reference[m + 2][half] : reference[m][half];
            const float offset = r == -INFINITY ? 0.0f : r * scale;
            const int row = warp / 4 * 32 + m * 16 + half * 8 + lane / 4;
#pragma unroll
            for (int j = 0; j < S::kScoreTiles; j++) {
                const float x = exp2_approx(fmaf(s[m][j][half * 2], scale, -offset));
                const float y = exp2_approx(fmaf(s[m][j][half * 2 + 1], scale, -offset));
                sum[m][half] += x + y;
                *reinterpret_cast<uint32_t*>(tile + piece<S::kKeys / 8>(row, warp % 4 * S::kScoreTiles + j) + lane % 4 * 4) = pack2<typename S::T>(x, y);
            }
        }
}

// acc += p v for 16 keys and one part of the columns.
template <class S>
PTX void wide_values(float (&acc)[S::kColumnTiles][4], const uint32_t (&p)[4], const uint32_t (&fv)[S::kColumnTiles / 2][4]) {
#pragma unroll
    for (int n = 0; n < S::kColumnTiles / 2; n++) {
        mma_m16n8k16<typename S::T>(acc[2 * n], p, fv[n][0], fv[n][1]);
        mma_m16n8k16<typename S::T>(acc[2 * n + 1], p, fv[n][2], fv[n][3]);
    }
}

// Adds the sums of the quarters; every lane gets those of its eight rows.
template <class S> PTX void wide_totals(float (&total)[4][2], const float (&sum)[2][2]) {
    auto& smem = dynamic_smem<typename S::Smem>();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float x = sum[m][half] + __shfl_xor_sync(~0u, sum[m][half], 1);
            x += __shfl_xor_sync(~0u, x, 2);
            if (lane % 4 == 0) smem.rows[warp / 4 * 32 + m * 16 + half * 8 + lane / 4][warp % 4] = x;
        }
    __syncthreads();
#pragma unroll
    for (int m = 0; m < 4; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float4 x = *reinterpret_cast<const float4*>(smem.rows[m * 16 + half * 8 + lane / 4]);
            total[m][half] = (x.x + x.y) + (x.z + x.w);
        }
}

template <class S> PTX void wide_store_partial(const Args& args, const float (&reference)[4][2], const float (&total)[4][2], const typename S::Accumulator& acc, int row0) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int m = 0; m < 4; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = row0 + m * 16 + half * 8 + lane / 4;
            if (row >= args.queries) continue;
            const int64_t at = partial_row(args, row);
            if (threadIdx.x < 32 && lane % 4 == 0) args.stats[at] = make_float2(reference[m][half] * args.scale_log2, total[m][half]);
#pragma unroll
            for (int part = 0; part < S::kParts; part++)
#pragma unroll
                for (int n = 0; n < S::kColumnTiles; n++) {
                    const int column = part * S::kColumns + warp * S::kWarpColumns + n * 8;
                    if (column < args.dim)
                        *reinterpret_cast<float2*>(args.partial + at * args.dim + column + lane % 4 * 2) =
                            make_float2(acc[m][part][n][half * 2], acc[m][part][n][half * 2 + 1]);
                }
        }
}

// The result, through the queries' shared memory so that every store is 16 bytes of a row.
template <class S> PTX void wide_store(const Args& args, const float (&total)[4][2], const typename S::Accumulator& acc, int row0) {
    using T = typename S::T;
    uint8_t* tile = reinterpret_cast<uint8_t*>(dynamic_smem<typename S::Smem>().q);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int m = 0; m < 4; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float inverse = 1.0f / total[m][half];
#pragma unroll
            for (int part = 0; part < S::kParts; part++)
#pragma unroll
                for (int n = 0; n < S::kColumnTiles; n++)
                    *reinterpret_cast<uint32_t*>(tile + piece<S::kChunks>(m * 16 + half * 8 + lane / 4, part * S::kColumns / 8 + warp * S::kColumnTiles + n) + lane % 4 * 4) =
                        pack2<T>(acc[m][part][n][half * 2] * inverse, acc[m][part][n][half * 2 + 1] * inverse);
        }
    __syncthreads();
    T* out = static_cast<T*>(args.out) + (int64_t(blockIdx.z) * args.queries + row0) * args.out_pitch + blockIdx.y * args.dim;
#pragma unroll 4
    for (int i = threadIdx.x; i < S::kRows * S::kChunks; i += S::kThreads) {
        const int row = i / S::kChunks, chunk = i % S::kChunks;
        if (row0 + row < args.queries && chunk * 8 < args.dim)
            *reinterpret_cast<uint4*>(out + int64_t(row) * args.out_pitch + chunk * 8) = *reinterpret_cast<const uint4*>(tile + piece<S::kChunks>(row, chunk));
    }
}

// grid (query tiles, heads, batch * splits)
template <class S> PTX void wide_forward(const Args& args) {
    using T = typename S::T;
    auto& smem = dynamic_smem<typename S::Smem>();
    const int row0 = (args.causal ? gridDim.x - 1 - blockIdx.x : blockIdx.x) * S::kRows;
    const int sample = blockIdx.z / args.splits, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int first, end;
    key_range(args, row0 + S::kRows - 1, first, end);
    const int64_t key_row = int64_t(sample / args.share) * args.keys + first;
    const T* q = static_cast<const T*>(args.q) + (int64_t(sample) * args.queries + row0) * args.q_pitch + blockIdx.y * args.dim;
    Ring<S> ring{args, static_cast<const T*>(args.k) + key_row * args.k_pitch + blockIdx.y * args.dim,
                 static_cast<const T*>(args.v) + key_row * args.v_pitch + blockIdx.y * args.dim, first, end};
    const uint32_t q_tile = smem_u32(smem.q), p_tile = smem_u32(smem.p);
    load_rows<T, S::kRows, S::kChunks, S::kThreads>(q_tile, q, args.q_pitch, args.queries - row0, args.dim);
    for (int i = 0; i + 1 < S::kStages; i++) ring.issue();  // the first group holds the queries too

    typename S::Accumulator acc = {};
    float reference[4][2], sum[2][2] = {};
    for (int m = 0; m < 4; m++) reference[m][0] = reference[m][1] = -INFINITY;

    for (int key = first; key < end; key += S::kKeys) {
        typename S::Scores s = {};
#pragma unroll 1
        for (int column = 0; column < args.dim; column += 64) wide_scores<S>(s, q_tile, ring.next(), column);
        if (key + S::kKeys > (args.causal ? min(end, row0 + 1) : end)) wide_mask<S>(s, args, row0, key, end);
        wide_softmax<S>(s, reference, sum, acc, args.scale_log2, args.slack);
#pragma unroll 1
        for (int j = 0; j < S::kKeys / 16; j++)
#pragma unroll
            for (int part = 0; part < S::kParts; part++) {
                const uint32_t v = ring.next();  // whose barrier also shows p to all
                uint32_t fv[S::kColumnTiles / 2][4];
#pragma unroll
                for (int n = 0; n < S::kColumnTiles / 2; n++)
                    ldmatrix_x4_trans(fv[n], v + piece<S::kColumns / 8>(lane % 16, warp * S::kColumnTiles + n * 2 + lane / 16));
#pragma unroll
                for (int m = 0; m < 4; m++) {
                    uint32_t fp[4];
                    ldmatrix_x4(fp, p_tile + piece<S::kKeys / 8>(m * 16 + lane % 16, j * 2 + lane / 16));
                    wide_values<S>(acc[m][part], fp, fv);
                }
            }
    }
    cp_async_wait<0>();
    float total[4][2];
    wide_totals<S>(total, sum);
    if (args.splits > 1) wide_store_partial<S>(args, reference, total, acc, row0);
    else wide_store<S>(args, total, acc, row0);
}

}  // namespace attention

#define WIDE_T(T, name, keys, stages)                                                                          \
    extern "C" __global__ __launch_bounds__(256, 1) void name(const __grid_constant__ attention::Args args) {                 \
        begin_kernel();                    \
        attention::wide_forward<attention::Wide<T, keys, stages>>(args);                                       \
    }                                                                                                          \
    SIMT_KERNEL(name)
#define WIDE(name, keys, stages)               \
    WIDE_T(__half, name##_f16, keys, stages)   \
    WIDE_T(__nv_bfloat16, name##_bf16, keys, stages)

WIDE(attention_sm80_64x64_d512, 64, 3)
WIDE(attention_sm80_64x128_d512, 128, 4)
