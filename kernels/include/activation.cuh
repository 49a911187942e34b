// activation.cuh: activation functions of epilogues; the numbers are those of `launch::Act` on the host.
#pragma once
#include "ptx.cuh"

enum Act : int32_t { kActNone = 0, kActSilu = 1, kActGelu = 2, kActQuickGelu = 3, kActRelu = 4, kActLeakyRelu = 5 };

PTX float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }
PTX float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }
// The same for results that are rounded to 16 bits: erfc by the rational approximation 7.1.26 of Abramowitz and Stegun, to
// 1.5e-7. A third of the instructions, without branches.
PTX float gelu_fast(float x) {
    const float z = fabsf(x) * 0.70710678118654752f, t = __fdividef(1.0f, 1.0f + 0.3275911f * z);
    const float p = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    return fmaxf(x, 0.0f) - 0.5f * fabsf(x) * p * exp2_approx(-1.4426950408889634f * z * z);
}
PTX float quick_gelu(float x) { return __fdividef(x, 1.0f + __expf(-1.702f * x)); }
PTX float relu(float x) { return x < 0.0f ? 0.0f : x; }
PTX float leaky_relu(float x) { return x < 0.0f ? 0.2f * x : x; }

PTX float apply_activation(float x, int32_t act) {
    switch (act) {
        case kActSilu: return silu(x);
        case kActGelu: return gelu(x);
        case kActQuickGelu: return quick_gelu(x);
        case kActRelu: return relu(x);
        case kActLeakyRelu: return leaky_relu(x);
        default: return x;
    }
}
