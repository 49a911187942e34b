// targets: sm_75
// What the tensor cores do with operands that never leave the registers: the ceiling that kernels are measured against.
#include "element.cuh"

struct CeilingArgs {
    float* out;       // one number a thread, so that nothing is optimised away
    int32_t rounds;   // products a warp issues: rounds * kChains
    int32_t unused;
};

constexpr int kChains = 8;  // independent accumulators of a warp: enough to hide the latency of one product

// grid: some blocks per multiprocessor, 256 threads.
template <class T> __device__ __forceinline__ void ceiling(const CeilingArgs& args) {
    const unsigned thread = blockIdx.x * blockDim.x + threadIdx.x;
    // Values that differ between threads and change sign: constant operands draw less power and run faster.
    uint32_t a[4], b[2];
    for (int i = 0; i < 4; i++) a[i] = pack2<T>(0.001f * float(thread % 61) - 0.03f, 0.002f * float(i) - 0.003f);
    for (int i = 0; i < 2; i++) b[i] = pack2<T>(0.001f * float(thread % 53) - 0.026f, 0.004f * float(i) - 0.002f);
    float acc[kChains][4] = {};
    for (int r = 0; r < args.rounds; r++)
        for (int c = 0; c < kChains; c++) mma_m16n8k16<T>(acc[c], a, b[0], b[1]);
    float sum = 0;
    for (int c = 0; c < kChains; c++)
        for (int i = 0; i < 4; i++) sum += acc[c][i];
    args.out[thread] = sum;
}

#define CEILING(T, name)                                                                                                      \
    extern "C" __global__ __launch_bounds__(256) void name(const __grid_constant__ CeilingArgs args) { begin_kernel(); ceiling<T>(args); } \
    SIMT_KERNEL(name)
CEILING(__half, ceiling_sm80_f16)
CEILING(__nv_bfloat16, ceiling_sm80_bf16)
