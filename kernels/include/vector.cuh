// vector.cuh: V neighbouring elements as one access: 8 (16-byte loads) where alignment allows, else 1.
#pragma once
#include "element.cuh"

// Loaded but not yet converted, so that several loads can be in flight in few registers.
template <class T, int V> struct Packed;

template <class T> struct Packed<T, 1> {
    T v;
    PTX static Packed load(const T* p) { return {*p}; }
    PTX void unpack(float (&f)[1]) const { f[0] = to_float(v); }
};

template <class T> struct Packed<T, 8> {
    uint4 v[sizeof(T) / 2];
    PTX static Packed load(const T* p) {
        Packed r;
        r.v[0] = reinterpret_cast<const uint4*>(p)[0];
        if constexpr (sizeof(T) == 4) r.v[1] = reinterpret_cast<const uint4*>(p)[1];
        return r;
    }
    PTX void unpack(float (&f)[8]) const {
        if constexpr (sizeof(T) == 4) {
            memcpy(f, v, 32);
        } else {
            unpack2<T>(f[0], f[1], v[0].x), unpack2<T>(f[2], f[3], v[0].y);
            unpack2<T>(f[4], f[5], v[0].z), unpack2<T>(f[6], f[7], v[0].w);
        }
    }
};

template <int V, class T> PTX void load_vec(float (&f)[V], const T* p) { Packed<T, V>::load(p).unpack(f); }

template <class T> PTX void store_vec(T* p, const float (&f)[8]) { store8(p, f); }
template <class T> PTX void store_vec(T* p, const float (&f)[1]) { *p = from_float<T>(f[0]); }

// i = q * d + r, in 32 bits where they suffice: a 64-bit division takes some seventy instructions.
PTX void split(uint64_t i, uint32_t d, uint64_t& q, uint32_t& r) {
    if (i >> 32 == 0) {
        const uint32_t small = uint32_t(i) / d;
        q = small, r = uint32_t(i) - small * d;
    } else {
        q = i / d, r = uint32_t(i - q * d);
    }
}
