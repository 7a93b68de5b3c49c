// Causal attention of S new tokens of each row over its cache, which is written in place.
//
//   query fp16 [B, S, H, d]     key, value fp16 [B, S, G, d], new     out fp16 [B, S, H, d]
//   keys, values fp16 [B, G, C, d]: slot t of row b has its token t; `before[b]` slots are filled
//   origins int32 [C, B]: slot t of row b is in row origins[t, b] of the cache (beams); null: in row b, to which new slots
//   are always written
//   fresh int32 [B]: how many of the S tokens are valid; null for all. An invalid one gets zeros and writes nothing
//   rotation fp32 [positions, d]: d / 2 cosines, then d / 2 sines (RoPE); null for learned positions
//
// H / G query heads share a head of keys and values; a block computes GROUP of them, so that its sums fit registers and shared
// memory, and `shares` blocks read the same keys. A token attends to itself and the slots before it, `window` of
// them at most, if that is not 0. New keys are rotated, rounded to fp16 and used at once; the first block that holds the own
// slot also writes it. No block reads a new slot of the cache, so blocks may run in any order.
//
// Roofline: a step reads 2 * d * 2 bytes for each slot and key head once, for all query heads that share it. A slot is
// read by a team of lanes, 16 bytes each. The launch's z axis cuts the slots, so that a long context of few rows uses
// every multiprocessor; the last block adds the parts up in a fixed order. The x axis, the only one that takes more than
// 65535 blocks, is that of the new tokens.
#pragma once

#include "common.cuh"

struct AttentionArguments {
    const __half* query;
    const __half* key;
    const __half* value;
    __half* keys;
    __half* values;
    const float* rotation;
    const int* before;
    const int* fresh;
    const int* origins;
    __half* out;
    float* parts;       // [B * S, G * shares, splits, GROUP, d + 2]
    unsigned* arrived;  // [B * S, G * shares], zeros
    long long rows;      // B
    long long steps;     // S
    long long heads;     // G
    long long shares;    // blocks of a head of keys: H / G / GROUP
    long long capacity;  // C
    long long window;
    float scale;
};

constexpr int CHANNELS = 8;  // of a lane: 16 bytes

// Lanes that share a slot: a power of two.
template <int WIDTH>
struct Team {
    static_assert(WIDTH % CHANNELS == 0 && WIDTH <= WARP * CHANNELS);
    static constexpr int NEEDED = WIDTH / CHANNELS;
    static constexpr int LANES = NEEDED <= 1 ? 1 : NEEDED <= 2 ? 2 : NEEDED <= 4 ? 4 : NEEDED <= 8 ? 8 : NEEDED <= 16 ? 16 : 32;
    static constexpr int COUNT = THREADS / LANES;
};

// Eight channels of a head from `first` on, rotated for a position if there is a rotation.
template <int WIDTH>
__device__ __forceinline__ void read_channels(const __half* head, const float* rotation, int first, float* channels) {
    constexpr int HALF = WIDTH / 2;
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
        const int at = first + c;
        float x = __half2float(head[at]);
        if (rotation != nullptr) {
            const float other = __half2float(head[at < HALF ? at + HALF : at - HALF]);
            const float cosine = rotation[at % HALF], sine = rotation[HALF + at % HALF];
            x = x * cosine + (at < HALF ? -other : other) * sine;
        }
        channels[c] = x;
    }
}

__device__ __forceinline__ void copy_slot(const __half* from, __half* to) {
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
}

// Joins two softmax sums: of weights exp(score - largest), their total and the weighted values.
__device__ __forceinline__ float join(float& largest, float other) {
    const float both = fmaxf(largest, other);
    const float factor = largest == minus_infinity() ? 0.0f : expf(largest - both);
    largest = both;
    return factor;
}

template <int WIDTH, int GROUP>
struct Sums {
    float largest[GROUP], total[GROUP], values[GROUP][CHANNELS];
};

// Adds the slots from `first` to `end` (excluded) to the sums of each lane's channels.
template <int WIDTH, int GROUP>
__device__ __forceinline__ void add_slots(const AttentionArguments& a, long long row, long long step, long long first,
                                          long long end, Sums<WIDTH, GROUP>& sums) {
    constexpr int LANES = Team<WIDTH>::LANES, TEAMS = Team<WIDTH>::COUNT;
    const long long head = blockIdx.y / a.shares, before = a.before[row], own = before + step;
    const int team = threadIdx.x / LANES, channel = threadIdx.x % LANES * CHANNELS;
    const bool used = channel < WIDTH;
    const __half* query = a.query + ((row * a.steps + step) * gridDim.y + blockIdx.y) * GROUP * WIDTH;
    float queries[GROUP][CHANNELS] = {};
    if (used) {
#pragma unroll
        for (int g = 0; g < GROUP; ++g)
            read_channels<WIDTH>(query + g * WIDTH, a.rotation ? a.rotation + own * WIDTH : nullptr, channel, queries[g]);
    }
    for (long long base = first; base < end; base += TEAMS) {  // the same rounds for all lanes, which exchange sums
        const long long slot = base + team;
        const bool valid = slot < end && used;
        alignas(16) __half key[CHANNELS] = {}, value[CHANNELS] = {};
        if (valid) {
            const long long from = slot < before && a.origins != nullptr ? a.origins[slot * a.rows + row] : row;
            const long long cached = ((from * a.heads + head) * a.capacity + slot) * WIDTH + channel;
            if (slot < before) {
                copy_slot(a.keys + cached, key);
                copy_slot(a.values + cached, value);
            } else {
                const long long fresh = ((row * a.steps + slot - before) * a.heads + head) * WIDTH;
                float rotated[CHANNELS];
                read_channels<WIDTH>(a.key + fresh, a.rotation ? a.rotation + slot * WIDTH : nullptr, channel, rotated);
#pragma unroll
                for (int c = 0; c < CHANNELS; ++c) key[c] = __float2half(rotated[c]);
                copy_slot(a.value + fresh + channel, value);
                if (slot == own && blockIdx.y % a.shares == 0) {
                    copy_slot(key, a.keys + cached);
                    copy_slot(value, a.values + cached);
                }
            }
        }
#pragma unroll
        for (int g = 0; g < GROUP; ++g) {
            float score = 0.0f;
#pragma unroll
            for (int c = 0; c < CHANNELS; ++c) score = fmaf(queries[g][c], __half2float(key[c]), score);
            score = warp_sum<LANES>(score) * a.scale;
            if (slot >= end) continue;
            const float kept = join(sums.largest[g], score), weight = expf(score - sums.largest[g]);
            sums.total[g] = sums.total[g] * kept + weight;
#pragma unroll
            for (int c = 0; c < CHANNELS; ++c)
                sums.values[g][c] = sums.values[g][c] * kept + weight * __half2float(value[c]);
        }
    }
}

// Joins the sums of a warp's teams: every team then has those of all.
template <int WIDTH, int GROUP>
__device__ __forceinline__ void join_teams(Sums<WIDTH, GROUP>& sums) {
#pragma unroll
    for (int step = Team<WIDTH>::LANES; step < WARP; step *= 2) {
#pragma unroll
        for (int g = 0; g < GROUP; ++g) {
            float other = __shfl_xor_sync(ALL_LANES, sums.largest[g], step);
            const float theirs = join(other, sums.largest[g]), ours = join(sums.largest[g], other);
            sums.total[g] = sums.total[g] * ours + __shfl_xor_sync(ALL_LANES, sums.total[g], step) * theirs;
#pragma unroll
            for (int c = 0; c < CHANNELS; ++c) {
                float& value = sums.values[g][c];
                value = value * ours + __shfl_xor_sync(ALL_LANES, value, step) * theirs;
            }
        }
    }
}

// One channel of the joined sums of `count` parts [count, GROUP, WIDTH + 2]: the largest score, the total, the values.
template <int WIDTH, int GROUP>
__device__ __forceinline__ void join_parts(const float* parts, long long count, int g, int channel, float* largest,
                                           float* total, float* value) {
    *largest = minus_infinity(), *total = 0.0f, *value = 0.0f;
    for (long long part = 0; part < count; ++part) {
        const float* one = parts + (part * GROUP + g) * (WIDTH + 2);
        float other = one[0];
        const float theirs = join(other, *largest), ours = join(*largest, other);
        *total = *total * ours + one[1] * theirs;
        *value = *value * ours + one[2 + channel] * theirs;
    }
}

// A block for a new token, GROUP query heads, and a cut of the slots. Shared memory: WARPS * GROUP * (WIDTH + 2) floats.
template <int WIDTH, int GROUP>
__device__ __forceinline__ void attention(const AttentionArguments& a) {
    constexpr int PART = GROUP * (WIDTH + 2), LANES = Team<WIDTH>::LANES;
    const long long token = blockIdx.x, row = token / a.steps, step = token % a.steps;
    const long long place = token * gridDim.y + blockIdx.y, splits = gridDim.z;
    __half* out = a.out + place * GROUP * WIDTH;
    if (a.fresh != nullptr && step >= a.fresh[row]) {
        for (int i = threadIdx.x; blockIdx.z == 0 && i < GROUP * WIDTH; i += THREADS) out[i] = __float2half(0.0f);
        return;
    }
    const long long slots = a.before[row] + step + 1;
    const long long oldest = a.window > 0 && slots > a.window ? slots - a.window : 0;
    const long long cut = (slots - oldest + splits - 1) / splits, first = oldest + blockIdx.z * cut;
    const long long end = first + cut < slots ? first + cut : slots;

    Sums<WIDTH, GROUP> sums = {};
#pragma unroll
    for (int g = 0; g < GROUP; ++g) sums.largest[g] = minus_infinity();
    add_slots<WIDTH, GROUP>(a, row, step, first, end, sums);
    join_teams<WIDTH, GROUP>(sums);

    float* shared = reinterpret_cast<float*>(shared_memory);  // [WARPS, GROUP, WIDTH + 2]
    const int lane = threadIdx.x % WARP, channel = lane * CHANNELS;
    if (lane < LANES && channel < WIDTH) {
#pragma unroll
        for (int g = 0; g < GROUP; ++g) {
            float* part = shared + threadIdx.x / WARP * PART + g * (WIDTH + 2);
            if (lane == 0) part[0] = sums.largest[g], part[1] = sums.total[g];
#pragma unroll
            for (int c = 0; c < CHANNELS; ++c) part[2 + channel + c] = sums.values[g][c];
        }
    }
    __syncthreads();
    float* parts = a.parts + place * splits * PART;
    float largest, total, value;
    for (int i = threadIdx.x; i < GROUP * WIDTH; i += THREADS) {
        const int g = i / WIDTH, at = i % WIDTH;
        join_parts<WIDTH, GROUP>(shared, WARPS, g, at, &largest, &total, &value);
        float* part = parts + blockIdx.z * PART + g * (WIDTH + 2);
        if (splits == 1) out[i] = __float2half(value / total);
        else part[2 + at] = value;
        if (splits > 1 && at == 0) part[0] = largest, part[1] = total;
    }
    if (splits == 1) return;
    if (!last_to_arrive(a.arrived + place, splits, reinterpret_cast<unsigned*>(shared))) return;
    for (int i = threadIdx.x; i < GROUP * WIDTH; i += THREADS) {
        join_parts<WIDTH, GROUP>(parts, splits, i / WIDTH, i % WIDTH, &largest, &total, &value);
        out[i] = __float2half(value / total);
    }
}
