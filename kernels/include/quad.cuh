// quad.cuh: exchanges among the four lanes that share a row of a tensor-core fragment.
#pragma once
#include "ptx.cuh"

// Lane c of a quad gives v[b], its two columns of block b of eight columns, and receives the eight columns of block c; and back.
PTX void transpose_quad(uint32_t (&v)[4]) {
    const unsigned lane = threadIdx.x % 4;
#pragma unroll
    for (int step = 1; step <= 2; step *= 2) {
        const bool upper = lane & step;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i & step) continue;
            const uint32_t got = __shfl_xor_sync(~0u, upper ? v[i] : v[i + step], step);
            v[i] = upper ? got : v[i];
            v[i + step] = upper ? v[i + step] : got;
        }
    }
}
