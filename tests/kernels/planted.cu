// Kernels with one planted bug each: the SIMT layer must find every one (planted.rs).
#include "wgmma.cuh"

struct Floats {
    float v[1024];
};
struct alignas(1024) Tile {
    __half a[64 * 64], b[64 * 64];
    uint64_t bar;
};
#define KERNEL(name, ...) \
    extern "C" __global__ void name(__VA_ARGS__); \
    SIMT_KERNEL(name) \
    extern "C" __global__ void name(__VA_ARGS__)

KERNEL(read_past_end, const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x + 1]; }
KERNEL(read_far_past_end, const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x + 2000]; }
KERNEL(use_after_free, const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x]; }
KERNEL(read_uninitialised_global, const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x] + 1; }
KERNEL(read_uninitialised_shared, const float* x, float* y) {
    auto& s = dynamic_smem<Floats>();
    if (threadIdx.x) s.v[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = s.v[threadIdx.x];
}
KERNEL(shared_past_end, const float* x, float* y) {  // launched with 64 floats
    auto& s = dynamic_smem<Floats>();
    s.v[threadIdx.x + 1] = x[threadIdx.x];
}
KERNEL(missing_syncthreads, const float* x, float* y) {
    auto& s = dynamic_smem<Floats>();
    s.v[threadIdx.x] = x[threadIdx.x];
    y[threadIdx.x] = s.v[threadIdx.x ^ 33];
}
KERNEL(missing_syncwarp, const float* x, float* y) {
    auto& s = dynamic_smem<Floats>();
    s.v[threadIdx.x] = x[threadIdx.x];
    __shfl_xor_sync(~0u, 1, 1);  // meets, but orders no memory
    y[threadIdx.x] = s.v[threadIdx.x ^ 1];
}
KERNEL(missing_second_sync, const float* x, float* y) {  // a reduction that reuses its buffer
    auto& s = dynamic_smem<Floats>();
    for (int i = 0; i < 2; i++) {
        s.v[threadIdx.x] = x[threadIdx.x] + i;
        __syncthreads();
        if (i == 0) y[threadIdx.x] = s.v[threadIdx.x ^ 33];
    }
}
KERNEL(divergent_syncthreads, const float* x, float* y) {
    if (threadIdx.x < 32) __syncthreads();
    else y[threadIdx.x] = 1;
}
KERNEL(two_syncthreads, const float* x, float* y) {
    if (threadIdx.x < 32) __syncthreads();
    else __syncthreads();
}
KERNEL(divergent_shuffle, const float* x, float* y) {
    if (threadIdx.x % 32 < 16) y[threadIdx.x] = __shfl_xor_sync(~0u, 1.0f, 1);
}
KERNEL(mismatched_collectives, const float* x, float* y) {
    y[threadIdx.x] = threadIdx.x % 2 ? __shfl_xor_sync(~0u, 1.0f, 1) : __shfl_down_sync(~0u, 1.0f, 1);
}
KERNEL(shuffle_outside_mask, const float* x, float* y) {
    if (threadIdx.x % 32 < 16) y[threadIdx.x] = __shfl_xor_sync(0xffff, 1.0f, 16);
}
KERNEL(cp_async_no_wait, const float* x, float* y) {
    auto& s = dynamic_smem<Floats>();
    if (threadIdx.x < 16) cp_async_16(smem_u32(&s.v[threadIdx.x * 4]), x + threadIdx.x * 4, 16);
    cp_async_commit();
    __syncthreads();
    y[threadIdx.x] = s.v[threadIdx.x];
    cp_async_wait<0>();
}
KERNEL(cp_async_misaligned, const float* x, float* y) {
    auto& s = dynamic_smem<Floats>();
    cp_async_16(smem_u32(&s.v[threadIdx.x * 4]), x + 1, 16);
    cp_async_commit();
    cp_async_wait<0>();
}
KERNEL(blocks_overlap, const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x]; }  // launched with 2 blocks
KERNEL(mbarrier_not_initialised, const float* x, float* y) {
    auto& s = dynamic_smem<Tile>();
    mbarrier_arrive(&s.bar);
}
KERNEL(mbarrier_too_few_bytes, const __grid_constant__ TensorMap map, float* y) {
    auto& s = dynamic_smem<Tile>();
    if (threadIdx.x == 0) {
        mbarrier_init(&s.bar, 1);
        fence_mbarrier_init();
        mbarrier_arrive_expect_tx(&s.bar, 64 * 64);  // elements, not bytes
        tma_load_2d(s.a, &map, 0, 0, &s.bar);
    }
    __syncthreads();
    mbarrier_wait(&s.bar, 0);
}
KERNEL(mbarrier_wrong_parity, const __grid_constant__ TensorMap map, float* y) {
    auto& s = dynamic_smem<Tile>();
    if (threadIdx.x == 0) {
        mbarrier_init(&s.bar, 1);
        fence_mbarrier_init();
        mbarrier_arrive_expect_tx(&s.bar, sizeof s.a);
        tma_load_2d(s.a, &map, 0, 0, &s.bar);
    }
    __syncthreads();
    mbarrier_wait(&s.bar, 1);  // passes at once
    y[threadIdx.x % 64] = __half2float(s.a[threadIdx.x]);
    mbarrier_wait(&s.bar, 0);
}
KERNEL(wgmma_no_proxy_fence, const float* x, float* y) {
    auto& s = dynamic_smem<Tile>();
    for (int i = threadIdx.x; i < 64 * 64; i += 128) s.a[i] = s.b[i] = __float2half_rn(1);
    __syncthreads();
    float d[32];
    wgmma_fence();
    wgmma_m64k16<__half, 64>(d, wgmma_desc_k128(s.a, 0), wgmma_desc_k128(s.b, 0), false);
    wgmma_commit();
    wgmma_wait<0>();
    if (threadIdx.x < 64) y[threadIdx.x] = d[0];
}
KERNEL(wgmma_no_wait, const float* x, float* y) {
    auto& s = dynamic_smem<Tile>();
    for (int i = threadIdx.x; i < 64 * 64; i += 128) s.a[i] = s.b[i] = __float2half_rn(1);
    fence_proxy_async();
    __syncthreads();
    float d[32];
    wgmma_fence();
    wgmma_m64k16<__half, 64>(d, wgmma_desc_k128(s.a, 0), wgmma_desc_k128(s.b, 0), false);
    wgmma_commit();
    if (threadIdx.x < 64) y[threadIdx.x] = d[0];
    wgmma_wait<0>();
}
KERNEL(stack_overflow, const float* x, float* y) {
    volatile char big[1 << 18];
    for (int i = (1 << 18) - 1; i >= 0; i -= 512) big[i] = 1;
    y[threadIdx.x] = big[0];
}
