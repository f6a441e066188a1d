// Sampling of the next token of every row: temperature, top-k, renormalization, top-p, then an exponential race. No sort.
// kernels/sampling.py documents the method and implements it in plain torch.
//
// There are two launches. `chunk_stats_kernel` reads the logits once; these 4 * rows * vocab bytes are nearly the whole
// cost. For every chunk of 1,024 logits it writes the maximum, the sum of exponentials and the probability mass.
// `sample_kernel` uses one block per row. It reads few logits again, because the chunk maxima bound the cutoff from below:
//   top-k    k chunks have a maximum of at least the k-th largest maximum. So k tokens reach it, and no token below is kept.
//   top-p    If the largest maxima alone reach the mass, no token below the last of them is kept. Also, all tokens
//            below a weight t weigh less than vocab * t together, so no token below (1 - p) * total / vocab is kept.
// A chunk whose maximum is below the bound is never read again. The remaining candidates fit into shared memory, except
// in flat distributions; there the same steps run over the whole row.
//
// A token is represented by its `rank`, an integer that orders by logit, then by smaller id. Ranks are unique, so a
// cutoff is one integer. Probabilities are integers in units of 2^-40 of the most likely token's weight: their sum does
// not depend on the order in which threads add, so the sampled token is the same in every run.

#include <cmath>
#include <cstdint>

#ifndef LAUNCH
#define LAUNCH(kernel, grid, threads, stream, ...) kernel<<<grid, threads, 0, stream>>>(__VA_ARGS__)
#endif

namespace {

constexpr int CHUNK = 1024, CHUNK_THREADS = 128;
constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int CAPACITY = 2048;  // candidates held in shared memory
constexpr int BINS = 2048, BINS_PER_THREAD = BINS / THREADS;
constexpr uint32_t ALL_LANES = 0xFFFFFFFF;
constexpr float MASS_UNITS = 1099511627776.0f;  // 2^40, the weight of the most likely token
constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15;  // 2^64 / golden ratio, odd

__device__ uint32_t sortable_bits(float logit) {
    uint32_t bits = __float_as_uint(logit + 0.0f);  // + 0 turns -0 into 0
    return bits >> 31 ? ~bits : bits | 0x80000000;
}

__device__ uint64_t rank_of(float logit, uint32_t id) { return uint64_t(sortable_bits(logit)) << 32 | uint32_t(~id); }

__device__ float logit_of(uint64_t rank) {
    uint32_t key = rank >> 32;
    return __uint_as_float(key >> 31 ? key & 0x7FFFFFFF : ~key);
}

// The ranks of a row of logits, or of the maxima of its chunks.
struct LogitSource {
    const float* logits;
    int size;
    __device__ uint64_t operator[](int i) const { return rank_of(logits[i], i); }
};

// The ranks of the candidates that were gathered from a row.
struct CandidateSource {
    const uint64_t* ranks;
    int size;
    __device__ uint64_t operator[](int i) const { return ranks[i]; }
};

// Measures of a token in a cutoff: TokenCount for top-k, TokenMass for top-p.
struct TokenCount {
    __device__ uint64_t operator()(uint64_t) const { return 1; }
};

struct TokenMass {
    float max_logit, temperature;
    __device__ float weight(uint64_t rank) const { return expf((logit_of(rank) - max_logit) / temperature); }
    __device__ uint64_t operator()(uint64_t rank) const { return llrintf(weight(rank) * MASS_UNITS); }
};

__device__ uint64_t target_mass(uint64_t total, float top_p) { return uint64_t(ceil(double(top_p) * double(total))); }

// Shared memory of a block of `sample_kernel`.
struct Scratch {
    uint64_t histogram[BINS];
    uint64_t candidates[CAPACITY];
    uint64_t warp_integers[WARPS];
    float warp_floats[WARPS];
    uint64_t count_above_bin;
    int selected_bin, num_candidates;
};

// Returns to every thread the combination of the values of all threads of the block. `warp_values` holds one per warp.
template <class T, class Combine>
__device__ T reduce_block(T value, T* warp_values, Combine combine) {
    for (int distance = 16; distance > 0; distance /= 2)
        value = combine(value, __shfl_xor_sync(ALL_LANES, value, distance));
    __syncthreads();  // until all threads have read the result of the previous reduction
    if (threadIdx.x % 32 == 0) warp_values[threadIdx.x / 32] = value;
    __syncthreads();
    value = warp_values[0];
    for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) value = combine(value, warp_values[warp]);
    return value;
}

__device__ float max_of(float a, float b) { return fmaxf(a, b); }
__device__ float sum_of(float a, float b) { return a + b; }
__device__ uint64_t sum_of(uint64_t a, uint64_t b) { return a + b; }
__device__ uint64_t min_of(uint64_t a, uint64_t b) { return a < b ? a : b; }

// Returns the largest rank r such that the tokens of rank r and above measure at least `target`; 0 if all tokens together
// measure less. It is a radix search from the highest digit down, with one pass over the source per digit.
template <class Source, class Measure>
__device__ uint64_t rank_cutoff(Scratch& scratch, Source source, Measure measure, uint64_t target) {
    constexpr int DIGIT_SHIFT[] = {53, 42, 32, 11, 0}, DIGIT_BITS[] = {11, 11, 10, 11, 11};
    uint64_t prefix = 0;
    for (int digit = 0; digit < 5; ++digit) {
        const int shift = DIGIT_SHIFT[digit], bits = DIGIT_BITS[digit];
        const uint64_t prefix_mask = digit ? ~0ull << (shift + bits) : 0;
        if (digit == 3) prefix |= 0xFFC00000;  // an id has 22 bits, so the upper 10 bits of ~id are ones
        for (int bin = threadIdx.x; bin < BINS; bin += THREADS) scratch.histogram[bin] = 0;
        if (threadIdx.x == 0) scratch.selected_bin = -1;
        __syncthreads();
        for (int i = threadIdx.x; i < source.size; i += THREADS) {
            const uint64_t rank = source[i];
            if (((rank ^ prefix) & prefix_mask) == 0) {
                auto* bin = &scratch.histogram[(rank >> shift) & ((1 << bits) - 1)];
                atomicAdd(reinterpret_cast<unsigned long long*>(bin), (unsigned long long)measure(rank));
            }
        }
        __syncthreads();
        // Thread 0 holds the highest bins. `sum_above` becomes the sum of all bins above the bins of this thread.
        const int highest_bin = BINS - 1 - threadIdx.x * BINS_PER_THREAD;
        uint64_t bins_sum = 0;
        for (int i = 0; i < BINS_PER_THREAD; ++i) bins_sum += scratch.histogram[highest_bin - i];
        uint64_t inclusive_sum = bins_sum;
        for (unsigned distance = 1; distance < 32; distance *= 2) {
            const uint64_t lower_lanes_sum = __shfl_up_sync(ALL_LANES, inclusive_sum, distance);
            if (threadIdx.x % 32 >= distance) inclusive_sum += lower_lanes_sum;
        }
        if (threadIdx.x % 32 == 31) scratch.warp_integers[threadIdx.x / 32] = inclusive_sum;
        __syncthreads();
        uint64_t sum_above = inclusive_sum - bins_sum;
        for (unsigned warp = 0; warp < threadIdx.x / 32; ++warp) sum_above += scratch.warp_integers[warp];
        if (sum_above < target && sum_above + bins_sum >= target) {
            int bin = highest_bin;
            while (sum_above + scratch.histogram[bin] < target) sum_above += scratch.histogram[bin--];
            scratch.selected_bin = bin;
            scratch.count_above_bin = sum_above;
        }
        __syncthreads();
        if (scratch.selected_bin < 0) return 0;
        prefix |= uint64_t(scratch.selected_bin) << shift;
        target -= scratch.count_above_bin;
        __syncthreads();
    }
    return prefix;
}

// Splitmix64's finalizer.
__device__ uint64_t mix(uint64_t x) {
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9;
    x = (x ^ x >> 27) * 0x94D049BB133111EB;
    return x ^ x >> 31;
}

// Returns an Exp(1) variate that is a pure function of the row's key and the token id.
__device__ float exponential_noise(uint64_t row_key, uint32_t id) {
    const uint64_t bits = mix(row_key + (id + 1ull) * GOLDEN) >> 24;
    const float uniform = fminf((float(int64_t(bits)) + 0.5f) * 0x1p-40f, 0x1.fffffep-1f);  // 1 would be infinite noise
    return -log1pf(-uniform);
}

struct RowSettings {
    int top_k;  // 0 if top-k is off or keeps all tokens
    float top_p;
    uint64_t total_mass;  // of the whole row
    uint64_t row_key;
};

// Returns to every thread the id of the sampled token. `source` holds the row, or at least every token that top-k and
// top-p keep.
template <class Source>
__device__ uint32_t sample_token(Scratch& scratch, Source source, TokenMass mass, RowSettings settings) {
    uint64_t min_rank = 0;  // tokens below it are dropped
    uint64_t total = settings.total_mass;
    if (settings.top_k) {
        min_rank = rank_cutoff(scratch, source, TokenCount{}, settings.top_k);
        total = 0;
        for (int i = threadIdx.x; i < source.size; i += THREADS)
            if (source[i] >= min_rank) total += mass(source[i]);
        total = reduce_block(total, scratch.warp_integers, [](uint64_t a, uint64_t b) { return sum_of(a, b); });
    }
    if (settings.top_p < 1)  // the target is at most the mass after top-k, so this cutoff is not below top-k's
        min_rank = rank_cutoff(scratch, source, mass, target_mass(total, settings.top_p));
    // The race: the token with the smallest Exp(1) / p wins, which has probability p. Positive floats order like their bits.
    uint64_t winner = ~0ull;
    for (int i = threadIdx.x; i < source.size; i += THREADS) {
        const uint64_t rank = source[i];
        if (rank < min_rank) continue;
        const uint32_t id = ~uint32_t(rank);
        const float race_time = exponential_noise(settings.row_key, id) / mass.weight(rank);
        winner = min_of(winner, uint64_t(__float_as_uint(race_time)) << 32 | id);
    }
    return reduce_block(winner, scratch.warp_integers, [](uint64_t a, uint64_t b) { return min_of(a, b); });
}

__global__ void __launch_bounds__(CHUNK_THREADS)
chunk_stats_kernel(const float* logits, int64_t row_stride, int vocab, const float* temperatures, float* chunk_max,
                   float* chunk_sum, float* chunk_mass) {
    __shared__ float warp_values[CHUNK_THREADS / 32];
    constexpr int LOGITS_PER_THREAD = CHUNK / CHUNK_THREADS;
    const int64_t row = blockIdx.y, chunk_index = row * gridDim.x + blockIdx.x;
    const float* chunk = logits + row * row_stride + int64_t(blockIdx.x) * CHUNK;
    const int size = min(CHUNK, vocab - int(blockIdx.x) * CHUNK);
    float values[LOGITS_PER_THREAD], max_logit = -INFINITY;
#pragma unroll  // `values` stays in registers
    for (int i = 0; i < LOGITS_PER_THREAD; ++i) {
        const int column = threadIdx.x + i * CHUNK_THREADS;
        values[i] = column < size ? chunk[column] : -INFINITY;
        max_logit = fmaxf(max_logit, values[i]);
    }
    max_logit = reduce_block(max_logit, warp_values, [](float a, float b) { return max_of(a, b); });
    // fmaxf ignores NaN, the sum does not. A chunk that holds only -inf has a sum of 0.
    const float finite_max = max_logit == -INFINITY ? 0 : max_logit;
    const float temperature = temperatures[row] > 0 ? temperatures[row] : 1;
    float sum = 0, mass = 0;
#pragma unroll  // `values` stays in registers
    for (int i = 0; i < LOGITS_PER_THREAD; ++i) {
        sum += expf(values[i] - finite_max);
        mass += expf((values[i] - finite_max) / temperature);
    }
    sum = reduce_block(sum, warp_values, [](float a, float b) { return sum_of(a, b); });
    mass = reduce_block(mass, warp_values, [](float a, float b) { return sum_of(a, b); });
    if (threadIdx.x == 0) {
        chunk_max[chunk_index] = max_logit;
        chunk_sum[chunk_index] = sum;
        chunk_mass[chunk_index] = mass;
    }
}

__global__ void __launch_bounds__(THREADS)
sample_kernel(const float* logits, int64_t row_stride, int vocab, int num_chunks, const float* temperatures,
              const int64_t* top_ks, const float* top_ps, const int64_t* seeds, const int64_t* positions,
              const float* chunk_maxima, const float* chunk_sums, const float* chunk_masses, int64_t* tokens,
              float* logprobs) {
    __shared__ Scratch scratch;
    const int64_t row = blockIdx.x;
    const LogitSource whole_row{logits + row * row_stride, vocab};
    const LogitSource chunks{chunk_maxima + row * num_chunks, num_chunks};
    const bool greedy = temperatures[row] == 0;
    const float temperature = greedy ? 1 : temperatures[row];

    float max_logit = -INFINITY, exp_sum = 0, mass_sum = 0;
    for (int i = threadIdx.x; i < num_chunks; i += THREADS) max_logit = fmaxf(max_logit, chunks.logits[i]);
    max_logit = reduce_block(max_logit, scratch.warp_floats, [](float a, float b) { return max_of(a, b); });
    for (int i = threadIdx.x; i < num_chunks; i += THREADS) {
        exp_sum += chunk_sums[row * num_chunks + i] * expf(chunks.logits[i] - max_logit);
        mass_sum += chunk_masses[row * num_chunks + i] * expf((chunks.logits[i] - max_logit) / temperature);
    }
    exp_sum = reduce_block(exp_sum, scratch.warp_floats, [](float a, float b) { return sum_of(a, b); });
    mass_sum = reduce_block(mass_sum, scratch.warp_floats, [](float a, float b) { return sum_of(a, b); });
    if (!isfinite(max_logit) || isnan(exp_sum)) {  // NaN, +inf, or only -inf
        if (threadIdx.x == 0) {
            tokens[row] = -1;
            logprobs[row] = NAN;
        }
        return;
    }

    const TokenMass mass{max_logit, temperature};
    RowSettings settings;
    const int64_t top_k = greedy ? 1 : top_ks[row];
    settings.top_k = top_k < vocab ? int(top_k) : 0;
    settings.top_p = greedy ? 1 : top_ps[row];
    settings.total_mass = uint64_t(mass_sum * MASS_UNITS);
    settings.row_key = mix(mix(seeds[row] + GOLDEN) + positions[row] * GOLDEN);

    uint32_t min_sortable = 0;  // sortable bits of a logit; no token below it is kept
    if (settings.top_k) {
        min_sortable = rank_cutoff(scratch, chunks, TokenCount{}, settings.top_k) >> 32;
    } else if (settings.top_p < 1) {
        min_sortable = rank_cutoff(scratch, chunks, mass, target_mass(settings.total_mass, settings.top_p)) >> 32;
        const float min_weight = 0.9f * (1 - settings.top_p) * mass_sum / vocab;  // 0.9: mass_sum is a rounded sum
        min_sortable = max(min_sortable, sortable_bits(max_logit + temperature * logf(min_weight)));
    }
    if (min_sortable) {
        if (threadIdx.x == 0) scratch.num_candidates = 0;
        __syncthreads();
        for (int chunk = threadIdx.x / 32; chunk < num_chunks; chunk += WARPS) {
            if (sortable_bits(chunks.logits[chunk]) < min_sortable) continue;
            const int end = min(vocab, (chunk + 1) * CHUNK);
            for (int i = chunk * CHUNK + threadIdx.x % 32; i < end; i += 32) {
                const uint64_t rank = whole_row[i];
                if (rank >> 32 < min_sortable) continue;
                const int index = atomicAdd(&scratch.num_candidates, 1);
                if (index < CAPACITY) scratch.candidates[index] = rank;
            }
        }
        __syncthreads();
    }
    const bool fits_in_shared = min_sortable && scratch.num_candidates <= CAPACITY;
    const CandidateSource candidates{scratch.candidates, scratch.num_candidates};
    const uint32_t id = fits_in_shared ? sample_token(scratch, candidates, mass, settings)
                                       : sample_token(scratch, whole_row, mass, settings);
    if (threadIdx.x == 0) {
        tokens[row] = id;
        logprobs[row] = whole_row.logits[id] - max_logit - logf(exp_sum);
    }
}

}  // namespace

// Returns the size of the workspace that `thinksafe_sample` needs, in floats.
extern "C" int64_t thinksafe_sample_workspace(int64_t rows, int64_t vocab) {
    return 3 * rows * ((vocab + CHUNK - 1) / CHUNK);
}

// Enqueues the sampling of one token per row; kernels/sampling.py documents the arguments. Returns a cudaError_t.
extern "C" int thinksafe_sample(const float* logits, int64_t row_stride, int64_t rows, int64_t vocab,
                                const float* temperatures, const int64_t* top_ks, const float* top_ps,
                                const int64_t* seeds, const int64_t* positions, float* workspace, int64_t* tokens,
                                float* logprobs, cudaStream_t stream) {
    if (rows == 0) return 0;
    const int num_chunks = int((vocab + CHUNK - 1) / CHUNK);
    float *chunk_max = workspace, *chunk_sum = chunk_max + rows * num_chunks, *chunk_mass = chunk_sum + rows * num_chunks;
    LAUNCH(chunk_stats_kernel, dim3(num_chunks, rows), CHUNK_THREADS, stream, logits, row_stride, int(vocab),
           temperatures, chunk_max, chunk_sum, chunk_mass);
    LAUNCH(sample_kernel, dim3(rows), THREADS, stream, logits, row_stride, int(vocab), num_chunks, temperatures,
           top_ks, top_ps, seeds, positions, chunk_max, chunk_sum, chunk_mass, tokens, logprobs);
    return cudaGetLastError();
}
