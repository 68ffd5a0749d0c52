// Passes over rows of logits [R, V]; `engine/numerics.py` is the reference.
// Each row is done by one thread in one fixed order, so its result depends on that row alone.

constexpr int64_t kBlock = 256;  // tokens per block of the vocabulary
constexpr float kLog2E = 1.44269504f;  // 1 / ln 2

INLINE int64_t count_blocks(int64_t vocab) { return (vocab + kBlock - 1) / kBlock; }

// 16 entries from `i` on, with `fill` past the end of the row.
INLINE Vec load_tail(const float* row, int64_t i, int64_t vocab, float fill) {
    if (i + kLanes <= vocab) return load(row + i);
    float rest[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) rest[lane] = i + lane < vocab ? row[i + lane] : fill;
    return load(rest);
}

// Which lanes of a comparison's result hold true, a bit each.
INLINE uint32_t bits_of(IntVec mask) {
#if ISA >= 512
    return _mm512_movepi32_mask((__m512i)mask);
#elif ISA == 256
    __m256 halves[2];
    std::memcpy(halves, &mask, sizeof mask);
    return (uint32_t)_mm256_movemask_ps(halves[0]) | (uint32_t)_mm256_movemask_ps(halves[1]) << 8;
#else
    uint32_t bits = 0;
    for (int lane = 0; lane < kLanes; ++lane) bits |= (uint32_t)(mask[lane] & 1) << lane;
    return bits;
#endif
}

// Calls work(chain, vector) for all of a row, in four chains that need not wait for one another.
template <class Work>
INLINE void over(const float* row, int64_t vocab, Work work) {
    int64_t i = 0;
    for (; i + 4 * kLanes <= vocab; i += 4 * kLanes) {
#pragma GCC unroll 4
        for (int chain = 0; chain < 4; ++chain) work(chain, load(row + i + chain * kLanes));
    }
    for (; i < vocab; i += kLanes) work(0, load_tail(row, i, vocab, kNegInf));
}

INLINE float largest(const Vec (&chains)[4]) {
    return largest(max(max(chains[0], chains[1]), max(chains[2], chains[3])));
}

// The largest entry of a row, NaN if it holds one, and the lowest id that has it.
INLINE void scan(const float* row, int64_t vocab, float* top, int64_t* id) {
    Vec best[4] = {splat(kNegInf), splat(kNegInf), splat(kNegInf), splat(kNegInf)};
    IntVec nans[4] = {};
    over(row, vocab, [&](int chain, Vec v) INLINE_LAMBDA {
        best[chain] = max(best[chain], v);
        nans[chain] |= v != v;
    });
    *top = bits_of(nans[0] | nans[1] | nans[2] | nans[3]) ? NAN : largest(best);
    *id = 0;
    for (int64_t i = 0; i < vocab; i += kLanes) {
        if (const uint32_t same = bits_of(load_tail(row, i, vocab, NAN) == *top)) {
            *id = i + __builtin_ctz(same);
            return;
        }
    }
}

INLINE float maximum(const float* row, int64_t vocab) {
    Vec best[4] = {splat(kNegInf), splat(kNegInf), splat(kNegInf), splat(kNegInf)};
    over(row, vocab, [&](int chain, Vec v) INLINE_LAMBDA { best[chain] = max(best[chain], v); });
    return largest(best);
}

// Of one block of a row: the sum of e = exp(factor · (z - top)), and the sum of e · (z - top).
// -inf entries count nothing.
struct Masses {
    float mass, moment;
};

INLINE Masses measure(const float* row, int64_t vocab, int64_t block, float factor, float top) {
    Vec total[4] = {}, weighted[4] = {};
    const int64_t first = block * kBlock;
    over(row + first, smaller(kBlock, vocab - first), [&](int chain, Vec v) INLINE_LAMBDA {
        const Vec z = v - top, e = exp2_negative(z * (factor * kLog2E));
        total[chain] += e;
        weighted[chain] += e * max(z, splat(-FLT_MAX));  // 0 · -inf is no number
    });
    return {sum((total[0] + total[1]) + (total[2] + total[3])),
            sum((weighted[0] + weighted[1]) + (weighted[2] + weighted[3]))};
}

// A row whose largest entry is `top` as a distribution: the probability of z is
// exp((z - top) / temperature) / mass.
struct Distribution {
    float top;
    double mass, entropy;
};

INLINE Distribution distribution(const float* row, int64_t vocab, float top, float temperature) {
    double mass = 0, moment = 0;
    for (int64_t b = 0; b < count_blocks(vocab); ++b) {
        const Masses its = measure(row, vocab, b, 1.0f / temperature, top);
        mass += its.mass;
        moment += its.moment;
    }
    return {top, mass, std::log(mass) - moment / mass / temperature};
}

INLINE Distribution distribution(const float* row, int64_t vocab) {
    return distribution(row, vocab, maximum(row, vocab), 1.0f);
}

// The entropy of the average of two rows' distributions.
INLINE double entropy_of_average(const float* a, const Distribution& of_a, const float* b,
                                 const Distribution& of_b, int64_t vocab) {
    const float half_a = (float)(0.5 / of_a.mass), half_b = (float)(0.5 / of_b.mass);
    double entropy = 0;
    for (int64_t begin = 0; begin < vocab; begin += kBlock) {
        Vec total = {};
        for (int64_t i = begin; i < smaller(begin + kBlock, vocab); i += kLanes) {
            const Vec x = load_tail(a, i, vocab, kNegInf) - of_a.top;
            const Vec y = load_tail(b, i, vocab, kNegInf) - of_b.top;
            const Vec p = exp2_negative(x * kLog2E) * half_a, q = exp2_negative(y * kLog2E) * half_b;
            total -= (p + q) * natural_log(p + q);
        }
        entropy += sum(total);
    }
    return entropy;
}

// The standard deviation of a row's finite entries, the population's.
INLINE float deviation(const float* row, int64_t vocab) {
    double count = 0, total = 0, squares = 0;
    for (int pass = 0; pass < 2; ++pass) {
        const float mean = pass ? (float)(total / count) : 0.0f;
        for (int64_t b = 0; b < count_blocks(vocab); ++b) {
            Vec sums = splat(0), counts = splat(0);
            for (int64_t i = b * kBlock; i < smaller((b + 1) * kBlock, vocab); i += kLanes) {
                const Vec z = load_tail(row, i, vocab, kNegInf);
                const IntVec alive = z > kNegInf;
                const Vec x = alive ? z - mean : splat(0);
                sums += pass ? x * x : x;
                counts += alive ? splat(1) : splat(0);
            }
            (pass ? squares : total) += sum(sums);
            if (!pass) count += sum(counts);
        }
    }
    return (float)std::sqrt(squares / count);
}

INLINE int64_t count_finite(const float* row, int64_t vocab) {
    IntVec counts = {};
    for (int64_t i = 0; i < vocab; i += kLanes) counts -= load_tail(row, i, vocab, kNegInf) > kNegInf;
    return sum(__builtin_convertvector(counts, Vec));  // small integers: exact
}

// A float's bits such that integers order as the floats do, largest first.
INLINE uint32_t descending(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (bits == 0x80000000u) bits = 0;  // -0 is 0
    return bits & 0x80000000u ? bits : ~(bits | 0x80000000u);
}

INLINE int64_t count_at_least(const float* x, int64_t size, float bound) {
    IntVec counts = {};
    for (int64_t i = 0; i < size; i += kLanes) counts -= load(x + i) >= bound;
    return sum(__builtin_convertvector(counts, Vec));  // small integers: exact
}

// Some bound that at least k entries of x reach and not many more, k <= size; size is a multiple of 16.
INLINE float bound_of(const float* x, int64_t size, int64_t k) {
    Vec highest = splat(kNegInf), lowest = splat(INFINITY);
    for (int64_t i = 0; i < size; i += kLanes) {
        const Vec v = load(x + i);
        highest = max(highest, v);
        const Vec finite = v > kNegInf ? v : splat(INFINITY);
        lowest = finite < lowest ? finite : lowest;
    }
    float high = largest(highest), low = -largest(-lowest);
    if (high == kNegInf || count_at_least(x, size, low) < k) return kNegInf;
    for (int step = 0; step < 24; ++step) {
        const float middle = low + (high - low) * 0.5f;
        if (!(middle > low && middle < high)) break;
        const int64_t count = count_at_least(x, size, middle);
        if (count >= k) low = middle;
        else high = middle;
        if (count >= k && count <= k + k / 16) break;
    }
    return low;
}

// Find entries that include a row's k largest, as keys that sort by value, largest first, then by
// id, in the order of their ids; returns how many. `keys` and `maxima` have room for V + 256.
INLINE int64_t collect(const float* row, int64_t vocab, int64_t k, uint64_t* keys, float* maxima) {
    // Each strip's maximum is an entry, so a bound that k maxima reach is one that k entries reach.
    // Short strips are searched longer but let fewer other entries through.
    int64_t strip = 16 * kLanes;
    while (strip > kLanes && vocab / (strip / kLanes) < 3 * k) strip /= 2;
    int64_t num_maxima = 0;
    for (int64_t i = 0; 2 * k < vocab && i < vocab; i += strip, num_maxima += kLanes) {
        Vec top = splat(kNegInf);
        for (int64_t j = i; j < smaller(i + strip, vocab); j += kLanes)
            top = max(top, load_tail(row, j, vocab, kNegInf));
        store(maxima + num_maxima, top);
    }
    const float bound = k <= num_maxima ? bound_of(maxima, num_maxima, k) : kNegInf;
    int64_t count = 0, i = 0;
    auto take = [&](Vec v) INLINE_LAMBDA {
        for (uint32_t left = bits_of(v >= bound); left; left &= left - 1) {
            const int64_t id = i + __builtin_ctz(left);
            keys[count++] = (uint64_t)descending(row[id]) << 32 | (uint32_t)id;
        }
        i += kLanes;
    };
    while (i + 4 * kLanes <= vocab) {
        const float* at = row + i;
        const Vec v[4] = {load(at), load(at + kLanes), load(at + 2 * kLanes), load(at + 3 * kLanes)};
        if (!bits_of(max(max(v[0], v[1]), max(v[2], v[3])) >= bound)) {
            i += 4 * kLanes;
        } else {
            for (Vec its : v) take(its);
        }
    }
    while (i < vocab) take(load_tail(row, i, vocab, NAN));
    return count;
}

void scan_rows(const Rows& rows, float* top, int64_t* id) {
#pragma omp parallel for schedule(dynamic) if (rows.count > 1)
    for (int64_t r = 0; r < rows.count; ++r) scan(rows.at(r), rows.vocab, top + r, id + r);
}

void measure_rows(const Rows& rows, const float* factor, float* top, float* mass, float* moment) {
    const int64_t blocks = count_blocks(rows.vocab);
#pragma omp parallel for schedule(dynamic) if (rows.count > 1)
    for (int64_t r = 0; r < rows.count; ++r) {
        top[r] = maximum(rows.at(r), rows.vocab);
        for (int64_t b = 0; b < blocks; ++b) {
            const Masses its = measure(rows.at(r), rows.vocab, b, factor[r], top[r]);
            mass[r * blocks + b] = its.mass;
            moment[r * blocks + b] = its.moment;
        }
    }
}

// ln Σ exp(z / temperature).
INLINE double total(const Distribution& its, float temperature) {
    return std::log(its.mass) + larger(smaller(its.top / temperature, FLT_MAX), -FLT_MAX);
}

// `total` of row r, whose largest entry is `top`, and its entropy: summary [2, R].
INLINE void summarise(const Rows& rows, int64_t r, float top, float temperature, double* summary) {
    const Distribution its = distribution(rows.at(r), rows.vocab, top, temperature);
    summary[r] = total(its, temperature);
    summary[rows.count + r] = its.entropy;
}

void summarise_rows(const Rows& rows, const float* temperature, double* summary) {
#pragma omp parallel for schedule(dynamic) if (rows.count > 1)
    for (int64_t r = 0; r < rows.count; ++r)
        summarise(rows, r, maximum(rows.at(r), rows.vocab), temperature[r], summary);
}

// `summarise` of rows that are `whole`, where it is not known for their temperatures, and of the K
// candidates that are left [R, K] of the others. `known` [2, R] was computed at `known_at` [R], and is
// kept up; null candidates: all rows are whole.
void update_summaries(const Rows& rows, const float* temperature, const bool* whole,
                      const float* candidates, int64_t k, float* known_at, double* known,
                      double* summary) {
    const Rows left = {candidates, nullptr, rows.count, k, k};
#pragma omp parallel for schedule(dynamic) if (rows.count > 1)
    for (int64_t r = 0; r < rows.count; ++r) {
        if (candidates && !whole[r]) {
            summarise(left, r, maximum(left.at(r), k), 1.0f, summary);
            continue;
        }
        if (known_at[r] != temperature[r]) {
            summarise(rows, r, maximum(rows.at(r), rows.vocab), temperature[r], known);
            known_at[r] = temperature[r];
        }
        for (int64_t i : {r, rows.count + r}) summary[i] = known[i];
    }
}

// ln Σ exp(z) of each row, and of its distribution the entropy in nats and the varentropy: [3, R].
void moments_rows(const Rows& rows, double* out) {
#pragma omp parallel for schedule(dynamic) if (rows.count > 1)
    for (int64_t r = 0; r < rows.count; ++r) {
        const float* row = rows.at(r);
        const Distribution its = distribution(row, rows.vocab);
        const float mean = (float)(std::log(its.mass) - its.entropy);  // of z - top
        double squares = 0;
        for (int64_t first = 0; first < rows.vocab; first += kBlock) {
            Vec total[4] = {};
            const int64_t size = smaller(kBlock, rows.vocab - first);
            over(row + first, size, [&](int chain, Vec v) INLINE_LAMBDA {
                const Vec z = v - its.top, x = max(z, splat(-1e15f)) - mean;  // its square is finite
                total[chain] += exp2_negative(z * kLog2E) * x * x;
            });
            squares += sum((total[0] + total[1]) + (total[2] + total[3]));
        }
        out[r] = std::log(its.mass) + its.top;
        out[rows.count + r] = its.entropy;
        out[2 * rows.count + r] = squares / its.mass;
    }
}

// [R, V]; -inf entries stay.
void log_softmax_rows(const Rows& rows, float* out) {
#pragma omp parallel for schedule(dynamic) if (rows.count > 1)
    for (int64_t r = 0; r < rows.count; ++r) {
        const float* row = rows.at(r);
        const Distribution its = distribution(row, rows.vocab);
        const float rest = (float)std::log(its.mass);
        float* to = out + r * rows.vocab;
        int64_t i = 0;
        for (; i + kLanes <= rows.vocab; i += kLanes) {
            const Vec z = load(row + i);
            store(to + i, z > kNegInf ? z - its.top - rest : splat(kNegInf));
        }
        for (; i < rows.vocab; ++i) to[i] = row[i] > kNegInf ? row[i] - its.top - rest : kNegInf;
    }
}

// Between each row and its share of the others, which come in the order of the rows.
void divergence_rows(const Rows& rows, const Rows& others, double* out) {
    if (others.count == 0) return;
    const int64_t share = others.count / rows.count;
    Distribution* of_rows = (Distribution*)std::malloc(rows.count * sizeof(Distribution));
#pragma omp parallel
    {
#pragma omp for schedule(dynamic)
        for (int64_t r = 0; r < rows.count; ++r) of_rows[r] = distribution(rows.at(r), rows.vocab);
#pragma omp for schedule(dynamic)
        for (int64_t o = 0; o < others.count; ++o) {
            const Distribution& own = of_rows[o / share];
            const Distribution its = distribution(others.at(o), rows.vocab);
            out[o] = entropy_of_average(rows.at(o / share), own, others.at(o), its, rows.vocab) -
                     (own.entropy + its.entropy) / 2;
        }
    }
    std::free(of_rows);
}

void deviation_rows(const Rows& rows, float* out) {
#pragma omp parallel for schedule(dynamic) if (rows.count > 1)
    for (int64_t r = 0; r < rows.count; ++r) out[r] = deviation(rows.at(r), rows.vocab);
}

void count_rows(const Rows& rows, int64_t* out) {
#pragma omp parallel for schedule(dynamic) if (rows.count > 1)
    for (int64_t r = 0; r < rows.count; ++r) out[r] = count_finite(rows.at(r), rows.vocab);
}

// In place: entries for which z / temperature is below the row's floor become -inf.
void cut_rows(const Rows& rows, const float* temperature, const float* floor) {
#pragma omp parallel for schedule(dynamic) if (rows.count > 1)
    for (int64_t r = 0; r < rows.count; ++r) {
        if (floor[r] == kNegInf) continue;
        float* row = const_cast<float*>(rows.at(r));
        int64_t i = 0;
        for (; i + kLanes <= rows.vocab; i += kLanes) {
            const Vec z = load(row + i);
            store(row + i, z / temperature[r] < floor[r] ? splat(kNegInf) : z);
        }
        for (; i < rows.vocab; ++i) {
            if (row[i] / temperature[r] < floor[r]) row[i] = kNegInf;
        }
    }
}

INLINE uint32_t rotated(uint32_t x, int bits) { return x << bits | x >> (32 - bits); }

INLINE uint32_t hash_key(int64_t seed, int64_t position, int64_t id, uint32_t domain) {
    uint32_t h = domain;
    for (uint32_t word : {(uint32_t)seed, (uint32_t)(seed >> 32), (uint32_t)position, (uint32_t)id}) {
        h ^= rotated(word * 0xcc9e2d51u, 15) * 0x1b873593u;
        h = rotated(h, 13) * 5 + 0xe6546b64u;
    }
    h ^= 16;  // the number of bytes hashed
    h = (h ^ h >> 16) * 0x85ebca6bu;
    h = (h ^ h >> 13) * 0xc2b2ae35u;
    return h ^ h >> 16;
}

void hash_keys(const int64_t* seeds, const int64_t* positions, const int64_t* ids, int64_t n,
               uint32_t domain, int64_t* out) {
#pragma omp parallel for if (n > 1 << 16)
    for (int64_t i = 0; i < n; ++i) out[i] = hash_key(seeds[i], positions[i], ids[i], domain);
}

// The place of the largest sum of value(i) and the Gumbel noise of id(i), i < k, the first of equal
// ones. What can no longer win is passed over: no noise is above 22.9.
template <class Value, class Id>
INLINE int64_t winner(int64_t k, Value value, Id id, int64_t seed, int64_t position, uint32_t domain) {
    double best = -INFINITY;
    int64_t place = 0;
    for (int64_t i = 0; i < k; ++i) {
        const double own = value(i);
        if (!(own + 22.9 > best)) continue;
        const uint32_t h = hash_key(seed, position, id(i), domain);
        const double noisy = own - std::log(-std::log1p(-(h + 0.5) * 0x1p-32));
        if (noisy > best) {
            best = noisy;
            place = i;
        }
    }
    return place;
}

template <class T>
void winner_rows(const T* values, const int64_t* ids, int64_t ids_stride, const int64_t* seeds,
                 const int64_t* positions, int64_t rows, int64_t k, uint32_t domain, int64_t* place) {
#pragma omp parallel for schedule(dynamic) if (rows > 1)
    for (int64_t r = 0; r < rows; ++r) {
        auto value = [&](int64_t i) INLINE_LAMBDA { return values[r * k + i]; };
        auto id = [&](int64_t i) INLINE_LAMBDA { return ids[r * ids_stride + i]; };
        place[r] = winner(k, value, id, seeds[r], positions[r], domain);
    }
}

// A place to look for a row's best entries in.
struct Search {
    explicit Search(int64_t vocab)
        : room(vocab + kBlock),
          keys((uint64_t*)std::malloc(2 * room * sizeof(uint64_t) + room * sizeof(float))),
          maxima((float*)(keys + 2 * room)) {}
    ~Search() { std::free(keys); }

    // The k best, k <= V: largest first, equal ones by lowest id.
    INLINE void best(const float* row, int64_t vocab, int64_t k, float* values, int64_t* ids) const {
        int64_t found = collect(row, vocab, k, keys, maxima);
        while (found < k) keys[found++] = (uint64_t)descending(kNegInf) << 32;  // a row with NaN
        const uint64_t* sorted = sort_keys(keys, keys + room, found, k);
        for (int64_t i = 0; i < k; ++i) {
            ids[i] = sorted[i] & 0xffffffffu;
            values[i] = row[ids[i]];
        }
    }

    int64_t room;
    uint64_t* keys;
    float* maxima;
};

// With a temperature also `summarise`, while the row is at hand.
void select_rows(const Rows& rows, int64_t k, const float* temperature, float* values, int64_t* ids,
                 double* summary) {
#pragma omp parallel if (rows.count > 1)
    {
        const Search search(rows.vocab);
#pragma omp for schedule(dynamic)
        for (int64_t r = 0; r < rows.count; ++r) {
            search.best(rows.at(r), rows.vocab, k, values + r * k, ids + r * k);
            if (temperature) summarise(rows, r, values[r * k], temperature[r], summary);
        }
    }
}
