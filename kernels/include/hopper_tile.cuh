// hopper_tile.cuh: the tensor-core main loop of sm_90a, shared by linear layers and convolutions.
//
// A block computes 128 x kN tiles of a product A * B^T whose operands both run along K. One producer thread fills a ring of
// stages by TMA (128-byte swizzle, 64 of K a stage); two consumer warpgroups of 64 rows each run wgmma on them with both
// operands in shared memory. full[i]: stage i has its bytes; empty[i]: all eight consumer warps are done with it. The grid is
// persistent: blocks take unit after unit (a tile, or with split-K a part of its K), and while the consumers write one tile
// out the producer already fills the ring for the next.
//
// The L2 cache delivers about 30 bytes a cycle to each multiprocessor, less than a tile of its own asks for (a 128 x 160 tile
// 36 KB in 640 cycles). So two blocks form a cluster where there are two tiles above each other: each loads its rows of A and
// half of the B that both need, for both (multicast). Then empty[i] also waits for the neighbour's consumers.
//
// Widths: 160 divides 320, 640 and 1280, the widths of the UNets, and leaves the fewest idle multiprocessors there; 256 and
// 128 are for the rest. wgmma reads 2 KB of A and kN * 32 bytes of B for 64 x kN x 16: 80 to 96 of the 128 bytes a cycle
// that shared memory delivers. 224 registers a consumer thread: 128 sums at most, addresses and the epilogue.
//
// Fragments to rows: a quad of lanes holds 2 columns each of every 8; two exchanges among the four give each lane all 8
// columns of one block of 8 in 4, so that loads and stores are 16 bytes a lane and 64 contiguous bytes a quad.
#pragma once
#include "epilogue.cuh"
#include "wgmma.cuh"

struct HopperTiles {  // how the product is cut up; the twin is launch/hopper.rs
    int32_t steps;    // of kK, over all of K
    int32_t tiles_m, tiles_n;
    int32_t band;     // rows of clusters that are walked together, column by column, so that their operands stay in the L2 cache
    int32_t splits;   // parts of K, each to its own partial sums; 1: none
    int32_t cluster;  // blocks of a cluster, 1 or 2: tiles above each other, of which the last may be behind the product
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

// The units of a cluster: for (Walk w(t); w.more(); w.next()) ... w.unit() is this block's.
struct Walk {
    const HopperTiles& t;
    int index, rows;  // rows of clusters

    PTX explicit Walk(const HopperTiles& tiles) : t(tiles), index(blockIdx.x / tiles.cluster), rows((tiles.tiles_m + tiles.cluster - 1) / tiles.cluster) {}
    PTX bool more() const { return index < rows * t.tiles_n * t.splits; }
    PTX void next() { index += gridDim.x / t.cluster; }
    PTX Unit unit() const {
        const int count = rows * t.tiles_n, split = index / count, tile = index - split * count;
        const int in_band = t.band * t.tiles_n, first = tile / in_band * t.band, high = min(t.band, rows - first), place = tile % in_band;
        const int rank = t.cluster > 1 ? int(cluster_rank()) : 0;
        return {(first + place % high) * t.cluster + rank, place / high, split, int(int64_t(t.steps) * split / t.splits),
                int(int64_t(t.steps) * (split + 1) / t.splits)};
    }
};

template <class S> PTX void start_ring(S& s, const HopperTiles& t) {
    if (threadIdx.x == 0) {
        for (int i = 0; i < S::kStages; i++) mbarrier_init(&s.full[i], 1), mbarrier_init(&s.empty[i], kConsumerWarps * t.cluster);
        fence_mbarrier_init();
    }
    __syncwarp();  // the barrier of a cluster is for whole warps
    if (t.cluster > 1) cluster_sync();
    else __syncthreads();
}

// The B of a stage: N rows of w from row `row` on, columns from k on. In a cluster this block brings half of them, to both.
template <class T, int N> PTX void load_b(const HopperTiles& t, const TensorMap* w, int k, int row, T* b, uint64_t* bar) {
    if (t.cluster == 1) {
        tma_load_2d(b, w, k, row, bar);
    } else {
        const int half = int(cluster_rank()) * (N / 2);
        tma_load_2d_multicast(b + half * kK, w, k, row + half, bar, 3);
    }
}

struct Place {  // in the ring
    int stage = 0;
    unsigned phase = 0;
    template <class S> PTX void advance() {
        if (++stage == S::kStages) stage = 0, phase ^= 1;
    }
};

// One thread: load.begin(unit) before a unit, load(step, a, b, bar) for every step of it, which must bring kStageBytes.
template <class S, class Load> PTX void produce(S& s, const HopperTiles& t, Load& load) {
    Place at;
    for (Walk walk(t); walk.more(); walk.next()) {
        const Unit unit = walk.unit();
        load.begin(unit);
        for (int step = unit.first; step < unit.last; step++) {
            mbarrier_wait(&s.empty[at.stage], at.phase ^ 1);  // the first round passes at once
            mbarrier_arrive_expect_tx(&s.full[at.stage], S::kStageBytes);
            load(step, s.a[at.stage], s.b[at.stage], &s.full[at.stage]);
            at.template advance<S>();
        }
    }
}

// A consumer warp is done with a stage: all producers that fill it must know.
PTX void give_back(uint64_t* empty, int cluster, int lane) {
    if (cluster == 1) {
        if (lane == 0) mbarrier_arrive(empty);
    } else if (lane < cluster) mbarrier_arrive_at(empty, lane);
}

// The product of one unit in `acc`, fragments as wgmma leaves them. At most one step's products are under way while the
// next step's are queued; only then is the stage before given back.
template <class T, int N> PTX void multiply(Smem<T, N>& s, const Unit& unit, int cluster, Place& at, float (&acc)[N / 2]) {
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
        if (step > unit.first) give_back(&s.empty[before], cluster, lane);
        before = at.stage;
        at.template advance<S>();
    }
    wgmma_wait<0>();
    give_back(&s.empty[before], cluster, lane);
}

// ---- from fragments to rows -------------------------------------------------------------------------------------------
// Lane t of a quad brings columns 2t, 2t+1 of four blocks of eight columns and leaves with all eight columns of block t.
PTX void gather8(float (&out)[8], const float (&v)[4][2]) {
    const int lane = threadIdx.x % 32;
    const bool odd = lane & 1, high = lane & 2;
    float half[2][4];  // of blocks odd and 2 + odd: columns 0 to 3, or 4 to 7 in the upper two lanes
#pragma unroll
    for (int p = 0; p < 2; p++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float get = __shfl_xor_sync(~0u, odd ? v[2 * p][i] : v[2 * p + 1][i], 1);
            half[p][i] = odd ? get : v[2 * p][i];
            half[p][2 + i] = odd ? v[2 * p + 1][i] : get;
        }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float get = __shfl_xor_sync(~0u, high ? half[0][i] : half[1][i], 2);
        out[i] = high ? get : half[0][i];
        out[4 + i] = high ? half[1][i] : get;
    }
}

// What no kernel writes while this one runs: the compiler may load it early, ahead of stores.
PTX void add8_constant(float (&v)[8], const float* bias) {
    const float4 a = __ldg(reinterpret_cast<const float4*>(bias)), b = __ldg(reinterpret_cast<const float4*>(bias + 4));
    v[0] += a.x, v[1] += a.y, v[2] += a.z, v[3] += a.w, v[4] += b.x, v[5] += b.y, v[6] += b.z, v[7] += b.w;
}
template <class T> PTX void add8(float (&v)[8], const uint4& packed) {
    float r[8];
    unpack2<T>(r[0], r[1], packed.x), unpack2<T>(r[2], r[3], packed.y), unpack2<T>(r[4], r[5], packed.z), unpack2<T>(r[6], r[7], packed.w);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] += r[i];
}
PTX void add8(float (&v)[8], const float* sums) {
    float r[8];
    load8(r, sums);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] += r[i];
}

// Out columns `column` to column + 8 of row `row`; v is the product with its bias, `residual` what is to be added.
template <class T> PTX void finish8(const EpilogueArgs& e, int row, int column, float (&v)[8], const uint4& residual) {
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] *= e.scale;
    if (e.residual) add8<T>(v, residual);
    const size_t at = size_t(row) * e.out_pitch + column;
    if (e.flags & kEpilogueFloat) store8(static_cast<float*>(e.out) + at, v);
    else store8(static_cast<T*>(e.out) + at, v);
}
template <class T> PTX uint4 residual8(const EpilogueArgs& e, int row, int column) {
    if (!e.residual) return make_uint4(0, 0, 0, 0);
    return *reinterpret_cast<const uint4*>(static_cast<const T*>(e.residual) + size_t(row) * e.residual_pitch + column);
}
// The same for the sums themselves: bias, time bias, activation.
template <class T> PTX void activate_and_finish8(const EpilogueArgs& e, int row, int column, float (&v)[8], const uint4& residual) {
    if (e.bias) add8_constant(v, e.bias + column);
    if (e.time_bias) {
        const T* time_bias = static_cast<const T*>(e.time_bias) + size_t(row / e.rows_per_sample) * e.time_pitch;
        add8<T>(v, __ldg(reinterpret_cast<const uint4*>(time_bias + column)));
    }
    epilogue::activate8(v, e.act);
    finish8<T>(e, row, column, v, residual);
}

// Value times gate of one row half of the product's blocks of eight columns 2 * block and 2 * block + 1, with their bias.
template <int N> PTX void geglu2(float (&out)[2], const EpilogueArgs& e, const float (&acc)[N / 2], int block, int half, int column) {
    float2 value = make_float2(0.0f, 0.0f), gate = value;
    if (e.bias && column < e.columns) {
        value = __ldg(reinterpret_cast<const float2*>(e.bias + column));
        gate = __ldg(reinterpret_cast<const float2*>(e.bias + column + 8));
    }
    const int at = 8 * block + 2 * half;
    out[0] = (acc[at] + value.x) * gelu(acc[at + 4] + gate.x);
    out[1] = (acc[at + 1] + value.y) * gelu(acc[at + 5] + gate.y);
}

template <int N> PTX void gather8(float (&out)[8], const float (&acc)[N / 2], int block, int half) {
    float v[4][2];
#pragma unroll
    for (int b = 0; b < 4; b++) v[b][0] = acc[4 * (block + b) + 2 * half], v[b][1] = acc[4 * (block + b) + 2 * half + 1];
    gather8(out, v);
}

// Stores the sums of a row half of a tile as they are.
template <class T, int N> PTX void write_partial(const EpilogueArgs& e, const Unit& unit, const float (&acc)[N / 2], int half, int row) {
    const int quad = threadIdx.x % 4;
    float* out = e.partial + (size_t(unit.split) * e.rows + max(row, 0)) * epilogue::partial_pitch(e);
#pragma unroll
    for (int j = 0; j < N / 8; j += 4) {
        float v[8];
        gather8<N>(v, acc, j, half);
        const int column = unit.tile_n * N + (j + quad) * 8;
        if (row >= 0 && column < e.columns) store8(out + column, v);
    }
}

// Writes a tile: rows(r) is the row of the product that row r of the tile holds, or -1. A residual is loaded many vectors at a
// time and before the first store: it may lie where out lies, so the compiler cannot move loads ahead of stores itself.
template <class T, int N, class Rows> PTX void write_tile(const EpilogueArgs& e, const Unit& unit, const float (&acc)[N / 2], const Rows& rows) {
    const int quad = threadIdx.x % 4, warp_row = (threadIdx.x - 128) / 32 * 16 + threadIdx.x % 32 / 4;
    const int row[2] = {rows(warp_row), rows(warp_row + 8)};
    const bool geglu = e.flags & kEpilogueGeglu;
    const int columns = geglu ? e.columns / 2 : e.columns, column0 = (geglu ? unit.tile_n * (N / 2) : unit.tile_n * N) + quad * 8;
    constexpr int kGroups = N / 32, kHalvesAhead = N > 160 ? 1 : 2;  // as registers allow
    uint4 residual[2][kGroups];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (e.partial) {
            write_partial<T, N>(e, unit, acc, half, row[half]);
            continue;
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            if (kHalvesAhead == 2 ? half == 1 : h != half) continue;
#pragma unroll
            for (int g = 0; g < kGroups; g++) {
                residual[h][g] = make_uint4(0, 0, 0, 0);
                if (row[h] >= 0 && column0 + 32 * g < columns && (!geglu || g * 4 + quad < N / 16)) residual[h][g] = residual8<T>(e, row[h], column0 + 32 * g);
            }
        }
        if (geglu) {
#pragma unroll
            for (int j = 0; j < N / 16; j += 4) {  // blocks of eight columns of out
                float pairs[4][2] = {}, v[8];
#pragma unroll
                for (int b = 0; b < 4; b++)
                    if (j + b < N / 16) geglu2<N>(pairs[b], e, acc, j + b, half, unit.tile_n * N + 16 * (j + b) + 2 * quad);
                gather8(v, pairs);
                const int column = column0 + j * 8;
                if (row[half] >= 0 && j + quad < N / 16 && column < columns) finish8<T>(e, row[half], column, v, residual[half][j / 4]);
            }
        } else {
#pragma unroll
            for (int j = 0; j < N / 8; j += 4) {
                float v[8];
                gather8<N>(v, acc, j, half);
                const int column = column0 + j * 8;
                if (row[half] >= 0 && column < columns) activate_and_finish8<T>(e, row[half], column, v, residual[half][j / 4]);
            }
        }
    }
}

// The kernel but for its loads: blocks of kThreads, the first warpgroup loads, the other two multiply.
// row_of(unit) makes the `rows` of write_tile.
template <class T, int N, class Load, class RowOf> PTX void run(const EpilogueArgs& e, const HopperTiles& t, Load& load, const RowOf& row_of) {
    auto& s = dynamic_smem<Smem<T, N>>();
    start_ring(s, t);
    if (threadIdx.x < 128) {
        setmaxnreg_dec<56>();
        if (threadIdx.x == 0) produce(s, t, load);
    } else {
        setmaxnreg_inc<224>();
        Place at;
        for (Walk walk(t); walk.more(); walk.next()) {
            const Unit unit = walk.unit();
            float acc[N / 2];
            multiply<T, N>(s, unit, t.cluster, at, acc);
            write_tile<T, N>(e, unit, acc, row_of(unit));
        }
    }
    __syncwarp();
    if (t.cluster > 1) cluster_sync();  // the neighbour may still write here
}

// Split-K: adds the partial sums in order and finishes; eight columns of out a thread.
template <class T> PTX void reduce(const EpilogueArgs& e, int splits) {
    const bool geglu = e.flags & kEpilogueGeglu;
    const int blocks = epilogue::out_columns(e) / 8;
    const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (index >= int64_t(e.rows) * blocks) return;
    const int row = int(index / blocks), column = int(index % blocks) * 8;
    const uint4 residual = residual8<T>(e, row, column);
    float v[8] = {}, gate[8] = {};
    const size_t pitch = epilogue::partial_pitch(e);
    const float* from = e.partial + row * pitch + (geglu ? 2 * column : column);
#pragma unroll 4
    for (int s = 0; s < splits; s++, from += e.rows * pitch) {
        add8(v, from);
        if (geglu) add8(gate, from + 8);
    }
    if (!geglu) {
        activate_and_finish8<T>(e, row, column, v, residual);
        return;
    }
    if (e.bias) add8_constant(v, e.bias + 2 * column), add8_constant(gate, e.bias + 2 * column + 8);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] *= gelu(gate[i]);
    finish8<T>(e, row, column, v, residual);
}

}  // namespace hopper
