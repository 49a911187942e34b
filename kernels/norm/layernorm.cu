// targets: sm_75
// LayerNorm over the channels of every row: y = (x - mean) / sqrt(var + eps) * scale + shift.
// T is half, bfloat16 or float; statistics, scale and shift are float.
//
// layernorm_<width>: a warp takes two rows (one above 1280) and keeps them in registers, so x is read
// once, the variance is taken about the mean, and scale and shift are read once for both rows.
// layernorm_any: any width and alignment, a block a row, three passes of which two hit the L1 cache.
// Both take everything as a distance from the row's first value, which is exact for a mean far from zero.
#include "moments.cuh"
#include "vector.cuh"

constexpr int kThreads = 128;

struct LayerNormArgs {
    const void* x;       // [rows][pitch]
    const float* scale;  // [channels]
    const float* shift;
    void* out;  // [rows][out_pitch]
    int64_t rows, pitch, out_pitch;
    int32_t channels;
    float eps;
};

PTX float warp_sum(float v) {
    for (int offset = 16; offset; offset /= 2) v += __shfl_xor_sync(~0u, v, offset);
    return v;
}

// grid: ceil(rows / (warps of a block * R)); channels a multiple of 8, at most 256 * N
template <class T, int N, int R> PTX void layernorm(const LayerNormArgs& args) {
    const int lane = threadIdx.x % 32, width = args.channels / 8;
    const int64_t row = (int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32) * R;
    if (row >= args.rows) return;
    const T* x = static_cast<const T*>(args.x) + row * args.pitch;
    T* out = static_cast<T*>(args.out) + row * args.out_pitch;

    Packed<T, 8> kept[R][N];
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int i = 0; i < N; i++)
            if (lane + 32 * i < width && row + r < args.rows) kept[r][i] = Packed<T, 8>::load(x + r * args.pitch + (lane + 32 * i) * 8);

    float pivot[R], mean[R], rstd[R];  // the row's first value, the mean from there on
#pragma unroll
    for (int r = 0; r < R; r++) {
        float sum = 0.0f, squares = 0.0f, v[8];
        const bool present = row + r < args.rows;
        v[0] = 0.0f;
        if (lane == 0 && present) kept[r][0].unpack(v);
        pivot[r] = __shfl_sync(~0u, v[0], 0);
#pragma unroll
        for (int i = 0; i < N; i++) {
            if (lane + 32 * i >= width || !present) continue;
            kept[r][i].unpack(v);
#pragma unroll
            for (int j = 0; j < 8; j++) v[j] -= pivot[r];
            sum += ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
        }
        mean[r] = warp_sum(sum) / args.channels;
#pragma unroll
        for (int i = 0; i < N; i++) {
            if (lane + 32 * i >= width || !present) continue;
            kept[r][i].unpack(v);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const float d = (v[j] - pivot[r]) - mean[r];
                squares += d * d;
            }
        }
        rstd[r] = rsqrtf(warp_sum(squares) / args.channels + args.eps);
    }

#pragma unroll
    for (int i = 0; i < N; i++) {
        const int c = (lane + 32 * i) * 8;
        if (c >= args.channels) continue;
        float scale[8], shift[8], v[8];
        load8(scale, args.scale + c);
        load8(shift, args.shift + c);
#pragma unroll
        for (int r = 0; r < R; r++) {
            if (row + r >= args.rows) continue;
            kept[r][i].unpack(v);
#pragma unroll
            for (int j = 0; j < 8; j++) v[j] = ((v[j] - pivot[r]) - mean[r]) * rstd[r] * scale[j] + shift[j];
            store8(out + r * args.out_pitch + c, v);
        }
    }
}

struct RowSmem {
    float part[kThreads / 32];
};

// Over the block; every thread has the result.
PTX float block_sum(RowSmem& s, float v) {
    v = warp_sum(v);
    __syncthreads();  // the last sum has been read
    if (threadIdx.x % 32 == 0) s.part[threadIdx.x / 32] = v;
    __syncthreads();
    float sum = 0.0f;
    for (int i = 0; i < kThreads / 32; i++) sum += s.part[i];
    return sum;
}

// grid: any number of blocks
template <class T> PTX void layernorm_any(const LayerNormArgs& args) {
    auto& s = dynamic_smem<RowSmem>();
    for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
        const T* x = static_cast<const T*>(args.x) + row * args.pitch;
        T* out = static_cast<T*>(args.out) + row * args.out_pitch;
        const float pivot = to_float(x[0]);
        float sum = 0.0f, squares = 0.0f;
        for (int c = threadIdx.x; c < args.channels; c += kThreads) sum += to_float(x[c]) - pivot;
        const float mean = block_sum(s, sum) / args.channels;
        for (int c = threadIdx.x; c < args.channels; c += kThreads) {
            const float d = (to_float(x[c]) - pivot) - mean;
            squares += d * d;
        }
        const float rstd = rsqrtf(block_sum(s, squares) / args.channels + args.eps);
        for (int c = threadIdx.x; c < args.channels; c += kThreads)
            out[c] = from_float<T>(((to_float(x[c]) - pivot) - mean) * rstd * args.scale[c] + args.shift[c]);
    }
}

#define LAYERNORM(name, call)                                                                                           \
    extern "C" __global__ __launch_bounds__(kThreads) void name(const __grid_constant__ LayerNormArgs args) { begin_kernel(); call(args); } \
    SIMT_KERNEL(name)
#define LAYERNORM_ALL(T, suffix)                              \
    LAYERNORM(layernorm_512_##suffix, (layernorm<T, 2, 2>))    \
    LAYERNORM(layernorm_768_##suffix, (layernorm<T, 3, 2>))    \
    LAYERNORM(layernorm_1280_##suffix, (layernorm<T, 5, 2>))   \
    LAYERNORM(layernorm_2048_##suffix, (layernorm<T, 8, 1>))   \
    LAYERNORM(layernorm_any_##suffix, layernorm_any<T>)
LAYERNORM_ALL(__half, f16)
LAYERNORM_ALL(__nv_bfloat16, bf16)
LAYERNORM_ALL(float, f32)
