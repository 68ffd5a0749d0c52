// A Llama-shaped decoder over one step's tokens; `engine/models/decoder.py` is its reference.
//
// One call runs all layers. The threads go through the same phases together and meet at a barrier
// behind each; inside a phase they take tasks from a counter, so that one whose core is busy with
// something else does less.

// One phase's tasks: how many have been taken, and how many are done; and does somebody sleep until
// all are?
struct alignas(128) Phase {
    std::atomic<int64_t> taken{0};
    std::atomic<int64_t> done{0};
    std::atomic<int32_t> asleep{0};
};

constexpr int kSpins = 2000;  // some tens of microseconds: most of what single tokens wait

// Sleep until woken; for nothing at times, and not at all where it is no longer set.
inline void sleep_while_set(std::atomic<int32_t>& asleep) {
#ifdef __linux__
    syscall(SYS_futex, &asleep, FUTEX_WAIT_PRIVATE, 1, nullptr, nullptr, 0);
#else
    sched_yield();
#endif
}

inline void wake(std::atomic<int32_t>& asleep) {
#ifdef __linux__
    asleep.store(0);
    syscall(SYS_futex, &asleep, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
#endif
}

// A thread's way through the phases. It goes on when all tasks of a phase are done, whoever did them:
// a thread whose core is busy with something else holds up nobody unless it has taken a task.
struct Walker {
    Phase* phase;
    int64_t num_threads;

    // `work(first, last)` gets runs of `grain` tasks.
    template <class Work>
    INLINE void run(int64_t count, int64_t grain, Work work) {
        Phase& mine = *phase++;
        for (;;) {
            const int64_t first = mine.taken.fetch_add(grain, std::memory_order_relaxed);
            if (first >= count) break;
            const int64_t last = smaller(first + grain, count);
            work(first, last);
            finish(mine, last - first, count);
        }
        wait(mine, count);
    }

    // `work(task, next)` gets one task after the other, and its next one, which it has taken already:
    // but not near the end, where another thread would have nothing to do. There it is a guess.
    template <class Work>
    INLINE void run_each(int64_t count, Work work) {
        Phase& mine = *phase++;
        auto take = [&] { return mine.taken.fetch_add(1, std::memory_order_relaxed); };
        for (int64_t task = take(); task < count;) {
            const bool early = task + 2 * num_threads < count;
            const int64_t next = early ? take() : task + num_threads;
            work(task, next);
            finish(mine, 1, count);
            task = early ? next : take();
        }
        wait(mine, count);
    }

    INLINE void finish(Phase& mine, int64_t tasks, int64_t count) {
        if (mine.done.fetch_add(tasks) + tasks == count && mine.asleep.load()) wake(mine.asleep);
    }

    // Whoever is waited for may be waiting for this core.
    INLINE void wait(Phase& mine, int64_t count) {
        for (int spins = 0; mine.done.load(std::memory_order_acquire) < count; ++spins) {
            if (spins < kSpins) {
                PAUSE();
            } else {
                mine.asleep.store(1);
                if (mine.done.load() < count) sleep_while_set(mine.asleep);
            }
        }
    }
};

constexpr int64_t kPhasesPerLayer = 7;

INLINE int64_t count_phases(const Decoder& d) { return 2 + kPhasesPerLayer * d.num_layers; }

struct Buffers {
    float* x;        // [T, H], the residual stream
    float* q;        // [T, Hq D]
    float* cosine;   // [T, D], each twice
    float* sine;     // [T, D], with the sign that the rotation of a pair needs
    Codes normed;    // [T, H]
    Codes attended;  // [T, Hq D]
    Codes inner;     // [T, I]
    Tile* tiles;
    int64_t num_tiles;
    int64_t* place;  // [T]: where the first head's key and value go
    bool* read;      // [T / 4]: does somebody read a hidden state of these rows?
    Phase* phases;
};

// Cut the scratch memory into buffers; with `at` null only the size is of interest.
INLINE int64_t lay_out(const Decoder& d, const Attention& a, int64_t num_tokens, uint8_t* at, Buffers& b) {
    int64_t used = 0;
    auto take = [&](int64_t bytes) INLINE_LAMBDA {
        uint8_t* here = at + used;
        used += (bytes + 63) / 64 * 64;
        return here;
    };
    auto floats = [&](int64_t width) INLINE_LAMBDA { return (float*)take(num_tokens * width * 4); };
    auto codes = [&](int64_t k) INLINE_LAMBDA {
        return Codes{(CodeTile*)take(count_tiles(num_tokens, k) * sizeof(CodeTile)), k};
    };
    b.x = floats(d.hidden);
    b.q = floats(d.heads * d.dim);
    b.cosine = floats(d.dim);
    b.sine = floats(d.dim);
    b.normed = codes(d.hidden);
    b.attended = codes(d.heads * d.dim);
    b.inner = codes(d.inner);
    b.num_tiles = make_tiles(a, nullptr);
    b.tiles = (Tile*)take(b.num_tiles * sizeof(Tile));
    b.place = (int64_t*)take(num_tokens * 8);
    b.read = (bool*)take((num_tokens + kTile - 1) / kTile);
    used = (used + 127) / 128 * 128;
    b.phases = (Phase*)take(count_phases(d) * sizeof(Phase));
    return used;
}

INLINE float root_mean_square(const float* x, int64_t size, float eps) {
    Vec squares = splat(0);
    for (int64_t i = 0; i < size; i += kLanes) {
        const Vec v = load(x + i);
        squares += v * v;
    }
    return 1.0f / std::sqrt(sum(squares) / (float)size + eps);
}

INLINE void norm_and_quantize(const float* x, const float* weight, float eps, const Codes& out, int64_t row) {
    const float factor = root_mean_square(x, out.k, eps);
    for (int64_t g = 0; g < groups(out); ++g) {
        const int64_t i = g * kGroup;
        quantize(out, row, g, load(x + i) * factor * load(weight + i),
                 load(x + i + kLanes) * factor * load(weight + i + kLanes));
    }
}

INLINE Vec swap_pairs(Vec v) {
    return __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
}

// One row of one head, in place: its norm if it has one, then its rotation.
INLINE void norm_and_rotate(const Decoder& d, float* head, const float* norm, const float* cosine,
                            const float* sine) {
    const float factor = norm ? root_mean_square(head, d.dim, d.eps) : 1.0f;
    for (int64_t i = 0; i < d.dim; i += kLanes) {
        Vec v = load(head + i);
        if (norm) v = v * factor * load(norm + i);
        store(head + i, v * load(cosine + i) + swap_pairs(v) * load(sine + i));
    }
}

// The rows that a layer computes, by tiles of four: in the last one those that are read, else all.
struct Needed {
    const bool* read;  // null: all

    INLINE bool has(int64_t row) const { return !read || read[row / kTile]; }

    INLINE bool has_any(int64_t first, int64_t last) const {
        for (int64_t row = first / kTile * kTile; row < last; row += kTile)
            if (has(row)) return true;
        return false;
    }
};

// x += w · codes, over a panel.
INLINE void add_product(const Matrix& w, const Codes& in, int64_t num_tokens, Needed needed, float* x,
                        int64_t panel, Upcoming& upcoming) {
    Vec out[kTile][kHalves];
    for (int64_t row = 0; row < num_tokens; row += kTile) {
        if (!needed.has(row)) continue;
        const int count = (int)smaller<int64_t>(kTile, num_tokens - row);
        multiply(w, panel, in, row, count, out, upcoming);
        for (int r = 0; r < count; ++r) {
            float* at = x + (row + r) * w.n + panel * kPanel;
            for (int half = 0; half < kHalves; ++half)
                store(at + half * kLanes, load(at + half * kLanes) + out[r][half]);
        }
    }
}

// Queries, keys or values of one head for some tokens: product, norm, rotation; keys and values go to
// the cache.
template <class T>
INLINE void project(const Step& s, const Layer& layer, const Buffers& b, Needed needed, int64_t head,
                    int64_t first, int64_t last, Upcoming& upcoming) {
    const Decoder& d = *s.decoder;
    const int64_t panels = d.dim / kPanel;
    const bool is_query = head < d.heads, is_key = !is_query && head < d.heads + d.kv_heads;
    alignas(64) float rows[kTile][kMaxDim];
    Vec out[kTile][kHalves];
    for (int64_t row = first; row < last; row += kTile) {
        if (is_query && !needed.has(row)) continue;
        const int count = (int)smaller<int64_t>(kTile, last - row);
        for (int64_t panel = 0; panel < panels; ++panel) {
            multiply(layer.qkv, head * panels + panel, b.normed, row, count, out, upcoming);
            for (int r = 0; r < count; ++r)
                for (int half = 0; half < kHalves; ++half)
                    store(rows[r] + panel * kPanel + half * kLanes, out[r][half]);
        }
        for (int r = 0; r < count; ++r) {
            const int64_t token = row + r;
            if (is_query || is_key) {
                const float* norm = is_query ? layer.query_norm : layer.key_norm;
                norm_and_rotate(d, rows[r], norm, b.cosine + token * d.dim, b.sine + token * d.dim);
            }
            if (is_query) {
                std::memcpy(b.q + (token * d.heads + head) * d.dim, rows[r], d.dim * sizeof(float));
                const int64_t probe = s.probed ? s.probed[token] : -1;
                if (probe >= 0) {
                    const int64_t at = ((&layer - d.layers) * s.num_probed + probe) * d.heads + head;
                    std::memcpy(s.queries + at * d.dim, rows[r], d.dim * sizeof(float));
                }
                continue;
            }
            const int64_t kv_head = (head - d.heads) % d.kv_heads;
            const int64_t at = b.place[token] + kv_head * d.block_size;
            T* target = (T*)(is_key ? layer.keys : layer.values) + at * d.dim;
            for (int64_t i = 0; i < d.dim; i += kLanes) store(target + i, load(rows[r] + i));
        }
    }
}

// A panel of gate and one of up: one group of the inner activations.
static_assert(kPanel == kGroup, "a panel of outputs makes a group of inputs");
INLINE void gate(const Layer& layer, const Buffers& b, int64_t num_tokens, Needed needed, int64_t group,
                 Upcoming& next_gates, Upcoming& next_ups) {
    const int64_t up = layer.gate_up.n / 2 / kPanel + group;
    Vec gates[kTile][kHalves], ups[kTile][kHalves];
    for (int64_t row = 0; row < num_tokens; row += kTile) {
        if (!needed.has(row)) continue;
        const int count = (int)smaller<int64_t>(kTile, num_tokens - row);
        multiply(layer.gate_up, group, b.normed, row, count, gates, next_gates);
        multiply(layer.gate_up, up, b.normed, row, count, ups, next_ups);
        for (int r = 0; r < count; ++r) {
            quantize(b.inner, row + r, group, silu(gates[r][0]) * ups[r][0],
                     silu(gates[r][1]) * ups[r][1]);
        }
    }
}

INLINE void embed(const Step& s, int64_t token, float* x) {
    const Decoder& d = *s.decoder;
    if (s.replaced && s.replaced[token] >= 0) {
        std::memcpy(x, s.inputs + s.replaced[token] * d.hidden, d.hidden * sizeof(float));
        return;
    }
    const int64_t token_id = s.token_ids[token];
    if (!d.embedding) {
        dequantize_row(d.head, token_id, x);
        return;
    }
    const BFloat16* row = (const BFloat16*)d.embedding + token_id * d.hidden;
    for (int64_t i = 0; i < d.hidden; i += kLanes) store(x + i, load(row + i));
}

INLINE void find_angles(const Decoder& d, int64_t position, float* cosine, float* sine) {
    for (int64_t i = 0; i < d.dim / 2; ++i) {
        const float angle = (float)position * d.inv_freq[i];
        cosine[2 * i] = cosine[2 * i + 1] = std::cos(angle) * d.rope_scale;
        sine[2 * i + 1] = std::sin(angle) * d.rope_scale;
        sine[2 * i] = -sine[2 * i + 1];
    }
}

// Keep what goes into a layer, if somebody wants to know.
INLINE void probe(const Step& s, int64_t layer, int64_t token, const float* x) {
    const int64_t row = s.probed ? s.probed[token] : -1;
    if (row < 0) return;
    const int64_t hidden = s.decoder->hidden;
    std::memcpy(s.states + (layer * s.num_probed + row) * hidden, x, hidden * sizeof(float));
}

// What one thread does.
template <class T>
void run_layers(const Step& s, const Buffers& b) {
    const Decoder& d = *s.decoder;
    const int64_t num_tokens = s.num_tokens;
    Walker walker = {b.phases, omp_get_num_threads()};
    walker.run(num_tokens, 1, [&](int64_t first, int64_t last) INLINE_LAMBDA {
        for (int64_t t = first; t < last; ++t) {
            embed(s, t, b.x + t * d.hidden);
            find_angles(d, s.positions[t], b.cosine + t * d.dim, b.sine + t * d.dim);
        }
    });
    for (int64_t l = 0; l < d.num_layers; ++l) {
        const Layer& layer = d.layers[l];
        const Needed needed = {l + 1 < d.num_layers ? nullptr : b.read};
        const Attention a = {layer.keys, layer.values, s.spans, s.blocks, s.num_spans, d.heads,
                             d.kv_heads, d.dim, d.dim, d.block_size, layer.window, d.scale};
        walker.run(num_tokens, kTile, [&](int64_t first, int64_t last) INLINE_LAMBDA {
            for (int64_t t = first; t < last; ++t) {
                probe(s, l, t, b.x + t * d.hidden);
                norm_and_quantize(b.x + t * d.hidden, layer.attention_norm, d.eps, b.normed, t);
            }
        });
        // Heads alone are so few that a thread would often wait for another to do its last one.
        const int64_t size = (larger<int64_t>(num_tokens / 8, 16) + kTile - 1) / kTile * kTile;
        const int64_t parts = (num_tokens + size - 1) / size;
        walker.run_each((d.heads + 2 * d.kv_heads) * parts, [&](int64_t task, int64_t next) INLINE_LAMBDA {
            Upcoming upcoming(layer.qkv, next / parts * (d.dim / kPanel), d.dim / kPanel,
                              smaller(size, num_tokens));
            const int64_t first = task % parts * size;
            project<T>(s, layer, b, needed, task / parts, first, smaller(first + size, num_tokens), upcoming);
        });
        walker.run_each(b.num_tiles, [&](int64_t i, int64_t next) INLINE_LAMBDA {
            const int64_t first_row = b.tiles[i].span->first_row + b.tiles[i].first;
            if (!needed.has_any(first_row, first_row + b.tiles[i].count)) return;
            attend<float, T>(
                a, b.tiles[i], next < b.num_tiles ? b.tiles + next : nullptr,
                [&](int64_t row, int64_t head) INLINE_LAMBDA {
                    return b.q + (row * d.heads + head) * d.dim;
                },
                [&](int64_t row, int64_t head, const float* acc, float factor) INLINE_LAMBDA {
                    for (int64_t g = 0; g < d.dim / kGroup; ++g) {
                        const float* at = acc + g * kGroup;
                        quantize(b.attended, row, head * (d.dim / kGroup) + g, load(at) * factor,
                                 load(at + kLanes) * factor);
                    }
                });
        });
        walker.run_each(d.hidden / kPanel, [&](int64_t panel, int64_t next) INLINE_LAMBDA {
            Upcoming upcoming(layer.out, next, 1, num_tokens);
            add_product(layer.out, b.attended, num_tokens, needed, b.x, panel, upcoming);
        });
        walker.run(num_tokens, kTile, [&](int64_t first, int64_t last) INLINE_LAMBDA {
            for (int64_t t = first; t < last && needed.has(t); ++t)
                norm_and_quantize(b.x + t * d.hidden, layer.mlp_norm, d.eps, b.normed, t);
        });
        walker.run_each(d.inner / kGroup, [&](int64_t group, int64_t next) INLINE_LAMBDA {
            const int64_t count = d.inner / kPanel;  // of panels of gates, before those of up
            Upcoming gates(layer.gate_up, next < count ? next : 2 * count, 1, num_tokens);
            Upcoming ups(layer.gate_up, count + next, 1, num_tokens);
            gate(layer, b, num_tokens, needed, group, gates, ups);
        });
        walker.run_each(d.hidden / kPanel, [&](int64_t panel, int64_t next) INLINE_LAMBDA {
            Upcoming upcoming(layer.down, next, 1, num_tokens);
            add_product(layer.down, b.inner, num_tokens, needed, b.x, panel, upcoming);
        });
    }
    walker.run(num_tokens, kTile, [&](int64_t first, int64_t last) INLINE_LAMBDA {
        for (int64_t t = first; t < last && b.read[t / kTile]; ++t) {
            const float* x = b.x + t * d.hidden;
            probe(s, d.num_layers, t, x);
            const float factor = root_mean_square(x, d.hidden, d.eps);
            for (int64_t i = 0; i < d.hidden; i += kLanes)
                store(s.hidden + t * d.hidden + i, load(x + i) * factor * load(d.norm + i));
        }
    });
}

INLINE Attention shape_of(const Step& s) {
    const Decoder& d = *s.decoder;
    return {nullptr, nullptr, s.spans, s.blocks, s.num_spans, d.heads, d.kv_heads, d.dim, d.dim,
            d.block_size, 0, d.scale};
}

int64_t scratch_bytes(const Step& s) {
    Buffers b;
    return lay_out(*s.decoder, shape_of(s), s.num_tokens, nullptr, b) + 128;
}

void forward(const Step& s) {
    const Decoder& d = *s.decoder;
    const Attention a = shape_of(s);
    Buffers b;
    lay_out(d, a, s.num_tokens, s.scratch + (128 - (uintptr_t)s.scratch % 128), b);
    make_tiles(a, b.tiles);
    for (int64_t i = 0; i < s.num_spans; ++i) {
        const Span& span = s.spans[i];
        for (int64_t row = 0; row < span.num_rows; ++row)
            b.place[span.first_row + row] = slot(a, span, 0, span.start + row);
    }
    std::memset(b.read, !s.read, (s.num_tokens + kTile - 1) / kTile);
    for (int64_t i = 0; s.read && i < s.num_read; ++i) b.read[s.read[i] / kTile] = true;
    for (int64_t i = 0; i < count_phases(d); ++i) new (b.phases + i) Phase;
#pragma omp parallel
    {
        if (d.cache_bytes == 4) run_layers<float>(s, b);
        else run_layers<BFloat16>(s, b);
    }
}

// Quantise rows of x [T, K] and multiply them by w: out [T, N].
void linear(const Matrix& w, const float* x, int64_t num_rows, float* out) {
    if (num_rows == 0) return;
    const std::unique_ptr<CodeTile[]> tiles(new CodeTile[count_tiles(num_rows, w.k)]);
    const Codes codes = {tiles.get(), w.k};
    for (int64_t row = 0; row < num_rows; ++row) {
        for (int64_t g = 0; g < groups(codes); ++g) {
            const float* at = x + row * w.k + g * kGroup;
            quantize(codes, row, g, load(at), load(at + kLanes));
        }
    }
    const int64_t num_panels = (w.n + kPanel - 1) / kPanel;
#pragma omp parallel for schedule(dynamic, 8)
    for (int64_t panel = 0; panel < num_panels; ++panel) {
        Vec result[kTile][kHalves];
        Upcoming upcoming(w, panel + 1, 1, num_rows);
        const int64_t width = smaller<int64_t>(kPanel, w.n - panel * kPanel);
        for (int64_t row = 0; row < num_rows; row += kTile) {
            const int count = (int)smaller<int64_t>(kTile, num_rows - row);
            multiply(w, panel, codes, row, count, result, upcoming);
            for (int r = 0; r < count; ++r)
                std::memcpy(out + (row + r) * w.n + panel * kPanel, result + r, width * sizeof(float));
        }
    }
}
