// ptx_emu.cpp: the PTX instructions of kernels/ptx.cuh on the CPU. Section names are those of the PTX ISA manual.
//
// Asynchronous instructions are emulated by the worst behaviour the ISA allows: the destination is destroyed when
// the copy is issued and holds the data only once the kernel has waited for it. Code that reads too early, or that
// reuses a buffer too soon, sees NaNs in every run instead of rarely on a GPU.
#include "ptx_emu.hpp"
#include "runtime.hpp"
#include "simt.h"

#include <algorithm>
#if defined(__F16C__)
#include <immintrin.h>
#endif

using namespace simt;

namespace ptx {
namespace {
uint8_t* smem_access(uint32_t addr, unsigned bytes, check::Kind kind, Loc at) {
    uint8_t* p = smem_at(addr, bytes, at);
    if (check::on) check::access(p, bytes, kind, check::site(at));
    return p;
}

typedef float Row __attribute__((vector_size(32)));  // g++ and clang: eight floats

void halves_to_floats(const void* halves, float* out, int n, bool bf16) {  // n is a multiple of 8
    const uint16_t* in = static_cast<const uint16_t*>(halves);
    if (bf16) {
        for (int i = 0; i < n; i++) {
            uint32_t u = uint32_t(in[i]) << 16;
            memcpy(&out[i], &u, 4);
        }
        return;
    }
#if defined(__F16C__)
    for (int i = 0; i < n; i += 8) _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(in + i))));
#else
    for (int i = 0; i < n; i++) {
        _Float16 h;
        memcpy(&h, &in[i], 2);
        out[i] = (float)h;
    }
#endif
}
}  // namespace

// ---- "Data Movement and Conversion: Asynchronous copy": cp.async -----------------------------------------------------
void cp_async(uint32_t dst, const void* src, int bytes, int src_bytes, Loc at) {
    if (src_bytes < 0 || src_bytes > bytes) fault(at, "cp.async: src-size %d of %d", src_bytes, bytes);
    if (src_bytes && (uint64_t)src % bytes) fault(at, "cp.async: misaligned global address %p", src);
    if (src_bytes) check_global(src, src_bytes, "cp.async", at);
    uint8_t* p = smem_access(dst, bytes, check::Issue, at);
    if (check::on && src_bytes) check::access(src, src_bytes, check::Read, check::site(at));
    memset(p, kPoison, bytes);
    me()->open.push_back({p, static_cast<const uint8_t*>(src), bytes, src_bytes});
}
void cp_async_commit() {
    Fiber* f = me();
    f->groups.push_back(std::move(f->open));
    f->open.clear();
}
void cp_async_wait(int keep, Loc at) {
    auto& groups = me()->groups;
    while ((int)groups.size() > keep) {
        for (const Copy& c : groups.front()) {
            if (check::on) check::access(c.dst, c.bytes, check::Write, check::site(at));
            memcpy(c.dst, c.src, c.src_bytes);
            memset(c.dst + c.src_bytes, 0, c.bytes - c.src_bytes);
        }
        groups.erase(groups.begin());
    }
}

// What Turing has in place of cp.async: a load of 16 bytes, or none, and a store.
void copy_16(uint32_t dst, const void* src, int src_bytes, Loc at) {
    if (src_bytes != 0 && src_bytes != 16) fault(at, "copy of %d of 16 bytes", src_bytes);
    uint8_t* p = smem_access(dst, 16, check::Write, at);
    if (!src_bytes) {
        memset(p, 0, 16);
        return;
    }
    if ((uint64_t)src % 16) fault(at, "copy: misaligned global address %p", src);
    check_global(src, 16, "copy", at);
    if (check::on) check::access(src, 16, check::Read, check::site(at));
    memcpy(p, src, 16);
}

// ---- "Warp-level matrix instructions": ldmatrix ---------------------------------------------------------------------
// Row i of matrix m is the 16 bytes at the address of lane 8m+i. Lane l receives elements 2*(l%4) and 2*(l%4)+1 of
// row l/4; with .trans, of column l/4.
namespace {
struct Ldmatrix {
    uint32_t* r;
    int count;
    bool trans;
    uint32_t row;
    Loc at;
};
}  // namespace
void ldmatrix(uint32_t* r, int count, bool trans, uint32_t row, Loc at) {
    Ldmatrix arg{r, count, trans, row, at};
    if ((int)me()->lane < 8 * count) smem_access(row, 16, check::Read, at);
    warp_collective(trans ? "ldmatrix.trans" : "ldmatrix", ~0u, &arg, [](void* const* args, unsigned) {
        auto lane = [&](int l) -> Ldmatrix& { return *static_cast<Ldmatrix*>(args[l]); };
        const uint8_t* smem = block().smem;
        for (int m = 0; m < lane(0).count; m++) {
            uint16_t e[8][8];
            int in_banks[8] = {}, worst = 0;
            for (int i = 0; i < 8; i++) {
                memcpy(e[i], smem + lane(8 * m + i).row, 16);
                worst = std::max(worst, ++in_banks[lane(8 * m + i).row / 16 % 8]);
            }
            block().bank_conflicts += worst - 1;
            for (int l = 0; l < 32; l++) {
                int i = l / 4, j = l % 4 * 2;
                lane(l).r[m] = lane(0).trans ? e[j][i] | uint32_t(e[j + 1][i]) << 16 : e[i][j] | uint32_t(e[i][j + 1]) << 16;
            }
        }
    }, at);
}

// ---- "Matrix fragments for mma.m16n8k16 with floating point type" ----------------------------------------------------
// With g = lane/4 and t = lane%4: a[0] = A[g][2t,2t+1], a[1] = A[g+8][same], a[2] = A[g][2t+8,2t+9], a[3] = A[g+8][same];
// b0 = B[2t,2t+1][g], b1 = B[2t+8,2t+9][g]; d[0,1] = D[g][2t,2t+1], d[2,3] = D[g+8][same].
namespace {
struct Mma {
    float* d;
    const uint32_t* a;
    uint32_t b0, b1;
    bool bf16;
};
}  // namespace
void mma_m16n8k16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bool bf16, Loc at) {
    Mma arg{d, a, b0, b1, bf16};
    warp_collective(bf16 ? "mma.m16n8k16.bf16" : "mma.m16n8k16.f16", ~0u, &arg, [](void* const* args, unsigned) {
        uint32_t ah[16][8];
        uint16_t bh[16][8];
        float af[16][16];
        Row bf[16], df[16];
        for (int l = 0; l < 32; l++) {
            const Mma& m = *static_cast<Mma*>(args[l]);
            int g = l / 4, t = l % 4;
            ah[g][t] = m.a[0], ah[g + 8][t] = m.a[1], ah[g][t + 4] = m.a[2], ah[g + 8][t + 4] = m.a[3];
            bh[2 * t][g] = m.b0, bh[2 * t + 1][g] = m.b0 >> 16, bh[2 * t + 8][g] = m.b1, bh[2 * t + 9][g] = m.b1 >> 16;
            memcpy((float*)&df[g] + 2 * t, m.d, 8), memcpy((float*)&df[g + 8] + 2 * t, m.d + 2, 8);
        }
        bool bf16 = static_cast<Mma*>(args[0])->bf16;
        halves_to_floats(ah, af[0], 256, bf16);
        halves_to_floats(bh, (float*)bf, 128, bf16);
        for (int i = 0; i < 16; i++)
            for (int k = 0; k < 16; k++) df[i] += af[i][k] * bf[k];
        for (int l = 0; l < 32; l++) {
            const Mma& m = *static_cast<Mma*>(args[l]);
            int g = l / 4, t = l % 4;
            memcpy(m.d, (float*)&df[g] + 2 * t, 8), memcpy(m.d + 2, (float*)&df[g + 8] + 2 * t, 8);
        }
    }, at);
}

// ---- "Matrix fragments for mma.m16n8k8", f16 and bf16 ------------------------------------------------------------------
// The first half of the fragments above: a0 = A[g][2t,2t+1], a1 = A[g+8][same]; b0 = B[2t,2t+1][g]; d as above.
namespace {
struct MmaK8 {
    float* d;
    uint32_t a0, a1, b0;
    bool bf16;
};
}  // namespace
void mma_m16n8k8(float* d, uint32_t a0, uint32_t a1, uint32_t b0, bool bf16, Loc at) {
    MmaK8 arg{d, a0, a1, b0, bf16};
    warp_collective(bf16 ? "mma.m16n8k8.bf16" : "mma.m16n8k8.f16", ~0u, &arg, [](void* const* args, unsigned) {
        uint32_t ah[16][4];
        uint16_t bh[8][8];
        float af[16][8];
        Row bf[8], df[16];
        for (int l = 0; l < 32; l++) {
            const MmaK8& m = *static_cast<MmaK8*>(args[l]);
            int g = l / 4, t = l % 4;
            ah[g][t] = m.a0, ah[g + 8][t] = m.a1;
            bh[2 * t][g] = m.b0, bh[2 * t + 1][g] = m.b0 >> 16;
            memcpy((float*)&df[g] + 2 * t, m.d, 8), memcpy((float*)&df[g + 8] + 2 * t, m.d + 2, 8);
        }
        bool bf16 = static_cast<MmaK8*>(args[0])->bf16;
        halves_to_floats(ah, af[0], 128, bf16);
        halves_to_floats(bh, (float*)bf, 64, bf16);
        for (int i = 0; i < 16; i++)
            for (int k = 0; k < 8; k++) df[i] += af[i][k] * bf[k];
        for (int l = 0; l < 32; l++) {
            const MmaK8& m = *static_cast<MmaK8*>(args[l]);
            int g = l / 4, t = l % 4;
            memcpy(m.d, (float*)&df[g] + 2 * t, 8), memcpy(m.d + 2, (float*)&df[g + 8] + 2 * t, 8);
        }
    }, at);
}

// ---- "Parallel Synchronization: mbarrier" ------------------------------------------------------------------------------
// A phase completes when the pending arrivals and the tx-count are both zero; then the arrivals are set up again.
namespace {
MBarrier& mbarrier_of(Block& b, uint64_t* bar, Loc at) {
    auto it = b.mbarriers.find(bar);
    if (it == b.mbarriers.end()) fault(at, "mbarrier used before mbarrier.init");
    if (*bar != kMBarrierCookie) fault(at, "mbarrier was overwritten by an ordinary store");
    return it->second;
}
MBarrier& mbarrier(uint64_t* bar, Loc at) {
    smem_at(simt::smem_u32(bar, at), 8, at);
    return mbarrier_of(block(), bar, at);
}
// What `p` is in the shared memory of another block of the cluster ("mapa").
template <class T> T* in_block(Block& b, T* p) { return reinterpret_cast<T*>(b.smem + (reinterpret_cast<const uint8_t*>(p) - block().smem)); }
void count_tx(MBarrier& m, int64_t bytes, Loc at) {
    constexpr int64_t kMost = (1 << 20) - 1;
    m.tx += bytes;
    if (m.tx > kMost || m.tx < -kMost) fault(at, "mbarrier: a tx-count of %ld bytes, at most %ld are possible", long(m.tx), long(kMost));
}
void settle(MBarrier& m) {
    if (m.pending || m.tx) return;
    m.phase++;
    m.pending = m.count;
    for (Fiber* f : m.waiting) {
        check::acquire(f, m.clock);
        resume(f);
    }
    m.waiting.clear();
}
}  // namespace
void mbarrier_init(uint64_t* bar, unsigned count, Loc at) {
    smem_access(simt::smem_u32(bar, at), 8, check::Write, at);
    if (!count || count > (1 << 20) - 1) fault(at, "mbarrier.init: count %u", count);
    MBarrier& m = block().mbarriers[bar];
    m = MBarrier{};
    m.count = m.pending = count;
    *bar = kMBarrierCookie;
}
void fence_mbarrier_init() {
    for (auto& [bar, m] : block().mbarriers) m.fenced = true;
}
void mbarrier_arrive(uint64_t* bar, unsigned tx_bytes, Loc at) {
    MBarrier& m = mbarrier(bar, at);
    check::release(m.clock);
    count_tx(m, tx_bytes, at);
    if (!m.pending--) fault(at, "mbarrier: more than the expected %u arrivals in one phase", m.count);
    settle(m);
}
void mbarrier_arrive_at(uint64_t* bar, unsigned rank, Loc at) {
    smem_at(simt::smem_u32(bar, at), 8, at);
    Block& target = neighbour(rank, "mbarrier", at);
    MBarrier& m = mbarrier_of(target, in_block(target, bar), at);
    check::release(m.clock);
    if (!m.pending--) fault(at, "mbarrier: more than the expected %u arrivals in one phase", m.count);
    settle(m);
}
const float* cluster_load(const float* p, unsigned floats, unsigned rank, Loc at) {
    smem_at(simt::smem_u32(p, at), 4 * floats, at);
    const float* there = in_block(neighbour(rank, "ld.shared::cluster", at), p);
    if (check::on) check::access(there, 4 * floats, check::Read, check::site(at));
    return there;
}
void mbarrier_wait(uint64_t* bar, unsigned parity, Loc at) {
    MBarrier& m = mbarrier(bar, at);
    const bool current = (m.phase & 1) == (parity & 1);  // the phase of this parity is the incomplete one, or the one before it
    const int64_t awaited = int64_t(m.phase) - !current;
    if (current) {
        m.waiting.push_back(me());
        suspend("mbarrier.wait", at, (uint64_t)bar | (parity & 1));
    } else check::acquire(me(), m.clock);
    // Stricter than the ISA, which knows parities only: whoever waits for one phase sees every phase, each before the next is over.
    if (m.phase - awaited != 1) fault(at, "mbarrier: phase %ld is over as well before a thread that waits for phase %ld has gone on", long(m.phase) - 1, long(awaited));
    m.seen.resize(block().threads, INT64_MIN);
    int64_t& seen = m.seen[me()->linear];
    if (seen != INT64_MIN && awaited > seen + 1) fault(at, "mbarrier: a wait sees phase %ld, this thread's last one saw phase %ld: parities hide the phases between", long(awaited), long(seen));
    seen = awaited;
}
void fence_proxy_async() {
    if (!check::on) return;
    Fiber* f = me();
    f->proxy_clock = f->clock[f->slot]++;
}

// ---- "cp.async.bulk.tensor", tiled and im2col mode; "Swizzling modes" --------------------------------------------------
namespace {
constexpr uint64_t kTensorMap = 0x70616d726f736e74;
struct Map {  // what cuTensorMapEncode* would fill: simt_tensor_map below
    uint64_t magic;
    uint64_t reserved;               // the CUDA driver clears a bit here in real maps (src/driver/cuda/tensor_map.rs)
    const uint8_t* base;
    uint64_t strides[4];             // bytes, of all dimensions but the innermost
    uint32_t extents[5];             // elements; im2col: C, W, H, N
    uint16_t boxes[5], pixels;       // im2col: boxes[0] channels of `pixels` pixels
    int16_t lower[2], upper[2];      // im2col, along W, H: corners of the bounding box from the tensor's first, last pixel
    uint8_t step[2];                 // im2col, along W, H
    uint8_t rank, elem, swizzle, im2col;  // swizzle: bytes
};
static_assert(sizeof(Map) <= 128);
// The swizzle of S bytes XORs the 16-byte piece's number within S bytes with the number of the 128-byte line.
uint32_t swizzled(uint32_t addr, uint32_t bytes) { return bytes ? addr ^ ((addr >> 7 & (bytes / 16 - 1)) << 4) : addr; }

// A copy that fills shared memory from `to` on, one row of boxes[0] elements after the other.
struct Filling {
    const Map& map;
    uint32_t to;
    Bulk bulk;
    Loc at;

    // A row whose first element lies at `coordinate`, one number a dimension.
    void row(const int64_t* coordinate) {
        bool inside = true;
        const uint8_t* line = map.base;
        for (int d = 1; d < map.rank; d++) {
            inside &= coordinate[d] >= 0 && coordinate[d] < int64_t(map.extents[d]);
            line += coordinate[d] * int64_t(map.strides[d - 1]);
        }
        for (uint32_t x = 0; x < map.boxes[0]; x += 16 / map.elem, to += 16) {
            const int64_t first = coordinate[0] + x;  // extents are multiples of 16 bytes here, so a piece is in or out as a whole
            const uint8_t* from = inside && first >= 0 && first < int64_t(map.extents[0]) ? line + first * map.elem : nullptr;
            if (first * map.elem % 16) fault(at, "cp.async.bulk.tensor: only multiples of 16 bytes are emulated along the innermost dimension");
            if (from) check_global(from, 16, "cp.async.bulk.tensor", at);
            const uint32_t place = swizzled(to, map.swizzle);
            smem_at(place, 16, at);
            if (check::on && from) check::access(from, 16, check::Read, check::site(at));
            bulk.chunks.push_back({place, from});
        }
    }
};
Filling start(Map& m, void* dst, const void* map, uint64_t* bar, bool im2col, uint32_t rank, Loc at) {
    memcpy(&m, map, sizeof m);
    if (m.magic != kTensorMap) fault(at, "cp.async.bulk.tensor: not a tensor map");
    if (m.rank != rank || bool(m.im2col) != im2col)
        fault(at, "cp.async.bulk.tensor: a %uD %s copy with a map of %uD %s", rank, im2col ? "im2col" : "tiled", m.rank, m.im2col ? "im2col" : "tiled");
    mbarrier(bar, at);
    const uint32_t addr = simt::smem_u32(dst, at), align = m.swizzle ? 8 * m.swizzle : 128;
    if (addr % align) fault(at, "cp.async.bulk.tensor: destination %#x is not %u-byte aligned", addr, align);
    return {m, addr, {{}, bar, at, {}, nullptr}, at};
}
// Bit r of `ranks`: into the shared memory of the cluster's block r, at the same place, completing on its mbarrier at the same place.
void issue(Filling& f, unsigned ranks, Loc at) {
    uint64_t* bar = f.bulk.bar;
    if (!ranks || ranks >> block().cluster.size()) fault(at, "cp.async.bulk.tensor: ranks %#x in a cluster of %zu blocks", ranks, block().cluster.size());
    std::vector<Block*> targets;
    for (Block* target : block().cluster)
        if (ranks >> target->rank & 1) targets.push_back(target);
    for (Block* target : targets) {
        neighbour(target->rank, "cp.async.bulk.tensor", at);
        if (!mbarrier_of(*target, in_block(*target, bar), at).fenced) fault(at, "cp.async.bulk.tensor: its mbarrier was not made visible by fence.mbarrier_init");
        for (auto [place, from] : f.bulk.chunks) {
            if (check::on) check::access(target->smem + place, 16, check::BulkIssue, check::site(at));
            memset(target->smem + place, kPoison, 16);
        }
    }
    check::release(f.bulk.clock);
    for (Block* target : targets) {
        f.bulk.bar = in_block(*target, bar), f.bulk.target = target;
        f.bulk.phase = mbarrier_of(*target, f.bulk.bar, at).phase;
        target->bulk.push_back(f.bulk);
    }
}
unsigned own_rank() { return 1u << block().rank; }
}  // namespace
void tma_load(void* dst, const void* map, uint32_t rank, const int* at_element, uint64_t* bar, Loc at) {
    tma_load_multicast(dst, map, rank, at_element, bar, own_rank(), at);
}
void tma_load_multicast(void* dst, const void* map, uint32_t rank, const int* at_element, uint64_t* bar, unsigned ranks, Loc at) {
    Map m;
    Filling f = start(m, dst, map, bar, false, rank, at);
    uint32_t i[5] = {};
    for (bool more = true; more;) {
        int64_t coordinate[5] = {};
        for (uint32_t d = 0; d < rank; d++) coordinate[d] = int64_t(at_element[d]) + i[d];
        f.row(coordinate);
        more = false;
        for (uint32_t d = 1; d < rank && !more; d++) {
            more = ++i[d] < m.boxes[d];
            if (!more) i[d] = 0;
        }
    }
    issue(f, ranks, at);
}
// "im2col mode": pixels are taken along W, then H, then N, within the bounding box; the offsets move what is read, not the walk.
void tma_load_im2col(void* dst, const void* map, const int* at_element, const int* offsets, uint64_t* bar, Loc at) {
    Map m;
    Filling f = start(m, dst, map, bar, true, 4, at);
    int64_t place[3] = {at_element[1], at_element[2], at_element[3]};  // W, H, N
    for (int d = 0; d < 2; d++) {
        const int64_t last = int64_t(m.extents[1 + d]) - 1 + m.upper[d];
        if (place[d] < m.lower[d] || place[d] > last)
            fault(at, "im2col: pixel %ld along %c is not in the bounding box %d to %ld", long(place[d]), "WH"[d], m.lower[d], long(last));
        if (offsets[d] < 0 || offsets[d] > 255) fault(at, "im2col: offset %d is not 0 to 255", offsets[d]);
    }
    for (uint32_t p = 0; p < m.pixels; p++) {
        const int64_t coordinate[4] = {at_element[0], place[0] + offsets[0], place[1] + offsets[1], place[2]};
        f.row(coordinate);
        for (int d = 0; d < 2; d++) {
            place[d] += m.step[d];
            if (place[d] <= int64_t(m.extents[1 + d]) - 1 + m.upper[d]) break;
            place[d] = m.lower[d];
            if (d == 1) place[2]++;
        }
    }
    issue(f, own_rank(), at);
}
}  // namespace ptx

void simt::deliver(Bulk& b) {
    for (auto [to, from] : b.chunks) {
        uint8_t* p = b.target->smem + to;
        if (check::on) check::access(p, 16, check::AsyncWrite, check::site(b.at));
        if (from) memcpy(p, from, 16);
        else memset(p, 0, 16);
    }
    MBarrier& m = ptx::mbarrier_of(*b.target, b.bar, b.at);
    if (check::on) check::join(m.clock, b.clock);
    // The phase that the copy belongs to waits for its bytes, if somebody has said how many to expect.
    if (m.phase != b.phase)
        fault(b.at, "cp.async.bulk.tensor: bytes that were asked for in phase %u of their mbarrier in the block of rank %u land in phase %u: it did not expect them", b.phase,
              b.target->rank, m.phase);
    ptx::count_tx(m, -int64_t(16 * b.chunks.size()), b.at);
    ptx::settle(m);
}

extern "C" int simt_tensor_map(void* out, const simt_map_desc* d) {
    // The rules of cuTensorMapEncodeTiled and cuTensorMapEncodeIm2col that hold here, and two of this layer: the innermost
    // extent is a multiple of 16 bytes, and a swizzled box is as wide as its swizzle.
    ptx::Map m{};
    const uint32_t elem = d->element_bytes, swizzle = d->swizzle_bytes, rank = d->rank;
    if (rank < 1 || rank > 5 || d->base % 16 || d->extents[0] * elem % 16 || d->boxes[0] * elem % 16) return 1;
    if (swizzle && (swizzle > 128 || swizzle < 32 || swizzle & (swizzle - 1) || d->boxes[0] * elem != swizzle)) return 1;
    m.magic = ptx::kTensorMap, m.base = reinterpret_cast<const uint8_t*>(d->base);
    m.rank = rank, m.elem = elem, m.swizzle = swizzle, m.im2col = d->is_im2col != 0, m.pixels = d->pixels;
    for (uint32_t i = 0; i < rank; i++) {
        if (!d->extents[i] || d->extents[i] > 1ull << 32 || !d->boxes[i] || d->boxes[i] > 256) return 1;
        if (i && (d->strides[i - 1] % 16 || d->strides[i - 1] >= 1ull << 40)) return 1;
        m.extents[i] = uint32_t(d->extents[i]), m.boxes[i] = d->boxes[i];
        if (i) m.strides[i - 1] = d->strides[i - 1];
    }
    if (m.im2col) {
        if (rank != 4 || !d->pixels || d->pixels > 1024) return 1;
        for (int i = 0; i < 2; i++) {
            if (d->lower[i] < -128 || d->lower[i] > 127 || d->upper[i] < -128 || d->upper[i] > 127 || !d->pixel_stride[i] || d->pixel_stride[i] > 8) return 1;
            m.lower[i] = d->lower[i], m.upper[i] = d->upper[i], m.step[i] = d->pixel_stride[i];
        }
    }
    memset(out, 0, 128);
    memcpy(out, &m, sizeof m);
    return 0;
}

// ---- "Asynchronous warpgroup-level matrix instructions" ---------------------------------------------------------------------
// Operands are read, and results appear, only at the wait; until then the accumulator registers hold NaNs.
namespace ptx {
namespace {
WarpGroup& group() { return block().groups[me()->linear / 128]; }

// "Matrix descriptor format": bits 0-13 start address >> 4, 32-45 stride byte offset >> 4, 62-63 swizzle (1: 128 bytes).
// Row r of a K-major operand lies in the 8-row group r/8; the swizzle applies to the final address.
void operand(uint64_t desc, int rows, bool bf16, float* out, Loc at) {  // [rows][16]
    if (desc >> 62 != 1) fault(at, "wgmma: only the 128-byte swizzle is emulated");
    uint32_t start = (desc & 0x3fff) << 4, stride = (desc >> 32 & 0x3fff) << 4;
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < 2; c++) {
            uint32_t addr = swizzled(start + r / 8 * stride + r % 8 * 128 + c * 16, 128);
            uint16_t e[8];
            memcpy(e, smem_access(addr, 16, check::AsyncRead, at), 16);
            halves_to_floats(e, out + r * 16 + c * 8, 8, bf16);
        }
}
// An MN-major operand (imm-trans 1) with a swizzle of W bytes: k lies along rows of W bytes, W/2 columns in a row; 8 rows
// (k) are an atom, the next 8 k follow at the stride offset, the next W/2 columns at the leading offset.
void operand_mn_major(uint64_t desc, int columns, bool bf16, float* out, Loc at) {  // [columns][16]
    static constexpr uint32_t widths[4] = {0, 128, 64, 32};
    const uint32_t width = widths[desc >> 62], start = (desc & 0x3fff) << 4, leading = (desc >> 16 & 0x3fff) << 4, stride = (desc >> 32 & 0x3fff) << 4;
    if (!width) fault(at, "wgmma: an MN-major operand without swizzle is not emulated");
    if (start % (8 * width) || leading % (8 * width) || stride % (8 * width))
        fault(at, "wgmma: start %#x, leading offset %u or stride offset %u of an MN-major operand is no multiple of the swizzle's %u bytes", start, leading, stride, 8 * width);
    for (int k = 0; k < 16; k++)
        for (int c = 0; c < columns; c += 8) {
            const uint32_t byte = c * 2, addr = start + byte / width * leading + k / 8 * stride + k % 8 * width + byte % width;
            uint16_t e[8];
            float f[8];
            memcpy(e, smem_access(swizzled(addr, width), 16, check::AsyncRead, at), 16);
            halves_to_floats(e, f, 8, bf16);
            for (int i = 0; i < 8; i++) out[(c + i) * 16 + k] = f[i];
        }
}
// "Register fragments for wgmma.mma_async.m64nNk16", operand A: warp w holds rows 16w to 16w+15 as for mma.m16n8k16.
void operand_registers(const Wgmma& w, float* out) {  // [64][16]
    uint32_t rows[64][8];
    for (int t = 0; t < 128; t++) {
        const uint32_t* r = w.registers->r[t];
        if (memcmp(r, w.registers->issued[t], 16)) fault(w.at, "wgmma: thread %d changed its registers of operand A before the wait", t);
        const int row = 16 * (t / 32) + t % 32 / 4, c = t % 4;
        rows[row][c] = r[0], rows[row + 8][c] = r[1], rows[row][c + 4] = r[2], rows[row + 8][c + 4] = r[3];
    }
    halves_to_floats(rows, out, 1024, w.bf16);
}
// "Register fragments for wgmma.mma_async.m64nNk16": thread t holds D[16*(t/32) + t%32/4 + 8*(i/2%2)][8*(i/4) + 2*(t%4) + i%2].
void execute(const Wgmma& w, float* acc) {  // acc[64][n]
    float a[64 * 16], b[256 * 16];
    if (w.registers) operand_registers(w, a);
    else operand(w.a, 64, w.bf16, a, w.at);
    if (w.b_mn_major) operand_mn_major(w.b, w.n, w.bf16, b, w.at);
    else operand(w.b, w.n, w.bf16, b, w.at);
    if (!w.accumulate) std::fill(acc, acc + 64 * w.n, 0.0f);
    for (int j = 0; j < w.n; j += 8) {
        Row bt[16];
        for (int k = 0; k < 16; k++)
            for (int e = 0; e < 8; e++) bt[k][e] = b[(j + e) * 16 + k];
        for (int i = 0; i < 64; i++) {
            Row d;
            memcpy(&d, acc + i * w.n + j, 32);
            for (int k = 0; k < 16; k++) d += a[i * 16 + k] * bt[k];
            memcpy(acc + i * w.n + j, &d, 32);
        }
    }
}
Hidden* find(WarpGroup& g, const Wgmma& w) {
    for (Hidden& h : g.hidden)
        if (h.w.d[0] == w.d[0]) return &h;
    return nullptr;
}
template <class F> void each_register(int n, F f) {
    for (int t = 0; t < 128; t++)
        for (int i = 0; i < n / 2; i++) f(t, i, (16 * (t / 32) + t % 32 / 4 + i / 2 % 2 * 8) * n + i / 4 * 8 + t % 4 * 2 + i % 2);
}
}  // namespace
void wgmma_fence(Loc at) {
    warpgroup_collective("wgmma.fence", nullptr, [](void* const*, unsigned) { group().fenced = true; }, at);
}
namespace {
void issue(Wgmma& arg, Loc at) {
    warpgroup_collective("wgmma.mma_async", &arg, [](void* const* args, unsigned) {
        WarpGroup& g = group();
        Wgmma w = *static_cast<Wgmma*>(args[0]);
        if (!g.fenced) fault(w.at, "wgmma.mma_async without wgmma.fence since the registers were last used");
        if (w.register_a) w.registers = std::make_shared<WgmmaRegisterA>();
        for (int t = 0; t < 128; t++) {
            const Wgmma& o = *static_cast<Wgmma*>(args[t]);
            if (o.a != w.a || o.b != w.b || o.accumulate != w.accumulate) fault(w.at, "wgmma: operands differ between threads 0 and %d of the warpgroup", t);
            w.d[t] = o.d[0];
            if (!w.registers) continue;
            w.registers->r[t] = o.register_a;
            memcpy(w.registers->issued[t], o.register_a, 16);
        }
        if (!find(g, w)) {
            g.hidden.push_back({w, std::vector<float>(64 * w.n)});
            auto& acc = g.hidden.back().acc;
            each_register(w.n, [&](int t, int i, int at) { acc[at] = w.d[t][i], w.d[t][i] = NAN; });
        }
        g.open.push_back(w);
    }, at);
}
}  // namespace
void wgmma(float* d, int n, uint64_t a, uint64_t b, bool accumulate, bool bf16, Loc at) {
    Wgmma arg{{d}, n, a, b, accumulate, bf16, at};
    issue(arg, at);
}
void wgmma_register_a(float* d, int n, const uint32_t* a, uint64_t b, bool b_mn_major, bool accumulate, bool bf16, Loc at) {
    Wgmma arg{{d}, n, 0, b, accumulate, bf16, at, b_mn_major, a};
    issue(arg, at);
}
void wgmma_commit(Loc at) {
    warpgroup_collective("wgmma.commit_group", nullptr, [](void* const*, unsigned) {
        WarpGroup& g = group();
        g.groups.push_back(std::move(g.open));
        g.open.clear();
    }, at);
}
void wgmma_wait(int keep, Loc at) {
    warpgroup_collective("wgmma.wait_group", &keep, [](void* const* args, unsigned) {
        WarpGroup& g = group();
        g.fenced = false;
        auto keep = g.groups.end() - std::min<size_t>(g.groups.size(), *static_cast<int*>(args[0]));
        for (auto it = g.groups.begin(); it != keep; it++)
            for (const Wgmma& w : *it) execute(w, find(g, w)->acc.data());
        g.groups.erase(g.groups.begin(), keep);
        auto idle = [&](const Hidden& h) {  // no wgmma on these registers is left: show the result
            auto same = [&](const Wgmma& w) { return w.d[0] == h.w.d[0]; };
            for (auto& list : g.groups)
                if (std::any_of(list.begin(), list.end(), same)) return false;
            if (std::any_of(g.open.begin(), g.open.end(), same)) return false;
            each_register(h.w.n, [&](int t, int i, int at) { h.w.d[t][i] = h.acc[at]; });
            return true;
        };
        g.hidden.erase(std::remove_if(g.hidden.begin(), g.hidden.end(), idle), g.hidden.end());
        if (!check::on) return;
        Fiber** f = &block().fibers[me()->linear / 128 * 128];  // the wait orders the group's operand reads before what follows
        Clock all;
        for (int t = 0; t < 128; t++) check::join(all, f[t]->clock);
        for (int t = 0; t < 128; t++) f[t]->clock = all, f[t]->clock[f[t]->slot]++;
    }, at);
}
}  // namespace ptx
