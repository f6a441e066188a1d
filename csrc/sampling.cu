// The next token of every row: temperature, top-k, renormalise, top-p, then an exponential race; without a sort.
//
// Two launches. `measure` reads the logits once (4 bytes * rows * vocab, which is what the whole operation costs) and
// leaves the maximum, the log-sum-exp's share and the probability mass of every chunk of 1,024. `draw`, one block a
// row, then needs few logits, for the maxima bound the cutoff from below:
//   top-k    k chunks have a maximum of at least the k-th largest maximum, so k tokens do, and nothing below is kept;
//   top-p    where the largest maxima alone reach the mass, nothing below the last of them is kept; and since all
//            tokens below a weight t weigh less than vocab * t together, nothing below (1 - p) * total / vocab is.
// Chunks whose maximum is below the bound are never read again; what is left fits into shared memory but for flat
// distributions, which take the same steps over the row itself.
//
// A token is its `rank`, an integer that orders by logit, then by smaller id: no two are equal, so a cutoff is one
// number. Probability is counted in units of 2^-40 of the likeliest token's, in integers: a sum is the same in whatever
// order threads add, hence a draw is the same bits in every run. kernels/sampling.py says the same in plain torch.

#include <cmath>
#include <cstdint>

#ifndef LAUNCH
#define LAUNCH(kernel, grid, threads, stream, ...) kernel<<<grid, threads, 0, stream>>>(__VA_ARGS__)
#endif

namespace {

constexpr int CHUNK = 1024, MEASURE_THREADS = 128;
constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int CAPACITY = 2048;  // candidates held in shared memory
constexpr int BINS = 2048, BINS_A_THREAD = BINS / THREADS;
constexpr uint32_t ALL_LANES = 0xFFFFFFFF;
constexpr float UNITS = 1099511627776.0f;  // 2^40, what the likeliest token weighs
constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15;  // 2^64 / golden ratio, odd

__device__ uint32_t ordered(float logit) {
    uint32_t bits = __float_as_uint(logit + 0.0f);  // + 0 turns -0 into 0
    return bits >> 31 ? ~bits : bits | 0x80000000;
}

__device__ uint64_t rank_of(float logit, uint32_t id) { return uint64_t(ordered(logit)) << 32 | uint32_t(~id); }

__device__ float logit_of(uint64_t rank) {
    uint32_t key = rank >> 32;
    return __uint_as_float(key >> 31 ? key & 0x7FFFFFFF : ~key);
}

// Sequences of ranks: a row, the maxima of its chunks, and the candidates that were gathered from it.
struct Values {
    const float* values;
    int size;
    __device__ uint64_t operator[](int i) const { return rank_of(values[i], i); }
};

struct Candidates {
    const uint64_t* ranks;
    int size;
    __device__ uint64_t operator[](int i) const { return ranks[i]; }
};

// What a token counts for in a cutoff.
struct One {
    __device__ uint64_t operator()(uint64_t) const { return 1; }
};

struct Mass {
    float best, temperature;
    __device__ float weight(uint64_t rank) const { return expf((logit_of(rank) - best) / temperature); }
    __device__ uint64_t operator()(uint64_t rank) const { return llrintf(weight(rank) * UNITS); }
};

__device__ uint64_t share_of(uint64_t total, float top_p) { return uint64_t(ceil(double(top_p) * double(total))); }

struct Scratch {
    uint64_t histogram[BINS];
    uint64_t candidates[CAPACITY];
    uint64_t integers[WARPS];
    float floats[WARPS];
    uint64_t above;
    int bin, count;
};

template <class T, class Combine>
__device__ T reduce_block(T value, T* a_warp, Combine combine) {
    for (int distance = 16; distance > 0; distance /= 2)
        value = combine(value, __shfl_xor_sync(ALL_LANES, value, distance));
    __syncthreads();  // the last reduction's results have been read
    if (threadIdx.x % 32 == 0) a_warp[threadIdx.x / 32] = value;
    __syncthreads();
    value = a_warp[0];
    for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) value = combine(value, a_warp[warp]);
    return value;
}

__device__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ float added(float a, float b) { return a + b; }
__device__ uint64_t added(uint64_t a, uint64_t b) { return a + b; }
__device__ uint64_t smaller(uint64_t a, uint64_t b) { return a < b ? a : b; }

// The largest rank r for which the tokens of rank r and above count for `target` or more; 0 where all of them do not.
// A radix search from the highest digit down, each digit one pass over the source.
template <class Source, class Counts>
__device__ uint64_t cutoff(Scratch& scratch, Source source, Counts counts, uint64_t target) {
    constexpr int SHIFT[] = {53, 42, 32, 11, 0}, WIDTH[] = {11, 11, 10, 11, 11};
    uint64_t result = 0;
    for (int digit = 0; digit < 5; ++digit) {
        const int shift = SHIFT[digit], width = WIDTH[digit];
        const uint64_t decided = digit ? ~0ull << (shift + width) : 0;
        if (digit == 3) result |= 0xFFC00000;  // ids have 22 bits; the ten above them are ones in every ~id
        for (int bin = threadIdx.x; bin < BINS; bin += THREADS) scratch.histogram[bin] = 0;
        if (threadIdx.x == 0) scratch.bin = -1;
        __syncthreads();
        for (int i = threadIdx.x; i < source.size; i += THREADS) {
            const uint64_t rank = source[i];
            if (((rank ^ result) & decided) == 0) {
                auto* bin = &scratch.histogram[(rank >> shift) & ((1 << width) - 1)];
                atomicAdd(reinterpret_cast<unsigned long long*>(bin), (unsigned long long)counts(rank));
            }
        }
        __syncthreads();
        // Thread 0 holds the highest bins. `above` becomes what lies above a thread's own.
        const int top = BINS - 1 - threadIdx.x * BINS_A_THREAD;
        uint64_t own = 0;
        for (int i = 0; i < BINS_A_THREAD; ++i) own += scratch.histogram[top - i];
        uint64_t up_to_own = own;
        for (unsigned distance = 1; distance < 32; distance *= 2) {
            const uint64_t before = __shfl_up_sync(ALL_LANES, up_to_own, distance);
            if (threadIdx.x % 32 >= distance) up_to_own += before;
        }
        if (threadIdx.x % 32 == 31) scratch.integers[threadIdx.x / 32] = up_to_own;
        __syncthreads();
        uint64_t above = up_to_own - own;
        for (unsigned warp = 0; warp < threadIdx.x / 32; ++warp) above += scratch.integers[warp];
        if (above < target && above + own >= target) {
            int bin = top;
            while (above + scratch.histogram[bin] < target) above += scratch.histogram[bin--];
            scratch.bin = bin;
            scratch.above = above;
        }
        __syncthreads();
        if (scratch.bin < 0) return 0;
        result |= uint64_t(scratch.bin) << shift;
        target -= scratch.above;
        __syncthreads();
    }
    return result;
}

// Splitmix64's finaliser.
__device__ uint64_t mix(uint64_t x) {
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9;
    x = (x ^ x >> 27) * 0x94D049BB133111EB;
    return x ^ x >> 31;
}

// An Exp(1) variate that is a pure function of the row's key and the token.
__device__ float exponential_noise(uint64_t row_key, uint32_t id) {
    const uint64_t bits = mix(row_key + (id + 1ull) * GOLDEN) >> 24;
    const float uniform = fminf((float(int64_t(bits)) + 0.5f) * 0x1p-40f, 0x1.fffffep-1f);  // 1 would be infinite noise
    return -log1pf(-uniform);
}

struct Settings {
    int top_k;  // 0 where it is off or keeps everything
    float top_p;
    uint64_t total_mass;  // of the whole row
    uint64_t row_key;
};

template <class Source>
__device__ uint32_t choose(Scratch& scratch, Source source, Mass mass, Settings settings) {
    uint64_t least = 0;  // rank that is kept
    uint64_t total = settings.total_mass;
    if (settings.top_k) {
        least = cutoff(scratch, source, One{}, settings.top_k);
        total = 0;
        for (int i = threadIdx.x; i < source.size; i += THREADS)
            if (source[i] >= least) total += mass(source[i]);
        total = reduce_block(total, scratch.integers, [](uint64_t a, uint64_t b) { return added(a, b); });
    }
    if (settings.top_p < 1)  // the target is at most the mass of what top-k kept, so this cutoff is not below that one
        least = cutoff(scratch, source, mass, share_of(total, settings.top_p));
    // The race: token id wins with probability p where its Exp(1) / p is the smallest. Positive floats order as bits.
    uint64_t winner = ~0ull;
    for (int i = threadIdx.x; i < source.size; i += THREADS) {
        const uint64_t rank = source[i];
        if (rank < least) continue;
        const uint32_t id = ~uint32_t(rank);
        const float time = exponential_noise(settings.row_key, id) / mass.weight(rank);
        winner = smaller(winner, uint64_t(__float_as_uint(time)) << 32 | id);
    }
    return reduce_block(winner, scratch.integers, [](uint64_t a, uint64_t b) { return smaller(a, b); });
}

__global__ void __launch_bounds__(MEASURE_THREADS)
measure(const float* logits, int64_t row_stride, int vocab, const float* temperatures, float* chunk_max,
        float* chunk_sum, float* chunk_mass) {
    __shared__ float scratch[MEASURE_THREADS / 32];
    constexpr int EACH = CHUNK / MEASURE_THREADS;
    const int64_t row = blockIdx.y, out = row * gridDim.x + blockIdx.x;
    const float* chunk = logits + row * row_stride + int64_t(blockIdx.x) * CHUNK;
    const int size = min(CHUNK, vocab - int(blockIdx.x) * CHUNK);
    float values[EACH], best = -INFINITY;
#pragma unroll  // `values` stays in registers
    for (int i = 0; i < EACH; ++i) {
        const int column = threadIdx.x + i * MEASURE_THREADS;
        values[i] = column < size ? chunk[column] : -INFINITY;
        best = fmaxf(best, values[i]);
    }
    best = reduce_block(best, scratch, [](float a, float b) { return larger(a, b); });
    // fmaxf passes over NaN; the sum does not, and a chunk of -inf alone has a sum of 0.
    const float shift = best == -INFINITY ? 0 : best;
    const float temperature = temperatures[row] > 0 ? temperatures[row] : 1;
    float sum = 0, mass = 0;
#pragma unroll  // `values` stays in registers
    for (int i = 0; i < EACH; ++i) {
        sum += expf(values[i] - shift);
        mass += expf((values[i] - shift) / temperature);
    }
    sum = reduce_block(sum, scratch, [](float a, float b) { return added(a, b); });
    mass = reduce_block(mass, scratch, [](float a, float b) { return added(a, b); });
    if (threadIdx.x == 0) {
        chunk_max[out] = best;
        chunk_sum[out] = sum;
        chunk_mass[out] = mass;
    }
}

__global__ void __launch_bounds__(THREADS)
draw(const float* logits, int64_t row_stride, int vocab, int num_chunks, const float* temperatures,
     const int64_t* top_ks, const float* top_ps, const int64_t* seeds, const int64_t* positions,
     const float* chunk_maxima, const float* chunk_sums, const float* chunk_masses, int64_t* tokens, float* logprobs) {
    __shared__ Scratch scratch;
    const int64_t row = blockIdx.x;
    const Values whole_row{logits + row * row_stride, vocab};
    const Values chunks{chunk_maxima + row * num_chunks, num_chunks};
    const bool greedy = temperatures[row] == 0;
    const float temperature = greedy ? 1 : temperatures[row];

    float best = -INFINITY, sum = 0, weight = 0;
    for (int i = threadIdx.x; i < num_chunks; i += THREADS) best = fmaxf(best, chunks.values[i]);
    best = reduce_block(best, scratch.floats, [](float a, float b) { return larger(a, b); });
    for (int i = threadIdx.x; i < num_chunks; i += THREADS) {
        sum += chunk_sums[row * num_chunks + i] * expf(chunks.values[i] - best);
        weight += chunk_masses[row * num_chunks + i] * expf((chunks.values[i] - best) / temperature);
    }
    sum = reduce_block(sum, scratch.floats, [](float a, float b) { return added(a, b); });
    weight = reduce_block(weight, scratch.floats, [](float a, float b) { return added(a, b); });
    if (!isfinite(best) || isnan(sum)) {  // NaN, +inf, or nothing but -inf
        if (threadIdx.x == 0) {
            tokens[row] = -1;
            logprobs[row] = NAN;
        }
        return;
    }

    const Mass mass{best, temperature};
    Settings settings;
    const int64_t top_k = greedy ? 1 : top_ks[row];
    settings.top_k = top_k < vocab ? int(top_k) : 0;
    settings.top_p = greedy ? 1 : top_ps[row];
    settings.total_mass = uint64_t(weight * UNITS);
    settings.row_key = mix(mix(seeds[row] + GOLDEN) + positions[row] * GOLDEN);

    uint32_t bound = 0;  // an ordered logit below which no token is kept
    if (settings.top_k) {
        bound = cutoff(scratch, chunks, One{}, settings.top_k) >> 32;
    } else if (settings.top_p < 1) {
        bound = cutoff(scratch, chunks, mass, share_of(settings.total_mass, settings.top_p)) >> 32;
        const float least = 0.9f * (1 - settings.top_p) * weight / vocab;  // 0.9: weight is a rounded sum
        bound = max(bound, ordered(best + temperature * logf(least)));
    }
    if (bound) {
        if (threadIdx.x == 0) scratch.count = 0;
        __syncthreads();
        for (int chunk = threadIdx.x / 32; chunk < num_chunks; chunk += WARPS) {
            if (ordered(chunks.values[chunk]) < bound) continue;
            const int end = min(vocab, (chunk + 1) * CHUNK);
            for (int i = chunk * CHUNK + threadIdx.x % 32; i < end; i += 32) {
                const uint64_t rank = whole_row[i];
                if (rank >> 32 < bound) continue;
                const int place = atomicAdd(&scratch.count, 1);
                if (place < CAPACITY) scratch.candidates[place] = rank;
            }
        }
        __syncthreads();
    }
    const bool few = bound && scratch.count <= CAPACITY;
    const uint32_t id = few ? choose(scratch, Candidates{scratch.candidates, scratch.count}, mass, settings)
                            : choose(scratch, whole_row, mass, settings);
    if (threadIdx.x == 0) {
        tokens[row] = id;
        logprobs[row] = whole_row.values[id] - best - logf(sum);
    }
}

}  // namespace

// Floats of workspace that `thinksafe_sample` needs.
extern "C" int64_t thinksafe_sample_workspace(int64_t rows, int64_t vocab) {
    return 3 * rows * ((vocab + CHUNK - 1) / CHUNK);
}

// Enqueue one draw a row; kernels/sampling.py documents the arguments. Returns a cudaError_t.
extern "C" int thinksafe_sample(const float* logits, int64_t row_stride, int64_t rows, int64_t vocab,
                                const float* temperatures, const int64_t* top_ks, const float* top_ps,
                                const int64_t* seeds, const int64_t* positions, float* workspace, int64_t* tokens,
                                float* logprobs, cudaStream_t stream) {
    if (rows == 0) return 0;
    const int num_chunks = int((vocab + CHUNK - 1) / CHUNK);
    float *chunk_max = workspace, *chunk_sum = chunk_max + rows * num_chunks, *chunk_mass = chunk_sum + rows * num_chunks;
    LAUNCH(measure, dim3(num_chunks, rows), MEASURE_THREADS, stream, logits, row_stride, int(vocab), temperatures,
           chunk_max, chunk_sum, chunk_mass);
    LAUNCH(draw, dim3(rows), THREADS, stream, logits, row_stride, int(vocab), num_chunks, temperatures, top_ks, top_ps,
           seeds, positions, chunk_max, chunk_sum, chunk_mass, tokens, logprobs);
    return cudaGetLastError();
}
