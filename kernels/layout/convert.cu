// targets: sm_75
// Element type of a flat array: from any stored type to half, bfloat16 or float, rounded to nearest even.
#include "raw.cuh"

struct ConvertArgs {
    const void* src;
    void* dst;
    uint64_t count;
    int32_t type;       // Stored
    int32_t is_vector;  // both begin at multiples of 16 bytes
};

// grid: any number of blocks; a thread takes eight neighbouring elements
template <class T> PTX void convert(const ConvertArgs& args) {
    const uint64_t stride = uint64_t(gridDim.x) * blockDim.x * 8;
    for (uint64_t i = (uint64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 8; i < args.count; i += stride) {
        T* dst = static_cast<T*>(args.dst) + i;
        if (args.is_vector && i + 8 <= args.count) {
            float v[8];
            load_stored8(v, args.src, args.type, i);
            store8(dst, v);
        } else {
            const int left = int(min(uint64_t(8), args.count - i));
            for (int j = 0; j < left; j++) dst[j] = from_float<T>(load_stored(args.src, args.type, i + j));
        }
    }
}

#define CONVERT(T, name)                                                                                              \
    extern "C" __global__ __launch_bounds__(256) void name(const __grid_constant__ ConvertArgs args) { begin_kernel(); convert<T>(args); } \
    SIMT_KERNEL(name)
CONVERT(__half, convert_f16)
CONVERT(__nv_bfloat16, convert_bf16)
CONVERT(float, convert_f32)
