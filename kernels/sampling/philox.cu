// targets: sm_75
// Random numbers by Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011),
// normal ones with the values and the order of PyTorch's torch.randn(..., device='cuda').
//
// PyTorch's kernel has 256 * B threads, B = min(ceil(numel / 256), multiprocessors * (threads of one / 256)). Thread s is
// cuRAND's subsequence s of the seed, and its k-th call of curand_normal4 gives elements s + 256*B * (4k + j), j = 0..3.
// So picture and device are tied: other GPUs have other multiprocessors, hence other B and other noise, as soon as
// numel > 256 * B. The generator's offset grows by 4 for every call of the busiest thread.
#include "ptx.cuh"

constexpr int kThreads = 256;

PTX void philox_round(uint4& c, uint32_t k0, uint32_t k1) {
    const uint64_t a = uint64_t(0xD2511F53u) * c.x, b = uint64_t(0xCD9E8D57u) * c.z;
    c = make_uint4(uint32_t(b >> 32) ^ c.y ^ k0, uint32_t(b), uint32_t(a >> 32) ^ c.w ^ k1, uint32_t(a));
}
PTX uint4 philox4x32_10(uint4 counter, uint64_t key) {
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
#pragma unroll
    for (int i = 0; i < 10; i++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) philox_round(counter, k0, k1);
    return counter;
}

struct PhiloxBitsArgs {
    uint4* out;
    uint64_t key, low, high;  // the first counter
    uint64_t count;
};

// out[i] = philox(counter + i); the low half of the counter counts and does not carry. grid: any number of blocks
extern "C" __global__ __launch_bounds__(kThreads) void philox_bits(const __grid_constant__ PhiloxBitsArgs args) {
    begin_kernel();
    const uint64_t stride = uint64_t(gridDim.x) * kThreads;
    for (uint64_t i = uint64_t(blockIdx.x) * kThreads + threadIdx.x; i < args.count; i += stride) {
        const uint64_t low = args.low + i;
        args.out[i] = philox4x32_10(make_uint4(uint32_t(low), uint32_t(low >> 32), uint32_t(args.high), uint32_t(args.high >> 32)), args.key);
    }
}
SIMT_KERNEL(philox_bits)

// Two normal numbers of two random words (Box and Muller, 1958), the sine first. The operations, the constants
// (2^-32, and its product with 2 pi in float) and the hardware's sine are those of cuRAND: the same bits.
PTX float2 box_muller(uint32_t x, uint32_t y) {
    constexpr float kUnit = 2.3283064365386963e-10f, kTurn = kUnit * 6.2831855f;
    const float u = fmaf(float(x), kUnit, kUnit / 2), v = fmaf(float(y), kTurn, kTurn / 2);
    const float radius = sqrtf(-2.0f * logf(u));
    float2 r;
    __sincosf(v, &r.x, &r.y);
    r.x *= radius, r.y *= radius;
    return r;
}

struct PhiloxNormalArgs {
    float* out;
    uint64_t seed, offset, count;
    uint64_t threads;  // 256 * B
};

// grid: any number of blocks; a thread makes one call after another
extern "C" __global__ __launch_bounds__(kThreads) void philox_normal(const __grid_constant__ PhiloxNormalArgs args) {
    begin_kernel();
    const uint64_t rounds = (args.count - 1) / (4 * args.threads) + 1, calls = rounds * args.threads;
    for (uint64_t i = uint64_t(blockIdx.x) * kThreads + threadIdx.x; i < calls; i += uint64_t(gridDim.x) * kThreads) {
        const uint64_t round = i / args.threads, subsequence = i - round * args.threads;
        const uint64_t first = subsequence + round * args.threads * 4;
        if (first >= args.count) continue;
        const uint64_t low = args.offset / 4 + round;
        const uint4 bits = philox4x32_10(make_uint4(uint32_t(low), uint32_t(low >> 32), uint32_t(subsequence), uint32_t(subsequence >> 32)), args.seed);
        const float2 a = box_muller(bits.x, bits.y), b = box_muller(bits.z, bits.w);
        const float v[4] = {a.x, a.y, b.x, b.y};
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (first + j * args.threads < args.count) args.out[first + j * args.threads] = v[j];
    }
}
SIMT_KERNEL(philox_normal)
