// epilogue.cuh: what happens to a product before it is stored. The tensor-core kernels of sm_80 end here, their split-K
// reduction (split_k.cu) and those of sm_90a that take any epilogue, eight columns of one row at a time:
//   out = act(product + bias + time_bias) * scale + residual
//   out = (value + bias) * gelu(gate + bias) * scale + residual        (kEpilogueGeglu)
// Everything before the last rounding is float. The twin of EpilogueArgs is launch/epilogue.rs.
#pragma once
#include "activation.cuh"
#include "element.cuh"

enum EpilogueFlags : int32_t {
    kEpilogueGeglu = 1,   // columns alternate in eights: values, then the gates of the same values
    kEpilogueFloat = 2,   // out is float whatever T is
    kEpilogueVector = 4,  // addresses are multiples of 16 bytes, pitches of 8 elements
};

struct EpilogueArgs {
    void* out;              // [rows][out_pitch]
    const void* residual;   // [rows][residual_pitch] of T, or null
    const float* bias;      // [columns], or null
    const void* time_bias;  // [rows / rows_per_sample][time_pitch] of T, or null
    float* partial;         // [splits][rows][columns up to a multiple of 8]: store sums here and nothing else; or null
    int64_t out_pitch, residual_pitch, time_pitch;
    int32_t rows, columns;  // of the product; with GEGLU out has half the columns
    int32_t rows_per_sample;
    int32_t act, flags;
    float scale;
};

namespace epilogue {

PTX int out_columns(const EpilogueArgs& e) { return e.flags & kEpilogueGeglu ? e.columns / 2 : e.columns; }
PTX int partial_pitch(const EpilogueArgs& e) { return (e.columns + 7) / 8 * 8; }

// bias[column .. column + 8), zeros behind the last column.
PTX void load_bias(float (&b)[8], const EpilogueArgs& e, int column) {
    if (e.bias && e.flags & kEpilogueVector && column + 8 <= e.columns) load8(b, e.bias + column);
    else
        for (int i = 0; i < 8; i++) b[i] = e.bias && column + i < e.columns ? e.bias[column + i] : 0.0f;
}

PTX void activate8(float (&v)[8], int32_t act) {
    if (act == kActSilu) for (int i = 0; i < 8; i++) v[i] = silu(v[i]);
    else if (act == kActGelu) for (int i = 0; i < 8; i++) v[i] = gelu(v[i]);
    else if (act == kActQuickGelu) for (int i = 0; i < 8; i++) v[i] = quick_gelu(v[i]);
    else if (act == kActRelu) for (int i = 0; i < 8; i++) v[i] = relu(v[i]);
    else if (act == kActLeakyRelu) for (int i = 0; i < 8; i++) v[i] = leaky_relu(v[i]);
}

// Adds the residual to v and stores it: row `row`, out columns `column` to column + 8. `staged` are the eight elements of the
// residual if they are at hand.
template <class T> PTX void store8_out(const EpilogueArgs& e, int row, int column, float (&v)[8], const T* staged) {
    const int valid = out_columns(e) - column;
    const size_t at = size_t(row) * e.out_pitch + column;
    for (int i = 0; i < 8; i++) v[i] *= e.scale;
    if (valid >= 8 && e.flags & kEpilogueVector) {
        if (e.residual) {
            float r[8];
            load8(r, staged ? staged : static_cast<const T*>(e.residual) + size_t(row) * e.residual_pitch + column);
            for (int i = 0; i < 8; i++) v[i] += r[i];
        }
        if (e.flags & kEpilogueFloat) store8(static_cast<float*>(e.out) + at, v);
        else store8(static_cast<T*>(e.out) + at, v);
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
        if (i >= valid) break;
        if (e.residual) v[i] += to_float(static_cast<const T*>(e.residual)[size_t(row) * e.residual_pitch + column + i]);
        if (e.flags & kEpilogueFloat) static_cast<float*>(e.out)[at + i] = v[i];
        else static_cast<T*>(e.out)[at + i] = from_float<T>(v[i]);
    }
}

// v: product columns `column` to column + 8 of row `row`; b: their bias.
template <class T> PTX void finish8(const EpilogueArgs& e, int row, int column, float (&v)[8], const float (&b)[8], const T* staged) {
    for (int i = 0; i < 8; i++) v[i] += b[i];
    if (e.time_bias) {
        const T* t = static_cast<const T*>(e.time_bias) + size_t(row / e.rows_per_sample) * e.time_pitch + column;
        if (e.flags & kEpilogueVector && column + 8 <= e.columns) {
            float u[8];
            load8(u, t);
            for (int i = 0; i < 8; i++) v[i] += u[i];
        } else
            for (int i = 0; i < 8; i++) v[i] += column + i < e.columns ? to_float(t[i]) : 0.0f;
    }
    activate8(v, e.act);
    store8_out(e, row, column, v, staged);
}

// The same with GEGLU: v and gate are product columns 2*column to 2*column + 16; `column` counts those of out.
template <class T>
PTX void finish8_geglu(const EpilogueArgs& e, int row, int column, float (&v)[8], const float (&gate)[8], const float (&b)[8],
                       const float (&gate_bias)[8], const T* staged) {
    for (int i = 0; i < 8; i++) v[i] = (v[i] + b[i]) * gelu(gate[i] + gate_bias[i]);
    store8_out(e, row, column, v, staged);
}

}  // namespace epilogue
