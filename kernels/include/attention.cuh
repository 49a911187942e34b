// attention.cuh: what the attention kernels of sm_80 share: arguments, shared-memory layout, exponentials.
#pragma once
#include "element.cuh"

namespace attention {

// softmax(q k^T * scale) v per sample and head. Rows of q and out: [batch][queries]; of k and v:
// [batch / share][keys], sample i uses keys i / share. Head h takes columns h * dim .. of each. All
// addresses are multiples of 16 bytes, pitches (in elements) and dim multiples of 8.
struct Args {
    const void* q;
    const void* k;
    const void* v;
    void* out;
    float* partial;  // splits > 1: numerators [splits][batch][heads][queries][dim] ...
    float2* stats;   // ... and their offset (log2) and denominator [splits][batch][heads][queries]
    int32_t q_pitch, k_pitch, v_pitch, out_pitch;
    int32_t queries, keys, heads, dim;
    int32_t share, causal;     // causal: query i sees keys 0..i
    int32_t splits, batch;
    int32_t split_keys;        // keys of one split, a multiple of the key tile
    float scale_log2;          // scale * log2(e), positive: exponentials are powers of two
    // Softmax keeps a reference for each row instead of the running maximum and renews it only when a score exceeds it
    // by this much: most tiles then need no exchange between lanes and no scaling of the accumulator. In units of scores
    // before scaling, 8 / scale_log2: p stays below 2^8, far inside half, and the result depends on the reference by
    // rounding alone.
    float slack;
    int32_t unused;
};

// A tile in shared memory is [rows][kChunks] pieces of 16 bytes. The swizzle sends eight rows (aligned) of one column
// to eight different bank groups, which is what ldmatrix wants: with g = gcd(kChunks, 8), rows of the unswizzled tile
// repeat their bank group every 8/g rows, and the piece index is xor-ed with the number of the repetition.
template <int kChunks> constexpr int kGroup = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : kChunks % 2 == 0 ? 2 : 1;
template <int kChunks> PTX int swizzle(int row) { return row / (8 / kGroup<kChunks>) % kGroup<kChunks>; }
template <int kChunks> PTX uint32_t piece(int row, int chunk) {  // byte offset
    return (row * kChunks + (chunk ^ swizzle<kChunks>(row))) * 16;
}
// The piece of column chunk + odd, where the constant `chunk` is even and a lane's `odd` is 0 or 1: keeps the lane's part of
// the offset apart from the constant one, so that few registers hold the addresses of many steps.
template <int kChunks> PTX uint32_t piece(int row, int chunk, int odd) {
    constexpr int g = kGroup<kChunks>;
    const int constant = g == 1 ? chunk : chunk / g * g;
    return (row * kChunks + ((chunk - constant + odd) ^ swizzle<kChunks>(row))) * 16 + constant * 16;
}

// Queues the copy of kRows rows of kChunks pieces from `src`; rows from `left` and columns from `columns` on are zeros.
template <class T, int kRows, int kChunks, int kThreads>
PTX void load_rows(uint32_t tile, const T* src, int pitch, int left, int columns) {
    constexpr int kStep = kThreads / kChunks;  // rows of one round
    const int row0 = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
    if (row0 >= kStep) return;
    if (chunk * 8 >= columns) left = 0;
    src += int64_t(row0) * pitch + chunk * 8;
#pragma unroll
    for (int r = 0; r < kRows; r += kStep) {
        const int row = row0 + r;
        if (kRows % kStep != 0 && row >= kRows) break;
        cp_async_16(tile + piece<kChunks>(row, chunk), src, row < left ? 16 : 0);
        src += int64_t(kStep) * pitch;
    }
}

// The key range of this block: split blockIdx.z % splits.
PTX void key_range(const Args& args, int last_query, int& first, int& end) {
    const int split = blockIdx.z % args.splits;
    first = split * args.split_keys;
    end = min(args.keys, first + args.split_keys);
    if (args.causal) end = min(end, last_query + 1);
}

// Where a row's results of this block go when keys are split.
PTX int64_t partial_row(const Args& args, int row) {
    const int split = blockIdx.z % args.splits, sample = blockIdx.z / args.splits;
    return ((int64_t(split) * args.batch + sample) * args.heads + blockIdx.y) * args.queries + row;
}

}  // namespace attention
