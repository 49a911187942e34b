// targets: sm_90a
// Attention forward on Hopper: out = softmax(q k^T * scale + causal mask) v, for every sample and head.
//
// Roles. A block has two consumer warpgroups of 64 query rows each and a producer warp. The producer fills rings of key
// and value tiles (and the query tiles) by TMA; a consumer multiplies and exponentiates. Registers go from the producer's
// warpgroup to the consumers (setmaxnreg).
// Overlap. Within a consumer q k^T of tile j+1 and p v of tile j are issued together, and the exponentials of tile j+1
// run beside p v.
// Between the consumers, two named barriers let one issue its products while the other exponentiates.
// Operands. q is taken to registers once a tile (ldmatrix), p never leaves them, so of the 128 bytes a clock of shared
// memory only k and v take part: 64 bytes a clock at 128 keys. The next query tile loads while this one is worked on.
// Layout. Every matrix lies in panels of 64 columns with the 128-byte swizzle. Tensor maps are D, head, row, sample, so
// that columns from D to the panel's end are out of bounds and read as zeros: head dim 40 multiplies a depth of 48 and,
// in p v, a width of 40 (a panel in part; 64 * kPanels would do as well, at 60% more work for head dim 40).
// Softmax. Scores become powers of two by one multiply-add. The reference maximum follows the true one only when that
// has grown by more than 2^8 (p stays below 256, sums are in float): most tiles need no rescaling. For head dims of 64
// and less, where exponentials bind, one in eight of them is a polynomial on the multiply-add units.
// Budget per 64 x 128 tile and consumer, in clocks of the multiprocessor: products 352 (D 40), 512 (64), 640 (80),
// 1024 (128), 1280 (160); exponentials 530, with the polynomial share 465; issue of all instructions then 450.
// The grid is persistent: block b takes query tiles b, b + blocks, ... ; tiles of a head are neighbours, so that its
// keys and values stay in L2.
#include "element.cuh"
#include "exp2.cuh"
#include "quad.cuh"
#include "wgmma_rs.cuh"

struct AttentionSm90Args {
    void* out;
    uint64_t out_pitch;   // elements
    int32_t queries, keys, heads;
    int32_t sharing;      // neighbouring samples that use the same keys
    int32_t row_tiles;    // of a sample and head
    int32_t tiles;        // in all
    int32_t is_causal;
    float scale;          // times log2(e); positive
};

namespace attention_sm90 {
constexpr int kRows = 64, kConsumers = 2, kThreads = 128 * (kConsumers + 1), kPanel = 64;
constexpr float kSlack = 8;        // how far, in powers of two, scores may exceed the reference maximum
constexpr float kFloor = -1e30f;   // the reference maximum before the first tile

template <int kDim_, int kKeys_, int kStages_> struct Config {
    static constexpr int kDim = kDim_, kKeys = kKeys_, kStages = kStages_;
    static constexpr int kWidth = kDim;                   // of p v: kDim, or whole panels
    static constexpr int kSteps = (kDim + 15) / 16;       // of 16 along the depth of q k^T
    static constexpr int kPanels = (kDim + kPanel - 1) / kPanel;
    static constexpr bool kUsePolynomial = kDim <= 64;
};

template <class C> struct Smem {
    uint16_t q[kConsumers][C::kPanels][kRows][kPanel];
    uint16_t k[C::kStages][C::kPanels][C::kKeys][kPanel];
    uint16_t v[C::kStages][C::kPanels][C::kKeys][kPanel];
    uint64_t q_full[kConsumers], q_empty[kConsumers];
    uint64_t k_full[C::kStages], k_empty[C::kStages], v_full[C::kStages], v_empty[C::kStages];
};

struct Tile {
    int row, head, sample, key_tiles;
};
template <class C> PTX Tile tile_at(const AttentionSm90Args& args, int index) {
    int r = index % args.row_tiles;
    if (args.is_causal) r = args.row_tiles - 1 - r;  // the longest first
    index /= args.row_tiles;
    Tile t;
    t.row = r * kRows * kConsumers, t.head = index % args.heads, t.sample = index / args.heads;
    const int keys = args.is_causal ? min(args.keys, t.row + kRows * kConsumers) : args.keys;
    t.key_tiles = (keys + C::kKeys - 1) / C::kKeys;
    return t;
}

template <int kStages> struct Ring {  // where a role is in a ring of stages
    int stage = 0;
    unsigned phase = 0;
    PTX void advance() {
        if (++stage == kStages) stage = 0, phase ^= 1;
    }
};

// ---- producer: one thread -----------------------------------------------------------------------------------------
template <class C> PTX void produce(Smem<C>& s, const AttentionSm90Args& args, const TensorMap* q, const TensorMap* k, const TensorMap* v) {
    constexpr unsigned kPanelBytes = kPanel * 2;
    Ring<C::kStages> kr, vr;
    unsigned q_phase = 0;
    tma_prefetch_map(q), tma_prefetch_map(k), tma_prefetch_map(v);
    auto load = [&](uint64_t* full, uint64_t* empty, unsigned phase, uint16_t* to, int rows, const TensorMap* map, const Tile& t, int row, int sample) {
        mbarrier_wait(empty, phase ^ 1);
        mbarrier_arrive_expect_tx(full, C::kPanels * rows * kPanelBytes);
        for (int p = 0; p < C::kPanels; p++) tma_load_4d(to + p * rows * kPanel, map, p * kPanel, t.head, row, sample, full);
    };
    for (int index = blockIdx.x; index < args.tiles; index += gridDim.x) {
        const Tile t = tile_at<C>(args, index);
        const int key_sample = t.sample / args.sharing;
        for (int g = 0; g < kConsumers; g++)
            load(&s.q_full[g], &s.q_empty[g], q_phase, &s.q[g][0][0][0], kRows, q, t, t.row + g * kRows, t.sample);
        q_phase ^= 1;
        // In the order of use: k is one tile ahead of v.
#pragma unroll 1
        for (int j = 0; j <= t.key_tiles; j++) {
            if (j < t.key_tiles) {
                load(&s.k_full[kr.stage], &s.k_empty[kr.stage], kr.phase, &s.k[kr.stage][0][0][0], C::kKeys, k, t, j * C::kKeys, key_sample);
                kr.advance();
            }
            if (j > 0) {
                load(&s.v_full[vr.stage], &s.v_empty[vr.stage], vr.phase, &s.v[vr.stage][0][0][0], C::kKeys, v, t, (j - 1) * C::kKeys, key_sample);
                vr.advance();
            }
        }
    }
}

// ---- consumer: a warpgroup ----------------------------------------------------------------------------------------
// A thread holds two rows of its warpgroup's tile, row(0) = 16*warp + lane/4 and row(1) = row(0) + 8: of s and o,
// element i belongs to row i/2%2 and column 8*(i/4) + 2*(lane%4) + i%2.
template <class C> struct Consumer {
    float o[C::kWidth / 2] = {}, top[2] = {kFloor, kFloor}, sum[2] = {0, 0};
};

PTX void release(uint64_t* empty) {  // every warp of every consumer counts once
    if (threadIdx.x % 32 == 0) mbarrier_arrive(empty);
}

// Query rows of this warp as A fragments.
template <class C> PTX void load_queries(uint32_t (&q)[C::kSteps][4], const uint16_t (&tile)[C::kPanels][kRows][kPanel]) {
    const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane % 16;
#pragma unroll
    for (int d = 0; d < C::kSteps; d++) {
        const int piece = d % 4 * 2 + lane / 16;  // of 16 bytes, before the swizzle
        ldmatrix_x4(q[d], smem_u32(&tile[d / 4][row][(piece ^ row % 8) * 8]));
    }
}

template <class T, class C> PTX void issue_scores(float (&s)[C::kKeys / 2], const uint32_t (&q)[C::kSteps][4], uint64_t k) {
#pragma unroll
    for (int d = 0; d < C::kSteps; d++)
        wgmma_rs_m64k16<T, C::kKeys, false>(s, q[d], wgmma_b128_advance(k, d / 4 * C::kKeys * kPanel * 2 + d % 4 * 32), d != 0);
    wgmma_commit();
}
template <class T, class C> PTX void issue_values(float (&o)[C::kWidth / 2], const uint32_t (&p)[C::kKeys / 16][4], uint64_t v) {
#pragma unroll
    for (int j = 0; j < C::kKeys / 16; j++) wgmma_rs_m64k16<T, C::kWidth, true>(o, p[j], wgmma_b128_advance(v, j * 16 * kPanel * 2), true);
    wgmma_commit();
}

// Scores of keys that a row does not see become -inf; `limit` is the first such key for row(0), row(1) of this thread.
template <int kKeys> PTX void mask(float (&s)[kKeys / 2], int first_key, const int (&limit)[2]) {
    const int column = first_key + threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < kKeys / 2; i++)
        if (column + i / 4 * 8 + i % 2 >= limit[i / 2 % 2]) s[i] = -INFINITY;
}

// Scores to unnormalised probabilities. True, for all of the warp, if what was summed before must be multiplied by `shrink`.
template <class C> PTX bool exponentiate(float (&s)[C::kKeys / 2], float (&top)[2], float (&sum)[2], float (&shrink)[2], float scale) {
    float high[2][2] = {{s[0], s[4]}, {s[2], s[6]}};
#pragma unroll
    for (int i = 0; i < C::kKeys / 2; i++) high[i / 2 % 2][i / 4 % 2] = fmaxf(high[i / 2 % 2][i / 4 % 2], s[i]);
    bool grows = false;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float m = fmaxf(high[r][0], high[r][1]);
        m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
        m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
        high[r][0] = m * scale;
        grows |= high[r][0] > top[r] + kSlack;
    }
    grows = __any_sync(~0u, grows);
    if (grows) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float m = fmaxf(top[r], high[r][0]);
            shrink[r] = exp2_approx(top[r] - m);
            top[r] = m, sum[r] *= shrink[r];
        }
    }
    float part[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < C::kKeys / 2; i++) {
        const float x = fmaf(s[i], scale, -top[i / 2 % 2]);
        s[i] = C::kUsePolynomial && i / 4 % 8 == 3 ? exp2_polynomial(x) : exp2_approx(x);
        part[i / 2 % 2] += s[i];
    }
    sum[0] += part[0], sum[1] += part[1];
    return grows;
}

// Accumulator fragments of two neighbouring groups of eight keys are one A fragment.
template <class T, int kKeys> PTX void pack(uint32_t (&p)[kKeys / 16][4], const float (&s)[kKeys / 2]) {
#pragma unroll
    for (int j = 0; j < kKeys / 16; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) p[j][i] = pack2<T>(s[8 * j + 2 * i], s[8 * j + 2 * i + 1]);
}

// Divides by the sums and writes the two rows of this thread, 16 bytes a store where four column groups are left.
template <class T, class C> PTX void store(const AttentionSm90Args& args, const Tile& t, int row0, const float (&o)[C::kWidth / 2], const float (&sum)[2]) {
    constexpr int kGroups = C::kDim / 8;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float total = sum[r] + __shfl_xor_sync(~0u, sum[r], 1);
        total += __shfl_xor_sync(~0u, total, 2);
        const float inverse = __fdividef(1.0f, total);
        const int row = row0 + r * 8;
        const bool inside = row < args.queries;
        T* to = static_cast<T*>(args.out) + (uint64_t(t.sample) * args.queries + row) * args.out_pitch + t.head * C::kDim;
#pragma unroll
        for (int g = 0; g < kGroups; g += 4) {
            uint32_t v[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (g + i < kGroups) v[i] = pack2<T>(o[4 * (g + i) + 2 * r] * inverse, o[4 * (g + i) + 2 * r + 1] * inverse);
            if (g + 4 <= kGroups) {
                transpose_quad(v);
                if (inside) *reinterpret_cast<uint4*>(to + (g + lane % 4) * 8) = make_uint4(v[0], v[1], v[2], v[3]);
            } else {
#pragma unroll
                for (int i = 0; i < kGroups - g; i++)
                    if (inside) *reinterpret_cast<uint32_t*>(to + (g + i) * 8 + lane % 4 * 2) = v[i];
            }
        }
    }
}

template <class T, class C> PTX void consume(Smem<C>& s, const AttentionSm90Args& args, int group) {
    constexpr int kKeys = C::kKeys;
    constexpr uint32_t kStageBytes = sizeof s.k[0];
    const uint64_t k0 = wgmma_b128_descriptor(s.k, 16, 8 * kPanel * 2);
    const uint64_t v0 = wgmma_b128_descriptor(s.v, kKeys * kPanel * 2, 8 * kPanel * 2);
    const int row_in_tile = group * kRows + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    const int my_turn = 1 + group, other_turn = 2 - group;
    Ring<C::kStages> ring;
    unsigned q_phase = 0;
    uint32_t q[C::kSteps][4], p[kKeys / 16][4];
    float scores[kKeys / 2];
    if (group == 1) named_barrier_arrive(other_turn, 128 * kConsumers);  // group 0 begins

    for (int index = blockIdx.x; index < args.tiles; index += gridDim.x) {
        const Tile t = tile_at<C>(args, index);
        const int row0 = t.row + row_in_tile;
        const int limit[2] = {args.is_causal ? min(args.keys, row0 + 1) : args.keys, args.is_causal ? min(args.keys, row0 + 9) : args.keys};
        const int seen_by_all = args.is_causal ? min(args.keys, t.row + group * kRows + 1) : args.keys;
        Consumer<C> c;
        float shrink[2] = {1, 1};

        mbarrier_wait(&s.q_full[group], q_phase);
        q_phase ^= 1;
        load_queries<C>(q, s.q[group]);
        fence_proxy_async();  // these reads before the copy engine's next write
        __syncwarp();
        release(&s.q_empty[group]);

        mbarrier_wait(&s.k_full[ring.stage], ring.phase);
        wgmma_pin(scores);
        wgmma_fence();
        issue_scores<T, C>(scores, q, wgmma_b128_advance(k0, ring.stage * kStageBytes));
        wgmma_wait<0>();
        wgmma_pin(scores);
        release(&s.k_empty[ring.stage]);
        if (kKeys > seen_by_all) mask<kKeys>(scores, 0, limit);
        exponentiate<C>(scores, c.top, c.sum, shrink, args.scale);
        pack<T, kKeys>(p, scores);

#pragma unroll 1
        for (int j = 1; j < t.key_tiles; j++) {
            const Ring<C::kStages> before = ring;  // of v
            ring.advance();
            mbarrier_wait(&s.k_full[ring.stage], ring.phase);
            mbarrier_wait(&s.v_full[before.stage], before.phase);  // here, so that no branch parts the two products
            named_barrier_sync(my_turn, 128 * kConsumers);
            wgmma_pin(scores);
            wgmma_pin(c.o);
            wgmma_pin(p);
            wgmma_fence();
            issue_scores<T, C>(scores, q, wgmma_b128_advance(k0, ring.stage * kStageBytes));
            issue_values<T, C>(c.o, p, wgmma_b128_advance(v0, before.stage * kStageBytes));
            named_barrier_arrive(other_turn, 128 * kConsumers);
            wgmma_wait<1>();
            wgmma_pin(scores);
            release(&s.k_empty[ring.stage]);
            if ((j + 1) * kKeys > seen_by_all) mask<kKeys>(scores, j * kKeys, limit);
            const bool grew = exponentiate<C>(scores, c.top, c.sum, shrink, args.scale);
            wgmma_wait_later(c.sum[0] + c.sum[1]);
            wgmma_wait<0>();
            wgmma_pin(c.o);
            wgmma_pin(p);
            release(&s.v_empty[before.stage]);
            if (grew) {
#pragma unroll
                for (int i = 0; i < C::kWidth / 2; i++) c.o[i] *= shrink[i / 2 % 2];
            }
            pack<T, kKeys>(p, scores);
        }
        mbarrier_wait(&s.v_full[ring.stage], ring.phase);
        wgmma_pin(c.o);
        wgmma_pin(p);
        wgmma_fence();
        issue_values<T, C>(c.o, p, wgmma_b128_advance(v0, ring.stage * kStageBytes));
        wgmma_wait<0>();
        wgmma_pin(c.o);
        wgmma_pin(p);
        release(&s.v_empty[ring.stage]);
        ring.advance();
        store<T, C>(args, t, row0, c.o, c.sum);
    }
    if (group == 0) named_barrier_sync(my_turn, 128 * kConsumers);  // the arrival of group 1's last turn
}

template <class T, class C> PTX void forward(const AttentionSm90Args& args, const TensorMap* q, const TensorMap* k, const TensorMap* v) {
    auto& s = dynamic_smem<Smem<C>>();
    next_kernel_may_start();
    if (threadIdx.x == 0) {
        for (int i = 0; i < kConsumers; i++) mbarrier_init(&s.q_full[i], 1), mbarrier_init(&s.q_empty[i], 4);
        for (int i = 0; i < C::kStages; i++) {
            mbarrier_init(&s.k_full[i], 1), mbarrier_init(&s.k_empty[i], 4 * kConsumers);
            mbarrier_init(&s.v_full[i], 1), mbarrier_init(&s.v_empty[i], 4 * kConsumers);
        }
        fence_mbarrier_init();
    }
    __syncthreads();
    wait_for_previous_kernel();
    const int group = __shfl_sync(~0u, int(threadIdx.x / 128), 0);  // the same for a warp, and known to be
    if (group == kConsumers) {
        setmaxnreg_dec<24>();
        if (threadIdx.x == 128 * kConsumers) produce<C>(s, args, q, k, v);
    } else {
        setmaxnreg_inc<240>();
        consume<T, C>(s, args, group);
    }
}
}  // namespace attention_sm90

// grid: at most one block a multiprocessor
#define ATTENTION(D, KEYS, STAGES, T, suffix)                                                                             \
    extern "C" __global__ __launch_bounds__(attention_sm90::kThreads, 1) void attention_sm90_128x##KEYS##_d##D##_##suffix( \
        const __grid_constant__ AttentionSm90Args args, const __grid_constant__ TensorMap q,                               \
        const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v) {                                        \
        attention_sm90::forward<T, attention_sm90::Config<D, KEYS, STAGES>>(args, &q, &k, &v);                             \
    }                                                                                                                      \
    SIMT_KERNEL(attention_sm90_128x##KEYS##_d##D##_##suffix)
#define ATTENTION_BOTH(D, KEYS, STAGES)           \
    ATTENTION(D, KEYS, STAGES, __half, f16)       \
    ATTENTION(D, KEYS, STAGES, __nv_bfloat16, bf16)
ATTENTION_BOTH(40, 128, 4)
ATTENTION_BOTH(64, 128, 4)
ATTENTION_BOTH(80, 128, 2)
ATTENTION_BOTH(128, 128, 2)
ATTENTION_BOTH(160, 96, 2)
// For the 77 keys of a prompt.
ATTENTION_BOTH(40, 80, 4)
ATTENTION_BOTH(64, 80, 4)
ATTENTION_BOTH(80, 80, 2)
