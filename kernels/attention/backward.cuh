// Backward (arXiv 2307.08691, algorithm 2), in three kernels: what is needed of every query; gradients of keys and
// values, each block with 64 keys and all queries that see them; gradients of queries, each block with 64 of them.
// Scores are computed twice, seven products instead of five, so that every sum has one owner and one order.
//
// With weights w, kept ones m (1 or 0) times s, and z = m s w: y = z v, and of a score
//     w (m s · of_z - Σ of_y · y), of_z = of_y vᵀ
// where the sum, delta, is over features.  Everything is computed without s, which results are multiplied by.
#pragma once

#include "tiles.cuh"

namespace farspan {
namespace attention {

constexpr int BACKWARD_THREADS = HALF_TILE / 16 * WARP;

template <class T>
struct Backward {
    const T *q, *k, *v, *of_y;
    T *of_q, *of_k, *of_v;
    Strides strides, of_results;  // of q, k and v; of all others
    const int* tiles;
    const uint32_t* queries;  // [heads, rows, positions, 4], see prepare
    Sizes sizes;
    float scale;                // of scores, times log2 e
    float of_scores, of_values;  // what sums are multiplied by
    uint32_t limit;
};

// Numbers of a query: the logarithm of its sum of exponentials, delta / s (both float32), its Draw.
struct Query {
    float logarithm, delta;
    Draw draw;

    FARSPAN_DEVICE static Query of(const uint32_t* from) {
        const Vector<uint32_t, 4> x = load<uint32_t, 4>(from);
        return {__uint_as_float(x[0]), __uint_as_float(x[1]), {x[2], x[3]}};
    }
};

template <class T>
struct Prepare {
    const T *y, *of_y;  // [positions, rows, heads, d]
    const float* logarithms;
    const int64_t* keys;  // [heads, positions, rows]
    uint32_t* queries;
    Sizes sizes;
    float kept;
};

constexpr int PREPARE_THREADS = 256, PREPARE_LANES = 8;

// Eight lanes a query; bound by reading y and of_y once.
template <class T>
__global__ void __launch_bounds__(PREPARE_THREADS) prepare(const Prepare<T> p) {
    const Sizes& s = p.sizes;
    const int64_t count = static_cast<int64_t>(s.positions) * s.rows * s.heads;
    const int64_t i = (static_cast<int64_t>(blockIdx.x) * PREPARE_THREADS + threadIdx.x) / PREPARE_LANES;
    const int lane = static_cast<int>(threadIdx.x) % PREPARE_LANES;
    float sum = 0.0f;
    for (int column = 8 * lane; i < count && column < s.d; column += 8 * PREPARE_LANES) {
        const Vector<T, 8> y = load<T, 8>(p.y + i * s.d + column), of_y = load<T, 8>(p.of_y + i * s.d + column);
#pragma unroll
        for (int j = 0; j < 8; ++j) sum += to_float(y[j]) * to_float(of_y[j]);
    }
#pragma unroll
    for (int mask = PREPARE_LANES / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (i >= count || lane) return;
    const int64_t head = i % s.heads, row = i / s.heads % s.rows, position = i / s.heads / s.rows;
    const int64_t to = (head * s.rows + row) * s.positions + position;
    const Draw draw = Draw::of(static_cast<uint64_t>(p.keys[(head * s.positions + position) * s.rows + row]));
    store<uint32_t, 4>(
        p.queries + 4 * to,
        {{__float_as_uint(p.logarithms[to]), __float_as_uint(sum / p.kept), draw.low, draw.mixed}}
    );
}

template <class T, int D>
__global__ void __launch_bounds__(BACKWARD_THREADS, D <= 64 ? 3 : 2) differentiate_keys(const Backward<T> p) {
    constexpr int MET = met_rows<D>(), MET_NUMBERS = MET * stride_of<D>(), OWN_NUMBERS = HALF_TILE * stride_of<D>();
    const Sizes& sizes = p.sizes;
    const Part part = Part::of(p.tiles, sizes, TILE / HALF_TILE);
    if (part.own >= part.end) return;
    const int own_row = 16 * warp_index(), first_row = part.own + own_row, g = lane_index() / 4, t = lane_index() % 4;
    T* const own = reinterpret_cast<T*>(shared_memory());  // keys, values
    T* const met = own + 2 * OWN_NUMBERS;                  // queries and gradients of results, twice; then Query, twice
    uint32_t* const met_queries = reinterpret_cast<uint32_t*>(met + 4 * MET_NUMBERS);

    const int base = part.offset(p.strides, 0), base_of_y = part.offset(p.of_results, 0);
    auto begin_to_meet = [&](int first) {
        T* to = met + first / MET % 2 * 2 * MET_NUMBERS;
        copy_rows<T, D, MET, BACKWARD_THREADS>(to, {p.q}, p.strides, part, base, first, sizes.d);
        to += MET_NUMBERS;
        copy_rows<T, D, MET, BACKWARD_THREADS>(to, {p.of_y}, p.of_results, part, base_of_y, first, sizes.d);
        const int place = first + static_cast<int>(threadIdx.x);
        if (static_cast<int>(threadIdx.x) < MET) {
            const bool valid = part.has(place);
            const uint32_t* from = valid ? p.queries + 4 * part.number(sizes, place) : p.queries;
            copy_16(met_queries + 4 * (place % (2 * MET)), from, valid);
        }
    };
    const int begin = sizes.causal ? part.own : 0;
    copy_rows<T, D, HALF_TILE, BACKWARD_THREADS, true>(own, {p.k, p.v}, p.strides, part, base, part.own, sizes.d);
    begin_to_meet(begin);
    copies_commit();

    Sums<1, D / 8> of_k, of_v;
    clear<1, D / 8>(of_k);
    clear<1, D / 8>(of_v);
    // A thread's keys are first_row + 2 g and the next.
    const uint32_t summand = (part.pair + static_cast<uint32_t>(first_row / 2 + g)) * PAIR;
    copies_wait<0>();
    sync_block();
    Own<T, D, 1, D <= 64 ? D / 16 : 0> keys;
    Own<T, D, 1, D == 32 ? 2 : 0> values;
    keys.keep(own + own_row * stride_of<D>());
    values.keep(own + OWN_NUMBERS + own_row * stride_of<D>());

#pragma unroll 1
    for (int first = begin; first < part.end; first += COLUMNS) {
        if (first % MET == 0) {
            if (first != begin) {
                copies_wait<0>();
                sync_block();
            }
            if (first + MET < part.end) begin_to_meet(first + MET);
            copies_commit();
        }
        if (first_row >= part.end || (sizes.causal && first + COLUMNS <= first_row)) continue;
        // Of queries that the document does not have every number is 0: they add nothing.
        Sums<1, COLUMNS / 8> weights, of_scores;
        const T* queries = met + (first / MET % 2 * 2 * MET + first % MET) * stride_of<D>();
        const uint32_t* numbers = met_queries + 4 * (first % (2 * MET));
        products_of_rows(weights, keys, queries);
        products_of_rows(of_scores, values, queries + MET_NUMBERS);
        const bool edge = sizes.causal && first < first_row + 16;
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; ++j) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const Query query = Query::of(numbers + 4 * (8 * j + 2 * t + i));
                bool dropped[2];
                draw(dropped, query.draw, summand, p.limit);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float& weight = weights[0][j][2 * half + i];
                    float& gradient = of_scores[0][j][2 * half + i];
                    const bool hidden = edge && first + 8 * j + 2 * t + i < first_row + 2 * g + half;
                    const float w = hidden ? 0.0f : power_of_2(weight * p.scale - query.logarithm);
                    weight = dropped[half] ? 0.0f : w;
                    gradient = w * ((dropped[half] ? 0.0f : gradient) - query.delta);
                }
            }
        }
        add_products<T, D, 1>(of_v, weights, queries + MET_NUMBERS);
        add_products<T, D, 1>(of_k, of_scores, queries);
    }
    const Part same = Part::of(p.tiles, sizes, TILE / HALF_TILE);  // read again, not kept in registers
    T* const tile = own + own_row * stride_of<D>();
    const int first = same.own + own_row;
    write_rows<T, D, true>(
        p.of_k, p.of_results, same, first, sizes.d, tile, of_k[0], p.of_scores, p.of_scores
    );
    write_rows<T, D, true>(
        p.of_v, p.of_results, same, first, sizes.d, tile + OWN_NUMBERS, of_v[0], p.of_values, p.of_values
    );
}

template <class T, int D>
__global__ void __launch_bounds__(BACKWARD_THREADS, D <= 64 ? 3 : 2) differentiate_queries(const Backward<T> p) {
    constexpr int MET = met_rows<D>(), MET_NUMBERS = MET * stride_of<D>(), OWN_NUMBERS = HALF_TILE * stride_of<D>();
    const Sizes& sizes = p.sizes;
    const Part part = Part::of(p.tiles, sizes, TILE / HALF_TILE);
    if (part.own >= part.end) return;
    const int own_row = 16 * warp_index(), first_row = part.own + own_row, g = lane_index() / 4, t = lane_index() % 4;
    T* const own = reinterpret_cast<T*>(shared_memory());  // queries, gradients of results
    T* const met = own + 2 * OWN_NUMBERS;                  // keys and values, twice

    const int base = part.offset(p.strides, 0), base_of_y = part.offset(p.of_results, 0);
    auto begin_to_meet = [&](int first) {
        T* to = met + first / MET % 2 * 2 * MET_NUMBERS;
        copy_rows<T, D, MET, BACKWARD_THREADS>(to, {p.k, p.v}, p.strides, part, base, first, sizes.d);
    };
    copy_rows<T, D, HALF_TILE, BACKWARD_THREADS>(own, {p.q}, p.strides, part, base, part.own, sizes.d);
    copy_rows<T, D, HALF_TILE, BACKWARD_THREADS>(
        own + OWN_NUMBERS, {p.of_y}, p.of_results, part, base_of_y, part.own, sizes.d
    );
    begin_to_meet(0);
    copies_commit();

    Query numbers[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int place = first_row + 8 * half + g;
        numbers[half] = Query{0.0f, 0.0f, {0, 0}};
        if (part.has(place)) numbers[half] = Query::of(p.queries + 4 * part.number(sizes, place));
        numbers[half].draw.low += (part.pair + t) * PAIR;
    }
    Sums<1, D / 8> of_q;
    clear<1, D / 8>(of_q);
    copies_wait<0>();
    sync_block();
    Own<T, D, 1, D <= 64 ? D / 16 : 0> queries, of_y;
    queries.keep(own + own_row * stride_of<D>());
    of_y.keep(own + OWN_NUMBERS + own_row * stride_of<D>());

    const int last = sizes.causal ? min(part.own + HALF_TILE, part.end) : part.end;
#pragma unroll 1
    for (int first = 0; first < last; first += COLUMNS) {
        if (first % MET == 0) {
            if (first) {
                copies_wait<0>();
                sync_block();
            }
            if (first + MET < last) begin_to_meet(first + MET);
            copies_commit();
        }
        if (first_row >= part.end || (sizes.causal && first >= first_row + 16)) continue;
        Sums<1, COLUMNS / 8> weights, of_scores;
        const T* keys = met + (first / MET % 2 * 2 * MET + first % MET) * stride_of<D>();
        products_of_rows(weights, queries, keys);
        products_of_rows(of_scores, of_y, keys + MET_NUMBERS);
        const bool edge = first < part.begin || first + COLUMNS > part.end;
        const bool diagonal = sizes.causal && first + COLUMNS > first_row + 1;
        const uint32_t summand = static_cast<uint32_t>(first / 2) * PAIR;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const Query& query = numbers[half];
#pragma unroll
            for (int j = 0; j < COLUMNS / 8; ++j) {
                bool dropped[2];
                draw(dropped, query.draw, summand + 4 * j * PAIR, p.limit);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int place = first + 8 * j + 2 * t + i;
                    float& gradient = of_scores[0][j][2 * half + i];
                    const float w = power_of_2(weights[0][j][2 * half + i] * p.scale - query.logarithm);
                    gradient = w * ((dropped[i] ? 0.0f : gradient) - query.delta);
                    // Beyond the document a score is 0, its exponential anything.
                    if (edge && !part.has(place)) gradient = 0.0f;
                    if (diagonal && place > first_row + 8 * half + g) gradient = 0.0f;
                }
            }
        }
        add_products<T, D, 1>(of_q, of_scores, keys);
    }
    const Part same = Part::of(p.tiles, sizes, TILE / HALF_TILE);  // read again, not kept in registers
    T* const tile = own + own_row * stride_of<D>();
    write_rows<T, D>(
        p.of_q, p.of_results, same, same.own + own_row, sizes.d, tile, of_q[0], p.of_scores, p.of_scores
    );
}

}  // namespace attention
}  // namespace farspan
