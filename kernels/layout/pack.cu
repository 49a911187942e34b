// targets: sm_75
// Weights from their stored form to the layouts of GEMM and convolution.
//
//   linear  [N][K]             -> rows of [*][Kp], Kp = K rounded up to 8
//   conv    [Cout][Cin][taps]  -> [Cout][taps][Cp], Cp = Cin rounded up to 8
//   vector  [N]                -> f32
//
// What rounding up adds is zero. For GEGLU, values and gates (the halves of N) alternate in blocks of 8 rows.
#include "raw.cuh"

constexpr int kThreads = 256, kConvFloats = 12 * 1024;

// Place of stored row r, of which the first `half` are values and the others gates; 0: no GEGLU.
PTX int64_t geglu_row(int64_t r, int64_t half) {
    if (half == 0) return r;
    const bool is_gate = r >= half;
    const int64_t j = is_gate ? r - half : r;
    return j / 8 * 16 + j % 8 + (is_gate ? 8 : 0);
}

struct PackLinearArgs {
    const void* src;
    void* dst;  // its row 0 is that of stored row 0
    int64_t n, k, kp;
    int64_t half;       // GEGLU: n / 2, else 0
    int32_t type;       // Stored
    int32_t is_vector;  // every group of eight elements of a row is aligned
};

// grid: any number of blocks; a thread takes eight neighbouring columns
template <class T> PTX void pack_linear(const PackLinearArgs& args) {
    const int64_t octets = args.kp / 8, count = args.n * octets, stride = int64_t(gridDim.x) * kThreads;
    for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += stride) {
        const int64_t row = i / octets, k = i % octets * 8;
        float v[8];
        if (args.is_vector) {
            load_stored8(v, args.src, args.type, row * args.k + k);
        } else {
#pragma unroll
            for (int j = 0; j < 8; j++) v[j] = k + j < args.k ? load_stored(args.src, args.type, row * args.k + k + j) : 0.0f;
        }
        store8(static_cast<T*>(args.dst) + geglu_row(row, args.half) * args.kp + k, v);
    }
}

struct PackConvArgs {
    const void* src;
    void* dst;
    int32_t cin, cp, taps;
    int32_t chunk;  // channels of a block, a multiple of 8; chunk * taps + chunk / 8 floats fit shared memory
    int32_t type;   // Stored
    int32_t unused;
};

struct PackConvSmem {
    float weight[kConvFloats];
};

// grid (ceil(cp / chunk), cout). A channel's taps lie together in the file and a tap's channels in the result; the float
// left free after every eight channels spreads eight threads' reads over all banks.
template <class T> PTX void pack_conv(const PackConvArgs& args) {
    auto& s = dynamic_smem<PackConvSmem>();
    const int c0 = blockIdx.x * args.chunk, stored = min(args.chunk, args.cin - c0), octets = min(args.chunk, args.cp - c0) / 8;
    const size_t src = (size_t(blockIdx.y) * args.cin + c0) * args.taps;
    for (int i = threadIdx.x; i < stored * args.taps; i += kThreads) s.weight[i + i / args.taps / 8] = load_stored(args.src, args.type, src + i);
    __syncthreads();
    T* dst = static_cast<T*>(args.dst) + size_t(blockIdx.y) * args.taps * args.cp + c0;
    for (int i = threadIdx.x; i < octets * args.taps; i += kThreads) {
        const int tap = i / octets, octet = i % octets;
        float v[8];
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const int c = octet * 8 + j;
            v[j] = c < stored ? s.weight[c * args.taps + octet + tap] : 0.0f;
        }
        store8(dst + size_t(tap) * args.cp + octet * 8, v);
    }
}

struct PackVectorArgs {
    const void* src;
    float* dst;
    int64_t n;
    int64_t half;  // as in PackLinearArgs
    int32_t type;
    int32_t unused;
};

// grid: any number of blocks
extern "C" __global__ __launch_bounds__(kThreads) void pack_vector(const __grid_constant__ PackVectorArgs args) {
    begin_kernel();
    const int64_t stride = int64_t(gridDim.x) * kThreads;
    for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < args.n; i += stride)
        args.dst[geglu_row(i, args.half)] = load_stored(args.src, args.type, i);
}
SIMT_KERNEL(pack_vector)

#define PACK(T, suffix)                                                                                                                        \
    extern "C" __global__ __launch_bounds__(kThreads) void pack_linear_##suffix(const __grid_constant__ PackLinearArgs args) { begin_kernel(); pack_linear<T>(args); } \
    SIMT_KERNEL(pack_linear_##suffix)                                                                                                              \
    extern "C" __global__ __launch_bounds__(kThreads) void pack_conv_##suffix(const __grid_constant__ PackConvArgs args) { begin_kernel(); pack_conv<T>(args); }       \
    SIMT_KERNEL(pack_conv_##suffix)
PACK(__half, f16)
PACK(__nv_bfloat16, bf16)
PACK(float, f32)
