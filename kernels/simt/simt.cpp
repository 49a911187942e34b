// simt.cpp: fibers, scheduler, barriers, warp collectives, device memory, launch.
#include "runtime.hpp"
#include "simt.h"

#include <errno.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {
__thread Thread* self = nullptr;

namespace {
constexpr size_t kStack = 128 << 10, kPage = 4096;
std::mutex lock;
Kernel* kernels = nullptr;
std::atomic<uint32_t> block_serial{1};
std::atomic<uint32_t> chain_serial{1};  // kernels before it are done before the next one begins
thread_local std::string last_error;
thread_local uint64_t last_conflicts;

// ---- context switch ------------------------------------------------------------------------------------------
// Saves the callee-saved registers of the System V ABI on the old stack and pops them from the new one. (Rounding
// mode and x87 state are not part of a CUDA thread and are not switched.)
extern "C" void simt_switch(void** save_sp, void* load_sp);
#if defined(__x86_64__)
asm(R"(.text
.globl simt_switch
.type simt_switch,@function
simt_switch:
    push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
    ret
.size simt_switch, .-simt_switch
)");
void* first_frame(uint8_t* top, void (*entry)()) {
    void** sp = reinterpret_cast<void**>(top) - 1;
    *sp = nullptr;  // entry's return address: it never returns
    *--sp = reinterpret_cast<void*>(entry);
    return sp - 6;
}
#else
#error "simt_switch: write the dozen instructions for this processor, or use Boost.Context"
#endif

#if defined(__SANITIZE_ADDRESS__)
thread_local const void* home = nullptr;  // the worker's own stack
thread_local size_t home_size = 0;
#endif
void switch_to(Fiber* from, Fiber* to) {
    self = to;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(from->done ? nullptr : &from->asan_fake, to->stack ? to->stack : home, to->stack ? kStack : home_size);
#endif
    simt_switch(&from->sp, to->sp);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(from->asan_fake, nullptr, nullptr);
#endif
}

// ---- scheduler ----------------------------------------------------------------------------------------------
uint64_t next_random(Block& b) {  // xorshift64
    b.rng ^= b.rng << 13, b.rng ^= b.rng >> 7, b.rng ^= b.rng << 17;
    return b.rng;
}

std::string who_waits(Block& b) {
    std::string text;
    for (int i = 0; i < b.threads;) {  // ranges of threads that wait at the same place
        Fiber* f = b.fibers[i];
        int j = i + 1;
        auto same = [&](Fiber* g) {
            return g->done == f->done && (f->done || (g->wait.op == f->wait.op && g->wait.at.line == f->wait.at.line && g->wait.detail == f->wait.detail));
        };
        while (j < b.threads && same(b.fibers[j])) j++;
        char line[400];
        if (f->done) snprintf(line, sizeof line, "\n  threads %d-%d have exited", i, j - 1);
        else {
            char detail[120] = "";
            if (!strcmp(f->wait.op, "mbarrier.wait")) {
                uint64_t* bar = reinterpret_cast<uint64_t*>(f->wait.detail & ~uint64_t(1));
                const MBarrier& m = b.mbarriers[bar];
                snprintf(detail, sizeof detail, " (shared %#zx) for phase parity %d; phase %u has %u of %u arrivals and %ld bytes pending",
                         (size_t)((uint8_t*)bar - b.smem), int(f->wait.detail & 1), m.phase, m.count - m.pending, m.count, (long)m.tx);
            } else if (f->wait.detail) snprintf(detail, sizeof detail, " [%#lx]", (long)f->wait.detail);
            snprintf(line, sizeof line, "\n  threads %d-%d wait at %s%s, %s:%d", i, j - 1, f->wait.op, detail, f->wait.at.file, f->wait.at.line);
        }
        text += line;
        i = j;
    }
    return text;
}

[[noreturn]] void deadlock(Block& b) {
    std::string text;
    for (Block* member : b.cluster) {
        if (b.cluster.size() > 1) text += "\n  rank " + std::to_string(member->rank) + ":";
        text += who_waits(*member);
    }
    lead(b).error = std::string("kernel ") + b.launch->kernel->name + ": deadlock in block " + std::to_string(me()->bid.x) + "," +
                    std::to_string(me()->bid.y) + "," + std::to_string(me()->bid.z) + text;
    switch_to(me(), &lead(b).main);
    abort();
}

Fiber* pick(Block& b) {
    const bool random = b.launch->order == Order::Random;
    if (!random && !b.ready.empty()) {  // as below, without looking at the others
        Fiber* f = b.ready.back();
        b.ready.pop_back();
        return f;
    }
    for (;;) {
        // A block of a cluster runs as far as it can without the others, or, in random order, takes turns with them.
        size_t copies = 0, live = 0, able = 0;
        Block* next = b.ready.empty() ? nullptr : &b;
        for (Block* member : b.cluster) {
            copies += member->bulk.size(), live += member->live;
            if (member->ready.empty()) continue;
            able++;
            if (!next || (random && next_random(b) % able == 0)) next = member;
        }
        // Async copies land as late as they legally can (or, in random order, at some point before that).
        if (copies && (!next || (random && next_random(b) % 8 == 0))) {
            size_t i = random ? next_random(b) % copies : 0;
            auto from = b.cluster.begin();
            while (i >= (*from)->bulk.size()) i -= (*from++)->bulk.size();
            Bulk bulk = std::move((*from)->bulk[i]);
            (*from)->bulk.erase((*from)->bulk.begin() + i);
            deliver(bulk);
            continue;
        }
        if (!next) {
            if (live) deadlock(b);
            return &lead(b).main;
        }
        if (random) std::swap(next->ready[next_random(b) % next->ready.size()], next->ready.back());
        Fiber* f = next->ready.back();
        next->ready.pop_back();
        return f;
    }
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
    const void* old;
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &old, &size);
    if (!home) home = old, home_size = size;  // a worker's first fiber is entered from the worker
#endif
    Fiber* f = me();
    f->block->launch->kernel->run(f->block->launch->params);
    if (!f->open.empty() || !f->groups.empty()) fault({}, "exits with cp.async copies that it never waited for");
    if (f->block->live == 1 && !f->block->bulk.empty())
        fault(f->block->bulk[0].at, "the last thread exits while bulk copies into the block's shared memory are in flight");
    f->done = true;
    f->block->live--;
    switch_to(f, pick(*f->block));
    abort();
}

void push_all(Block& b, std::vector<Fiber*>& list) {  // so that the first of the list runs first (last when reversed)
    if (b.launch->order == Order::Reverse) b.ready.insert(b.ready.end(), list.begin(), list.end());
    else b.ready.insert(b.ready.end(), list.rbegin(), list.rend());
    list.clear();
}
}  // namespace

void resume(Fiber* f) { f->block->ready.push_back(f); }

namespace {
[[noreturn]] void no_memory(const char* call, size_t bytes) {
    throw std::runtime_error("no memory for the SIMT layer: " + std::string(call) + " of " + std::to_string(bytes) + " bytes: " + strerror(errno));
}
void protect(void* p, size_t bytes, int protection) {
    if (mprotect(p, bytes, protection)) no_memory("mprotect", bytes);
}
}  // namespace

void* map_memory(size_t bytes, bool usable) {
    void* p = mmap(nullptr, bytes, usable ? PROT_READ | PROT_WRITE : PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) no_memory("mmap", bytes);
    return p;
}

void suspend(const char* op, Loc at, uint64_t detail) {
    Fiber* f = me();
    f->wait = {op, at, detail};
    Fiber* next = pick(*f->block);
    if (next != f) switch_to(f, next);
}

void fault(Loc at, const char* format, ...) {
    char text[4096], where[600] = "", place[300] = "";
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    Fiber* f = me();
    if (!f) {
        fprintf(stderr, "simt: %s\n", text);
        abort();
    }
    Block& b = *f->block;
    if (at.file) snprintf(place, sizeof place, " at %s:%d", at.file, at.line);
    if (f != &lead(b).main)
        snprintf(where, sizeof where, ", block (%u,%u,%u), thread (%u,%u,%u) [warp %u lane %u]%s", f->bid.x, f->bid.y, f->bid.z, f->tid.x,
                 f->tid.y, f->tid.z, f->warp, f->lane, place);
    lead(b).error = std::string("kernel ") + b.launch->kernel->name + where + ": " + text;
    switch_to(f, &lead(b).main);  // the cluster is abandoned: its fibers are never resumed
    abort();
}

// ---- barriers and collectives -----------------------------------------------------------------------------------
namespace {
Barrier& arrive(int id, int threads, Loc at) {
    Block& b = block();
    int n = threads ? threads : b.threads;
    if (id < 0 || id > 15 || (threads && (threads % 32 || threads > b.threads))) fault(at, "barrier %d over %d threads is not valid", id, threads);
    Barrier& r = b.barriers[id];
    if (!r.arrived) r.expected = n, r.at = at;
    // Stricter than the hardware, which only counts: one barrier, one place in the source.
    if (id == 0 && (r.at.line != at.line || strcmp(r.at.file, at.file)))
        fault(at, "divergent barrier: other threads wait at the __syncthreads of %s:%d", r.at.file, r.at.line);
    if (r.expected != n) fault(at, "barrier %d is used with %d and with %d threads", id, r.expected, n);
    r.arrived++;
    check::release(r.clock);
    if (r.arrived == r.expected) {
        for (Fiber* f : r.waiting) check::acquire(f, r.clock);
        r.arrived = 0;
        push_all(b, r.waiting);
    }
    return r;
}
}  // namespace

// ".aligned": all threads of a warp execute the same instruction.
static void meet_warp(const char* op, Loc at) {
    warp_collective(op, ~0u, &at, [](void* const* args, unsigned mask) {
        const Loc* first = nullptr;
        for (int l = 0; l < 32; l++) {
            if (!(mask >> l & 1)) continue;
            const Loc* here = static_cast<const Loc*>(args[l]);
            if (!first) first = here;
            if (here->line != first->line || strcmp(here->file, first->file))
                fault(*here, "divergent warp: other lanes are at the barrier of %s:%d", first->file, first->line);
        }
    }, at);
}

void barrier_arrive(int id, int threads, Loc at) {
    if (id) meet_warp("barrier.arrive.aligned", at);
    arrive(id, threads, at);
}

void barrier_sync(int id, int threads, Loc at) {
    if (id) meet_warp("barrier.sync.aligned", at);
    Barrier& r = arrive(id, threads, at);
    if (r.arrived) {
        r.waiting.push_back(me());
        suspend(id ? "barrier.sync" : "__syncthreads", at, id);
    } else check::acquire(me(), r.clock);
}

unsigned cluster_rank() { return block().rank; }

void grid_wait() { me()->grid_waited = true; }

void cluster_sync(Loc at) {
    Block& b = block();
    meet_warp("barrier.cluster.aligned", at);
    Barrier& r = lead(b).cluster_barrier;
    r.arrived++;
    check::release(r.clock);
    if (r.arrived < int(b.cluster.size()) * b.threads) {
        r.waiting.push_back(me());
        return suspend("barrier.cluster", at);
    }
    r.arrived = 0;
    lead(b).meetings++;
    for (Fiber* f : r.waiting) {
        check::acquire(f, r.clock);
        resume(f);
    }
    r.waiting.clear();
    check::acquire(me(), r.clock);
}

Block& neighbour(unsigned rank, const char* op, Loc at) {
    Block& b = block();
    if (rank >= b.cluster.size()) fault(at, "%s: rank %u in a cluster of %zu blocks", op, rank, b.cluster.size());
    Block& target = *b.cluster[rank];
    if (&target != &b && !lead(b).meetings) fault(at, "%s: no barrier.cluster before it, so the block of rank %u may not have begun", op, rank);
    if (!target.live) fault(at, "%s: the block of rank %u has exited", op, rank);
    return target;
}

static void release_others(Block& b, unsigned first, unsigned mask, Fiber* except) {
    const bool reverse = b.launch->order == Order::Reverse;
    for (int i = 0; i < 32; i++) {
        const int l = reverse ? i : 31 - i;
        if ((mask >> l & 1) && b.fibers[first + l] != except) b.ready.push_back(b.fibers[first + l]);
    }
}

void warp_collective(const char* op, unsigned mask, void* arg, Act act, Loc at) {
    Fiber* f = me();
    Block& b = *f->block;
    unsigned first = f->warp * 32, lanes = b.threads - first >= 32 ? ~0u : (1u << (b.threads - first)) - 1;
    if (!(mask >> f->lane & 1)) fault(at, "%s: the mask %08x lacks the calling lane", op, mask);
    mask &= lanes;
    Rendezvous* r = nullptr;  // one per mask; nearly always the only one
    for (Rendezvous& c : b.warps[f->warp])
        if (c.mask == mask) {
            r = &c;
            break;
        }
    if (!r) {
        r = &b.warps[f->warp].emplace_back();
        r->mask = mask;
    }
    if (!r->arrived) r->op = op, r->at = at;
    else if (r->op != op && strcmp(r->op, op))
        fault(at, "divergent warp: calls %s while other lanes wait at %s, %s:%d", op, r->op, r->at.file, r->at.line);
    r->args[f->lane] = arg;
    r->arrived |= 1u << f->lane;
    if (r->arrived != mask) return suspend(op, at, mask);
    r->arrived = 0;
    act(r->args, mask);
    release_others(b, first, mask, f);
}

void warpgroup_collective(const char* op, void* arg, Act act, Loc at) {
    Fiber* f = me();
    Block& b = *f->block;
    unsigned first = f->linear / 128 * 128;
    if (first + 128 > (unsigned)b.threads) fault(at, "%s: the warpgroup has fewer than 128 threads", op);
    Rendezvous& r = b.groups[f->linear / 128].meet;
    if (!r.arrived) r.op = op, r.at = at;
    else if (strcmp(r.op, op) || r.at.line != at.line)
        fault(at, "divergent warpgroup: calls %s while other threads wait at %s, %s:%d", op, r.op, r.at.file, r.at.line);
    r.args[f->linear - first] = arg;
    if (++r.arrived < 128) return suspend(op, at);
    r.arrived = 0;
    act(r.args, ~0u);
    for (int w = 3; w >= 0; w--) release_others(b, first + w * 32, ~0u, f);
}

void warp_fence(unsigned mask, Loc at) {
    // __syncwarp orders memory among its lanes; the other warp collectives do not.
    warp_collective("__syncwarp", mask, nullptr, [](void* const*, unsigned mask) {
        if (!check::on) return;
        Fiber** warp = &block().fibers[me()->warp * 32];
        Clock all;
        for (int l = 0; l < 32; l++)
            if (mask >> l & 1) check::join(all, warp[l]->clock);
        for (int l = 0; l < 32; l++)
            if (mask >> l & 1) warp[l]->clock = all, warp[l]->clock[warp[l]->slot]++;
    }, at);
}

void shfl_act(void* const* args, unsigned mask) {
    for (int l = 0; l < 32; l++)
        if (mask >> l & 1) {
            Shfl* s = static_cast<Shfl*>(args[l]);
            if (!(mask >> s->src & 1)) fault({}, "shfl: lane %d reads lane %u, which is not in the mask %08x", l, s->src, mask);
            s->out = static_cast<Shfl*>(args[s->src])->in;
        }
}

void shfl4_act(void* const* args, unsigned mask) {
    for (int l = 0; l < 32; l++)
        if (mask >> l & 1) {
            Shfl4* s = static_cast<Shfl4*>(args[l]);
            for (int i = 0; i < 4; i++) {
                if (unsigned(s->src[i]) > 31 || !(mask >> s->src[i] & 1)) fault({}, "shfl: lane %d reads lane %d, which is not in the mask %08x", l, s->src[i], mask);
                s->out[i] = static_cast<Shfl4*>(args[s->src[i]])->in[i];
            }
        }
}

unsigned vote(const char* op, unsigned mask, bool predicate, Loc at) {
    unsigned v = predicate;
    warp_collective(op, mask, &v, [](void* const* args, unsigned mask) {
        unsigned ballot = 0;
        for (int l = 0; l < 32; l++)
            if (mask >> l & 1) ballot |= *static_cast<unsigned*>(args[l]) << l;
        for (int l = 0; l < 32; l++)
            if (mask >> l & 1) *static_cast<unsigned*>(args[l]) = ballot;
    }, at);
    return v;
}

// ---- shared memory ------------------------------------------------------------------------------------------------
void* smem_base() { return block().smem + kSmemOffset; }

uint32_t smem_u32(const void* p, Loc at) {
    ptrdiff_t a = static_cast<const uint8_t*>(p) - block().smem;
    if (a < kSmemOffset || a > ptrdiff_t(kSmemOffset + block().launch->smem)) fault(at, "not an address in shared memory: %p", p);
    return a;
}

uint8_t* smem_at(uint32_t addr, unsigned bytes, Loc at) {
    if (addr < kSmemOffset || addr + bytes > kSmemOffset + block().launch->smem)
        fault(at, "shared memory out of bounds: %u bytes at offset %d of %u", bytes, int(addr - kSmemOffset), block().launch->smem);
    if (addr % bytes) fault(at, "misaligned shared address %#x for %u bytes", addr, bytes);
    return block().smem + addr;
}

// ---- atomics (global memory may be shared with other workers) ---------------------------------------------------
template <class T> T atomic_add(T* p, T v, Loc at) {
    if (check::on) check::access(p, sizeof(T), check::Atomic, check::site(at));
    T old, sum;
    __atomic_load(p, &old, __ATOMIC_RELAXED);
    do sum = old + v;
    while (!__atomic_compare_exchange(p, &old, &sum, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return old;
}
template float atomic_add(float*, float, Loc);
template int atomic_add(int*, int, Loc);
template unsigned atomic_add(unsigned*, unsigned, Loc);

// ---- device memory ---------------------------------------------------------------------------------------------------
// One reserved range, never reused: each allocation ends (up to 16-byte alignment) at an inaccessible page and
// begins after one, so an overrun or a use after free faults at once.
namespace {
constexpr size_t kArena = size_t(1) << 40;
uint8_t* arena = nullptr;
size_t arena_used = 0;
std::map<const uint8_t*, Allocation> allocations;
}  // namespace

bool in_device_arena(const void* p) { return p >= arena && p < arena + arena_used; }

const Allocation* find_allocation(const void* p) {  // launches do not change the table
    static thread_local const Allocation* last;
    static thread_local uint32_t epoch;
    auto inside = [&](const Allocation& a) { return p >= a.base && p < a.base + std::max<size_t>(a.size, 1); };
    if (last && epoch == block_serial && inside(*last)) return last;
    std::lock_guard<std::mutex> hold(lock);
    auto it = allocations.upper_bound(static_cast<const uint8_t*>(p));
    if (it == allocations.begin() || !inside((--it)->second)) return nullptr;
    epoch = block_serial;
    return last = &it->second;
}

std::string describe_global(const void* address) {  // an address that is in no allocation
    const auto* p = static_cast<const uint8_t*>(address);
    char text[200];
    snprintf(text, sizeof text, "global memory not allocated, or freed, at %p", address);
    for (const auto& [base, a] : allocations)
        if (p >= base - kPage && p < base + a.size + kPage)
            snprintf(text, sizeof text, "global memory out of bounds: offset %ld of an allocation of %zu bytes", long(p - base), a.size);
    const uint8_t* below = nullptr;
    for (const auto& [base, a] : allocations)
        if (base <= p) below = base;
    if (below && !strncmp(text, "global memory not", 17)) {
        const size_t used = strlen(text);
        snprintf(text + used, sizeof text - used, " (%ld bytes behind the start of the allocation below it, of %zu bytes)", long(p - below), allocations[below].size);
    }
    return text;
}

void check_global(const void* p, size_t n, const char* op, Loc at) {
    const Allocation* a = find_allocation(p);
    if (!a) fault(at, "%s: %s", op, describe_global(p).c_str());
    if (static_cast<const uint8_t*>(p) + n > a->base + a->size)
        fault(at, "%s: global memory out of bounds: %zu bytes at offset %ld of an allocation of %zu", op, n, long(static_cast<const uint8_t*>(p) - a->base), a->size);
}

// ---- launch ----------------------------------------------------------------------------------------------------------
Kernel::Kernel(const char* f, const char* n, void (*r)(void**), int c, const uint32_t* s) : file(f), name(n), run(r), count(c), sizes(s), next(kernels) { kernels = this; }

namespace {
struct sigaction old_segv;

void on_segv(int signal, siginfo_t* info, void* context) {
    const auto* p = static_cast<const uint8_t*>(info->si_addr);
    if (!self || !me()->block || block().cluster.empty() || self == &lead(block()).main) {  // not ours
        // Perhaps another library's of this layer: its handler must stay in place.
        if (old_segv.sa_flags & SA_SIGINFO) return old_segv.sa_sigaction(signal, info, context);
        sigaction(SIGSEGV, &old_segv, nullptr);
        return;
    }
    Fiber* f = me();
    Block& b = *f->block;
    if (p >= f->stack && p < f->stack + kPage) fault({}, "stack overflow");
    if (p >= b.smem && p < b.smem + (1 << 20)) fault({}, "shared memory out of bounds at offset %ld", long(p - b.smem) - kSmemOffset);
    if (in_device_arena(p)) fault({}, "%s", describe_global(p).c_str());
    fault({}, "invalid address %p", p);
}

std::unique_ptr<Block> take_worker(std::vector<std::unique_ptr<Block>>& pool) {
    std::lock_guard<std::mutex> hold(lock);
    if (pool.empty()) {
        auto b = std::make_unique<Block>();
        size_t window = kSmemOffset + ((kSmemMax + kPage - 1) & ~(kPage - 1)) + 2 * kPage;
        b->smem = static_cast<uint8_t*>(map_memory(1 << 20, false));
        protect(b->smem, window - kPage, PROT_READ | PROT_WRITE);
        b->main.block = b.get();
        b->cluster = {b.get()};
        return b;
    }
    auto b = std::move(pool.back());
    pool.pop_back();
    return b;
}

void prepare(Block& b, const Launch& launch) {
    b.launch = &launch;
    b.threads = launch.block.x * launch.block.y * launch.block.z;
    while (b.fibers.size() < (size_t)b.threads) {
        auto f = std::make_unique<Fiber>();
        f->block = &b;
        f->linear = b.fibers.size();
        f->warp = f->linear / 32, f->lane = f->linear % 32;
        f->stack = static_cast<uint8_t*>(map_memory(kStack, true));
        protect(f->stack, kPage, PROT_NONE);
        b.fibers.push_back(f.release());
    }
    for (int i = 0; i < b.threads; i++) {
        Fiber& f = *b.fibers[i];
        f.slot = b.rank * b.threads + i;
        f.tid = {i % launch.block.x, i / launch.block.x % launch.block.y, i / (launch.block.x * launch.block.y)};
        f.bdim = launch.block, f.gdim = launch.grid;
    }
}

void begin_block(Block& b, unsigned index, uint32_t serial) {
    const Launch& l = *b.launch;
    b.serial = serial;
    b.cluster_barrier = Barrier{}, b.meetings = 0;
    b.rng = (l.seed * 0x9e3779b97f4a7c15ull) ^ (index + 1) * 0xbf58476d1ce4e5b9ull;
    b.live = b.threads;
    b.ready.clear(), b.bulk.clear(), b.mbarriers.clear();
    for (auto& w : b.warps) w.clear();
    for (auto& r : b.barriers) r = Barrier{};
    b.groups.assign((b.threads + 127) / 128, WarpGroup{});
    memset(b.smem + kSmemOffset, kPoison, (l.smem + 15) & ~15u);
    std::vector<Fiber*> start;
    for (int i = 0; i < b.threads; i++) {
        Fiber* f = b.fibers[i];
        f->bid = {index % l.grid.x, index / l.grid.x % l.grid.y, index / (l.grid.x * l.grid.y)};
        f->done = f->grid_waited = false;
        f->open.clear(), f->groups.clear();
        // Tops of stacks are staggered so that a warp's hot frames do not all fall into the same cache sets.
        f->sp = first_frame(f->stack + kStack - f->lane * 320 - 64, fiber_main);
        start.push_back(f);
    }
    if (check::on) check::block_begin(b);
    push_all(b, start);
}

void run_cluster(Block& first, unsigned index) {  // index: of the first block
    const uint32_t serial = block_serial++;
    for (Block* b : first.cluster) begin_block(*b, index + b->rank, serial);
    Thread* outer = self;
    Block& start = first.launch->order == Order::Reverse ? *first.cluster.back() : first;
    switch_to(&first.main, pick(start));
    self = outer;
}
}  // namespace
}  // namespace simt

// ---- C interface, the shape of the CUDA driver API ----------------------------------------------------------------------
using namespace simt;
namespace {
bool is_of(const Kernel& k, const char* module) {  // a module's name is the stem of its file's
    if (!module) return true;
    const char* slash = strrchr(k.file, '/');
    const char* stem = slash ? slash + 1 : k.file;
    const size_t length = strlen(module);
    return !strncmp(stem, module, length) && !strcmp(stem + length, ".cu");
}
}  // namespace
extern "C" {

const void* simt_get_function(const char* module, const char* name) {
    for (Kernel* k = kernels; k; k = k->next)
        if (!strcmp(k->name, name) && is_of(*k, module)) return k;
    return nullptr;
}
int simt_has_module(const char* module) {
    for (Kernel* k = kernels; k; k = k->next)
        if (is_of(*k, module)) return 1;
    return 0;
}
const char* simt_kernel_name(int i) {
    for (Kernel* k = kernels; k; k = k->next)
        if (i-- == 0) return k->name;
    return nullptr;
}
int simt_param_count(const void* f) { return static_cast<const Kernel*>(f)->count; }
uint32_t simt_param_size(const void* f, int i) { return static_cast<const Kernel*>(f)->sizes[i]; }
const char* simt_last_error() { return last_error.c_str(); }
uint64_t simt_last_bank_conflicts() { return last_conflicts; }

uint64_t simt_alloc(size_t size) {
    std::lock_guard<std::mutex> hold(lock);
    try {
        if (!arena) arena = static_cast<uint8_t*>(map_memory(kArena, false)), arena_used = kPage;
        size_t room = (size + kPage - 1) & ~(kPage - 1);
        if (room > kArena - kPage - arena_used) throw std::runtime_error("no memory for the SIMT layer: " + std::to_string(size) + " bytes do not fit its arena");
        uint8_t* page = arena + arena_used;
        void* shadow = check::on ? check::shadow_alloc(size) : nullptr;
        protect(page, room, PROT_READ | PROT_WRITE);
        arena_used += room + kPage;
        uint8_t* base = page + room - ((size + 15) & ~size_t(15));
        memset(page, kPoison, room);
        allocations[base] = {base, size, shadow};
        return reinterpret_cast<uint64_t>(base);
    } catch (const std::exception& error) {
        last_error = error.what();
        return 0;
    }
}
int simt_free(uint64_t p) {
    std::lock_guard<std::mutex> hold(lock);
    auto it = allocations.find(reinterpret_cast<uint8_t*>(p));
    if (it == allocations.end()) return 1;
    uint8_t* page = reinterpret_cast<uint8_t*>(p & ~(kPage - 1));
    size_t room = (it->second.size + (p & (kPage - 1)) + kPage - 1) & ~(kPage - 1);
    allocations.erase(it);
    if (madvise(page, room, MADV_DONTNEED) || mprotect(page, room, PROT_NONE))
        return last_error = "freed device memory stays accessible: " + std::string(strerror(errno)), 1;
    block_serial++;  // forget cached look-ups
    return 0;
}
static bool inside_allocation(uint64_t address, size_t n, const char* op) {  // host addresses are not ours to judge
    const void* p = reinterpret_cast<void*>(address);
    if (!n || !in_device_arena(p)) return true;
    const Allocation* a = find_allocation(p);
    if (a && static_cast<const uint8_t*>(p) + n <= a->base + a->size) return true;
    last_error = std::string(op) + ": " + std::to_string(n) + " bytes leave their allocation, or it was freed";
    return false;
}
int simt_memcpy(uint64_t dst, uint64_t src, size_t n) {  // host or device addresses alike
    if (!inside_allocation(dst, n, "copy to the device") || !inside_allocation(src, n, "copy from the device")) return 1;
    if (check::on && n)
        if (const Allocation* a = find_allocation(reinterpret_cast<void*>(dst))) check::host_write(*a, reinterpret_cast<void*>(dst), n);
    memmove(reinterpret_cast<void*>(dst), reinterpret_cast<void*>(src), n);
    simt_drain();
    return 0;
}
int simt_memset(uint64_t dst, int value, size_t n) {
    if (!inside_allocation(dst, n, "fill")) return 1;
    if (check::on && n)
        if (const Allocation* a = find_allocation(reinterpret_cast<void*>(dst))) check::host_write(*a, reinterpret_cast<void*>(dst), n);
    memset(reinterpret_cast<void*>(dst), value, n);
    simt_drain();
    return 0;
}
void simt_drain() { chain_serial = block_serial.load(); }

int simt_launch(const void* f, const uint32_t* geometry, uint32_t smem, void** params, const simt_schedule* schedule) {
    const uint32_t gx = geometry[0], gy = geometry[1], gz = geometry[2], bx = geometry[3], by = geometry[4], bz = geometry[5];
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction sa = {};
        sa.sa_sigaction = on_segv;
        sa.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        sigaction(SIGSEGV, &sa, &old_segv);
    });
    static std::vector<std::unique_ptr<Block>> pool;
    const uint32_t size = geometry[6];
    Launch launch{static_cast<const Kernel*>(f), {gx, gy, gz}, {bx, by, bz}, size, smem, params, block_serial,
                  std::min<uint32_t>(chain_serial, block_serial), Order(schedule->order), schedule->seed | 1};
    const uint64_t blocks = uint64_t(gx) * gy * gz, threads = uint64_t(bx) * by * bz;
    last_error.clear();
    if (!size || size > 8 || geometry[7] * geometry[8] != 1 || gx % size)
        return last_error = std::string("kernel ") + launch.kernel->name + ": clusters of 1 to 8 blocks along x are emulated, in a grid of whole clusters", 1;
    if (!blocks || gx > 0x7fffffff || gy > 65535 || gz > 65535 || !threads || threads > 1024 || bz > 64 || smem > kSmemMax)
        return last_error = std::string("kernel ") + launch.kernel->name + ": invalid grid, block or shared memory size", 1;
    const uint64_t clusters = blocks / size;
    std::atomic<uint32_t> next{0};
    std::atomic<bool> failed{false};
    uint64_t conflicts = 0;
    auto work = [&]() -> std::string {
        static thread_local std::vector<uint8_t> alt(64 << 10);  // handlers must run even when a fiber's stack is full
        stack_t ss{alt.data(), 0, alt.size()}, old;
        sigaltstack(&ss, &old);  // the caller's own may be too small for a report
        std::vector<std::unique_ptr<Block>> members;
        std::vector<Block*> cluster;
        std::string error;
        try {
            for (uint32_t i = 0; i < size; i++) members.push_back(take_worker(pool)), cluster.push_back(members.back().get());
            for (uint32_t i = 0; i < size; i++) {
                Block& b = *members[i];
                b.cluster = cluster, b.rank = i;
                prepare(b, launch);
                b.error.clear();
                b.bank_conflicts = 0;
            }
            Block& first = *members[0];
            for (uint32_t i; !failed && (i = next++) < clusters;) {
                run_cluster(first, size * (launch.order == Order::Reverse ? clusters - 1 - i : i));
                error = first.error;
                if (!error.empty()) failed = true;
            }
        } catch (const std::exception& what) {
            error = what.what();
            failed = true;
        }
        sigaltstack(&old, nullptr);
        std::lock_guard<std::mutex> hold(lock);
        for (auto& b : members) {  // one that lacks memory for all its threads asks for it again
            conflicts += b->bank_conflicts;
            b->cluster = {b.get()};
            pool.push_back(std::move(b));
        }
        return error;
    };
    unsigned workers = check::on ? 1 : std::min<uint64_t>(std::max(schedule->workers, 1u), clusters);
    std::vector<std::string> errors(workers);
    std::vector<std::thread> threads_;
    for (unsigned i = 1; i < workers; i++) threads_.emplace_back([&, i] { errors[i] = work(); });
    errors[0] = work();
    for (auto& t : threads_) t.join();
    last_conflicts = conflicts;
    for (auto& e : errors)
        if (!e.empty()) return last_error = e, 1;
    return 0;
}
}
