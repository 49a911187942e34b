// targets: sm_75
// Arithmetic of samplers on latents: guidance with the step that follows it, linear combinations, masks.
//
// Latents are f32 in the host's order [samples][channels][pixels], so that noise and results need no transpose; only the
// model's output, which is NHWC in T, is read across. A latent is 64 KB at 512x512 and 1 MB for a batch of four at
// 1024x1024: time is launches, so one kernel does all between two calls of the model.
#include "element.cuh"

constexpr int kThreads = 256, kOperands = 5, kTerms = 8;

struct GuideArgs {
    const void* cond;       // model output [samples][pixels][pitch]
    const void* uncond;     // the same for the negative side, or null
    const float* x;         // what the model saw, before its input scaling
    const float* mask;      // [mask_samples][pixels], or null
    const float* original;  // what unmasked places are denoised to; null without mask
    const float* operand[kOperands];
    float* denoised;         // may be null
    float* uncond_denoised;  // may be null
    float* next;             // may be null
    int64_t pixels, count;   // of a plane; of the latent
    int32_t channels, pitch, mask_samples, operands;
    float skip, scale, cfg;  // a side's denoised = skip * x + scale * output
    float of_x, of_denoised, of_uncond, of_operand[kOperands];
    int32_t unused;
};

// denoised = u + cfg (c - u), masked; next = of_x x + of_denoised denoised + of_uncond u + sum of_operand operand.
// grid: any number of blocks
template <class T> PTX void guide(const GuideArgs& args) {
    const int64_t stride = int64_t(gridDim.x) * kThreads;
    for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < args.count; i += stride) {
        const int64_t plane = i / args.pixels, p = i - plane * args.pixels;
        const int32_t n = int32_t(plane / args.channels), c = int32_t(plane - int64_t(n) * args.channels);
        const int64_t at = (n * args.pixels + p) * args.pitch + c;
        const float x = args.x[i];
        float d = args.skip * x + args.scale * to_float(static_cast<const T*>(args.cond)[at]), u = d;
        if (args.uncond) {
            u = args.skip * x + args.scale * to_float(static_cast<const T*>(args.uncond)[at]);
            d = u + args.cfg * (d - u);
        }
        if (args.mask) {
            const float m = args.mask[n % args.mask_samples * args.pixels + p];
            d = d * m + args.original[i] * (1.0f - m);
        }
        if (args.next) {
            float sum = args.of_x * x;
            sum += args.of_denoised * d;
            if (args.of_uncond != 0.0f) sum += args.of_uncond * u;
#pragma unroll
            for (int k = 0; k < kOperands; k++)
                if (k < args.operands) sum += args.of_operand[k] * args.operand[k][i];
            args.next[i] = sum;
        }
        if (args.denoised) args.denoised[i] = d;
        if (args.uncond_denoised) args.uncond_denoised[i] = u;
    }
}

#define GUIDE(T, name)                                                                                                 \
    extern "C" __global__ __launch_bounds__(kThreads) void name(const __grid_constant__ GuideArgs args) { begin_kernel(); guide<T>(args); } \
    SIMT_KERNEL(name)
GUIDE(__half, guide_f16)
GUIDE(__nv_bfloat16, guide_bf16)
GUIDE(float, guide_f32)

struct LincombArgs {
    const float* x[kTerms];
    float factor[kTerms];
    float* out;
    int64_t count;
    int32_t terms;
    int32_t is_vector;  // all begin at multiples of 16 bytes
};

// out = sum of factor[k] * x[k], in this order; out may be one of the x. grid: any number of blocks
extern "C" __global__ __launch_bounds__(kThreads) void lincomb(const __grid_constant__ LincombArgs args) {
    begin_kernel();
    const int64_t stride = int64_t(gridDim.x) * kThreads * 4;
    for (int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * 4; i < args.count; i += stride) {
        if (args.is_vector && i + 4 <= args.count) {
            float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
            for (int k = 0; k < kTerms; k++) {
                if (k >= args.terms) break;
                const float4 v = *reinterpret_cast<const float4*>(args.x[k] + i);
                const float f = args.factor[k];
                sum.x += f * v.x, sum.y += f * v.y, sum.z += f * v.z, sum.w += f * v.w;
            }
            *reinterpret_cast<float4*>(args.out + i) = sum;
        } else {
            for (int64_t j = i; j < min(i + 4, args.count); j++) {
                float sum = 0.0f;
#pragma unroll
                for (int k = 0; k < kTerms; k++) {
                    if (k >= args.terms) break;
                    sum += args.factor[k] * args.x[k][j];
                }
                args.out[j] = sum;
            }
        }
    }
}
SIMT_KERNEL(lincomb)

struct BlendArgs {
    const float* x;
    const float* other;
    const float* mask;  // [mask_samples][mask_channels][pixels]
    float* out;
    int64_t pixels, count;
    int32_t channels, mask_samples, mask_channels;
    int32_t unused;
};

// out = x * mask + other * (1 - mask); samples and channels of the mask repeat. grid: any number of blocks
extern "C" __global__ __launch_bounds__(kThreads) void blend(const __grid_constant__ BlendArgs args) {
    begin_kernel();
    const int64_t stride = int64_t(gridDim.x) * kThreads;
    for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < args.count; i += stride) {
        const int64_t plane = i / args.pixels, p = i - plane * args.pixels;
        const int32_t n = int32_t(plane / args.channels), c = int32_t(plane - int64_t(n) * args.channels);
        const float m = args.mask[(int64_t(n % args.mask_samples) * args.mask_channels + c % args.mask_channels) * args.pixels + p];
        args.out[i] = args.x[i] * m + args.other[i] * (1.0f - m);
    }
}
SIMT_KERNEL(blend)
