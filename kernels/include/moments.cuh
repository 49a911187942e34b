// moments.cuh: mean and spread of values that are merged in a fixed order.
//
// Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
#pragma once
#include "ptx.cuh"

struct Moments {  // of n values: their mean, and the sum of squares about it
    float n, mean, m2;
};

PTX Moments merge(const Moments& a, const Moments& b) {
    const float n = a.n + b.n, d = b.mean - a.mean, w = n > 0.0f ? __fdividef(b.n, n) : 0.0f;
    return {n, a.mean + d * w, a.m2 + b.m2 + d * d * (a.n * w)};
}

// Over the 32 lanes; lane 0 has the result.
PTX Moments warp_merge(Moments v) {
    for (int offset = 16; offset; offset /= 2)
        v = merge(v, {__shfl_xor_sync(~0u, v.n, offset), __shfl_xor_sync(~0u, v.mean, offset), __shfl_xor_sync(~0u, v.m2, offset)});
    return v;
}

// Sums about the first value: however far the mean is from 0, differences stay exact and nothing cancels.
template <int V> struct Tally {
    float pivot[V], sum[V], squares[V];

    PTX void start(const float (&v)[V]) {
#pragma unroll
        for (int i = 0; i < V; i++) pivot[i] = v[i], sum[i] = 0.0f, squares[i] = 0.0f;
    }
    PTX void add(const float (&v)[V]) {
#pragma unroll
        for (int i = 0; i < V; i++) {
            const float d = v[i] - pivot[i];
            sum[i] += d, squares[i] += d * d;
        }
    }
    // Mean, from `origin`, and sum of squares about the mean of component i after n values.
    PTX float2 component(int i, float n, float origin) const {
        const float shift = __fdividef(sum[i], n);
        return make_float2((pivot[i] - origin) + shift, fmaxf(0.0f, squares[i] - sum[i] * shift));
    }
};
