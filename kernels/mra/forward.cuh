// The forward pass.  COARSE first: of each row of blocks the maximum r, the sum and the values of what is not selected;
// FINE continues from there with its selected blocks.
//
// Bounds, for m selected blocks of 32 × 32 and d numbers of 2 bytes: 128 m d bytes of keys and values through the L2
// cache (once for each selected block: 0.8 GB of the 0.2 GB that they are at B8 H12 L4096 d64, 8 blocks a row), and
// 4096 m d floating-point operations; the first takes longer where L2 gives less than 8 TB/s.  COARSE has 1 / 32 of the
// rows: 4 nb² d operations of a matrix, of TF32 in threes.
#pragma once

#include "stream.cuh"

namespace farspan {
namespace mra {

template <class T>
struct Attend {
    Rows<const T> q, k, v;
    Rows<T> y;               // COARSE: Σ A v̂
    float *maximum, *sums;   // [matrices, 32 nb]; COARSE: r and Σ A, [matrices, padded nb]
    const uint32_t* tokens;  // [batch, nb]
    Lists lists;
    const float *rest_maximum, *rest_sums, *rest_values;  // what COARSE wrote; null: nothing
    Shape shape;
};

template <class T>
size_t attend_bytes(const Shape& shape) {
    const int tiles = tile_bytes<T>(shape.width) + shape.stages * shape.groups * stage_bytes<T, 0>(shape.width);
    const int warps = (shape.groups - 1) * 2 * shape.chunks();
    const int given = warps * (CHUNK / 2 + 4) * WARP * static_cast<int>(sizeof(float));
    return static_cast<size_t>(max(tiles, given));
}

template <class T, int D, bool COARSE>
__global__ void __launch_bounds__(D ? 128 : 256, D ? 5 : 1) attend(const Attend<T> p) {
    const Shape& shape = p.shape;
    const Sizes& s = shape.sizes;
    const Place place = Place::of<D, COARSE>(shape);
    const int width = D ? D : shape.width, d = D ? D : s.d, stride = tile_stride<T>(width);
    const uint32_t own_rows = rows_of_tile<COARSE>(p.tokens, s, place.batch, place.tile);
    const int64_t first = static_cast<int64_t>(place.tile) * BLOCK;
    char* const shared = shared_memory();
    T* const own_tile = reinterpret_cast<T*>(shared);
    copy_tile(
        own_tile, p.q.at(place.batch, place.head, first), p.q.strides.token, own_rows, d, width,
        static_cast<int>(threadIdx.x), shape.threads()
    );
    const Own<T, 0> own{own_tile + place.row * stride, stride, {}};

    float y[CHUNK / 8][4], maximum[2] = {minus_infinity(), minus_infinity()}, sums[2] = {0.0f, 0.0f};
    clear(y);
    const uint32_t* bits[2];  // COARSE: the thread's two rows of blocks, which are selected
    if constexpr (COARSE) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int64_t row = min(static_cast<int>(first) + place.row + place.g + 8 * half, s.nb - 1);
            bits[half] = p.lists.bits + (place.matrix() * s.nb + row) * s.words();
        }
    } else if (p.rest_maximum != nullptr && place.group == 0) {
        const int64_t row = place.matrix() * s.padded() + place.tile;
        maximum[0] = maximum[1] = p.rest_maximum[row];
        if (place.t == 0) sums[0] = sums[1] = p.rest_sums[row];  // lanes are added at the end
        const float* values = p.rest_values + (place.matrix() * s.nb + place.tile) * s.d;
#pragma unroll
        for (int j = 0; j < CHUNK / 8; ++j) {
            const int column = place.chunk * CHUNK + 8 * j + 2 * place.t;
            if (column >= d) continue;
            const Vector<float, 2> pair = load<float, 2>(values + column);
            y[j][0] = y[j][2] = pair[0];
            y[j][1] = y[j][3] = pair[1];
        }
    }

    auto work = [&](int tile, uint32_t real, const T* keys, const T* values, const float*) {
        if (real == 0) return;
        float w[4][4];
        products_of_rows<T, D>(w, own, keys, stride, width);
        float number[4][2];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int key = 8 * j + 2 * place.t + i % 2;
                bool seen = real >> key & 1u;
                if constexpr (COARSE) {
                    if (i < 2) number[j][i] = tokens_of_block(p.tokens, s, place.batch, tile * BLOCK + key);
                    seen = number[j][i % 2] > 0.0f && !(bits[i / 2][tile] >> key & 1u);
                }
                w[j][i] = seen ? w[j][i] * shape.scale : minus_infinity();
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float highest = minus_infinity();
#pragma unroll
            for (int j = 0; j < 4; ++j) highest = fmaxf(highest, fmaxf(w[j][2 * half], w[j][2 * half + 1]));
            highest = fmaxf(maximum[half], maximum_of_row(highest));
            const float base = highest == minus_infinity() ? 0.0f : highest;
            const float share = exponential<T>(maximum[half] - base);
            maximum[half] = highest;
            float sum = 0.0f;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; ++i) {
                    w[j][i] = exponential<T>(w[j][i] - base);
                    if constexpr (COARSE) w[j][i] *= number[j][i % 2];
                    sum += w[j][i];
                }
            }
            sums[half] = sums[half] * share + sum;
#pragma unroll
            for (int j = 0; j < CHUNK / 8; ++j) {
                y[j][2 * half] *= share;
                y[j][2 * half + 1] *= share;
            }
        }
        add_products<T, D>(y, w, values + place.chunk * CHUNK, stride, width - place.chunk * CHUNK);
    };
    const Met<T> met{p.k, p.v, nullptr};
    const auto tiles = Tiles<COARSE>::of(shape, place, p.tokens, p.lists.pointers, p.lists.columns);
    meet<T, D, COARSE, 0>(shape, place, tiles, met, shared + tile_bytes<T>(width), [] {}, work);

#pragma unroll
    for (int half = 0; half < 2; ++half) sums[half] = sum_of_row(sums[half]);
    if (shape.groups > 1) {
        constexpr int COUNT = CHUNK / 2 + 4;
        if (place.group > 0) {
            float* to = handed_over(shared, shape, place.group, COUNT);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                to[half * WARP] = maximum[half];
                to[(2 + half) * WARP] = sums[half];
            }
#pragma unroll
            for (int i = 0; i < CHUNK / 2; ++i) to[(4 + i) * WARP] = y[i / 4][i % 4];
        }
        sync_block();
        if (place.group > 0) return;
        for (int group = 1; group < shape.groups; ++group) {
            const float* from = handed_over(shared, shape, group, COUNT);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float other = from[half * WARP], highest = fmaxf(maximum[half], other);
                const float base = highest == minus_infinity() ? 0.0f : highest;
                const float share = exponential<T>(maximum[half] - base), of_other = exponential<T>(other - base);
                maximum[half] = highest;
                sums[half] = sums[half] * share + from[(2 + half) * WARP] * of_other;
#pragma unroll
                for (int j = 0; j < CHUNK / 8; ++j) {
#pragma unroll
                    for (int i = 2 * half; i < 2 * half + 2; ++i) {
                        y[j][i] = y[j][i] * share + from[(4 + 4 * j + i) * WARP] * of_other;
                    }
                }
            }
        }
    }

#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = place.row + place.g + 8 * half;
        const int64_t token = first + row;
        if constexpr (!COARSE) {
            if (maximum[half] == minus_infinity()) maximum[half] = 0.0f;  // neither a real key nor a block
            sums[half] += EPSILON;
        }
        if (place.chunk == 0 && place.t == 0) {
            const int64_t at = place.matrix() * (COARSE ? s.padded() : static_cast<int64_t>(s.nb) * BLOCK) + token;
            p.maximum[at] = maximum[half];
            p.sums[at] = sums[half];
        }
        if (token >= (COARSE ? s.nb : s.length)) continue;
        const bool real = own_rows >> row & 1u;
        const float factor = COARSE ? 1.0f : 1.0f / sums[half];
        T* to = p.y.at(place.batch, place.head, token);
#pragma unroll
        for (int j = 0; j < CHUNK / 8; ++j) {
            const int column = place.chunk * CHUNK + 8 * j + 2 * place.t;
            if (column >= d) continue;
            Vector<T, 2> pair;
#pragma unroll
            for (int i = 0; i < 2; ++i) pair[i] = from_float<T>(real ? y[j][2 * half + i] * factor : 0.0f);
            store<T, 2>(to + column, pair);
        }
    }
}

}  // namespace mra
}  // namespace farspan
