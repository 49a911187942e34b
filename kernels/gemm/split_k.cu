// targets: sm_75
// The second half of a product whose K was split over blocks: adds the splits' float sums in their order, so that the same
// operands give the same bits in every run, and does the epilogue. A thread makes eight columns of out.
//
// Memory-bound: reads splits * rows * columns floats that are still in L2; four splits are under way at a time.
#include "epilogue.cuh"

struct SplitKArgs {
    EpilogueArgs epilogue;
    int32_t splits, unused;
};

PTX void add_splits(float (&v)[8], const float* from, int splits, int64_t split) {
    for (int i = 0; i < 8; i++) v[i] = 0.0f;
#pragma unroll 4
    for (int s = 0; s < splits; s++) {
        float u[8];
        load8(u, from + s * split);
        for (int i = 0; i < 8; i++) v[i] += u[i];
    }
}

// grid: ceil(rows * ceil(columns of out / 8) / threads) blocks.
template <class T> __device__ __forceinline__ void split_k(const SplitKArgs& args) {
    const EpilogueArgs& e = args.epilogue;
    const bool is_geglu = e.flags & kEpilogueGeglu;
    const int chunks = (epilogue::out_columns(e) + 7) / 8, pitch = epilogue::partial_pitch(e);
    const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, split = int64_t(e.rows) * pitch;
    const int row = index / chunks, column = index % chunks * 8, from = is_geglu ? 2 * column : column;
    if (row >= e.rows) return;
    const float* sums = e.partial + int64_t(row) * pitch + from;
    float v[8], bias[8];
    add_splits(v, sums, args.splits, split);
    epilogue::load_bias(bias, e, from);
    if (is_geglu) {
        float gate[8], gate_bias[8];
        add_splits(gate, sums + 8, args.splits, split);
        epilogue::load_bias(gate_bias, e, from + 8);
        epilogue::finish8_geglu<T>(e, row, column, v, gate, bias, gate_bias, nullptr);
    } else epilogue::finish8<T>(e, row, column, v, bias, nullptr);
}

#define SPLIT_K(T, name)                                                                                                      \
    extern "C" __global__ __launch_bounds__(128) void name(const __grid_constant__ SplitKArgs args) { begin_kernel(); split_k<T>(args); } \
    SIMT_KERNEL(name)
SPLIT_K(__half, split_k_f16)
SPLIT_K(__nv_bfloat16, split_k_bf16)
SPLIT_K(float, split_k_f32)
