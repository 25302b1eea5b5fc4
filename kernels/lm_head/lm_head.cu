// The pointwise part of the language-model head's cross-entropy, on a tile of logits [rows, columns]: cuBLAS makes the
// tile, these turn it into statistics of every row (forward) and into gradients of the logits, in place (backward).
//
// Both are bound by moving the tile once, mostly through the L2 cache that the product left it in: 2 bytes a logit
// forward, 4 backward, in bf16; one exponential a logit (16 a clock and SM) takes about as long.
//
// Rows begin at multiples of `stride` numbers, and stride · sizeof(T) is a multiple of 16 bytes.  What lies from
// `columns` to `stride` takes no part.
#include <cfloat>

#include "device.h"

using namespace farspan;

namespace {

constexpr int BLOCK = 256, WARPS = BLOCK / WARP;
constexpr int ROWS = 64;  // rows that a block of `gradient_kernel` turns; what its sums over rows cover
constexpr int STEP = 2;   // vectors in flight a lane of `statistics_kernel`
constexpr int AHEAD = 4;  // rows in flight a warp of `gradient_kernel`

template <class T>
constexpr int NUMBERS = 16 / sizeof(T);  // of a vector

struct Found {
    float maximum, total;  // total: the sum of exp(logit - maximum)
    int best;              // the first column that has the maximum; -1: none is above -FLT_MAX
};

// ---- forward ---------------------------------------------------------------------------------------------------------

// The logits of a lane's step, -inf where the row has none.
template <class T>
FARSPAN_DEVICE void load_step(float (&x)[STEP * NUMBERS<T>], const T* row, int columns, int step) {
    constexpr int N = NUMBERS<T>;
    Vector<T, N> vectors[STEP];
#pragma unroll
    for (int k = 0; k < STEP; ++k) {
        const int column = ((step * STEP + k) * WARP + lane_index()) * N;
        if (column < columns) vectors[k] = load<T, N>(row + column);
    }
#pragma unroll
    for (int k = 0; k < STEP; ++k) {
        const int column = ((step * STEP + k) * WARP + lane_index()) * N;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            x[k * N + i] = column + i < columns ? to_float(vectors[k][i]) : -INFINITY;
        }
    }
}

// A warp's part of a row: steps part, part + split, ...  The same in every lane.
template <class T>
FARSPAN_DEVICE Found look_at(const T* row, int columns, int part, int split) {
    constexpr int N = NUMBERS<T>, WIDTH = STEP * WARP * N;
    const int steps = (columns + WIDTH - 1) / WIDTH;
    float maximum = -FLT_MAX, total = 0.0f;
    int where = -1;  // the step that this lane's maximum was first seen in
    float x[STEP * N];
    for (int step = part; step < steps; step += split) {
        load_step<T>(x, row, columns, step);
        float largest = x[0];
#pragma unroll
        for (int i = 1; i < STEP * N; ++i) largest = fmaxf(largest, x[i]);
        const float before = maximum;
        if (largest > maximum) {
            maximum = largest;
            where = step;
        }
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < STEP * N; ++i) sum += __expf(x[i] - maximum);
        total = total * __expf(before - maximum) + sum;
    }
    const float largest = warp_max(maximum);
    total = warp_sum(total * __expf(maximum - largest));
    int best = INT32_MAX;
    if (where >= 0 && maximum == largest) {  // few lanes read a step again, rather than all track an index
        load_step<T>(x, row, columns, where);
#pragma unroll
        for (int i = STEP * N - 1; i >= 0; --i) {
            if (x[i] == largest) best = ((where * STEP + i / N) * WARP + lane_index()) * N + i % N;
        }
    }
#pragma unroll
    for (int mask = WARP / 2; mask > 0; mask /= 2) best = min(best, shuffle_xor(best, mask));
    return {largest, total, best == INT32_MAX ? -1 : best};
}

FARSPAN_DEVICE void merge(Found& into, const Found& other) {
    const float maximum = fmaxf(into.maximum, other.maximum);
    if (other.best >= 0 && (other.maximum > into.maximum || (other.maximum == into.maximum && other.best < into.best))) {
        into.best = other.best;
    }
    into.total = into.total * __expf(into.maximum - maximum) + other.total * __expf(other.maximum - maximum);
    into.maximum = maximum;
}

// `split` warps a row: where rows are few, one each would leave the device idle.
template <class T>
__global__ void __launch_bounds__(BLOCK) statistics_kernel(
    const T* logits, const int64_t* labels, float* maxima, float* totals, float* label_logits, int64_t* bests,
    int64_t rows, int columns, int64_t stride, int64_t first, int split
) {
    Found* found = reinterpret_cast<Found*>(shared_memory());
    const int part = warp_index() % split;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * (WARPS / split) + warp_index() / split;
    const T* numbers = logits + row * stride;
    if (row < rows) {
        const Found mine = look_at<T>(numbers, columns, part, split);
        if (lane_index() == 0) found[warp_index()] = mine;
    }
    sync_block();
    if (row >= rows || part != 0 || lane_index() != 0) return;
    Found all = found[warp_index()];
    for (int i = 1; i < split; ++i) merge(all, found[warp_index() + i]);
    // Earlier tiles have smaller indices: of equals theirs is the first.
    const float before = maxima[row], maximum = fmaxf(before, all.maximum);
    totals[row] = totals[row] * __expf(before - maximum) + all.total * __expf(all.maximum - maximum);
    maxima[row] = maximum;
    if (all.best >= 0 && all.maximum > before) bests[row] = first + all.best;
    const int64_t place = labels[row] - first;
    if (place >= 0 && place < columns) label_logits[row] = to_float(numbers[place]);
}

// ---- backward --------------------------------------------------------------------------------------------------------

struct Row {
    float maximum, scale, upstream;
    int label;  // its column in the tile; -1: it is not here
};

// Block (i, j) turns columns i · 32 · N on of rows j · ROWS on.  partial: [row blocks, columns], sums over its rows.
template <class T>
__global__ void __launch_bounds__(BLOCK) gradient_kernel(
    const T* logits, T* gradient, const int64_t* labels, const float* maxima, const float* totals,
    const float* upstream, float* partial, int64_t rows, int columns, int64_t stride, int64_t first
) {
    constexpr int N = NUMBERS<T>, WIDTH = WARP * N;
    Row* of_rows = reinterpret_cast<Row*>(shared_memory());
    const int64_t first_row = static_cast<int64_t>(blockIdx.y) * ROWS;
    const int count = static_cast<int>(min(static_cast<int64_t>(ROWS), rows - first_row));
    if (static_cast<int>(threadIdx.x) < count) {
        const int64_t row = first_row + threadIdx.x;
        const int64_t place = labels[row] - first;
        const float factor = upstream[row];
        of_rows[threadIdx.x] = {
            maxima[row], factor / totals[row], factor, place >= 0 && place < columns ? static_cast<int>(place) : -1
        };
    }
    sync_block();

    const int column = static_cast<int>(blockIdx.x) * WIDTH + lane_index() * N;
    float sums[N];
#pragma unroll
    for (int i = 0; i < N; ++i) sums[i] = 0.0f;
    if (column < stride) {
        for (int base = warp_index(); base < count; base += WARPS * AHEAD) {
            Vector<T, N> x[AHEAD];
#pragma unroll
            for (int k = 0; k < AHEAD; ++k) {
                const int row = base + k * WARPS;
                if (row < count) x[k] = load<T, N>(logits + (first_row + row) * stride + column);
            }
#pragma unroll
            for (int k = 0; k < AHEAD; ++k) {
                const int row = base + k * WARPS;
                if (row >= count) break;
                const Row r = of_rows[row];
                Vector<T, N> y;
#pragma unroll
                for (int i = 0; i < N; ++i) {
                    float value = __expf(to_float(x[k][i]) - r.maximum) * r.scale;
                    if (column + i == r.label) value -= r.upstream;
                    if (column + i >= columns) value = 0.0f;
                    sums[i] += value;
                    y[i] = from_float<T>(value);
                }
                store<T, N>(gradient + (first_row + row) * stride + column, y);
            }
        }
    }
    if (partial == nullptr) return;
    float* of_warps = reinterpret_cast<float*>(shared_memory() + ROWS * sizeof(Row));  // [WARPS, WIDTH]
    Vector<float, 4>* mine = reinterpret_cast<Vector<float, 4>*>(of_warps + warp_index() * WIDTH + lane_index() * N);
#pragma unroll
    for (int i = 0; i < N; i += 4) mine[i / 4] = {sums[i], sums[i + 1], sums[i + 2], sums[i + 3]};
    sync_block();
    const int place = static_cast<int>(blockIdx.x) * WIDTH + static_cast<int>(threadIdx.x);
    if (static_cast<int>(threadIdx.x) >= WIDTH || place >= columns) return;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < WARPS; ++i) sum += of_warps[i * WIDTH + threadIdx.x];
    partial[static_cast<int64_t>(blockIdx.y) * columns + place] = sum;
}

}  // namespace

// Merges a tile into the rows' statistics so far.  labels, best: of the vocabulary; `first`: the tile's first entry.
FARSPAN_EXPORT int lm_head_statistics(const void* logits, const void* labels, void* maximum, void* total, void* label_logit, void* best, int64_t rows, int64_t columns, int64_t stride, int64_t first, int dtype, void* stream) {
    if (rows == 0 || columns == 0) return 0;
    // At least 16 warps an SM of a large device, where the row is long enough to share.
    int split = 1;
    while (split < WARPS && rows * split < 2048 && columns > 512 * split) split *= 2;
    const int64_t a_block = WARPS / split;
    const dim3 grid(static_cast<unsigned>((rows + a_block - 1) / a_block));
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        return launch(
            statistics_kernel<T>, grid, BLOCK, WARPS * sizeof(Found), stream, static_cast<const T*>(logits),
            static_cast<const int64_t*>(labels), static_cast<float*>(maximum), static_cast<float*>(total),
            static_cast<float*>(label_logit), static_cast<int64_t*>(best), rows, static_cast<int>(columns), stride,
            first, split
        );
    });
}

// gradient = (exp(logit - maximum) / total - [the label's]) · upstream, zero from `columns` to `stride`; it may be
// where the logits are.  partial: [rows / 64 rounded up, columns] float32, the sums over 64 rows each, or null.
FARSPAN_EXPORT int lm_head_gradient(const void* logits, void* gradient, const void* labels, const void* maximum, const void* total, const void* upstream, void* partial, int64_t rows, int64_t columns, int64_t stride, int64_t first, int dtype, void* stream) {
    if (rows == 0 || stride == 0) return 0;
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        constexpr int WIDTH = WARP * NUMBERS<T>;
        const dim3 grid(
            static_cast<unsigned>((stride + WIDTH - 1) / WIDTH), static_cast<unsigned>((rows + ROWS - 1) / ROWS)
        );
        const size_t shared = ROWS * sizeof(Row) + WARPS * WIDTH * sizeof(float);
        return launch(
            gradient_kernel<T>, grid, BLOCK, shared, stream, static_cast<const T*>(logits), static_cast<T*>(gradient),
            static_cast<const int64_t*>(labels), static_cast<const float*>(maximum), static_cast<const float*>(total),
            static_cast<const float*>(upstream), static_cast<float*>(partial), rows, static_cast<int>(columns), stride,
            first
        );
    });
}
