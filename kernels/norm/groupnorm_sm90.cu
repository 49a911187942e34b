// targets: sm_90a
// GroupNorm on Hopper in one pass: the blocks of a cluster hold a slab of whole groups of a sample, each some of its pixels, in
// registers, and tell each other mean and spread of their part through distributed shared memory. What it computes, and how it
// is called: groupnorm.cu.
//
// One read and one write of the map and one launch, where the two passes of groupnorm.cu read twice and launch twice. All loads
// of a thread are under way at once. Statistics are exact: a mean first, then squares about it, both in float over values in
// registers; the blocks' results are merged by Chan's formula in the order of their ranks.
#include "groupnorm.cuh"

namespace {
constexpr int kVector = 8, kMostGroups = 8;

struct ClusterSmem {
    float entry[kThreads * kVector];                // [lane][slab]: a thread's sums
    float part[kThreads];                           // [thread of a channel][slab]
    float mean[kMostGroups], squares[kMostGroups];  // of this block's pixels, squares about the mean; read by the neighbours
    float2 group[kMostGroups];                      // mean and 1/deviation
};

// Sums `mine`, a number for each channel of the thread, over the block into `put(group, sum)`, called by one thread a group.
template <class Put> PTX void sum_groups(ClusterSmem& s, const Layout& at, int slab, int size, const float (&mine)[kVector], Put put) {
    const int t = threadIdx.x, lane = t / at.width, warp = t / 32;
    if (t < at.active()) store8(s.entry + lane * slab + t % at.width * kVector, mine);
    __syncthreads();
    const int parts = kThreads / slab, part = t / slab, channel = t - part * slab;
    if (part < parts) {
        float sum = 0.0f;
        for (int l = part; l < at.lanes; l += parts) sum += s.entry[l * slab + channel];
        s.part[part * slab + channel] = sum;
    }
    __syncthreads();
    if (warp < slab / size) {
        float sum = 0.0f;
        for (int k = t % 32; k < size * parts; k += 32) sum += s.part[k / size * slab + warp * size + k % size];
        for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
        if (t % 32 == 0) put(warp, sum);
    }
}

// grid (cluster * channels / slab, samples); a slab is whole groups and whole vectors of at most kThreads / 2 channels and
// kMostGroups groups, `run` the pixels of a block, at most K * lanes of them.
template <class T, int K> PTX void groupnorm_cluster(const GroupNormArgs& args, int cluster) {
    auto& s = dynamic_smem<ClusterSmem>();
    const int channels = args.c1 + args.c2, size = channels / args.groups, base = blockIdx.x / cluster * args.slab;
    const int groups = args.slab / size, first = cluster_rank() * args.run, count = max(0, min(args.run, args.pixels - first));
    const Layout at(args.slab / kVector);
    const int lane = threadIdx.x / at.width, c = threadIdx.x % at.width * kVector, mine = threadIdx.x < at.active() ? at.pixels_of(lane, count) : 0;
    const Column<T> column(args, base + c);
    const T* p = column.p + size_t(first + lane) * column.pitch;
    const int step = at.lanes * column.pitch;
    Packed<T, kVector> data[K];
#pragma unroll
    for (int i = 0; i < K; i++)
        if (i < mine) data[i] = Packed<T, kVector>::load(p + i * step);

    float sums[kVector] = {};
#pragma unroll
    for (int i = 0; i < K; i++) {
        if (i >= mine) break;
        float v[kVector];
        data[i].unpack(v);
#pragma unroll
        for (int j = 0; j < kVector; j++) sums[j] += v[j];
    }
    sum_groups(s, at, args.slab, size, sums, [&](int g, float sum) { s.mean[g] = count ? sum / (float(count) * size) : 0.0f; });
    __syncthreads();
    float mean[kVector];
#pragma unroll
    for (int j = 0; j < kVector; j++) mean[j] = s.mean[(c + j) / size], sums[j] = 0.0f;
#pragma unroll
    for (int i = 0; i < K; i++) {
        if (i >= mine) break;
        float v[kVector];
        data[i].unpack(v);
#pragma unroll
        for (int j = 0; j < kVector; j++) sums[j] += (v[j] - mean[j]) * (v[j] - mean[j]);
    }
    sum_groups(s, at, args.slab, size, sums, [&](int g, float sum) { s.squares[g] = sum; });
    cluster_sync();
    if (threadIdx.x < groups) {
        Moments all = {0.0f, 0.0f, 0.0f};
        for (int rank = 0; rank < cluster; rank++) {
            const int pixels = max(0, min(args.run, args.pixels - rank * args.run));
            all = merge(all, {float(pixels) * size, cluster_load(&s.mean[threadIdx.x], rank), cluster_load(&s.squares[threadIdx.x], rank)});
        }
        s.group[threadIdx.x] = finish(args, all.mean - pivot<T>(args, base / size + threadIdx.x, size), all.m2, size);
    }
    cluster_sync();  // nobody leaves while a neighbour reads
    const Affine<T, kVector> affine(args, s.group, base + c, base / size, size);
    T* out = static_cast<T*>(args.out) + (size_t(blockIdx.y) * args.pixels + first + lane) * channels + base + c;
#pragma unroll
    for (int i = 0; i < K; i++) {
        if (i >= mine) break;
        float v[kVector];
        data[i].unpack(v);
        affine(v, args.silu);
        store_vec(out + size_t(i) * at.lanes * channels, v);
    }
}
}  // namespace

// K: vectors of a thread. 6 leave room for two blocks on a multiprocessor, 21 hold the maps of SDXL.
#define GROUPNORM_CLUSTER(T, K, BLOCKS, name)                                                                  \
    extern "C" __global__ __launch_bounds__(kThreads, BLOCKS) void name(const __grid_constant__ GroupNormArgs args) { \
        begin_kernel(), groupnorm_cluster<T, K>(args, args.runs);                                               \
    }                                                                                                           \
    SIMT_KERNEL(name)
GROUPNORM_CLUSTER(__half, 6, 2, groupnorm_cluster_6_f16)
GROUPNORM_CLUSTER(__half, 16, 1, groupnorm_cluster_16_f16)
GROUPNORM_CLUSTER(__nv_bfloat16, 6, 2, groupnorm_cluster_6_bf16)
GROUPNORM_CLUSTER(__nv_bfloat16, 16, 1, groupnorm_cluster_16_bf16)
