// exp2.cuh: powers of two, on the special-function units or on the multiply-add units.
//
// A multiprocessor of sm_80 and sm_90 evaluates 16 exponentials a clock, against 128 multiply-adds: attention with small
// heads is bound by them, so a share of them goes to the polynomial.
#pragma once
#include "ptx.cuh"

PTX float max_nan(float a, float b) {  // "max.NaN": the larger, or NaN if either is
#if defined(__CUDACC__) && !PTX_TURING
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
#else
    return a != a ? a : b != b ? b : a > b ? a : b;
#endif
}

// 2^x for x < 127 with a relative error of 7.5e-5, below a rounding to half or bfloat16. Below -126 it stays at 2^-126,
// and a NaN becomes NaN or huge.
// x = n + r with n = round(x) from the low bits of x + 1.5*2^23, and 2^r on [-1/2, 1/2] as the cubic polynomial of
// smallest relative error; n is then added to the exponent.
PTX float exp2_polynomial(float x) {
    x = max_nan(x, -126.0f);
    const float shifted = x + 12582912.0f;
    const float r = x - (shifted - 12582912.0f);
    const float y = fmaf(fmaf(fmaf(0.05517166909f, r, 0.2426111222f), r, 0.6932609855f), r, 0.9999280736f);
    uint32_t n, bits;
    memcpy(&n, &shifted, 4);
    memcpy(&bits, &y, 4);
    bits += n << 23;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}
