// targets: sm_75
// Linear layers in float: out[M,N] = epilogue((x | x2) * W^T), every operand and sum a float (tile_f32.cuh).
//
// The arguments are those of gemm_sm80.cu; a tile of K is 16 columns here. `any` takes what has no 16-byte vectors.
#include "gemm_tile_f32.cuh"

#define GEMM(name, ANY, M, N, ROWS)                                                                                      \
    extern "C" __global__ __launch_bounds__(2 * M) void name(const __grid_constant__ GemmArgs args) {                    \
        begin_kernel();                                                                                                  \
        gemm_f32::run<tile_f32::Shape<M, N, ROWS>, ANY>(args);                                                           \
    }                                                                                                                    \
    SIMT_KERNEL(name)
GEMM(gemm_f32_128x128, false, 128, 128, 8)
GEMM(gemm_f32_64x64, false, 64, 64, 4)
GEMM(gemm_f32_any, true, 64, 64, 4)
