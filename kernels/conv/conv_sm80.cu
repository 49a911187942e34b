// targets: sm_75
// Convolution as an implicit product: out[pixel][cout] = epilogue(sum over (tap, channel) of x[pixel + tap][channel] *
// w[cout][tap][channel]), NHWC, half or bfloat16 operands, float sums (epilogue.cuh).
//
// The product is output pixels x cout over K = kh * kw * cp, cp = channels rounded up to 8; its main loop and tiles are those of
// linear layers (tile.cuh, gemm_sm80.cu). No im2col buffer: a thread copies one 16-byte chunk of channels of a few pixels a tile
// and knows for each of them the input pixel under the present tap, or that there is none; that is worked out anew only when the
// tap changes, from the corner of the pixel's window, which waits in shared memory. Two inputs may stand side by side in the
// channels; the input may be doubled in size by repetition on the way (upsampling). `any` takes channel counts and pitches
// without 16-byte vectors: the first layers of a network.
#include "product.cuh"
#include "tile.cuh"

namespace conv {
using namespace tile;

struct Corner {
    int32_t first;  // index of the image's first pixel
    int32_t y, x;   // of the window's upper left pixel; may lie outside
    int32_t unused;
};

template <class S> struct ConvSmem {
    Smem<S> product;
    Corner corners[S::kM];
};

template <class S> PTX void find_corners(Corner (&corners)[S::kM], const ConvArgs& args, int m0) {
    const int pixels = args.out_height * args.out_width;
    for (int i = threadIdx.x; i < S::kM; i += S::kThreads) {
        const int m = m0 + i, image = m / pixels, y = m % pixels / args.out_width, x = m % args.out_width;
        const bool exists = image < args.batch;
        corners[i].first = exists ? image * args.height * args.width : 0;
        corners[i].y = exists ? y * args.stride - args.pad_top : -(1 << 20);  // no tap of it is inside
        corners[i].x = x * args.stride - args.pad_left;
    }
    __syncthreads();
}

// A thread's chunk of channels, and the pixels of its rows under the present tap.
template <class S, bool kAny> struct Pixels {
    using T = typename S::T;
    const ConvArgs& args;
    const Corner* corners;
    int channel, tap_y, tap_x;
    int pixel[S::kRowsA];  // -1: outside

    PTX void find() {
#pragma unroll
        for (int i = 0; i < S::kRowsA; i++) {
            const Corner corner = corners[int(threadIdx.x) / S::kChunks + i * S::kPass];
            const int y = corner.y + tap_y, x = corner.x + tap_x;
            const bool in = tap_y < args.kernel_h && unsigned(y) < unsigned(args.height << args.doubling) &&
                            unsigned(x) < unsigned(args.width << args.doubling);
            pixel[i] = in ? corner.first + (y >> args.doubling) * args.width + (x >> args.doubling) : -1;
        }
    }
    PTX void init(int k0) {
        const int k = k0 + int(threadIdx.x) % S::kChunks * 8, tap = k / args.cp;
        channel = k % args.cp;
        tap_y = tap / args.kernel_w, tap_x = tap % args.kernel_w;
        find();
    }
    PTX void advance() {
        channel += S::kK;
        if (channel < args.cp) return;
        do {
            channel -= args.cp;
            if (++tap_x == args.kernel_w) tap_x = 0, tap_y++;
        } while (channel >= args.cp);
        find();
    }
    PTX float at(int index, int c) const {
        if (index < 0 || c >= args.c1 + args.c2) return 0.0f;
        return to_float(c < args.c1 ? static_cast<const T*>(args.x)[index * args.pitch + c]
                                    : static_cast<const T*>(args.x2)[index * args.pitch2 + c - args.c1]);
    }
    PTX void load(unsigned char* tile, bool is_needed) {
        const int tid = threadIdx.x, to = place<S>(tid / S::kChunks, tid % S::kChunks);
        if constexpr (kAny) {
            if (!is_needed) return;
            for (int i = 0; i < S::kRowsA; i++) {
                float v[8];
                for (int q = 0; q < 8; q++) v[q] = at(pixel[i], channel + q);
                store8(reinterpret_cast<T*>(tile + to + i * S::kPass * S::kRowBytes), v);
            }
        } else {
            const bool is_second = channel >= args.c1;
            const T* from = is_second ? static_cast<const T*>(args.x2) + (channel - args.c1) : static_cast<const T*>(args.x) + channel;
            const int64_t pitch = is_second ? args.pitch2 : args.pitch;
            const uint32_t first = smem_u32(tile) + to;
#pragma unroll
            for (int i = 0; i < S::kRowsA; i++)
                cp_async_16_line(first + i * S::kPass * S::kRowBytes, from + pixel[i] * pitch, is_needed && pixel[i] >= 0 ? 16 : 0);
        }
    }
};

template <class S, bool kAny> __device__ __forceinline__ void run(const ConvArgs& args) {
    using T = typename S::T;
    auto& smem = dynamic_smem<ConvSmem<S>>();
    const int k = args.kernel_h * args.kernel_w * args.cp;
    const Part part = part_of_block<S>(args.tiles_m, args.tiles_n, (k + S::kK - 1) / S::kK, args.k_tiles_per_split);
    find_corners<S>(smem.corners, args, part.m0);
    Pixels<S, kAny> a{args, smem.corners};
    a.init(part.first_tile * S::kK);
    Weights<S> b;
    b.init(static_cast<const T*>(args.w), args.cout, k, part.n0, part.first_tile * S::kK);
    Sums<S> acc;
    multiply<S>(acc, smem.product, a, b, part.tiles);
    finish<S>(args.epilogue, acc, smem.product, part);
}

}  // namespace conv

#define CONV(name, ANY, T, M, N, K, WM, WN, BLOCKS)                                                           \
    extern "C" __global__ __launch_bounds__(128, BLOCKS) void name(const __grid_constant__ ConvArgs args) {                 \
        begin_kernel();                    \
        using S = tile::Shape<T, M, N, K, WM, WN, tile::kRing>;                                               \
        static_assert(S::kThreads == 128);                                                                    \
        conv::run<S, ANY>(args);                                                                              \
    }                                                                                                         \
    SIMT_KERNEL(name)

CONV(conv_sm80_128x160_f16, false, __half, 128, 160, 32, 64, 80, 2)
CONV(conv_sm80_128x128_f16, false, __half, 128, 128, 32, 64, 64, 2)
CONV(conv_sm80_128x80_f16, false, __half, 128, 80, 32, 32, 80, 3)
CONV(conv_sm80_64x64_f16, false, __half, 64, 64, 64, 32, 32, 3)
CONV(conv_sm80_any_f16, true, __half, 64, 64, 64, 32, 32, 2)
CONV(conv_sm80_128x160_bf16, false, __nv_bfloat16, 128, 160, 32, 64, 80, 2)
CONV(conv_sm80_128x128_bf16, false, __nv_bfloat16, 128, 128, 32, 64, 64, 2)
CONV(conv_sm80_128x80_bf16, false, __nv_bfloat16, 128, 80, 32, 32, 80, 3)
CONV(conv_sm80_64x64_bf16, false, __nv_bfloat16, 64, 64, 64, 32, 32, 3)
CONV(conv_sm80_any_bf16, true, __nv_bfloat16, 64, 64, 64, 32, 32, 2)
