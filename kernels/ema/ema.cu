// The multi-dimension damped moving average: convolve.cuh, its gradients: gradient.cuh.
//
// Segments are lists of chunks, made by layout.py.  Where a document or row has several (`split`), what leaves each is
// computed first and joined to what enters it: x is read once more.  No sum depends on the order of blocks.
#include "gradient.cuh"

using namespace farspan;
using namespace farspan::ema;

namespace {

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <class T>
int run_convolve(Problem problem, const void* x, void* y, const float* entering, float* leaving, int segments, void* stream) {
    problem.groups = static_cast<int>((problem.parameters.d + Form<T>::FEATURES - 1) / Form<T>::FEATURES);
    const dim3 grid(static_cast<unsigned>(problem.groups) * static_cast<unsigned>(segments));
    const size_t bytes = static_cast<size_t>(convolve_bytes<T>(problem.tiles));
    return launch(convolve<T>, grid, dim3(Form<T>::WARPS * WARP), bytes, stream, problem, static_cast<const T*>(x),
                  static_cast<T*>(y), entering, leaving);
}

dim3 blocks_of_states(const Parameters& of) {
    return dim3(static_cast<unsigned>((of.directions * of.d * of.n + 127) / 128));
}

// What enters each segment, by way of what leaves it.
template <class T>
int enter(Problem problem, const void* x, const float* start, float* leaving, float* entering, float* last, int segments,
          void* stream) {
    if (int error = run_convolve<T>(problem, x, nullptr, nullptr, leaving, segments, stream)) return error;
    return launch(join, blocks_of_states(problem.parameters), dim3(128), 0, stream, problem, segments,
                  static_cast<const float*>(leaving), start, entering, last);
}

}  // namespace

// x, y: [s, b, d]; parameters: [directions, d, n] float32, the projection times `scale`; start, last: [b, d, n] or null,
// then with every segment in one row; chunks: [chunks, 4]; segments: [segments + 1]; work: [2, segments, directions, d, n]
// where `split`, else null.
FARSPAN_EXPORT int ema_forward(const void* x, void* y, const void* damping, const void* decay, const void* expansion, const void* projection, const void* start, void* last, const void* chunks, const void* segments, void* work, int64_t b, int64_t d, int n, int directions, float scale, int count, int tiles, int split, int dtype, void* stream) {
    const Parameters parameters{static_cast<const float*>(damping), static_cast<const float*>(decay),
                                static_cast<const float*>(expansion), static_cast<const float*>(projection),
                                d, n, directions, scale};
    const bool states = start != nullptr || last != nullptr;
    const Problem problem{parameters, static_cast<const Chunk*>(chunks), static_cast<const int*>(segments),
                          b, 0, tiles, false, states, d % 8 == 0 && aligned(x) && aligned(y)};
    const float* before = static_cast<const float*>(start);
    float* after = static_cast<float*>(last);
    return with_dtype(dtype, [&](auto number) {
        using T = decltype(number);
        if (!split) return run_convolve<T>(problem, x, y, before, after, count, stream);
        float *leaving = static_cast<float*>(work), *entering = leaving + count * directions * d * n;
        if (int error = enter<T>(problem, x, before, leaving, entering, after, count, stream)) return error;
        return run_convolve<T>(problem, x, y, entering, nullptr, count, stream);
    });
}

// of_y, of_last: gradients given, of_last may be null; of_x (may be null), of_start, of_damping ...: wanted.  states: whether
// there was a start or a last state.  work: [3, segments, directions, d, n], with 3 more where `split`.
FARSPAN_EXPORT int ema_backward(const void* x, const void* of_y, const void* of_last, void* of_x, void* of_start, void* of_damping, void* of_decay, void* of_expansion, void* of_projection, const void* damping, const void* decay, const void* expansion, const void* projection, const void* start, const void* chunks, const void* segments, void* work, int64_t b, int64_t d, int n, int directions, float scale, int count, int tiles, int split, int states, int dtype, void* stream) {
    const Parameters parameters{static_cast<const float*>(damping), static_cast<const float*>(decay),
                                static_cast<const float*>(expansion), static_cast<const float*>(projection),
                                d, n, directions, scale};
    Problem problem{parameters, static_cast<const Chunk*>(chunks), static_cast<const int*>(segments),
                    b, 0, tiles, false, states != 0, d % 8 == 0 && aligned(x) && aligned(of_y) && aligned(of_x)};
    const float *before = static_cast<const float*>(start), *of_after = static_cast<const float*>(of_last);
    float *partial = static_cast<float*>(work), *of_before = static_cast<float*>(of_start);
    return with_dtype(dtype, [&](auto number) {
        using T = decltype(number);
        if (split) {
            const int64_t size = count * directions * d * n;
            float *leaving = partial + 3 * size, *entering = leaving + size, *of_y_entering = entering + size;
            if (int error = enter<T>(problem, x, before, leaving, entering, nullptr, count, stream)) return error;
            Problem adjoint = problem;
            adjoint.adjoint = true;
            if (int error = enter<T>(adjoint, of_y, of_after, leaving, of_y_entering, of_before, count, stream)) return error;
            before = entering, of_after = of_y_entering, of_before = nullptr;
        }
        problem.groups = static_cast<int>((d + Form<T>::GRADIENT_FEATURES - 1) / Form<T>::GRADIENT_FEATURES);
        const dim3 grid(static_cast<unsigned>(problem.groups) * static_cast<unsigned>(count));
        const size_t bytes = static_cast<size_t>(gradient_bytes<T>(tiles));
        if (int error = launch(differentiate<T>, grid, dim3(Form<T>::GRADIENT_WARPS * WARP), bytes, stream, problem,
                               static_cast<const T*>(x), static_cast<const T*>(of_y), static_cast<T*>(of_x), before, of_after,
                               of_before, partial, static_cast<int64_t>(count))) {
            return error;
        }
        return launch(to_parameters, blocks_of_states(parameters), dim3(128), 0, stream, parameters, count,
                      static_cast<const float*>(partial), static_cast<float*>(of_damping), static_cast<float*>(of_decay),
                      static_cast<float*>(of_expansion), static_cast<float*>(of_projection));
    });
}
