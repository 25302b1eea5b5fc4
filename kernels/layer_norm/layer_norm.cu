// Layer normalisation, alone or after dropout and addition, forward and backward.
//
// Bound by memory.  In numbers of x's size, forward reads x and the residual and writes the sum and its normalised form
// (four; alone two), backward reads the gradients of both and the sum and writes those of x and of the residual (five;
// alone three).  At [8192, 1024] in bfloat16 that is 67 and 84 MB: 15.6 and 19.5 µs at 4.3 TB/s.
//
// A row belongs to `warps` warps (one up to 1,024 features), a lane keeps up to 32 of its numbers: vectors of 16 bytes,
// neighbouring lanes side by side.
//
// Backward: a block goes through many rows, one block to a multiprocessor, so that the gradients of weight and bias add
// up in registers and few partial sums leave the block.  Those registers leave little room for rows on their way, hence
// the next row comes through shared memory, in the background.  Every lane reads there what itself has copied, so that
// no barrier is needed.  A second kernel adds the blocks' sums, in an order that is always the same.

#include <type_traits>

#include "device.h"

#include "dropout.h"

namespace farspan {

constexpr int LANE = 32;  // numbers of a row that a lane takes at most
constexpr int FORWARD_WARPS = 4;  // of a block, where a row takes one
constexpr int BACKWARD_WARPS = 16;  // of a block, at most
constexpr int MOST_FEATURES = 16384;

// How a row is spread: vector v of a lane begins at feature at(v), and there is none from `features` on.
template <class T, int E>
struct Spread {
    static constexpr int N = 16 / sizeof(T);  // numbers of a vector
    static constexpr int V = E / N;           // vectors of a lane
    int warps, part, features;                // part: which of the row's warps

    FARSPAN_DEVICE int at(int v) const { return ((v * warps + part) * WARP + lane_index()) * N; }
};

// N weights, float32 where `wide`, else as x is.
template <class T, int N>
FARSPAN_DEVICE void load_weights(float (&to)[N], const void* from, bool wide, int at, float otherwise) {
    if (from == nullptr) {
#pragma unroll
        for (int i = 0; i < N; ++i) to[i] = otherwise;
    } else if (wide) {
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            const Vector<float, 4> values = load<float, 4>(static_cast<const float*>(from) + at + i);
#pragma unroll
            for (int j = 0; j < 4; ++j) to[i + j] = values[j];
        }
    } else {
        const Vector<T, N> values = load<T, N>(static_cast<const T*>(from) + at);
#pragma unroll
        for (int i = 0; i < N; ++i) to[i] = to_float(values[i]);
    }
}

// What dropout leaves of N values from the even feature `at` on.
template <class T, int N>
FARSPAN_DEVICE void drop(Vector<T, N>& values, uint64_t key, int at, uint32_t threshold, float scale) {
    uint32_t pairs[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) pairs[i] = dropout_pair(key, static_cast<uint32_t>(at / 2 + i));
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const bool kept = dropout_number(pairs, i) >= threshold;
        values[i] = kept ? from_float<T>(__fmul_rn(to_float(values[i]), scale)) : T{};
    }
}

// ---- forward ---------------------------------------------------------------------------------------------------------

struct Forward {
    const void *x, *residual, *weight, *bias;
    const int64_t* keys;
    void *total, *y;
    float *mean, *rstd;
    int64_t rows;
    int features, warps;
    uint32_t threshold;
    float scale, eps;
    bool wide;
};

template <class T, int E>
__global__ void __launch_bounds__(512) forward_kernel(Forward a) {
    using S = Spread<T, E>;
    constexpr int N = S::N, V = S::V;
    const S spread{a.warps, warp_index() % a.warps, a.features};
    const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / WARP / a.warps) + warp_index() / a.warps;
    if (row >= a.rows) return;  // only where a row takes one warp, and nobody waits for it
    const int64_t start = row * a.features;

    Vector<T, N> values[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
        if (spread.at(v) < a.features) values[v] = load_once<T, N>(static_cast<const T*>(a.x) + start + spread.at(v));
    }
    if (a.residual != nullptr) {
        Vector<T, N> added[V];
#pragma unroll
        for (int v = 0; v < V; ++v) {
            if (spread.at(v) >= a.features) continue;
            added[v] = load_once<T, N>(static_cast<const T*>(a.residual) + start + spread.at(v));
        }
        const uint64_t key = a.keys == nullptr ? 0 : static_cast<uint64_t>(a.keys[row]);
#pragma unroll
        for (int v = 0; v < V; ++v) {
            if (spread.at(v) >= a.features) continue;
            if (a.keys != nullptr) drop(values[v], key, spread.at(v), a.threshold, a.scale);
#pragma unroll
            for (int i = 0; i < N; ++i) values[v][i] = from_float<T>(to_float(added[v][i]) + to_float(values[v][i]));
            store(static_cast<T*>(a.total) + start + spread.at(v), values[v]);
        }
    }

    // Mean and sum of squares about it, of the numbers of this warp first.
    float sum = 0.0f, squares = 0.0f;
    int count = 0;
#pragma unroll
    for (int v = 0; v < V; ++v) {
        const int before = (v * a.warps + spread.part) * WARP * N;  // this warp's v-th vectors begin there
        count += min(max(a.features - before, 0), WARP * N);
        if (spread.at(v) >= a.features) continue;
#pragma unroll
        for (int i = 0; i < N; ++i) sum += to_float(values[v][i]);
    }
    sum = warp_sum(sum);
    float mean = sum / static_cast<float>(max(count, 1));
#pragma unroll
    for (int v = 0; v < V; ++v) {
        if (spread.at(v) >= a.features) continue;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const float centred = to_float(values[v][i]) - mean;
            squares += centred * centred;
        }
    }
    squares = warp_sum(squares);
    if (a.warps > 1) {  // those of several warps, as in Chan et al., "Updating formulae ...", 1979, equation 2.1
        float* parts = reinterpret_cast<float*>(shared_memory());
        if (lane_index() == 0) {
            parts[3 * spread.part] = static_cast<float>(count);
            parts[3 * spread.part + 1] = mean;
            parts[3 * spread.part + 2] = squares;
        }
        sync_block();
        float all = 0.0f;
        mean = squares = 0.0f;
        for (int part = 0; part < a.warps; ++part) {
            const float others = parts[3 * part], step = parts[3 * part + 1] - mean;
            if (others == 0.0f) break;
            all += others;
            mean += step * (others / all);
            squares += parts[3 * part + 2] + step * step * (all - others) * (others / all);
        }
    }
    const float rstd = 1.0f / sqrtf(squares / static_cast<float>(a.features) + a.eps);
    if (spread.part == 0 && lane_index() == 0) {
        a.mean[row] = mean;
        a.rstd[row] = rstd;
    }

#pragma unroll
    for (int v = 0; v < V; ++v) {
        const int at = spread.at(v);
        if (at >= a.features) continue;
        float weight[N], bias[N];
        load_weights<T>(weight, a.weight, a.wide, at, 1.0f);
        load_weights<T>(bias, a.bias, a.wide, at, 0.0f);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            values[v][i] = from_float<T>((to_float(values[v][i]) - mean) * rstd * weight[i] + bias[i]);
        }
        store(static_cast<T*>(a.y) + start + at, values[v]);
    }
}

// ---- backward --------------------------------------------------------------------------------------------------------

struct Backward {
    const void *of_total, *of_y, *total, *weight;  // of_: gradients
    const float *mean, *rstd;
    const int64_t* keys;
    void *of_x, *of_residual;
    float* partial;  // [2, blocks, features]: of weight, of bias
    int64_t rows;
    int features, warps, stages;
    uint32_t threshold;
    float scale;
    bool wide;
};

// Bytes of a lane's numbers of the three tensors that are read.
template <class T, int E>
constexpr int STAGED = 3 * E * static_cast<int>(sizeof(T));

template <class T, int E>
__global__ void __launch_bounds__(BACKWARD_WARPS* WARP, 1) backward_kernel(Backward a) {
    using S = Spread<T, E>;
    constexpr int N = S::N, V = S::V;
    const int warps = blockDim.x / WARP, groups = warps / a.warps, group = warp_index() / a.warps;
    const S spread{a.warps, warp_index() % a.warps, a.features};
    // Of lane l, tensor t and vector v: 16 bytes at staged + ((stage · 3 + t) · V + v) · 512.
    char* staged = shared_memory() + warp_index() * WARP * STAGED<T, E> * a.stages + lane_index() * 16;
    float* sums = reinterpret_cast<float*>(shared_memory() + blockDim.x * STAGED<T, E> * a.stages);
    auto vector = [&](int stage, int tensor, int v) {
        return reinterpret_cast<T*>(staged + ((stage * 3 + tensor) * V + v) * WARP * 16);
    };
    const int64_t step = static_cast<int64_t>(groups) * gridDim.x;

    float mean = 0.0f, rstd = 0.0f, next_mean = 0.0f, next_rstd = 0.0f;
    uint64_t key = 0, next_key = 0;
    auto fetch = [&](int64_t row, int stage) {
        if (row < a.rows) {
            const int64_t start = row * a.features;
#pragma unroll
            for (int v = 0; v < V; ++v) {
                const int at = spread.at(v);
                if (at >= a.features) continue;
                copy_16(vector(stage, 0, v), static_cast<const T*>(a.total) + start + at);
                copy_16(vector(stage, 1, v), static_cast<const T*>(a.of_y) + start + at);
                if (a.of_total != nullptr) copy_16(vector(stage, 2, v), static_cast<const T*>(a.of_total) + start + at);
            }
            next_mean = a.mean[row];
            next_rstd = a.rstd[row];
            if (a.keys != nullptr) next_key = static_cast<uint64_t>(a.keys[row]);
        }
        copies_commit();
    };

    float of_weight[E], of_bias[E];
#pragma unroll
    for (int i = 0; i < E; ++i) of_weight[i] = of_bias[i] = 0.0f;

    int64_t row = group * static_cast<int64_t>(gridDim.x) + blockIdx.x;
    int turn = 0;  // 0 and 1 by turns
    fetch(row, 0);
    for (int64_t of_first_group = blockIdx.x; of_first_group < a.rows; of_first_group += step) {
        const int stage = a.stages == 2 ? turn : 0;
        const int64_t start = row * a.features;
        mean = next_mean;
        rstd = next_rstd;
        key = next_key;
        if (a.stages == 2) {
            fetch(row + step, stage ^ 1);
            copies_wait<1>();
        } else {
            copies_wait<0>();
        }

        // With g = of_y · weight and n the normalised numbers: the means of g and of g n.
        float of_mean = 0.0f, of_scale = 0.0f;
        if (row < a.rows) {
#pragma unroll
            for (int v = 0; v < V; ++v) {
                if (spread.at(v) >= a.features) continue;
                const Vector<T, N> total = load<T, N>(vector(stage, 0, v)), of_y = load<T, N>(vector(stage, 1, v));
                float weight[N];
                load_weights<T>(weight, a.weight, a.wide, spread.at(v), 1.0f);
#pragma unroll
                for (int i = 0; i < N; ++i) {
                    const float normalised = (to_float(total[i]) - mean) * rstd, gradient = to_float(of_y[i]);
                    of_weight[v * N + i] += gradient * normalised;
                    of_bias[v * N + i] += gradient;
                    of_mean += gradient * weight[i];
                    of_scale += gradient * weight[i] * normalised;
                }
            }
        }
        of_mean = warp_sum(of_mean);
        of_scale = warp_sum(of_scale);
        if (a.warps > 1) {
            float* parts = sums + turn * 2 * warps;  // twice, so that one barrier a row is enough
            if (lane_index() == 0) {
                parts[2 * warp_index()] = of_mean;
                parts[2 * warp_index() + 1] = of_scale;
            }
            sync_block();
            of_mean = of_scale = 0.0f;
            for (int part = 0; part < a.warps; ++part) {
                of_mean += parts[2 * (group * a.warps + part)];
                of_scale += parts[2 * (group * a.warps + part) + 1];
            }
        }
        of_mean /= static_cast<float>(a.features);
        of_scale /= static_cast<float>(a.features);

        if (row < a.rows) {
#pragma unroll
            for (int v = 0; v < V; ++v) {
                const int at = spread.at(v);
                if (at >= a.features) continue;
                const Vector<T, N> total = load<T, N>(vector(stage, 0, v)), of_y = load<T, N>(vector(stage, 1, v));
                float weight[N], gradient[N];
                load_weights<T>(weight, a.weight, a.wide, at, 1.0f);
#pragma unroll
                for (int i = 0; i < N; ++i) {
                    const float normalised = (to_float(total[i]) - mean) * rstd;
                    gradient[i] = (to_float(of_y[i]) * weight[i] - of_mean - normalised * of_scale) * rstd;
                }
                if (a.of_total != nullptr) {
                    const Vector<T, N> more = load<T, N>(vector(stage, 2, v));
#pragma unroll
                    for (int i = 0; i < N; ++i) gradient[i] += to_float(more[i]);
                }
                Vector<T, N> result;
#pragma unroll
                for (int i = 0; i < N; ++i) result[i] = from_float<T>(gradient[i]);
                if (a.of_residual != nullptr) store(static_cast<T*>(a.of_residual) + start + at, result);
                if (a.of_x != nullptr) {
                    if (a.keys != nullptr) drop(result, key, at, a.threshold, a.scale);
                    store(static_cast<T*>(a.of_x) + start + at, result);
                }
            }
        }
        sync_warp();  // what was read may be overwritten
        row += step;
        if (a.stages == 1) fetch(row, 0);
        turn ^= 1;
    }
    if (a.partial == nullptr) return;

    // The groups' sums, one after another, through the same shared memory.  A gap after every 32 columns puts what the
    // lanes of a warp write, 16 or 32 bytes apart, into 32 banks.
    copies_wait<0>();
    sync_block();
    auto place = [](int column) { return column + column / 32; };
    const int pitch = place(a.features);
    float* shared = reinterpret_cast<float*>(shared_memory());  // [groups, pitch]
    for (int which = 0; which < 2; ++which) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
            if (spread.at(v) >= a.features) continue;
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const float own = which == 0 ? of_weight[v * N + i] : of_bias[v * N + i];
                shared[group * pitch + place(spread.at(v)) + i] = own;  // all N are before the next gap
            }
        }
        sync_block();
        float* partial = a.partial + (static_cast<int64_t>(which) * gridDim.x + blockIdx.x) * a.features;
        for (int at = threadIdx.x; at < a.features; at += blockDim.x) {
            float sum = 0.0f;
            for (int g = 0; g < groups; ++g) sum += shared[g * pitch + place(at)];
            partial[at] = sum;
        }
        sync_block();
    }
}

constexpr int COLUMNS = 32, STRIDES = 16;  // of a block: columns, and threads that share one

template <class T>
__global__ void __launch_bounds__(COLUMNS* STRIDES) columns_kernel(const float* partial, void* of_weight, void* of_bias, int blocks, int features) {
    T* to = static_cast<T*>(blockIdx.y == 0 ? of_weight : of_bias);
    if (to == nullptr) return;
    const int column = static_cast<int>(blockIdx.x) * COLUMNS + lane_index();
    float sum = 0.0f;
    if (column < features) {
        const float* from = partial + static_cast<int64_t>(blockIdx.y) * blocks * features + column;
#pragma unroll 4
        for (int block = warp_index(); block < blocks; block += STRIDES) {
            sum += from[static_cast<int64_t>(block) * features];
        }
    }
    float* sums = reinterpret_cast<float*>(shared_memory());
    sums[threadIdx.x] = sum;
    sync_block();
    if (warp_index() != 0 || column >= features) return;
    for (int stride = 1; stride < STRIDES; ++stride) sum += sums[stride * COLUMNS + lane_index()];
    to[column] = from_float<T>(sum);
}

// ---- launching -------------------------------------------------------------------------------------------------------

// Calls `function` with the numbers of a lane as a constant; `warps` becomes those of a row.
template <class F>
int with_spread(int64_t features, int& warps, F function) {
    if (features < 1 || features % 8 || features > MOST_FEATURES) return 1;
    for (warps = 1; features > warps * WARP * LANE; warps *= 2) continue;
    switch ((features + warps * WARP * 8 - 1) / (warps * WARP * 8)) {
        case 1:
            return function(std::integral_constant<int, 8>{});
        case 2:
            return function(std::integral_constant<int, 16>{});
        case 3:
            return function(std::integral_constant<int, 24>{});
        default:
            return function(std::integral_constant<int, 32>{});
    }
}

}  // namespace farspan

// total = residual + dropout(x), y = norm(total): [rows, features] of `dtype`.  Residual null: total is x and not written.
// weight, bias: [features] of `weight_dtype`, `dtype`'s or float32; null: 1, 0.  keys: [rows] int64; null: no dropout.
// mean, rstd: [rows] float32.  features: a multiple of 8, at most 16,384.
FARSPAN_EXPORT int layer_norm_forward(const void* x, const void* residual, const void* weight, const void* bias, const void* keys, void* total, void* y, void* mean, void* rstd, int64_t rows, int64_t features, int threshold, float eps, int dtype, int weight_dtype, void* stream) {
    using namespace farspan;
    Forward a{x, residual, weight, bias, static_cast<const int64_t*>(keys), total, y, static_cast<float*>(mean),
              static_cast<float*>(rstd), rows, static_cast<int>(features), 1, static_cast<uint32_t>(threshold),
              dropout_scale(threshold), eps, weight_dtype == FLOAT32};
    if (weight_dtype != dtype && weight_dtype != FLOAT32) return 1;
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        return with_spread(features, a.warps, [&](auto numbers) {
            const int together = a.warps == 1 ? FORWARD_WARPS : 1;  // rows of a block
            return launch(forward_kernel<T, decltype(numbers)::value>, dim3(static_cast<unsigned>((rows + together - 1) / together)),
                          dim3(static_cast<unsigned>(together * a.warps * WARP)), a.warps * 3 * sizeof(float), stream, a);
        });
    });
}

// of_total, of_y: the gradients of total and y; of_total null: 0.  of_x, of_residual, of_weight, of_bias: those of the
// inputs, null where not asked for.  partial: [2, blocks, features] float32 to work in, null where neither of_weight nor
// of_bias is asked for.  `blocks` go through the rows, one to a multiprocessor.
FARSPAN_EXPORT int layer_norm_backward(const void* of_total, const void* of_y, const void* total, const void* mean, const void* rstd, const void* weight, const void* keys, void* of_x, void* of_residual, void* of_weight, void* of_bias, void* partial, int64_t rows, int64_t features, int blocks, int threshold, int dtype, int weight_dtype, void* stream) {
    using namespace farspan;
    Backward a{of_total, of_y, total, weight, static_cast<const float*>(mean), static_cast<const float*>(rstd),
               static_cast<const int64_t*>(keys), of_x, of_residual, static_cast<float*>(partial), rows,
               static_cast<int>(features), 1, 1, static_cast<uint32_t>(threshold), dropout_scale(threshold),
               weight_dtype == FLOAT32};
    if (weight_dtype != dtype && weight_dtype != FLOAT32) return 1;
    const int code = with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        return with_spread(features, a.warps, [&](auto numbers) {
            constexpr int E = decltype(numbers)::value;
            int warps = BACKWARD_WARPS;
            size_t shared = 0;
            for (;;) {  // fewer rows at once, then no next row on its way, until the shared memory is enough
                for (a.stages = 2; a.stages > 0; --a.stages) {
                    shared = warps * WARP * STAGED<T, E> * a.stages + 4 * warps * sizeof(float);
                    if (shared <= shared_limit()) break;
                }
                if (a.stages == 2 || (a.stages == 1 && warps == a.warps)) break;
                if (warps == a.warps) return 1;
                warps /= 2;
            }
            return launch(backward_kernel<T, E>, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(warps * WARP)), shared, stream, a);
        });
    });
    if (code || partial == nullptr) return code;
    return with_dtype(weight_dtype, [&](auto zero) {
        const dim3 grid(static_cast<unsigned>((features + COLUMNS - 1) / COLUMNS), 2);
        return launch(columns_kernel<decltype(zero)>, grid, dim3(COLUMNS * STRIDES), COLUMNS * STRIDES * sizeof(float),
                      stream, static_cast<const float*>(partial), of_weight, of_bias, blocks, static_cast<int>(features));
    });
}
