// targets: sm_75
// Attention for what the tiled kernels do not take: any head dim, pitch and alignment, and float. Written to be right,
// not fast: one warp a query row, no tensor cores.
//
// A lane takes a key of 32 for the score and a column of 32 for the sum over values; both rows, the query's and the
// result's, wait in shared memory as floats (8 bytes a column and warp).
#include "attention.cuh"

namespace attention {

template <class T> PTX void one_row(const Args& args) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // Warps behind the last row compute it once more, but write nothing: all threads of a block meet at the barrier.
    const int64_t rows = int64_t(args.batch) * args.heads * args.queries;
    const int64_t mine = int64_t(blockIdx.x) * (blockDim.x / 32) + warp, row = min(mine, rows - 1);  // [batch][heads][queries]
    const int64_t query = row % args.queries, column = row / args.queries % args.heads * args.dim, sample = row / args.queries / args.heads;
    // An even number apart: the compiler reads q in pairs, and the one behind an odd end must not be somebody's result.
    const int even = (args.dim + 1) / 2 * 2;
    float* q = dynamic_smem<float[1]>() + warp * 2 * even;
    float* acc = q + even;
    const T* q_row = static_cast<const T*>(args.q) + (sample * args.queries + query) * args.q_pitch + column;
    const T* k = static_cast<const T*>(args.k) + sample / args.share * args.keys * args.k_pitch + column;
    const T* v = static_cast<const T*>(args.v) + sample / args.share * args.keys * args.v_pitch + column;
    for (int c = lane; c < args.dim; c += 32) q[c] = to_float(q_row[c]) * args.scale_log2, acc[c] = 0;
    __syncthreads();

    const int visible = args.causal ? min(args.keys, int(query) + 1) : args.keys;
    float top = -INFINITY, sum = 0;
    for (int first = 0; first < visible; first += 32) {
        float score = -INFINITY;
        if (first + lane < visible) {
            const T* k_row = k + int64_t(first + lane) * args.k_pitch;
            score = 0;
            for (int c = 0; c < args.dim; c++) score = fmaf(q[c], to_float(k_row[c]), score);
        }
        float m = score;
        for (int x = 16; x > 0; x /= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, x));
        m = fmaxf(m, top);  // finite: the first key is visible
        const float shrink = exp2_approx(top - m), p = exp2_approx(score - m);
        top = m, sum = sum * shrink + p;
        for (int c0 = 0; c0 < args.dim; c0 += 32) {
            const int c = c0 + lane;
            float x = 0;
            for (int i = 0; i < min(32, visible - first); i++) {
                const float weight = __shfl_sync(~0u, p, i);
                if (c < args.dim) x = fmaf(weight, to_float(v[int64_t(first + i) * args.v_pitch + c]), x);
            }
            if (c < args.dim) acc[c] = acc[c] * shrink + x;
        }
    }
    for (int x = 16; x > 0; x /= 2) sum += __shfl_xor_sync(~0u, sum, x);
    if (mine != row) return;
    T* out = static_cast<T*>(args.out) + (sample * args.queries + query) * args.out_pitch + column;
    for (int c = lane; c < args.dim; c += 32) out[c] = from_float<T>(acc[c] / sum);
}

}  // namespace attention

#define ROWS(T, name)                                                                                          \
    extern "C" __global__ __launch_bounds__(128, 4) void name(const __grid_constant__ attention::Args args) {                 \
        begin_kernel();                    \
        attention::one_row<T>(args);                                                                           \
    }                                                                                                          \
    SIMT_KERNEL(name)
ROWS(__half, attention_rows_f16)
ROWS(__nv_bfloat16, attention_rows_bf16)
ROWS(float, attention_rows_f32)
