// Vectors of the processor's width, their exponential, and products of small matrices that are kept in registers.
//
// Plain C++ with the vector types of GCC and Clang: AVX-512, AVX2 and NEON come of the same text.  Each number of a
// product is one chain of additions in the order of the steps, whatever the processor, the width and the strides.
#pragma once

#include <cstdint>
#include <cstring>

namespace farspan {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, TILE_ROWS = 8, TILE_VECTORS = 2;  // of 32 registers
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, TILE_ROWS = 4, TILE_VECTORS = 2;  // of 16
#elif defined(__aarch64__)
constexpr int VECTOR_BYTES = 16, TILE_ROWS = 4, TILE_VECTORS = 4;  // of 32
#else
constexpr int VECTOR_BYTES = 16, TILE_ROWS = 2, TILE_VECTORS = 4;
#endif

template <class T>
struct VectorOf {
    typedef T type __attribute__((vector_size(VECTOR_BYTES)));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
constexpr int LANES = VECTOR_BYTES / sizeof(T);

template <class T>
inline int64_t whole_vectors(int64_t count) {
    return (count + LANES<T> - 1) / LANES<T> * LANES<T>;
}

template <class T>
inline Vector<T> load(const T* from) {
    Vector<T> x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

template <class T>
inline void store(T* to, Vector<T> x) {
    std::memcpy(to, &x, sizeof x);
}

inline Vector<float> larger(Vector<float> a, Vector<float> b) {  // b where a is no number
    return a > b ? a : b;
}

// To about one unit in the last place; 0 where that would be denormal; of no number it is none.  What is not finite
// for its size has no meaning: exponents here are at most a rounding error above 0.
inline Vector<float> exp(Vector<float> x) {
    constexpr float LOG2_E = 1.44269504F, LN2_HIGH = 0.693359375F, LN2_LOW = -2.12194440e-4F;
    constexpr float ROUNDS = 12582912.0F;  // 1.5 · 2^23: the sum's lowest bits are the nearest integer
    const Vector<float> sum = x * LOG2_E + ROUNDS, n = sum - ROUNDS;
    const Vector<float> r = (x - n * LN2_HIGH) - n * LN2_LOW;
    // (e^r − 1 − r) / r², |r| ≤ ln 2 / 2: least relative error of e^r, 1.1e-9, found by weighted least squares.
    Vector<float> p = r * 0x1.9f085ap-13F + 0x1.6d8d52p-10F;
    p = p * r + 0x1.111272p-7F;
    p = p * r + 0x1.55548ep-5F;
    p = p * r + 0x1.555554p-3F;
    p = p * r + 0.5F;
    p = p * (r * r) + r + 1.0F;
    Vector<uint32_t> power;
    std::memcpy(&power, &sum, sizeof power);
    power = (power << 23) + (127U << 23);
    Vector<float> scale;
    std::memcpy(&scale, &power, sizeof scale);
    const Vector<float> none = {};
    return x < none - 87.3F ? none : p * scale;
}

// c[r][0 … N vectors) = Σ_p a(r, p) · b[p][…], added to c where ADD; a(r, p) is a[r · lda + p], or a[p · lda + r] where
// TURNED.
template <class T, bool TURNED, bool ADD, int R, int N>
inline void tile(int64_t steps, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc) {
    Vector<T> sums[R][N];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) sums[r][n] = ADD ? load(c + r * ldc + n * LANES<T>) : Vector<T>{};
    }
    for (int64_t p = 0; p < steps; ++p) {
        Vector<T> right[N];
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) right[n] = load(b + p * ldb + n * LANES<T>);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const T left = TURNED ? a[p * lda + r] : a[r * lda + p];
#pragma GCC unroll 16
            for (int n = 0; n < N; ++n) sums[r][n] += left * right[n];
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) store(c + r * ldc + n * LANES<T>, sums[r][n]);
    }
}

// The rows that are left, fewer than 2 R.
template <class T, bool TURNED, bool ADD, int R, int N>
inline void last_rows(
    int64_t rows, int64_t steps, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc) {
    if (rows & R) {
        tile<T, TURNED, ADD, R, N>(steps, a, lda, b, ldb, c, ldc);
        a += R * (TURNED ? 1 : lda);
        c += R * ldc;
    }
    if constexpr (R > 1) last_rows<T, TURNED, ADD, R / 2, N>(rows, steps, a, lda, b, ldb, c, ldc);
}

template <class T, bool TURNED, bool ADD, int N>
inline void strip(
    int64_t rows, int64_t steps, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc) {
    for (; rows >= TILE_ROWS; rows -= TILE_ROWS) {
        tile<T, TURNED, ADD, TILE_ROWS, N>(steps, a, lda, b, ldb, c, ldc);
        a += TILE_ROWS * (TURNED ? 1 : lda);
        c += TILE_ROWS * ldc;
    }
    last_rows<T, TURNED, ADD, TILE_ROWS / 2, N>(rows, steps, a, lda, b, ldb, c, ldc);
}

// As ``tile``, of any number of rows and a width of whole vectors.
template <class T, bool TURNED, bool ADD>
__attribute__((noinline)) void product(
    int64_t rows, int64_t width, int64_t steps, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc) {
    int64_t at = 0;
    for (; at + TILE_VECTORS * LANES<T> <= width; at += TILE_VECTORS * LANES<T>) {
        strip<T, TURNED, ADD, TILE_VECTORS>(rows, steps, a, lda, b + at, ldb, c + at, ldc);
    }
    for (; at < width; at += LANES<T>) strip<T, TURNED, ADD, 1>(rows, steps, a, lda, b + at, ldb, c + at, ldc);
}

typedef float Four __attribute__((vector_size(16)));

inline Four load_four(const float* from) {
    Four x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

template <int A, int B, int C, int D>
inline Four choose(Four x, Four y) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(x, y, A, B, C, D);
#else
    typedef int32_t Places __attribute__((vector_size(16)));
    return __builtin_shuffle(x, y, Places{A, B, C, D});
#endif
}

// to[c][r] = from[r][c]
__attribute__((noinline)) inline void transpose(
    int64_t rows, int64_t columns, const float* from, int64_t from_row, float* to, int64_t to_row) {
    const int64_t last_row = rows / 4 * 4, last_column = columns / 4 * 4;
    for (int64_t c = 0; c < last_column; c += 4) {
        for (int64_t r = 0; r < last_row; r += 4) {
            const float* at = from + r * from_row + c;
            const Four x0 = load_four(at), x1 = load_four(at + from_row), x2 = load_four(at + 2 * from_row),
                       x3 = load_four(at + 3 * from_row);
            const Four low = choose<0, 4, 1, 5>(x0, x1), high = choose<2, 6, 3, 7>(x0, x1);
            const Four low_2 = choose<0, 4, 1, 5>(x2, x3), high_2 = choose<2, 6, 3, 7>(x2, x3);
            const Four turned[4] = {choose<0, 1, 4, 5>(low, low_2), choose<2, 3, 6, 7>(low, low_2),
                                    choose<0, 1, 4, 5>(high, high_2), choose<2, 3, 6, 7>(high, high_2)};
            for (int i = 0; i < 4; ++i) std::memcpy(to + (c + i) * to_row + r, &turned[i], sizeof turned[i]);
        }
    }
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = r < last_row ? last_column : 0; c < columns; ++c) to[c * to_row + r] = from[r * from_row + c];
    }
}

}  // namespace farspan
