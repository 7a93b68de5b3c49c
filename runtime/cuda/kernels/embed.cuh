// The first layer's input: x[b, s] = embeddings[b, s] + positions[before[b] + s + offset].
//
//   embeddings fp32 or fp16 [B, S, D]: visual tokens and rows of the token table     x fp32 [B, S, D]
//   positions fp32 [P, D] (OPT), or null (RoPE)     before int32 [B]: tokens in the cache
//
// Roofline: a few KB, so the time is that of the launch.
#pragma once

#include "common.cuh"

struct EmbedArguments {
    const void* embeddings;
    const float* positions;
    const int* before;
    float* x;
    long long steps;    // S
    long long width;    // D
    long long offset;   // unused rows at the start of `positions`
    long long longest;  // P: padding may lie behind it, and gets the last row
};

// A block for each token.
template <typename Value>
__device__ __forceinline__ void embed(const EmbedArguments& a) {
    const long long token = blockIdx.x, row = token / a.steps, step = token % a.steps;
    long long position = a.before[row] + step + a.offset;
    if (position >= a.longest) position = a.longest - 1;
    for (long long i = threadIdx.x; i < a.width; i += THREADS) {
        const float value = to_float(static_cast<const Value*>(a.embeddings)[token * a.width + i]);
        a.x[token * a.width + i] = a.positions == nullptr ? value : value + a.positions[position * a.width + i];
    }
}
