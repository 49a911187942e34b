// product.cuh: the arguments of products, for the kernels of sm_80 and those in float. Their twins are in launch/gemm.rs and
// launch/conv.rs.
#pragma once
#include "epilogue.cuh"

// Linear layers. Rows of x and x2 and of w are elements of the kernel's type.
struct GemmArgs {
    const void* x;
    const void* x2;
    const void* w;
    int64_t pitch, pitch2;
    int32_t m, n, k, k1;  // k1: columns of x; k - k1 come from x2
    int32_t w_pitch;
    int32_t tiles_m, tiles_n, k_tiles_per_split;
    EpilogueArgs epilogue;
};

// Convolutions, NHWC.
struct ConvArgs {
    const void* x;
    const void* x2;
    const void* w;
    int64_t pitch, pitch2;  // elements from one pixel to the next
    int32_t c1, c2, cp;     // channels of x and x2, and both in w
    int32_t batch, height, width;  // of x and x2
    int32_t out_height, out_width, cout;
    int32_t kernel_h, kernel_w, stride, pad_top, pad_left;
    int32_t doubling;  // 1: x and x2 count as twice as high and wide
    int32_t tiles_m, tiles_n, k_tiles_per_split;
    EpilogueArgs epilogue;
};
