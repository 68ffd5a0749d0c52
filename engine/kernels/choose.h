// From logits to tokens, for rows that want no filters but temperature, min-p, top-k and top-p, in this
// order: in one pass what the stages of these names do one after the other, and `draw` in
// engine/sampler.py behind them. Step for step the same arithmetic, so that it gives the same tokens.

constexpr int64_t kCandidates = 256;  // candidates of a row
constexpr float kColdest = 1e-4f;     // below this temperature the likeliest token is taken
constexpr uint32_t kTokenNoise = 0, kBlockNoise = 2;  // `Domain` in engine/rng.py

// A token of softmax(z / temperature): first a block of the vocabulary, then one inside it.
INLINE int64_t draw_dense(const float* row, int64_t vocab, float top, float temperature, int64_t seed,
                          int64_t position) {
    auto mass = [&](int64_t block) INLINE_LAMBDA {
        return std::log((double)measure(row, vocab, block, 1.0f / temperature, top).mass);
    };
    auto same = [](int64_t block) INLINE_LAMBDA { return block; };
    const int64_t first =
        kBlock * winner(count_blocks(vocab), mass, same, seed, position, kBlockNoise);
    auto value = [&](int64_t i) INLINE_LAMBDA { return scaled(row[first + i], temperature); };
    auto id = [&](int64_t i) INLINE_LAMBDA { return first + i; };
    const int64_t size = smaller(kBlock, vocab - first);
    return first + winner(size, value, id, seed, position, kTokenNoise);
}

// A token of row r, whose largest entry is `top`, or -1 where a filter would have to look at more
// candidates.
INLINE int64_t sample(const Choice& c, int64_t r, float top, const Search& search) {
    const float* row = c.rows.at(r);
    const int64_t vocab = c.rows.vocab, lane = c.lanes[r], top_k = c.top_k[lane];
    const int64_t seed = c.seeds[lane], position = c.positions[r];
    const float temperature = larger(c.temperature[lane], kColdest);
    const float min_p = c.min_p[lane], top_p = c.top_p[lane];
    if (min_p == kNegInf && top_k == 0 && top_p >= 1.0f)
        return draw_dense(row, vocab, top, temperature, seed, position);

    const int64_t k = smaller(kCandidates, vocab);
    const bool tail = k < vocab;
    float z[kCandidates], probs[kCandidates];
    int64_t ids[kCandidates];
    search.best(row, vocab, k, z, ids);
    for (int64_t i = 0; i < k; ++i) z[i] = scaled(z[i], temperature);
    int64_t left = k;  // what is kept are always the first ones
    while (z[left - 1] == kNegInf) --left;
    bool whole = true;  // nothing has been dropped
    const float floor = z[0] + min_p;
    if (min_p > kNegInf && z[k - 1] >= floor) {
        if (tail && top_k == 0) return -1;  // some of the tail may stay
    } else if (min_p > kNegInf) {
        while (z[left - 1] < floor) --left;
        whole = false;
    }
    if (top_k > 0) {
        if (left < top_k && tail && whole) return -1;
        left = smaller(left, top_k);
        whole = false;
    }
    if (top_p < 1.0f) {
        std::fill(z + left, z + k, kNegInf);
        const double of_all = whole ? total(distribution(row, vocab, top, temperature), temperature)
                                    : total(distribution(z, k, z[0], 1.0f), 1.0f);
        probs_of(z, of_all, left, probs);
        float reached;
        left = count_inside(probs, left, top_p, &reached);
        if (whole && tail && reached <= top_p) return -1;
    }
    auto value = [&](int64_t i) INLINE_LAMBDA { return z[i]; };
    auto id = [&](int64_t i) INLINE_LAMBDA { return ids[i]; };
    return ids[winner(left, value, id, seed, position, kTokenNoise)];
}

void choose_rows(const Choice& c) {
#pragma omp parallel if (c.rows.count > 1)
    {
        const Search search(c.rows.vocab);
#pragma omp for schedule(dynamic)
        for (int64_t r = 0; r < c.rows.count; ++r) {
            const int64_t lane = c.lanes[r];
            scan(c.rows.at(r), c.rows.vocab, c.top + r, c.ids + r);
            c.late[r] = !c.greedy[lane];
            if (!c.common[lane] || !std::isfinite(c.top[r])) continue;
            const bool cold = c.temperature[lane] < kColdest;
            const int64_t token = cold ? c.ids[r] : sample(c, r, c.top[r], search);
            if (token < 0) continue;
            c.ids[r] = token;
            c.late[r] = false;
        }
    }
}
