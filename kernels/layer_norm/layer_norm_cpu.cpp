// Layer normalisation on a CPU, alone or after dropout and addition: what layer_norm.cu computes, row by row.
//
// Bound by memory where rows are many: a row is read from it once and gone through again while it lies in the cache.

#include <cmath>
#include <vector>

#include "cpu.h"

#include "lanes.h"

namespace farspan {

// f(i, k) for every vector, from feature i on, of a row of n; the sums of different k < SUMS do not wait for one another.
constexpr int SUMS = 4;
template <class F>
inline void each(int n, const F& f) {
    int i = 0;
    for (; i + SUMS * LANES <= n; i += SUMS * LANES) {
        for (int k = 0; k < SUMS; ++k) f(i + k * LANES, k);
    }
    for (; i < n; i += LANES) f(i, 0);
}
inline float sum(const Floats (&parts)[SUMS]) { return sum((parts[0] + parts[1]) + (parts[2] + parts[3])); }

// Float32 weights, or 1 or 0 where there are none.
inline std::vector<float> wide_weights(const void* from, int dtype, int n, float otherwise) {
    std::vector<float> to(static_cast<size_t>(n), otherwise);
    if (from == nullptr) return to;
    with_dtype(dtype, [&](auto zero) {
        for (int i = 0; i < n; i += LANES) store(&to[i], load(static_cast<const decltype(zero)*>(from) + i));
        return 0;
    });
    return to;
}

struct Dropout {
    const int64_t* keys;
    uint32_t threshold;
    float scale;

    template <class T>
    Floats apply(Floats x, uint64_t key, int i) const {
        return dropped<T>(x, key, 0, i, threshold, scale);
    }
};

template <class T>
struct Forward {
    const T *x, *residual;
    const float *weight, *bias;
    Dropout dropout;
    T *total, *y;
    float *means, *rstds;
    int features;
    float eps;

    void row(int64_t row) const {
        const int n = features;
        const T *from = x + row * n, *added = residual + row * n, *values = from;
        Floats sums[SUMS] = {}, squares[SUMS] = {};
        if (residual == nullptr) {
            each(n, [&](int i, int k) { sums[k] += load(from + i); });
        } else {
            T* to = total + row * n;
            values = to;
            auto add = [&](Floats a, int i, int k) {
                const Floats both = rounded<T>(load(added + i) + a);
                store(to + i, both);
                sums[k] += both;
            };
            if (dropout.keys == nullptr) {
                each(n, [&](int i, int k) { add(load(from + i), i, k); });
            } else {
                const uint64_t key = static_cast<uint64_t>(dropout.keys[row]);
                each(n, [&](int i, int k) { add(dropout.template apply<T>(load(from + i), key, i), i, k); });
            }
        }
        const float mean = sum(sums) / static_cast<float>(n);
        each(n, [&](int i, int k) {
            const Floats centred = load(values + i) - mean;
            squares[k] += centred * centred;
        });
        const float rstd = 1.0f / std::sqrt(sum(squares) / static_cast<float>(n) + eps);
        means[row] = mean;
        rstds[row] = rstd;
        T* to = y + row * n;
        each(n, [&](int i, int) {
            store(to + i, (load(values + i) - mean) * rstd * load(weight + i) + load(bias + i));
        });
    }
};

template <class T>
struct Backward {
    const T *of_total, *of_y, *total;
    const float *weight, *means, *rstds;
    Dropout dropout;
    T *of_x, *of_residual;
    int features;

    // Adds the row to the gradients of weight and bias where they are not null.
    void row(int64_t row, float* of_weight, float* of_bias) const {
        const int n = features;
        const T *values = total + row * n, *upstream = of_y + row * n, *more = of_total + row * n;
        const float mean = means[row], rstd = rstds[row];
        Floats means_of[SUMS] = {}, scales_of[SUMS] = {};
        auto gather = [&](int i, int k, Floats u, Floats normalised) {
            const Floats g = u * load(weight + i);
            means_of[k] += g;
            scales_of[k] += g * normalised;
        };
        if (of_weight == nullptr) {
            each(n, [&](int i, int k) { gather(i, k, load(upstream + i), (load(values + i) - mean) * rstd); });
        } else {
            each(n, [&](int i, int k) {
                const Floats u = load(upstream + i), normalised = (load(values + i) - mean) * rstd;
                store(of_weight + i, load(of_weight + i) + u * normalised);
                store(of_bias + i, load(of_bias + i) + u);
                gather(i, k, u, normalised);
            });
        }
        const float of_mean = sum(means_of) / static_cast<float>(n), of_scale = sum(scales_of) / static_cast<float>(n);
        const uint64_t key = dropout.keys == nullptr ? 0 : static_cast<uint64_t>(dropout.keys[row]);
        T *to_x = of_x + row * n, *to_residual = of_residual + row * n;
        each(n, [&](int i, int) {
            const Floats normalised = (load(values + i) - mean) * rstd;
            Floats gradient = (load(upstream + i) * load(weight + i) - of_mean - normalised * of_scale) * rstd;
            if (of_total != nullptr) gradient += load(more + i);
            gradient = rounded<T>(gradient);
            if (of_residual != nullptr) store(to_residual + i, gradient);
            if (of_x == nullptr) return;
            if (dropout.keys != nullptr) gradient = dropout.template apply<T>(gradient, key, i);
            store(to_x + i, gradient);
        });
    }
};

inline Dropout dropout_of(const void* keys, int threshold) {
    return {static_cast<const int64_t*>(keys), static_cast<uint32_t>(threshold), dropout_scale(threshold)};
}

}  // namespace farspan

// As in layer_norm.cu, of float32 and bfloat16.
FARSPAN_EXPORT int layer_norm_forward(const void* x, const void* residual, const void* weight, const void* bias, const void* keys, void* total, void* y, void* mean, void* rstd, int64_t rows, int64_t features, int threshold, float eps, int dtype, int weight_dtype, int threads) {
    using namespace farspan;
    const int n = static_cast<int>(features);
    const std::vector<float> weights = wide_weights(weight, weight_dtype, n, 1.0f);
    const std::vector<float> biases = wide_weights(bias, weight_dtype, n, 0.0f);
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const Forward<T> forward{static_cast<const T*>(x), static_cast<const T*>(residual), weights.data(), biases.data(),
                                 dropout_of(keys, threshold), static_cast<T*>(total), static_cast<T*>(y),
                                 static_cast<float*>(mean), static_cast<float*>(rstd), n, eps};
        auto work = [&](int64_t row, int64_t last) {
            for (; row < last; ++row) forward.row(row);
        };
        parallel(threads, rows, work, std::max<int64_t>(1, 16384 / n));
        return 0;
    });
}

// As in layer_norm.cu: `blocks` parts of the rows sum the gradients of weight and bias, each by itself.
FARSPAN_EXPORT int layer_norm_backward(const void* of_total, const void* of_y, const void* total, const void* mean, const void* rstd, const void* weight, const void* keys, void* of_x, void* of_residual, void* of_weight, void* of_bias, void* partial, int64_t rows, int64_t features, int blocks, int threshold, int dtype, int weight_dtype, int threads) {
    using namespace farspan;
    const int n = static_cast<int>(features);
    const std::vector<float> weights = wide_weights(weight, weight_dtype, n, 1.0f);
    float* sums = static_cast<float*>(partial);  // [2, blocks, features]
    const int code = with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const Backward<T> backward{static_cast<const T*>(of_total), static_cast<const T*>(of_y), static_cast<const T*>(total),
                                   weights.data(), static_cast<const float*>(mean), static_cast<const float*>(rstd),
                                   dropout_of(keys, threshold), static_cast<T*>(of_x), static_cast<T*>(of_residual), n};
        auto work = [&](int64_t block, int64_t last) {
            for (; block < last; ++block) {
                float *for_weight = sums == nullptr ? nullptr : sums + block * n, *for_bias = nullptr;
                if (sums != nullptr) {
                    for_bias = sums + (blocks + block) * n;
                    std::fill_n(for_weight, n, 0.0f);
                    std::fill_n(for_bias, n, 0.0f);
                }
                for (int64_t row = rows * block / blocks; row < rows * (block + 1) / blocks; ++row) {
                    backward.row(row, for_weight, for_bias);
                }
            }
        };
        parallel(threads, blocks, work);
        return 0;
    });
    if (code || sums == nullptr) return code;
    return with_dtype(weight_dtype, [&](auto zero) {
        using W = decltype(zero);
        for (int which = 0; which < 2; ++which) {
            W* to = static_cast<W*>(which == 0 ? of_weight : of_bias);
            if (to == nullptr) continue;
            const float* parts = sums + static_cast<int64_t>(which) * blocks * n;
            for (int i = 0; i < n; i += LANES) {
                Floats all = {};
                for (int block = 0; block < blocks; ++block) all += load(parts + static_cast<int64_t>(block) * n + i);
                store(to + i, all);
            }
        }
        return 0;
    });
}
