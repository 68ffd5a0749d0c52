// What looks at the tokens so far. In engine/logits counts.py, penalties.py, matches.py and dry.py are
// the reference.

// Rounded before anything is added to it, as torch does: not one operation with what follows.
INLINE float product(float a, float b) {
    volatile float rounded = a * b;
    return rounded;
}

// Count a lane's token at `position` once more, or once less.
INLINE void count_token(const Counts& c, int64_t lane, int64_t position, int32_t amount) {
    const int32_t token = c.tokens[lane * c.context + position];
    int32_t& slot = c.slots[lane * c.vocab + token];
    if (slot == 0) {
        slot = (int32_t)++c.sizes[lane];
        c.ids[lane * c.context + slot - 1] = token;
    }
    const int64_t at = lane * c.context + slot - 1;
    c.seen[at] += amount;
    if (position >= c.prompt_lengths[lane]) c.generated[at] += amount;
}

// One more token of each of n lanes, and one less where one leaves the window.
void count_tokens(const Counts& c, const int64_t* lanes, const int64_t* positions, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        const int64_t lane = lanes[i], window = c.windows[lane], leaving = positions[i] - window;
        count_token(c, lane, positions[i], 1);
        if (window >= 0 && leaving >= 0) count_token(c, lane, leaving, -1);
    }
}

// In place.
void penalise_rows(const Rows& rows, const int64_t* lanes, const Counts& c, const Penalties& of) {
#pragma omp parallel for if (rows.count > 1)
    for (int64_t r = 0; r < rows.count; ++r) {
        const int64_t lane = lanes[r], begin = lane * c.context;
        const float repetition = of.repetition[lane], frequency = of.frequency[lane];
        const float presence = of.presence[lane];
        float* row = const_cast<float*>(rows.at(r));
        for (int64_t at = begin; at < begin + c.sizes[lane]; ++at) {
            float& score = row[c.ids[at]];
            if ((of.prompt[lane] ? c.seen[at] : c.generated[at]) > 0)
                score = score > 0 ? score / repetition : score * repetition;
            if (c.generated[at] > 0) score = score - product(frequency, (float)c.generated[at]) - presence;
        }
    }
}

// Take in a token of each of n lanes: matches grow by one before tokens like it, all others are over.
// `broken` [n]: no match goes on there; null: all do.
void extend_matches(const Matches& m, const int64_t* lanes, const int64_t* positions,
                    const bool* broken, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        const int64_t lane = lanes[i], last = positions[i];
        const int32_t *tokens = m.tokens + lane * m.context, token = tokens[last];
        int32_t* lengths = m.lengths + lane * m.context;
        const bool breaks = broken && broken[i];
        lengths[last] = 0;
        for (int64_t at = last - 1; at >= 0; --at) {
            const int32_t before = at > 0 ? lengths[at - 1] : 0;
            lengths[at] = tokens[at] == token && !breaks ? before + 1 : 0;
        }
    }
}

// The matches of a lane's first `length` tokens, none longer than `reach`: read from the end, how much
// of the history each place begins with (the Z function), in time proportional to the length.
void find_matches(const Matches& m, int64_t lane, int64_t length, int64_t reach) {
    const int32_t* end = m.tokens + lane * m.context + length - 1;
    int32_t* lengths = m.lengths + lane * m.context + length - 1;  // both backwards from here
    int64_t from = 0, to = 0;  // the match that goes back farthest covers places [from, to)
    for (int64_t at = 1; at < length; ++at) {
        int64_t size = at < to ? smaller((int64_t)lengths[-(at - from)], to - at) : 0;
        while (at + size < length && end[-size] == end[-(at + size)]) ++size;
        lengths[-at] = (int32_t)size;
        if (at + size > to) from = at, to = at + size;
    }
    for (int64_t at = 1; at < length; ++at)
        lengths[-at] = (int32_t)smaller((int64_t)lengths[-at], reach);
    lengths[0] = 0;
}

// In place, where the multiplier is above 0.
void penalise_matches(const Rows& rows, const int64_t* lanes, const int64_t* positions, const Dry& d) {
    // e to this is the largest float. A power beyond it would be infinite; a base of 1 has none.
    constexpr float largest_exponent = 88.72283905206835f;
#pragma omp parallel for if (rows.count > 1)
    for (int64_t r = 0; r < rows.count; ++r) {
        const int64_t lane = lanes[r], length = positions[r] + 1;
        const float multiplier = d.multiplier[lane], base = d.base[lane];
        if (!(multiplier > 0)) continue;
        const int64_t allowed = d.allowed[lane], last_n = d.last_n[lane];
        const int64_t begin = last_n < 0 ? 0 : larger(length - last_n, (int64_t)0);
        const int32_t *tokens = d.tokens + lane * d.context, *matches = d.matches + lane * d.context;
        int32_t* longest = d.longest + lane * d.vocab;
        float* row = const_cast<float*>(rows.at(r));
        // Calls work(token, match) for the matches that count. One that ends before a token reaches
        // back to `begin` at most.
        auto each = [&](auto work) INLINE_LAMBDA {
            for (int64_t at = begin + 1; at < length; ++at) {
                const int32_t match = (int32_t)smaller((int64_t)matches[at - 1], at - begin);
                if (match >= allowed) work(tokens[at], match);
            }
        };
        each([&](int32_t token, int32_t) INLINE_LAMBDA { longest[token] = 0; });
        each([&](int32_t token, int32_t match) INLINE_LAMBDA {
            longest[token] = larger(longest[token], match);
        });
        const float most = std::floor(largest_exponent / std::log(base));
        each([&](int32_t token, int32_t) INLINE_LAMBDA {
            const int64_t exponent = longest[token] - allowed;
            longest[token] = -1;  // so that it is done once
            if (exponent < 0 || d.breakers[lane * d.vocab + token] || row[token] == kNegInf) return;
            const float power = std::pow(base, smaller((float)exponent, most));
            const float lowered = row[token] - product(multiplier, power);
            row[token] = larger(lowered, -FLT_MAX);  // however low, it is no ban
        });
    }
}
