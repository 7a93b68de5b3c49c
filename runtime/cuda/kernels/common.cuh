// Helpers of all kernels: numbers, sums over a warp, and the order in which the blocks of a launch end.
//
// All kernels take dynamic shared memory only, through `shared_memory`: the host computes its size from the kernel's
// template arguments (runtime/cuda/steps.py and products.py), and the tests check that nothing is written behind it.
#pragma once

#include <cuda_fp16.h>

constexpr int WARP = 32;
constexpr int THREADS = 256;  // of every block, unless a kernel says otherwise
constexpr int WARPS = THREADS / WARP;
constexpr unsigned ALL_LANES = 0xffffffffu;

extern __shared__ float4 shared_memory[];

// What a maximum begins with; NVRTC has no INFINITY.
__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000u); }

// A float or half in memory, read and written as float.
__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ void store(float* place, float value) { *place = value; }
__device__ __forceinline__ void store(__half* place, float value) { *place = __float2half(value); }

// Whether this thread does what one thread of the block does.
__device__ __forceinline__ bool one_thread() { return threadIdx.x == 0; }

// The sum of `value` over the lanes whose numbers differ from the own in bits from FIRST to WIDTH / 2, in a fixed order.
template <int WIDTH, int FIRST = 1, typename Number>
__device__ __forceinline__ Number warp_sum(Number value) {
#pragma unroll
    for (int step = WIDTH / 2; step >= FIRST; step /= 2) value += __shfl_xor_sync(ALL_LANES, value, step);
    return value;
}

template <int WIDTH>
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
    for (int step = WIDTH / 2; step >= 1; step /= 2) value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, step));
    return value;
}

// The sum of `value` over all threads of the block; `scratch` holds WARPS numbers of shared memory.
template <typename Number>
__device__ __forceinline__ Number block_sum(Number value, Number* scratch) {
    value = warp_sum<WARP>(value);
    __syncthreads();  // an earlier sum may still be read
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = value;
    __syncthreads();
    Number total = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) total += scratch[warp];
    return total;
}

// Whether this block is the last of `count` blocks that arrive at `*arrived`. What the others wrote to global memory
// before can then be read. The counter is 0 before and after. `flag` is a word of shared memory; it may lie where the
// threads have read before.
__device__ __forceinline__ bool last_to_arrive(unsigned* arrived, unsigned count, unsigned* flag) {
    __threadfence();  // the own writes are visible before the own arrival
    __syncthreads();
    if (threadIdx.x == 0) *flag = atomicInc(arrived, count - 1);
    __syncthreads();
    __threadfence();
    return *flag == count - 1;
}
