// targets: sm_75
// Elements moved and not changed: columns of rows, windows of maps, doubled maps, tokens in another order. A unit is 16 bytes where widths,
// pitches and addresses are multiples of that, else 4 or 2; extents count units.
#include "vector.cuh"

constexpr int kThreads = 256;

struct ConcatArgs {
    const void* a;  // rows of width_a, every pitch_a
    const void* b;  // rows of width_b; not read if that is 0
    void* out;      // rows of width_a + width_b
    uint64_t rows, pitch_a, pitch_b, pitch_out;
    uint32_t width_a, width_b;
};

// out row = row of a, then row of b. grid: any number of blocks
template <class U> PTX void concat(const ConcatArgs& args) {
    const uint32_t width = args.width_a + args.width_b;
    const uint64_t count = args.rows * width, stride = uint64_t(gridDim.x) * kThreads;
    for (uint64_t i = uint64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += stride) {
        uint64_t row;
        uint32_t c;
        split(i, width, row, c);
        const U* from = c < args.width_a ? static_cast<const U*>(args.a) + row * args.pitch_a + c
                                         : static_cast<const U*>(args.b) + row * args.pitch_b + (c - args.width_a);
        static_cast<U*>(args.out)[row * args.pitch_out + c] = *from;
    }
}

struct WindowArgs {
    const void* x;   // [samples][in_h][in_w][width]
    void* out;       // [samples][out_h][out_w][width]
    uint64_t count;  // units of the result
    int32_t in_h, in_w, out_h, out_w;
    int32_t top, left;  // rows and columns of zeros before the first of x; negative: cut off
    uint32_t width;
    int32_t unused;
};

// out(y, x) = in(y - top, x - left), zero outside. grid: any number of blocks
template <class U> PTX void window(const WindowArgs& args) {
    const uint64_t stride = uint64_t(gridDim.x) * kThreads;
    for (uint64_t i = uint64_t(blockIdx.x) * kThreads + threadIdx.x; i < args.count; i += stride) {
        uint64_t pixel, row, n;
        uint32_t c, x, y;
        split(i, args.width, pixel, c);
        split(pixel, args.out_w, row, x);
        split(row, args.out_h, n, y);
        const int from_y = int(y) - args.top, from_x = int(x) - args.left;
        U v = {};
        if (from_y >= 0 && from_y < args.in_h && from_x >= 0 && from_x < args.in_w)
            v = static_cast<const U*>(args.x)[((n * args.in_h + from_y) * args.in_w + from_x) * args.width + c];
        static_cast<U*>(args.out)[i] = v;
    }
}

struct Upsample2xArgs {
    const void* x;   // [rows][w][width], rows = samples * height
    void* out;       // [2 rows][2 w][width]
    uint64_t count;  // units of x
    uint32_t w, width;
};

// Every pixel four times. grid: any number of blocks; a thread reads once and writes four times
template <class U> PTX void upsample2x(const Upsample2xArgs& args) {
    const uint64_t stride = uint64_t(gridDim.x) * kThreads, line = uint64_t(2) * args.w * args.width;
    for (uint64_t i = uint64_t(blockIdx.x) * kThreads + threadIdx.x; i < args.count; i += stride) {
        uint64_t pixel, row;
        uint32_t c, x;
        split(i, args.width, pixel, c);
        split(pixel, args.w, row, x);
        const U v = static_cast<const U*>(args.x)[i];
        U* out = static_cast<U*>(args.out) + 2 * row * line + 2 * uint64_t(x) * args.width + c;
        out[0] = v, out[args.width] = v;
        out[line] = v, out[line + args.width] = v;
    }
}

struct SwapArgs {
    const void* x;   // tokens [blocks][rows][columns][run] of width, every pitch
    void* out;       // tokens [blocks][columns][rows][run]
    uint64_t count;  // units of the result
    uint64_t pitch;
    uint32_t rows, columns, run, width;
};

// Rows and columns of blocks of tokens change places. grid: any number of blocks
template <class U> PTX void swap(const SwapArgs& args) {
    const uint64_t stride = uint64_t(gridDim.x) * kThreads;
    for (uint64_t i = uint64_t(blockIdx.x) * kThreads + threadIdx.x; i < args.count; i += stride) {
        uint64_t token, line, rest, block;
        uint32_t c, place, row, column;
        split(i, args.width, token, c);
        split(token, args.run, line, place);
        split(line, args.rows, rest, row);
        split(rest, args.columns, block, column);
        const uint64_t from = ((block * args.rows + row) * args.columns + column) * args.run + place;
        static_cast<U*>(args.out)[i] = static_cast<const U*>(args.x)[from * args.pitch + c];
    }
}

#define MOVE(op, Args, U, bytes)                                                                                      \
    extern "C" __global__ __launch_bounds__(kThreads) void op##_b##bytes(const __grid_constant__ Args args) { begin_kernel(); op<U>(args); } \
    SIMT_KERNEL(op##_b##bytes)
#define MOVE_ALL(op, Args) MOVE(op, Args, uint4, 16) MOVE(op, Args, uint32_t, 4) MOVE(op, Args, uint16_t, 2)
MOVE_ALL(concat, ConcatArgs)
MOVE_ALL(window, WindowArgs)
MOVE_ALL(upsample2x, Upsample2xArgs)
MOVE_ALL(swap, SwapArgs)
