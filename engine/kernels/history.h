// What looks at the tokens so far. The files of engine/logits that have these names are the reference.

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
            if (c.generated[at] > 0) score = score - frequency * (float)c.generated[at] - presence;
        }
    }
}
