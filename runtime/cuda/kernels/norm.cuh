// out[i] = norm(x[rows[i]]) of LayerNorm (weight, bias) or RMSNorm (weight).
//
//   x fp32 [M, D], the residual stream      out fp16 [R, D]      weight, bias fp32 [D]; bias may be null
//   rows int32 [R], or null for the first R rows of x
//
// The addition of the residual belongs to the product before (gemv.cuh), which has each sum in a register.
// Roofline: a row of 2560 is 10 KB, which the caches hold; the time is that of the launch. The variance is that of
// differences from the mean, in fp32, in a second pass over the row.
#pragma once

#include "common.cuh"

enum Norm { LAYER_NORM = 0, RMS_NORM = 1 };

struct NormArguments {
    const float* x;
    const float* weight;
    const float* bias;
    const int* rows;
    __half* out;
    long long width;  // D
    float epsilon;
};

// A block for each row of `out`. Shared memory: WARPS floats.
template <int KIND>
__device__ __forceinline__ void norm(const NormArguments& a) {
    float* scratch = reinterpret_cast<float*>(shared_memory);
    const long long row = a.rows == nullptr ? blockIdx.x : a.rows[blockIdx.x];
    const float* x = a.x + row * a.width;
    __half* out = a.out + blockIdx.x * a.width;
    const float width = static_cast<float>(a.width);

    float mean = 0.0f;
    if constexpr (KIND == LAYER_NORM) {
        float sum = 0.0f;
        for (long long i = threadIdx.x; i < a.width; i += THREADS) sum += x[i];
        mean = block_sum(sum, scratch) / width;
    }
    float squares = 0.0f;
    for (long long i = threadIdx.x; i < a.width; i += THREADS) squares = fmaf(x[i] - mean, x[i] - mean, squares);
    const float factor = 1.0f / sqrtf(block_sum(squares, scratch) / width + a.epsilon);
    for (long long i = threadIdx.x; i < a.width; i += THREADS) {
        const float normed = (x[i] - mean) * factor * a.weight[i];
        out[i] = __float2half(a.bias == nullptr ? normed : normed + a.bias[i]);
    }
}
