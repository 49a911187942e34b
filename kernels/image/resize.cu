// targets: sm_75
// Resizing of NHWC maps with the arithmetic of PyTorch's `interpolate` (align_corners = false, no antialiasing):
// source positions are computed in float, because one on the other side of an integer moves a whole pixel.
//
// A thread makes V channels of one output pixel from all its taps: neighbouring pixels' taps meet in the L1 cache.
// Cubic weights: Keys, "Cubic convolution interpolation for digital image processing", 1981, with a = -0.75.
#include "vector.cuh"

constexpr int kThreads = 256;

// Numbered as `launch::image::Filter` on the host.
enum Filter : int32_t { kNearest = 0, kNearestExact = 1, kBilinear = 2, kBicubic = 3, kArea = 4 };

struct ResizeArgs {
    const void* x;  // [samples][in_h][in_w][channels]
    void* out;      // [samples][out_h][out_w][channels]
    uint64_t count;  // vectors of the result
    int32_t in_h, in_w, out_h, out_w, channels;
    int32_t filter;
    float scale_y, scale_x;  // in / out
};

// The source coordinates of one output coordinate along one axis.
struct Taps {
    int first, count, last;  // coordinate i is first + i, kept within 0 .. last
    float t;                 // place between the coordinates (bilinear, bicubic)
    PTX int at(int i) const { return max(0, min(first + i, last)); }
};

PTX Taps taps(int filter, int i, int old, int size, float scale) {
    switch (filter) {
        case kNearest: return {min(int(float(i) * scale), old - 1), 1, old - 1, 0.0f};
        case kNearestExact: return {min(int((float(i) + 0.5f) * scale), old - 1), 1, old - 1, 0.0f};
        case kBilinear: {
            const float position = fmaxf((float(i) + 0.5f) * scale - 0.5f, 0.0f);
            const int first = min(int(position), old - 1);
            return {first, 2, old - 1, fminf(position - float(first), 1.0f)};
        }
        case kBicubic: {
            const float position = (float(i) + 0.5f) * scale - 0.5f, base = floorf(position);
            return {int(base) - 1, 4, old - 1, position - base};
        }
        default: {  // the window of adaptive pooling
            const int first = int(int64_t(i) * old / size), end = int((int64_t(i + 1) * old + size - 1) / size);
            return {first, end - first, old - 1, 0.0f};
        }
    }
}

PTX float weight(int filter, const Taps& taps, int i) {
    constexpr float a = -0.75f;
    switch (filter) {
        case kBilinear: return i ? taps.t : 1.0f - taps.t;
        case kBicubic: {
            const float x = fabsf(taps.t + 1.0f - float(i));
            return x <= 1.0f ? ((a + 2.0f) * x - (a + 3.0f)) * x * x + 1.0f : ((a * x - 5.0f * a) * x + 8.0f * a) * x - 4.0f * a;
        }
        case kArea: return 1.0f / float(taps.count);
        default: return 1.0f;
    }
}

// grid: any number of blocks
template <class T, int V> PTX void resize(const ResizeArgs& args) {
    const uint64_t stride = uint64_t(gridDim.x) * kThreads;
    for (uint64_t i = uint64_t(blockIdx.x) * kThreads + threadIdx.x; i < args.count; i += stride) {
        uint64_t pixel, row, n;
        uint32_t c, x, y;
        split(i, args.channels / V, pixel, c);
        split(pixel, args.out_w, row, x);
        split(row, args.out_h, n, y);
        const Taps down = taps(args.filter, y, args.in_h, args.out_h, args.scale_y);
        const Taps across = taps(args.filter, x, args.in_w, args.out_w, args.scale_x);
        const T* map = static_cast<const T*>(args.x) + n * args.in_h * args.in_w * args.channels + c * V;
        float sum[V] = {};
        for (int ky = 0; ky < down.count; ky++) {
            float line[V] = {};
            const T* from = map + int64_t(down.at(ky)) * args.in_w * args.channels;
            for (int kx = 0; kx < across.count; kx++) {
                float v[V];
                load_vec(v, from + int64_t(across.at(kx)) * args.channels);
                const float w = weight(args.filter, across, kx);
#pragma unroll
                for (int j = 0; j < V; j++) line[j] += w * v[j];
            }
            const float w = weight(args.filter, down, ky);
#pragma unroll
            for (int j = 0; j < V; j++) sum[j] += w * line[j];
        }
        store_vec(static_cast<T*>(args.out) + i * V, sum);
    }
}

#define RESIZE(T, suffix)                                                                                                                \
    extern "C" __global__ __launch_bounds__(kThreads) void resize_##suffix(const __grid_constant__ ResizeArgs args) { begin_kernel(); resize<T, 8>(args); } \
    SIMT_KERNEL(resize_##suffix)                                                                                                           \
    extern "C" __global__ __launch_bounds__(kThreads) void resize_scalar_##suffix(const __grid_constant__ ResizeArgs args) { begin_kernel(); resize<T, 1>(args); } \
    SIMT_KERNEL(resize_scalar_##suffix)
RESIZE(__half, f16)
RESIZE(__nv_bfloat16, bf16)
RESIZE(float, f32)
