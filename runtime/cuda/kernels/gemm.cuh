// out = x W + bias for more rows than gemv.cuh takes: prefill, and batches. Parameters and results are those of gemv.cuh.
//
// A block computes 32 rows by 64 columns; it goes through K in steps of 16 rows of weights, which lie in shared memory as
// fp32, and each thread adds up 2 rows by 4 columns. Each weight is read once for 32 rows.
// Roofline: at 33 to 64 rows the arithmetic of fp32 decides, not the memory: tensor cores (mma) would do it in less
// time. They are not used yet.
#pragma once

#include "gemv.cuh"

constexpr int GEMM_ROWS = 32, GEMM_COLUMNS = 64;
constexpr int OWN_ROWS = 2, OWN_COLUMNS = 4;                // of a thread
constexpr int THREADS_ALONG = GEMM_COLUMNS / OWN_COLUMNS;   // the columns

// The matrix is blockIdx.z. Shared memory: 16 * (32 + 64) floats.
template <int BITS, typename Scale, typename Out, int INPUT, int OUTPUT>
__device__ __forceinline__ void gemm(const GemvArguments& a) {
    const Matrix& m = a.matrices[blockIdx.z];
    const long long first_column = static_cast<long long>(blockIdx.x) * GEMM_COLUMNS, first_row = blockIdx.y * GEMM_ROWS;
    if (first_column >= m.width) return;
    float* inputs = reinterpret_cast<float*>(shared_memory);  // [16, 32]
    float* weights = inputs + LEAST_BLOCK * GEMM_ROWS;        // [16, 64]
    const int row = threadIdx.x / THREADS_ALONG * OWN_ROWS, column = threadIdx.x % THREADS_ALONG * OWN_COLUMNS;
    const Scale* scales = static_cast<const Scale*>(m.scales);
    float sums[OWN_ROWS][OWN_COLUMNS] = {};

    for (long long first = 0; first < a.depth; first += LEAST_BLOCK) {
        for (int i = threadIdx.x; i < LEAST_BLOCK * GEMM_ROWS; i += THREADS) {
            const long long k = first + i % LEAST_BLOCK, r = first_row + i / LEAST_BLOCK;
            const bool inside = k < a.depth && r < a.rows;
            inputs[i % LEAST_BLOCK * GEMM_ROWS + i / LEAST_BLOCK] = inside ? read_input<INPUT>(a, r * a.depth + k) : 0.0f;
        }
        for (int i = threadIdx.x; i < LEAST_BLOCK * GEMM_COLUMNS; i += THREADS) {
            const long long k = first + i / GEMM_COLUMNS, n = first_column + i % GEMM_COLUMNS;
            float weight = 0.0f;
            if (k < a.depth && n < m.width) {
                weight = read_weight<BITS>(m.weight, k * m.width + n);
                if constexpr (BITS < 16) weight *= to_float(scales[k / a.block * m.width + n]);
            }
            weights[i] = weight;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < LEAST_BLOCK; ++k) {
#pragma unroll
            for (int r = 0; r < OWN_ROWS; ++r) {
#pragma unroll
                for (int c = 0; c < OWN_COLUMNS; ++c)
                    sums[r][c] = fmaf(inputs[k * GEMM_ROWS + row + r], weights[k * GEMM_COLUMNS + column + c], sums[r][c]);
            }
        }
        __syncthreads();
    }
    for (int i = 0; i < OWN_ROWS * OWN_COLUMNS; ++i) {
        const long long r = first_row + row + i / OWN_COLUMNS, n = first_column + column + i % OWN_COLUMNS;
        if (r < a.rows && n < m.width) finish<Out, OUTPUT>(m, r, n, sums[i / OWN_COLUMNS][i % OWN_COLUMNS]);
    }
}
