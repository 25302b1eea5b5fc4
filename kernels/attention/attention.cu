// Softmax attention within documents, with counter-based dropout of its weights, which are never in memory.
//
// Tensors q, k, v, y and their gradients are [positions, rows, heads, d] in bfloat16 or float16 (d: 16 to 128, a
// multiple of 8); q, k, v share their strides, the others are dense.  Sums are float32.  What is not in a document is
// neither read nor written.
//
// What bounds it: of a score, 4 d FLOP forward and 14 d backward on tensor cores by mma.sync (on an H200 not more than
// about 0.6 of what its asynchronous products reach); beside them an exponential, 16 a clock of a multiprocessor, and
// dropout's bits (tiles.cuh), on other pipes, which other warps keep busy meanwhile.  From memory each tensor comes
// once, from L2 keys and values for every 128 queries.
#include "backward.cuh"
#include "forward.cuh"

namespace farspan {
namespace attention {

// function(T{}, std::integral_constant<int, D>{}); 1 (CUDA's "invalid value") where there is no kernel.
template <class F>
int with_type(int dtype, int d, F function) {
    auto with_size = [&](auto type) {
        if (d < 16 || d % 8 || d > 128) return 1;
        if (d <= 32) return function(type, std::integral_constant<int, 32>{});
        if (d <= 64) return function(type, std::integral_constant<int, 64>{});
        return function(type, std::integral_constant<int, 128>{});
    };
    if (dtype == BFLOAT16) return with_size(bf16{});
    if (dtype == FLOAT16) return with_size(fp16{});
    return 1;
}

inline Strides dense(const Sizes& s) {
    return {s.rows * s.heads * (s.d / 8), s.heads * (s.d / 8), s.d / 8};
}

constexpr float LOG2_E = 1.4426950408889634f;

}  // namespace attention
}  // namespace farspan

// tiles: [tiles, 5] int32 (tiles.cuh, Part); logarithms: [heads, rows, positions] float32; cut: dropout's threshold.
// The strides are those of q, k and v, in pieces of 8 numbers.
FARSPAN_EXPORT int attention_forward(const void* q, const void* k, const void* v, const void* keys, const void* tiles, void* y, void* logarithms, int64_t count, int positions, int rows, int heads, int d, int position_stride, int row_stride, int head_stride, float scale, int cut, int causal, int dtype, void* stream) {
    using namespace farspan;
    using namespace farspan::attention;
    return with_type(dtype, d, [&](auto type, auto size) {
        using T = decltype(type);
        constexpr int D = decltype(size)::value;
        const Sizes sizes{positions, rows, heads, d, causal};
        const Strides strides{position_stride, row_stride, head_stride};
        const Forward<T> p{
            static_cast<const T*>(q), static_cast<const T*>(k), static_cast<const T*>(v), static_cast<T*>(y), strides,
            dense(sizes), static_cast<const int64_t*>(keys), static_cast<const int*>(tiles),
            static_cast<float*>(logarithms), sizes, scale * LOG2_E, dropout_scale(cut),
            static_cast<uint32_t>(cut) << 16
        };
        const size_t shared = (TILE + 4 * met_rows<D>()) * stride_of<D>() * sizeof(T) + TILE * sizeof(Draw);
        const dim3 grid(static_cast<unsigned>(count * heads));
        return launch(attend<T, D>, grid, dim3(forward_threads<D>()), shared, stream, p);
    });
}

// queries: scratch [heads, rows, positions, 4] int32.
FARSPAN_EXPORT int attention_backward(const void* q, const void* k, const void* v, const void* y, const void* of_y, const void* logarithms, const void* keys, const void* tiles, void* queries, void* of_q, void* of_k, void* of_v, int64_t count, int positions, int rows, int heads, int d, int position_stride, int row_stride, int head_stride, float scale, int cut, int causal, int dtype, void* stream) {
    using namespace farspan;
    using namespace farspan::attention;
    return with_type(dtype, d, [&](auto type, auto size) {
        using T = decltype(type);
        constexpr int D = decltype(size)::value;
        const Sizes sizes{positions, rows, heads, d, causal};
        const Strides strides{position_stride, row_stride, head_stride};
        const float kept = dropout_scale(cut);
        const int64_t queries_a_block = PREPARE_THREADS / PREPARE_LANES;
        const int64_t blocks = (static_cast<int64_t>(positions) * rows * heads + queries_a_block - 1) / queries_a_block;
        int error = launch(
            prepare<T>, dim3(static_cast<unsigned>(blocks)), dim3(PREPARE_THREADS), 0, stream,
            Prepare<T>{static_cast<const T*>(y), static_cast<const T*>(of_y), static_cast<const float*>(logarithms),
                       static_cast<const int64_t*>(keys), static_cast<uint32_t*>(queries), sizes, kept}
        );
        const Backward<T> p{
            static_cast<const T*>(q), static_cast<const T*>(k), static_cast<const T*>(v), static_cast<const T*>(of_y),
            static_cast<T*>(of_q), static_cast<T*>(of_k), static_cast<T*>(of_v), strides, dense(sizes),
            static_cast<const int*>(tiles), static_cast<const uint32_t*>(queries), sizes, scale * LOG2_E, scale * kept,
            kept, static_cast<uint32_t>(cut) << 16
        };
        const size_t shared = (2 * HALF_TILE + 4 * met_rows<D>()) * stride_of<D>() * sizeof(T);
        const size_t of_queries = 2 * met_rows<D>() * 16;
        const dim3 grid(static_cast<unsigned>(count * (TILE / HALF_TILE) * heads)), block(BACKWARD_THREADS);
        if (!error) error = launch(differentiate_keys<T, D>, grid, block, shared + of_queries, stream, p);
        if (!error) error = launch(differentiate_queries<T, D>, grid, block, shared, stream, p);
        return error;
    });
}
