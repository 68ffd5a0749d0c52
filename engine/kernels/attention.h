// Paged attention; `engine/attention/torch_paged.py` is its reference.
//
// Every query's arithmetic is one fixed sequence of operations over its own keys: chunks of 64 keys
// at absolute positions, each key's dot product in one order, an online softmax from chunk to chunk.
// Nothing depends on which other queries are in the call, so a token gets the same bits alone or in
// a batch, in one prefill chunk or in many, from fresh memory or from the prefix cache.
//
// With instructions for products of bfloat16, queries and weights are rounded to that type if keys and
// values have it; sums are always float32.

constexpr int kChunk = 64;    // keys per softmax chunk
constexpr int kQueries = 48;  // queries that share a pass over keys and values
constexpr int kMaxDim = 256;
constexpr int kManySpans = 4;  // for each thread: with so many, a task may be a whole row
#if ISA >= 512
constexpr int kWidth = 4;  // vectors that are accumulated at a time for each query
#else
constexpr int kWidth = 2;
#endif

struct Tile {
    const Span* span;
    int64_t kv_head, kv_heads;  // how many, from this one on
    int64_t first, count;       // rows [first, first + count) of the span
};

// What queries and weights are multiplied as: numbers of the cache's type, if there are instructions
// for them.
template <class T>
struct OperandOf {
    typedef float Type;
};

#if ISA == 513
template <>
struct OperandOf<BFloat16> {
    typedef BFloat16 Type;
};
#endif

// A query's weights for a chunk.
template <class Operand>
using Weights = Operand[kChunk * sizeof(float) / sizeof(Operand)];

// What a tile's queries have accumulated so far.
template <class Operand>
struct State {
    alignas(64) Operand q[kQueries][kMaxDim];
    alignas(64) float acc[kQueries][kMaxDim];  // in pairs of vectors as `split` gives them
    alignas(64) float scores[kQueries][kChunk];  // and in their place the weights
    alignas(64) uint32_t turned[kMaxDim][kChunk];  // a chunk's keys, a column each
    float best[kQueries];
    float total[kQueries];
    int64_t position[kQueries];
};

// Where a chunk's keys and values are, each D numbers behind one another.
template <class T>
struct Chunk {
    const T* keys[kChunk];
    const T* values[kChunk];
    int count;
};

// Memory that will be read next. It is asked for in small portions between the work on what is here:
// more at once than a core has room to wait for would hold up that work.
struct Ahead {
    const char* first[2 * kChunk + 1];
    const char* last[2 * kChunk];
    const char* at;
    int num_runs, run, num_lines, pace;

    INLINE void clear() { num_runs = run = num_lines = 0; }

    INLINE void add(const void* from, int64_t bytes) {
        if (num_runs == 0) at = (const char*)from;
        first[num_runs] = (const char*)from;
        last[num_runs++] = (const char*)from + bytes;
        num_lines += (int)(bytes / 64);
        first[num_runs] = nullptr;
    }

    // It will be asked for about so many lines: at a pace at which that is all.
    INLINE void expect(int lines) { pace = (num_lines + lines - 1) / lines; }

    INLINE void ask(int lines) {
        for (lines *= pace; lines > 0 && run < num_runs; --lines) {
            __builtin_prefetch(at, 0, 2);
            at += 64;
            if (at >= last[run]) at = first[++run];
        }
    }
};

// Two vectors from memory: of floats the first 16 and the next, of the shorter type, which comes in
// pairs of one word, the even ones and the odd ones.
INLINE void split(const float* p, Vec& a, Vec& b) {
    a = load(p);
    b = load(p + kLanes);
}

INLINE void split(const BFloat16* p, Vec& a, Vec& b) {
    WordVec words;
    std::memcpy(&words, p, sizeof words);
    a = (Vec)(words << 16);
    b = (Vec)(words & 0xffff0000);
}

// What `split` has separated, in order again.
INLINE void join(const float*, Vec&, Vec&) {}

INLINE void join(const BFloat16*, Vec& a, Vec& b) {
    const Vec even = a, odd = b;
    a = __builtin_shufflevector(even, odd, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    b = __builtin_shufflevector(even, odd, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}

// A block of H x H words beside the diagonal and the one across it change places.
template <int H, int... I>
INLINE void exchange(WordVec& a, WordVec& b, std::integer_sequence<int, I...>) {
    const WordVec upper = a;
    a = __builtin_shufflevector(upper, b, (I & H ? kLanes + I - H : I)...);
    b = __builtin_shufflevector(upper, b, (I & H ? kLanes + I : I + H)...);
}

template <int H>
INLINE void exchange(WordVec* rows) {
    for (int i = 0; i < kLanes; ++i) {
        if (!(i & H)) exchange<H>(rows[i], rows[i + H], std::make_integer_sequence<int, kLanes>());
    }
}

// The words of `count` keys, number j to column j. Columns up to a multiple of 16 get some key's.
template <class T>
INLINE void turn(const T* const* keys, int count, int dim, uint32_t (*turned)[kChunk], Ahead& ahead) {
    const int num_words = dim * (int)sizeof(T) / 4;
    for (int j = 0; j < count; j += kLanes) {
        const uint32_t* words[kLanes];
        for (int i = 0; i < kLanes; ++i) words[i] = (const uint32_t*)keys[smaller(j + i, count - 1)];
        int w = 0;
        for (; ISA >= 512 && w + kLanes <= num_words; w += kLanes) {
            WordVec rows[kLanes];
            ahead.ask(8);
            for (int i = 0; i < kLanes; ++i) std::memcpy(rows + i, words[i] + w, sizeof rows[i]);
            exchange<8>(rows);
            exchange<4>(rows);
            exchange<2>(rows);
            exchange<1>(rows);
            for (int i = 0; i < kLanes; ++i) std::memcpy(turned[w + i] + j, rows + i, sizeof rows[i]);
        }
        for (; w < num_words; ++w) {
            for (int i = 0; i < kLanes; ++i) turned[w][j + i] = words[i][w];
        }
    }
}

// Scores of N queries against W vectors of keys.
template <int N, int W>
INLINE void score(const float*, const uint32_t (*turned)[kChunk], int dim, const float (*q)[kMaxDim],
                  float (*scores)[kChunk], Ahead& ahead) {
    Vec sums[N][W] = {};
    for (int d = 0; d < dim; ++d) {
        ahead.ask(2);
        for (int w = 0; w < W; ++w) {
            const Vec key = load((const float*)turned[d] + w * kLanes);
            for (int i = 0; i < N; ++i) sums[i][w] += key * q[i][d];
        }
    }
    for (int i = 0; i < N; ++i)
        for (int w = 0; w < W; ++w) store(scores[i] + w * kLanes, sums[i][w]);
}

template <int N, int W>
INLINE void score(const BFloat16*, const uint32_t (*turned)[kChunk], int dim, const float (*q)[kMaxDim],
                  float (*scores)[kChunk], Ahead& ahead) {
    Vec sums[N][W] = {};
    for (int d = 0; d < dim; d += 2) {
        ahead.ask(W);
        for (int w = 0; w < W; ++w) {
            Vec even, odd;
            split((const BFloat16*)(turned[d / 2] + w * kLanes), even, odd);
            for (int i = 0; i < N; ++i) sums[i][w] += even * q[i][d];
            for (int i = 0; i < N; ++i) sums[i][w] += odd * q[i][d + 1];
        }
    }
    for (int i = 0; i < N; ++i)
        for (int w = 0; w < W; ++w) store(scores[i] + w * kLanes, sums[i][w]);
}

#if ISA == 513
INLINE uint32_t pair_at(const BFloat16* p) {
    uint32_t pair;
    std::memcpy(&pair, p, sizeof pair);
    return pair;
}

template <int N, int W>
INLINE void score(const BFloat16*, const uint32_t (*turned)[kChunk], int dim,
                  const BFloat16 (*q)[kMaxDim], float (*scores)[kChunk], Ahead& ahead) {
    Vec sums[N][W] = {};
    for (int d = 0; d < dim; d += 2) {
        ahead.ask(W);
        for (int w = 0; w < W; ++w) {
            const WordVec key = (WordVec)load((const float*)turned[d / 2] + w * kLanes);
            for (int i = 0; i < N; ++i) sums[i][w] = dot2(sums[i][w], key, pair_at(q[i] + d));
        }
    }
    for (int i = 0; i < N; ++i)
        for (int w = 0; w < W; ++w) store(scores[i] + w * kLanes, sums[i][w]);
}
#endif

template <int N, class T, class Operand>
INLINE void score(const uint32_t (*turned)[kChunk], int count, int dim, const Operand (*q)[kMaxDim],
                  float (*scores)[kChunk], Ahead& ahead) {
    int j = 0;
    auto at = [&] { return (const uint32_t (*)[kChunk])(turned[0] + j); };
    auto to = [&] { return (float (*)[kChunk])(scores[0] + j); };
    for (; j + (kWidth - 1) * kLanes < count; j += kWidth * kLanes)
        score<N, kWidth>((const T*)nullptr, at(), dim, q, to(), ahead);
    for (; j < count; j += kLanes) score<N, 1>((const T*)nullptr, at(), dim, q, to(), ahead);
}

// acc += weights x values for N queries, W pairs of vectors of each value at a time.
template <int N, int W, class T>
INLINE void gather(const T* const* values, int count, int d, const float (*weights)[kChunk],
                   float (*acc)[kMaxDim], Ahead& ahead) {
    Vec sums[N][2 * W];
    for (int i = 0; i < N; ++i)
        for (int w = 0; w < 2 * W; ++w) sums[i][w] = load(acc[i] + d + w * kLanes);
    for (int j = 0; j < count; ++j) {
        ahead.ask(W);
        Vec v[2 * W];
        for (int w = 0; w < W; ++w) split(values[j] + d + 2 * w * kLanes, v[2 * w], v[2 * w + 1]);
        for (int i = 0; i < N; ++i) {
            const Vec weight = splat(weights[i][j]);
            for (int w = 0; w < 2 * W; ++w) sums[i][w] += weight * v[w];
        }
    }
    for (int i = 0; i < N; ++i)
        for (int w = 0; w < 2 * W; ++w) store(acc[i] + d + w * kLanes, sums[i][w]);
}

// The same for one vector of each value.
template <int N, class T, class Operand>
INLINE void gather_last(const T* const* values, int count, int d, const Weights<Operand>* weights,
                        float (*acc)[kMaxDim]) {
    Vec sums[N];
    for (int i = 0; i < N; ++i) sums[i] = load(acc[i] + d);
    for (int j = 0; j < count; ++j) {
        const Vec v = load(values[j] + d);
        for (int i = 0; i < N; ++i) sums[i] += v * number(weights[i][j]);
    }
    for (int i = 0; i < N; ++i) store(acc[i] + d, sums[i]);
}

#if ISA == 513
// Two values at a time; behind the last comes a weight of 0.
template <int N, int W>
INLINE void gather(const BFloat16* const* values, int count, int d, const Weights<BFloat16>* weights,
                   float (*acc)[kMaxDim], Ahead& ahead) {
    Vec sums[N][2 * W];
    for (int i = 0; i < N; ++i)
        for (int w = 0; w < 2 * W; ++w) sums[i][w] = load(acc[i] + d + w * kLanes);
    for (int j = 0; j < count; j += 2) {
        ahead.ask(2 * W);
        const BFloat16 *first = values[j] + d, *second = values[smaller(j + 1, count - 1)] + d;
        WordVec pairs[2 * W];
        for (int w = 0; w < W; ++w) {
            WordVec a, b;
            std::memcpy(&a, first + 2 * w * kLanes, sizeof a);
            std::memcpy(&b, second + 2 * w * kLanes, sizeof b);
            pairs[2 * w] = (a & 0xffff) | b << 16;
            pairs[2 * w + 1] = a >> 16 | (b & 0xffff0000);
        }
        for (int i = 0; i < N; ++i) {
            const uint32_t weight = pair_at(weights[i] + j);
            for (int w = 0; w < 2 * W; ++w) sums[i][w] = dot2(sums[i][w], pairs[w], weight);
        }
    }
    for (int i = 0; i < N; ++i)
        for (int w = 0; w < 2 * W; ++w) store(acc[i] + d + w * kLanes, sums[i][w]);
}
#endif

template <int N, class T, class Operand>
INLINE void gather(const T* const* values, int count, int dim, const Weights<Operand>* weights,
                   float (*acc)[kMaxDim], Ahead& ahead) {
    int d = 0;
    for (; d + kWidth * kLanes <= dim; d += kWidth * kLanes)
        gather<N, kWidth / 2>(values, count, d, weights, acc, ahead);
    for (; d + 2 * kLanes <= dim; d += 2 * kLanes) gather<N, 1>(values, count, d, weights, acc, ahead);
    for (; d < dim; d += kLanes) gather_last<N, T, Operand>(values, count, d, weights, acc);
}

// All of a chunk's weights, as they are stored.
INLINE Vec total_of(const float* weights) {
    Vec total = splat(0);
    for (int j = 0; j < kChunk; j += kLanes) total += load(weights + j);
    return total;
}

#if ISA == 513
INLINE Vec total_of(const BFloat16* weights) {
    Vec total = splat(0);
    for (int j = 0; j < kChunk; j += 2 * kLanes) {
        const WordVec pairs = (WordVec)load((const float*)(weights + j));
        total = dot2(total, pairs, 0x3f803f80);  // times 1
    }
    return total;
}
#endif

// One chunk's scores to weights, in place; what came before is rescaled to the new maximum.
template <class Operand>
INLINE void soften(State<Operand>& s, int i, int64_t first, int count, int dim, int64_t window) {
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
    Operand* weights = (Operand*)scores;
    for (int j = 0; j < kChunk; j += kLanes) store(weights + j, exp_negative(load(scores + j) - best));
    if (s.best[i] != best) {
        const float shrink = s.best[i] == kNegInf ? 0.0f : exp_negative(splat(s.best[i] - best))[0];
        for (int d = 0; d < dim; d += kLanes) store(s.acc[i] + d, load(s.acc[i] + d) * shrink);
        s.total[i] *= shrink;
        s.best[i] = best;
    }
    s.total[i] += sum(total_of(weights));
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

// The chunk of one of a tile's heads that begins at position `first`.
template <class T>
INLINE void locate(const Attention& a, const Tile& tile, int64_t head, int64_t first, Chunk<T>& chunk,
                   Ahead& ahead) {
    chunk.count = (int)smaller<int64_t>(kChunk, last_key(tile) - first);
    ahead.clear();
    for (int j = 0; j < chunk.count;) {
        const int64_t at = slot(a, *tile.span, tile.kv_head + head, first + j);
        const int64_t left = a.block_size - (first + j) % a.block_size;
        const int size = (int)smaller<int64_t>(chunk.count - j, left);
        ahead.add((const T*)a.keys + at * a.dim, size * a.dim * sizeof(T));
        ahead.add((const T*)a.values + at * a.value_dim, size * a.value_dim * sizeof(T));
        for (int i = 0; i < size; ++i, ++j) {
            chunk.keys[j] = (const T*)a.keys + (at + i) * a.dim;
            chunk.values[j] = (const T*)a.values + (at + i) * a.value_dim;
        }
    }
}

// Attend from a tile's queries. `query(row, head)` gives a query's D numbers of type Q, `done(row,
// head, acc, factor)` takes its result, acc · factor.
template <class Q, class T, class Query, class Done>
INLINE void attend(const Attention& a, const Tile& tile, const Tile* next, Query query, Done done) {
    typedef typename OperandOf<T>::Type Operand;
    State<Operand> s;
    const Span& span = *tile.span;
    const int dim = (int)a.dim, value_dim = (int)a.value_dim;
    const int64_t group = a.heads / a.kv_heads;
    const int of_head = (int)(tile.count * group), num_queries = (int)tile.kv_heads * of_head;
    auto row_of = [&](int i) INLINE_LAMBDA { return tile.first + i % of_head / group; };
    auto head_of = [&](int i) INLINE_LAMBDA { return (tile.kv_head + i / of_head) * group + i % group; };
    for (int i = 0; i < num_queries; ++i) {
        const int64_t row = row_of(i);
        const Q* q = query(span.first_row + row, head_of(i));
        for (int d = 0; d < dim; d += kLanes) store(s.q[i] + d, load(q + d) * a.scale);
        std::memset(s.acc[i], 0, sizeof(float) * value_dim);
        s.best[i] = kNegInf;
        s.total[i] = 0;
        s.position[i] = span.start + row;
    }
    const Weights<Operand>* weights = (const Weights<Operand>*)s.scores;
    const int64_t end = last_key(tile);
    Chunk<T> chunks[2];
    Ahead ahead;
    int side = 0;
    int64_t head = 0;
    locate(a, tile, 0, first_key(a, tile), chunks[0], ahead);
    for (int64_t first = first_key(a, tile); first < end; side ^= 1) {
        const Chunk<T>& now = chunks[side];
        Chunk<T>& after = chunks[side ^ 1];
        if (head + 1 < tile.kv_heads) locate(a, tile, head + 1, first, after, ahead);
        else if (first + kChunk < end) locate(a, tile, 0, first + kChunk, after, ahead);
        else if (next) locate(a, *next, 0, first_key(a, *next), after, ahead);
        else ahead.clear();
        // A line for 32 numbers of each key and value, for every six queries, and some from turning.
        ahead.expect((2 * ((of_head + 5) / 6) + 1) * now.count * (dim + value_dim) / kLanes / 4 + 1);
        turn(now.keys, now.count, dim, s.turned, ahead);
        const int begin = (int)head * of_head, behind = begin + of_head;
        int i = begin;
        for (; i + 6 <= behind; i += 6) score<6, T>(s.turned, now.count, dim, s.q + i, s.scores + i, ahead);
        for (; i + 3 <= behind; i += 3) score<3, T>(s.turned, now.count, dim, s.q + i, s.scores + i, ahead);
        for (; i < behind; ++i) score<1, T>(s.turned, now.count, dim, s.q + i, s.scores + i, ahead);
        for (i = begin; i < behind; ++i) soften(s, i, first, now.count, value_dim, a.window);
        for (i = begin; i + 6 <= behind; i += 6)
            gather<6, T>(now.values, now.count, value_dim, weights + i, s.acc + i, ahead);
        for (; i + 3 <= behind; i += 3)
            gather<3, T>(now.values, now.count, value_dim, weights + i, s.acc + i, ahead);
        for (; i < behind; ++i)
            gather<1, T>(now.values, now.count, value_dim, weights + i, s.acc + i, ahead);
        if (++head == tile.kv_heads) {
            head = 0;
            first += kChunk;
        }
    }
    for (int i = 0; i < num_queries; ++i) {
        for (int d = 0; d + 2 * kLanes <= value_dim; d += 2 * kLanes) {
            Vec low = load(s.acc[i] + d), high = load(s.acc[i] + d + kLanes);
            join((const T*)nullptr, low, high);
            store(s.acc[i] + d, low);
            store(s.acc[i] + d + kLanes, high);
        }
    }
    for (int i = 0; i < num_queries; ++i)
        done(span.first_row + row_of(i), head_of(i), s.acc[i], 1.0f / s.total[i]);
}

// The tiles of all spans; returns how many there are, filling `tiles` unless it is null. Those of the
// last spans, which are the longest, come first, so that no thread ends with one of them alone.
//
// Where there are spans enough for all threads, a single row attends with all its heads: those of a
// block lie behind one another, and memory is faster the more of it is read in a row.
INLINE int64_t make_tiles(const Attention& a, Tile* tiles) {
    const int64_t rows = larger<int64_t>(kQueries / (a.heads / a.kv_heads), 1);
    const bool many = a.num_spans >= kManySpans * omp_get_max_threads();
    const int64_t together = many && a.heads <= kQueries ? a.kv_heads : 1;
    int64_t n = 0;
    for (int64_t i = a.num_spans - 1; i >= 0; --i) {
        const Span& span = a.spans[i];
        const int64_t heads = span.num_rows == 1 ? together : 1;
        for (int64_t first = 0; first < span.num_rows; first += rows) {
            for (int64_t head = 0; head < a.kv_heads; head += heads, ++n) {
                if (tiles) tiles[n] = {&span, head, heads, first, smaller(rows, span.num_rows - first)};
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
