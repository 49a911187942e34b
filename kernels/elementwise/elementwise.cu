// targets: sm_75
// Elementwise operations on flat arrays; T is half, bfloat16 or float, arithmetic is float.
//
// A thread takes eight neighbouring elements. `count` need not be a multiple of eight.
#include "element.cuh"
#include "activation.cuh"

struct AxpbyArgs {
    const void* x;
    const void* y;
    void* out;
    uint64_t count;
    float a, b;
};

// out = a*x + b*y. grid: ceil(count / (8 * threads)) blocks.
template <class T> __device__ __forceinline__ void axpby(const AxpbyArgs& args) {
    const uint64_t first = (uint64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
    if (first >= args.count) return;
    const T* x = static_cast<const T*>(args.x) + first;
    const T* y = static_cast<const T*>(args.y) + first;
    T* out = static_cast<T*>(args.out) + first;
    if (first + 8 <= args.count) {
        float u[8], v[8];
        load8(u, x);
        load8(v, y);
        for (int i = 0; i < 8; i++) u[i] = args.a * u[i] + args.b * v[i];
        store8(out, u);
    } else {
        for (uint64_t i = 0; i < args.count - first; i++) out[i] = from_float<T>(args.a * to_float(x[i]) + args.b * to_float(y[i]));
    }
}

#define AXPBY(T, name)                                                                        \
    extern "C" __global__ void name(const __grid_constant__ AxpbyArgs args) { begin_kernel(); axpby<T>(args); } \
    SIMT_KERNEL(name)
AXPBY(__half, axpby_f16)
AXPBY(__nv_bfloat16, axpby_bf16)
AXPBY(float, axpby_f32)

// Functions that no epilogue has, numbered behind those that epilogues have; `launch::elementwise::Function` on the host.
enum Curve : int32_t {
    kCurveLeakyRelu = 6,
    kCurveElu = 7,
    kCurveHardSwish = 8,
    kCurveTanh = 9,
    kCurveSigmoid = 10,
    kCurveSoftsign = 11,
    kCurveMish = 12,
};

PTX float apply(float x, int32_t function) {
    switch (function) {
        case kCurveLeakyRelu: return x > 0.0f ? x : 0.01f * x;
        case kCurveElu: return x > 0.0f ? x : expm1f(x);
        case kCurveHardSwish: return x * fminf(fmaxf(x + 3.0f, 0.0f), 6.0f) / 6.0f;
        case kCurveTanh: return tanhf(x);
        case kCurveSigmoid: return 1.0f / (1.0f + expf(-x));
        case kCurveSoftsign: return x / (1.0f + fabsf(x));
        case kCurveMish: return x * tanhf(log1pf(expf(x)));
        default: return apply_activation(x, function);
    }
}

struct ActivateArgs {
    const void* x;
    void* out;
    uint64_t count;
    int32_t function;
    int32_t unused;
};

// out = function(x). grid as above.
template <class T> __device__ __forceinline__ void activate(const ActivateArgs& args) {
    const uint64_t first = (uint64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
    if (first >= args.count) return;
    const T* x = static_cast<const T*>(args.x) + first;
    T* out = static_cast<T*>(args.out) + first;
    if (first + 8 <= args.count) {
        float u[8];
        load8(u, x);
        for (int i = 0; i < 8; i++) u[i] = apply(u[i], args.function);
        store8(out, u);
    } else {
        for (uint64_t i = 0; i < args.count - first; i++) out[i] = from_float<T>(apply(to_float(x[i]), args.function));
    }
}

#define ACTIVATE(T, name)                                                                           \
    extern "C" __global__ void name(const __grid_constant__ ActivateArgs args) { begin_kernel(); activate<T>(args); } \
    SIMT_KERNEL(name)
ACTIVATE(__half, activate_f16)
ACTIVATE(__nv_bfloat16, activate_bf16)
ACTIVATE(float, activate_f32)
