// targets: sm_75
// Sum, sum of squares and largest magnitude of every sample, in a fixed order: the same bits in every run.
//
// For adaptive solvers the values can be scaled errors, (x - low) / max(atol, rtol * max(|low|, |previous|)).
#include "ptx.cuh"

constexpr int kThreads = 256, kWarps = kThreads / 32;

struct ReduceArgs {
    const float* x;         // [samples][count]
    const float* low;       // the same, or null: plain values
    const float* previous;  // the same if `low` is not null
    float* partial;         // [samples][chunks][3]
    float* out;             // [samples][3]
    int64_t count, chunk;   // elements of a sample, of a block
    int32_t chunks;
    float atol, rtol;
    int32_t unused;
};

struct Sums {
    float sum, squares, largest;
};
// A NaN stays: comparisons with it are false.
PTX float larger(float a, float b) { return a >= b || a != a ? a : b; }
PTX Sums add(const Sums& a, const Sums& b) { return {a.sum + b.sum, a.squares + b.squares, larger(a.largest, b.largest)}; }

struct ReduceSmem {
    Sums part[kWarps];
};

// Over the block; thread 0 has the result.
PTX Sums block_add(ReduceSmem& s, Sums v) {
    for (int offset = 16; offset; offset /= 2)
        v = add(v, {__shfl_down_sync(~0u, v.sum, offset), __shfl_down_sync(~0u, v.squares, offset), __shfl_down_sync(~0u, v.largest, offset)});
    if (threadIdx.x % 32 == 0) s.part[threadIdx.x / 32] = v;
    __syncthreads();
    if (threadIdx.x == 0)
        for (int i = 1; i < kWarps; i++) v = add(v, s.part[i]);
    return v;
}

PTX void put(float* out, const Sums& v) { out[0] = v.sum, out[1] = v.squares, out[2] = v.largest; }

// grid (chunks, samples); with one chunk this is the result
extern "C" __global__ __launch_bounds__(kThreads) void reduce_chunks(const __grid_constant__ ReduceArgs args) {
    begin_kernel();
    auto& s = dynamic_smem<ReduceSmem>();
    const int64_t row = blockIdx.y * args.count, first = blockIdx.x * args.chunk, end = min(first + args.chunk, args.count);
    Sums v = {0.0f, 0.0f, 0.0f};
#pragma unroll 4
    for (int64_t i = first + threadIdx.x; i < end; i += kThreads) {
        float x = args.x[row + i];
        if (args.low) {
            const float low = args.low[row + i], size = fmaxf(fabsf(low), fabsf(args.previous[row + i]));
            x = (x - low) / fmaxf(args.atol, args.rtol * size);
        }
        v = add(v, {x, x * x, fabsf(x)});
    }
    v = block_add(s, v);
    if (threadIdx.x == 0) put(args.chunks == 1 ? args.out + blockIdx.y * 3 : args.partial + (int64_t(blockIdx.y) * args.chunks + blockIdx.x) * 3, v);
}
SIMT_KERNEL(reduce_chunks)

// grid: samples
extern "C" __global__ __launch_bounds__(kThreads) void reduce_merge(const __grid_constant__ ReduceArgs args) {
    begin_kernel();
    auto& s = dynamic_smem<ReduceSmem>();
    Sums v = {0.0f, 0.0f, 0.0f};
    for (int i = threadIdx.x; i < args.chunks; i += kThreads) {
        const float* p = args.partial + (int64_t(blockIdx.x) * args.chunks + i) * 3;
        v = add(v, {p[0], p[1], p[2]});
    }
    v = block_add(s, v);
    if (threadIdx.x == 0) put(args.out + blockIdx.x * 3, v);
}
SIMT_KERNEL(reduce_merge)
