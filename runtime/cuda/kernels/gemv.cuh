// out = x W + bias for 1 to 4 rows of x: a decode step of one to four rows.
//
//   x     fp16 [M, K]                     W   [K, N] in 16, 8 or 4 bits (weights.cuh)
//   bias  fp32 [N] or null                out fp16 or fp32 [M, N]
//   residual fp32 [M, N] or null: added to the result; may be `out` itself
//
// Roofline: M = 1 does 2 operations for each weight of 0.5 to 2 bytes, so memory decides. A row of weights is read in
// segments of 64 bytes, 16 bytes a load where N allows it, and 16 rows are in flight for each thread. In 4 bits, a
// weight costs three instructions (mask and exponent, subtraction, fma), fewer than the six that an Orin can run in
// the time of reading it.
//
// A block computes a tile of columns. Its threads are LANES along the columns, and 256 / LANES along K, which take chunks
// of 16 rows in turn. The launch's y axis cuts K further, for GPUs with more multiprocessors than tiles; the last block
// of a tile adds the parts up in a fixed order, so results do not depend on the order of blocks. The z axis
// selects one of up to three matrices that read the same x (query, key and value; gate and up).
#pragma once

#include "weights.cuh"

constexpr int SEGMENT = 64;  // bytes of a row of weights that neighbouring lanes read
constexpr int MOST_MATRICES = 3;

struct Matrix {
    const unsigned char* weight;
    const void* scales;
    const float* bias;
    const float* residual;
    void* out;
    long long width;  // N
};

struct GemvArguments {
    Matrix matrices[MOST_MATRICES];
    const __half* x;      // [M, K]
    const __half* gated;  // [M, K]: with SwiGLU, x is silu(x) * gated
    float* parts;         // [z, splits, M, N of the widest matrix]
    unsigned* arrived;    // [z, tiles], zeros
    long long depth;      // K
    long long block;      // rows that share a scale; unused in 16 bits
    long long widest;     // N of the widest matrix
    long long rows;       // M, for gemm.cuh; gemv.cuh has it as a template argument
    long long splits;     // parts of K, for gemm.cuh; those of gemv.cuh are gridDim.y
};

enum Input { PLAIN = 0, SWIGLU = 1 };
enum Output { LINEAR = 0, RELU = 1 };

// Columns of a thread, lanes of a row, and columns of a block.
template <int BITS, int BYTES>
struct Tile {
    static constexpr int COLUMNS = BYTES * 8 / BITS;
    static constexpr int LANES = SEGMENT / BYTES < WARP ? SEGMENT / BYTES : WARP;
    static constexpr int WIDTH = LANES * COLUMNS;
};

template <int INPUT>
__device__ __forceinline__ float read_input(const GemvArguments& a, long long at) {
    const float x = __half2float(a.x[at]);
    if constexpr (INPUT == SWIGLU) return x / (1.0f + expf(-x)) * __half2float(a.gated[at]);
    return x;
}

// Adds a chunk of 16 rows of weights from row `first` on to `totals` [ROWS, COLUMNS].
template <int BITS, int ROWS, int BYTES, typename Scale, int INPUT>
__device__ __forceinline__ void add_chunk(const GemvArguments& a, const Matrix& m, long long first, long long column,
                                          float* totals) {
    using Shape = Tile<BITS, BYTES>;
    constexpr int IN_WORD = Weights<BITS>::IN_WORD, LOADED = BYTES < 4 ? 1 : BYTES / 4;
    float sums[ROWS * Shape::COLUMNS] = {};
    const unsigned char* row = m.weight + (first * m.width + column) * BITS / 8;
    const long long pitch = m.width * BITS / 8;
#pragma unroll 8
    for (int k = 0; k < LEAST_BLOCK; ++k) {
        if (first + k >= a.depth) break;  // fp16 only: quantised depths are whole blocks
        unsigned words[LOADED];
        read_words<BYTES>(row + k * pitch, words);
        float x[ROWS];
#pragma unroll
        for (int m_row = 0; m_row < ROWS; ++m_row) x[m_row] = read_input<INPUT>(a, m_row * a.depth + first + k);
#pragma unroll
        for (int c = 0; c < Shape::COLUMNS; ++c) {
            float weight;
            Weights<BITS>::unpack(words[c / IN_WORD], c % IN_WORD, weight);
#pragma unroll
            for (int m_row = 0; m_row < ROWS; ++m_row) {
                float& sum = sums[m_row * Shape::COLUMNS + c];
                sum = fmaf(x[m_row], weight, sum);
            }
        }
    }
    const Scale* scales = static_cast<const Scale*>(m.scales) + (BITS == 16 ? 0 : first / a.block * m.width + column);
#pragma unroll
    for (int c = 0; c < Shape::COLUMNS; ++c) {
        const float scale = BITS == 16 ? 1.0f : to_float(scales[c]) * Weights<BITS>::factor(c % IN_WORD);
#pragma unroll
        for (int m_row = 0; m_row < ROWS; ++m_row) {
            float& total = totals[m_row * Shape::COLUMNS + c];
            total = fmaf(sums[m_row * Shape::COLUMNS + c], scale, total);
        }
    }
}

template <typename Out, int OUTPUT>
__device__ __forceinline__ void finish(const Matrix& m, long long row, long long column, float value) {
    const long long at = row * m.width + column;
    if (m.bias != nullptr) value += m.bias[column];
    if constexpr (OUTPUT == RELU) value = fmaxf(value, 0.0f);
    if (m.residual != nullptr) value += m.residual[at];
    store(static_cast<Out*>(m.out) + at, value);
}

// Shared memory: WARPS * ROWS * WIDTH floats.
template <int BITS, int ROWS, int BYTES, typename Scale, typename Out, int INPUT, int OUTPUT>
__device__ __forceinline__ void gemv(const GemvArguments& a) {
    using Shape = Tile<BITS, BYTES>;
    constexpr int LANES = Shape::LANES, COLUMNS = Shape::COLUMNS, WIDTH = Shape::WIDTH;
    const Matrix& m = a.matrices[blockIdx.z];
    const long long first_column = static_cast<long long>(blockIdx.x) * WIDTH;
    if (first_column >= m.width) return;  // a matrix narrower than the widest
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / WARP;
    const long long column = first_column + lane * COLUMNS;
    const long long chunks = (a.depth + LEAST_BLOCK - 1) / LEAST_BLOCK;
    const long long stride = static_cast<long long>(gridDim.y) * (THREADS / LANES);

    float totals[ROWS * COLUMNS] = {};
    if (column < m.width) {
        for (long long chunk = blockIdx.y * (THREADS / LANES) + threadIdx.x / LANES; chunk < chunks; chunk += stride)
            add_chunk<BITS, ROWS, BYTES, Scale, INPUT>(a, m, chunk * LEAST_BLOCK, column, totals);
    }

    float* shared = reinterpret_cast<float*>(shared_memory);  // [WARPS, ROWS, WIDTH]
#pragma unroll
    for (int i = 0; i < ROWS * COLUMNS; ++i) {
        const float sum = warp_sum<WARP, LANES>(totals[i]);
        const int place = i / COLUMNS * WIDTH + lane * COLUMNS + i % COLUMNS;
        if (threadIdx.x % WARP < LANES) shared[warp * ROWS * WIDTH + place] = sum;
    }
    __syncthreads();

    const long long splits = gridDim.y;
    float* parts = a.parts + blockIdx.z * splits * ROWS * a.widest;
    for (int i = threadIdx.x; i < ROWS * WIDTH; i += THREADS) {
        const long long at = first_column + i % WIDTH;
        if (at >= m.width) continue;
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) sum += shared[w * ROWS * WIDTH + i];
        if (splits == 1) finish<Out, OUTPUT>(m, i / WIDTH, at, sum);
        else parts[(blockIdx.y * ROWS + i / WIDTH) * a.widest + at] = sum;
    }
    if (splits == 1) return;
    unsigned* arrived = a.arrived + blockIdx.z * gridDim.x + blockIdx.x;
    if (!last_to_arrive(arrived, gridDim.y, reinterpret_cast<unsigned*>(shared))) return;
    for (int i = threadIdx.x; i < ROWS * WIDTH; i += THREADS) {
        const long long at = first_column + i % WIDTH;
        if (at >= m.width) continue;
        float sum = 0.0f;
        for (long long split = 0; split < splits; ++split) sum += parts[(split * ROWS + i / WIDTH) * a.widest + at];
        finish<Out, OUTPUT>(m, i / WIDTH, at, sum);
    }
}
