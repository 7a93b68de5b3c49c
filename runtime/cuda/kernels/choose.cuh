// The next token of each row, and its embedding as the first layer's input: nothing waits for the host.
//
//   logits fp32 [M, V]         seen bytes [M, V]: 1 for tokens that the penalty applies to     penalty fp32 [M]
//   held bytes [M, V]: 1 for end tokens, which are not chosen while held_steps int32 [M] is above 0
//   -> tokens int32 [M], -1 if the row has a NaN;   logprobs fp32 [M], of the logits without penalties
//      seen, held_steps and before (tokens in the cache, int32 [M]) as the next step needs them
//      x fp32 [M, D]: the token's row of the table, plus its position's (OPT)
//
// The rules are those of engine/decoder/step_graph.py. Equal scores: the lowest token. The table is [V, D] in fp32, fp16,
// or as integers with a scale for each block of a row or column (bundle/token_table.py).
// Roofline: 4 * V bytes of logits and V of marks, 0.25 MB at V = 50272; the grid's x axis cuts V.
#pragma once

#include "weights.cuh"

enum Table { FLOATS = 0, ROWS_OF_INTEGERS = 1, COLUMNS_OF_INTEGERS = 2 };

struct ChooseArguments {
    const float* logits;
    unsigned char* seen;
    const float* penalty;
    const unsigned char* held;
    int* held_steps;
    int* before;
    int* tokens;
    float* logprobs;
    const unsigned char* table;
    const void* scales;
    const float* positions;
    float* x;
    float* parts;       // [M, cuts, 4]
    unsigned* arrived;  // [M], zeros
    long long vocabulary;
    long long width;    // D
    long long block;    // values of an embedding that share a scale
    long long offset;   // of `positions`
    long long longest;  // rows of `positions`
};

// The best score so far with its token, and the softmax sum of the plain logits. A NaN makes `total` NaN.
struct Best {
    float score;
    int token;
    float largest, total;
};

__device__ __forceinline__ Best better(const Best& a, const Best& b) {
    const bool second = b.score > a.score || (b.score == a.score && b.token < a.token);
    const float largest = fmaxf(a.largest, b.largest);
    const float total = a.total * expf(a.largest - largest) + b.total * expf(b.largest - largest);
    return {second ? b.score : a.score, second ? b.token : a.token, largest, total};
}

constexpr float LOWEST = -3.402823466e38f;

__device__ __forceinline__ Best best_of_block(Best best, Best* shared) {
#pragma unroll
    for (int step = WARP / 2; step >= 1; step /= 2) {
        const Best other = {__shfl_xor_sync(ALL_LANES, best.score, step), __shfl_xor_sync(ALL_LANES, best.token, step),
                            __shfl_xor_sync(ALL_LANES, best.largest, step), __shfl_xor_sync(ALL_LANES, best.total, step)};
        best = better(best, other);
    }
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = best;
    __syncthreads();
    best = shared[0];
#pragma unroll
    for (int warp = 1; warp < WARPS; ++warp) best = better(best, shared[warp]);
    return best;
}

template <int TABLE, int BITS, typename Value>
__device__ __forceinline__ float table_value(const ChooseArguments& a, long long token, long long i) {
    if constexpr (TABLE == FLOATS) return to_float(reinterpret_cast<const Value*>(a.table)[token * a.width + i]);
    const bool rows = TABLE == ROWS_OF_INTEGERS;
    const long long at = rows ? token * a.width + i : i * a.vocabulary + token;
    const long long scale = rows ? token * (a.width / a.block) + i / a.block : i / a.block * a.vocabulary + token;
    return read_weight<BITS>(a.table, at) * to_float(static_cast<const Value*>(a.scales)[scale]);
}

// The logit of token i after the repetition penalty; LOWEST if the token is held.
__device__ __forceinline__ float penalised(const ChooseArguments& a, long long row, long long i, float logit) {
    const long long at = row * a.vocabulary + i;
    const float penalty = a.penalty[row];
    if (a.held_steps[row] > 0 && a.held[at]) return LOWEST;
    if (!a.seen[at]) return logit;
    return logit < 0.0f ? logit * penalty : logit / penalty;
}

// Adds token i to the best token and the softmax sum.
__device__ __forceinline__ Best with_token(const Best& best, long long i, float logit, float score) {
    return better(best, {score, static_cast<int>(i), logit == minus_infinity() ? LOWEST : logit, 1.0f});
}

__device__ __forceinline__ Best joined(const Best* parts, long long cuts) {
    Best best = parts[0];
    for (long long cut = 1; cut < cuts; ++cut) best = better(best, parts[cut]);
    return best;
}

// Reports a row's token to the host, as `shown`, and prepares the next step. Called by all threads of a block.
template <int TABLE, int BITS, typename Value>
__device__ __forceinline__ void take(const ChooseArguments& a, long long row, const Best& best, long long token,
                                     int shown) {
    const long long at = row * a.vocabulary + token;
    if (one_thread()) {
        a.tokens[row] = shown;
        a.logprobs[row] = a.logits[at] - best.largest - logf(best.total);
        a.seen[at] = 1;
        a.held_steps[row] -= 1;
        a.before[row] += 1;
    }
    __syncthreads();
    long long position = a.before[row] + a.offset;
    if (position >= a.longest) position = a.longest - 1;
    for (long long i = threadIdx.x; i < a.width; i += THREADS) {
        const float value = table_value<TABLE, BITS, Value>(a, token, i);
        a.x[row * a.width + i] = a.positions == nullptr ? value : value + a.positions[position * a.width + i];
    }
}

// Blocks along the vocabulary and the rows. Shared memory: WARPS * sizeof(Best).
template <int TABLE, int BITS, typename Value>
__device__ __forceinline__ void choose(const ChooseArguments& a) {
    const long long row = blockIdx.y, cuts = gridDim.x;
    Best best = {minus_infinity(), static_cast<int>(a.vocabulary), LOWEST, 0.0f};
    for (long long i = blockIdx.x * THREADS + threadIdx.x; i < a.vocabulary; i += cuts * THREADS) {
        const float logit = a.logits[row * a.vocabulary + i];
        best = with_token(best, i, logit, penalised(a, row, i, logit));
    }
    Best* shared = reinterpret_cast<Best*>(shared_memory);
    best = best_of_block(best, shared);
    Best* parts = reinterpret_cast<Best*>(a.parts) + row * cuts;
    if (threadIdx.x == 0) parts[blockIdx.x] = best;
    if (!last_to_arrive(a.arrived + row, cuts, reinterpret_cast<unsigned*>(shared))) return;
    best = joined(parts, cuts);
    const bool broken = best.total != best.total;
    take<TABLE, BITS, Value>(a, row, best, broken ? 0 : best.token, broken ? -1 : best.token);
}
