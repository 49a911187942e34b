// targets: sm_75
// Between the host's order, f32 [N][C][P] (P = H*W), and the device's, T [N][P][pitch].
//
// A block moves 128 pixels x 32 channels through shared memory, so that both sides are read and written in their own
// order. The odd row of 129 floats keeps the transposed access free of bank conflicts for 32 channels.
#include "element.cuh"

constexpr int kThreads = 256, kTilePixels = 128, kTileChannels = 32;

struct TileSmem {
    float tile[kTileChannels][kTilePixels + 1];
};

struct ToNhwcArgs {
    const float* src;  // [samples][channels][pixels]
    void* dst;         // [copies][samples][pixels][pitch]
    int64_t pixels;
    int32_t channels;
    int32_t width;  // columns written, those from `channels` on with zeros
    int32_t pitch;
    int32_t copies;
    float factor;
    int32_t unused;
};

// grid (ceil(pixels / 128), ceil(width / 32), samples): dst = factor * src
template <class T> PTX void to_nhwc(const ToNhwcArgs& args) {
    auto& s = dynamic_smem<TileSmem>();
    const int64_t p0 = int64_t(blockIdx.x) * kTilePixels;
    const int c0 = blockIdx.y * kTileChannels;
    const int pixels = int(min(int64_t(kTilePixels), args.pixels - p0)), channels = min(kTileChannels, args.width - c0);
    const float* src = args.src + (int64_t(blockIdx.z) * args.channels + c0) * args.pixels + p0;
    for (int i = threadIdx.x; i < channels * kTilePixels; i += kThreads) {
        const int c = i / kTilePixels, p = i % kTilePixels;
        if (p < pixels) s.tile[c][p] = c0 + c < args.channels ? src[c * args.pixels + p] * args.factor : 0.0f;
    }
    __syncthreads();
    T* dst = static_cast<T*>(args.dst) + (blockIdx.z * args.pixels + p0) * args.pitch + c0;
    for (int copy = 0; copy < args.copies; copy++, dst += int64_t(gridDim.z) * args.pixels * args.pitch) {
        for (int i = threadIdx.x; i < channels * pixels; i += kThreads) {
            const int p = i / channels, c = i % channels;
            dst[int64_t(p) * args.pitch + c] = from_float<T>(s.tile[c][p]);
        }
    }
}

struct ToNchwArgs {
    const void* src;  // [samples][pixels][pitch]
    float* dst;       // [samples][channels][pixels]
    int64_t pixels;
    int32_t channels;
    int32_t pitch;
};

// grid (ceil(pixels / 128), ceil(channels / 32), samples)
template <class T> PTX void to_nchw(const ToNchwArgs& args) {
    auto& s = dynamic_smem<TileSmem>();
    const int64_t p0 = int64_t(blockIdx.x) * kTilePixels;
    const int c0 = blockIdx.y * kTileChannels;
    const int pixels = int(min(int64_t(kTilePixels), args.pixels - p0)), channels = min(kTileChannels, args.channels - c0);
    const T* src = static_cast<const T*>(args.src) + (blockIdx.z * args.pixels + p0) * args.pitch + c0;
    for (int i = threadIdx.x; i < channels * pixels; i += kThreads) {
        const int p = i / channels, c = i % channels;
        s.tile[c][p] = to_float(src[int64_t(p) * args.pitch + c]);
    }
    __syncthreads();
    float* dst = args.dst + (int64_t(blockIdx.z) * args.channels + c0) * args.pixels + p0;
    for (int i = threadIdx.x; i < channels * kTilePixels; i += kThreads) {
        const int c = i / kTilePixels, p = i % kTilePixels;
        if (p < pixels) dst[c * args.pixels + p] = s.tile[c][p];
    }
}

#define TRANSPOSE(T, suffix)                                                                                                            \
    extern "C" __global__ __launch_bounds__(kThreads) void to_nhwc_##suffix(const __grid_constant__ ToNhwcArgs args) { begin_kernel(); to_nhwc<T>(args); } \
    SIMT_KERNEL(to_nhwc_##suffix)                                                                                                         \
    extern "C" __global__ __launch_bounds__(kThreads) void to_nchw_##suffix(const __grid_constant__ ToNchwArgs args) { begin_kernel(); to_nchw<T>(args); } \
    SIMT_KERNEL(to_nchw_##suffix)
TRANSPOSE(__half, f16)
TRANSPOSE(__nv_bfloat16, bf16)
TRANSPOSE(float, f32)
