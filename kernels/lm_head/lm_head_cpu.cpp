// The pointwise part of the language-model head's cross-entropy on a CPU: see lm_head.cu, whose functions and layouts
// these are.
//
// A tile is read once each way where torch's own operations pass over the logits eight times and take three
// exponentials of each.  Sums are made in an order that depends on the sizes alone.
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "cpu.h"

using namespace farspan;

namespace {

// Numbers of a vector: a register's.
#if defined(__AVX512F__)
constexpr int N = 16;
#elif defined(__AVX__)
constexpr int N = 8;
#else
constexpr int N = 4;
#endif
constexpr int PARTS = 32 / N;  // vectors that a sum is made in: many short sums round less than few long ones
constexpr int64_t CHUNK = 1024;  // logits whose maximum is found before their exponentials; a multiple of N
constexpr int64_t ROWS = 64;      // as in lm_head.cu
constexpr int64_t COLUMNS = 512;  // columns that a thread turns at a time; a multiple of N

using Floats = float __attribute__((vector_size(N * 4)));
using Ints = int32_t __attribute__((vector_size(N * 4)));
using Halves = uint16_t __attribute__((vector_size(N * 2)));

template <class To, class From>
inline To bits(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}

// ---- numbers ---------------------------------------------------------------------------------------------------------

struct bf16 {
    uint16_t value;
};
struct fp16 {
    _Float16 value;
};

inline Floats load(const float* from) {
    Floats x;
    std::memcpy(&x, from, sizeof(x));
    return x;
}
inline Floats load(const bf16* from) {
    Halves x;
    std::memcpy(&x, from, sizeof(x));
    return bits<Floats>(__builtin_convertvector(x, Ints) << 16);
}
inline Floats load(const fp16* from) {
#if defined(__AVX512F__)
    return bits<Floats>(_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#else
    Floats x;
    for (int i = 0; i < N; ++i) x[i] = static_cast<float>(from[i].value);
    return x;
#endif
}

inline void store(float* to, const Floats& x) { std::memcpy(to, &x, sizeof(x)); }
inline void store(bf16* to, const Floats& x) {  // to nearest, ties to even
    const Ints all = bits<Ints>(x), rounded = all + 0x7fff + ((all >> 16) & 1);
    // What is not a number is cut off: a carry could make it one.
    const Halves y = __builtin_convertvector(((x == x) ? rounded : all) >> 16, Halves);
    std::memcpy(to, &y, sizeof(y));
}
inline void store(fp16* to, const Floats& x) {
#if defined(__AVX512F__)
    const __m256i y = _mm512_maskz_cvtps_ph(0xffff, bits<__m512>(x), _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), y);
#else
    for (int i = 0; i < N; ++i) to[i].value = static_cast<_Float16>(x[i]);
#endif
}

// The first `count` of a vector; the others are `rest`.
template <class T>
inline Floats load_some(const T* from, int64_t count, float rest) {
    T copy[N] = {};
    std::memcpy(static_cast<void*>(copy), from, static_cast<size_t>(count) * sizeof(T));
    Floats x = load(copy);
    for (int64_t i = count; i < N; ++i) x[i] = rest;
    return x;
}

inline Floats all(float x) { return x - Floats{}; }
inline Floats larger(const Floats& a, const Floats& b) { return a > b ? a : b; }
inline float sum(const Floats& x) {
    float y[N];
    std::memcpy(y, &x, sizeof(y));
    for (int width = N / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) y[i] += y[i + width];
    }
    return y[0];
}
inline float largest(const Floats& x) {
    float y = x[0];
    for (int i = 1; i < N; ++i) y = x[i] > y ? x[i] : y;
    return y;
}
inline bool any(const Ints& x) {
    int64_t y[N / 2], all_bits = 0;
    std::memcpy(y, &x, sizeof(y));
    for (int64_t part : y) all_bits |= part;
    return all_bits != 0;
}

// exp(x) to 2 units in the last place for x up to 88; 0 below -87, where float32 has no full precision left.
// x = n ln 2 + r with |r| <= ln 2 / 2, and exp(r) by Taylor's series to r^7, whose rest is below 6e-9.
inline Floats exponential(const Floats& x) {
    const Floats magic = all(12582912.0f);  // 1.5 * 2^23: to add it is to round to a whole number
    const Floats bounded = x > 88.0f ? all(88.0f) : (x < -87.0f ? all(-87.0f) : x);
    const Floats shifted = bounded * 1.44269504f + magic, n = shifted - magic;
    // ln 2 in two parts: n times the first is exact.
    const Floats r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
    Floats p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const Floats power = bits<Floats>((bits<Ints>(shifted) - bits<Ints>(magic) + 127) << 23);
    return x < -87.0f ? Floats{} : p * power;
}
inline float exponential(float x) { return exponential(all(x))[0]; }

// ---- forward ---------------------------------------------------------------------------------------------------------

struct Found {
    float maximum;
    double total;  // the sum of exp(logit - maximum)
    int64_t best;  // the first column that has the maximum; -1: none is above the one before
};

// The first place that has a number, of `whole` and those of `last` after them, one of which has.
template <class T>
int64_t place_of(float number, const T* numbers, int64_t whole, const Floats& last) {
    int64_t i = 0;
    while (i < whole && !any(load(numbers + i) == all(number))) i += N;
    const Floats x = i < whole ? load(numbers + i) : last;
    int place = 0;
    while (x[place] != number) ++place;
    return i + place;
}

template <class T>
void look_at(Found& found, const T* row, int64_t columns) {
    for (int64_t first = 0; first < columns; first += CHUNK) {
        const T* chunk = row + first;
        const int64_t count = std::min(CHUNK, columns - first), whole = count / N * N;
        const float lowest = -std::numeric_limits<float>::infinity();
        const Floats last = whole < count ? load_some(chunk + whole, count - whole, lowest) : all(lowest);
        Floats highest = last;
        for (int64_t i = 0; i < whole; i += N) highest = larger(load(chunk + i), highest);
        const float maximum = largest(highest);
        if (maximum > found.maximum) {
            found.total *= exponential(found.maximum - maximum);
            found.maximum = maximum;
            found.best = first + place_of(maximum, chunk, whole, last);
        }
        const Floats highest_so_far = all(found.maximum);
        Floats sums[PARTS] = {};
        int64_t i = 0;
        for (; i + PARTS * N <= whole; i += PARTS * N) {
#pragma GCC unroll 8
            for (int k = 0; k < PARTS; ++k) sums[k] += exponential(load(chunk + i + k * N) - highest_so_far);
        }
        for (int k = 0; i < whole; i += N, ++k) sums[k] += exponential(load(chunk + i) - highest_so_far);
        if (whole < count) sums[0] += exponential(last - highest_so_far);
        for (int k = 1; k < PARTS; ++k) sums[0] += sums[k];
        found.total += sum(sums[0]);
    }
}

template <class T>
void statistics(
    const T* logits, const int64_t* labels, float* maxima, float* totals, float* label_logits, int64_t* bests,
    int64_t rows, int64_t columns, int64_t stride, int64_t first_entry, int threads
) {
    parallel(threads, rows, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
            const T* numbers = logits + row * stride;
            Found found{maxima[row], totals[row], -1};
            look_at(found, numbers, columns);
            maxima[row] = found.maximum;
            totals[row] = static_cast<float>(found.total);
            if (found.best >= 0) bests[row] = first_entry + found.best;
            const int64_t place = labels[row] - first_entry;
            if (place >= 0 && place < columns) label_logits[row] = load_some(numbers + place, 1, 0.0f)[0];
        }
    }, 8);
}

// ---- backward --------------------------------------------------------------------------------------------------------

template <class T>
void gradient(
    const T* logits, T* gradients, const int64_t* labels, const float* maxima, const float* totals,
    const float* upstream, float* partial, int64_t rows, int64_t columns, int64_t stride, int64_t first_entry, int threads
) {
    const int64_t across = (columns + COLUMNS - 1) / COLUMNS, down = (rows + ROWS - 1) / ROWS;
    parallel(threads, across * down, [&](int64_t first_piece, int64_t last_piece) {
        for (int64_t piece = first_piece; piece < last_piece; ++piece) {
            const int64_t first_row = piece / across * ROWS, last_row = std::min(first_row + ROWS, rows);
            const int64_t first = piece % across * COLUMNS, count = std::min(COLUMNS, columns - first);
            const int64_t whole = count / N * N;
            float sums[COLUMNS] = {};
            for (int64_t row = first_row; row < last_row; ++row) {
                const T* from = logits + row * stride + first;
                T* to = gradients + row * stride + first;
                const Floats maximum = all(maxima[row]), scale = all(upstream[row] / totals[row]);
                const int64_t place = labels[row] - first_entry - first;
                const bool here = place >= 0 && place < count;
                const float of_label = here ? load_some(from + place, 1, 0.0f)[0] : 0.0f;  // `to` may be `from`
                for (int64_t i = 0; i < whole; i += N) {
                    const Floats value = exponential(load(from + i) - maximum) * scale;
                    store(sums + i, load(sums + i) + value);
                    store(to + i, value);
                }
                if (whole < count) {
                    const Floats value = exponential(load_some(from + whole, count - whole, 0.0f) - maximum) * scale;
                    T rest[N];
                    store(rest, value);
                    std::memcpy(static_cast<void*>(to + whole), rest, static_cast<size_t>(count - whole) * sizeof(T));
                    for (int64_t i = whole; i < count; ++i) sums[i] += value[i - whole];
                }
                if (here) {
                    T rest[N];
                    store(rest, exponential(all(of_label) - maximum) * scale - upstream[row]);
                    to[place] = rest[0];
                    sums[place] -= upstream[row];
                }
                if (first + count == columns) {
                    std::memset(static_cast<void*>(to + count), 0, static_cast<size_t>(stride - columns) * sizeof(T));
                }
            }
            if (partial != nullptr) {
                std::memcpy(partial + piece / across * columns + first, sums, static_cast<size_t>(count) * sizeof(float));
            }
        }
    });
}

template <class F>
int with_dtype(int dtype, F function) {
    switch (dtype) {
        case FLOAT32:
            return function(float{}), 0;
        case BFLOAT16:
            return function(bf16{}), 0;
        case FLOAT16:
            return function(fp16{}), 0;
        default:
            return INVALID;
    }
}

}  // namespace

FARSPAN_EXPORT int lm_head_statistics(const void* logits, const void* labels, void* maximum, void* total, void* label_logit, void* best, int64_t rows, int64_t columns, int64_t stride, int64_t first, int dtype, int threads) {
    return with_dtype(dtype, [&](auto zero) {
        statistics(
            static_cast<const decltype(zero)*>(logits), static_cast<const int64_t*>(labels),
            static_cast<float*>(maximum), static_cast<float*>(total), static_cast<float*>(label_logit),
            static_cast<int64_t*>(best), rows, columns, stride, first, threads
        );
    });
}

FARSPAN_EXPORT int lm_head_gradient(const void* logits, void* gradient, const void* labels, const void* maximum, const void* total, const void* upstream, void* partial, int64_t rows, int64_t columns, int64_t stride, int64_t first, int dtype, int threads) {
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        ::gradient(
            static_cast<const T*>(logits), static_cast<T*>(gradient), static_cast<const int64_t*>(labels),
            static_cast<const float*>(maximum), static_cast<const float*>(total), static_cast<const float*>(upstream),
            static_cast<float*>(partial), rows, columns, stride, first, threads
        );
    });
}
