// targets: sm_75
// Between 8-bit pictures and the range -1..1 of models.
//
// To 8 bits: trunc(255 * clamp((x + 1) / 2, 0, 1)), every step rounded to float. From 8 bits: 2 (v / 255) - 1.
#include "vector.cuh"

constexpr int kThreads = 256, kMaxLatentChannels = 16;

PTX uint32_t level(float v) { return uint32_t(fminf(fmaxf((v + 1.0f) * 0.5f, 0.0f), 1.0f) * 255.0f); }

// Writes `count` (at most 4) bytes, the first in the low bits of `bytes`, to a multiple of 4.
PTX void store_bytes(uint8_t* out, uint32_t bytes, int count) {
    if (count == 4) {
        *reinterpret_cast<uint32_t*>(out) = bytes;
    } else {
        for (int i = 0; i < count; i++) out[i] = uint8_t(bytes >> 8 * i);
    }
}

struct ToRgb8Args {
    const void* x;  // [pixels][pitch]
    uint8_t* out;   // [pixels][channels], at a multiple of 4
    uint64_t count;  // bytes of the result
    int32_t channels, pitch;
};

// grid: any number of blocks; a thread makes four neighbouring bytes
template <class T> PTX void to_rgb8(const ToRgb8Args& args) {
    const uint64_t stride = uint64_t(gridDim.x) * kThreads * 4;
    for (uint64_t i = (uint64_t(blockIdx.x) * kThreads + threadIdx.x) * 4; i < args.count; i += stride) {
        const int count = int(min(uint64_t(4), args.count - i));
        uint64_t pixel;
        uint32_t c, bytes = 0;
        split(i, args.channels, pixel, c);
        const T* x = static_cast<const T*>(args.x) + pixel * args.pitch;
        for (int j = 0; j < count; j++) {
            bytes |= level(to_float(x[c])) << 8 * j;
            if (++c == uint32_t(args.channels)) c = 0, x += args.pitch;
        }
        store_bytes(args.out + i, bytes, count);
    }
}

struct FromRgb8Args {
    const uint8_t* x;  // [pixels][channels]
    void* out;         // [pixels][pitch]
    uint64_t count;    // vectors of the result
    int32_t channels, pitch;
    int32_t width;  // columns written, those from `channels` on with zeros
    int32_t unused;
};

// grid: any number of blocks
template <class T, int V> PTX void from_rgb8(const FromRgb8Args& args) {
    const uint64_t stride = uint64_t(gridDim.x) * kThreads;
    for (uint64_t i = uint64_t(blockIdx.x) * kThreads + threadIdx.x; i < args.count; i += stride) {
        uint64_t pixel;
        uint32_t c;
        split(i, args.width / V, pixel, c);
        c *= V;
        float v[V];
#pragma unroll
        for (int j = 0; j < V; j++) {
            const bool stored = int(c) + j < args.channels;
            v[j] = stored ? float(args.x[pixel * args.channels + c + j]) / 255.0f * 2.0f - 1.0f : 0.0f;
        }
        store_vec(static_cast<T*>(args.out) + pixel * args.pitch + c, v);
    }
}

struct PreviewArgs {
    const float* latent;  // [samples][channels][pixels]
    uint8_t* out;         // [samples][pixels][3], at a multiple of 4
    uint64_t count;       // pixels of all samples
    uint32_t pixels;
    int32_t channels;
    float factor[kMaxLatentChannels][3];
    float bias[3];
    int32_t unused;
};

// A linear map from a latent's channels to colours. grid: any number of blocks; a thread makes four pixels
extern "C" __global__ __launch_bounds__(kThreads) void preview(const __grid_constant__ PreviewArgs args) {
    begin_kernel();
    const uint64_t stride = uint64_t(gridDim.x) * kThreads * 4;
    for (uint64_t i = (uint64_t(blockIdx.x) * kThreads + threadIdx.x) * 4; i < args.count; i += stride) {
        const int count = int(min(uint64_t(4), args.count - i));
        uint32_t words[3] = {};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (j >= count) break;
            uint64_t n;
            uint32_t p;
            split(i + j, args.pixels, n, p);
            const float* x = args.latent + n * args.channels * args.pixels + p;
            float rgb[3] = {};
            for (int c = 0; c < args.channels; c++) {
                const float v = x[uint64_t(c) * args.pixels];
#pragma unroll
                for (int k = 0; k < 3; k++) rgb[k] += v * args.factor[c][k];
            }
#pragma unroll
            for (int k = 0; k < 3; k++) {
                const int byte = 3 * j + k;
                words[byte / 4] |= level(rgb[k] + args.bias[k]) << 8 * (byte % 4);
            }
        }
#pragma unroll
        for (int k = 0; k < 3; k++) store_bytes(args.out + 3 * i + 4 * k, words[k], max(0, min(4, 3 * count - 4 * k)));
    }
}
SIMT_KERNEL(preview)

#define RGB8(T, suffix)                                                                                                                 \
    extern "C" __global__ __launch_bounds__(kThreads) void to_rgb8_##suffix(const __grid_constant__ ToRgb8Args args) { begin_kernel(); to_rgb8<T>(args); } \
    SIMT_KERNEL(to_rgb8_##suffix)                                                                                                         \
    extern "C" __global__ __launch_bounds__(kThreads) void from_rgb8_##suffix(const __grid_constant__ FromRgb8Args args) { begin_kernel(); from_rgb8<T, 8>(args); } \
    SIMT_KERNEL(from_rgb8_##suffix)                                                                                                         \
    extern "C" __global__ __launch_bounds__(kThreads) void from_rgb8_scalar_##suffix(const __grid_constant__ FromRgb8Args args) { begin_kernel(); from_rgb8<T, 1>(args); } \
    SIMT_KERNEL(from_rgb8_scalar_##suffix)
RGB8(__half, f16)
RGB8(__nv_bfloat16, bf16)
RGB8(float, f32)
