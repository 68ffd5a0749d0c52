// Products of 8-bit activations with 4- or 8-bit weights.
//
// Both are quantised in groups of 32 along the inputs. A weight is d·u + m, with u a code of 0…15 or
// 0…255 and d, m of its group; an activation is s·q, q an integer of -127…127. A group contributes
//     d·s·Σuq + m·s·Σq
// where Σuq is exact, so a row's result depends on that row alone: the same bits in every batch.
//
// Weights lie in panels of 32 outputs. For each group a panel holds, for input quads 0…7, the four
// codes of each output side by side, 128 bytes a quad; with 4 bits, quads j and j + 4 share bytes, low
// and high nibble. Behind them: 4 bits: d and m of the 32 outputs in half precision; 8 bits: d in
// single precision, where m is -128 d.

constexpr int kGroup = 32;
constexpr int kPanel = 32;
constexpr int kHalves = kPanel / kLanes;
constexpr int kTile = 4;  // rows that share a pass over a panel
constexpr int64_t kGroupBytes4 = 512 + 128;
constexpr int64_t kGroupBytes8 = 1024 + 128;

// A group of a few quantised rows, in cache lines of its own: threads that make different groups, or
// different rows, do not write to the same ones.
struct alignas(64) CodeTile {
    int8_t q[kTile][kGroup];
    float scale[kTile];
    float total[kTile];   // scale · Σq
    int32_t start[kTile];  // -128 · Σq
};

// Quantised rows [T, K].
struct Codes {
    CodeTile* tiles;  // [T / 4, K / 32]
    int64_t k;

    INLINE CodeTile& at(int64_t row, int64_t group) const {
        return tiles[row / kTile * (k / kGroup) + group];
    }
};

INLINE int64_t count_tiles(int64_t rows, int64_t k) { return (rows + kTile - 1) / kTile * (k / kGroup); }

INLINE int64_t groups(const Codes& x) { return x.k / kGroup; }

// Quantise one group of 32 numbers.
INLINE void quantize(const Codes& x, int64_t row, int64_t group, Vec a, Vec b) {
    const float top = largest(max(absolute(a), absolute(b)));
    const float scale = top / 127.0f;
    const float inverse = top > 0 ? 127.0f / top : 0.0f;
    const IntVec qa = __builtin_convertvector((a * inverse + kRounder) - kRounder, IntVec);
    const IntVec qb = __builtin_convertvector((b * inverse + kRounder) - kRounder, IntVec);
    const SmallVec small[2] = {__builtin_convertvector(qa, SmallVec),
                               __builtin_convertvector(qb, SmallVec)};
    CodeTile& tile = x.at(row, group);
    const int64_t r = row % kTile;
    std::memcpy(tile.q[r], small, sizeof small);
    const float sum_of_codes = sum(__builtin_convertvector(qa + qb, Vec));  // exact
    tile.scale[r] = scale;
    tile.total[r] = scale * sum_of_codes;
    tile.start[r] = -128 * (int32_t)sum_of_codes;
}

// acc + the dot products of each lane's four codes with four activations.
template <int BITS>
INLINE IntVec dot4(IntVec acc, ByteVec codes, const int8_t* x) {
    int32_t quad;
    std::memcpy(&quad, x, sizeof quad);
#if ISA >= 512
    return (IntVec)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)codes, _mm512_set1_epi32(quad));
#elif ISA == 256
    const __m256i four = _mm256_set1_epi32(quad), ones = _mm256_set1_epi16(1);
    const __m256i low = _mm256_set1_epi8(15);
    __m256i c[2], a[2];
    std::memcpy(c, &codes, sizeof c);
    std::memcpy(a, &acc, sizeof a);
    for (int i = 0; i < 2; ++i) {
        // Pairs are added in 16 bits, which only codes of 4 bits cannot overflow.
        const __m256i pairs = _mm256_maddubs_epi16(BITS == 4 ? c[i] : _mm256_and_si256(c[i], low), four);
        a[i] = _mm256_add_epi32(a[i], _mm256_madd_epi16(pairs, ones));
        if (BITS == 8) {
            const __m256i high = _mm256_and_si256(_mm256_srli_epi16(c[i], 4), low);
            const __m256i more = _mm256_madd_epi16(_mm256_maddubs_epi16(high, four), ones);
            a[i] = _mm256_add_epi32(a[i], _mm256_slli_epi32(more, 4));
        }
    }
    std::memcpy(&acc, a, sizeof acc);
    return acc;
#else
    const WordVec words = (WordVec)codes;
    for (int i = 0; i < 4; ++i) acc += (IntVec)((words >> (8 * i)) & 255) * (int32_t)x[i];
    return acc;
#endif
}

INLINE ByteVec load_codes(const uint8_t* p) {
    ByteVec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

INLINE int64_t group_bytes(const Matrix& w) { return w.bits == 4 ? kGroupBytes4 : kGroupBytes8; }

INLINE int64_t panel_bytes(const Matrix& w) { return w.k / kGroup * group_bytes(w); }

// Weights that will be multiplied by next: asked for in small portions, some lines for each group of
// those at hand, so that memory and the dot products work at the same time.
struct Upcoming {
    const char* at;
    const char* end;
    int64_t lines;

    // Some panels, while as many are multiplied by these rows. There are none past the end of w.
    INLINE Upcoming(const Matrix& w, int64_t first, int64_t count, int64_t num_rows) {
        at = (const char*)w.panels + first * panel_bytes(w);
        end = first * kPanel < w.n ? at + count * panel_bytes(w) : at;
        const int64_t passes = num_rows / kTile + num_rows % kTile / 2 + num_rows % 2;
        lines = (group_bytes(w) / 64 + passes - 1) / passes;
    }

    INLINE void ask() {
        for (int64_t i = 0; i < lines && at < end; ++i, at += 64) __builtin_prefetch(at, 0, 2);
    }
};

// R rows of a tile, from `first` on, times P halves of a panel, `half` and those behind it.
template <int BITS, int R, int P>
INLINE void multiply(const uint8_t* panel, int half, const CodeTile* x, int64_t num_groups, int first,
                     Vec (*out)[kHalves], Upcoming& upcoming) {
    Vec acc[R][P] = {};
    for (const CodeTile* end = x + num_groups; x < end; ++x) {
        const int8_t* q = x->q[first];
        const float *scale = x->scale + first, *total = x->total + first;
        upcoming.ask();
        IntVec sums[R][P] = {};
        if (BITS == 8) {
            for (int r = 0; r < R; ++r)
                for (int p = 0; p < P; ++p) sums[r][p] += x->start[first + r];
        }
#pragma GCC unroll 8
        for (int quad = 0; quad < 8; ++quad) {
            ByteVec codes[P];
            for (int p = 0; p < P; ++p) {
                const int at = BITS == 4 ? quad % 4 : quad;
                const ByteVec loaded = load_codes(panel + 128 * at + 64 * (half + p));
                codes[p] = BITS == 8 ? loaded : quad < 4 ? loaded & 15 : loaded >> 4;
            }
            for (int r = 0; r < R; ++r) {
                for (int p = 0; p < P; ++p)
                    sums[r][p] = dot4<BITS>(sums[r][p], codes[p], q + r * kGroup + 4 * quad);
            }
        }
        for (int p = 0; p < P; ++p) {
            const int64_t at = kLanes * (half + p);
            const Vec d = BITS == 4 ? load_half((const uint16_t*)(panel + 512) + at)
                                    : load((const float*)(panel + 1024) + at);
            for (int r = 0; r < R; ++r) {
                acc[r][p] += __builtin_convertvector(sums[r][p], Vec) * (d * scale[r]);
            }
            if (BITS == 4) {
                const Vec m = load_half((const uint16_t*)(panel + 512 + 64) + at);
                for (int r = 0; r < R; ++r) acc[r][p] += m * total[r];
            }
        }
        panel += BITS == 4 ? kGroupBytes4 : kGroupBytes8;
    }
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p) out[r][half + p] = acc[r][p];
}

template <int BITS, int R>
INLINE void multiply(const uint8_t* panel, const CodeTile* x, int64_t num_groups, int first,
                     Vec (*out)[kHalves], Upcoming& upcoming) {
    constexpr int kTogether = ISA >= 512 ? kHalves : 1;  // as there are registers for
    for (int half = 0; half < kHalves; half += kTogether)
        multiply<BITS, R, kTogether>(panel, half, x, num_groups, first, out, upcoming);
}

// `count` rows (up to kTile) of the tile that `row` begins, times one panel, plus its biases.
void multiply(const Matrix& w, int64_t panel, const Codes& x, int64_t row, int count,
              Vec (*out)[kHalves], Upcoming& upcoming) {
    const uint8_t* at = w.panels + panel * panel_bytes(w);
    const CodeTile* tiles = &x.at(row, 0);
    int r = 0;
#define ROWS(R)                                                                        \
    for (; r + R <= count; r += R) {                                                   \
        if (w.bits == 4) multiply<4, R>(at, tiles, groups(x), r, out + r, upcoming);   \
        else multiply<8, R>(at, tiles, groups(x), r, out + r, upcoming);               \
    }
    ROWS(4)
    ROWS(2)
    ROWS(1)
#undef ROWS
    if (w.bias) {
        for (int half = 0; half < kHalves; ++half) {
            const Vec bias = load(w.bias + panel * kPanel + half * kLanes);
            for (int i = 0; i < count; ++i) out[i][half] += bias;
        }
    }
}

// One row of weights as floats: for an embedding that is also the head.
INLINE void dequantize_row(const Matrix& w, int64_t row, float* out) {
    const uint8_t* panel = w.panels + row / kPanel * panel_bytes(w);
    const int64_t half = row % kPanel / kLanes, lane = row % kLanes;
    for (int64_t g = 0; g < w.k / kGroup; ++g) {
        const Vec d = w.bits == 4 ? load_half((const uint16_t*)(panel + 512) + kLanes * half)
                                  : load((const float*)(panel + 1024) + kLanes * half);
        const Vec m = w.bits == 4 ? load_half((const uint16_t*)(panel + 512 + 64) + kLanes * half)
                                  : d * -128.0f;
        for (int i = 0; i < kGroup; ++i, ++out) {
            const int64_t quad = i / 4, byte = 64 * half + 4 * lane + i % 4;
            const uint8_t code = panel[128 * (w.bits == 4 ? quad % 4 : quad) + byte];
            const int u = w.bits == 8 ? code : quad < 4 ? code & 15 : code >> 4;
            *out = d[lane] * u + m[lane];
        }
        panel += w.bits == 4 ? kGroupBytes4 : kGroupBytes8;
    }
}
