// The next token of each row, drawn at random: temperature, top-k and top-p of runtime/decoding/sampling.py.
//
// Two launches. `score_tokens` writes the scores of all tokens, the largest score of each group (the tokens of a warp), and
// the best token of each block. `sample` draws, with a random number that the host has drawn before, and ends as
// choose.cuh does. A row of temperature 0 gets its likeliest token.
//
// The weight of a token is exp(score - largest) in fp64, of the difference in fp32, as on the host. All tokens: the
// blocks' sums are added up in the order of the ids. Top-k and top-p: the k-th largest of the groups' maxima is a lower
// bound of the k-th largest score (if there are too few groups, it is that score); the tokens above this bound are
// sorted. If they are more than LISTED, or too few for top-p, the token is -2: the host chooses it.
// Roofline: as choose.cuh, and 4 * V bytes of scores that are written and read again. The last block sorts alone.
#pragma once

#include "choose.cuh"

constexpr int LISTED = 1024, CHUNK_SIZE = 32, CHUNKS = LISTED / CHUNK_SIZE;
constexpr int NUCLEUS = 512, LEAST_NUCLEUS = 128;  // tokens that are sorted for top-p, at most and at least
constexpr int BROKEN = -1, LEFT_TO_HOST = -2;

struct SampleArguments {
    ChooseArguments choose;
    const float* temperature;  // [M]; 0: the likeliest token
    const int* top_k;          // [M]; 0: all tokens
    const float* limit;        // [M]: 1 - top_p; 0: all tokens
    const double* uniform;     // [M, slots]: the random number for the token after that of a slot
    float* scores;             // [M, V]
    float* maxima;             // [M, cuts, WARPS]
    double* masses;            // [M, cuts]: sums of weights
    long long slots;
};

struct Candidates {
    double weights[LISTED];
    unsigned long long order[LISTED];  // a key in the upper half, an id in the lower half
    double sums[THREADS];
    double scratch[WARPS];
    double total;
    unsigned count, flag;
    int place;
};

using Wide = unsigned long long;

// A number with the order of the floats; equal for equal floats, if -0 is not among them.
__device__ __forceinline__ unsigned ordered(float value) {
    const unsigned bits = __float_as_uint(value);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float unordered(unsigned key) {
    return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

__device__ __forceinline__ double weight(float score, float largest) {
    return exp(static_cast<double>(score - largest));
}

struct Range { long long first, end; };

__device__ __forceinline__ Range part_of(Range whole, long long parts, long long part) {
    const long long share = (whole.end - whole.first + parts - 1) / parts, first = whole.first + part * share;
    return {first < whole.end ? first : whole.end, first + share < whole.end ? first + share : whole.end};
}

// The ids of a block, and of a group of cuts * WARPS.
__device__ __forceinline__ Range ids_of_block(const SampleArguments& a, long long block) {
    return part_of({0, a.choose.vocabulary}, gridDim.x, block);
}
__device__ __forceinline__ Range ids_of_group(const SampleArguments& a, long long group) {
    return part_of(ids_of_block(a, group / WARPS), WARPS, group % WARPS);
}

// Blocks along the vocabulary and the rows. Shared memory: WARPS * sizeof(Best).
template <typename Score>
__device__ __forceinline__ void score_tokens(const SampleArguments& a) {
    const long long row = blockIdx.y, place = row * gridDim.x + blockIdx.x;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const Range ids = ids_of_group(a, blockIdx.x * WARPS + warp);
    const float temperature = a.temperature[row];
    Best best = {minus_infinity(), static_cast<int>(a.choose.vocabulary), LOWEST, 0.0f};
    float largest = minus_infinity();
    for (long long i = ids.first + lane; i < ids.end; i += WARP) {
        const float logit = a.choose.logits[row * a.choose.vocabulary + i], plain = penalised(a.choose, row, i, logit);
        best = with_token(best, i, logit, plain);
        const Score score = (plain == LOWEST ? minus_infinity() : plain) / temperature + 0.0f;  // -0 becomes 0
        a.scores[row * a.choose.vocabulary + i] = score;
        largest = fmaxf(largest, score);
    }
    largest = warp_max<WARP>(largest);
    if (lane == 0) a.maxima[place * WARPS + warp] = largest;
    best = best_of_block(best, reinterpret_cast<Best*>(shared_memory));
    if (one_thread()) reinterpret_cast<Best*>(a.choose.parts)[place] = best;
}

// The largest score of a row.
__device__ __forceinline__ float largest_score(const float* maxima, long long groups, float* scratch) {
    float largest = minus_infinity();
    for (long long group = threadIdx.x; group < groups; group += THREADS) largest = fmaxf(largest, maxima[group]);
    largest = warp_max<WARP>(largest);
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = largest;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) largest = fmaxf(largest, scratch[warp]);
    return largest;
}

// Sorts the first `size` (a power of two) entries, largest first.
__device__ __forceinline__ void sort_candidates(Candidates& shared, int size) {
    for (int span = 2; span <= size; span *= 2) {
        for (int stride = span / 2; stride > 0; stride /= 2) {
            __syncthreads();
            for (int pair = threadIdx.x; pair < size / 2; pair += THREADS) {
                const int low = 2 * pair - (pair & (stride - 1)), high = low + stride;
                const Wide first = shared.order[low], second = shared.order[high];
                if ((first < second) != ((low & span) == 0)) continue;
                shared.order[low] = second, shared.order[high] = first;
            }
        }
    }
    __syncthreads();
}

// The `wanted`-th largest of some values, as ordered().
__device__ __forceinline__ unsigned bound_of(const float* values, long long size, long long wanted, float* scratch) {
    unsigned bound = 0;
    for (unsigned bit = 0x80000000u; bit != 0; bit >>= 1) {
        float count = 0.0f;
        for (long long i = threadIdx.x; i < size; i += THREADS)
            count += ordered(values[i]) >= (bound | bit) ? 1.0f : 0.0f;
        if (block_sum(count, scratch) >= static_cast<float>(wanted)) bound |= bit;
    }
    return bound;
}

// Lists the tokens whose scores reach `bound`, best first, of equal scores the lowest id. Returns their number.
__device__ __forceinline__ int list_candidates(const SampleArguments& a, long long row, unsigned bound,
                                               Candidates& shared) {
    const long long groups = gridDim.x * static_cast<long long>(WARPS);
    for (int i = threadIdx.x; i < LISTED; i += THREADS) shared.order[i] = 0;
    if (one_thread()) shared.count = 0;
    __syncthreads();
    for (long long group = threadIdx.x / WARP; group < groups; group += WARPS) {
        if (ordered(a.maxima[row * groups + group]) < bound) continue;
        const Range ids = ids_of_group(a, group);
        for (long long i = ids.first + threadIdx.x % WARP; i < ids.end; i += WARP) {
            const unsigned key = ordered(a.scores[row * a.choose.vocabulary + i]);
            if (key < bound) continue;
            const unsigned at = atomicAdd(&shared.count, 1u);
            if (at < LISTED) shared.order[at] = static_cast<Wide>(key) << 32 | static_cast<unsigned>(~i);
        }
    }
    __syncthreads();
    const int count = shared.count;
    if (count > LISTED) return count;
    int size = 2;
    while (size < count) size *= 2;
    sort_candidates(shared, size);
    return count;
}

// Computes the weights of the first `count` candidates, and the sums of each chunk of them and of all.
__device__ __forceinline__ void weigh(Candidates& shared, int count, float largest, bool by_id) {
    for (int i = threadIdx.x; i < LISTED; i += THREADS) {
        const Wide entry = by_id ? ~shared.order[i] : shared.order[i] >> 32;
        shared.weights[i] = i < count ? weight(unordered(static_cast<unsigned>(entry)), largest) : 0.0;
    }
    __syncthreads();
    if (threadIdx.x < CHUNKS) {
        double sum = 0.0;
        for (int i = 0; i < CHUNK_SIZE; ++i) sum += shared.weights[threadIdx.x * CHUNK_SIZE + i];
        shared.sums[threadIdx.x] = sum;
    }
    __syncthreads();
    if (one_thread()) {
        double total = 0.0;
        for (int i = 0; i < CHUNKS; ++i) total += shared.sums[i];
        shared.total = total;  // which the same thread uses, in first_passing
    }
}

// The first candidate at which the running sum of weights passes a test; `none` if there is none. For all threads.
template <typename Test>
__device__ __forceinline__ int first_passing(Candidates& shared, int none, Test passes) {
    if (one_thread()) {
        double sum = 0.0;
        int chunk = 0;
        while (chunk < CHUNKS && !passes(sum + shared.sums[chunk])) sum += shared.sums[chunk++];
        int place = chunk * CHUNK_SIZE;
        for (; place < none; ++place) {
            sum += shared.weights[place];
            if (passes(sum)) break;
        }
        shared.place = place < none ? place : none;
    }
    __syncthreads();
    return shared.place;
}

// Draws from all tokens of the row: finds the block, the thread's share of its ids, and the id.
__device__ __forceinline__ int drawn_from_all(const SampleArguments& a, long long row, float largest, double uniform,
                                              Candidates& shared) {
    const double* masses = a.masses + row * gridDim.x;
    const float* scores = a.scores + row * a.choose.vocabulary;
    if (one_thread()) {
        double total = 0.0, sum = 0.0;
        for (unsigned block = 0; block < gridDim.x; ++block) total += masses[block];
        int found = 0;  // the last block with a weight, unless the sum passes before
        for (unsigned block = 0; block < gridDim.x; ++block) {
            if (masses[block] == 0.0) continue;
            found = block;
            if (sum + masses[block] > uniform * total) break;
            sum += masses[block];
        }
        shared.place = found;
        shared.total = uniform * total - sum;  // of the block's own weights
    }
    __syncthreads();
    const Range block = ids_of_block(a, shared.place);
    const Range own = part_of(block, THREADS, threadIdx.x);
    double sum = 0.0;
    for (long long i = own.first; i < own.end; ++i) sum += weight(scores[i], largest);
    shared.sums[threadIdx.x] = sum;
    __syncthreads();
    if (one_thread()) {
        int found = 0;
        double before = 0.0, start = 0.0;
        for (int share = 0; share < THREADS; ++share) {
            if (shared.sums[share] == 0.0) continue;
            found = share, start = before;
            before += shared.sums[share];
            if (before > shared.total) break;
        }
        const Range ids = part_of(block, THREADS, found);
        for (long long i = ids.first; i < ids.end; ++i) {
            const double one = weight(scores[i], largest);
            if (one == 0.0) continue;
            shared.place = static_cast<int>(i);
            start += one;
            if (start > shared.total) break;
        }
    }
    __syncthreads();
    return shared.place;
}

// Draws from the tokens that top-k and top-p keep.
__device__ __forceinline__ int drawn_from_best(const SampleArguments& a, long long row, float largest, double uniform,
                                               Candidates& shared) {
    const long long groups = gridDim.x * static_cast<long long>(WARPS), vocabulary = a.choose.vocabulary;
    const int top_k = a.top_k[row];
    const float limit = a.limit[row];
    unsigned bound = 0;
    if (vocabulary > LISTED) {
        const long long most = groups * 3 / 4, some = most >= LEAST_NUCLEUS && most <= NUCLEUS ? most : NUCLEUS;
        const long long wanted = top_k > 0 ? top_k : some;
        float* scratch = reinterpret_cast<float*>(shared.scratch);
        bound = wanted > most ? bound_of(a.scores + row * vocabulary, vocabulary, wanted, scratch)
                              : bound_of(a.maxima + row * groups, groups, wanted, scratch);
    }
    const int count = list_candidates(a, row, bound, shared);
    if (count > LISTED) return LEFT_TO_HOST;
    int kept = count;
    if (top_k > 0) {  // equal scores are all kept
        const Wide least = shared.order[(top_k < count ? top_k : count) - 1] >> 32;
        float reaching = 0.0f;
        for (int i = threadIdx.x; i < count; i += THREADS) reaching += shared.order[i] >> 32 >= least ? 1.0f : 0.0f;
        kept = static_cast<int>(block_sum(reaching, reinterpret_cast<float*>(shared.scratch)));
    }
    if (limit > 0.0f) {
        weigh(shared, kept, largest, false);
        double whole = 0.0;
        if (top_k == 0)
            for (unsigned block = 0; block < gridDim.x; ++block) whole += a.masses[row * gridDim.x + block];
        const int last = first_passing(shared, kept, [&](double sum) {
            return !(static_cast<float>(1.0 - sum / (top_k == 0 ? whole : shared.total)) > limit);
        });
        if (last == kept && top_k == 0) return LEFT_TO_HOST;
        if (last < kept) kept = last + 1;
    }
    int size = 2;
    while (size < kept) size *= 2;
    for (int i = threadIdx.x; i < size; i += THREADS) {  // by id, lowest first
        const Wide entry = shared.order[i], id = static_cast<unsigned>(~entry);
        shared.order[i] = i < kept ? ~(id << 32 | entry >> 32) : 0;
    }
    sort_candidates(shared, size);
    weigh(shared, kept, largest, true);
    const int place = first_passing(shared, kept - 1, [&](double sum) { return sum > uniform * shared.total; });
    return static_cast<int>(~shared.order[place] >> 32);
}

// Blocks along the vocabulary and the rows. Shared memory: sizeof(Candidates).
template <int TABLE, int BITS, typename Value>
__device__ __forceinline__ void sample(const SampleArguments& a) {
    const ChooseArguments& c = a.choose;
    const long long row = blockIdx.y, cuts = gridDim.x;
    Candidates& shared = *reinterpret_cast<Candidates*>(shared_memory);
    const float largest = largest_score(a.maxima + row * cuts * WARPS, cuts * WARPS, reinterpret_cast<float*>(shared.sums));
    const bool random = a.temperature[row] > 0.0f;
    if (random && a.top_k[row] == 0) {
        const Range ids = ids_of_block(a, blockIdx.x);
        double sum = 0.0;
        for (long long i = ids.first + threadIdx.x; i < ids.end; i += THREADS)
            sum += weight(a.scores[row * c.vocabulary + i], largest);
        sum = block_sum(sum, shared.scratch);
        if (one_thread()) a.masses[row * cuts + blockIdx.x] = sum;
    }
    if (!last_to_arrive(c.arrived + row, cuts, &shared.flag)) return;
    const Best best = joined(reinterpret_cast<const Best*>(c.parts) + row * cuts, cuts);
    int token = best.token;
    if (best.total != best.total) {
        token = BROKEN;
    } else if (random) {
        const long long slot = c.before[row];
        if (slot >= a.slots || largest - largest != 0.0f) token = LEFT_TO_HOST;  // infinity has no difference
        else if (a.top_k[row] == 0 && a.limit[row] <= 0.0f)
            token = drawn_from_all(a, row, largest, a.uniform[row * a.slots + slot], shared);
        else token = drawn_from_best(a, row, largest, a.uniform[row * a.slots + slot], shared);
    }
    take<TABLE, BITS, Value>(c, row, best, token < 0 ? 0 : token, token);
}
