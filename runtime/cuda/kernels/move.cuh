// Makes row i of a KV cache a copy of row `rows[i]` of another one: beams that are exchanged, repeated or dropped.
//
//   from, to fp16 [2 * layers, B, G, C, d], two caches of the same sizes     rows int32 [B]
//
// The first `used` slots of each head are copied. Roofline: 2 * 2 * 2 * layers * G * d bytes for each slot of a row, far less than
// the weights that the next step reads; one launch in place of a copy for each layer and row.
#pragma once

#include "common.cuh"

struct MoveArguments {
    const void* from;
    void* to;
    const int* rows;
    long long heads;  // G
    long long slot;   // words between two heads: C * d / 8, if a word has 16 bytes
    long long used;   // words that are copied of each head
};

// A block for a row, a head, and a layer's keys or values.
template <typename Word>
__device__ __forceinline__ void move_rows(const MoveArguments& a) {
    const long long row = blockIdx.x / a.heads, head = blockIdx.x % a.heads;
    const long long layer = blockIdx.y * static_cast<long long>(gridDim.x);
    const Word* from = static_cast<const Word*>(a.from) + (layer + a.rows[row] * a.heads + head) * a.slot;
    Word* to = static_cast<Word*>(a.to) + (layer + blockIdx.x) * a.slot;
    for (long long i = threadIdx.x; i < a.used; i += THREADS) to[i] = from[i];
}
