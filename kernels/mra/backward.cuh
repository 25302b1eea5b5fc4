// The backward pass, without additions in any order: rows of blocks for queries, columns for keys and values.
//
//   turn_bits, list_columns        the lists by columns (selection.cuh)
//   prepare    [matrices · nb] warps   1 / sum and δ = ∂y · y of each query, and what a row of blocks gives to the
//                                  low-resolution part: U = Σ f ∂y, w = Σ f δ with f = exp(r − maximum) / sum; bound by
//                                  reading y and ∂y once
//   differentiate_rows, differentiate_columns   COARSE for the means' gradients, then FINE, which gives each real token
//                                  its share of them, 1 / (n + 1e-6)
//
// With weights p = exp(s − maximum) / sum:  ∂v = pᵀ ∂y,  ∂s = p (∂y vᵀ − δ),  ∂q = ∂s k / √d,  ∂k = ∂sᵀ q / √d.  COARSE
// is the same of p = n exp(l − r), ∂y = U, δ = w.
//
// Bounds of FINE, for m selected blocks: each of the two kernels moves 128 m d bytes through the L2 cache, as the
// forward pass; products are 6144 m d and 8192 m d operations.
#pragma once

#include "stream.cuh"

namespace farspan {
namespace mra {

constexpr int PREPARE_WARPS = 4, STATISTICS = 3;

template <class T>
struct Prepare {
    Rows<const T> of_y, y;
    const float *maximum, *sums;   // [matrices, 32 nb]
    const uint32_t* tokens;
    const float* rest_maximum;     // r [matrices, padded nb]; null: no low-resolution part
    float* statistics;             // maximum, δ, 1 / sum: [matrices, nb, 3, 32]
    float* rest_statistics;        // r, w, 1: [matrices, words, 3, 32]
    float* of_values;              // U [matrices, nb, d]
    Sizes sizes;
};

// What products of a row's scores need: [tiles, STATISTICS, 32].
FARSPAN_DEVICE void write_statistics(float* to, int64_t tile, int row, float maximum, float delta, float inverse) {
    to += tile * STATISTICS * BLOCK + row;
    to[0] = maximum;
    to[BLOCK] = delta;
    to[2 * BLOCK] = inverse;
}

template <class T>
__global__ void __launch_bounds__(PREPARE_WARPS * WARP) prepare(const Prepare<T> p) {
    constexpr int EACH = 16 / sizeof(T), PARTS = 256 / (EACH * WARP);  // vectors that a lane has of a row
    const Sizes& s = p.sizes;
    const int64_t block = static_cast<int64_t>(blockIdx.x) * PREPARE_WARPS + warp_index(), matrix = block / s.nb;
    if (matrix >= s.matrices()) return;
    const int64_t batch = matrix / s.heads, head = matrix % s.heads, first = block % s.nb * BLOCK;
    const uint32_t real = p.tokens[batch * s.nb + block % s.nb];
    const int lanes = lanes_of_row(s.d / EACH), lane = lane_index(), column = lane % lanes * EACH;
    const float rest = p.rest_maximum ? p.rest_maximum[matrix * s.padded() + block % s.nb] : minus_infinity();

    float sums[PARTS][EACH] = {}, sum = 0.0f;
    for (int row = lane / lanes; row < BLOCK; row += WARP / lanes) {
        const int64_t at = block * BLOCK + row;
        const bool is_real = real >> row & 1u;
        Vector<T, EACH> of_y[PARTS] = {};
        float delta = 0.0f;
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            const int from = column + part * EACH * WARP;
            if (!is_real || from >= s.d) continue;
            of_y[part] = load<T, EACH>(p.of_y.at(batch, head, first + row) + from);
            const Vector<T, EACH> y = load<T, EACH>(p.y.at(batch, head, first + row) + from);
#pragma unroll
            for (int i = 0; i < EACH; ++i) delta += to_float(of_y[part][i]) * to_float(y[i]);
        }
        for (int distance = 1; distance < lanes; distance *= 2) delta += shuffle_xor(delta, distance);
        const float inverse = 1.0f / p.sums[at];
        const float maximum = p.maximum[at];
        if (lane % lanes == 0) write_statistics(p.statistics, block, row, maximum, delta, inverse);
        const float share = is_real ? expf(rest - maximum) * inverse : 0.0f;
        sum += share * delta;
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
#pragma unroll
            for (int i = 0; i < EACH; ++i) sums[part][i] += share * to_float(of_y[part][i]);
        }
    }
    if (p.rest_maximum == nullptr) return;
    for (int distance = lanes; distance < WARP; distance *= 2) {
        sum += shuffle_xor(sum, distance);
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
#pragma unroll
            for (int i = 0; i < EACH; ++i) sums[part][i] += shuffle_xor(sums[part][i], distance);
        }
    }
    if (lane == 0) {
        const int own = static_cast<int>(block % s.nb);
        write_statistics(p.rest_statistics, matrix * s.words() + own / BLOCK, own % BLOCK, rest, sum, 1.0f);
    }
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        const int to = column + part * EACH * WARP;
        if (lane >= lanes || to >= s.d) continue;
#pragma unroll
        for (int i = 0; i < EACH; ++i) p.of_values[block * s.d + to + i] = sums[part][i];
    }
}

template <class T>
struct Differentiate {
    Rows<const T> q, k, v, of_y;
    Rows<T> of_q, of_k, of_v;
    const float* statistics;  // as ``prepare`` wrote them
    const uint32_t* tokens;
    Lists lists;  // by rows, or by columns
    const float *of_q_mean, *of_k_mean, *of_v_mean;  // [matrices, nb, d] what COARSE wrote; null: nothing
    Shape shape;
};

// `own` tiles of the block's rows; see ``meet``.
template <class T, int NUMBERS>
size_t differentiate_bytes(const Shape& shape) {
    const int tiles =
        2 * tile_bytes<T>(shape.width) + shape.stages * shape.groups * stage_bytes<T, NUMBERS>(shape.width);
    const int given = (shape.groups - 1) * 2 * shape.chunks() * CHUNK / 2 * WARP * static_cast<int>(sizeof(float));
    return static_cast<size_t>(max(tiles, given));
}

// Writes 32 rows of a gradient: factor · sums + mean_factor · the token's share of the mean's, zeros at padding.
template <class T, int D, bool COARSE>
FARSPAN_DEVICE void write_gradient(
    const float (&sums)[CHUNK / 8][4], const Rows<T>& rows, const float* of_mean, float factor, float mean_factor,
    uint32_t real, const Shape& shape, const Place& place
) {
    const Sizes& s = shape.sizes;
    const int d = D ? D : s.d;
    const float share = mean_factor / (static_cast<float>(__popc(real)) + EPSILON);
    if (of_mean != nullptr) of_mean += (place.matrix() * s.nb + place.tile) * s.d;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = place.row + place.g + 8 * half;
        const int64_t token = static_cast<int64_t>(place.tile) * BLOCK + row;
        if (token >= (COARSE ? s.nb : s.length)) continue;
        T* to = rows.at(place.batch, place.head, token);
#pragma unroll
        for (int j = 0; j < CHUNK / 8; ++j) {
            const int column = place.chunk * CHUNK + 8 * j + 2 * place.t;
            if (column >= d) continue;
            Vector<float, 2> mean{{0.0f, 0.0f}};
            if (!COARSE && of_mean != nullptr) mean = load<float, 2>(of_mean + column);
            Vector<T, 2> pair;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float gradient = factor * sums[j][2 * half + i] + share * mean[i];
                pair[i] = from_float<T>(real >> row & 1u ? gradient : 0.0f);
            }
            store<T, 2>(to + column, pair);
        }
    }
}

// COARSE: the bits of the thread's two rows of blocks in the lists.
FARSPAN_DEVICE void bits_of_rows(const uint32_t* (&bits)[2], const Lists& lists, const Sizes& s, const Place& place) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = min(place.tile * BLOCK + place.row + place.g + 8 * half, s.nb - 1);
        bits[half] = lists.bits + (place.matrix() * s.nb + row) * s.words();
    }
}

// Gradients of queries: own rows are q and ∂y, met k and v.
template <class T, int D, bool COARSE>
__global__ void __launch_bounds__(D ? 128 : 256, D ? 4 : 1) differentiate_rows(const Differentiate<T> p) {
    const Shape& shape = p.shape;
    const Sizes& s = shape.sizes;
    const Place place = Place::of<D, COARSE>(shape);
    const int width = D ? D : shape.width, d = D ? D : s.d, stride = tile_stride<T>(width);
    const uint32_t own_rows = rows_of_tile<COARSE>(p.tokens, s, place.batch, place.tile);
    const int64_t first = static_cast<int64_t>(place.tile) * BLOCK;
    const int thread = static_cast<int>(threadIdx.x);
    char* const shared = shared_memory();
    T* const q_tile = reinterpret_cast<T*>(shared);
    T* const y_tile = reinterpret_cast<T*>(shared + tile_bytes<T>(width));
    const auto copy = [&](T* to, const Rows<const T>& rows) {
        const T* from = rows.at(place.batch, place.head, first);
        copy_tile(to, from, rows.strides.token, own_rows, d, width, thread, shape.threads());
    };
    copy(q_tile, p.q);
    copy(y_tile, p.of_y);
    Own<T, D / 2> q{q_tile + place.row * stride, stride, {}};
    const Own<T, 0> of_y{y_tile + place.row * stride, stride, {}};

    float of_q[CHUNK / 8][4], maximum[2], inverse[2], delta[2];
    clear(of_q);
    const uint32_t* bits[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int64_t tile = place.matrix() * tiles_of_matrix<COARSE>(s) + place.tile;
        const float* statistics = p.statistics + tile * STATISTICS * BLOCK + place.row + place.g + 8 * half;
        const bool exists = !COARSE || first + place.row + place.g + 8 * half < s.nb;
        maximum[half] = exists ? statistics[0] : 0.0f;
        delta[half] = exists ? statistics[BLOCK] : 0.0f;
        inverse[half] = exists ? statistics[2 * BLOCK] : 0.0f;
    }
    if constexpr (COARSE) bits_of_rows(bits, p.lists, s, place);

    auto work = [&](int tile, uint32_t real, const T* keys, const T* values, const float*) {
        float w[4][4], of_w[4][4];
        products_of_rows<T, D>(w, q, keys, stride, width);
        products_of_rows<T, D>(of_w, of_y, values, stride, width);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            float number[2];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int key = 8 * j + 2 * place.t + i % 2, half = i / 2;
                bool seen = real >> key & 1u;
                if constexpr (COARSE) {
                    if (i < 2) number[i] = tokens_of_block(p.tokens, s, place.batch, tile * BLOCK + key);
                    seen = number[i % 2] > 0.0f && !(bits[half][tile] >> key & 1u);
                }
                float weight = exponential<T>(w[j][i] * shape.scale - maximum[half]) * inverse[half];
                if constexpr (COARSE) weight *= number[i % 2];
                of_w[j][i] = seen ? weight * (of_w[j][i] - delta[half]) : 0.0f;
            }
        }
        add_products<T, D>(of_q, of_w, keys + place.chunk * CHUNK, stride, width - place.chunk * CHUNK);
    };
    const Met<T> met{p.k, p.v, nullptr};
    const auto tiles = Tiles<COARSE>::of(shape, place, p.tokens, p.lists.pointers, p.lists.columns);
    meet<T, D, COARSE, 0>(shape, place, tiles, met, shared + 2 * tile_bytes<T>(width), [&] { q.keep(); }, work);
    gather_sums(shared, shape, place, of_q);
    if (place.group > 0) return;
    write_gradient<T, D, COARSE>(of_q, p.of_q, p.of_q_mean, shape.scale, shape.scale, own_rows, shape, place);
}

// Gradients of keys and values: own rows are k and v, met q and ∂y.
template <class T, int D, bool COARSE>
__global__ void __launch_bounds__(D ? 128 : 256, D ? 3 : 1) differentiate_columns(const Differentiate<T> p) {
    const Shape& shape = p.shape;
    const Sizes& s = shape.sizes;
    const Place place = Place::of<D, COARSE>(shape);
    const int width = D ? D : shape.width, d = D ? D : s.d, stride = tile_stride<T>(width);
    const uint32_t own_rows = rows_of_tile<COARSE>(p.tokens, s, place.batch, place.tile);
    const int64_t first = static_cast<int64_t>(place.tile) * BLOCK;
    const int thread = static_cast<int>(threadIdx.x);
    char* const shared = shared_memory();
    T* const k_tile = reinterpret_cast<T*>(shared);
    T* const v_tile = reinterpret_cast<T*>(shared + tile_bytes<T>(width));
    const auto copy = [&](T* to, const Rows<const T>& rows) {
        const T* from = rows.at(place.batch, place.head, first);
        copy_tile(to, from, rows.strides.token, own_rows, d, width, thread, shape.threads());
    };
    copy(k_tile, p.k);
    copy(v_tile, p.v);
    Own<T, D> k{k_tile + place.row * stride, stride, {}};
    const Own<T, 0> v{v_tile + place.row * stride, stride, {}};

    float of_k[CHUNK / 8][4], of_v[CHUNK / 8][4], number[2];
    clear(of_k);
    clear(of_v);
    const uint32_t* bits[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = place.row + place.g + 8 * half;
        number[half] = COARSE ? tokens_of_block(p.tokens, s, place.batch, static_cast<int>(first) + row)
                              : static_cast<float>(own_rows >> row & 1u);
    }
    if constexpr (COARSE) bits_of_rows(bits, p.lists, s, place);

    auto work = [&](int tile, uint32_t, const T* queries, const T* of_y, const float* statistics) {
        float w[4][4], of_w[4][4];
        products_of_rows<T, D>(w, k, queries, stride, width);
        products_of_rows<T, D>(of_w, v, of_y, stride, width);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int query = 8 * j + 2 * place.t;
            const Vector<float, 2> maximum = load<float, 2>(statistics + query);
            const Vector<float, 2> delta = load<float, 2>(statistics + BLOCK + query);
            const Vector<float, 2> inverse = load<float, 2>(statistics + 2 * BLOCK + query);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                bool seen = number[i / 2] > 0.0f;
                if constexpr (COARSE) {
                    seen = seen && tile * BLOCK + query + i % 2 < s.nb && !(bits[i / 2][tile] >> (query + i % 2) & 1u);
                }
                const float weight = exponential<T>(w[j][i] * shape.scale - maximum[i % 2]) * inverse[i % 2];
                w[j][i] = seen ? (COARSE ? weight * number[i / 2] : weight) : 0.0f;
                of_w[j][i] = seen ? w[j][i] * (of_w[j][i] - delta[i % 2]) : 0.0f;
            }
        }
        const int left = place.chunk * CHUNK;
        add_products<T, D>(of_v, w, of_y + left, stride, width - left);
        add_products<T, D>(of_k, of_w, queries + left, stride, width - left);
    };
    const Met<T> met{p.q, p.of_y, p.statistics};
    const auto tiles = Tiles<COARSE>::of(shape, place, p.tokens, p.lists.pointers, p.lists.columns);
    const auto ready = [&] { k.keep(); };
    meet<T, D, COARSE, STATISTICS>(shape, place, tiles, met, shared + 2 * tile_bytes<T>(width), ready, work);
    gather_sums(shared, shape, place, of_k);
    gather_sums(shared, shape, place, of_v);
    if (place.group > 0) return;
    write_gradient<T, D, COARSE>(of_k, p.of_k, p.of_k_mean, shape.scale, 1.0f, own_rows, shape, place);
    write_gradient<T, D, COARSE>(of_v, p.of_v, p.of_v_mean, 1.0f, 1.0f, own_rows, shape, place);
}

}  // namespace mra
}  // namespace farspan
