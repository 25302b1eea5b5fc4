// MRA-2 attention: launchers.  What is computed, and by which kernels: selection.cuh, forward.cuh, backward.cuh.
#include "backward.cuh"
#include "forward.cuh"

namespace farspan {
namespace mra {

inline unsigned blocks_for(int64_t items, int each) { return static_cast<unsigned>((items + each - 1) / each); }

Sizes sizes_of(
    int64_t batch, int64_t heads, int64_t length, int64_t d, int64_t budget, int first, int diagonal, bool masked
) {
    const int64_t nb = (length + BLOCK - 1) / BLOCK;
    return {static_cast<int>(batch), static_cast<int>(heads), static_cast<int>(length), static_cast<int>(d),
            static_cast<int>(nb), static_cast<int>(budget), first, diagonal, !masked && length % BLOCK == 0};
}

// What a launch is given beside tensors.
struct Plan {
    float scale;
    bool is_long;    // there is work for two groups
    size_t shared;   // bytes of shared memory that the device gives a block
    void* stream;
};

// Two groups where they have work and are at most `threads`; one, then one stage, where shared memory is little.
template <class Bytes>
Shape shape_of(const Sizes& s, const Plan& plan, int threads, Bytes bytes) {
    Shape shape{s, (s.d + 15) / 16 * 16, plan.is_long ? 2 : 1, 2, plan.scale};
    if (shape.threads() > threads || bytes(shape) > plan.shared / 2) shape.groups = 1;
    if (bytes(shape) > plan.shared) shape.stages = 1;
    return shape;
}

Rows<float> rows_of_means(float* means, const Sizes& s, int which) {
    const int64_t matrix = static_cast<int64_t>(s.nb) * s.d;
    return {means + which * s.matrices() * matrix, {s.heads * matrix, matrix, s.d}};
}
Rows<const float> rows_of_means(const float* means, const Sizes& s, int which) {
    const Rows<float> rows = rows_of_means(const_cast<float*>(means), s, which);
    return {rows.data, rows.strides};
}

template <class T>
constexpr bool HAS_64 = sizeof(T) == 2;  // a form that keeps rows of 64 in registers

bool list_is_long(const Sizes& s) { return s.budget >= 4 * static_cast<int64_t>(s.nb); }

template <class T, int D, bool COARSE>
int launch_attend(Attend<T> p, const Plan& plan) {
    const Sizes s = p.shape.sizes;
    p.shape = shape_of(s, plan, D ? 128 : 256, [](const Shape& x) { return attend_bytes<T>(x); });
    const unsigned blocks = static_cast<unsigned>(s.matrices() * (COARSE ? s.words() : s.nb));
    return launch(attend<T, D, COARSE>, blocks, p.shape.threads(), attend_bytes<T>(p.shape), plan.stream, p);
}

template <class T, int D, bool COARSE>
int launch_rows(Differentiate<T> p, const Plan& plan) {
    const Sizes s = p.shape.sizes;
    const auto bytes = [](const Shape& x) { return differentiate_bytes<T, 0>(x); };
    p.shape = shape_of(s, plan, D ? 128 : 256, bytes);
    const unsigned blocks = static_cast<unsigned>(s.matrices() * (COARSE ? s.words() : s.nb));
    return launch(differentiate_rows<T, D, COARSE>, blocks, p.shape.threads(), bytes(p.shape), plan.stream, p);
}

template <class T, int D, bool COARSE>
int launch_columns(Differentiate<T> p, const Plan& plan) {
    const Sizes s = p.shape.sizes;
    const auto bytes = [](const Shape& x) { return differentiate_bytes<T, STATISTICS>(x); };
    p.shape = shape_of(s, plan, D ? 128 : 256, bytes);
    const unsigned blocks = static_cast<unsigned>(s.matrices() * (COARSE ? s.words() : s.nb));
    return launch(differentiate_columns<T, D, COARSE>, blocks, p.shape.threads(), bytes(p.shape), plan.stream, p);
}

// Selected blocks of matrices first_matrix to first_matrix + number; see ``mra_forward`` for the scratch memory.
int launch_selection(
    const Means& means, const Lists& lists, uint64_t* keys, int* counts, Threshold* thresholds, int* histograms,
    int64_t first_matrix, int64_t number, int parts, const Sizes& s, void* stream
) {
    const int64_t rows = number * s.nb, size = static_cast<int64_t>(s.nb) * s.nb;
    const unsigned matrices = static_cast<unsigned>(number);
    if (int error = launch(
            block_scores, static_cast<unsigned>(number * s.words()), SCORE_THREADS, score_bytes(), stream,
            const_cast<const double*>(means.q), const_cast<const double*>(means.k),
            const_cast<const uint32_t*>(means.tokens), keys, first_matrix, s)) {
        return error;
    }
    const uint64_t* const known = keys;
    const unsigned threads = SELECT_WARPS * WARP;
    if (parts <= 1) {
        return launch(select, matrices, threads, select_bytes(), stream, known, counts, lists, first_matrix, number, s);
    }
    const int64_t numbers = static_cast<int64_t>(DIGITS) * number * DIGIT_VALUES;
    int error = launch(clear_histograms, blocks_for(numbers, 256), 256, 0, stream, histograms, numbers);
    for (int digit = 0; error == 0 && digit <= DIGITS; ++digit) {
        const int together = digit == DIGITS ? 1 : parts;
        error = launch(
            select_digit, matrices * static_cast<unsigned>(together), threads, select_bytes(), stream, known,
            thresholds, histograms, size, s.budget, static_cast<int>(number), together, digit
        );
    }
    const Threshold* const found = thresholds + (DIGITS - 1) * number;
    const unsigned blocks = blocks_for(rows, LIST_WARPS);
    if (error == 0) error = launch(count_rows, blocks, LIST_WARPS * WARP, 0, stream, known, found, counts, rows, s.nb);
    if (error != 0) return error;
    const int* const counted = counts;
    return launch(list_rows, blocks, LIST_WARPS * WARP, 0, stream, known, found, counted, lists, first_matrix, rows, s);
}

}  // namespace mra
}  // namespace farspan

using namespace farspan;
using namespace farspan::mra;

// q, k, v [batch, heads, length, d] have the same strides (in numbers; multiples of 16 bytes, the last is 1), y others.
// mask [batch, length] bytes or null.  Written, with nb blocks of 32, words = ⌈nb / 32⌉ and padded = 32 words:
//   norms [2, matrices, 32 nb] float32: maximum and sum of each query;  tokens [batch, nb] int32;  bits [matrices, nb,
//   words] int32, pointers [matrices, nb + 1] and columns [matrices, budget] int32: the selection;  means [3, matrices,
//   nb, d] float32;  rest [2, matrices, padded] float32, null in sparse mode.
// Scratch: exact [2, matrices, nb, d] float64;  rest_values [matrices, nb, d] float32, null in sparse mode;  and for
// `together` matrices selected at a time keys [together, nb, nb] int64, counts [2, together, nb] int32, thresholds [6,
// together, 2] int64, histograms [6, together, 2048] int32 (null where `parts`, the blocks that share a matrix, is 1).
// shared: bytes of shared memory that the device gives a block, at least those that fused.py asks for.
FARSPAN_EXPORT int mra_forward(const void* q, const void* k, const void* v, const void* mask, void* y, void* norms, void* tokens, void* bits, void* pointers, void* columns, void* means, void* rest, void* exact, void* rest_values, void* keys, void* counts, void* thresholds, void* histograms, int64_t batch, int64_t heads, int64_t length, int64_t d, int64_t budget, int first, int diagonal, int64_t in_batch, int64_t in_head, int64_t in_token, int64_t out_batch, int64_t out_head, int64_t out_token, float scale, int64_t together, int parts, int shared, int dtype, void* stream) {
    const Sizes s = sizes_of(batch, heads, length, d, budget, first, diagonal, mask != nullptr);
    const int64_t matrices = s.matrices(), of_means = matrices * s.nb * d, of_rows = matrices * s.nb * BLOCK;
    const Plan plan{scale, list_is_long(s), static_cast<size_t>(shared), stream};
    const Plan of_means_plan{1.0f, s.words() > 1, plan.shared, stream};
    if (matrices == 0) return 0;
    const Means m{static_cast<double*>(exact), static_cast<double*>(exact) + of_means, static_cast<float*>(means),
                  static_cast<uint32_t*>(tokens)};
    const Lists lists{static_cast<uint32_t*>(bits), static_cast<int*>(pointers), static_cast<int*>(columns)};
    float* const rest_maximum = static_cast<float*>(rest);
    float* const rest_sums = rest ? rest_maximum + matrices * s.padded() : nullptr;

    int error = with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        return launch(
            block_means<T>, blocks_for(3 * matrices * s.nb, MEANS_WARPS), MEANS_WARPS * WARP, 0, stream,
            static_cast<const T*>(q), static_cast<const T*>(k), static_cast<const T*>(v),
            Strides{in_batch, in_head, in_token}, static_cast<const uint8_t*>(mask), m, s, scale
        );
    });
    for (int64_t from = 0; error == 0 && from < matrices; from += together) {
        error = launch_selection(
            m, lists, static_cast<uint64_t*>(keys), static_cast<int*>(counts), static_cast<Threshold*>(thresholds),
            static_cast<int*>(histograms), from, min(together, matrices - from), parts, s, stream
        );
    }
    if (error == 0 && rest != nullptr) {
        const Attend<float> coarse{
            rows_of_means(const_cast<const float*>(m.all), s, 0), rows_of_means(const_cast<const float*>(m.all), s, 1),
            rows_of_means(const_cast<const float*>(m.all), s, 2), rows_of_means(static_cast<float*>(rest_values), s, 0),
            rest_maximum, rest_sums, m.tokens, lists, nullptr, nullptr, nullptr, Shape{s, 0, 0, 0, 0.0f}
        };
        error = launch_attend<float, 0, true>(coarse, of_means_plan);
    }
    if (error != 0) return error;
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const Strides in{in_batch, in_head, in_token}, out{out_batch, out_head, out_token};
        const Attend<T> fine{
            {static_cast<const T*>(q), in}, {static_cast<const T*>(k), in}, {static_cast<const T*>(v), in},
            {static_cast<T*>(y), out}, static_cast<float*>(norms), static_cast<float*>(norms) + of_rows, m.tokens,
            lists, rest_maximum, rest_sums, static_cast<const float*>(rest_values), Shape{s, 0, 0, 0, 0.0f}
        };
        if constexpr (HAS_64<T>) {
            if (d == 64) return launch_attend<T, 64, false>(fine, plan);
        }
        return launch_attend<T, 0, false>(fine, plan);
    });
}

// What ``mra_forward`` wrote, and the gradient of y, whose strides are those of y and of the gradients.
// masked: whether that was given a mask.
// Scratch: turned [matrices, nb, words], column_pointers [matrices, nb + 1], column_rows [matrices, budget],
// column_counts [matrices, nb] int32;  of_norms [3, matrices, 32 nb] float32;  and, null in sparse mode, of_rest
// [3, matrices, padded] and of_means [4, matrices, nb, d] float32.
FARSPAN_EXPORT int mra_backward(const void* q, const void* k, const void* v, const void* y, const void* of_y, const void* norms, const void* tokens, const void* bits, const void* pointers, const void* columns, const void* means, const void* rest, void* of_q, void* of_k, void* of_v, void* turned, void* column_pointers, void* column_rows, void* column_counts, void* of_norms, void* of_rest, void* of_means, int64_t batch, int64_t heads, int64_t length, int64_t d, int64_t budget, int masked, int64_t in_batch, int64_t in_head, int64_t in_token, int64_t out_batch, int64_t out_head, int64_t out_token, float scale, int shared, int dtype, void* stream) {
    const Sizes s = sizes_of(batch, heads, length, d, budget, 0, -1, masked != 0);
    const int64_t matrices = s.matrices(), mean_size = matrices * s.nb * d, row_size = matrices * s.nb * BLOCK;
    const Plan plan{scale, list_is_long(s), static_cast<size_t>(shared), stream};
    const Plan of_means_plan{1.0f, s.words() > 1, plan.shared, stream};
    if (matrices == 0) return 0;
    const uint32_t* const real = static_cast<const uint32_t*>(tokens);
    const auto writable = [](const void* x) { return const_cast<void*>(x); };
    const Lists by_rows{
        static_cast<uint32_t*>(writable(bits)), static_cast<int*>(writable(pointers)),
        static_cast<int*>(writable(columns))
    };
    const Lists by_columns{
        static_cast<uint32_t*>(turned), static_cast<int*>(column_pointers), static_cast<int*>(column_rows)
    };
    int error = launch(
        turn_bits, blocks_for(matrices * s.words(), LIST_WARPS), LIST_WARPS * WARP, 0, stream,
        const_cast<const uint32_t*>(by_rows.bits), by_columns.bits, static_cast<int*>(column_counts), s
    );
    if (error == 0) {
        error = launch(
            list_columns, blocks_for(matrices * s.nb, LIST_WARPS), LIST_WARPS * WARP, 0, stream,
            static_cast<const int*>(column_counts), by_columns, s
        );
    }
    if (error != 0) return error;

    const float *const maximum = static_cast<const float*>(norms), *const r = static_cast<const float*>(rest);
    float *const statistics = static_cast<float*>(of_norms), *const rest_statistics = static_cast<float*>(of_rest);
    float* const mean_gradients = static_cast<float*>(of_means);
    const Strides in{in_batch, in_head, in_token}, out{out_batch, out_head, out_token};
    error = with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const Prepare<T> p{{static_cast<const T*>(of_y), out}, {static_cast<const T*>(y), out}, maximum,
                           maximum + row_size, real, r, statistics, rest_statistics,
                           mean_gradients ? mean_gradients + 3 * mean_size : nullptr, s};
        return launch(prepare<T>, blocks_for(matrices * s.nb, PREPARE_WARPS), PREPARE_WARPS * WARP, 0, stream, p);
    });
    if (error == 0 && rest != nullptr) {
        const float* const x = static_cast<const float*>(means);
        Differentiate<float> coarse{
            rows_of_means(x, s, 0), rows_of_means(x, s, 1), rows_of_means(x, s, 2),
            rows_of_means(const_cast<const float*>(mean_gradients), s, 3), rows_of_means(mean_gradients, s, 0),
            rows_of_means(mean_gradients, s, 1), rows_of_means(mean_gradients, s, 2), rest_statistics, real, by_rows,
            nullptr, nullptr, nullptr, Shape{s, 0, 0, 0, 0.0f}
        };
        error = launch_rows<float, 0, true>(coarse, of_means_plan);
        coarse.lists = by_columns;
        if (error == 0) error = launch_columns<float, 0, true>(coarse, of_means_plan);
    }
    if (error != 0) return error;
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        Differentiate<T> fine{
            {static_cast<const T*>(q), in}, {static_cast<const T*>(k), in}, {static_cast<const T*>(v), in},
            {static_cast<const T*>(of_y), out}, {static_cast<T*>(of_q), out}, {static_cast<T*>(of_k), out},
            {static_cast<T*>(of_v), out}, statistics, real, by_rows,
            rest ? mean_gradients : nullptr, rest ? mean_gradients + mean_size : nullptr,
            rest ? mean_gradients + 2 * mean_size : nullptr, Shape{s, 0, 0, 0, 0.0f}
        };
        if constexpr (HAS_64<T>) {
            if (d == 64) {
                const int found = launch_rows<T, 64, false>(fine, plan);
                fine.lists = by_columns;
                return found ? found : launch_columns<T, 64, false>(fine, plan);
            }
        }
        const int found = launch_rows<T, 0, false>(fine, plan);
        fine.lists = by_columns;
        return found ? found : launch_columns<T, 0, false>(fine, plan);
    });
}
