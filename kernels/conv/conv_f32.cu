// targets: sm_75
// Convolution in float as an implicit product (tile_f32.cuh): the arguments and the order of K, (tap, channel), are those of
// conv_sm80.cu; a tile of K is 16 channels here. Eight channels of K belong to one tap, as channels are rounded up to 8.
#include "product.cuh"
#include "tile_f32.cuh"

namespace conv_f32 {

template <bool kAny> struct Pixels {
    const ConvArgs& args;
    PTX void load(float (&v)[8], int m, int k) const {
        const int pixels = args.out_height * args.out_width, image = m / pixels, tap = k / args.cp, channel = k % args.cp;
        const int y = m % pixels / args.out_width * args.stride - args.pad_top + tap / args.kernel_w;
        const int x = m % args.out_width * args.stride - args.pad_left + tap % args.kernel_w;
        const bool in = image < args.batch && tap < args.kernel_h * args.kernel_w && unsigned(y) < unsigned(args.height << args.doubling) &&
                        unsigned(x) < unsigned(args.width << args.doubling);
        const int64_t pixel = (int64_t(image) * args.height + (y >> args.doubling)) * args.width + (x >> args.doubling);
        if (!in) {
            for (int i = 0; i < 8; i++) v[i] = 0.0f;
        } else if constexpr (kAny) {
            for (int i = 0; i < 8; i++) {
                const int c = channel + i;
                v[i] = 0.0f;
                if (c < args.c1) v[i] = static_cast<const float*>(args.x)[pixel * args.pitch + c];
                else if (c < args.c1 + args.c2) v[i] = static_cast<const float*>(args.x2)[pixel * args.pitch2 + c - args.c1];
            }
        } else load8(v, channel < args.c1 ? static_cast<const float*>(args.x) + pixel * args.pitch + channel : static_cast<const float*>(args.x2) + pixel * args.pitch2 + channel - args.c1);
    }
};

template <class S, bool kAny> __device__ __forceinline__ void run(const ConvArgs& args) {
    auto& smem = dynamic_smem<tile_f32::Smem<S>>();
    const int k = args.kernel_h * args.kernel_w * args.cp;
    const auto part = tile_f32::part_of_block<S>(args.tiles_m, k, args.k_tiles_per_split);
    float acc[S::kRows][8];
    tile_f32::multiply<S>(acc, smem, Pixels<kAny>{args}, tile_f32::Weights{static_cast<const float*>(args.w), args.cout, k}, part);
    tile_f32::finish<S>(args.epilogue, acc, part);
}

}  // namespace conv_f32

#define CONV(name, ANY, M, N, ROWS)                                                                                      \
    extern "C" __global__ __launch_bounds__(2 * M) void name(const __grid_constant__ ConvArgs args) {                    \
        begin_kernel();                                                                                                  \
        conv_f32::run<tile_f32::Shape<M, N, ROWS>, ANY>(args);                                                           \
    }                                                                                                                    \
    SIMT_KERNEL(name)
CONV(conv_f32_128x128, false, 128, 128, 8)
CONV(conv_f32_64x64, false, 64, 64, 4)
CONV(conv_f32_any, true, 64, 64, 4)
