// Dropout on a CPU, alone and with the addition after it.

#include "cpu.h"

#include "lanes.h"

namespace farspan {

template <class T, bool ADD>
struct Row {
    const T *x, *residual;
    T* y;
    uint64_t key;
    int64_t first;
    uint32_t threshold;
    float scale;

    void eight(const T* from, const T* added, T* to, int64_t i) const {
        const Floats result = dropped<T>(load(from), key, first, i, threshold, scale);
        store(to, ADD ? load(added) + result : result);
    }

    void apply(int64_t features) const {
        int64_t i = 0;
        for (; i + LANES <= features; i += LANES) eight(x + i, ADD ? residual + i : nullptr, y + i, i);
        if (i == features) return;
        T from[LANES] = {}, added[LANES] = {}, to[LANES];
        std::copy(x + i, x + features, from);
        if (ADD) std::copy(residual + i, residual + features, added);
        eight(from, added, to, i);
        std::copy(to, to + (features - i), y + i);
    }
};

}  // namespace farspan

// As in dropout.cu, of float32 and bfloat16.
FARSPAN_EXPORT int dropout_apply(const void* x, const void* residual, void* y, const void* keys, const void* firsts, int64_t rows, int64_t features, int64_t first, int threshold, int dtype, int threads) {
    using namespace farspan;
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const T *from = static_cast<const T*>(x), *added = static_cast<const T*>(residual);
        T* to = static_cast<T*>(y);
        const int64_t *key = static_cast<const int64_t*>(keys), *begin = static_cast<const int64_t*>(firsts);
        const uint32_t cut = static_cast<uint32_t>(threshold);
        const float scale = dropout_scale(threshold);
        auto work = [&](int64_t row, int64_t last) {
            for (; row < last; ++row) {
                const int64_t at = row * features;
                const uint64_t k = static_cast<uint64_t>(key[row]);
                const int64_t f = begin == nullptr ? first : begin[row];
                if (added != nullptr) {
                    Row<T, true>{from + at, added + at, to + at, k, f, cut, scale}.apply(features);
                } else {
                    Row<T, false>{from + at, nullptr, to + at, k, f, cut, scale}.apply(features);
                }
            }
        };
        parallel(threads, rows, work, std::max<int64_t>(1, 16384 / features));
        return 0;
    });
}

// As in dropout.cu.
FARSPAN_EXPORT int dropout_keys(const void* samples, const void* positions, void* keys, int64_t base, int64_t a, int64_t b, int64_t c, int64_t samples_a, int64_t samples_b, int64_t samples_c, int64_t positions_a, int64_t positions_b, int64_t positions_c, int threads) {
    using namespace farspan;
    const KeyLayout layout{{a, b, c}, {samples_a, samples_b, samples_c}, {positions_a, positions_b, positions_c}};
    uint64_t* to = static_cast<uint64_t*>(keys);
    auto work = [&](int64_t i, int64_t last) {
        for (; i < last; ++i) {
            to[i] = layout.key(static_cast<uint64_t>(base), static_cast<const int64_t*>(samples),
                               static_cast<const int64_t*>(positions), i);
        }
    };
    parallel(threads, a * b * c, work, 16384);
    return 0;
}
