// raw.cuh: weights as files store them, read as floats.
#pragma once
#include "element.cuh"

// Numbered as `launch::layout::Stored` on the host.
enum Stored : int32_t { kStoredF32 = 0, kStoredF16 = 1, kStoredBF16 = 2, kStoredF8E4M3 = 3, kStoredF8E5M2 = 4 };

PTX __half half_of_bits(uint16_t bits) {
    __half h;
    memcpy(&h, &bits, 2);
    return h;
}
// OCP 8-bit floating point specification, E5M2: the upper half of an IEEE half.
PTX float f8e5m2_to_float(uint8_t x) { return to_float(half_of_bits(uint16_t(x << 8))); }
// E4M3: a half's fields shifted by one, the exponent's bias 7 instead of 15; no infinity, one NaN.
PTX float f8e4m3_to_float(uint8_t x) {
    if ((x & 0x7f) == 0x7f) return to_float(half_of_bits(0x7e00));
    return to_float(half_of_bits(uint16_t((x & 0x80) << 8 | (x & 0x7f) << 7))) * 256.0f;
}

// Element i of `src`.
PTX float load_stored(const void* src, int32_t type, size_t i) {
    switch (type) {
        case kStoredF32: return static_cast<const float*>(src)[i];
        case kStoredF16: return to_float(static_cast<const __half*>(src)[i]);
        case kStoredBF16: return to_float(static_cast<const __nv_bfloat16*>(src)[i]);
        case kStoredF8E4M3: return f8e4m3_to_float(static_cast<const uint8_t*>(src)[i]);
        default: return f8e5m2_to_float(static_cast<const uint8_t*>(src)[i]);
    }
}

// Elements i .. i+8, whose address is a multiple of 16 bytes (8-bit types: of 8).
PTX void load_stored8(float (&v)[8], const void* src, int32_t type, size_t i) {
    switch (type) {
        case kStoredF32: return load8(v, static_cast<const float*>(src) + i);
        case kStoredF16: return load8(v, static_cast<const __half*>(src) + i);
        case kStoredBF16: return load8(v, static_cast<const __nv_bfloat16*>(src) + i);
        default: {
            const uint2 raw = *reinterpret_cast<const uint2*>(static_cast<const uint8_t*>(src) + i);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const uint8_t x = uint8_t((j < 4 ? raw.x : raw.y) >> (j % 4 * 8));
                v[j] = type == kStoredF8E4M3 ? f8e4m3_to_float(x) : f8e5m2_to_float(x);
            }
        }
    }
}
