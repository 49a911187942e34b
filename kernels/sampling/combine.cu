// targets: sm_75
// Predictions combined by what they have in common: sums with factors that follow from sums and dot products.
//
// `gram_chunks` takes the sums and the dot products of up to three latents, or `cosine_chunks` the cosines of two over
// channels; `combine_by_rule` adds the chunks up, works a sample's factors out and applies them: two launches, and no
// number leaves the device. All of this is in f64 and in a fixed order: noise is a small difference of predictions, and
// every run gives the same bits. A latent is read twice, the second time from the L2 cache. `limit_norms` needs no sums
// but those over the channels of a place.
#include "ptx.cuh"

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kInputs = 4, kMeasured = 3;
constexpr int kSums = 9;  // sums of the three, then the dot products 00 01 02 11 12 22

struct CombineArgs {
    const float* x[kInputs];  // [groups][count]
    float* out;
    double* partial;       // [groups][chunks][kSums]
    int64_t count, chunk;  // elements of a group (places for `cosine_chunks` and `limit_norms`), of a block
    int64_t pixels;        // of a plane
    int32_t chunks, inputs, measured, channels, rule, unused;
    double p[3];  // what the rule is given
};

enum Rule { kRescale, kRenorm, kFitUncond, kDampTangents, kProject, kPerpendicular, kAgree };

PTX double over_warp(double v) {
    for (int offset = 16; offset; offset /= 2) v += __shfl_down_sync(~0u, v, offset);
    return v;
}

struct ChunkSmem {
    double part[kWarps][kSums];
};

// Adds `n` sums over the block and writes them where the chunk's are; the others become 0.
template <int n> PTX void put_chunk(const CombineArgs& args, const double (&sum)[n]) {
    auto& s = dynamic_smem<ChunkSmem>();
#pragma unroll
    for (int k = 0; k < n; k++) {
        const double v = over_warp(sum[k]);
        if (threadIdx.x % 32 == 0) s.part[threadIdx.x / 32][k] = v;
    }
    __syncthreads();
    if (threadIdx.x < kSums) {
        double v = 0.0;
        if (threadIdx.x < n)
            for (int i = 0; i < kWarps; i++) v += s.part[i][threadIdx.x];
        args.partial[(int64_t(blockIdx.y) * args.chunks + blockIdx.x) * kSums + threadIdx.x] = v;
    }
}

// grid (chunks, groups)
extern "C" __global__ __launch_bounds__(kThreads) void gram_chunks(const __grid_constant__ CombineArgs args) {
    begin_kernel();
    const int64_t row = blockIdx.y * args.count, first = blockIdx.x * args.chunk, end = min(first + args.chunk, args.count);
    double sum[kSums] = {};
    for (int64_t i = first + threadIdx.x; i < end; i += kThreads) {
        const double a = args.x[0][row + i], b = args.measured > 1 ? args.x[1][row + i] : 0.0f, c = args.measured > 2 ? args.x[2][row + i] : 0.0f;
        sum[0] += a, sum[1] += b, sum[2] += c;
        sum[3] += a * a, sum[4] += a * b, sum[5] += a * c;
        sum[6] += b * b, sum[7] += b * c, sum[8] += c * c;
    }
    put_chunk(args, sum);
}
SIMT_KERNEL(gram_chunks)

PTX float signed_root(float v) { return copysignf(sqrtf(fabsf(v)), v); }

// Cosines over channels of root(scale uncond) and root((scale cond + guided) / 2), with roots that keep the sign: their
// sum over places. x: cond, uncond, guided. grid: chunks
extern "C" __global__ __launch_bounds__(kThreads) void cosine_chunks(const __grid_constant__ CombineArgs args) {
    begin_kernel();
    const int64_t first = blockIdx.x * args.chunk, end = min(first + args.chunk, args.count);
    const float scale = float(args.p[0]);
    double sum[1] = {};
    for (int64_t i = first + threadIdx.x; i < end; i += kThreads) {
        const int64_t n = i / args.pixels, at = n * args.channels * args.pixels + (i - n * args.pixels);
        double both = 0.0, uu = 0.0, mm = 0.0;
        for (int c = 0; c < args.channels; c++) {
            const int64_t j = at + c * args.pixels;
            const double u = signed_root(args.x[1][j] * scale), m = signed_root((args.x[0][j] * scale + args.x[2][j]) * 0.5f);
            both += u * m, uu += u * u, mm += m * m;
        }
        sum[0] += both / fmax(sqrt(uu * mm), 1e-8);
    }
    put_chunk(args, sum);
}
SIMT_KERNEL(cosine_chunks)

struct Mix {  // a combination of the measured latents
    double a, b, c;
};
struct CombineSmem {
    double sum[kSums];
    float factor[kInputs];
};
PTX double total(const CombineSmem& s, const Mix& v) { return v.a * s.sum[0] + v.b * s.sum[1] + v.c * s.sum[2]; }
PTX double dot(const CombineSmem& s, const Mix& v, const Mix& w) {
    const double* g = s.sum + 3;
    return v.a * w.a * g[0] + v.b * w.b * g[3] + v.c * w.c * g[5] + (v.a * w.b + v.b * w.a) * g[1] + (v.a * w.c + v.c * w.a) * g[2] +
           (v.b * w.c + v.c * w.b) * g[4];
}
PTX double variance(const CombineSmem& s, const Mix& v, double n) {
    const double sum = total(s, v);
    return (dot(s, v, v) - sum * sum / n) / (n - 1.0);
}
PTX void put_factors(CombineSmem& s, double a, double b, double c, double d = 0.0) {
    s.factor[0] = float(a), s.factor[1] = float(b), s.factor[2] = float(c), s.factor[3] = float(d);
}

// One thread of a block. What each rule means stands with its launcher's descriptor (`Rule` in src/tensor/latents.rs).
PTX void work_factors_out(CombineSmem& s, const CombineArgs& args) {
    const Mix pos = {1.0, -1.0, 0.0}, neg = {1.0, 0.0, -1.0};  // noises of [x, cond, uncond]
    const double p = args.p[0], q = args.p[1], r = args.p[2];
    switch (args.rule) {
        case kRescale: {
            const Mix cond = {1.0 / p, -1.0, 0.0}, guided = {1.0 / p, -q, q - 1.0};
            const double n = double(args.count), factor = r * sqrt(variance(s, cond, n) / variance(s, guided, n)) + (1.0 - r);
            put_factors(s, (1.0 - factor) / p, factor * q, factor * (1.0 - q));
            break;
        }
        case kRenorm: {
            const Mix guided = {p, 1.0 - p, 0.0};
            const double norm = sqrt(dot(s, guided, guided)), most = sqrt(s.sum[3]) * q;
            const double factor = q > 0.0 && norm >= most ? most / norm : 1.0;
            put_factors(s, factor * p, factor * (1.0 - p), 0.0);
            break;
        }
        case kFitUncond: {
            const double alpha = dot(s, pos, neg) / (dot(s, neg, neg) + 1e-8);
            put_factors(s, 0.0, 0.0, (alpha - 1.0) + p * (1.0 - alpha), 1.0);
            break;
        }
        case kDampTangents: {
            // The first eigenvector (a, b) of the two noises' dot products, by half the angle whose tangent is 2pn / (pp - nn).
            const double pp = dot(s, pos, pos), pn = dot(s, pos, neg), nn = dot(s, neg, neg);
            const double width = sqrt((pp - nn) * (pp - nn) + 4.0 * pn * pn), cosine = width > 0.0 ? (pp - nn) / width : 1.0;
            double a, b;
            if (cosine > 0.0) {
                a = sqrt(0.5 * (1.0 + cosine)), b = width > 0.0 ? pn / (width * a) : 0.0;
            } else {
                b = copysign(sqrt(0.5 * (1.0 - cosine)), pn), a = pn / (width * b);
            }
            const double squared = a * a * pp + 2.0 * a * b * pn + b * b * nn;
            const double share = squared > 0.0 ? (a * pn + b * nn) / squared : 0.0;
            a *= share, b *= share;
            put_factors(s, 1.0 - a - b, a, b);
            break;
        }
        case kProject: {
            const double norm = sqrt(s.sum[3]), length = fmax(sqrt(s.sum[6]), 1e-12);
            const double limit = q > 0.0 ? fmin(q / norm, 1.0) : 1.0;
            const double along = limit * s.sum[4] / (length * length) * (p - 1.0);
            put_factors(s, limit, along + 1.0 / r, 1.0 - 1.0 / r);
            break;
        }
        case kPerpendicular: {
            const Mix towards = {1.0, 0.0, -1.0}, away = {0.0, 1.0, -1.0};
            const double along = dot(s, away, towards) / dot(s, towards, towards);
            const double positive = p * (1.0 + along * q), negative = p * q;
            put_factors(s, positive, -negative, 1.0 - positive + negative);
            break;
        }
        case kAgree: {
            const double places = double(args.count) / args.channels, share = 2.0 * (s.sum[0] / places + 1.0);
            put_factors(s, (4.0 - share) * 0.25 * p, 0.0, share * 0.25);
            break;
        }
    }
}

// out = sum of factor[k] * x[k]. grid (any, groups)
extern "C" __global__ __launch_bounds__(kThreads) void combine_by_rule(const __grid_constant__ CombineArgs args) {
    begin_kernel();
    auto& s = dynamic_smem<CombineSmem>();
    const int lane = threadIdx.x % 32;
    for (int k = threadIdx.x / 32; k < kSums; k += kWarps) {
        double v = 0.0;
        for (int i = lane; i < args.chunks; i += 32) v += args.partial[(int64_t(blockIdx.y) * args.chunks + i) * kSums + k];
        v = over_warp(v);
        if (lane == 0) s.sum[k] = v;
    }
    __syncthreads();
    if (threadIdx.x == 0) work_factors_out(s, args);
    __syncthreads();
    const int64_t row = blockIdx.y * args.count, stride = int64_t(gridDim.x) * kThreads;
    for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < args.count; i += stride) {
        float sum = 0.0f;
#pragma unroll
        for (int k = 0; k < kInputs; k++)
            if (k < args.inputs) sum += s.factor[k] * args.x[k][row + i];
        args.out[row + i] = sum;
    }
}
SIMT_KERNEL(combine_by_rule)

// x[1] with its norm over channels limited to that of x[0], times p[0]. grid: any number of blocks
extern "C" __global__ __launch_bounds__(kThreads) void limit_norms(const __grid_constant__ CombineArgs args) {
    begin_kernel();
    const int64_t stride = int64_t(gridDim.x) * kThreads;
    for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < args.count; i += stride) {
        const int64_t n = i / args.pixels, at = n * args.channels * args.pixels + (i - n * args.pixels);
        double most = 0.0, norm = 0.0;
        for (int c = 0; c < args.channels; c++) {
            const double a = args.x[0][at + c * args.pixels], b = args.x[1][at + c * args.pixels];
            most += a * a, norm += b * b;
        }
        const double share = sqrt(most) / (sqrt(norm) + 1e-8);
        const float factor = float((share < 1.0 ? share : 1.0) * args.p[0]);
        for (int c = 0; c < args.channels; c++) args.out[at + c * args.pixels] = args.x[1][at + c * args.pixels] * factor;
    }
}
SIMT_KERNEL(limit_norms)
