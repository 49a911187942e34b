// targets: sm_75
// How much attention every key draws: the sum over queries of its share of the softmax, averaged over heads.
//
// A thread owns keys, so that no sum over queries crosses threads. Eight queries at a time wait in shared memory as floats: a
// thread finds maximum and denominator of their scores over its keys, the block joins these, and from the scores, made anew,
// every key's eight shares are added to its partial sum. A block takes a chunk of one head's queries; attention_drawn_sum adds
// the sums of all blocks in a fixed order. An element of k that is loaded is multiplied eight times: bound by arithmetic,
// without tensor cores, for a map that is made once a step of the smallest level.
#include "element.cuh"

namespace drawn {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kRows = 8;         // queries at a time
constexpr float kNone = -3e38f;  // the maximum of no score; a difference of two is 0

struct Args {
    const void* q;   // [samples][queries][q_pitch]; head h has the columns from h * dim on
    const void* k;   // [samples][keys][k_pitch], the same
    float* partial;  // [samples][chunks][heads][keys]
    float* out;      // [samples][keys]
    int32_t q_pitch, k_pitch, queries, keys, heads, dim;
    int32_t chunk;      // queries of a block, a multiple of kRows
    int32_t chunks;
    int32_t is_vector;  // rows of k begin at multiples of 16 bytes in every head, dim is a multiple of 8
    float scale_log2;   // scale * log2(e)
};

// Maximum and denominator of a query's scores.
struct Stats {
    float top, sum;
    PTX void join(float other_top, float other_sum) {
        const float m = fmaxf(top, other_top);
        sum = sum * exp2_approx(top - m) + other_sum * exp2_approx(other_top - m);
        top = m;
    }
};

// q: [column][kRows], scaled
PTX void add_column(float (&s)[kRows], const float* q, float v) {
    const float4 a = reinterpret_cast<const float4*>(q)[0], b = reinterpret_cast<const float4*>(q)[1];
    s[0] = fmaf(a.x, v, s[0]), s[1] = fmaf(a.y, v, s[1]), s[2] = fmaf(a.z, v, s[2]), s[3] = fmaf(a.w, v, s[3]);
    s[4] = fmaf(b.x, v, s[4]), s[5] = fmaf(b.y, v, s[5]), s[6] = fmaf(b.z, v, s[6]), s[7] = fmaf(b.w, v, s[7]);
}

template <class T> PTX void scores(float (&s)[kRows], const float* q, const T* k, const Args& args) {
    for (int r = 0; r < kRows; r++) s[r] = 0.0f;
    if (args.is_vector) {
        for (int c = 0; c < args.dim; c += 8) {
            float v[8];
            load8(v, k + c);
#pragma unroll
            for (int i = 0; i < 8; i++) add_column(s, q + (c + i) * kRows, v[i]);
        }
    } else {
        for (int c = 0; c < args.dim; c++) add_column(s, q + c * kRows, to_float(k[c]));
    }
}

// grid (chunks, heads, samples)
template <class T> PTX void chunk(const Args& args) {
    float* parts = dynamic_smem<float[1]>();  // [kWarps][kRows] maxima, then as many denominators
    float* q = parts + 2 * kWarps * kRows;    // [dim][kRows]
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, sample = blockIdx.z, head = blockIdx.y;
    const T* from = static_cast<const T*>(args.q) + int64_t(sample) * args.queries * args.q_pitch + head * args.dim;
    const T* k = static_cast<const T*>(args.k) + int64_t(sample) * args.keys * args.k_pitch + head * args.dim;
    float* partial = args.partial + ((int64_t(sample) * args.chunks + blockIdx.x) * args.heads + head) * args.keys;
    const int begin = int(blockIdx.x) * args.chunk, end = min(begin + args.chunk, args.queries);
    for (int first = begin; first < end; first += kRows) {
        __syncthreads();
        for (int i = threadIdx.x; i < args.dim * kRows; i += kThreads) {
            const int row = i / args.dim, c = i - row * args.dim;
            q[c * kRows + row] = first + row < end ? to_float(from[int64_t(first + row) * args.q_pitch + c]) * args.scale_log2 : 0.0f;
        }
        __syncthreads();
        float s[kRows];
        Stats stats[kRows];
        for (int r = 0; r < kRows; r++) stats[r] = {kNone, 0.0f};
        for (int key = threadIdx.x; key < args.keys; key += kThreads) {
            scores(s, q, k + int64_t(key) * args.k_pitch, args);
            for (int r = 0; r < kRows; r++) stats[r].join(s[r], 1.0f);
        }
        for (int r = 0; r < kRows; r++) {
            for (int x = 16; x > 0; x /= 2) stats[r].join(__shfl_xor_sync(~0u, stats[r].top, x), __shfl_xor_sync(~0u, stats[r].sum, x));
            if (lane == 0) parts[warp * kRows + r] = stats[r].top, parts[(kWarps + warp) * kRows + r] = stats[r].sum;
        }
        __syncthreads();
        for (int r = 0; r < kRows; r++) {
            stats[r] = {parts[r], parts[kWarps * kRows + r]};
            for (int w = 1; w < kWarps; w++) stats[r].join(parts[w * kRows + r], parts[(kWarps + w) * kRows + r]);
            stats[r].sum = first + r < end ? 1.0f / stats[r].sum : 0.0f;  // from here on a factor
        }
        for (int key = threadIdx.x; key < args.keys; key += kThreads) {
            scores(s, q, k + int64_t(key) * args.k_pitch, args);
            float shares = first == begin ? 0.0f : partial[key];
            for (int r = 0; r < kRows; r++) shares += exp2_approx(s[r] - stats[r].top) * stats[r].sum;
            partial[key] = shares;
        }
    }
}

}  // namespace drawn

#define DRAWN(T, suffix)                                                                                                           \
    extern "C" __global__ __launch_bounds__(drawn::kThreads, 4) void attention_drawn_##suffix(const __grid_constant__ drawn::Args args) { \
        begin_kernel();                                                                                                            \
        drawn::chunk<T>(args);                                                                                                     \
    }                                                                                                                              \
    SIMT_KERNEL(attention_drawn_##suffix)
DRAWN(__half, f16)
DRAWN(__nv_bfloat16, bf16)
DRAWN(float, f32)

// A thread a key. grid (ceil(keys / threads), samples)
extern "C" __global__ __launch_bounds__(drawn::kThreads) void attention_drawn_sum(const __grid_constant__ drawn::Args args) {
    begin_kernel();
    const int64_t key = int64_t(blockIdx.x) * drawn::kThreads + threadIdx.x, parts = int64_t(args.chunks) * args.heads;
    if (key >= args.keys) return;
    const float* partial = args.partial + blockIdx.y * parts * args.keys + key;
    float sum = 0.0f;
    for (int64_t i = 0; i < parts; i++) sum += partial[i * args.keys];
    args.out[int64_t(blockIdx.y) * args.keys + key] = sum / float(args.heads);
}
SIMT_KERNEL(attention_drawn_sum)
