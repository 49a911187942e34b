// hopper_tile.cuh: the tensor-core main loop of sm_90a, shared by linear layers and convolutions.
//
// A block computes 128 x kN tiles of a product A * B^T whose operands both run along K. One producer thread fills a ring of
// stages by TMA (128-byte swizzle, 64 of K a stage); two consumer warpgroups of 64 rows each run wgmma on them with both
// operands in shared memory. full[i]: stage i has its bytes; empty[i]: all eight consumer warps are done with it. The grid is
// persistent: blocks take unit after unit (a tile, or with split-K a part of its K), and while the consumers write one tile
// out the producer already fills the ring for the next.
//
// The L2 cache delivers about 30 bytes a cycle to each multiprocessor, less than a tile of its own asks for (a 128 x 160 tile
// 36 KB in 640 cycles). So two blocks form a pair where there are two tiles above each other: each loads its rows of A and
// half of the B that both need, for both (multicast). Then empty[i] also waits for the neighbour's consumers.
//
// A cluster is a pair, or one block or pair for every part of K (split-K), the parts one after the other: rank = part * pair +
// place. The parts add their sums up through distributed shared memory: no second kernel, no partial sums in device memory.
//
// Widths: 160 divides 320, 640 and 1280, the widths of the UNets, and leaves the fewest idle multiprocessors there; 256 and
// 128 are for the rest. wgmma reads 2 KB of A and kN * 32 bytes of B for 64 x kN x 16: 80 to 96 of the 128 bytes a cycle
// that shared memory delivers. 224 registers a consumer thread: 128 sums at most, addresses and the epilogue.
//
// Fragments to rows: a quad of lanes holds 2 columns each of every 8; rounded to 16 bits, two exchanges among the four give each
// lane all 8 columns of one block of 8 in 4, so that loads and stores are 16 bytes a lane and 64 contiguous bytes a quad.
#pragma once
#include "epilogue.cuh"
#include "quad.cuh"
#include "wgmma.cuh"

struct HopperTiles {  // how the product is cut up; the twin is launch/hopper.rs
    int32_t steps;    // of kK, over all of K
    int32_t tiles_m, tiles_n;
    int32_t band;     // rows of pairs that are walked together, column by column, so that their operands stay in the L2 cache
    int32_t splits;   // parts of K; 1: none
    int32_t pair;     // 1 or 2: blocks side by side in a cluster, for tiles above each other, of which the last may be behind the product
    int32_t constant_b;  // nobody writes B any more: it may be loaded while the kernel before this one still runs
    int32_t unused;
};

namespace hopper {

constexpr int kM = 128, kK = 64, kThreads = 384, kConsumerWarps = 8;

template <class T, int N> struct alignas(1024) Smem {
    static_assert(sizeof(T) == 2);
    static constexpr int kStages = N > 160 ? 4 : 6;
    static constexpr unsigned kStageBytes = (kM + N) * kK * sizeof(T);
    T a[kStages][kM * kK], b[kStages][N * kK];
    uint64_t full[kStages], empty[kStages];
};

struct Unit {  // of work
    int tile_m, tile_n, split, first, last;  // steps first to last - 1
};

// First block of this block's pair, as a rank in the cluster.
PTX unsigned pair_rank() { return cluster_rank() & ~1u; }

// The units of a pair: for (Walk w(t); w.more(); w.next()) ... w.unit() is this block's. kOnce: one unit a block, and the
// pairs of a cluster are the splits of their tiles.
template <bool kOnce> struct Walk {
    const HopperTiles& t;
    int index, rows;  // rows of pairs

    PTX explicit Walk(const HopperTiles& tiles) : t(tiles), index(blockIdx.x / tiles.pair), rows((tiles.tiles_m + tiles.pair - 1) / tiles.pair) {
        if constexpr (kOnce) index = int(cluster_rank()) / t.pair * rows * t.tiles_n + blockIdx.x / (t.pair * t.splits);
    }
    PTX bool more() const { return index < rows * t.tiles_n * t.splits; }
    PTX void next() { index += kOnce ? 1 << 30 : gridDim.x / t.pair; }
    PTX Unit unit() const {
        const int count = rows * t.tiles_n, split = index / count, tile = index - split * count;
        const int in_band = t.band * t.tiles_n, first = tile / in_band * t.band, high = min(t.band, rows - first), place = tile % in_band;
        const int place_in_pair = t.pair > 1 ? int(cluster_rank()) % 2 : 0;
        return {(first + place % high) * t.pair + place_in_pair, place / high, split, t.steps * split / t.splits, t.steps * (split + 1) / t.splits};
    }
};

template <class S> PTX void start_ring(S& s, const HopperTiles& t) {
    if (threadIdx.x == 0) {
        for (int i = 0; i < S::kStages; i++) mbarrier_init(&s.full[i], 1), mbarrier_init(&s.empty[i], kConsumerWarps * t.pair);
        fence_mbarrier_init();
    }
    __syncwarp();  // the barrier of a cluster is for whole warps
    if (t.pair > 1) cluster_sync_begin();
    else __syncthreads();
}

// The B of a stage: N rows of w from row `row` on, columns from k on. In a pair this block brings half of them, to both.
template <class T, int N> PTX void load_b(const HopperTiles& t, const TensorMap* w, int k, int row, T* b, uint64_t* bar) {
    if (t.pair == 1) {
        tma_load_2d(b, w, k, row, bar);
    } else {
        const int half = int(cluster_rank() % 2) * (N / 2);
        tma_load_2d_multicast(b + half * kK, w, k, row + half, bar, 3u << pair_rank());
    }
}

struct Place {  // in the ring
    int stage = 0;
    unsigned phase = 0;
    template <class S> PTX void advance() {
        if (++stage == S::kStages) stage = 0, phase ^= 1;
    }
};

// One thread: load.begin(unit) before a unit, then load.a(step, ...) and load.b(step, ...) for every step of it, which together
// must bring kStageBytes. A constant B goes ahead of everything that waits for the kernel before.
template <bool kOnce, class S, class Load> PTX void produce(S& s, const HopperTiles& t, Load& load) {
    Place at;
    Walk<kOnce> walk(t);
    int ahead = 0;  // steps of the first unit whose B is on its way
    if (t.constant_b && walk.more()) {
        const Unit unit = walk.unit();
        load.begin(unit);
        for (; ahead < min(S::kStages, unit.last - unit.first); ahead++) {
            mbarrier_arrive_expect_tx(&s.full[ahead], S::kStageBytes);
            load.b(unit.first + ahead, s.b[ahead], &s.full[ahead]);
        }
    }
    wait_for_previous_kernel();
    for (; walk.more(); walk.next()) {
        const Unit unit = walk.unit();
        load.begin(unit);
        for (int step = unit.first; step < unit.last; step++, ahead--) {
            if (ahead <= 0) {
                mbarrier_wait(&s.empty[at.stage], at.phase ^ 1);  // the first round passes at once
                mbarrier_arrive_expect_tx(&s.full[at.stage], S::kStageBytes);
                load.b(step, s.b[at.stage], &s.full[at.stage]);
            }
            load.a(step, s.a[at.stage], &s.full[at.stage]);
            at.template advance<S>();
        }
    }
}

// A consumer warp is done with a stage: all producers that fill it must know.
PTX void give_back(uint64_t* empty, int pair, int lane) {
    if (pair == 1) {
        if (lane == 0) mbarrier_arrive(empty);
    } else if (lane < 2) mbarrier_arrive_at(empty, pair_rank() + lane);
}

// The product of one unit in `acc`, fragments as wgmma leaves them. At most one step's products are under way while the
// next step's are queued; only then is the stage before given back.
template <class T, int N> PTX void multiply(Smem<T, N>& s, const Unit& unit, int pair, Place& at, float (&acc)[N / 2]) {
    using S = Smem<T, N>;
    const int group = __shfl_sync(~0u, int(threadIdx.x) / 128 - 1, 0), lane = threadIdx.x % 32;  // known to be the same in a warp
    int before = 0;
    for (int step = unit.first; step < unit.last; step++) {
        mbarrier_wait(&s.full[at.stage], at.phase);
        const uint64_t a = wgmma_desc_k128(s.a[at.stage] + group * 64 * kK, 0), b = wgmma_desc_k128(s.b[at.stage], 0);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < kK / 16; i++)
            wgmma_m64k16<T, N>(acc, a + 2 * i, b + 2 * i, step > unit.first || i > 0);  // 16 of K: 32 bytes, counted in 16
        wgmma_commit();
        wgmma_wait<1>();
        if (step > unit.first) give_back(&s.empty[before], pair, lane);
        before = at.stage;
        at.template advance<S>();
    }
    wgmma_wait<0>();
    wgmma_pin(acc);
    give_back(&s.empty[before], pair, lane);
}

// ---- from fragments to rows -------------------------------------------------------------------------------------------
// What becomes of a tile is a template argument, and only what layers of a UNet ask for is done here: all of it in one kernel
// would be 200 KB of straight-line code, and fetching instructions would take several times as long as executing them
// (measured: 12 us a tile). The rest goes through kAny, whose last step is a loop.
enum class Finish {
    kPlain,  // bias, leaky relu, scale, residual
    kTime,   // bias, bias of the sample
    kGeglu,  // value times gate, with their bias
    kAny,    // any epilogue; one tile a block, and the blocks of a cluster may have a part of K each and add their sums up
};

// Writes a tile: rows(r) is the row of the product that row r of the tile holds, or -1. What is added is loaded many vectors at
// a time and before the stores: it may lie where out lies, so the compiler cannot move loads ahead of stores itself. (__ldg
// would let it, but is for memory that nobody writes as long as this kernel runs, and the kernel before still may.)
template <class T, int N, Finish F, class Rows> PTX void write_tile(const EpilogueArgs& e, const Unit& unit, const float (&acc)[N / 2], const Rows& rows) {
    const int quad = threadIdx.x % 4, warp_row = (threadIdx.x - 128) / 32 * 16 + threadIdx.x % 32 / 4;
    const int row[2] = {rows(warp_row), rows(warp_row + 8)};
    constexpr bool kGeglu = F == Finish::kGeglu;
    constexpr int kOut = kGeglu ? N / 2 : N, kBlocks = kOut / 8, kGroups = (kBlocks + 3) / 4;  // columns of out; in eights; in groups of four eights
    // Groups whose residual, and whose bias, are loaded together, as registers allow.
    constexpr int kAhead = kGroups > 5 ? 4 : kGroups, kBiasAhead = N > 160 ? 2 : kAhead;
    const int column0 = unit.tile_n * kOut, left = (kGeglu ? e.columns / 2 : e.columns) - column0;
    const int vectors_left = left - 8 * quad, pairs_left = left - 2 * quad;
    const float* bias = e.bias + unit.tile_n * N + 2 * quad;
    const bool is_shaped = F == Finish::kPlain && (e.act != kActNone || e.scale != 1.0f);
    const float below = e.act == kActLeakyRelu ? 0.2f * e.scale : e.scale;  // the factor of what is negative
    T* out[2];
    const T *residual[2], *time_bias[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int r = max(row[h], 0);
        out[h] = static_cast<T*>(e.out) + int64_t(r) * e.out_pitch + column0 + 8 * quad;
        residual[h] = static_cast<const T*>(e.residual) + int64_t(r) * e.residual_pitch + column0 + 8 * quad;
        if constexpr (F == Finish::kTime) time_bias[h] = static_cast<const T*>(e.time_bias) + int64_t(r / e.rows_per_sample) * e.time_pitch + column0 + 2 * quad;
    }
#pragma unroll
    for (int first = 0; first < kGroups; first += kAhead) {
        uint4 add[2][kAhead];
        float2 value_bias[kBiasAhead][4], gate_bias[kBiasAhead][4];
        uint32_t time[2][kBiasAhead][4];
        if (F == Finish::kPlain && e.residual) {
#pragma unroll
            for (int h = 0; h < 2; h++)
#pragma unroll
                for (int g = 0; g < kAhead; g++) {
                    add[h][g] = make_uint4(0, 0, 0, 0);
                    if (row[h] >= 0 && 32 * (first + g) < vectors_left) add[h][g] = *reinterpret_cast<const uint4*>(residual[h] + 32 * (first + g));
                }
        }
#pragma unroll
        for (int g = first; g < first + kAhead; g++) {
            const int ahead = (g - first) % kBiasAhead;
            if (ahead == 0) {
#pragma unroll
                for (int i = 0; i < kBiasAhead * 4; i++) {
                    const int column = 8 * (4 * g + i);
                    float2 &value = value_bias[i / 4][i % 4], &gate = gate_bias[i / 4][i % 4];
                    value = gate = make_float2(0.0f, 0.0f);
                    if (e.bias && column < pairs_left) {
                        const float2* from = reinterpret_cast<const float2*>(bias + column * (kGeglu ? 2 : 1));
                        value = from[0];
                        if constexpr (kGeglu) gate = from[4];
                    }
                    if constexpr (F == Finish::kTime) {
#pragma unroll
                        for (int h = 0; h < 2; h++) time[h][i / 4][i % 4] = column < pairs_left ? *reinterpret_cast<const uint32_t*>(time_bias[h] + column) : 0;
                    }
                }
            }
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float2 sums[4];
#pragma unroll
                for (int b = 0; b < 4; b++) {
                    const int block = 4 * g + b;
                    sums[b] = value_bias[ahead][b];
                    if (block >= kBlocks) continue;
                    const int at = 4 * block * (kGeglu ? 2 : 1) + 2 * h;
                    sums[b].x += acc[at], sums[b].y += acc[at + 1];
                    if constexpr (kGeglu) {
                        sums[b].x *= gelu_fast(acc[at + 4] + gate_bias[ahead][b].x);
                        sums[b].y *= gelu_fast(acc[at + 5] + gate_bias[ahead][b].y);
                    }
                    if constexpr (F == Finish::kTime) {
                        float x, y;
                        unpack2<T>(x, y, time[h][ahead][b]);
                        sums[b].x += x, sums[b].y += y;
                    }
                }
                if (is_shaped) {
#pragma unroll
                    for (int b = 0; b < 4; b++) {
                        sums[b].x *= sums[b].x < 0.0f ? below : e.scale;
                        sums[b].y *= sums[b].y < 0.0f ? below : e.scale;
                    }
                }
                if (F == Finish::kPlain && e.residual) {
                    uint4& packed = add[h][g - first];
                    uint32_t r[4] = {packed.x, packed.y, packed.z, packed.w};
                    transpose_quad(r);
#pragma unroll
                    for (int b = 0; b < 4; b++) {
                        float x, y;
                        unpack2<T>(x, y, r[b]);
                        sums[b].x += x, sums[b].y += y;
                    }
                }
                uint32_t v[4];
#pragma unroll
                for (int b = 0; b < 4; b++) v[b] = pack2<T>(sums[b].x, sums[b].y);
                transpose_quad(v);
                if (row[h] >= 0 && 4 * g + quad < kBlocks && 32 * g < vectors_left)
                    *reinterpret_cast<uint4*>(out[h] + 32 * g) = make_uint4(v[0], v[1], v[2], v[3]);
            }
        }
    }
}

// The sums of a tile in shared memory, where the ring was. Rows a multiple of 32 banks and 8 apart: a warp's stores, 8 rows of
// 8 floats, meet no bank twice.
template <int N> constexpr int kStagedPitch = N + 8;
template <class T, int N> PTX void stage_sums(Smem<T, N>& s, const float (&acc)[N / 2]) {
    static_assert(N % 32 == 0 && sizeof s.a + sizeof s.b >= kM * kStagedPitch<N> * sizeof(float));
    float* to = reinterpret_cast<float*>(s.a) + ((threadIdx.x - 128) / 32 * 16 + threadIdx.x % 32 / 4) * kStagedPitch<N> + threadIdx.x % 4 * 2;
    named_barrier_sync(1, kConsumerWarps * 32);  // both warpgroups have read the last stage
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int j = 0; j < N / 8; j++)
            *reinterpret_cast<float2*>(to + half * 8 * kStagedPitch<N> + 8 * j) = make_float2(acc[4 * j + 2 * half], acc[4 * j + 2 * half + 1]);
}

// The sum of eight columns over the parts of K, in their order: what lies at p in the blocks place, place + pair, ... of the
// cluster. Their number is a constant, so that all loads are under way at once: one from a neighbour takes some 500 cycles.
template <int kSplits> PTX void sum_parts(float (&v)[8], const float* p, int pair, int place) {
    float4 part[kSplits][2];
#pragma unroll
    for (int split = 0; split < kSplits; split++) {
        const unsigned rank = split * pair + place;
        part[split][0] = cluster_load4(p, rank), part[split][1] = cluster_load4(p + 4, rank);
    }
#pragma unroll
    for (int split = 0; split < kSplits; split++) {
        const float4 low = part[split][0], high = part[split][1];
        v[0] += low.x, v[1] += low.y, v[2] += low.z, v[3] += low.w;
        v[4] += high.x, v[5] += high.y, v[6] += high.z, v[7] += high.w;
    }
}
PTX void sum_parts(float (&v)[8], const float* p, int splits, int pair, int place) {
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = 0.0f;
    switch (splits) {
        case 1: load8(v, p); break;
        case 2: sum_parts<2>(v, p, pair, place); break;
        case 3: sum_parts<3>(v, p, pair, place); break;
        case 4: sum_parts<4>(v, p, pair, place); break;
        case 5: sum_parts<5>(v, p, pair, place); break;
        case 6: sum_parts<6>(v, p, pair, place); break;
        case 7: sum_parts<7>(v, p, pair, place); break;
        default: sum_parts<8>(v, p, pair, place);
    }
}

// The blocks of a tile in a cluster add up and finish a share of its rows each.
template <class T, int N, class Rows> PTX void add_up(Smem<T, N>& s, const EpilogueArgs& e, const HopperTiles& t, const Unit& unit, const Rows& rows) {
    const bool geglu = e.flags & kEpilogueGeglu;
    const int vectors = N / (geglu ? 16 : 8), columns = epilogue::out_columns(e), place = int(cluster_rank()) % t.pair;
    const int first = kM * unit.split / t.splits, count = kM * (unit.split + 1) / t.splits - first;
    for (int i = threadIdx.x - 128; i < count * vectors; i += kConsumerWarps * 32) {
        const int r = first + i / vectors, vector = i % vectors, row = rows(r), column = unit.tile_n * (geglu ? N / 2 : N) + vector * 8;
        if (row < 0 || column >= columns) continue;
        const float* from = reinterpret_cast<const float*>(s.a) + r * kStagedPitch<N> + vector * (geglu ? 16 : 8);
        float v[8], bias[8];
        sum_parts(v, from, t.splits, t.pair, place);
        epilogue::load_bias(bias, e, geglu ? 2 * column : column);
        if (geglu) {
            float gate[8], gate_bias[8];
            sum_parts(gate, from + 8, t.splits, t.pair, place);
            epilogue::load_bias(gate_bias, e, 2 * column + 8);
            epilogue::finish8_geglu<T>(e, row, column, v, gate, bias, gate_bias, nullptr);
        } else epilogue::finish8<T>(e, row, column, v, bias, nullptr);
    }
}

// The kernel but for its loads: blocks of kThreads, the first warpgroup loads, the other two multiply.
// row_of(unit) makes the `rows` of write_tile.
template <class T, int N, Finish F, class Load, class RowOf>
PTX void run(const EpilogueArgs& e, const HopperTiles& t, Load& load, const RowOf& row_of) {
    constexpr bool kOnce = F == Finish::kAny;
    auto& s = dynamic_smem<Smem<T, N>>();
    next_kernel_may_start();
    start_ring(s, t);
    if (threadIdx.x < 128) {
        setmaxnreg_dec<56>();
        if (threadIdx.x == 0) produce<kOnce>(s, t, load);
        else wait_for_previous_kernel();
        __syncwarp();
        if constexpr (kOnce) cluster_sync();
    } else {
        setmaxnreg_inc<224>();
        wait_for_previous_kernel();
        Place at;
        for (Walk<kOnce> walk(t); walk.more(); walk.next()) {
            const Unit unit = walk.unit();
            float acc[N / 2];
            multiply<T, N>(s, unit, t.pair, at, acc);
            if constexpr (kOnce) {
                stage_sums<T, N>(s, acc);
                cluster_sync();
                add_up<T, N>(s, e, t, unit, row_of(unit));
            } else {
                write_tile<T, N, F>(e, unit, acc, row_of(unit));
            }
        }
        __syncwarp();
    }
    // A neighbour may still read, write or signal here. Release: arrivals at its barriers are on their way until it has them.
    if (kOnce || t.pair > 1) cluster_sync();
}

}  // namespace hopper

// KERNEL(type, columns, finish, name) for every kernel of a family; Own is what it has beside the ways to finish of all.
#define HOPPER_WIDTH(KERNEL, family, Own, own, T, N, suffix) \
    KERNEL(T, N, kPlain, family##_128x##N##_##suffix)        \
    KERNEL(T, N, Own, family##_128x##N##_##own##_##suffix)   \
    KERNEL(T, N, kAny, family##_128x##N##_any_##suffix)
#define HOPPER_TYPE(KERNEL, family, Own, own, T, suffix)     \
    HOPPER_WIDTH(KERNEL, family, Own, own, T, 128, suffix)   \
    HOPPER_WIDTH(KERNEL, family, Own, own, T, 160, suffix)   \
    HOPPER_WIDTH(KERNEL, family, Own, own, T, 256, suffix)
#define HOPPER_KERNELS(KERNEL, family, Own, own)             \
    HOPPER_TYPE(KERNEL, family, Own, own, __half, f16)       \
    HOPPER_TYPE(KERNEL, family, Own, own, __nv_bfloat16, bf16)
