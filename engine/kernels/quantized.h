// Products of 8-bit activations with 4- or 8-bit weights.
//
// Both are quantised in groups of 32 along the inputs. A weight is d·u + m, with u a code of 0…15 or
// 0…255 and d, m of its group; an activation is s·q, q an integer of -127…127. A group contributes
//     d·s·Σuq + m·s·Σq
// where Σuq is exact, so a row's result depends on that row alone: the same bits in every batch.
//
// Weights lie in panels of 16 outputs. For each group a panel holds, for input quads 0…7, the four
// codes of each output side by side, 64 bytes a quad; with 4 bits, quads j and j + 4 share bytes, low
// and high nibble. Behind them: 4 bits: d and m of the 16 outputs in half precision; 8 bits: d in
// single precision, where m is -128 d.

constexpr int kGroup = 32;
constexpr int kPanel = 16;
constexpr int64_t kGroupBytes4 = 256 + 64;
constexpr int64_t kGroupBytes8 = 512 + 64;

#if ISA == 512
constexpr int kTile = 8;  // rows that share a pass over a panel
#else
constexpr int kTile = 4;
#endif

// Quantised rows [T, K].
struct Codes {
    int8_t* q;      // [T, K]
    float* scale;   // [T, K / 32]
    float* total;   // [T, K / 32]: scale · Σq
    int64_t k;
};

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
    std::memcpy(x.q + row * x.k + group * kGroup, small, sizeof small);
    const int64_t at = row * groups(x) + group;
    x.scale[at] = scale;
    x.total[at] = scale * sum(__builtin_convertvector(qa + qb, Vec));
}

// acc + the dot products of each lane's four codes with four activations.
template <int BITS>
INLINE IntVec dot4(IntVec acc, ByteVec codes, const int8_t* x) {
    int32_t quad;
    std::memcpy(&quad, x, sizeof quad);
#if ISA == 512
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

// R rows from `row` on times one panel: out[r] are the panel's 16 outputs.
template <int BITS, int R>
INLINE void multiply(const uint8_t* panel, const Codes& x, int64_t row, Vec* out) {
    const int64_t num_groups = groups(x);
    Vec acc[R];
    for (int r = 0; r < R; ++r) acc[r] = splat(0.0f);
    const int8_t* q = x.q + row * x.k;
    const float* scale = x.scale + row * num_groups;
    const float* total = x.total + row * num_groups;
    for (int64_t g = 0; g < num_groups; ++g) {
        IntVec sums[R] = {};
        Vec d, m;
        if (BITS == 4) {
            for (int half = 0; half < 2; ++half) {
                for (int j = 0; j < 4; ++j) {
                    const ByteVec both = load_codes(panel + 64 * j);
                    const ByteVec codes = half ? both >> 4 : both & 15;
                    const int8_t* at = q + g * kGroup + 16 * half + 4 * j;
                    for (int r = 0; r < R; ++r) sums[r] = dot4<4>(sums[r], codes, at + r * x.k);
                }
            }
            d = load_half((const uint16_t*)(panel + 256));
            m = load_half((const uint16_t*)(panel + 256 + 32));
            panel += kGroupBytes4;
        } else {
            for (int j = 0; j < 8; ++j) {
                const ByteVec codes = load_codes(panel + 64 * j);
                const int8_t* at = q + g * kGroup + 4 * j;
                for (int r = 0; r < R; ++r) sums[r] = dot4<8>(sums[r], codes, at + r * x.k);
            }
            d = load((const float*)(panel + 512));
            m = d * -128.0f;
            panel += kGroupBytes8;
        }
        for (int r = 0; r < R; ++r) {
            acc[r] += __builtin_convertvector(sums[r], Vec) * (d * scale[r * num_groups + g]);
            acc[r] += m * total[r * num_groups + g];
        }
    }
    for (int r = 0; r < R; ++r) out[r] = acc[r];
}

INLINE int64_t panel_bytes(const Matrix& w) {
    return w.k / kGroup * (w.bits == 4 ? kGroupBytes4 : kGroupBytes8);
}

// `count` rows (up to kTile) times one panel, plus its biases.
void multiply(const Matrix& w, int64_t panel, const Codes& x, int64_t row, int count, Vec* out) {
    const uint8_t* at = w.panels + panel * panel_bytes(w);
    int r = 0;
#define ROWS(R)                                                          \
    for (; r + R <= count; r += R) {                                     \
        if (w.bits == 4) multiply<4, R>(at, x, row + r, out + r);        \
        else multiply<8, R>(at, x, row + r, out + r);                    \
    }
#if ISA == 512
    ROWS(8)
#endif
    ROWS(4)
    ROWS(2)
    ROWS(1)
#undef ROWS
    if (w.bias) {
        const Vec bias = load(w.bias + panel * kPanel);
        for (int i = 0; i < count; ++i) out[i] += bias;
    }
}

// One row of weights as floats: for an embedding that is also the head.
INLINE void dequantize_row(const Matrix& w, int64_t row, float* out) {
    const uint8_t* panel = w.panels + row / kPanel * panel_bytes(w);
    const int lane = (int)(row % kPanel);
    for (int64_t g = 0; g < w.k / kGroup; ++g) {
        for (int i = 0; i < kGroup; ++i, ++out) {
            const int quad = i / 4, byte = lane * 4 + i % 4;
            if (w.bits == 4) {
                const uint8_t both = panel[64 * (quad % 4) + byte];
                const int code = quad < 4 ? both & 15 : both >> 4;
                const Vec d = load_half((const uint16_t*)(panel + 256));
                const Vec m = load_half((const uint16_t*)(panel + 256 + 32));
                *out = d[lane] * code + m[lane];
            } else {
                const float d = ((const float*)(panel + 512))[lane];
                *out = d * (panel[64 * quad + byte] - 128);
            }
        }
        panel += w.bits == 4 ? kGroupBytes4 : kGroupBytes8;
    }
}
