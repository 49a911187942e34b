// targets: sm_90a
// Convolution on Hopper: product[output pixel][cout] = sum over taps and channels of x[pixel + tap][channel] * w[cout][tap][channel],
// NHWC, x and x2 side by side in the channels; then the epilogue of epilogue.cuh. Main loop and reasons: hopper_tile.cuh.
//
// The rows of a tile of the left operand are 128 pixels under one tap, 64 channels of them, and the copy engine finds them:
// - tiled mode: the pixels are a box of width x height x images, moved by the tap; what lies outside the image reads as zero;
// - im2col mode: any 128 consecutive output pixels, for strides and for sizes that no box divides.
// Doubling (nearest-neighbour upsampling before the convolution): output pixel (2y + p, 2x + q) under tap (r, s) reads input
// pixel (y + floor((p + r - 1) / 2), x + floor((q + s - 1) / 2)), so a tile of output pixels that share p and q is a box of
// neighbouring input pixels as well, and nothing is ever enlarged in memory.
#include "hopper_tile.cuh"

struct ConvSm90Args {
    EpilogueArgs epilogue;
    HopperTiles tiles;
    int32_t images, height, width;  // the lattice of pixels that tiles are cut from: output pixels, with doubling input pixels
    int32_t c1, c1_steps, tap_steps;  // channels of x, steps of them, steps of x and x2 together
    int32_t cp;                       // channels in w
    int32_t kernel_w, stride, pad_top, pad_left;
    int32_t corner_x, corner_y;  // im2col: the bounding box begins so many pixels outside the image
    int32_t im2col;              // 0: boxes
    int32_t box_w, box_h;      // boxes: log2 of the pixels along width and height; the rest of 128 are images
    int32_t boxes_w, boxes_h;  // in a row and a column of an image
    int32_t doubling;
    int32_t unused;
};

namespace {
struct Origin {  // of a tile on the lattice
    int x, y, image, phase_x, phase_y;
    int first;  // im2col: number of its first pixel
};

PTX Origin origin_of(const ConvSm90Args& a, int tile) {
    Origin o{};
    if (a.doubling) o.phase_x = tile & 1, o.phase_y = tile >> 1 & 1, tile >>= 2;
    if (a.im2col) {
        o.first = tile * hopper::kM;
        const int line = o.first / a.width;
        o.x = o.first - line * a.width, o.y = line % a.height, o.image = line / a.height;
    } else {
        const int line = tile / a.boxes_w;
        o.x = (tile - line * a.boxes_w) << a.box_w, o.y = line % a.boxes_h << a.box_h, o.image = line / a.boxes_h << (7 - a.box_w - a.box_h);
    }
    return o;
}

// Row of the product that row r of the tile holds, or -1.
PTX int row_of(const ConvSm90Args& a, const Origin& o, int r) {
    int x, y, image;
    if (a.im2col) {
        const int pixel = o.first + r;
        if (pixel >= a.images * a.height * a.width) return -1;
        if (!a.doubling) return pixel;
        const int line = pixel / a.width;
        x = pixel - line * a.width, y = line % a.height, image = line / a.height;
    } else {
        x = o.x + (r & ((1 << a.box_w) - 1)), y = o.y + (r >> a.box_w & ((1 << a.box_h) - 1)), image = o.image + (r >> (a.box_w + a.box_h));
        if (x >= a.width || y >= a.height || image >= a.images) return -1;
    }
    if (!a.doubling) return (image * a.height + y) * a.width + x;
    return (image * 2 * a.height + 2 * y + o.phase_y) * 2 * a.width + 2 * x + o.phase_x;
}

template <class T, int N> struct LoadConv {
    const ConvSm90Args& args;
    const TensorMap *x, *x2, *w;
    Origin origin{};
    int column = 0;

    PTX void begin(const hopper::Unit& unit) { origin = origin_of(args, unit.tile_m), column = unit.tile_n * N; }
    struct Step {
        int r, s, c;  // tap, channel of x or x2
        bool second;
    };
    PTX Step step_of(int step) const {
        const int tap = step / args.tap_steps, part = step - tap * args.tap_steps, r = tap / args.kernel_w;
        const bool second = part >= args.c1_steps;
        return {r, tap - r * args.kernel_w, (second ? part - args.c1_steps : part) * hopper::kK, second};
    }
    PTX void a(int step, T* a, uint64_t* bar) const {
        const Step at = step_of(step);
        const TensorMap* map = at.second ? x2 : x;
        int dx = at.s - args.pad_left, dy = at.r - args.pad_top;
        if (args.doubling) dx = (dx + origin.phase_x) >> 1, dy = (dy + origin.phase_y) >> 1;
        if (args.im2col)
            tma_load_im2col_4d(a, map, {at.c, origin.x * args.stride - args.corner_x, origin.y * args.stride - args.corner_y, origin.image},
                               dx + args.corner_x, dy + args.corner_y, bar);
        else tma_load_4d(a, map, at.c, origin.x + dx, origin.y + dy, origin.image, bar);
    }
    // Behind the last channel of x the copy brings zeros, so what this brings of w there does not matter.
    PTX void b(int step, T* b, uint64_t* bar) const {
        const Step at = step_of(step);
        const int tap = at.r * args.kernel_w + at.s;
        hopper::load_b<T, N>(args.tiles, w, tap * args.cp + (at.second ? args.c1 + at.c : at.c), column, b, bar);
    }
};

template <class T, int N, hopper::Finish F> PTX void conv(const ConvSm90Args& args, const TensorMap* x, const TensorMap* x2, const TensorMap* w) {
    if (threadIdx.x == 0) tma_prefetch_map(x), tma_prefetch_map(w);
    LoadConv<T, N> load{args, x, x2, w};
    hopper::run<T, N, F>(args.epilogue, args.tiles, load, [&args](const hopper::Unit& unit) {
        const Origin origin = origin_of(args, unit.tile_m);
        return [&args, origin](int r) { return row_of(args, origin, r); };
    });
}
}  // namespace

// maps: x and x2 as C, W, H, N in boxes of 64 channels x 128 pixels, tiled or im2col; w as [cout][taps * cp] in boxes of 64 x N / pair
#define CONV_SM90(T, N, F, name)                                                                                                  \
    extern "C" __global__ __launch_bounds__(hopper::kThreads, 1) void name(                                                       \
        const __grid_constant__ ConvSm90Args args, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap x2,     \
        const __grid_constant__ TensorMap w) {                                                                                    \
        conv<T, N, hopper::Finish::F>(args, &x, &x2, &w);                                                                         \
    }                                                                                                                             \
    SIMT_KERNEL(name)
HOPPER_KERNELS(CONV_SM90, conv_sm90, kTime, time)
