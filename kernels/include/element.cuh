// element.cuh: elements in memory and the floats that kernels compute with.
#pragma once
#include "ptx.cuh"

PTX float to_float(float x) { return x; }
PTX float to_float(__half x) { return __half2float(x); }
PTX float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T> PTX T from_float(float x);
template <> PTX float from_float<float>(float x) { return x; }
template <> PTX __half from_float<__half>(float x) { return __float2half_rn(x); }
template <> PTX __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// Two neighbouring elements as one 32-bit register, the first in the low half.
template <class T> PTX uint32_t pack2(float x, float y);
template <> PTX uint32_t pack2<__half>(float x, float y) { return pack_half2(x, y); }
template <> PTX uint32_t pack2<__nv_bfloat16>(float x, float y) {
#ifdef __CUDACC__
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);  // one instruction
    uint32_t v;
    memcpy(&v, &pair, 4);
    return v;
#else
    __nv_bfloat16 a = __float2bfloat16_rn(x), b = __float2bfloat16_rn(y);
    uint16_t lo, hi;
    memcpy(&lo, &a, 2);
    memcpy(&hi, &b, 2);
    return uint32_t(hi) << 16 | lo;
#endif
}
template <class T> PTX void unpack2(float& x, float& y, uint32_t v) {
    T t[2];
    memcpy(t, &v, 4);
    x = to_float(t[0]), y = to_float(t[1]);
}

// Eight elements from and to an address that is a multiple of 16 bytes.
template <class T> PTX void load8(float (&v)[8], const T* p) {
    if constexpr (sizeof(T) == 4) {
        const float4 a = *reinterpret_cast<const float4*>(p), b = *reinterpret_cast<const float4*>(p + 4);
        v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
    } else {
        const uint4 a = *reinterpret_cast<const uint4*>(p);
        unpack2<T>(v[0], v[1], a.x), unpack2<T>(v[2], v[3], a.y), unpack2<T>(v[4], v[5], a.z), unpack2<T>(v[6], v[7], a.w);
    }
}
template <class T> PTX void store8(T* p, const float (&v)[8]) {
    if constexpr (sizeof(T) == 4) {
        *reinterpret_cast<float4*>(p) = make_float4(v[0], v[1], v[2], v[3]);
        *reinterpret_cast<float4*>(p + 4) = make_float4(v[4], v[5], v[6], v[7]);
    } else {
        *reinterpret_cast<uint4*>(p) = make_uint4(pack2<T>(v[0], v[1]), pack2<T>(v[2], v[3]), pack2<T>(v[4], v[5]), pack2<T>(v[6], v[7]));
    }
}
