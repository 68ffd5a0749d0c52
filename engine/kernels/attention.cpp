// Paged attention on CPU; `engine/attention/torch_paged.py` is its reference.
//
// Every query's arithmetic is one fixed sequence of operations over its own keys: chunks of 64 keys
// at absolute positions, each key's dot product in one order, an online softmax from chunk to chunk.
// Nothing depends on which other queries are in the call, so a token gets the same bits alone or in
// a batch, in one prefill chunk or in many, from fresh memory or from the prefix cache.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__)
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_CPU
#endif
#define INLINE inline __attribute__((always_inline))

namespace {

constexpr int kLanes = 8;
constexpr int kChunk = 64;      // keys per softmax chunk
constexpr int kQueries = 16;    // queries that share a pass over keys and values
constexpr int kMaxDim = 256;
constexpr float kNegInf = -INFINITY;

typedef float Vec __attribute__((vector_size(32)));
typedef float QuadVec __attribute__((vector_size(16)));
typedef int32_t IntVec __attribute__((vector_size(32)));
typedef uint16_t HalfVec __attribute__((vector_size(16)));
typedef uint32_t WordVec __attribute__((vector_size(32)));

struct BFloat16 {
    uint16_t bits;
};

INLINE Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

INLINE Vec load(const BFloat16* p) {
    HalfVec half;
    std::memcpy(&half, p, sizeof half);
    WordVec words = __builtin_convertvector(half, WordVec) << 16;
    return (Vec)words;
}

INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

INLINE void store(BFloat16* p, Vec v) {
    WordVec words = (WordVec)v;
    words += 0x7fff + ((words >> 16) & 1);  // round to nearest, ties to even
    HalfVec half = __builtin_convertvector(words >> 16, HalfVec);
    std::memcpy(p, &half, sizeof half);
}

INLINE Vec splat(float x) { return Vec{x, x, x, x, x, x, x, x}; }

INLINE QuadVec halves(Vec v) {
    QuadVec low, high;
    std::memcpy(&low, &v, sizeof low);
    std::memcpy(&high, (const char*)&v + sizeof low, sizeof high);
    return low + high;
}

// The sums of four vectors, each ((0+4)+(2+6)) + ((1+5)+(3+7)).
INLINE QuadVec sum4(Vec a, Vec b, Vec c, Vec d) {
    const QuadVec qa = halves(a), qb = halves(b), qc = halves(c), qd = halves(d);
    const QuadVec ab = __builtin_shufflevector(qa, qb, 0, 4, 1, 5) +
                       __builtin_shufflevector(qa, qb, 2, 6, 3, 7);
    const QuadVec cd = __builtin_shufflevector(qc, qd, 0, 4, 1, 5) +
                       __builtin_shufflevector(qc, qd, 2, 6, 3, 7);
    return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) +
           __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

INLINE float sum(Vec v) { return sum4(v, v, v, v)[0]; }

// exp for x <= 0, within 2 ulp; 0 below -87.
INLINE Vec exp_negative(Vec x) {
    const Vec low = splat(-87.0f);
    const IntVec alive = x > low;
    x = alive ? x : low;
    const Vec shifted = x * splat(1.44269504f) + splat(12582912.0f);  // rounds to an integer
    const Vec n = shifted - splat(12582912.0f);
    Vec r = x - n * splat(0.693359375f);
    r = r + n * splat(2.12194440e-4f);
    Vec p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    p = p * r * r + r + splat(1.0f);
    const IntVec exponent = (__builtin_convertvector(n, IntVec) + 127) << 23;
    const Vec value = p * (Vec)exponent;
    return alive ? value : splat(0.0f);
}

}  // namespace

// Where one sequence's rows of this step are, and its blocks.
struct Span {
    int64_t first_row;    // in q and out
    int64_t num_rows;
    int64_t start;        // the position of the first row
    int64_t first_block;  // in `blocks`
};

struct Args {
    const void* q;        // [T, Hq, D], rows `q_stride` elements apart
    const void* k;        // [T, Hkv, D], this step's keys, rows `k_stride` apart
    const void* v;        // [T, Hkv, Dv], this step's values, rows `v_stride` apart
    void* keys;           // [N, Hkv, block, D], the cache
    void* values;         // [N, Hkv, block, Dv]
    void* out;            // [T, Hq, Dv]
    const Span* spans;
    const int64_t* blocks;
    int64_t q_stride, k_stride, v_stride;
    int64_t num_spans, heads, kv_heads, dim, value_dim, block_size, window;  // window 0: none
    float scale;
};

namespace {

struct Tile {
    const Span* span;
    int64_t kv_head, first, count;  // rows [first, first + count) of the span
};

// What a tile's queries have accumulated so far.
struct State {
    float q[kQueries][kMaxDim];
    float acc[kQueries][kMaxDim];
    float scores[kQueries][kChunk];
    float best[kQueries];
    float total[kQueries];
    int64_t position[kQueries];
};

// Scores of N queries against a chunk's keys, four keys at a time.
template <int N, class T>
INLINE void score(const T* const* keys, int count, int dim, const float (*q)[kMaxDim],
                  float (*scores)[kChunk]) {
    for (int j = 0; j < count; j += 4) {
        const T* k[4];
        for (int n = 0; n < 4; ++n) k[n] = keys[std::min(j + n, count - 1)];
        Vec sums[N][4] = {};
        for (int d = 0; d < dim; d += kLanes) {
            Vec x[N];
            for (int i = 0; i < N; ++i) x[i] = load(q[i] + d);
            for (int n = 0; n < 4; ++n) {
                const Vec key = load(k[n] + d);
                for (int i = 0; i < N; ++i) sums[i][n] += x[i] * key;
            }
        }
        for (int i = 0; i < N; ++i) {
            const QuadVec four = sum4(sums[i][0], sums[i][1], sums[i][2], sums[i][3]);
            std::memcpy(scores[i] + j, &four, sizeof four);  // past `count`: masked later
        }
    }
}

// acc += weights x values for N queries, two vectors of each value at a time.
template <int N, class T>
INLINE void gather(const T* const* values, int count, int dim, const float (*weights)[kChunk],
                   float (*acc)[kMaxDim]) {
    for (int d = 0; d < dim; d += 2 * kLanes) {
        const bool second = d + kLanes < dim;
        Vec sums[N][2];
        for (int i = 0; i < N; ++i) {
            sums[i][0] = load(acc[i] + d);
            sums[i][1] = second ? load(acc[i] + d + kLanes) : splat(0);
        }
        for (int j = 0; j < count; ++j) {
            const Vec a = load(values[j] + d);
            const Vec b = second ? load(values[j] + d + kLanes) : a;
            for (int i = 0; i < N; ++i) {
                const Vec w = splat(weights[i][j]);
                sums[i][0] += w * a;
                sums[i][1] += w * b;
            }
        }
        for (int i = 0; i < N; ++i) {
            store(acc[i] + d, sums[i][0]);
            if (second) store(acc[i] + d + kLanes, sums[i][1]);
        }
    }
}

// One chunk's scores to weights, in place; what came before is rescaled to the new maximum.
INLINE void soften(State& s, int i, int64_t first, int count, int dim, int64_t window) {
    const int64_t end = s.position[i] + 1;
    const int64_t begin = window > 0 ? std::max<int64_t>(end - window, 0) : 0;
    float* scores = s.scores[i];
    const int low = (int)std::max<int64_t>(begin - first, 0);
    const int high = (int)std::min<int64_t>(end - first, count);
    for (int j = 0; j < std::min(low, kChunk); ++j) scores[j] = kNegInf;
    for (int j = std::max(high, 0); j < kChunk; ++j) scores[j] = kNegInf;
    Vec top = load(scores);
    for (int j = kLanes; j < kChunk; j += kLanes) {
        const Vec x = load(scores + j);
        top = x > top ? x : top;
    }
    float best = s.best[i];
    for (int lane = 0; lane < kLanes; ++lane) best = std::max(best, top[lane]);
    if (best == kNegInf) {  // nothing of this chunk is visible, nor was any before
        std::memset(scores, 0, sizeof s.scores[i]);
        return;
    }
    Vec total = splat(0);
    for (int j = 0; j < kChunk; j += kLanes) {
        const Vec w = exp_negative(load(scores + j) - splat(best));
        store(scores + j, w);
        total += w;
    }
    if (s.best[i] != best) {
        const float shrink = s.best[i] == kNegInf ? 0.0f : exp_negative(splat(s.best[i] - best))[0];
        for (int d = 0; d < dim; d += kLanes) store(s.acc[i] + d, load(s.acc[i] + d) * splat(shrink));
        s.total[i] *= shrink;
        s.best[i] = best;
    }
    s.total[i] += sum(total);
}

// The chunk of keys that a tile's first query begins with, and the end of its last query's keys.
INLINE int64_t first_key(const Args& a, const Tile& tile) {
    const int64_t position = tile.span->start + tile.first;
    return a.window > 0 ? std::max<int64_t>(position + 1 - a.window, 0) / kChunk * kChunk : 0;
}

INLINE int64_t last_key(const Tile& tile) { return tile.span->start + tile.first + tile.count; }

// Ask for the keys and values at positions [first, last), which will be read next.
template <class T>
INLINE void prefetch(const Args& a, const Tile& tile, int64_t first, int64_t last) {
    const int64_t size = a.block_size;
    while (first < last) {
        const int64_t block = a.blocks[tile.span->first_block + first / size];
        const int64_t slot = (block * a.kv_heads + tile.kv_head) * size + first % size;
        const int64_t count = std::min(last - first, size - first % size);
        const char* keys = (const char*)((const T*)a.keys + slot * a.dim);
        const char* values = (const char*)((const T*)a.values + slot * a.value_dim);
        const int64_t bytes = count * (int64_t)sizeof(T);
        for (int64_t at = 0; at < bytes * a.dim; at += 64) __builtin_prefetch(keys + at, 0, 2);
        for (int64_t at = 0; at < bytes * a.value_dim; at += 64)
            __builtin_prefetch(values + at, 0, 2);
        first += count;
    }
}

template <class T>
INLINE void attend(const Args& a, const Tile& tile, const Tile* next) {
    State s;
    const Span& span = *tile.span;
    const int dim = (int)a.dim, value_dim = (int)a.value_dim;
    const int64_t group = a.heads / a.kv_heads;
    const int num_queries = (int)(tile.count * group);
    for (int i = 0; i < num_queries; ++i) {
        const int64_t row = tile.first + i / group;
        const int64_t head = tile.kv_head * group + i % group;
        const T* q = (const T*)a.q + (span.first_row + row) * a.q_stride + head * dim;
        for (int d = 0; d < dim; d += kLanes) store(s.q[i] + d, load(q + d) * splat(a.scale));
        std::memset(s.acc[i], 0, sizeof(float) * value_dim);
        s.best[i] = kNegInf;
        s.total[i] = 0;
        s.position[i] = span.start + row;
    }
    const int64_t end = last_key(tile);
    const T* keys[kChunk];
    const T* values[kChunk];
    for (int64_t first = first_key(a, tile); first < end; first += kChunk) {
        const int count = (int)std::min<int64_t>(kChunk, end - first);
        for (int j = 0; j < count; ++j) {
            const int64_t position = first + j;
            const int64_t block = a.blocks[span.first_block + position / a.block_size];
            const int64_t slot = (block * a.kv_heads + tile.kv_head) * a.block_size + position % a.block_size;
            keys[j] = (const T*)a.keys + slot * dim;
            values[j] = (const T*)a.values + slot * value_dim;
        }
        if (first + kChunk < end)
            prefetch<T>(a, tile, first + kChunk, std::min(first + 2 * kChunk, end));
        else if (next)
            prefetch<T>(a, *next, first_key(a, *next), std::min(first_key(a, *next) + kChunk, last_key(*next)));
        int i = 0;
        for (; i + 3 <= num_queries; i += 3) score<3>(keys, count, dim, s.q + i, s.scores + i);
        for (; i < num_queries; ++i) score<1>(keys, count, dim, s.q + i, s.scores + i);
        for (i = 0; i < num_queries; ++i) soften(s, i, first, count, value_dim, a.window);
        for (i = 0; i + 4 <= num_queries; i += 4)
            gather<4>(values, count, value_dim, s.scores + i, s.acc + i);
        for (; i + 3 <= num_queries; i += 3)
            gather<3>(values, count, value_dim, s.scores + i, s.acc + i);
        for (; i < num_queries; ++i) gather<1>(values, count, value_dim, s.scores + i, s.acc + i);
    }
    for (int i = 0; i < num_queries; ++i) {
        const int64_t row = span.first_row + tile.first + i / group;
        T* out = (T*)a.out + (row * a.heads + tile.kv_head * group + i % group) * value_dim;
        for (int d = 0; d < value_dim; d += kLanes)
            store(out + d, load(s.acc[i] + d) * splat(1.0f / s.total[i]));
    }
}

FOR_EACH_CPU void attend_float32(const Args& a, const Tile& tile, const Tile* next) {
    attend<float>(a, tile, next);
}

FOR_EACH_CPU void attend_bfloat16(const Args& a, const Tile& tile, const Tile* next) {
    attend<BFloat16>(a, tile, next);
}

void write(const Args& a, const Span& span, int64_t bytes) {
    for (int64_t row = 0; row < span.num_rows; ++row) {
        const int64_t position = span.start + row;
        const int64_t block = a.blocks[span.first_block + position / a.block_size];
        const char* k = (const char*)a.k + (span.first_row + row) * a.k_stride * bytes;
        const char* v = (const char*)a.v + (span.first_row + row) * a.v_stride * bytes;
        for (int64_t head = 0; head < a.kv_heads; ++head) {
            const int64_t slot = (block * a.kv_heads + head) * a.block_size + position % a.block_size;
            std::memcpy((char*)a.keys + slot * a.dim * bytes, k + head * a.dim * bytes, a.dim * bytes);
            std::memcpy((char*)a.values + slot * a.value_dim * bytes,
                        v + head * a.value_dim * bytes, a.value_dim * bytes);
        }
    }
}

}  // namespace

// Write this step's keys and values into the cache, then attend to everything before each token.
// `bytes` is the size of an element: 4 float32, 2 bfloat16. Returns false, having done nothing, for
// shapes it cannot do: dimensions must be multiples of 8, at most 256, and at most 16 query heads
// may share a key-value head.
extern "C" bool logitmill_attend(const Args* args, int64_t bytes) {
    const Args& a = *args;
    const int64_t group = a.heads / a.kv_heads;
    if (a.dim % kLanes || a.value_dim % kLanes || a.dim > kMaxDim || a.value_dim > kMaxDim) return false;
    if (group > kQueries || (bytes != 2 && bytes != 4)) return false;
    const int64_t rows = kQueries / group;
    std::vector<Tile> tiles;
    for (int64_t i = 0; i < a.num_spans; ++i) {
        write(a, a.spans[i], bytes);
        for (int64_t first = 0; first < a.spans[i].num_rows; first += rows)
            for (int64_t head = 0; head < a.kv_heads; ++head)
                tiles.push_back({a.spans + i, head, first, std::min(rows, a.spans[i].num_rows - first)});
    }
    const int64_t num_tiles = (int64_t)tiles.size();
#pragma omp parallel for schedule(guided)
    for (int64_t i = 0; i < num_tiles; ++i) {
        const Tile* next = i + 1 < num_tiles ? &tiles[i + 1] : nullptr;
        if (bytes == 4) attend_float32(a, tiles[i], next);
        else attend_bfloat16(a, tiles[i], next);
    }
    return true;
}
