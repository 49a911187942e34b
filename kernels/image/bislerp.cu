// targets: sm_75
// Resizing of NHWC maps by directions ("bislerp"): between two neighbouring pixels the channel vector turns along the great
// circle and its length changes linearly (slerp: Shoemake, "Animating rotation with quaternion curves", 1985). First along the
// width, then along the height.
//
// A warp makes one pixel from four: a sweep over the channels for the lengths and products of the two pairs, one for those of
// the two vectors between them, one for the result. Nothing is kept in memory between the two directions; what the second and
// third sweeps read is in the L1 cache. Source positions are computed in float, without fusing, as the host does
// (tensor/bislerp.rs): one on the other side of an integer moves a whole pixel.
#include "element.cuh"

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr float kParallel = 1e-5f;  // vectors whose cosine is this close to 1 or -1 are not turned

struct BislerpArgs {
    const void* x;   // [samples][in_h][in_w][channels]
    void* out;       // [samples][out_h][out_w][channels]
    uint64_t count;  // pixels of the result
    int32_t in_h, in_w, out_h, out_w, channels;
    float scale_y, scale_x;  // in / out
    int32_t unused;
};

// Between which source coordinates an output coordinate lies, and how far on the way.
struct Between {
    int near, far;
    float ratio;
};

PTX Between between(int i, int old, float scale) {
    const int last = old - 1;
    const float place = fmaxf(__fadd_rn(__fmul_rn(float(i) + 0.5f, scale), -0.5f), 0.0f);
    const int at = min(int(place), last), next = min(at + 1, last);
    const float t = fminf(place - float(at), 1.0f), s = 1.0f - t;
    const float position = __fadd_rn(__fmul_rn(float(at), s), __fmul_rn(float(next), t));
    const float shifted = __fadd_rn(__fmul_rn(float(min(at + 1, last)), s), __fmul_rn(float(min(next + 1, last)), t));
    return {min(int(position), last), min(int(shifted), last), position - floorf(position)};
}

// Squares of the lengths of a and b, and their product.
struct Pair {
    float aa, bb, ab;
    PTX void add(float a, float b) { aa += a * a, bb += b * b, ab += a * b; }
    PTX void sum_over_warp() {
        for (int offset = 16; offset; offset /= 2) {
            aa += __shfl_xor_sync(~0u, aa, offset);
            bb += __shfl_xor_sync(~0u, bb, offset);
            ab += __shfl_xor_sync(~0u, ab, offset);
        }
    }
};

// The vector between is of_a * a + of_b * b.
struct Mix {
    float of_a, of_b;
    PTX float at(float a, float b) const { return of_a * a + of_b * b; }
};

PTX Mix mix(const Pair& p, float ratio) {
    const float a = sqrtf(p.aa), b = sqrtf(p.bb);
    // A zero vector has no direction: its direction counts as zero.
    const float dot = a == 0.0f || b == 0.0f ? 0.0f : p.ab / (a * b);
    if (dot > 1.0f - kParallel) return {1.0f, 0.0f};
    if (dot < kParallel - 1.0f) return {1.0f - ratio, ratio};
    const float angle = acosf(dot), length = a * (1.0f - ratio) + b * ratio, whole = sinf(angle);
    const float of_a = sinf((1.0f - ratio) * angle) / whole, of_b = sinf(ratio * angle) / whole;
    return {a == 0.0f ? 0.0f : of_a * length / a, b == 0.0f ? 0.0f : of_b * length / b};
}

// grid: any number of blocks
template <class T> PTX void bislerp(const BislerpArgs& args) {
    const int lane = threadIdx.x % 32;
    const uint64_t stride = uint64_t(gridDim.x) * kWarps;
    for (uint64_t pixel = uint64_t(blockIdx.x) * kWarps + threadIdx.x / 32; pixel < args.count; pixel += stride) {
        const uint64_t row = pixel / args.out_w;
        const Between across = between(int(pixel - row * args.out_w), args.in_w, args.scale_x);
        const uint64_t n = row / args.out_h;
        const Between down = between(int(row - n * args.out_h), args.in_h, args.scale_y);
        const T* map = static_cast<const T*>(args.x) + n * args.in_h * args.in_w * args.channels;
        const T* upper = map + int64_t(down.near) * args.in_w * args.channels;
        const T* lower = map + int64_t(down.far) * args.in_w * args.channels;
        const int64_t near = int64_t(across.near) * args.channels, far = int64_t(across.far) * args.channels;
        Pair above = {}, below = {}, both = {};
        for (int c = lane; c < args.channels; c += 32) {
            above.add(to_float(upper[near + c]), to_float(upper[far + c]));
            below.add(to_float(lower[near + c]), to_float(lower[far + c]));
        }
        above.sum_over_warp(), below.sum_over_warp();
        const Mix a = mix(above, across.ratio), b = mix(below, across.ratio);
        for (int c = lane; c < args.channels; c += 32)
            both.add(a.at(to_float(upper[near + c]), to_float(upper[far + c])), b.at(to_float(lower[near + c]), to_float(lower[far + c])));
        both.sum_over_warp();
        const Mix v = mix(both, down.ratio);
        T* out = static_cast<T*>(args.out) + pixel * args.channels;
        for (int c = lane; c < args.channels; c += 32) {
            const float u = a.at(to_float(upper[near + c]), to_float(upper[far + c]));
            out[c] = from_float<T>(v.at(u, b.at(to_float(lower[near + c]), to_float(lower[far + c]))));
        }
    }
}

#define BISLERP(T, suffix)                                                                                                                              \
    extern "C" __global__ __launch_bounds__(kThreads) void bislerp_##suffix(const __grid_constant__ BislerpArgs args) { begin_kernel(); bislerp<T>(args); } \
    SIMT_KERNEL(bislerp_##suffix)
BISLERP(__half, f16)
BISLERP(__nv_bfloat16, bf16)
BISLERP(float, f32)
