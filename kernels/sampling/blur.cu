// targets: sm_75
// Planes blurred where a map is above a threshold, as self-attention guidance does (Hong et al., 2022).
//
// A thread makes one element: a copy, or a separable filter of up to 9 x 9 taps with mirrored edges, read through the L1
// cache. The map is coarser than the planes: a place looks at the cell that it lies in.
#include "ptx.cuh"

constexpr int kThreads = 256, kTaps = 9, kSamples = 64;

struct BlurArgs {
    const float* x;    // [samples][channels][h][w]
    const float* map;  // [any][rows][columns]
    float* out;        // as x
    int64_t count;     // elements of x
    int32_t channels, h, w, rows, columns;
    int32_t half;  // taps on either side
    float threshold;
    float tap[kTaps];
    int32_t map_of[kSamples];  // the map's sample for every sample of x
};

// Sides are longer than `half`.
PTX int mirrored(int i, int n) {
    i = abs(i);
    return i < n ? i : 2 * (n - 1) - i;
}

// grid: any number of blocks
extern "C" __global__ __launch_bounds__(kThreads) void blur_where(const __grid_constant__ BlurArgs args) {
    begin_kernel();
    const int64_t stride = int64_t(gridDim.x) * kThreads, size = int64_t(args.h) * args.w;
    for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < args.count; i += stride) {
        const int64_t plane = i / size;
        const int y = int((i - plane * size) / args.w), x = int(i - plane * size - int64_t(y) * args.w);
        const int64_t cells = int64_t(args.map_of[plane / args.channels]) * args.rows * args.columns;
        const int64_t row = int64_t(y) * args.rows / args.h, column = int64_t(x) * args.columns / args.w;
        float v = args.x[i];
        if (args.map[cells + row * args.columns + column] > args.threshold) {
            v = 0.0f;
            for (int d = -args.half; d <= args.half; d++) {
                const float* line = args.x + plane * size + int64_t(mirrored(y + d, args.h)) * args.w;
                float sum = 0.0f;
                for (int e = -args.half; e <= args.half; e++) sum += args.tap[e + args.half] * line[mirrored(x + e, args.w)];
                v += args.tap[d + args.half] * sum;
            }
        }
        args.out[i] = v;
    }
}
SIMT_KERNEL(blur_where)
