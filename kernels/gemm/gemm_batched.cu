// targets: sm_75
// Many products of one shape: out[b] = epilogue(x[b] * W[b]^T), every operand from its own address, which is the first one's
// plus b strides. For products of activations with activations, such as every token of a picture with some of them; linear
// layers, whose W is the same for all samples, are one product with more rows (gemm_sm80.cu).
//
// The main loops are those of gemm_sm80.cu and gemm_f32.cu; blockIdx.z is b. K is not split: a batch has blocks enough.
#include "gemm_tile.cuh"
#include "gemm_tile_f32.cuh"

struct BatchedArgs {
    GemmArgs first;  // of batch 0
    int64_t x_stride, w_stride, out_stride;  // elements; those of out are floats if it is
};

namespace batched {

// The product of this block.
template <class T> PTX GemmArgs of_block(const BatchedArgs& args) {
    GemmArgs one = args.first;
    const int64_t b = blockIdx.z;
    one.x = static_cast<const T*>(one.x) + b * args.x_stride;
    one.w = static_cast<const T*>(one.w) + b * args.w_stride;
    if (one.epilogue.flags & kEpilogueFloat) one.epilogue.out = static_cast<float*>(one.epilogue.out) + b * args.out_stride;
    else one.epilogue.out = static_cast<T*>(one.epilogue.out) + b * args.out_stride;
    return one;
}

}  // namespace batched

// grid: (tiles_m * tiles_n, 1, batch)
#define GEMM(name, T, M, N, K, WM, WN, BLOCKS)                                                                  \
    extern "C" __global__ __launch_bounds__(128, BLOCKS) void name(const __grid_constant__ BatchedArgs args) {  \
        begin_kernel();                                                                                         \
        using S = tile::Shape<T, M, N, K, WM, WN, tile::kRing>;                                                 \
        gemm::run<S>(batched::of_block<T>(args), gemm::Rows<S>{});                                              \
    }                                                                                                           \
    SIMT_KERNEL(name)
#define GEMM_ANY(name, T)                                                                                       \
    extern "C" __global__ __launch_bounds__(128, 2) void name(const __grid_constant__ BatchedArgs args) {       \
        begin_kernel();                                                                                         \
        using S = tile::Shape<T, 64, 64, 64, 32, 32, tile::kRing>;                                              \
        const GemmArgs one = batched::of_block<T>(args);                                                        \
        gemm::run<S>(one, gemm::AnyRows<S>{one, 0, 0});                                                         \
    }                                                                                                           \
    SIMT_KERNEL(name)
#define GEMM_F32(name, ANY)                                                                                     \
    extern "C" __global__ __launch_bounds__(128) void name(const __grid_constant__ BatchedArgs args) {          \
        begin_kernel();                                                                                         \
        gemm_f32::run<tile_f32::Shape<64, 64, 4>, ANY>(batched::of_block<float>(args));                         \
    }                                                                                                           \
    SIMT_KERNEL(name)

GEMM(gemm_batched_128x128_f16, __half, 128, 128, 32, 64, 64, 2)
GEMM(gemm_batched_64x64_f16, __half, 64, 64, 64, 32, 32, 3)
GEMM_ANY(gemm_batched_any_f16, __half)
GEMM(gemm_batched_128x128_bf16, __nv_bfloat16, 128, 128, 32, 64, 64, 2)
GEMM(gemm_batched_64x64_bf16, __nv_bfloat16, 64, 64, 64, 32, 32, 3)
GEMM_ANY(gemm_batched_any_bf16, __nv_bfloat16)
GEMM_F32(gemm_batched_64x64_f32, false)
GEMM_F32(gemm_batched_any_f32, true)
