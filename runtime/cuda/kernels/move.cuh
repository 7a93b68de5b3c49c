// Makes a KV cache in which each slot is in its own row, from one whose rows share slots (beams).
//
//   from, to fp16 [2 * layers, B, G, C, d], two caches of the same sizes
//   origins int32 [used, B]: slot t of row b is copied from row origins[t, b]
//
// The first `used` slots of each head are copied. Roofline: 2 * 2 * 2 * layers * G * d bytes for each slot of a row, far less than
// the weights that the next step reads; one launch in place of a copy for each layer and row.
#pragma once

#include "common.cuh"

struct MoveArguments {
    const void* from;
    void* to;
    const int* origins;
    long long rows;   // B
    long long heads;  // G
    long long pitch;  // words between two heads: C * d / 8, if a word has 16 bytes
    long long words;  // of a slot
    long long used;   // slots
};

// A block for a row, a head, and a layer's keys or values.
template <typename Word>
__device__ __forceinline__ void move_rows(const MoveArguments& a) {
    const long long row = blockIdx.x / a.heads, head = blockIdx.x % a.heads;
    const long long layer = blockIdx.y * static_cast<long long>(gridDim.x);
    const Word* from = static_cast<const Word*>(a.from) + (layer + head) * a.pitch;
    Word* to = static_cast<Word*>(a.to) + (layer + blockIdx.x) * a.pitch;
    for (long long i = threadIdx.x; i < a.used * a.words; i += THREADS)
        to[i] = from[a.origins[i / a.words * a.rows + row] * a.heads * a.pitch + i];
}
