// targets: sm_75
// Token merging (Bolya and Hoffman, 2023): of every 2x2 square of a picture one token is the target; of all others those
// that are most like a target share a row with the one they are most like. Attention then has fewer queries.
//
// In this order, with the products of all tokens and all targets in between (gemm_batched.cu):
//   merge_targets   which tokens are targets, from draws that travel in the launch itself: a recorded graph owns them
//   merge_units     lengths of all tokens; targets of length 1
//   merge_best      of every token the most similar target, and how similar
//   merge_rows      of every token its row: those that stay alone by falling similarity, then the targets
//   merge_mean      rows from tokens
//   merge_spread    tokens from rows
// Everything is in a fixed order: the same bits in every run.
#include "vector.cuh"

constexpr int kThreads = 256, kWarps = kThreads / 32;

// ---- which tokens are targets ----------------------------------------------------------------------------------------

constexpr int kDraws = 8192;  // of one launch

struct TargetsArgs {
    int32_t* role;   // [height * width]: the number of the square that the token is the target of, or -1
    int32_t* place;  // [squares]: the target's token
    int32_t height, width;
    int32_t first, count;  // squares of this launch, row by row
    uint32_t draw[kDraws / 16];  // two bits a square: 0 and 1 for its upper tokens, 2 and 3 for the lower ones
};

// grid: any number of blocks
extern "C" __global__ __launch_bounds__(kThreads) void merge_targets(const __grid_constant__ TargetsArgs args) {
    begin_kernel();
    const int across = args.width / 2, stride = gridDim.x * kThreads, thread = blockIdx.x * kThreads + threadIdx.x;
    for (int i = thread; i < args.count; i += stride) {
        const int square = args.first + i, draw = args.draw[i / 16] >> (i % 16 * 2) & 3;
        const int corner = square / across * 2 * args.width + square % across * 2;
        for (int k = 0; k < 4; k++) args.role[corner + k / 2 * args.width + k % 2] = k == draw ? square : -1;
        args.place[square] = corner + draw / 2 * args.width + draw % 2;
    }
    if (args.first > 0) return;
    // Odd sides leave tokens outside all squares.
    if (args.width % 2)
        for (int y = thread; y < args.height; y += stride) args.role[y * args.width + args.width - 1] = -1;
    if (args.height % 2)
        for (int x = thread; x < args.width / 2 * 2; x += stride) args.role[(args.height - 1) * args.width + x] = -1;
}
SIMT_KERNEL(merge_targets)

// ---- lengths, and targets of length 1 ----------------------------------------------------------------------------------

struct UnitsArgs {
    const void* x;        // [samples][tokens][pitch]
    const int32_t* role;  // [tokens]
    float* inverse;       // [samples][tokens]: 1 / length
    void* unit;           // [samples][targets][unit_pitch], zeros behind the channels
    int64_t pitch;
    int32_t samples, tokens, targets, channels, unit_pitch;
    int32_t unused;
};

// A warp a token. grid: any number of blocks
template <class T> PTX void merge_units(const UnitsArgs& args) {
    const int lane = threadIdx.x % 32;
    const int64_t rows = int64_t(args.samples) * args.tokens;
    for (int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; row < rows; row += int64_t(gridDim.x) * kWarps) {
        const T* x = static_cast<const T*>(args.x) + row * args.pitch;
        float sum = 0.0f;
        for (int c = lane; c < args.channels; c += 32) {
            const float v = to_float(x[c]);
            sum += v * v;
        }
        for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
        const float inverse = 1.0f / sqrtf(sum);
        if (lane == 0) args.inverse[row] = inverse;
        const int role = args.role[row % args.tokens];
        if (role < 0) continue;
        T* unit = static_cast<T*>(args.unit) + (row / args.tokens * args.targets + role) * args.unit_pitch;
        for (int c = lane; c < args.unit_pitch; c += 32) unit[c] = from_float<T>(c < args.channels ? to_float(x[c]) * inverse : 0.0f);
    }
}

#define UNITS(T, name)                                                                                                  \
    extern "C" __global__ __launch_bounds__(kThreads) void name(const __grid_constant__ UnitsArgs args) {               \
        begin_kernel();                                                                                                 \
        merge_units<T>(args);                                                                                           \
    }                                                                                                                   \
    SIMT_KERNEL(name)
UNITS(__half, merge_units_f16)
UNITS(__nv_bfloat16, merge_units_bf16)
UNITS(float, merge_units_f32)

// ---- the most similar target -------------------------------------------------------------------------------------------

struct BestArgs {
    const float* score;    // [samples][count][targets]: tokens first to first + count times targets
    const float* inverse;  // [samples][tokens]
    float* best;           // [samples][tokens]: cosine of the angle to that target
    int32_t* target;       // [samples][tokens]: its number, the lowest of equals
    int32_t samples, tokens, targets;
    int32_t first, count;
    int32_t unused;
};

// A warp a token. grid: any number of blocks
extern "C" __global__ __launch_bounds__(kThreads) void merge_best(const __grid_constant__ BestArgs args) {
    begin_kernel();
    const int lane = threadIdx.x % 32;
    const int64_t rows = int64_t(args.samples) * args.count;
    for (int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; row < rows; row += int64_t(gridDim.x) * kWarps) {
        const float* score = args.score + row * args.targets;
        float best = -INFINITY;  // a NaN is no better
        int target = 0;
        for (int t = lane; t < args.targets; t += 32)
            if (score[t] > best) best = score[t], target = t;
        for (int offset = 16; offset; offset /= 2) {
            const float other = __shfl_xor_sync(~0u, best, offset);
            const int its = __shfl_xor_sync(~0u, target, offset);
            if (other > best || (other == best && its < target)) best = other, target = its;
        }
        if (lane) continue;
        const int64_t to = row / args.count * args.tokens + args.first + row % args.count;
        args.best[to] = best * args.inverse[to];
        args.target[to] = target;
    }
}
SIMT_KERNEL(merge_best)

// ---- rows ----------------------------------------------------------------------------------------------------------------

struct RowsArgs {
    const float* best;      // [samples][tokens]
    const int32_t* target;  // [samples][tokens]
    const int32_t* role;    // [tokens]
    int32_t* row;           // [samples][tokens]
    int32_t tokens, targets, merged;
    int32_t unused;
};

// Numbers in the order of floats; NaNs are the highest or the lowest, by their sign.
PTX uint32_t ordered(float v) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

struct RowsSmem {
    uint32_t key[kThreads];
    int32_t role[kThreads];
};

// A thread a token counts those that are more similar, equals by their place. grid: (ceil(tokens / threads), samples)
extern "C" __global__ __launch_bounds__(kThreads) void merge_rows(const __grid_constant__ RowsArgs args) {
    begin_kernel();
    auto& s = dynamic_smem<RowsSmem>();
    const int64_t sample = int64_t(blockIdx.y) * args.tokens;
    const int token = blockIdx.x * kThreads + threadIdx.x;
    const bool is_token = token < args.tokens;
    const uint32_t mine = is_token ? ordered(args.best[sample + token]) : 0;
    int rank = 0;
    for (int first = 0; first < args.tokens; first += kThreads) {
        const int count = min(kThreads, args.tokens - first);
        __syncthreads();
        if (int(threadIdx.x) < count) {
            s.key[threadIdx.x] = ordered(args.best[sample + first + threadIdx.x]);
            s.role[threadIdx.x] = args.role[first + threadIdx.x];
        }
        __syncthreads();
        for (int i = 0; i < count; i++) rank += s.role[i] < 0 && (s.key[i] > mine || (s.key[i] == mine && first + i < token));
    }
    if (!is_token) return;
    const int role = args.role[token], alone = args.tokens - args.targets - args.merged;
    args.row[sample + token] = role >= 0 ? alone + role : rank < args.merged ? alone + args.target[sample + token] : rank - args.merged;
}
SIMT_KERNEL(merge_rows)

// ---- rows from tokens ------------------------------------------------------------------------------------------------------

constexpr int kMeanThreads = 128, kMeanColumns = 4;  // columns that a thread adds up at a time

struct MeanArgs {
    const void* x;         // [samples][tokens][pitch]
    const int32_t* row;    // [samples][tokens]
    const int32_t* place;  // [targets]
    void* out;             // [samples][rows][channels]
    int64_t pitch;
    int32_t tokens, targets, rows, channels;
};

struct MeanSmem {
    uint32_t members[kMeanThreads / 32];
};

// A block a token: those that stay alone are copied, targets become the mean of all that share their row, in the order of the
// tokens. grid: (tokens, samples)
template <class T> PTX void merge_mean(const MeanArgs& args) {
    auto& s = dynamic_smem<MeanSmem>();
    const int token = blockIdx.x, alone = args.rows - args.targets;
    const int64_t sample = int64_t(blockIdx.y) * args.tokens;
    const int32_t* rows = args.row + sample;
    const int row = rows[token];
    const T* x = static_cast<const T*>(args.x) + sample * args.pitch;
    T* out = static_cast<T*>(args.out) + (int64_t(blockIdx.y) * args.rows + row) * args.channels;
    if (row < alone) {
        for (int c = threadIdx.x; c < args.channels; c += kMeanThreads) out[c] = x[token * args.pitch + c];
        return;
    }
    if (args.place[row - alone] != token) return;
    for (int c0 = threadIdx.x; c0 - int(threadIdx.x) < args.channels; c0 += kMeanThreads * kMeanColumns) {
        float sum[kMeanColumns] = {};
        int members = 0;
        for (int first = 0; first < args.tokens; first += kMeanThreads) {
            const int other = first + threadIdx.x;
            const uint32_t those = __ballot_sync(~0u, other < args.tokens && rows[other] == row);
            __syncthreads();
            if (threadIdx.x % 32 == 0) s.members[threadIdx.x / 32] = those;
            __syncthreads();
            for (int warp = 0; warp < kMeanThreads / 32; warp++)
                for (uint32_t left = s.members[warp]; left; left &= left - 1) {
                    const T* member = x + (first + warp * 32 + __ffs(int(left)) - 1) * args.pitch;
                    members++;
#pragma unroll
                    for (int k = 0; k < kMeanColumns; k++)
                        if (c0 + k * kMeanThreads < args.channels) sum[k] += to_float(member[c0 + k * kMeanThreads]);
                }
        }
#pragma unroll
        for (int k = 0; k < kMeanColumns; k++)
            if (c0 + k * kMeanThreads < args.channels) out[c0 + k * kMeanThreads] = from_float<T>(sum[k] / float(members));
    }
}

#define MEAN(T, name)                                                                                                   \
    extern "C" __global__ __launch_bounds__(kMeanThreads) void name(const __grid_constant__ MeanArgs args) {            \
        begin_kernel();                                                                                                 \
        merge_mean<T>(args);                                                                                            \
    }                                                                                                                   \
    SIMT_KERNEL(name)
MEAN(__half, merge_mean_f16)
MEAN(__nv_bfloat16, merge_mean_bf16)
MEAN(float, merge_mean_f32)

// ---- tokens from rows --------------------------------------------------------------------------------------------------------

struct SpreadArgs {
    const void* x;       // [samples][rows][width] units
    const int32_t* row;  // [samples][tokens]
    void* out;           // [samples][tokens][width]
    uint64_t count;      // units of the result
    uint32_t tokens, rows, width;
    uint32_t unused;
};

// grid: any number of blocks
template <class U> PTX void merge_spread(const SpreadArgs& args) {
    const uint64_t stride = uint64_t(gridDim.x) * kThreads;
    for (uint64_t i = uint64_t(blockIdx.x) * kThreads + threadIdx.x; i < args.count; i += stride) {
        uint64_t token, sample;
        uint32_t c, in_sample;
        split(i, args.width, token, c);
        split(token, args.tokens, sample, in_sample);
        static_cast<U*>(args.out)[i] = static_cast<const U*>(args.x)[(sample * args.rows + args.row[token]) * args.width + c];
    }
}

#define SPREAD(U, name)                                                                                                 \
    extern "C" __global__ __launch_bounds__(kThreads) void name(const __grid_constant__ SpreadArgs args) {              \
        begin_kernel();                                                                                                 \
        merge_spread<U>(args);                                                                                          \
    }                                                                                                                   \
    SIMT_KERNEL(name)
SPREAD(uint4, merge_spread_b16)
SPREAD(uint16_t, merge_spread_b2)
