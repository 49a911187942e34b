// targets: sm_90a
// Linear layers on Hopper: product[rows][columns] = (x, then x2, along K) * w^T, and the epilogue of epilogue.cuh.
// Main loop and reasons: hopper_tile.cuh. The launch twin is launch/gemm_sm90.rs.
#include "hopper_tile.cuh"

struct GemmSm90Args {
    EpilogueArgs epilogue;
    HopperTiles tiles;
    int32_t k1;        // columns of x; those of x2 follow
    int32_t k1_steps;  // of kK, the last one may be partly behind x
};

namespace {
template <class T, int N> struct LoadGemm {
    const HopperTiles& tiles;
    const TensorMap *x, *x2, *w;
    int k1, k1_steps, row = 0, column = 0;

    PTX void begin(const hopper::Unit& unit) { row = unit.tile_m * hopper::kM, column = unit.tile_n * N; }
    PTX void a(int step, T* a, uint64_t* bar) const {
        const bool second = step >= k1_steps;
        tma_load_2d(a, second ? x2 : x, (second ? step - k1_steps : step) * hopper::kK, row, bar);
    }
    // Behind the end of x the copy brings zeros, so what this brings of w there does not matter.
    PTX void b(int step, T* b, uint64_t* bar) const {
        const int k = step >= k1_steps ? k1 + (step - k1_steps) * hopper::kK : step * hopper::kK;
        hopper::load_b<T, N>(tiles, w, k, column, b, bar);
    }
};

template <class T, int N, hopper::Finish F> PTX void gemm(const GemmSm90Args& args, const TensorMap* x, const TensorMap* x2, const TensorMap* w) {
    if (threadIdx.x == 0) tma_prefetch_map(x), tma_prefetch_map(w);
    LoadGemm<T, N> load{args.tiles, x, x2, w, args.k1, args.k1_steps};
    const int rows = args.epilogue.rows;
    hopper::run<T, N, F>(args.epilogue, args.tiles, load, [rows](const hopper::Unit& unit) {
        const int first = unit.tile_m * hopper::kM;
        return [first, rows](int r) { return first + r < rows ? first + r : -1; };
    });
}
}  // namespace

// maps: boxes of 64 x 128 of x and x2, 64 x N / pair of w, all with the 128-byte swizzle
#define GEMM_SM90(T, N, F, name)                                                                                                  \
    extern "C" __global__ __launch_bounds__(hopper::kThreads, 1) void name(                                                       \
        const __grid_constant__ GemmSm90Args args, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap x2,     \
        const __grid_constant__ TensorMap w) {                                                                                    \
        gemm<T, N, hopper::Finish::F>(args, &x, &x2, &w);                                                                         \
    }                                                                                                                             \
    SIMT_KERNEL(name)
HOPPER_KERNELS(GEMM_SM90, gemm_sm90, kGeglu, geglu)
