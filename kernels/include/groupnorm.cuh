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
    float2* partial;  // [samples][groups][runs]: mean, sum of squares about it
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

// Mean and 1/deviation of the groups, as threads look them up.
PTX float2 finish(const GroupNormArgs& args, float mean, float m2, int size) {
    return make_float2(mean, rsqrtf(m2 / (float(args.pixels) * size) + args.eps));
}

// What a thread does to its channels c .. c+V: (x - center) * factor + shift. One center for all of them saves seven
// registers; it is their first group's mean, so that far from zero nothing cancels unless the groups' means differ, too.
template <int V> struct Affine {
    float center, factor[V], shift[V];
    // `stats` is of the groups from `group` on.
    PTX Affine(const GroupNormArgs& args, const float2* stats, int c, int group, int size) {
        int g = c / size, left = size - c % size;
        center = stats[g - group].x;
#pragma unroll
        for (int i = 0; i < V; i++) {
            if (left == 0) g++, left = size;
            left--;
            const float2 m = stats[g - group];
            factor[i] = m.y * args.scale[c + i];
            shift[i] = args.shift[c + i] - (m.x - center) * factor[i];
        }
    }
    PTX void operator()(float (&v)[V], bool with_silu) const {
#pragma unroll
        for (int i = 0; i < V; i++) {
            v[i] = (v[i] - center) * factor[i] + shift[i];
            if (with_silu) v[i] = silu(v[i]);
        }
    }
};

