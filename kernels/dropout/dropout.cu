// Dropout, alone and with the addition after it.  Forward and backward are the same function.
//
// Bound by memory: x is read and y written once (and the other summand read); a pair of values takes ten integer
// operations besides, which hide behind that.  Rows follow one another without a gap whatever their length, so a thread
// takes 16 aligned bytes that may belong to several rows.

#include "device.h"

#include "dropout.h"

namespace farspan {

constexpr int THREADS = 256;
constexpr int VECTORS = 2;  // that a thread has in flight

struct Dropout {
    const void *x, *residual;
    void* y;
    const int64_t *keys, *firsts;
    int64_t elements, features, first;
    uint32_t threshold;
    float scale;
};

// The 16-bit numbers of N features from `feature` on, two a word.
template <int N>
FARSPAN_DEVICE void random_numbers(uint64_t key, int64_t feature, uint32_t (&numbers)[N / 2]) {
    const uint32_t pair = static_cast<uint32_t>(feature >> 1);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) numbers[i] = dropout_pair(key, pair + i);
    if (feature & 1) {  // they begin in the middle of a pair
        const uint32_t last = dropout_pair(key, pair + N / 2);
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
            numbers[i] = numbers[i] >> 16 | (i + 1 < N / 2 ? numbers[i + 1 < N / 2 ? i + 1 : i] : last) << 16;
        }
    }
}

template <class T>
FARSPAN_DEVICE T dropped(T x, uint32_t number, const Dropout& a) {
    return number >= a.threshold ? from_float<T>(__fmul_rn(to_float(x), a.scale)) : T{};
}

template <class T>
FARSPAN_DEVICE T sum(T x, T y) {
    return from_float<T>(to_float(x) + to_float(y));
}

template <class T>
__global__ void __launch_bounds__(THREADS, 4) dropout_kernel(Dropout a) {
    constexpr int N = 16 / sizeof(T);
    constexpr int64_t TILE = THREADS * VECTORS * N;
    const T *x = static_cast<const T*>(a.x), *residual = static_cast<const T*>(a.residual);
    T* y = static_cast<T*>(a.y);

    const int64_t begin = blockIdx.x * TILE;
    Vector<T, N> values[VECTORS], added[VECTORS];
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        const int64_t at = begin + (v * THREADS + static_cast<int>(threadIdx.x)) * N;
        if (at + N > a.elements) break;
        values[v] = load_once<T, N>(x + at);
        if (residual != nullptr) added[v] = load_once<T, N>(residual + at);
    }

    // One long division a thread, short ones after it.
    const int64_t first_row = begin / a.features;
    const uint32_t first_column = static_cast<uint32_t>(begin - first_row * a.features);
    const uint32_t features = static_cast<uint32_t>(a.features);
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        const uint32_t offset = (v * THREADS + threadIdx.x) * N;
        const int64_t at = begin + offset;
        if (at + N > a.elements) break;
        const uint32_t rows = (first_column + offset) / features, column = first_column + offset - rows * features;
        int64_t row = first_row + rows;

        uint32_t numbers[N / 2];
        int64_t first = a.firsts == nullptr ? a.first : a.firsts[row];
        random_numbers<N>(static_cast<uint64_t>(a.keys[row]), first + column, numbers);
        for (uint32_t end = features - column; end < N; end += features) {  // further rows begin in the vector
            ++row;
            uint32_t others[N / 2];
            if (a.firsts != nullptr) first = a.firsts[row];
            random_numbers<N>(static_cast<uint64_t>(a.keys[row]), first - static_cast<int64_t>(end), others);
#pragma unroll
            for (uint32_t i = 0; i < N / 2; ++i) {
                const uint32_t keep = end > 2 * i + 1 ? 0xffffffffu : end > 2 * i ? 0xffffu : 0u;
                numbers[i] = (numbers[i] & keep) | (others[i] & ~keep);
            }
        }

#pragma unroll
        for (int i = 0; i < N; ++i) {
            values[v][i] = dropped(values[v][i], dropout_number(numbers, i), a);
            if (residual != nullptr) values[v][i] = sum(added[v][i], values[v][i]);
        }
        store(y + at, values[v]);
    }

    // What is left after the last whole vector.
    const int64_t at = a.elements / N * N + threadIdx.x;
    if (blockIdx.x + 1 == gridDim.x && at < a.elements) {
        const int64_t row = at / a.features;
        const int64_t feature = (a.firsts == nullptr ? a.first : a.firsts[row]) + (at - row * a.features);
        const uint32_t pair = dropout_pair(static_cast<uint64_t>(a.keys[row]), static_cast<uint32_t>(feature >> 1));
        const T value = dropped(x[at], feature & 1 ? pair >> 16 : pair & 0xffffu, a);
        y[at] = residual == nullptr ? value : sum(residual[at], value);
    }
}

__global__ void __launch_bounds__(THREADS) keys_kernel(const int64_t* samples, const int64_t* positions, uint64_t* keys, uint64_t base, KeyLayout layout) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (i < layout.sizes[0] * layout.sizes[1] * layout.sizes[2]) keys[i] = layout.key(base, samples, positions, i);
}

}  // namespace farspan

// y = residual + dropout(x), all [rows, features] of `dtype`; residual null: 0.
// keys, firsts: [rows] int64; firsts null: `first` for all.  Fewer than 2^31 features.
FARSPAN_EXPORT int dropout_apply(const void* x, const void* residual, void* y, const void* keys, const void* firsts, int64_t rows, int64_t features, int64_t first, int threshold, int dtype, void* stream) {
    using namespace farspan;
    const Dropout a{x, residual, y, static_cast<const int64_t*>(keys), static_cast<const int64_t*>(firsts),
                    rows * features, features, first, static_cast<uint32_t>(threshold), dropout_scale(threshold)};
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const int64_t tile = THREADS * VECTORS * (16 / sizeof(T));
        const dim3 grid(static_cast<unsigned>((a.elements + tile - 1) / tile));
        return launch(dropout_kernel<T>, grid, dim3(THREADS), 0, stream, a);
    });
}

// keys = dropout_key(base, samples, positions): [a, b, c] int64, the others int64 with strides.
FARSPAN_EXPORT int dropout_keys(const void* samples, const void* positions, void* keys, int64_t base, int64_t a, int64_t b, int64_t c, int64_t samples_a, int64_t samples_b, int64_t samples_c, int64_t positions_a, int64_t positions_b, int64_t positions_c, void* stream) {
    using namespace farspan;
    const KeyLayout layout{{a, b, c}, {samples_a, samples_b, samples_c}, {positions_a, positions_b, positions_c}};
    return launch(keys_kernel, dim3(static_cast<unsigned>((a * b * c + THREADS - 1) / THREADS)), dim3(THREADS), 0, stream,
                  static_cast<const int64_t*>(samples), static_cast<const int64_t*>(positions),
                  static_cast<uint64_t*>(keys), static_cast<uint64_t>(base), layout);
}
