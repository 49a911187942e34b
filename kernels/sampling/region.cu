// targets: sm_75
// Predictions of parts of the picture averaged by place, as regional prompts are: sum of weight * prediction over sum of
// weights.
//
// A thread has a place: it adds up the weights of all parts that cover it, then goes through the channels. Parts beyond
// the first few come with further launches, which go on where the last one stopped. Every part is read once.
#include "ptx.cuh"

constexpr int kThreads = 256, kParts = 6;

struct Part {
    const float* x;        // [samples][channels][h][w]
    const float* weights;  // [weight_samples][h][w], which repeat; null: `strength` everywhere
    int32_t top, left, h, w;
    int32_t weight_samples;
    float strength;
};

struct MeanByPlaceArgs {
    Part part[kParts];
    float* out;        // [samples][channels][h][w]
    float* weight;     // [samples][h][w]: sums of weights between launches; null if there is one launch
    int64_t places;    // of all samples
    int32_t h, w, channels, parts;
    int32_t is_first, is_last;
    float least;  // weight of every place before anything covers it
    int32_t unused;
};

// grid: any number of blocks
extern "C" __global__ __launch_bounds__(kThreads) void mean_by_place(const __grid_constant__ MeanByPlaceArgs args) {
    begin_kernel();
    const int64_t stride = int64_t(gridDim.x) * kThreads, plane = int64_t(args.h) * args.w;
    for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < args.places; i += stride) {
        const int64_t n = i / plane, p = i - n * plane;
        const int32_t y = int32_t(p / args.w), x = int32_t(p - int64_t(y) * args.w);
        float weight = args.is_first ? args.least : args.weight[i], m[kParts];
        int64_t at[kParts];
#pragma unroll
        for (int k = 0; k < kParts; k++) {
            const Part& part = args.part[k];
            const int32_t row = y - part.top, column = x - part.left;
            const bool is_inside = k < args.parts && row >= 0 && row < part.h && column >= 0 && column < part.w;
            const int64_t place = int64_t(row) * part.w + column, size = int64_t(part.h) * part.w;
            m[k] = is_inside ? part.weights ? part.weights[n % part.weight_samples * size + place] : part.strength : 0.0f;
            at[k] = is_inside ? n * args.channels * size + place : -1;
            weight += m[k];
        }
        for (int c = 0; c < args.channels; c++) {
            float& out = args.out[(n * args.channels + c) * plane + p];
            float sum = args.is_first ? 0.0f : out;
#pragma unroll
            for (int k = 0; k < kParts; k++)
                if (at[k] >= 0) sum += m[k] * args.part[k].x[at[k] + c * (int64_t(args.part[k].h) * args.part[k].w)];
            out = args.is_last ? sum / weight : sum;
        }
        if (!args.is_last) args.weight[i] = weight;
    }
}
SIMT_KERNEL(mean_by_place)
