// Weights as the bundle stores them: [K, N], the columns of a row side by side.
//
//   16 bits  fp16
//    8 bits  signed, a scale for each column of a block of rows: [K / block, N]
//    4 bits  signed, two in a byte, the first column in the lower half; scales as for 8 bits
//
// Zero points are 0. A block has at least 16 rows (calibration/weights/blocks.py, BLOCKS).
#pragma once

#include "common.cuh"

constexpr int LEAST_BLOCK = 16;

// BYTES bytes at a time, read around the caches: a step reads each weight once.
template <int BYTES> struct Word;
template <> struct Word<16> { using type = uint4; };
template <> struct Word<8> { using type = uint2; };
template <> struct Word<4> { using type = unsigned; };
template <> struct Word<2> { using type = unsigned short; };
template <> struct Word<1> { using type = unsigned char; };

template <int BYTES>
__device__ __forceinline__ void read_words(const unsigned char* place, unsigned* words) {
    using Type = typename Word<BYTES>::type;
    const Type value = __ldcs(reinterpret_cast<const Type*>(place));
    if constexpr (BYTES == 16) {
        words[0] = value.x; words[1] = value.y; words[2] = value.z; words[3] = value.w;
    } else if constexpr (BYTES == 8) {
        words[0] = value.x; words[1] = value.y;
    } else {
        words[0] = value;
    }
}

// The weights in `words` as floats. A 4-bit weight is multiplied by 16^(column % 4), which `factor` takes back.
//
// Integers become floats without a conversion instruction, which GPUs run at a quarter of the rate of others or less:
// the bits of an unsigned number u below 2^23, put under the exponent of 2^23, are the float 2^23 + u.
template <int BITS>
struct Weights {
    static constexpr int IN_WORD = 32 / BITS;
    static constexpr float TWO_23 = 8388608.0f;
    static constexpr unsigned TWO_23_BITS = 0x4b000000u;

    static __device__ __forceinline__ void unpack(unsigned word, int column, float& value) {
        if constexpr (BITS == 16) {
            value = __half2float(__ushort_as_half(static_cast<unsigned short>(column == 0 ? word & 0xffffu : word >> 16)));
        } else if constexpr (BITS == 8) {
            const unsigned raised = word ^ 0x80808080u;  // w + 128 in each byte
            value = __uint_as_float(__byte_perm(raised, TWO_23_BITS, 0x7650u + column)) - (TWO_23 + 128.0f);
        } else {
            const unsigned raised = (word ^ 0x88888888u) >> (column / 4 * 16);  // w + 8 in each half byte
            const int place = column % 4 * 4;
            const unsigned bits = (raised & (0xfu << place)) | TWO_23_BITS;
            value = __uint_as_float(bits) - (TWO_23 + static_cast<float>(8 << place));
        }
    }

    static __device__ __forceinline__ float factor(int column) {
        return BITS == 4 ? 1.0f / static_cast<float>(1 << column % 4 * 4) : 1.0f;
    }
};

// One weight without its scale.
template <int BITS>
__device__ __forceinline__ float read_weight(const unsigned char* weights, long long at) {
    if constexpr (BITS == 16) return __half2float(reinterpret_cast<const __half*>(weights)[at]);
    if constexpr (BITS == 8) return static_cast<float>(static_cast<signed char>(weights[at]));
    const int half = weights[at / 2] >> (at % 2 * 4) & 0xf;
    return static_cast<float>((half ^ 8) - 8);  // the sign of four bits
}
