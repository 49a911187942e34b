// targets: sm_75
// NHWC feature maps reweighted by channel, by place and by frequency, as FreeU does (Si et al., 2023).
//
// `place_means` and `scale_half` scale the first half of the channels by one factor, or by place as the mean over
// channels says. `low_band` scales the frequencies -1 and 0 of every channel's plane and keeps the real part: with
// waves e^(2 pi i t), t one of 0, y/h, x/w and y/h + x/w, out = x + scale * sum over waves of
// Re(sum(x e^(i t)) e^(-i t)). A block has 32 channels of a sample: its warps share the places out, once for the
// seven sums and once for the result; what the second pass reads is in the L2 cache. Memory-bound: x is read twice.
#include "element.cuh"

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kMaxSide = 1024;  // a level below the top of a picture of 16384 pixels
constexpr int kSums = 7;        // of the constant, and two of each wave

struct ScaleHalfArgs {
    const void* x;  // [samples][places][channels]
    void* out;
    float* means;  // [samples][places]; null: one factor
    int64_t places;
    int32_t channels;
    float factor;
};

// The mean over channels of every place. grid (any, samples): a warp a place
template <class T> PTX void place_means(const ScaleHalfArgs& args) {
    const int lane = threadIdx.x % 32;
    const int64_t stride = int64_t(gridDim.x) * kWarps;
    for (int64_t place = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; place < args.places; place += stride) {
        const T* x = static_cast<const T*>(args.x) + (blockIdx.y * args.places + place) * args.channels;
        float sum = 0.0f;
        for (int c = lane; c < args.channels; c += 32) sum += to_float(x[c]);
        for (int offset = 16; offset; offset /= 2) sum += __shfl_down_sync(~0u, sum, offset);
        if (lane == 0) args.means[blockIdx.y * args.places + place] = sum / float(args.channels);
    }
}

struct Extremes {
    float low, high;
};

struct HalfSmem {
    Extremes part[kWarps];
};

// grid (any, samples). By place every block looks through its sample's means first: a few kilobytes of the L2 cache.
template <class T> PTX void scale_half(const ScaleHalfArgs& args) {
    auto& s = dynamic_smem<HalfSmem>();
    const float* means = args.means + blockIdx.y * args.places;
    Extremes v = {0.0f, 0.0f};
    if (args.means) {
        v = {means[0], means[0]};
        for (int64_t i = threadIdx.x; i < args.places; i += kThreads) v = {fminf(v.low, means[i]), fmaxf(v.high, means[i])};
        for (int offset = 16; offset; offset /= 2)
            v = {fminf(v.low, __shfl_xor_sync(~0u, v.low, offset)), fmaxf(v.high, __shfl_xor_sync(~0u, v.high, offset))};
        if (threadIdx.x % 32 == 0) s.part[threadIdx.x / 32] = v;
        __syncthreads();
        for (int i = 0; i < kWarps; i++) v = {fminf(v.low, s.part[i].low), fmaxf(v.high, s.part[i].high)};
    }
    const int64_t count = args.places * args.channels, stride = int64_t(gridDim.x) * kThreads;
    const int64_t first = blockIdx.y * count;
    for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += stride) {
        const int64_t place = i / args.channels;
        float value = to_float(static_cast<const T*>(args.x)[first + i]);
        if (i - place * args.channels < args.channels / 2)
            value *= args.means ? (args.factor - 1.0f) * ((means[place] - v.low) / (v.high - v.low)) + 1.0f : args.factor;
        static_cast<T*>(args.out)[first + i] = from_float<T>(value);
    }
}

struct LowBandArgs {
    const void* x;  // [samples][h][w][channels]
    void* out;
    int32_t h, w, channels;
    float scale;  // (factor - 1) / (h w)
};

struct Wave {
    float cos, sin;
};

struct BandSmem {
    Wave rows[kMaxSide], columns[kMaxSide];
    float part[kWarps][kSums][32];
};

// e^(2 pi i n / period) by an angle within -pi .. pi, where the fast functions are good to 5e-7.
PTX Wave wave(int n, int period) {
    Wave w;
    __sincosf(6.283185307f * float(2 * n > period ? n - period : n) / float(period), &w.sin, &w.cos);
    return w;
}
PTX Wave times(const Wave& a, const Wave& b) { return {a.cos * b.cos - a.sin * b.sin, a.cos * b.sin + a.sin * b.cos}; }

// grid (ceil(channels / 32), samples)
template <class T> PTX void low_band(const LowBandArgs& args) {
    auto& s = dynamic_smem<BandSmem>();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, channel = blockIdx.x * 32 + lane;
    for (int i = threadIdx.x; i < args.h; i += kThreads) s.rows[i] = wave(i, args.h);
    for (int i = threadIdx.x; i < args.w; i += kThreads) s.columns[i] = wave(i, args.w);
    __syncthreads();
    const bool has_channel = channel < args.channels, has_rows = args.h > 1, has_columns = args.w > 1;
    const int places = args.h * args.w;
    const int64_t first = int64_t(blockIdx.y) * places * args.channels + channel;
    const T* x = static_cast<const T*>(args.x) + first;
    float sum[kSums] = {};
    if (has_channel) {
        for (int i = warp; i < places; i += kWarps) {
            const float v = to_float(x[int64_t(i) * args.channels]);
            const Wave r = s.rows[i / args.w], c = s.columns[i % args.w], both = times(r, c);
            sum[0] += v;
            sum[1] += v * r.cos, sum[2] += v * r.sin;
            sum[3] += v * c.cos, sum[4] += v * c.sin;
            sum[5] += v * both.cos, sum[6] += v * both.sin;
        }
    }
    for (int k = 0; k < kSums; k++) s.part[warp][k][lane] = sum[k];
    __syncthreads();
    if (!has_channel) return;
    for (int k = 0; k < kSums; k++) {
        sum[k] = 0.0f;
        for (int i = 0; i < kWarps; i++) sum[k] += s.part[i][k][lane];
    }
    // A side of one place has the frequency 0 alone.
    if (!has_rows) sum[1] = sum[2] = 0.0f;
    if (!has_columns) sum[3] = sum[4] = 0.0f;
    if (!has_rows || !has_columns) sum[5] = sum[6] = 0.0f;
    T* out = static_cast<T*>(args.out) + first;
    for (int i = warp; i < places; i += kWarps) {
        const Wave r = s.rows[i / args.w], c = s.columns[i % args.w], both = times(r, c);
        const float band = sum[0] + sum[1] * r.cos + sum[2] * r.sin + sum[3] * c.cos + sum[4] * c.sin + sum[5] * both.cos + sum[6] * both.sin;
        out[int64_t(i) * args.channels] = from_float<T>(to_float(x[int64_t(i) * args.channels]) + args.scale * band);
    }
}

#define REWEIGHT(op, Args, T, suffix)                                                                                                                            \
    extern "C" __global__ __launch_bounds__(kThreads) void op##_##suffix(const __grid_constant__ Args args) { begin_kernel(); op<T>(args); } \
    SIMT_KERNEL(op##_##suffix)
#define REWEIGHT_ALL(op, Args) REWEIGHT(op, Args, __half, f16) REWEIGHT(op, Args, __nv_bfloat16, bf16) REWEIGHT(op, Args, float, f32)
REWEIGHT_ALL(place_means, ScaleHalfArgs)
REWEIGHT_ALL(scale_half, ScaleHalfArgs)
REWEIGHT_ALL(low_band, LowBandArgs)
