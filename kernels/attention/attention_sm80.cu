// targets: sm_75
// Attention with head dims up to 160 on mma.sync: FlashAttention-2 (Dao, arXiv 2307.08691) with our own blocking.
//
// A block of 4 warps takes 64 or 128 query rows of one head; every warp owns its rows ("narrow": 16, "wide": 32, which
// halves the shared-memory reads of keys and values per multiplication). Keys and values come in tiles of kKeys rows,
// two stages, by cp.async: tile t+1 is on its way while tile t is multiplied, one barrier a tile. Scores and
// probabilities never leave registers: the accumulator fragments of two score tiles are one A fragment.
//
//   depth    q k^T runs in steps of 16 and one of 8 if the head dim is an odd multiple of 8: no padding of 40 to 48
//   memory   unpadded tiles, xor swizzle, no bank conflicts; queries pass through the second stage into registers
//   softmax  online, base 2, one FMA per score, against a reference that is seldom renewed (attention.cuh)
//   masks    only in tiles that cross the end of the keys or the diagonal; tiles beyond the diagonal are skipped
//   splits   blockIdx.z also names a range of keys; attention_combine joins the parts in a fixed order
//
// Head dims between the instantiated ones run on the next larger kernel with zeros in the missing columns.
//
// Per tile of 128x64 with d = 64, a warp issues about 650 instructions, 128 of them HMMA (1024 clocks of its quarter of an
// A100's multiprocessor), 64 MUFU (512 clocks); with d = 40, 88 HMMA (640 clocks) among 560. Computing some exponentials on
// the FMA units (nine instructions instead of two) would move the limit from the special-function units to the issue slots,
// here and on GPUs with faster HMMA alike: not done.
#include "attention.cuh"

namespace attention {

template <class T_, int kDim_, int kRowTiles_, int kKeys_> struct Shape {
    using T = T_;
    static constexpr int kDim = kDim_, kRowTiles = kRowTiles_, kKeys = kKeys_;
    static constexpr int kThreads = 128, kWarpRows = 16 * kRowTiles, kRows = 4 * kWarpRows;
    static constexpr int kChunks = kDim / 8, kSteps = kDim / 16;
    static constexpr bool kHasHalfStep = kDim % 16 != 0;
    // In registers, having passed through the second stage; else fragments come from shared memory.
    static constexpr bool kKeepsQuery = kRowTiles * kDim <= 160 && kRows <= 2 * kKeys;
    static constexpr int kTile = kKeys * kDim;
    struct Smem {
        T stages[2][2][kTile];  // keys, values
    };
    struct WithQuery : Smem {
        T q[kRows * kDim];
    };
    using Block = std::conditional_t<kKeepsQuery, Smem, WithQuery>;
};

template <class S> struct Query {
    uint32_t full[S::kRowTiles][S::kKeepsQuery ? S::kSteps : 1][4];
    uint32_t half[S::kRowTiles][2];
    uint32_t tile;  // shared address of this warp's rows, if they stay there
};

// Softmax state of a lane: rows lane/4 and lane/4 + 8 of each row tile.
template <class S> struct Rows {
    float reference[S::kRowTiles][2];  // in units of raw scores; -inf before the first key
    float sum[S::kRowTiles][2];        // of this lane's columns
};

template <class S> PTX void query_fragment(uint32_t (&f)[4], uint32_t tile, int m, int d) {
    const int lane = threadIdx.x % 32;
    ldmatrix_x4(f, tile + m * 16 * S::kChunks * 16 + piece<S::kChunks>(lane % 16, d * 2, lane / 16));
}

template <class S> PTX void load_query(Query<S>& q, uint32_t tile) {
    const int lane = threadIdx.x % 32;
    q.tile = tile;
#pragma unroll
    for (int m = 0; m < S::kRowTiles; m++) {
        if constexpr (S::kKeepsQuery) {
#pragma unroll
            for (int d = 0; d < S::kSteps; d++) query_fragment<S>(q.full[m][d], tile, m, d);
        }
        if constexpr (S::kHasHalfStep) {  // lanes 16-31 repeat the rows; only two matrices are used
            uint32_t f[4];
            ldmatrix_x4(f, tile + m * 16 * S::kChunks * 16 + piece<S::kChunks>(lane % 16, S::kChunks - 1));
            q.half[m][0] = f[0], q.half[m][1] = f[1];
        }
    }
}

// s = q k^T: s[m][j] is the fragment of keys 8j..8j+7.
template <class S> PTX void scores(float (&s)[S::kRowTiles][S::kKeys / 8][4], const Query<S>& q, uint32_t keys) {
    using T = typename S::T;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int d = 0; d < S::kSteps; d++) {
        uint32_t fq[S::kRowTiles][4];
#pragma unroll
        for (int m = 0; m < S::kRowTiles; m++) {
            if constexpr (S::kKeepsQuery) {
                for (int i = 0; i < 4; i++) fq[m][i] = q.full[m][d][i];
            } else {
                query_fragment<S>(fq[m], q.tile, m, d);
            }
        }
        const uint32_t row = keys + piece<S::kChunks>(lane % 8 + lane / 16 * 8, d * 2, lane / 8 % 2);
#pragma unroll
        for (int j = 0; j < S::kKeys / 16; j++) {
            uint32_t fk[4];
            ldmatrix_x4(fk, row + j * 16 * S::kChunks * 16);
#pragma unroll
            for (int m = 0; m < S::kRowTiles; m++) {
                mma_m16n8k16<T>(s[m][2 * j], fq[m], fk[0], fk[1]);
                mma_m16n8k16<T>(s[m][2 * j + 1], fq[m], fk[2], fk[3]);
            }
        }
    }
    if constexpr (S::kHasHalfStep) {  // four fragments of eight keys at a time; the last may be two
#pragma unroll
        for (int j = 0; j < S::kKeys / 8; j += 4) {
            const int fragments = min(4, S::kKeys / 8 - j);
            uint32_t fk[4];
            ldmatrix_x4(fk, keys + j * 8 * S::kChunks * 16 + piece<S::kChunks>(lane % (fragments * 8), S::kChunks - 1));
#pragma unroll
            for (int m = 0; m < S::kRowTiles; m++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (i < fragments) mma_m16n8k8<T>(s[m][j + i], q.half[m][0], q.half[m][1], fk[i]);
        }
    }
}

// Scores of keys that a row does not see become -inf. `first` is the tile's first key.
template <class S> PTX void mask(float (&s)[S::kRowTiles][S::kKeys / 8][4], const Args& args, int row0, int first, int end) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < S::kRowTiles; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = row0 + m * 16 + half * 8 + lane / 4;
            const int visible = (args.causal ? min(end, row + 1) : end) - first - lane % 4 * 2;
#pragma unroll
            for (int j = 0; j < S::kKeys / 8; j++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    if (j * 8 + e >= visible) s[m][j][half * 2 + e] = -INFINITY;
        }
}

// Renews the reference of 16 rows with the maxima `top` of this tile, and brings sum and accumulator to it.
template <class S> PTX void renew(float (&reference)[2], float (&sum)[2], float (&acc)[S::kChunks][4], const float (&top)[2], float scale) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float m = fmaxf(top[half], __shfl_xor_sync(~0u, top[half], 1));
        m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
        m = fmaxf(m, reference[half]);
        // Equal also when no key was seen yet, where the difference is no number.
        const float shrink = m == reference[half] ? 1.0f : exp2_approx((reference[half] - m) * scale);
        reference[half] = m, sum[half] *= shrink;
#pragma unroll
        for (int n = 0; n < S::kChunks; n++) acc[n][half * 2] *= shrink, acc[n][half * 2 + 1] *= shrink;
    }
}

// Probabilities of 16 rows, relative to the reference, as A fragments.
template <class S> PTX void probabilities(uint32_t (&p)[S::kKeys / 16][4], float (&s)[S::kKeys / 8][4], float (&sum)[2], const float (&reference)[2], float scale) {
    float offset[2];
    for (int half = 0; half < 2; half++) offset[half] = reference[half] == -INFINITY ? 0.0f : reference[half] * scale;
#pragma unroll
    for (int j = 0; j < S::kKeys / 8; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++) s[j][e] = exp2_approx(fmaf(s[j][e], scale, -offset[e / 2]));
        sum[0] += s[j][0] + s[j][1], sum[1] += s[j][2] + s[j][3];
        p[j / 2][j % 2 * 2] = pack2<typename S::T>(s[j][0], s[j][1]);
        p[j / 2][j % 2 * 2 + 1] = pack2<typename S::T>(s[j][2], s[j][3]);
    }
}

template <class S>
PTX void softmax(uint32_t (&p)[S::kRowTiles][S::kKeys / 16][4], float (&s)[S::kRowTiles][S::kKeys / 8][4], Rows<S>& rows, float (&acc)[S::kRowTiles][S::kChunks][4], float scale, float slack) {
    float top[S::kRowTiles][2];
    bool exceeds = false;
#pragma unroll
    for (int m = 0; m < S::kRowTiles; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float x = -INFINITY;
#pragma unroll
            for (int j = 0; j < S::kKeys / 8; j++) x = fmaxf(x, fmaxf(s[m][j][half * 2], s[m][j][half * 2 + 1]));
            top[m][half] = x;
            exceeds |= x > rows.reference[m][half] + slack;
        }
    if (__any_sync(~0u, exceeds)) {
#pragma unroll
        for (int m = 0; m < S::kRowTiles; m++) renew<S>(rows.reference[m], rows.sum[m], acc[m], top[m], scale);
    }
#pragma unroll
    for (int m = 0; m < S::kRowTiles; m++) probabilities<S>(p[m], s[m], rows.sum[m], rows.reference[m], scale);
}

// acc += p v
template <class S> PTX void values(float (&acc)[S::kRowTiles][S::kChunks][4], const uint32_t (&p)[S::kRowTiles][S::kKeys / 16][4], uint32_t tile) {
    using T = typename S::T;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < S::kKeys / 16; j++) {
        const uint32_t rows = tile + j * 16 * S::kChunks * 16;
#pragma unroll
        for (int n = 0; n + 1 < S::kChunks; n += 2) {
            uint32_t fv[4];
            ldmatrix_x4_trans(fv, rows + piece<S::kChunks>(lane % 16, n, lane / 16));
#pragma unroll
            for (int m = 0; m < S::kRowTiles; m++) {
                mma_m16n8k16<T>(acc[m][n], p[m][j], fv[0], fv[1]);
                mma_m16n8k16<T>(acc[m][n + 1], p[m][j], fv[2], fv[3]);
            }
        }
        if constexpr (S::kChunks % 2 != 0) {
            uint32_t fv[2];
            ldmatrix_x2_trans(fv, rows + piece<S::kChunks>(lane % 16, S::kChunks - 1));
#pragma unroll
            for (int m = 0; m < S::kRowTiles; m++) mma_m16n8k16<T>(acc[m][S::kChunks - 1], p[m][j], fv[0], fv[1]);
        }
    }
}

// Numerators and denominators of a split, in float.
template <class S> PTX void store_partial(const Args& args, const Rows<S>& rows, const float (&acc)[S::kRowTiles][S::kChunks][4], int row0) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < S::kRowTiles; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = row0 + m * 16 + half * 8 + lane / 4;
            if (row >= args.queries) continue;
            const int64_t at = partial_row(args, row);
            if (lane % 4 == 0) args.stats[at] = make_float2(rows.reference[m][half] * args.scale_log2, rows.sum[m][half]);
            float* out = args.partial + at * args.dim + lane % 4 * 2;
#pragma unroll
            for (int n = 0; n < S::kChunks; n++)
                if (n * 8 < args.dim) *reinterpret_cast<float2*>(out + n * 8) = make_float2(acc[m][n][half * 2], acc[m][n][half * 2 + 1]);
        }
}

// The result, through shared memory so that every store is 16 bytes of a row. `tile` is this warp's own part.
template <class S> PTX void store(const Args& args, const Rows<S>& rows, const float (&acc)[S::kRowTiles][S::kChunks][4], int row0, uint8_t* tile) {
    using T = typename S::T;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < S::kRowTiles; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float inverse = 1.0f / rows.sum[m][half];
            const int row = m * 16 + half * 8 + lane / 4;
#pragma unroll
            for (int n = 0; n < S::kChunks; n++)
                *reinterpret_cast<uint32_t*>(tile + piece<S::kChunks>(row, n) + lane % 4 * 4) =
                    pack2<T>(acc[m][n][half * 2] * inverse, acc[m][n][half * 2 + 1] * inverse);
        }
    __syncwarp();
    T* out = static_cast<T*>(args.out) + (int64_t(blockIdx.z) * args.queries + row0) * args.out_pitch + blockIdx.y * args.dim;
#pragma unroll 4
    for (int i = lane; i < S::kWarpRows * S::kChunks; i += 32) {
        const int row = i / S::kChunks, chunk = i % S::kChunks;
        if (row0 + row < args.queries && chunk * 8 < args.dim)
            *reinterpret_cast<uint4*>(out + int64_t(row) * args.out_pitch + chunk * 8) = *reinterpret_cast<const uint4*>(tile + piece<S::kChunks>(row, chunk));
    }
}

template <class S> PTX void finish(const Args& args, Rows<S>& rows, const float (&acc)[S::kRowTiles][S::kChunks][4], int row0) {
#pragma unroll
    for (int m = 0; m < S::kRowTiles; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float& sum = rows.sum[m][half];
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
        }
    if (args.splits > 1) {
        store_partial<S>(args, rows, acc, row0);
        return;
    }
    uint8_t* smem = reinterpret_cast<uint8_t*>(&dynamic_smem<typename S::Block>());
    __syncthreads();  // all are done with the tiles
    store<S>(args, rows, acc, row0, smem + threadIdx.x / 32 * S::kWarpRows * S::kDim * sizeof(typename S::T));
}

// grid (query tiles, heads, batch * splits)
template <class S> PTX void forward(const Args& args) {
    using T = typename S::T;
    auto& smem = dynamic_smem<typename S::Block>();
    // Under a causal mask the longest rows go first.
    const int block = args.causal ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    const int block_row = block * S::kRows, row0 = block_row + int(threadIdx.x / 32) * S::kWarpRows;
    const int sample = blockIdx.z / args.splits;
    int first, end;
    key_range(args, block_row + S::kRows - 1, first, end);
    const int64_t key_row = int64_t(sample / args.share) * args.keys + first;
    const T* q = static_cast<const T*>(args.q) + (int64_t(sample) * args.queries + block_row) * args.q_pitch + blockIdx.y * args.dim;
    const T* k = static_cast<const T*>(args.k) + key_row * args.k_pitch + blockIdx.y * args.dim;
    const T* v = static_cast<const T*>(args.v) + key_row * args.v_pitch + blockIdx.y * args.dim;

    auto load_tile = [&](int stage, int key) {
        load_rows<T, S::kKeys, S::kChunks, S::kThreads>(smem_u32(smem.stages[stage][0]), k, args.k_pitch, end - key, args.dim);
        load_rows<T, S::kKeys, S::kChunks, S::kThreads>(smem_u32(smem.stages[stage][1]), v, args.v_pitch, end - key, args.dim);
        cp_async_commit();
        k += int64_t(S::kKeys) * args.k_pitch, v += int64_t(S::kKeys) * args.v_pitch;
    };
    uint32_t q_tile;
    if constexpr (S::kKeepsQuery) q_tile = smem_u32(smem.stages[1][0]);
    else q_tile = smem_u32(smem.q);
    load_rows<T, S::kRows, S::kChunks, S::kThreads>(q_tile, q, args.q_pitch, args.queries - block_row, args.dim);
    cp_async_commit();
    load_tile(0, first);
    cp_async_wait<1>();
    __syncthreads();
    Query<S> query;
    load_query<S>(query, q_tile + (row0 - block_row) * S::kChunks * 16);

    float acc[S::kRowTiles][S::kChunks][4] = {};
    Rows<S> rows;
    for (int m = 0; m < S::kRowTiles; m++)
        for (int half = 0; half < 2; half++) rows.reference[m][half] = -INFINITY, rows.sum[m][half] = 0;

    int stage = 0;
    for (int key = first; key < end; key += S::kKeys, stage ^= 1) {
        cp_async_wait<0>();
        __syncthreads();  // this tile has arrived for all, and all are done with the other stage
        if (key + S::kKeys < end) load_tile(stage ^ 1, key + S::kKeys);
        if (row0 >= args.queries || (args.causal && key >= row0 + S::kWarpRows)) continue;
        float s[S::kRowTiles][S::kKeys / 8][4] = {};
        uint32_t p[S::kRowTiles][S::kKeys / 16][4];
        scores<S>(s, query, smem_u32(smem.stages[stage][0]));
        if (key + S::kKeys > (args.causal ? min(end, row0 + 1) : end)) mask<S>(s, args, row0, key, end);
        softmax<S>(p, s, rows, acc, args.scale_log2, args.slack);
        values<S>(acc, p, smem_u32(smem.stages[stage][1]));
    }
    cp_async_wait<0>();
    finish<S>(args, rows, acc, row0);
}

struct CombineArgs {
    const float* partial;
    const float2* stats;
    void* out;
    int32_t out_pitch;
    int32_t queries, heads, dim;
    int32_t splits, batch;
};

// Joins the parts of split keys. A thread takes eight columns of a row; grid: ceil(batch * heads * queries * dim / 8 / threads).
template <class T> PTX void combine(const CombineArgs& args) {
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, count = int64_t(args.batch) * args.heads * args.queries;
    const int chunks = args.dim / 8;
    const int64_t row = i / chunks;  // [batch][heads][queries]
    const int chunk = i % chunks * 8;
    if (row >= count) return;
    float top = -INFINITY;
    for (int s = 0; s < args.splits; s++) top = fmaxf(top, args.stats[s * count + row].x);
    float sum = 0, acc[8] = {};
    for (int s = 0; s < args.splits; s++) {
        const float2 stats = args.stats[s * count + row];
        const float weight = exp2_approx(stats.x - top);  // 0 for a part without visible keys; some part has one
        float part[8];
        load8(part, args.partial + (s * count + row) * args.dim + chunk);
        sum += weight * stats.y;
        for (int e = 0; e < 8; e++) acc[e] += weight * part[e];
    }
    for (int e = 0; e < 8; e++) acc[e] /= sum;
    const int64_t query = row % args.queries, head = row / args.queries % args.heads, sample = row / args.queries / args.heads;
    store8(static_cast<T*>(args.out) + (sample * args.queries + query) * args.out_pitch + head * args.dim + chunk, acc);
}

}  // namespace attention

#define ATTENTION_T(T, name, dim, row_tiles, keys, blocks)                                                         \
    extern "C" __global__ __launch_bounds__(128, blocks) void name(const __grid_constant__ attention::Args args) {                 \
        begin_kernel();                    \
        attention::forward<attention::Shape<T, dim, row_tiles, keys>>(args);                                       \
    }                                                                                                              \
    SIMT_KERNEL(name)
#define ATTENTION(name, dim, row_tiles, keys, blocks)               \
    ATTENTION_T(__half, name##_f16, dim, row_tiles, keys, blocks)   \
    ATTENTION_T(__nv_bfloat16, name##_bf16, dim, row_tiles, keys, blocks)

// attention_sm80_<query rows>x<keys>_d<head dim>
// For Blackwell and Turing the assembler needs more registers than for Ampere: they get shorter tiles of keys and the queries in shared
// memory (together as much as the longer tiles; their splits suit too), or one block less, so that nothing spills.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kKeysOf80 = 32, kBlocksOf40 = 2, kBlocksOf80 = 3;
#elif PTX_TURING
constexpr int kKeysOf80 = 32, kBlocksOf40 = 3, kBlocksOf80 = 2;
#else
constexpr int kKeysOf80 = 64, kBlocksOf40 = 3, kBlocksOf80 = 3;
#endif

ATTENTION(attention_sm80_64x64_d32, 32, 1, 64, 4)
ATTENTION(attention_sm80_64x64_d40, 40, 1, 64, 4)
ATTENTION(attention_sm80_64x64_d64, 64, 1, 64, 3)
ATTENTION(attention_sm80_64x64_d80, 80, 1, 64, 3)
ATTENTION(attention_sm80_64x32_d128, 128, 1, 32, 3)
ATTENTION(attention_sm80_64x32_d160, 160, 1, 32, 2)
// Prompts come in multiples of 77 tokens.
ATTENTION(attention_sm80_64x80_d40, 40, 1, 80, 3)
ATTENTION(attention_sm80_64x80_d64, 64, 1, 80, 3)
ATTENTION(attention_sm80_64x80_d80, 80, 1, 80, kBlocksOf80)
ATTENTION(attention_sm80_128x64_d40, 40, 2, 64, kBlocksOf40)
ATTENTION(attention_sm80_128x64_d64, 64, 2, 64, 2)
ATTENTION(attention_sm80_128x64_d80, 80, 2, kKeysOf80, 2)
ATTENTION(attention_sm80_128x32_d128, 128, 2, 32, 2)

#define COMBINE(T, name)                                                                                          \
    extern "C" __global__ __launch_bounds__(256) void name(const __grid_constant__ attention::CombineArgs args) {                 \
        begin_kernel();                    \
        attention::combine<T>(args);                                                                              \
    }                                                                                                             \
    SIMT_KERNEL(name)
COMBINE(__half, attention_combine_f16)
COMBINE(__nv_bfloat16, attention_combine_bf16)
