// targets: sm_75
// GroupNorm, optionally followed by SiLU, over NHWC; a second tensor may continue the channels of the first, and
// groups may straddle the seam. T is half, bfloat16 or float; statistics, scale and shift are float.
//
//   y[n,p,c] = (x[n,p,c] - mean[n,g]) / sqrt(var[n,g] + eps) * scale[c] + shift[c],  g = c / (C / groups)
//
// Large maps, two passes over x, the second from L2 if it fits:
//   groupnorm_stats   a block takes a run of pixels: (mean, M2) of each group over it
//   groupnorm_merge   only where there are many runs: merges them once, not in every block of the next kernel
//   groupnorm_apply   merges the runs of its sample, then normalises a span of pixels
// Small maps (a slab of whole groups is at most 40 KB), one pass:
//   groupnorm_fused   a block holds its slab in shared memory
//
// A block's threads lie on [pixels][channels] in memory order, so that a warp reads 512 neighbouring bytes, and a
// thread keeps its channels, hence scale, shift and statistics stay in registers. Per element read once there are
// about 4 instructions for statistics and 10 for SiLU, well below what bandwidth leaves time for (24 on an H200).
// Statistics are sums about the thread's first value, merged by Chan's formula in a fixed order, of floats as distances
// from the group's first value: as good for means far from zero as for others, the same bits in every run.
#include "groupnorm.cuh"

constexpr int kWarps = kThreads / 32, kMaxChannels = 4096;
// Loads of a thread under way: as many as leave room for two blocks on a multiprocessor.
constexpr int kInFlight = 3;

template <class T, int V> PTX void tally(Tally<V>& sums, const T* p, int step, int count) {
    for (int i = 0; i < count; i += kInFlight, p += kInFlight * step) {
        Packed<T, V> loaded[kInFlight];
#pragma unroll
        for (int j = 0; j < kInFlight; j++)
            if (i + j < count) loaded[j] = Packed<T, V>::load(p + j * step);
#pragma unroll
        for (int j = 0; j < kInFlight; j++) {
            if (i + j >= count) break;
            float v[V];
            loaded[j].unpack(v);
            if (j == 0 && i == 0) sums.start(v);
            sums.add(v);
        }
    }
}

struct StatsSmem {
    float2 entry[kThreads * 8];  // [V][active]: mean and M2 of a channel over a lane's pixels; >= kMaxChannels
    Moments part[kWarps];
};
static_assert(kThreads * 8 >= kMaxChannels);

// Entries of the channels from c on.
template <class T, int V> PTX void put_entries(const GroupNormArgs& args, StatsSmem& s, const Layout& at, int t, int c, const Tally<V>& sums, int count) {
    const int size = (args.c1 + args.c2) / args.groups;
    int g = c / size, left = size - c % size;
    float origin = pivot<T>(args, g, size);
#pragma unroll
    for (int i = 0; i < V; i++) {
        if (left == 0) g++, left = size, origin = pivot<T>(args, g, size);
        left--;
        s.entry[i * at.active() + t] = count ? sums.component(i, float(count), origin) : make_float2(0.0f, 0.0f);
    }
}

// Merges the entries of `groups` groups of `size` channels and gives each result to `put(group, moments)`.
// With few groups several warps share one.
template <int V, class Put> PTX void merge_groups(StatsSmem& s, const Layout& at, int groups, int size, int count, Put put) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int share = max(1, kWarps / groups), step = kWarps / share;
    for (int first = 0; first < groups; first += step) {
        const int g = first + warp / share;
        Moments m = {0.0f, 0.0f, 0.0f};
        if (g < groups && warp < step * share) {
            for (int k = warp % share * 32 + lane; k < size * at.lanes; k += share * 32) {
                const int l = k / size, c = g * size + k % size;
                const float2 e = s.entry[c % V * at.active() + l * at.width + c / V];
                m = merge(m, {float(at.pixels_of(l, count)), e.x, e.y});
            }
        }
        m = warp_merge(m);
        if (share == 1) {
            if (lane == 0 && g < groups) put(g, m);
        } else {  // then one round is enough for all groups
            if (lane == 0) s.part[warp] = m;
            __syncthreads();
            if (threadIdx.x < groups) {
                m = s.part[threadIdx.x * share];
                for (int i = 1; i < share; i++) m = merge(m, s.part[threadIdx.x * share + i]);
                put(int(threadIdx.x), m);
            }
        }
    }
}

// grid (runs, samples)
template <class T, int V> PTX void groupnorm_stats(const GroupNormArgs& args) {
    auto& s = dynamic_smem<StatsSmem>();
    const int channels = args.c1 + args.c2, size = channels / args.groups;
    const int first = blockIdx.x * args.run, count = min(args.run, args.pixels - first);
    const Layout at(channels / V);
    for (int t = threadIdx.x; t < at.active(); t += kThreads) {
        const int lane = t / at.width, mine = at.pixels_of(lane, count);
        const Column<T> column(args, t % at.width * V);
        Tally<V> sums;
        if (mine) tally(sums, column.p + size_t(first + lane) * column.pitch, at.lanes * column.pitch, mine);
        put_entries<T>(args, s, at, t, t % at.width * V, sums, mine);
    }
    __syncthreads();
    float2* out = args.partial + size_t(blockIdx.y) * args.groups * args.runs + blockIdx.x;
    merge_groups<V>(s, at, args.groups, size, count, [&](int g, const Moments& m) { out[size_t(g) * args.runs] = make_float2(m.mean, m.m2); });
}

// Merges the runs of one group; all lanes of a warp take part, lane 0 has the result.
PTX Moments merge_runs(const GroupNormArgs& args, const float2* partial, int size) {
    Moments m = {0.0f, 0.0f, 0.0f};
    for (int r = threadIdx.x % 32; r < args.runs; r += 32) {
        const float2 p = partial[r];
        m = merge(m, {float(min(args.run, args.pixels - r * args.run)) * size, p.x, p.y});
    }
    return warp_merge(m);
}

// grid (ceil(groups / warps of a block), samples)
extern "C" __global__ __launch_bounds__(256) void groupnorm_merge(const __grid_constant__ GroupNormArgs args) {
    begin_kernel();
    const int g = (blockIdx.x * blockDim.x + threadIdx.x) / 32, size = (args.c1 + args.c2) / args.groups;
    if (g >= args.groups) return;
    const size_t at = size_t(blockIdx.y) * args.groups + g;
    const Moments m = merge_runs(args, args.partial + at * args.runs, size);
    if (threadIdx.x % 32 == 0) args.merged[at] = make_float2(m.mean, m.m2);
}
SIMT_KERNEL(groupnorm_merge)

struct ApplySmem {
    float2 stats[kMaxChannels];  // launched with one entry a group
};

// grid (ceil(pixels / span), samples)
template <class T, int V> PTX void groupnorm_apply(const GroupNormArgs& args) {
    auto& s = dynamic_smem<ApplySmem>();
    const int channels = args.c1 + args.c2, size = channels / args.groups;
    const float2* partial = args.partial + size_t(blockIdx.y) * args.groups * args.runs;
    if (args.runs == 1) {
        for (int g = threadIdx.x; g < args.groups; g += kThreads) s.stats[g] = finish(args, partial[g].x, partial[g].y, size);
    } else {
        for (int g = threadIdx.x / 32; g < args.groups; g += kWarps) {
            const Moments m = merge_runs(args, partial + size_t(g) * args.runs, size);
            if (threadIdx.x % 32 == 0) s.stats[g] = finish(args, m.mean, m.m2, size);
        }
    }
    __syncthreads();

    const Layout at(channels / V);
    const int first = blockIdx.x * args.span, count = min(args.span, args.pixels - first);
    for (int t = threadIdx.x; t < at.active(); t += kThreads) {
        const int lane = t / at.width, c = t % at.width * V, mine = at.pixels_of(lane, count);
        if (!mine) continue;
        const Affine<T, V> affine(args, s.stats, c, 0, size);
        const Column<T> column(args, c);
        const int step = at.lanes * column.pitch, step_out = at.lanes * channels;  // at most kMaxChannels
        const T* p = column.p + size_t(first + lane) * column.pitch;
        T* out = static_cast<T*>(args.out) + (size_t(blockIdx.y) * args.pixels + first + lane) * channels + c;
        for (int i = 0; i < mine; i += kInFlight, p += kInFlight * step, out += kInFlight * step_out) {
            Packed<T, V> loaded[kInFlight];
#pragma unroll
            for (int j = 0; j < kInFlight; j++)
                if (i + j < mine) loaded[j] = Packed<T, V>::load(p + j * step);
#pragma unroll
            for (int j = 0; j < kInFlight; j++) {
                if (i + j >= mine) break;
                float v[V];
                loaded[j].unpack(v);
                affine(v, args.silu);
                store_vec(out + j * step_out, v);
            }
        }
    }
}

struct FusedSmem {
    StatsSmem stats;
    float2 group[8];
    uint4 data[1];  // [pixels][slab]; each thread reads back what it copied
};

// grid (channels / slab, samples); a slab is whole groups and whole vectors, hence at most 8 groups
template <class T> PTX void groupnorm_fused(const GroupNormArgs& args) {
    constexpr int V = 8;
    auto& s = dynamic_smem<FusedSmem>();
    T* data = reinterpret_cast<T*>(s.data);
    const int channels = args.c1 + args.c2, size = channels / args.groups, base = blockIdx.x * args.slab;
    const int groups = args.slab / size, first_group = base / size;
    const Layout at(args.slab / V);
    for (int t = threadIdx.x; t < at.active(); t += kThreads) {
        const int lane = t / at.width, c = t % at.width * V;
        const Column<T> column(args, base + c);
        for (int p = lane; p < args.pixels; p += at.lanes) {
            const uint32_t to = smem_u32(data + p * args.slab + c);
            const T* from = column.p + size_t(p) * column.pitch;
#pragma unroll
            for (int b = 0; b < int(sizeof(T)) / 2; b++) cp_async_16(to + 16 * b, reinterpret_cast<const uint4*>(from) + b, 16);
        }
    }
    cp_async_commit();
    cp_async_wait<0>();
    for (int t = threadIdx.x; t < at.active(); t += kThreads) {
        const int lane = t / at.width, mine = at.pixels_of(lane, args.pixels);
        Tally<V> sums;
        if (mine) tally(sums, data + lane * args.slab + t % at.width * V, at.lanes * args.slab, mine);
        put_entries<T>(args, s.stats, at, t, base + t % at.width * V, sums, mine);
    }
    __syncthreads();
    merge_groups<V>(s.stats, at, groups, size, args.pixels, [&](int g, const Moments& m) { s.group[g] = finish(args, m.mean, m.m2, size); });
    __syncthreads();
    for (int t = threadIdx.x; t < at.active(); t += kThreads) {
        const int lane = t / at.width, c = t % at.width * V;
        const Affine<T, V> affine(args, s.group, base + c, first_group, size);
        T* out = static_cast<T*>(args.out) + size_t(blockIdx.y) * args.pixels * channels + base + c;
        for (int p = lane; p < args.pixels; p += at.lanes) {
            float v[V];
            load_vec(v, data + p * args.slab + c);
            affine(v, args.silu);
            store_vec(out + size_t(p) * channels, v);
        }
    }
}

#define GROUPNORM(op, call, T, suffix)                                                                                          \
    extern "C" __global__ __launch_bounds__(kThreads, sizeof(T) == 4 ? 1 : 2) void op##_##suffix(const __grid_constant__ GroupNormArgs args) { begin_kernel(); call(args); } \
    SIMT_KERNEL(op##_##suffix)
#define GROUPNORM_ALL(T, suffix)                                       \
    GROUPNORM(groupnorm_stats, (groupnorm_stats<T, 8>), T, suffix)        \
    GROUPNORM(groupnorm_stats_scalar, (groupnorm_stats<T, 1>), T, suffix) \
    GROUPNORM(groupnorm_apply, (groupnorm_apply<T, 8>), T, suffix)        \
    GROUPNORM(groupnorm_apply_scalar, (groupnorm_apply<T, 1>), T, suffix) \
    GROUPNORM(groupnorm_fused, groupnorm_fused<T>, T, suffix)
GROUPNORM_ALL(__half, f16)
GROUPNORM_ALL(__nv_bfloat16, bf16)
GROUPNORM_ALL(float, f32)
