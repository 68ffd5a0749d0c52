// Kernels for the CPU: paged attention, and quantised Llama-shaped decoders.
//
// The same headers are compiled for several instruction sets, each in a namespace of its own;
// `logitmill_isa` says which of them this machine has, and every call names one.

#include <sched.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_num_threads() { return 1; }
static int omp_get_max_threads() { return 1; }
#endif

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

#if defined(__x86_64__)
#include <immintrin.h>
#define PAUSE() _mm_pause()
#else
#define PAUSE() ((void)0)
#endif

#include "types.h"

// By some bits of the upper half at a time, the lowest first; returns the buffer that holds them.
template <int kBits>
static const uint64_t* sort_by_digits(uint64_t* keys, uint64_t* other, int64_t n) {
    constexpr int kSize = 1 << kBits, kPasses = (32 + kBits - 1) / kBits;
    uint32_t counts[kPasses][kSize] = {};
    for (int64_t i = 0; i < n; ++i) {
        const uint64_t half = keys[i] >> 32;
        for (int pass = 0; pass < kPasses; ++pass) ++counts[pass][half >> pass * kBits & (kSize - 1)];
    }
    for (int pass = 0; pass < kPasses; ++pass) {
        const int shift = 32 + pass * kBits;
        if (counts[pass][keys[0] >> shift & (kSize - 1)] == n) continue;  // all have this digit
        uint32_t begin = 0;
        for (uint32_t& count : counts[pass]) begin += std::exchange(count, begin);
        for (int64_t i = 0; i < n; ++i) other[counts[pass][keys[i] >> shift & (kSize - 1)]++] = keys[i];
        std::swap(keys, other);
    }
    return keys;
}

const uint64_t* sort_keys(uint64_t* keys, uint64_t* other, int64_t n, int64_t k) {
    if (n <= 2 * k && n >= 64) {
        return n < 2048 ? sort_by_digits<8>(keys, other, n) : sort_by_digits<11>(keys, other, n);
    }
    std::partial_sort(keys, keys + k, keys + n);
    return keys;
}

#define ISA 0
namespace isa0 {
#include "isa.h"
}  // namespace isa0

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define WIDE(call, ...)                                    \
    (isa == 513   ? isa513::call(__VA_ARGS__)              \
     : isa == 512 ? isa512::call(__VA_ARGS__)              \
     : isa == 256 ? isa256::call(__VA_ARGS__)              \
                  : isa0::call(__VA_ARGS__))

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#undef ISA
#define ISA 256
namespace isa256 {
#include "isa.h"
}  // namespace isa256
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512vnni")
#undef ISA
#define ISA 512
namespace isa512 {
#include "isa.h"
}  // namespace isa512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512vnni,avx512bf16")
#undef ISA
#define ISA 513
namespace isa513 {
#include "isa.h"
}  // namespace isa513
#pragma GCC pop_options

// The most able instruction set that both this machine and this library know: 513, 512, 256 or 0.
extern "C" int64_t logitmill_isa() {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return __builtin_cpu_supports("avx512bf16") ? 513 : 512;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 256 : 0;
}
#else
#define WIDE(call, ...) isa0::call(__VA_ARGS__)

extern "C" int64_t logitmill_isa() { return 0; }
#endif

// Write this step's keys and values into the cache, then attend to everything before each token.
// `bytes` is the size of an element: 4 float32, 2 bfloat16. Returns false, having done nothing, for
// shapes it cannot do: head dimensions must be multiples of 16, at most 256, and at most 16 query
// heads may share a key-value head.
extern "C" bool logitmill_attend(int64_t isa, const AttendArgs* args, int64_t bytes) {
    const Attention& a = args->attention;
    const bool fits = a.dim % 16 == 0 && a.value_dim % 16 == 0 && a.dim <= 256 &&
                      a.value_dim <= 256 && a.heads / a.kv_heads <= 16;
    if (!fits || (bytes != 2 && bytes != 4)) return false;
    WIDE(attend, *args, bytes);
    return true;
}

// Scratch memory that `logitmill_forward` needs for a step, in bytes.
extern "C" int64_t logitmill_scratch_bytes(int64_t isa, const Step* step) {
    return WIDE(scratch_bytes, *step);
}

// The final hidden states of a step's tokens.
extern "C" void logitmill_forward(int64_t isa, const Step* step) { WIDE(forward, *step); }

// out [R, N] float32 = x [R, K] float32 quantised, times w.
extern "C" void logitmill_linear(int64_t isa, const Matrix* w, const float* x, int64_t num_rows,
                                 float* out) {
    WIDE(linear, *w, x, num_rows, out);
}

// Copies the first tokens of cache blocks, in every tensor of the cache.
extern "C" void logitmill_copy_blocks(const CacheTensor* tensors, int64_t num_tensors,
                                      const BlockCopy* copies, int64_t num_copies) {
#pragma omp parallel for
    for (int64_t t = 0; t < num_tensors; ++t) {
        const CacheTensor& tensor = tensors[t];
        const int64_t head_bytes = tensor.block_size * tensor.token_bytes;
        for (int64_t c = 0; c < num_copies; ++c) {
            const int64_t bytes = copies[c].num_tokens * tensor.token_bytes;
            for (int64_t h = 0; h < tensor.heads; ++h) {
                const int64_t from = copies[c].source * tensor.heads + h;
                const int64_t to = copies[c].target * tensor.heads + h;
                std::memcpy(tensor.data + to * head_bytes, tensor.data + from * head_bytes, bytes);
            }
        }
    }
}

// The largest entry of each row, NaN if it holds one, and the lowest id that has it.
extern "C" void logitmill_scan(int64_t isa, const Rows* rows, float* top, int64_t* id) {
    WIDE(scan_rows, *rows, top, id);
}

// The largest entry of each row, and for each block of 256 the sum of e = exp(factor (z - top)) and
// of e (z - top).
extern "C" void logitmill_measure(int64_t isa, const Rows* rows, const float* factor, float* top,
                                  float* mass, float* moment) {
    WIDE(measure_rows, *rows, factor, top, mass, moment);
}

// ln Σ exp(z / temperature) of each row, and the entropy in nats.
extern "C" void logitmill_summarise(int64_t isa, const Rows* rows, const float* temperature,
                                    double* summary) {
    WIDE(summarise_rows, *rows, temperature, summary);
}

// The same, of the K candidates [R, K] of rows that are not `whole` [R], and of the others if `known`
// [2, R] is for another temperature: `known_at` [R]. Null candidates: all rows are whole.
extern "C" void logitmill_update_summaries(int64_t isa, const Rows* rows, const float* temperature,
                                           const bool* whole, const float* candidates, int64_t k,
                                           float* known_at, double* known, double* summary) {
    WIDE(update_summaries, *rows, temperature, whole, candidates, k, known_at, known, summary);
}

// ln Σ exp z of each row, the entropy in nats and the varentropy in nats², [3, R].
extern "C" void logitmill_moments(int64_t isa, const Rows* rows, double* out) {
    WIDE(moments_rows, *rows, out);
}

// The logprobs of each row, [R, V].
extern "C" void logitmill_log_softmax(int64_t isa, const Rows* rows, float* out) {
    WIDE(log_softmax_rows, *rows, out);
}

// The Jensen-Shannon divergence in nats between each row and others.count / rows.count of the others.
extern "C" void logitmill_divergence(int64_t isa, const Rows* rows, const Rows* others, double* out) {
    WIDE(divergence_rows, *rows, *others, out);
}

// The standard deviation of each row's finite entries.
extern "C" void logitmill_deviation(int64_t isa, const Rows* rows, float* out) {
    WIDE(deviation_rows, *rows, out);
}

// In place: entries for which z / temperature is below the row's floor become -inf.
extern "C" void logitmill_cut(int64_t isa, const Rows* rows, const float* temperature,
                              const float* floor) {
    WIDE(cut_rows, *rows, temperature, floor);
}

// How many entries of each row are not -inf.
extern "C" void logitmill_count(int64_t isa, const Rows* rows, int64_t* out) {
    WIDE(count_rows, *rows, out);
}

// exp(z - total) of candidates [R, K].
extern "C" void logitmill_probs(int64_t isa, const float* logits, const double* total, int64_t rows,
                                int64_t k, float* out) {
    WIDE(probs_rows, logits, total, rows, k, out);
}

// Count the tokens of n lanes at these positions, and no longer those that leave the windows.
extern "C" void logitmill_count_tokens(int64_t isa, const Counts* counts, const int64_t* lanes,
                                       const int64_t* positions, int64_t n) {
    WIDE(count_tokens, *counts, lanes, positions, n);
}

// Repetition, frequency and presence penalties, in place; lanes is [R].
extern "C" void logitmill_penalise(int64_t isa, const Rows* rows, const int64_t* lanes,
                                   const Counts* counts, const Penalties* penalties) {
    WIDE(penalise_rows, *rows, lanes, *counts, *penalties);
}

// Keep up matches with the tokens of n lanes at these positions; at those `broken` [n], if not null,
// all are over.
extern "C" void logitmill_extend_matches(int64_t isa, const Matches* matches, const int64_t* lanes,
                                         const int64_t* positions, const bool* broken, int64_t n) {
    WIDE(extend_matches, *matches, lanes, positions, broken, n);
}

// The matches of a lane's first `length` tokens, none longer than `reach`.
extern "C" void logitmill_find_matches(int64_t isa, const Matches* matches, int64_t lane,
                                       int64_t length, int64_t reach) {
    WIDE(find_matches, *matches, lane, length, reach);
}

// The DRY penalty, in place; lanes and positions are [R].
extern "C" void logitmill_penalise_matches(int64_t isa, const Rows* rows, const int64_t* lanes,
                                           const int64_t* positions, const Dry* dry) {
    WIDE(penalise_matches, *rows, lanes, positions, *dry);
}

// A token of each row, if it is greedy or has only common filters.
extern "C" void logitmill_choose(int64_t isa, const Choice* choice) { WIDE(choose_rows, *choice); }

// What is left of candidates where a mask [R, K] says so; `inside` [R]: it does not depend on tails.
extern "C" void logitmill_keep(int64_t isa, const Candidates* candidates, const bool* mask,
                               const bool* inside) {
    WIDE(keep_rows, *candidates, mask, inside);
}

// What is left at or above a floor [R]. `best` [R, K] are the candidates as they came, and what is in
// a tail is no larger than the last of them by the temperature [R]. Where that is not below the floor,
// tails are to be cut by the caller: in the rows that `cut` [R] names; returns whether there are any.
extern "C" bool logitmill_keep_above(int64_t isa, const Candidates* candidates, const float* floor,
                                     const float* best, const float* temperature, bool* cut) {
    return WIDE(keep_above_rows, *candidates, floor, best, temperature, cut);
}

// The `count` [R] likeliest that are left.
extern "C" void logitmill_keep_first(int64_t isa, const Candidates* candidates, const int64_t* count) {
    WIDE(keep_first_rows, *candidates, count);
}

// Those above which no more than a mass of `limit` [R] is ranked; probs is [R, K].
extern "C" void logitmill_keep_mass(int64_t isa, const Candidates* candidates, const float* probs,
                                    const float* limit) {
    WIDE(keep_mass_rows, *candidates, probs, limit);
}

// Which candidates [R, K] are nearest to `entropy` in surprise and together have mass `limit`, of
// equally near ones the lowest ids; for each row the mass of all, and how far the farthest kept is.
extern "C" void logitmill_typical(int64_t isa, const float* logits, const float* probs,
                                  const int64_t* ids, int64_t rows, int64_t k, const float* total,
                                  const float* entropy, const float* limit, bool* keep, float* mass,
                                  float* farthest) {
    WIDE(typical_rows, logits, probs, ids, rows, k, total, entropy, limit, keep, mass, farthest);
}

// Which candidates [R, K] stand before the curve of their probabilities has done the part `limit` of
// its bending; for each row whether that is certain if it has a `tail`, and whether the curve bends.
extern "C" void logitmill_bent(int64_t isa, const float* logits, const float* probs, int64_t rows,
                               int64_t k, const double* limit, const bool* tail, bool* keep,
                               bool* inside, bool* curve) {
    WIDE(bent_rows, logits, probs, rows, k, limit, tail, keep, inside, curve);
}

// MurmurHash3 x86_32 of n keys of a seed, a position and an id; see engine/rng.py.
extern "C" void logitmill_hash(int64_t isa, const int64_t* seeds, const int64_t* positions,
                               const int64_t* ids, int64_t n, int64_t domain, int64_t* out) {
    WIDE(hash_keys, seeds, positions, ids, n, (uint32_t)domain, out);
}

// The place of the largest sum of value and Gumbel noise in each row [R, K]. The values are single
// precision, or double with `doubles`; a row of ids begins `ids_stride` behind the one before.
extern "C" void logitmill_winner(int64_t isa, const void* values, bool doubles, const int64_t* ids,
                                 int64_t ids_stride, const int64_t* seeds, const int64_t* positions,
                                 int64_t rows, int64_t k, int64_t domain, int64_t* place) {
    if (doubles) {
        WIDE(winner_rows, (const double*)values, ids, ids_stride, seeds, positions, rows, k,
             (uint32_t)domain, place);
    } else {
        WIDE(winner_rows, (const float*)values, ids, ids_stride, seeds, positions, rows, k,
             (uint32_t)domain, place);
    }
}

// The k largest entries of each row, k <= V: largest first, equal ones by lowest id. No NaN.
// If `temperature` is not null, also what `logitmill_summarise` finds.
extern "C" void logitmill_select(int64_t isa, const Rows* rows, int64_t k, const float* temperature,
                                 float* values, int64_t* ids, double* summary) {
    WIDE(select_rows, *rows, k, temperature, values, ids, summary);
}

// Codes [N, K], a byte each, to panels; N is a multiple of 32. With 4 bits, d and m [N, K / 32] are
// half precision, with 8 bits d is single precision and m is not read.
extern "C" void logitmill_pack(const uint8_t* codes, const void* d, const uint16_t* m, int64_t n,
                               int64_t k, int64_t bits, uint8_t* panels) {
    const int64_t groups = k / 32, code_bytes = bits == 4 ? 512 : 1024, group_bytes = code_bytes + 128;
#pragma omp parallel for
    for (int64_t panel = 0; panel < n / 32; ++panel) {
        for (int64_t g = 0; g < groups; ++g) {
            uint8_t* at = panels + (panel * groups + g) * group_bytes;
            for (int64_t lane = 0; lane < 32; ++lane) {
                const int64_t row = panel * 32 + lane;
                const uint8_t* from = codes + row * k + g * 32;
                for (int64_t quad = 0; quad < 8; ++quad) {
                    for (int64_t i = 0; i < 4; ++i) {
                        const uint8_t code = from[4 * quad + i];
                        if (bits == 8 || quad < 4) at[128 * quad + 4 * lane + i] = code;
                        else at[128 * (quad - 4) + 4 * lane + i] |= (uint8_t)(code << 4);
                    }
                }
                if (bits == 8) {
                    ((float*)(at + code_bytes))[lane] = ((const float*)d)[row * groups + g];
                } else {
                    ((uint16_t*)(at + code_bytes))[lane] = ((const uint16_t*)d)[row * groups + g];
                    ((uint16_t*)(at + code_bytes + 64))[lane] = m[row * groups + g];
                }
            }
        }
    }
}
