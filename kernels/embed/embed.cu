// targets: sm_75
// Token and position embeddings, and sinusoidal embeddings of timesteps. T is half, bfloat16 or float.
#include "vector.cuh"

struct EmbedArgs {
    const void* table;      // [rows][width]
    const void* positions;  // [at least seq][width]
    const int32_t* ids;     // [tokens]; -1-j is row j of `vectors`
    const float* vectors;   // [vector_rows][width]
    void* out;              // [tokens][width]
    int32_t tokens, seq, width, rows, vector_rows;
    int32_t unused;
};

// out[t] = table[ids[t]] + positions[t % seq]. An id outside its table gives NaN: memory is safe and nobody overlooks it.
// grid: any number of blocks; a thread takes V neighbouring elements
template <class S, class T, int V> PTX void embed(const EmbedArgs& args) {
    const uint32_t vectors = args.width / V;
    const uint64_t count = uint64_t(args.tokens) * vectors, stride = uint64_t(gridDim.x) * blockDim.x;
    for (uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
        const uint32_t token = uint32_t(i / vectors), c = uint32_t(i % vectors) * V;
        const int32_t id = args.ids[token];
        float v[V], position[V];
        if (id >= 0 ? id < args.rows : -1 - id < args.vector_rows) {
            if (id >= 0)
                load_vec(v, static_cast<const S*>(args.table) + size_t(id) * args.width + c);
            else
                load_vec(v, args.vectors + size_t(-1 - id) * args.width + c);
            load_vec(position, static_cast<const S*>(args.positions) + size_t(token % args.seq) * args.width + c);
#pragma unroll
            for (int j = 0; j < V; j++) v[j] += position[j];
        } else {
#pragma unroll
            for (int j = 0; j < V; j++) v[j] = nanf("");
        }
        store_vec(static_cast<T*>(args.out) + size_t(token) * args.width + c, v);
    }
}

#define EMBED(S, T, name)                                                                                             \
    extern "C" __global__ __launch_bounds__(256) void name(const __grid_constant__ EmbedArgs args) { begin_kernel(); embed<S, T, 8>(args); } \
    SIMT_KERNEL(name)                                                                                                    \
    extern "C" __global__ __launch_bounds__(256) void name##_scalar(const __grid_constant__ EmbedArgs args) { begin_kernel(); embed<S, T, 1>(args); } \
    SIMT_KERNEL(name##_scalar)
EMBED(__half, __half, embed_f16_f16)
EMBED(__nv_bfloat16, __nv_bfloat16, embed_bf16_bf16)
EMBED(float, __half, embed_f32_f16)
EMBED(float, __nv_bfloat16, embed_f32_bf16)
EMBED(float, float, embed_f32_f32)

struct TimestepArgs {
    const float* timesteps;  // [count], or null: all are `timestep`
    void* out;               // [count][dim]: cosines, sines, and a zero if dim is odd
    int32_t count, dim;
    float timestep;
    int32_t unused;
};

// Sine and cosine of |x| < 2^20, good to an ulp or two. Multiples of pi/2 are taken off in two exact steps (Cody and
// Waite, "Software Manual for the Elementary Functions", 1980): sinf itself would bring a path in local memory for
// huge angles.
PTX void sin_cos(float x, float& sine, float& cosine) {
    const float k = rintf(x * 0.636619772f);
    float r = fmaf(k, -1.57079637f, x);
    r = fmaf(k, 4.37113900e-8f, r);
    const float r2 = r * r;
    float s = fmaf(r2, 2.75573192e-6f, -1.98412698e-4f);
    s = fmaf(r2, s, 8.33333333e-3f);
    s = fmaf(r2, s, -1.66666667e-1f);
    s = fmaf(r * r2, s, r);
    float c = fmaf(r2, -2.75573192e-7f, 2.48015873e-5f);
    c = fmaf(r2, c, -1.38888889e-3f);
    c = fmaf(r2, c, 4.16666667e-2f);
    c = fmaf(r2, c, -0.5f);
    c = fmaf(r2, c, 1.0f);
    const int quadrant = int(k) & 3;
    sine = quadrant & 1 ? c : s;
    cosine = quadrant & 1 ? s : c;
    if (quadrant & 2) sine = -sine;
    if (quadrant == 1 || quadrant == 2) cosine = -cosine;
}

// out[n][i] = cos(t f_i), out[n][half + i] = sin(t f_i), f_i = 10000^(-i/half). Rounded to float where float tensor code
// rounds: the exponent, the frequency, the angle. grid: ceil(count * ceil(dim / 2) / threads)
template <class T> PTX void timestep_embedding(const TimestepArgs& args) {
    const int half = args.dim / 2, places = (args.dim + 1) / 2;
    const int i = blockIdx.x * blockDim.x + threadIdx.x, n = i / places, j = i % places;
    if (n >= args.count) return;
    T* out = static_cast<T*>(args.out) + size_t(n) * args.dim;
    if (j == half) {  // odd
        out[2 * half] = from_float<T>(0.0f);
        return;
    }
    const float exponent = -9.21034037f * float(j) / float(half);
    const float angle = (args.timesteps ? args.timesteps[n] : args.timestep) * float(exp(double(exponent)));
    float sine, cosine;
    sin_cos(angle, sine, cosine);
    out[j] = from_float<T>(cosine);
    out[half + j] = from_float<T>(sine);
}

#define TIMESTEP(T, name)                                                                                                         \
    extern "C" __global__ __launch_bounds__(256) void name(const __grid_constant__ TimestepArgs args) { begin_kernel(); timestep_embedding<T>(args); } \
    SIMT_KERNEL(name)
TIMESTEP(__half, timestep_embedding_f16)
TIMESTEP(__nv_bfloat16, timestep_embedding_bf16)
TIMESTEP(float, timestep_embedding_f32)
