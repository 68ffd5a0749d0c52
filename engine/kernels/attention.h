// Paged attention; `engine/attention/torch_paged.py` is its reference.
//
// Every query's arithmetic is one fixed sequence of operations over its own keys: chunks of 64 keys
// at absolute positions, each key's dot product in one order, an online softmax from chunk to chunk.
// Nothing depends on which other queries are in the call, so a token gets the same bits alone or in
// a batch, in one prefill chunk or in many, from fresh memory or from the prefix cache.

constexpr int kChunk = 64;    // keys per softmax chunk
constexpr int kQueries = 16;  // queries that share a pass over keys and values
constexpr int kMaxDim = 256;
#if ISA == 512
constexpr int kWidth = 4;  // vectors of a value that are accumulated at a time
#else
constexpr int kWidth = 2;
#endif

typedef float QuadVec __attribute__((vector_size(16)));

INLINE QuadVec quarter(Vec v) {
    QuadVec q[4];
    std::memcpy(q, &v, sizeof q);
    return (q[0] + q[2]) + (q[1] + q[3]);
}

// The sums of four vectors.
INLINE QuadVec sum4(Vec a, Vec b, Vec c, Vec d) {
    const QuadVec qa = quarter(a), qb = quarter(b), qc = quarter(c), qd = quarter(d);
    const QuadVec ab = __builtin_shufflevector(qa, qb, 0, 4, 1, 5) +
                       __builtin_shufflevector(qa, qb, 2, 6, 3, 7);
    const QuadVec cd = __builtin_shufflevector(qc, qd, 0, 4, 1, 5) +
                       __builtin_shufflevector(qc, qd, 2, 6, 3, 7);
    return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) +
           __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

struct Tile {
    const Span* span;
    int64_t kv_head, first, count;  // rows [first, first + count) of the span
};

// What a tile's queries have accumulated so far.
struct State {
    alignas(64) float q[kQueries][kMaxDim];
    alignas(64) float acc[kQueries][kMaxDim];
    alignas(64) float scores[kQueries][kChunk];
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
        for (int n = 0; n < 4; ++n) k[n] = keys[smaller(j + n, count - 1)];
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

// acc += weights x values for N queries, W vectors of each value at a time.
template <int N, int W, class T>
INLINE void gather(const T* const* values, int count, int d, const float (*weights)[kChunk],
                   float (*acc)[kMaxDim]) {
    Vec sums[N][W];
    for (int i = 0; i < N; ++i)
        for (int w = 0; w < W; ++w) sums[i][w] = load(acc[i] + d + w * kLanes);
    for (int j = 0; j < count; ++j) {
        Vec v[W];
        for (int w = 0; w < W; ++w) v[w] = load(values[j] + d + w * kLanes);
        for (int i = 0; i < N; ++i) {
            const Vec weight = splat(weights[i][j]);
            for (int w = 0; w < W; ++w) sums[i][w] += weight * v[w];
        }
    }
    for (int i = 0; i < N; ++i)
        for (int w = 0; w < W; ++w) store(acc[i] + d + w * kLanes, sums[i][w]);
}

template <int N, class T>
INLINE void gather(const T* const* values, int count, int dim, const float (*weights)[kChunk],
                   float (*acc)[kMaxDim]) {
    int d = 0;
    for (; d + kWidth * kLanes <= dim; d += kWidth * kLanes)
        gather<N, kWidth>(values, count, d, weights, acc);
    for (; d < dim; d += kLanes) gather<N, 1>(values, count, d, weights, acc);
}

// One chunk's scores to weights, in place; what came before is rescaled to the new maximum.
INLINE void soften(State& s, int i, int64_t first, int count, int dim, int64_t window) {
    const int64_t end = s.position[i] + 1;
    const int64_t begin = window > 0 ? larger<int64_t>(end - window, 0) : 0;
    float* scores = s.scores[i];
    const int low = (int)larger<int64_t>(begin - first, 0);
    const int high = (int)smaller<int64_t>(end - first, count);
    for (int j = 0; j < smaller(low, kChunk); ++j) scores[j] = kNegInf;
    for (int j = larger(high, 0); j < kChunk; ++j) scores[j] = kNegInf;
    Vec top = load(scores);
    for (int j = kLanes; j < kChunk; j += kLanes) top = max(top, load(scores + j));
    const float best = larger(s.best[i], largest(top));
    if (best == kNegInf) {  // nothing of this chunk is visible, nor was any before
        std::memset(scores, 0, sizeof s.scores[i]);
        return;
    }
    Vec total = splat(0);
    for (int j = 0; j < kChunk; j += kLanes) {
        const Vec w = exp_negative(load(scores + j) - best);
        store(scores + j, w);
        total += w;
    }
    if (s.best[i] != best) {
        const float shrink = s.best[i] == kNegInf ? 0.0f : exp_negative(splat(s.best[i] - best))[0];
        for (int d = 0; d < dim; d += kLanes) store(s.acc[i] + d, load(s.acc[i] + d) * shrink);
        s.total[i] *= shrink;
        s.best[i] = best;
    }
    s.total[i] += sum(total);
}

// The chunk of keys that a tile's first query begins with, and the end of its last query's keys.
INLINE int64_t first_key(const Attention& a, const Tile& tile) {
    const int64_t position = tile.span->start + tile.first;
    return a.window > 0 ? larger<int64_t>(position + 1 - a.window, 0) / kChunk * kChunk : 0;
}

INLINE int64_t last_key(const Tile& tile) { return tile.span->start + tile.first + tile.count; }

INLINE int64_t slot(const Attention& a, const Span& span, int64_t kv_head, int64_t position) {
    const int64_t block = a.blocks[span.first_block + position / a.block_size];
    return (block * a.kv_heads + kv_head) * a.block_size + position % a.block_size;
}

// Ask for the keys and values at positions [first, last), which will be read next.
template <class T>
INLINE void prefetch(const Attention& a, const Tile& tile, int64_t first, int64_t last) {
    while (first < last) {
        const int64_t at = slot(a, *tile.span, tile.kv_head, first);
        const int64_t count = smaller(last - first, a.block_size - first % a.block_size);
        const char* keys = (const char*)((const T*)a.keys + at * a.dim);
        const char* values = (const char*)((const T*)a.values + at * a.value_dim);
        const int64_t bytes = count * (int64_t)sizeof(T);
        for (int64_t i = 0; i < bytes * a.dim; i += 64) __builtin_prefetch(keys + i, 0, 2);
        for (int64_t i = 0; i < bytes * a.value_dim; i += 64) __builtin_prefetch(values + i, 0, 2);
        first += count;
    }
}

// Attend from a tile's queries. `query(row, head)` gives a query's D numbers of type Q, `done(row,
// head, acc, factor)` takes its result, acc · factor.
template <class Q, class T, class Query, class Done>
INLINE void attend(const Attention& a, const Tile& tile, const Tile* next, Query query, Done done) {
    State s;
    const Span& span = *tile.span;
    const int dim = (int)a.dim, value_dim = (int)a.value_dim;
    const int64_t group = a.heads / a.kv_heads;
    const int num_queries = (int)(tile.count * group);
    for (int i = 0; i < num_queries; ++i) {
        const int64_t row = tile.first + i / group;
        const Q* q = query(span.first_row + row, tile.kv_head * group + i % group);
        for (int d = 0; d < dim; d += kLanes) store(s.q[i] + d, load(q + d) * a.scale);
        std::memset(s.acc[i], 0, sizeof(float) * value_dim);
        s.best[i] = kNegInf;
        s.total[i] = 0;
        s.position[i] = span.start + row;
    }
    const int64_t end = last_key(tile);
    const T* keys[kChunk];
    const T* values[kChunk];
    for (int64_t first = first_key(a, tile); first < end; first += kChunk) {
        const int count = (int)smaller<int64_t>(kChunk, end - first);
        for (int j = 0; j < count; ++j) {
            const int64_t at = slot(a, span, tile.kv_head, first + j);
            keys[j] = (const T*)a.keys + at * dim;
            values[j] = (const T*)a.values + at * value_dim;
        }
        if (first + kChunk < end) {
            prefetch<T>(a, tile, first + kChunk, smaller(first + 2 * kChunk, end));
        } else if (next) {
            const int64_t begin = first_key(a, *next);
            prefetch<T>(a, *next, begin, smaller(begin + kChunk, last_key(*next)));
        }
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
        done(row, tile.kv_head * group + i % group, s.acc[i], 1.0f / s.total[i]);
    }
}

// The tiles of all spans, in order; returns how many there are, filling `tiles` unless it is null.
INLINE int64_t make_tiles(const Attention& a, Tile* tiles) {
    const int64_t rows = larger<int64_t>(kQueries / (a.heads / a.kv_heads), 1);
    int64_t n = 0;
    for (int64_t i = 0; i < a.num_spans; ++i) {
        const Span& span = a.spans[i];
        for (int64_t first = 0; first < span.num_rows; first += rows) {
            for (int64_t head = 0; head < a.kv_heads; ++head, ++n) {
                if (tiles) tiles[n] = {&span, head, first, smaller(rows, span.num_rows - first)};
            }
        }
    }
    return n;
}

// Write keys and values of type T into the cache. Rows of `k` and `v` are `stride`s apart.
template <class T>
INLINE void write(const Attention& a, const Span& span, const T* k, int64_t k_stride, const T* v,
                  int64_t v_stride) {
    for (int64_t row = 0; row < span.num_rows; ++row) {
        for (int64_t head = 0; head < a.kv_heads; ++head) {
            const int64_t at = slot(a, span, head, span.start + row);
            std::memcpy((T*)a.keys + at * a.dim, k + (span.first_row + row) * k_stride + head * a.dim,
                        a.dim * sizeof(T));
            std::memcpy((T*)a.values + at * a.value_dim,
                        v + (span.first_row + row) * v_stride + head * a.value_dim,
                        a.value_dim * sizeof(T));
        }
    }
}

template <class T>
void attend_all(const AttendArgs& args) {
    const Attention& a = args.attention;
    for (int64_t i = 0; i < a.num_spans; ++i) {
        write<T>(a, a.spans[i], (const T*)args.k, args.k_stride, (const T*)args.v, args.v_stride);
    }
    const int64_t num_tiles = make_tiles(a, nullptr);
    Tile* tiles = (Tile*)std::malloc(num_tiles * sizeof(Tile));
    make_tiles(a, tiles);
#pragma omp parallel for schedule(guided)
    for (int64_t i = 0; i < num_tiles; ++i) {
        attend<T, T>(
            a, tiles[i], i + 1 < num_tiles ? tiles + i + 1 : nullptr,
            [&](int64_t row, int64_t head) INLINE_LAMBDA {
                return (const T*)args.q + row * args.q_stride + head * a.dim;
            },
            [&](int64_t row, int64_t head, const float* acc, float factor) INLINE_LAMBDA {
                T* out = (T*)args.out + (row * a.heads + head) * a.value_dim;
                for (int d = 0; d < a.value_dim; d += kLanes) store(out + d, load(acc + d) * factor);
            });
    }
    std::free(tiles);
}

void attend(const AttendArgs& args, int64_t bytes) {
    if (bytes == 4) attend_all<float>(args);
    else attend_all<BFloat16>(args);
}
