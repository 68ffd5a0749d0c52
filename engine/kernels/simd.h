// Vectors of 16 lanes, in the compiler's own vector types: one register with AVX-512, two with
// AVX2, four with SSE or NEON. Included once for each instruction set, inside its namespace.

typedef float Vec __attribute__((vector_size(64)));
typedef int32_t IntVec __attribute__((vector_size(64)));
typedef uint32_t WordVec __attribute__((vector_size(64)));
typedef uint8_t ByteVec __attribute__((vector_size(64)));
typedef uint16_t HalfVec __attribute__((vector_size(32)));
typedef int8_t SmallVec __attribute__((vector_size(16)));

constexpr int kLanes = 16;
constexpr float kNegInf = -INFINITY;

struct BFloat16 {
    uint16_t bits;
};

template <class A>
INLINE A smaller(A a, A b) { return b < a ? b : a; }
template <class A>
INLINE A larger(A a, A b) { return a < b ? b : a; }

INLINE Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

INLINE Vec load(const BFloat16* p) {
    HalfVec half;
    std::memcpy(&half, p, sizeof half);
    return (Vec)(__builtin_convertvector(half, WordVec) << 16);
}

INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

INLINE void store(BFloat16* p, Vec v) {
#if ISA == 513
    const HalfVec half = (HalfVec)_mm512_cvtneps_pbh((__m512)v);
#else
    WordVec words = (WordVec)v;
    words += 0x7fff + ((words >> 16) & 1);  // to the nearest, ties to even
    const HalfVec half = __builtin_convertvector(words >> 16, HalfVec);
#endif
    std::memcpy(p, &half, sizeof half);
}

INLINE float number(float x) { return x; }

INLINE float number(BFloat16 x) {
    const uint32_t bits = (uint32_t)x.bits << 16;
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
}

#if ISA == 513
// acc + the products of each lane's two numbers with the two of `pair`.
INLINE Vec dot2(Vec acc, WordVec lanes, uint32_t pair) {
    return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)lanes, (__m512bh)_mm512_set1_epi32(pair));
}
#endif

// IEEE half precision to float. Without the conversion instruction: shift the bits into place, which
// leaves the exponent's bias wrong by a factor of 2^112, also for subnormal numbers.
INLINE Vec load_half(const uint16_t* p) {
#if ISA >= 512
    return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#else
    HalfVec half;
    std::memcpy(&half, p, sizeof half);
    const WordVec bits = __builtin_convertvector(half, WordVec);
    const WordVec sign = (bits & 0x8000) << 16;
    const Vec magnitude = (Vec)((bits & 0x7fff) << 13) * 0x1p112f;
    return (Vec)((WordVec)magnitude | sign);
#endif
}

INLINE Vec splat(float x) { return Vec{} + x; }

INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }

INLINE Vec absolute(Vec v) { return (Vec)((WordVec)v & 0x7fffffff); }

// The sum of the lanes, always in the same order: halves onto halves.
INLINE float sum(Vec v) {
    v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    return v[0] + v[1];
}

INLINE float largest(Vec v) {
    v = max(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    v = max(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    v = max(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    return larger(v[0], v[1]);
}

// Adding this and taking it away again rounds to an integer, ties to even.
constexpr float kRounder = 12582912.0f;

// p · 2^n where x is above `least`, and 0 elsewhere.
INLINE Vec times_power(Vec p, Vec n, Vec x, float least) {
#if ISA >= 512
    const __mmask16 alive = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(least), _CMP_GT_OQ);
    return (Vec)_mm512_maskz_scalef_ps(alive, (__m512)p, (__m512)n);
#else
    const IntVec alive = x > least;
    const IntVec exponent = (__builtin_convertvector(alive ? n : splat(0), IntVec) + 127) << 23;
    return alive ? p * (Vec)exponent : splat(0.0f);
#endif
}

// exp for x <= 0, within 2 ulp; 0 below -87.
INLINE Vec exp_negative(Vec x) {
    const Vec n = (x * 1.44269504f + kRounder) - kRounder;
    Vec r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    Vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return times_power(p, n, x, -87.0f);
}

// 2^x for x <= 0, within 2 ulp; 0 below -126.
INLINE Vec exp2_negative(Vec x) {
#if ISA >= 512
    const Vec n = (Vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#else
    const Vec n = (x + kRounder) - kRounder;
#endif
    const Vec r = x - n;
    Vec p = splat(1.5370705e-4f);
    p = p * r + 1.33998482e-3f;
    p = p * r + 9.61837359e-3f;
    p = p * r + 5.55032901e-2f;
    p = p * r + 2.40226477e-1f;
    p = p * r + 6.93147182e-1f;
    p = p * r + 1.0f;
    return times_power(p, n, x, -126.0f);
}

// ln x for x > 0, within 2 ulp; below the smallest normal number, as of that one.
INLINE Vec natural_log(Vec x) {
    // x = m · 2^n, m from √½ on.
    const WordVec bits = (WordVec)max(x, splat(FLT_MIN)) - 0x3f3504f3u;
    const Vec n = __builtin_convertvector((IntVec)bits >> 23, Vec);
    const Vec r = (Vec)((bits & 0x7fffff) + 0x3f3504f3u) - 1.0f;
    Vec p = splat(7.0376836292e-2f);
    p = p * r - 1.1514610310e-1f;
    p = p * r + 1.1676998740e-1f;
    p = p * r - 1.2420140846e-1f;
    p = p * r + 1.4249322787e-1f;
    p = p * r - 1.6668057665e-1f;
    p = p * r + 2.0000714765e-1f;
    p = p * r - 2.4999993993e-1f;
    p = p * r + 3.3333331174e-1f;
    p = p * r * r * r - n * 2.12194440e-4f - r * r * 0.5f;
    return p + r + n * 0.693359375f;
}

// x · sigmoid(x)
INLINE Vec silu(Vec x) {
    const Vec t = exp_negative((Vec)((WordVec)x | 0x80000000));
    const Vec one = splat(1.0f);
    return x * ((x > 0.0f ? one : t) / (one + t));
}
