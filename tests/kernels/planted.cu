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
KERNEL(unwritten_tail, const float* x, float* y) {  // the last threads think that there is nothing left
    if (threadIdx.x < 61) y[threadIdx.x] = x[threadIdx.x];
}
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
KERNEL(bulk_copy_over_stores, const __grid_constant__ TensorMap map, float* y) {  // no fence.proxy.async between
    auto& s = dynamic_smem<Tile>();
    for (int i = threadIdx.x; i < 64 * 64; i += 64) s.a[i] = __float2half_rn(1);
    if (threadIdx.x == 0) {
        mbarrier_init(&s.bar, 1);
        fence_mbarrier_init();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect_tx(&s.bar, sizeof s.a);
        tma_load_2d(s.a, &map, 0, 0, &s.bar);
    }
    mbarrier_wait(&s.bar, 0);
    y[threadIdx.x] = __half2float(s.a[threadIdx.x]);
}
KERNEL(leaves_copies_behind, const __grid_constant__ TensorMap map, float* y) {
    auto& s = dynamic_smem<Tile>();
    if (threadIdx.x == 0) {
        mbarrier_init(&s.bar, 1);
        fence_mbarrier_init();
        mbarrier_arrive_expect_tx(&s.bar, sizeof s.a);
        tma_load_2d(s.a, &map, 0, 0, &s.bar);
    }
    y[threadIdx.x] = 1;
}
KERNEL(mbarrier_runs_ahead, const float* x, float* y) {  // nobody tells the arriving thread that the waiting one has gone on
    auto& s = dynamic_smem<Tile>();
    if (threadIdx.x == 0) mbarrier_init(&s.bar, 1);
    __syncthreads();
    if (threadIdx.x == 0) mbarrier_wait(&s.bar, 0);
    if (threadIdx.x == 32)
        for (int i = 0; i < 3; i++) mbarrier_arrive(&s.bar);
    y[threadIdx.x] = x[threadIdx.x];
}
KERNEL(mbarrier_phase_missed, const float* x, float* y) {  // waits for parity 0 twice: for phases 0 and 2
    auto& s = dynamic_smem<Tile>();
    if (threadIdx.x == 0) mbarrier_init(&s.bar, 1);
    __syncthreads();
    if (threadIdx.x == 0) {
        mbarrier_arrive(&s.bar);
        mbarrier_wait(&s.bar, 0);
        mbarrier_arrive(&s.bar);
        mbarrier_arrive(&s.bar);
        mbarrier_wait(&s.bar, 0);
    }
    y[threadIdx.x] = x[threadIdx.x];
}
KERNEL(divergent_named_barrier, const float* x, float* y) {
    if (threadIdx.x % 32 < 16) named_barrier_sync(1, 64);
    else named_barrier_sync(1, 64);
    y[threadIdx.x] = x[threadIdx.x];
}

// ---- clusters of two blocks -------------------------------------------------------------------------------------------------
KERNEL(divergent_cluster_sync, const float* x, float* y) {
    if (threadIdx.x % 32 < 16) cluster_sync();
    else cluster_sync();
    y[threadIdx.x] = x[threadIdx.x];
}
KERNEL(neighbour_not_begun, const float* x, float* y) {
    auto& s = dynamic_smem<Floats>();
    s.v[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    const float v = cluster_load(&s.v[threadIdx.x], cluster_rank() ^ 1);
    cluster_sync();
    if (cluster_rank() == 0) y[threadIdx.x] = v;
}
KERNEL(neighbour_gone, const float* x, float* y) {  // no cluster_sync behind the read
    auto& s = dynamic_smem<Floats>();
    s.v[threadIdx.x] = x[threadIdx.x];
    cluster_sync();
    const float v = cluster_load(&s.v[threadIdx.x], cluster_rank() ^ 1);
    if (cluster_rank() == 0) y[threadIdx.x] = v;
}
KERNEL(neighbour_not_signalled, const float* x, float* y) {  // a remote arrival before the barrier is known to be there
    auto& s = dynamic_smem<Tile>();
    if (threadIdx.x == 0) mbarrier_init(&s.bar, 1);
    __syncthreads();
    if (threadIdx.x == 0) mbarrier_arrive_at(&s.bar, cluster_rank() ^ 1);
    mbarrier_wait(&s.bar, 0);
    cluster_sync();
    if (cluster_rank() == 0) y[threadIdx.x] = x[threadIdx.x];
}
PTX void begin_multicast(Tile& s) {
    if (threadIdx.x == 0) {
        mbarrier_init(&s.bar, 1);
        fence_mbarrier_init();
    }
    __syncwarp();
    cluster_sync();
}
KERNEL(multicast_not_expected, const __grid_constant__ TensorMap map, float* y) {  // the neighbour arrives without expecting bytes
    auto& s = dynamic_smem<Tile>();
    begin_multicast(s);
    if (threadIdx.x == 0) {
        if (cluster_rank() == 0) {
            mbarrier_arrive_expect_tx(&s.bar, sizeof s.a);
            tma_load_2d_multicast(s.a, &map, 0, 0, &s.bar, 3);
        } else mbarrier_arrive(&s.bar);
    }
    mbarrier_wait(&s.bar, 0);
    __syncwarp();
    cluster_sync();
    if (cluster_rank() == 0) y[threadIdx.x] = __half2float(s.a[threadIdx.x]);
}
KERNEL(multicast_half_expected, const __grid_constant__ TensorMap map, float* y) {  // each brings one, but expects only its own
    auto& s = dynamic_smem<Tile>();
    begin_multicast(s);
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect_tx(&s.bar, sizeof s.a);
        tma_load_2d_multicast(cluster_rank() ? s.b : s.a, &map, 0, 0, &s.bar, 3);
    }
    mbarrier_wait(&s.bar, 0);
    __syncwarp();
    cluster_sync();
    if (cluster_rank() == 0) y[threadIdx.x] = __half2float(s.a[threadIdx.x]) + __half2float(s.b[threadIdx.x]);
}

// ---- after a kernel that writes x -------------------------------------------------------------------------------------------
KERNEL(copies, const float* x, float* y) {
    begin_kernel();
    y[threadIdx.x] = x[threadIdx.x];
}
KERNEL(copies_too_early, const float* x, float* y) {  // the kernel before may still write x, and read y
    const float v = x[threadIdx.x];
    begin_kernel();
    y[threadIdx.x] = v;
}
KERNEL(writes_too_early, const float* x, float* y) {
    next_kernel_may_start();
    y[threadIdx.x] = threadIdx.x;
    wait_for_previous_kernel();
}

KERNEL(stack_overflow, const float* x, float* y) {
    volatile char big[1 << 18];
    for (int i = (1 << 18) - 1; i >= 0; i -= 512) big[i] = 1;
    y[threadIdx.x] = big[0];
}
