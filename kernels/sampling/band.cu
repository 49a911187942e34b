// targets: sm_75
// Frequencies of planes scaled, those of a square around zero by one factor and all others by another, as FreSca does
// (Huang et al., 2025).
//
// The square's side is even and its negative half has one frequency more, so the band is complex: along a side of n the
// frequencies -c .. c - 1 are the circular convolution with (1/n) sum e^(i f t), t = 2 pi d / n, which is
// sin(c t) / n * (cot(t / 2) - i), and 2 c / n at distance 0. `band_rows` convolves the rows into real and imaginary
// parts, `band_columns` the columns, keeps the real part and mixes it with x. Every block makes its side's table first.
// Latents are small: side^3 multiply-adds a plane, and the planes stay in the L2 cache.
#include "ptx.cuh"

constexpr int kThreads = 256, kTile = 32;  // columns of a block of `band_columns`

struct BandArgs {
    const float* x;  // [planes][h][w]
    float* out;
    float2* rows;  // [planes][h][w]
    int32_t h, w;
    int32_t cutoff_rows, cutoff_columns;  // half sides of the square along h and w
    float high, change;                   // factor of the other frequencies, and low - high
};

PTX void make_table(float2* table, int n, int cutoff) {
    for (int d = threadIdx.x; d < n; d += kThreads) {
        const double s = sinpi(2.0 * double(int64_t(cutoff) * d % n) / n) / n, half = double(d) / n;
        table[d].x = float(d == 0 ? 2.0 * cutoff / n : s * cospi(half) / sinpi(half));
        table[d].y = float(-s);
    }
    __syncthreads();
}

// grid: rows of all planes
extern "C" __global__ __launch_bounds__(kThreads) void band_rows(const __grid_constant__ BandArgs args) {
    begin_kernel();
    float2* table = dynamic_smem<float2[1]>();
    make_table(table, args.w, args.cutoff_columns);
    const float* row = args.x + int64_t(blockIdx.x) * args.w;
    for (int i = threadIdx.x; i < args.w; i += kThreads) {
        float2 sum = make_float2(0.0f, 0.0f);
        for (int k = 0, d = i; k < args.w; k++, d = d == 0 ? args.w - 1 : d - 1) {
            const float v = row[k];
            sum.x += table[d].x * v, sum.y += table[d].y * v;
        }
        args.rows[int64_t(blockIdx.x) * args.w + i] = sum;
    }
}
SIMT_KERNEL(band_rows)

// grid (ceil(w / kTile), planes): a warp a row
extern "C" __global__ __launch_bounds__(kThreads) void band_columns(const __grid_constant__ BandArgs args) {
    begin_kernel();
    float2* table = dynamic_smem<float2[1]>();
    make_table(table, args.h, args.cutoff_rows);
    const int column = blockIdx.x * kTile + threadIdx.x % kTile;
    if (column >= args.w) return;
    const int64_t first = int64_t(blockIdx.y) * args.h * args.w + column;
    for (int y = threadIdx.x / kTile; y < args.h; y += kThreads / kTile) {
        float band = 0.0f;
        for (int k = 0, d = y; k < args.h; k++, d = d == 0 ? args.h - 1 : d - 1) {
            const float2 v = args.rows[first + int64_t(k) * args.w];
            band += table[d].x * v.x - table[d].y * v.y;
        }
        const int64_t at = first + int64_t(y) * args.w;
        args.out[at] = args.high * args.x[at] + args.change * band;
    }
}
SIMT_KERNEL(band_columns)
