// Passes over the candidates [R, K] of rows: best first, logits -inf where dropped. They are small,
// so that most of what they take in torch is its cost per operation. `Candidates.probs` and the
// files of the filters are the reference.

typedef double DoubleVec __attribute__((vector_size(64)));
typedef int64_t LongVec __attribute__((vector_size(64)));
typedef float FewVec __attribute__((vector_size(32)));
constexpr int64_t kFew = 8;  // doubles in a vector

// exp for x <= 0 in double precision; 0 below -700.
INLINE DoubleVec exp_negative(DoubleVec x) {
    constexpr double rounder = 0x1.8p52;  // like kRounder; the integer is in the lowest bits, too
    const DoubleVec bounded = x > -700.0 ? x : DoubleVec{} - 700.0;
    const DoubleVec shifted = bounded * 1.44269504088896338700 + rounder, n = shifted - rounder;
    const DoubleVec r = (bounded - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
    DoubleVec p = DoubleVec{} + 1.0 / 6227020800.0;  // Taylor's series: |r| <= ln 2 / 2
    p = p * r + 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r * r * r + r * r * 0.5 + r + 1.0;
    return x > -700.0 ? (DoubleVec)((LongVec)p + ((LongVec)shifted << 52)) : DoubleVec{};
}

// exp(z - total), rounded only at the end.
INLINE FewVec probs_of(FewVec z, double total) {
    const DoubleVec p = exp_negative(__builtin_convertvector(z, DoubleVec) - total);
    return __builtin_convertvector(p, FewVec);
}

// Of the first k candidates of a row.
INLINE void probs_of(const float* row, double total, int64_t k, float* to) {
    FewVec z;
    int64_t i = 0;
    for (; i + kFew <= k; i += kFew) {
        std::memcpy(&z, row + i, sizeof z);
        z = probs_of(z, total);
        std::memcpy(to + i, &z, sizeof z);
    }
    for (; i < k; ++i) to[i] = probs_of(FewVec{} + row[i], total)[0];
}

void probs_rows(const float* logits, const double* total, int64_t rows, int64_t k, float* out) {
#pragma omp parallel for if (rows * k > 1 << 15)
    for (int64_t r = 0; r < rows; ++r) probs_of(logits + r * k, total[r], k, out + r * k);
}

// How many of `count` candidates stand behind no more than a mass of `limit`, and with the last of
// these the mass: `reached`.
INLINE int64_t count_inside(const float* probs, int64_t count, float limit, float* reached) {
    double mass = 0;
    int64_t inside = 0;
    while (inside < count && (float)mass <= limit) mass += probs[inside++];
    *reached = (float)mass;
    return inside;
}

// A logit by a temperature: finite where that would be too large for a float, or too low.
INLINE float scaled(float z, float temperature) {
    return z == kNegInf ? z : larger(smaller(z / temperature, FLT_MAX), -FLT_MAX);
}

// What a filter says of a row: whether it drops anything at all, and whether it was decided without
// the tail.
struct Verdict {
    bool applies, inside;
};

// Drops of each active row what `filter(r, row, kept)` leaves out of `kept`, and its tail.
template <class Filter>
INLINE void filter_rows(const Candidates& c, Filter filter) {
#pragma omp parallel for if (c.rows * c.k > 1 << 15)
    for (int64_t r = 0; r < c.rows; ++r) {
        const float* row = c.logits + r * c.k;
        float* kept = c.kept + r * c.k;
        const Verdict its = c.active[r] ? filter(r, row, kept) : Verdict{false, true};
        if (!its.applies) std::copy(row, row + c.k, kept);
        bool *unsure = c.flags, *tail = unsure + c.rows, *whole = tail + c.rows;
        unsure[r] = c.unsure[r] | (its.applies & !its.inside & c.tail[r]);
        tail[r] = c.tail[r] & !its.applies;
        whole[r] = c.whole[r] & !its.applies;
    }
}

void keep_rows(const Candidates& c, const bool* mask, const bool* inside) {
    filter_rows(c, [&](int64_t r, const float* row, float* kept) INLINE_LAMBDA {
        for (int64_t i = 0; i < c.k; ++i) kept[i] = mask[r * c.k + i] ? row[i] : kNegInf;
        return Verdict{true, inside[r]};
    });
}

// Where no candidate is below the floor [R], tails are cut there instead, by whoever reads `cut` [R].
// Returns whether there are any to cut.
bool keep_above_rows(const Candidates& c, const float* floor, const float* best,
                     const float* temperature, bool* cut) {
    bool any = false;
    for (int64_t r = 0; r < c.rows; ++r) {
        const float least = scaled(best[(r + 1) * c.k - 1], temperature[r]);
        cut[r] = c.active[r] && least >= floor[r];
    }
    filter_rows(c, [&](int64_t r, const float* row, float* kept) INLINE_LAMBDA {
        if (cut[r]) return Verdict{false, true};
        for (int64_t i = 0; i < c.k; ++i) kept[i] = row[i] >= floor[r] ? row[i] : kNegInf;
        return Verdict{true, true};
    });
    for (int64_t r = 0; r < c.rows; ++r) any |= cut[r] = cut[r] && c.tail[r];
    return any;
}

// The `count` [R] first ones that are left.
void keep_first_rows(const Candidates& c, const int64_t* count) {
    filter_rows(c, [&](int64_t r, const float* row, float* kept) INLINE_LAMBDA {
        int64_t rank = 0;
        for (int64_t i = 0; i < c.k; ++i) {
            rank += row[i] > kNegInf;
            kept[i] = rank <= count[r] ? row[i] : kNegInf;
        }
        return Verdict{true, rank >= count[r]};
    });
}

// Those above which there is no more than a mass of `limit` [R].
void keep_mass_rows(const Candidates& c, const float* probs, const float* limit) {
    filter_rows(c, [&](int64_t r, const float* row, float* kept) INLINE_LAMBDA {
        float reached;
        const int64_t inside = count_inside(probs + r * c.k, c.k, limit[r], &reached);
        std::fill(std::copy(row, row + inside, kept), kept + c.k, kNegInf);
        return Verdict{true, reached > limit[r]};
    });
}

// What a thread works with: as many numbers and places as there are candidates, twice.
struct Desk {
    explicit Desk(int64_t k)
        : numbers((double*)std::malloc(k * (sizeof(double) + 2 * sizeof(int64_t)))),
          places((int64_t*)(numbers + k)),
          order(places + k) {}
    ~Desk() { std::free(numbers); }

    double* numbers;
    int64_t* places;
    int64_t* order;
};

// Where the candidates that are left stand; returns how many.
INLINE int64_t find_alive(const float* logits, int64_t k, int64_t* places) {
    int64_t count = 0;
    for (int64_t i = 0; i < k; ++i) {
        places[count] = i;
        count += logits[i] > kNegInf;
    }
    return count;
}

// Keeps the candidates whose surprise is nearest to `entropy`, until they have mass `limit`; of
// equally near ones the lowest ids. Tells the mass of all, and how far off the farthest kept is.
INLINE void keep_typical(const float* logits, const float* probs, const int64_t* ids, int64_t k,
                         float total, float entropy, float limit, const Desk& desk, bool* keep,
                         float* mass, float* farthest) {
    const int64_t count = find_alive(logits, k, desk.places);
    double* distance = desk.numbers;
    int64_t right = 0;
    for (int64_t i = 0; i < count; ++i) {
        const float excess = (logits[desk.places[i]] - total) + entropy;
        right += excess >= 0;
        distance[i] = std::fabs(excess);
    }
    // Distances fall up to there and grow from there on: merging both sides sorts them.
    int64_t left = right, sorted = 0;
    while (left > 0 || right < count) {
        if (right == count || (left > 0 && distance[left - 1] <= distance[right])) {
            int64_t begin = left - 1;
            while (begin > 0 && distance[begin - 1] == distance[begin]) --begin;
            for (int64_t i = begin; i < left; ++i) desk.order[sorted++] = i;
            left = begin;
        } else {
            desk.order[sorted++] = right++;
        }
    }
    double sum = 0, nearer = 0;  // the mass so far, and of those nearer than the last one kept
    int64_t kept = 0, first = 0;
    for (; kept < count && (kept == 0 || (float)sum < limit); ++kept) {
        if (distance[desk.order[kept]] > distance[desk.order[first]]) {
            first = kept;
            nearer = sum;
        }
        sum += probs[desk.places[desk.order[kept]]];
    }
    int64_t last = kept;
    while (last < count && distance[desk.order[last]] == distance[desk.order[first]]) ++last;
    if (last > kept) {
        auto id = [&](int64_t i) { return ids[desk.places[i]]; };
        std::sort(desk.order + first, desk.order + last,
                  [&](int64_t a, int64_t b) { return id(a) < id(b); });
        sum = nearer;
        for (kept = first; kept < last && (kept == 0 || (float)sum < limit); ++kept)
            sum += probs[desk.places[desk.order[kept]]];
    }
    std::fill(keep, keep + k, false);
    for (int64_t i = 0; i < kept; ++i) keep[desk.places[desk.order[i]]] = true;
    for (int64_t i = kept; i < count; ++i) sum += probs[desk.places[desk.order[i]]];
    *mass = (float)sum;
    *farthest = count ? (float)distance[desk.order[first]] : 0;
}

void typical_rows(const float* logits, const float* probs, const int64_t* ids, int64_t rows, int64_t k,
                  const float* total, const float* entropy, const float* limit, bool* keep,
                  float* mass, float* farthest) {
#pragma omp parallel if (rows * k > 1 << 12)
    {
        const Desk desk(k);
#pragma omp for schedule(dynamic)
        for (int64_t r = 0; r < rows; ++r)
            keep_typical(logits + r * k, probs + r * k, ids + r * k, k, total[r], entropy[r], limit[r],
                         desk, keep + r * k, mass + r, farthest + r);
    }
}

// Keeps candidates up to where the curve of their probabilities has done the part `limit` of its
// bending, and tells whether they are these also with a tail. A curve that does not bend is no `curve`.
INLINE void keep_bent(const float* logits, const float* probs, int64_t k, double limit, bool tail,
                      const Desk& desk, bool* keep, bool* inside, bool* curve) {
    const int64_t count = find_alive(logits, k, desk.places), bends = k - 2;
    double* passed = desk.numbers;
    double sum = 0;
    auto p = [&](int64_t i) { return probs[desk.places[i]]; };
    for (int64_t i = 0; i < bends; ++i) {
        if (i + 2 < count) sum += std::fabs((p(i + 2) - p(i + 1)) - (p(i + 1) - p(i)));
        passed[i] = sum;
    }
    double rest = 0;  // no more than this do tokens that are no candidates bend
    for (int64_t i = larger(k - 2, (int64_t)0); tail && i < count; ++i) rest += p(i);
    const int64_t past = std::upper_bound(passed, passed + bends, limit * sum) - passed;
    *inside = past < bends && passed[past] > limit * (sum + rest);
    *curve = sum > 0 && count >= 3;
    const int64_t last = tail ? past : smaller(past, count - 2);
    std::fill(keep, keep + k, false);
    for (int64_t i = 0; i < count && i <= last; ++i) keep[desk.places[i]] = true;
}

void bent_rows(const float* logits, const float* probs, int64_t rows, int64_t k, const double* limit,
               const bool* tail, bool* keep, bool* inside, bool* curve) {
#pragma omp parallel if (rows * k > 1 << 12)
    {
        const Desk desk(k);
#pragma omp for schedule(dynamic)
        for (int64_t r = 0; r < rows; ++r)
            keep_bent(logits + r * k, probs + r * k, k, limit[r], tail[r], desk, keep + r * k,
                      inside + r, curve + r);
    }
}
