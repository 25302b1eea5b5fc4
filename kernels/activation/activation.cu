// y = gelu(x + bias) and its gradients: dx = dy gelu'(x + bias) and, of the same reading, dbias, the sum of dx over rows.
//
// Bounded by bytes: forward reads x and writes y, backward reads x and dy and writes dx, each once; at [8192, 4096] in
// bfloat16 31 and 47 µs at 4.3 TB/s.  (Summing dx in a pass of its own, as linear layers do, reads it again: 16 µs.)
// Some 35 instructions a number, of erff and the exponential, take 40 µs there beside the bytes.
//
// A warp has 512 bytes of a row, a thread 16; a block's 8 warps take every eighth row of the block's part.  Sums of
// columns go thread, block, then all blocks in their order, in a second kernel: always the same.
#include <type_traits>

#include "device.h"

namespace farspan {

constexpr int WARPS = 8, THREADS = WARPS * WARP;
constexpr int FORWARD_ROWS = 4, BACKWARD_ROWS = 2;  // that a thread loads before it uses the first
constexpr int BLOCKS = 1056;                        // about, in all: 8 a multiprocessor of an H200
enum Kind : int { ERF = 0, TANH = 1 };

// Numbers a thread has of a row, and a block.
template <class T>
constexpr int EACH = 16 / static_cast<int>(sizeof(T));
template <class T>
constexpr int COLUMNS = WARP * EACH<T>;

struct Gelu {
    float value, slope;
};

// Fast exponentials are exact enough where results have 16 bits.
template <class T, Kind KIND>
FARSPAN_DEVICE Gelu gelu(float u) {
    constexpr bool EXACT = std::is_same<T, float>::value;
    if constexpr (KIND == ERF) {
        const float density = 0.3989422804f * (EXACT ? expf(-0.5f * u * u) : __expf(-0.5f * u * u));
        const float part = 0.5f + 0.5f * erff(u * 0.7071067812f);
        return {u * part, part + u * density};
    } else {
        // ½ (1 + tanh z) = 1 / (1 + exp(-2z)), z = √(2/π) (u + 0.044715 u³)
        constexpr float ROOT = 0.7978845608f, CUBE = 0.044715f;
        const float square = u * u, power = -2 * ROOT * u * (1 + CUBE * square);
        const float part = EXACT ? 1 / (1 + expf(power)) : __fdividef(1.0f, 1 + __expf(power));
        return {u * part, part + 2 * ROOT * u * part * (1 - part) * (1 + 3 * CUBE * square)};
    }
}

FARSPAN_DEVICE float read_as(const void* from, int dtype, int i) {
    if (dtype == FLOAT32) return static_cast<const float*>(from)[i];
    if (dtype == BFLOAT16) return to_float(static_cast<const bf16*>(from)[i]);
    return to_float(static_cast<const fp16*>(from)[i]);
}
FARSPAN_DEVICE void write_as(void* to, int dtype, int i, float value) {
    if (dtype == FLOAT32) {
        static_cast<float*>(to)[i] = value;
    } else if (dtype == BFLOAT16) {
        static_cast<bf16*>(to)[i] = from_float<bf16>(value);
    } else {
        static_cast<fp16*>(to)[i] = from_float<fp16>(value);
    }
}

// A thread's part of [rows, features]: a column and the rows of its block.
template <class T>
struct Part {
    int column;
    bool there;
    int64_t first, end;

    FARSPAN_DEVICE Part(int64_t rows, int features) {
        column = static_cast<int>(blockIdx.x) * COLUMNS<T> + lane_index() * EACH<T>;
        there = column < features;
        const int64_t of_block = (rows + gridDim.y - 1) / gridDim.y;
        first = blockIdx.y * of_block + warp_index();
        end = min(rows, (blockIdx.y + 1) * of_block);
    }
};

template <class T, Kind KIND>
__global__ void __launch_bounds__(THREADS, 3) bias_gelu_forward_kernel(
    const T* __restrict__ x, const void* __restrict__ bias, T* __restrict__ y, int64_t rows, int features,
    int bias_dtype
) {
    using Numbers = Vector<T, EACH<T>>;
    const Part<T> part(rows, features);
    if (!part.there) return;
    float of_bias[EACH<T>];
#pragma unroll
    for (int i = 0; i < EACH<T>; ++i) of_bias[i] = read_as(bias, bias_dtype, part.column + i);
    for (int64_t row = part.first; row < part.end; row += WARPS * FORWARD_ROWS) {
        Numbers given[FORWARD_ROWS];
#pragma unroll
        for (int r = 0; r < FORWARD_ROWS; ++r) {
            const int64_t at = row + r * WARPS;
            if (at < part.end) given[r] = load<T, EACH<T>>(x + at * features + part.column);
        }
#pragma unroll
        for (int r = 0; r < FORWARD_ROWS; ++r) {
            const int64_t at = row + r * WARPS;
            if (at >= part.end) break;
#pragma unroll
            for (int i = 0; i < EACH<T>; ++i) {
                given[r][i] = from_float<T>(gelu<T, KIND>(to_float(given[r][i]) + of_bias[i]).value);
            }
            store(y + at * features + part.column, given[r]);
        }
    }
}

// sums: [gridDim.y, features], of the rows of each block.
template <class T, Kind KIND>
__global__ void __launch_bounds__(THREADS, 3) bias_gelu_backward_kernel(
    const T* __restrict__ y_gradient, const T* __restrict__ x, const void* __restrict__ bias,
    T* __restrict__ x_gradient, float* __restrict__ sums, int64_t rows, int features, int bias_dtype
) {
    using Numbers = Vector<T, EACH<T>>;
    const Part<T> part(rows, features);
    float of_bias[EACH<T>], sum[EACH<T>] = {};
    if (part.there) {
#pragma unroll
        for (int i = 0; i < EACH<T>; ++i) of_bias[i] = read_as(bias, bias_dtype, part.column + i);
        for (int64_t row = part.first; row < part.end; row += WARPS * BACKWARD_ROWS) {
            Numbers given[BACKWARD_ROWS], gradient[BACKWARD_ROWS];
#pragma unroll
            for (int r = 0; r < BACKWARD_ROWS; ++r) {
                const int64_t at = row + r * WARPS;
                if (at < part.end) {
                    given[r] = load<T, EACH<T>>(x + at * features + part.column);
                    gradient[r] = load<T, EACH<T>>(y_gradient + at * features + part.column);
                }
            }
#pragma unroll
            for (int r = 0; r < BACKWARD_ROWS; ++r) {
                const int64_t at = row + r * WARPS;
                if (at >= part.end) break;
#pragma unroll
                for (int i = 0; i < EACH<T>; ++i) {
                    const float slope = gelu<T, KIND>(to_float(given[r][i]) + of_bias[i]).slope;
                    const float of_x = to_float(gradient[r][i]) * slope;
                    sum[i] += of_x;
                    given[r][i] = from_float<T>(of_x);
                }
                store(x_gradient + at * features + part.column, given[r]);
            }
        }
    }
    float* of_warps = reinterpret_cast<float*>(shared_memory());  // [WARPS, COLUMNS]
#pragma unroll
    for (int i = 0; i < EACH<T>; i += 4) {
        Vector<float, 4> four;
#pragma unroll
        for (int j = 0; j < 4; ++j) four[j] = sum[i + j];
        store(of_warps + warp_index() * COLUMNS<T> + lane_index() * EACH<T> + i, four);
    }
    sync_block();
    const int thread = static_cast<int>(threadIdx.x), column = static_cast<int>(blockIdx.x) * COLUMNS<T> + thread;
    if (thread < COLUMNS<T> && column < features) {
        float of_block = 0;
#pragma unroll
        for (int warp = 0; warp < WARPS; ++warp) of_block += of_warps[warp * COLUMNS<T> + thread];
        sums[static_cast<int64_t>(blockIdx.y) * features + column] = of_block;
    }
}

// A block has 32 columns; its warps take every eighth of the sums.
__global__ void __launch_bounds__(THREADS) bias_gradient_kernel(
    const float* __restrict__ sums, void* __restrict__ bias_gradient, int blocks, int features, int bias_dtype
) {
    const int column = static_cast<int>(blockIdx.x) * WARP + lane_index();
    float sum = 0;
    if (column < features) {
#pragma unroll 4
        for (int block = warp_index(); block < blocks; block += WARPS) {
            sum += sums[static_cast<int64_t>(block) * features + column];
        }
    }
    float* of_warps = reinterpret_cast<float*>(shared_memory());
    of_warps[threadIdx.x] = sum;
    sync_block();
    if (warp_index() == 0 && column < features) {
        sum = 0;
#pragma unroll
        for (int warp = 0; warp < WARPS; ++warp) sum += of_warps[warp * WARP + lane_index()];
        write_as(bias_gradient, bias_dtype, column, sum);
    }
}

// Blocks side by side, and one below another: at most `most`.
template <class T>
dim3 grid(int64_t rows, int features, int64_t most) {
    const int64_t across = (features + COLUMNS<T> - 1) / COLUMNS<T>;
    const int64_t useful = (rows + WARPS * FORWARD_ROWS - 1) / (WARPS * FORWARD_ROWS), wanted = (BLOCKS + across - 1) / across;
    return dim3(static_cast<unsigned>(across), static_cast<unsigned>(min(min(useful, wanted), most)));
}

template <Kind KIND>
struct OfKind {
    static constexpr Kind value = KIND;
};
template <class F>
int with_kind(int kind, F function) {
    if (kind == ERF) return function(OfKind<ERF>{});
    if (kind == TANH) return function(OfKind<TANH>{});
    return 1;
}

}  // namespace farspan

using namespace farspan;

// x, y: [rows, features], features a multiple of 8; kind 0: with the error function, 1: its approximation by tanh.
FARSPAN_EXPORT int bias_gelu_forward(const void* x, const void* bias, void* y, int64_t rows, int features, int kind, int dtype, int bias_dtype, void* stream) {
    return with_dtype(dtype, [&](auto number) {
        using T = decltype(number);
        return with_kind(kind, [&](auto of) {
            return launch(
                bias_gelu_forward_kernel<T, decltype(of)::value>, grid<T>(rows, features, BLOCKS), dim3(THREADS), 0, stream,
                static_cast<const T*>(x), bias, static_cast<T*>(y), rows, features, bias_dtype
            );
        });
    });
}

// sums: float32 [most, features], room for what blocks leave to the second kernel.
FARSPAN_EXPORT int bias_gelu_backward(const void* y_gradient, const void* x, const void* bias, void* x_gradient, void* bias_gradient, void* sums, int64_t rows, int features, int most, int kind, int dtype, int bias_dtype, void* stream) {
    return with_dtype(dtype, [&](auto number) {
        using T = decltype(number);
        return with_kind(kind, [&](auto of) {
            const dim3 blocks = grid<T>(rows, features, most);
            const int error = launch(
                bias_gelu_backward_kernel<T, decltype(of)::value>, blocks, dim3(THREADS),
                WARPS * COLUMNS<T> * sizeof(float), stream, static_cast<const T*>(y_gradient), static_cast<const T*>(x),
                bias, static_cast<T*>(x_gradient), static_cast<float*>(sums), rows, features, bias_dtype
            );
            if (error) return error;
            return launch(
                bias_gradient_kernel, dim3(static_cast<unsigned>((features + WARP - 1) / WARP)), dim3(THREADS),
                THREADS * sizeof(float), stream, static_cast<const float*>(sums), bias_gradient,
                static_cast<int>(blocks.y), features, bias_dtype
            );
        });
    });
}
