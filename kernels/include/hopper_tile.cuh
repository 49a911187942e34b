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
// that shared memory delivers. 232 registers a consumer thread: 128 sums at most, addresses and the epilogue.
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

// out columns `column` to column + 8 of row `row`; v is the product with its bias. Vectors only: see launch/gemm_sm90.rs.
template <class T> PTX void finish8(const EpilogueArgs& e, int row, int column, float (&v)[8]) {
    const size_t at = size_t(row) * e.out_pitch + column;
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] *= e.scale;
    if (e.residual) {
        float r[8];
        load8(r, static_cast<const T*>(e.residual) + size_t(row) * e.residual_pitch + column);
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] += r[i];
    }
    if (e.flags & kEpilogueFloat) store8(static_cast<float*>(e.out) + at, v);
    else store8(static_cast<T*>(e.out) + at, v);
}
PTX void add8(float (&v)[8], const float* bias) {
    float b[8];
    load8(b, bias);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] += b[i];
}
// The same for the sums themselves: bias, time bias, activation.
template <class T> PTX void activate_and_finish8(const EpilogueArgs& e, int row, int column, float (&v)[8], const T* time_bias) {
    if (e.bias) add8(v, e.bias + column);
    if (time_bias) {
        float b[8];
        load8(b, time_bias + column);
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] += b[i];
    }
    epilogue::activate8(v, e.act);
    finish8<T>(e, row, column, v);
}

// Writes a tile: rows(r) is the row of the product that row r of the tile holds, or -1.
template <class T, int N, class Rows> PTX void write_tile(const EpilogueArgs& e, const Unit& unit, const float (&acc)[N / 2], const Rows& rows) {
    const int lane = threadIdx.x % 32, quad = lane % 4, column0 = unit.tile_n * N;
#pragma unroll
    for (int half = 0; half < 2; half++) {  // row lane/4, then row lane/4 + 8 of the warp's sixteen
        const int row = rows((threadIdx.x - 128) / 32 * 16 + lane / 4 + 8 * half);
        if (e.partial) {
            float* out = e.partial + (size_t(unit.split) * e.rows + max(row, 0)) * e.columns;
#pragma unroll
            for (int j = 0; j < N / 8; j += 4) {
                float v[8];
                gather8(v, {{acc[4 * j + 2 * half], acc[4 * j + 2 * half + 1]}, {acc[4 * j + 4 + 2 * half], acc[4 * j + 5 + 2 * half]},
                            {acc[4 * j + 8 + 2 * half], acc[4 * j + 9 + 2 * half]}, {acc[4 * j + 12 + 2 * half], acc[4 * j + 13 + 2 * half]}});
                const int column = column0 + (j + quad) * 8;
                if (row >= 0 && column < e.columns) store8(out + column, v);
            }
        } else if (e.flags & kEpilogueGeglu) {
#pragma unroll
            for (int j = 0; j < N / 16; j += 4) {  // blocks of eight out columns: product blocks 2j (values) and 2j + 1 (gates)
                float pairs[4][2], v[8];
#pragma unroll
                for (int b = 0; b < 4; b++)
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        pairs[b][i] = 0.0f;
                        if (j + b >= N / 16) continue;
                        const int from = 8 * (j + b) + 2 * half + i, column = column0 + 16 * (j + b) + 2 * quad + i;
                        const bool biased = e.bias && column < e.columns;
                        const float value = acc[from] + (biased ? e.bias[column] : 0.0f), gate = acc[from + 4] + (biased ? e.bias[column + 8] : 0.0f);
                        pairs[b][i] = value * gelu(gate);
                    }
                gather8(v, pairs);
                const int column = column0 / 2 + (j + quad) * 8;
                if (row >= 0 && j + quad < N / 16 && column < e.columns / 2) finish8<T>(e, row, column, v);
            }
        } else {
            const T* time_bias = e.time_bias ? static_cast<const T*>(e.time_bias) + size_t(max(row, 0) / e.rows_per_sample) * e.time_pitch : nullptr;
#pragma unroll
            for (int j = 0; j < N / 8; j += 4) {
                float v[8];
                gather8(v, {{acc[4 * j + 2 * half], acc[4 * j + 2 * half + 1]}, {acc[4 * j + 4 + 2 * half], acc[4 * j + 5 + 2 * half]},
                            {acc[4 * j + 8 + 2 * half], acc[4 * j + 9 + 2 * half]}, {acc[4 * j + 12 + 2 * half], acc[4 * j + 13 + 2 * half]}});
                const int column = column0 + (j + quad) * 8;
                if (row >= 0 && column < e.columns) activate_and_finish8<T>(e, row, column, v, time_bias);
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
        setmaxnreg_dec<40>();
        if (threadIdx.x == 0) produce(s, t, load);
        __syncwarp();
    } else {
        setmaxnreg_inc<232>();
        Place at;
        for (Walk walk(t); walk.more(); walk.next()) {
            const Unit unit = walk.unit();
            float acc[N / 2];
            multiply<T, N>(s, unit, t.cluster, at, acc);
            write_tile<T, N>(e, unit, acc, row_of(unit));
        }
    }
    if (t.cluster > 1) cluster_sync();  // the neighbour may still write here
}

// Split-K: adds the partial sums in order and finishes; eight columns of out a thread.
template <class T> PTX void reduce(const EpilogueArgs& e, int splits) {
    const bool geglu = e.flags & kEpilogueGeglu;
    const int blocks = epilogue::out_columns(e) / 8;
    const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (index >= int64_t(e.rows) * blocks) return;
    const int row = int(index / blocks), column = int(index % blocks) * 8;
    float v[8] = {}, gate[8] = {};
    const float* from = e.partial + size_t(row) * e.columns + (geglu ? 2 * column : column);
    for (int s = 0; s < splits; s++, from += size_t(e.rows) * e.columns) {
        add8(v, from);
        if (geglu) add8(gate, from + 8);
    }
    if (!geglu) {
        const T* time_bias = e.time_bias ? static_cast<const T*>(e.time_bias) + size_t(row / e.rows_per_sample) * e.time_pitch : nullptr;
        activate_and_finish8<T>(e, row, column, v, time_bias);
        return;
    }
    if (e.bias) add8(v, e.bias + 2 * column), add8(gate, e.bias + 2 * column + 8);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] *= gelu(gate[i]);
    finish8<T>(e, row, column, v);
}

}  // namespace hopper
