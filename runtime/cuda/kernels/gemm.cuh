// out = x W + bias for more rows than gemv.cuh takes: prefill, and batches. Parameters and results are those of gemv.cuh, but
// SwiGLU's product is rounded to fp16, as tensor cores need it.
//
// A block computes 64 rows by 64 columns; it goes through K in steps of 32 rows of weights, which lie in shared memory as
// fp16, column by column. While it computes a step, it loads the next one into registers. Each of 8 warps computes 16 rows
// by 32 columns with tensor cores (mma m16n8k16), which add up in fp32. Integers are exact in fp16: the sum of a block of
// weights is multiplied by its scale in fp32. Each weight is read once for 64 rows. The y axis is that of the rows, and of
// the parts of K for GPUs with more multiprocessors than tiles; the last block of a tile adds the parts up, in their order.
// Roofline: at 33 to 64 rows the weights' bytes decide on every GPU with tensor cores.
#pragma once

#include "gemv.cuh"
#include "mma.cuh"

constexpr int GEMM_ROWS = 64, GEMM_COLUMNS = 64, GEMM_DEPTH = 32;
constexpr int PITCH = GEMM_DEPTH + 8;      // halves: the lanes of a fragment read from different banks
constexpr int TILE_DEPTH = 16;             // K of an mma
constexpr int WARPS_ALONG = 2;             // the columns
constexpr int FRAGMENTS = GEMM_COLUMNS / WARPS_ALONG / 8;  // of 8 columns, for each warp
constexpr int LOADED = 8;                  // inputs, and weights, that a thread loads in each step

// Eight halves from `at` on as four words; 0 for those that do not lie before `end`.
__device__ __forceinline__ void load_halves(const __half* values, long long at, long long end, bool aligned,
                                            unsigned* words) {
    if (aligned && at + LOADED <= end) {
        const uint4 value = *reinterpret_cast<const uint4*>(values + at);
        words[0] = value.x, words[1] = value.y, words[2] = value.z, words[3] = value.w;
        return;
    }
#pragma unroll
    for (int i = 0; i < LOADED; ++i) {
        const unsigned bits = at + i < end ? __half_as_ushort(values[at + i]) : 0u;
        words[i / 2] = i % 2 == 0 ? bits : words[i / 2] | bits << 16;
    }
}

// Eight weights of a row from the value `at` on, as the bundle packs them; 0 for those that do not lie before `end`.
template <int BITS>
__device__ __forceinline__ void load_weights(const unsigned char* weights, long long at, long long end, bool aligned,
                                             unsigned* words) {
    constexpr int BYTES = LOADED * BITS / 8, IN_WORD = 32 / BITS;
    if (aligned && at + LOADED <= end) {
        read_words<BYTES>(weights + at * BITS / 8, words);
        return;
    }
#pragma unroll
    for (int i = 0; i < LOADED; ++i) {
        unsigned bits = 0;
        if (at + i < end) {
            if constexpr (BITS == 16) bits = reinterpret_cast<const unsigned short*>(weights)[at + i];
            else if constexpr (BITS == 8) bits = weights[at + i];
            else bits = weights[(at + i) / 2] >> ((at + i) % 2 * 4) & 0xfu;
        }
        words[i / IN_WORD] = i % IN_WORD == 0 ? bits : words[i / IN_WORD] | bits << i % IN_WORD * BITS;
    }
}

__device__ __forceinline__ __half half_of(const unsigned* words, int i) {
    return __ushort_as_half(static_cast<unsigned short>(words[i / 2] >> i % 2 * 16));
}

// A step of inputs and weights in a thread's registers, on its way to shared memory.
template <int BITS, int INPUT>
struct Step {
    unsigned inputs[4], gates[4], weights[4];

    // Inputs: 4 threads for each of 64 rows. Weights: each lane of a warp has a row, and all have the same columns.
    __device__ __forceinline__ void load(const GemvArguments& a, const Matrix& m, long long first_row,
                                         long long first_column, long long first) {
        const long long row = first_row + threadIdx.x / 4, k = first + threadIdx.x % 4 * LOADED;
        const long long start = row * a.depth, end = row < a.rows ? start + a.depth : 0;
        const bool aligned = a.depth % LOADED == 0;
        load_halves(a.x, start + k, end, aligned, inputs);
        if constexpr (INPUT == SWIGLU) load_halves(a.gated, start + k, end, aligned, gates);
        const long long weight_row = first + threadIdx.x % WARP, column = first_column + threadIdx.x / WARP * LOADED;
        const long long row_end = weight_row < a.depth ? (weight_row + 1) * m.width : 0;
        load_weights<BITS>(m.weight, weight_row * m.width + column, row_end, m.width % LOADED == 0, weights);
    }

    __device__ __forceinline__ void store(__half* shared_inputs, __half* shared_weights) const {
        __half* place = shared_inputs + threadIdx.x / 4 * PITCH + threadIdx.x % 4 * LOADED;
#pragma unroll
        for (int i = 0; i < LOADED; ++i) {
            __half value = half_of(inputs, i);
            if constexpr (INPUT == SWIGLU) {
                const float x = __half2float(value);
                value = __float2half(x / (1.0f + expf(-x)) * __half2float(half_of(gates, i)));
            }
            place[i] = value;
        }
        const int k = threadIdx.x % WARP, column = threadIdx.x / WARP * LOADED;
#pragma unroll
        for (int i = 0; i < LOADED; ++i) {
            constexpr int IN_WORD = Weights<BITS>::IN_WORD;
            float weight;
            Weights<BITS>::unpack(weights[i / IN_WORD], i % IN_WORD, weight);
            shared_weights[(column + i) * PITCH + k] = __float2half(weight * Weights<BITS>::factor(i % IN_WORD));
        }
    }
};

// Two neighbouring halves of a row in shared memory.
__device__ __forceinline__ unsigned pair_of(const __half* shared, int row, int k) {
    return *reinterpret_cast<const unsigned*>(shared + row * PITCH + k);
}

// The matrix is blockIdx.z. Shared memory: (64 + 64) * PITCH halves.
template <int BITS, typename Scale, typename Out, int INPUT, int OUTPUT>
__device__ __forceinline__ void gemm(const GemvArguments& a) {
    const Matrix& m = a.matrices[blockIdx.z];
    const long long first_column = static_cast<long long>(blockIdx.x) * GEMM_COLUMNS;
    const long long first_row = blockIdx.y / a.splits * GEMM_ROWS, split = blockIdx.y % a.splits;
    const long long steps = (a.depth + GEMM_DEPTH - 1) / GEMM_DEPTH, own = (steps + a.splits - 1) / a.splits * GEMM_DEPTH;
    const long long begin = split * own, end = begin + own < a.depth ? begin + own : a.depth;
    if (first_column >= m.width) return;
    __half* inputs = reinterpret_cast<__half*>(shared_memory);
    __half* weights = inputs + GEMM_ROWS * PITCH;
    const int warp = threadIdx.x / WARP, group = threadIdx.x % WARP / 4, pair = threadIdx.x % 4 * 2;
    const int row = warp / WARPS_ALONG * 16, column = warp % WARPS_ALONG * FRAGMENTS * 8;
    const bool used = first_row + row < a.rows;
    const Scale* scales = static_cast<const Scale*>(m.scales);
    float sums[FRAGMENTS][4] = {}, totals[FRAGMENTS][4] = {};

    Step<BITS, INPUT> step;
    step.load(a, m, first_row, first_column, begin);
    for (long long first = begin; first < end; first += GEMM_DEPTH) {
        __syncthreads();  // the fragments of the step before are read
        step.store(inputs, weights);
        __syncthreads();
        if (first + GEMM_DEPTH < end) step.load(a, m, first_row, first_column, first + GEMM_DEPTH);
        for (int k = 0; used && k < GEMM_DEPTH && first + k < end; k += TILE_DEPTH) {
            const unsigned x[4] = {pair_of(inputs, row + group, k + pair), pair_of(inputs, row + group + 8, k + pair),
                                   pair_of(inputs, row + group, k + pair + 8), pair_of(inputs, row + group + 8, k + pair + 8)};
#pragma unroll
            for (int f = 0; f < FRAGMENTS; ++f) {
                const int n = column + f * 8 + group;
                const unsigned w[2] = {pair_of(weights, n, k + pair), pair_of(weights, n, k + pair + 8)};
                mma(sums[f], x, w);
            }
            if constexpr (BITS < 16) {
                if ((first + k + TILE_DEPTH) % a.block != 0 && first + k + TILE_DEPTH < end) continue;
#pragma unroll
                for (int i = 0; i < FRAGMENTS * 4; ++i) {
                    const long long n = first_column + column + i / 4 * 8 + pair + i % 2;
                    const float scale = n < m.width ? to_float(scales[(first + k) / a.block * m.width + n]) : 0.0f;
                    totals[i / 4][i % 4] = fmaf(sums[i / 4][i % 4], scale, totals[i / 4][i % 4]);
                    sums[i / 4][i % 4] = 0.0f;
                }
            }
        }
    }
    float* parts = a.parts + blockIdx.z * a.splits * a.rows * a.widest;
#pragma unroll
    for (int i = 0; i < FRAGMENTS * 4; ++i) {
        const long long r = first_row + row + group + i % 4 / 2 * 8, n = first_column + column + i / 4 * 8 + pair + i % 2;
        const float value = BITS < 16 ? totals[i / 4][i % 4] : sums[i / 4][i % 4];
        if (r >= a.rows || n >= m.width) continue;
        if (a.splits == 1) finish<Out, OUTPUT>(m, r, n, value);
        else parts[(split * a.rows + r) * a.widest + n] = value;
    }
    if (a.splits == 1) return;
    unsigned* arrived = a.arrived + (blockIdx.z * (gridDim.y / a.splits) + blockIdx.y / a.splits) * gridDim.x + blockIdx.x;
    if (!last_to_arrive(arrived, a.splits, reinterpret_cast<unsigned*>(shared_memory))) return;
    for (int i = threadIdx.x; i < GEMM_ROWS * GEMM_COLUMNS; i += THREADS) {
        const long long r = first_row + i / GEMM_COLUMNS, n = first_column + i % GEMM_COLUMNS;
        if (r >= a.rows || n >= m.width) continue;
        float sum = 0.0f;
        for (long long other = 0; other < a.splits; ++other) sum += parts[(other * a.rows + r) * a.widest + n];
        finish<Out, OUTPUT>(m, r, n, sum);
    }
}
