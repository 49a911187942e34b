// groupnorm.cuh: what the GroupNorm kernels share: arguments, how threads lie on pixels and channels, the last step.
#pragma once
#include "activation.cuh"
#include "moments.cuh"
#include "vector.cuh"

constexpr int kThreads = 512;

struct GroupNormArgs {
    const void* x;       // [samples][pixels][c1]
    const void* x2;      // [samples][pixels][c2]
    const float* scale;  // [c1 + c2]
    const float* shift;
    void* out;        // [samples][pixels][c1 + c2]
    float2* partial;  // [samples][groups][runs]: mean from the group's pivot, sum of squares about the mean
    float2* merged;   // [samples][groups]
    int32_t pixels, c1, c2, groups;
    int32_t run, runs;  // pixels of a run, runs of a sample
    int32_t span;       // groupnorm_apply: pixels of a block
    int32_t slab;       // groupnorm_fused: channels of a block
    float eps;
    int32_t silu;
};

// Where a block's threads lie: `lanes` pixels side by side, each `width` vectors of V channels.
struct Layout {
    int width, lanes;
    PTX explicit Layout(int vectors) : width(vectors), lanes(max(1, kThreads / vectors)) {}
    PTX int active() const { return width * lanes; }
    PTX int pixels_of(int lane, int count) const { return count > lane ? (count - lane - 1) / lanes + 1 : 0; }
};

// Channel c of the sample's first pixel, and the distance to the next pixel.
template <class T> struct Column {
    const T* p;
    int pitch;
    PTX Column(const GroupNormArgs& args, int c) {
        const bool second = c >= args.c1;
        pitch = second ? args.c2 : args.c1;
        p = static_cast<const T*>(second ? args.x2 : args.x) + size_t(blockIdx.y) * args.pixels * pitch + (second ? c - args.c1 : c);
    }
};

// The first value of a group in its sample, for floats. Means are kept as distances from it: however far from 0 they are, sums of
// differences are exact, and no digit of a mean is spent on the distance. Halves have few digits to lose and kernels that have
// no register to spare: their means are distances from 0.
template <class T> PTX float pivot(const GroupNormArgs& args, int group, int size) {
    if constexpr (sizeof(T) == 4) return to_float(*Column<T>(args, group * size).p);
    return 0.0f;
}

// Mean (about the pivot) and 1/deviation of the groups, as threads look them up.
PTX float2 finish(const GroupNormArgs& args, float mean, float m2, int size) {
    return make_float2(mean, rsqrtf(m2 / (float(args.pixels) * size) + args.eps));
}

// What a thread does to its channels c .. c+V: (x - center) * factor + shift, with the mean as the center and what rounding
// leaves out of it in the shift. One center for all channels of halves saves seven registers: it is their first group's mean, and
// the digits that are lost where the next group's is far away lie far below a half's.
template <class T, int V> struct Affine {
    static constexpr int kCenters = sizeof(T) == 4 ? V : 1;
    float center[kCenters], factor[V], shift[V];
    // `stats` is of the groups from `group` on.
    PTX Affine(const GroupNormArgs& args, const float2* stats, int c, int group, int size) {
        int g = c / size, left = size - c % size;
        float from = pivot<T>(args, g, size);
        center[0] = from + stats[g - group].x;
#pragma unroll
        for (int i = 0; i < V; i++) {
            if (left == 0) g++, left = size, from = pivot<T>(args, g, size);
            left--;
            const float2 m = stats[g - group];
            if constexpr (kCenters > 1) center[i] = from + m.x;
            factor[i] = m.y * args.scale[c + i];
            shift[i] = args.shift[c + i] - ((from - center[i % kCenters]) + m.x) * factor[i];
        }
    }
    PTX void operator()(float (&v)[V], bool with_silu) const {
#pragma unroll
        for (int i = 0; i < V; i++) {
            v[i] = (v[i] - center[i % kCenters]) * factor[i] + shift[i];
            if (with_silu) v[i] = silu(v[i]);
        }
    }
};

