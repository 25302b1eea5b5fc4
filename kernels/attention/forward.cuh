// Forward: a block has 128 queries of a document's head and meets its keys and values tile by tile (arXiv 2307.08691,
// algorithm 1).
#pragma once

#include "tiles.cuh"

namespace farspan {
namespace attention {

template <class T>
struct Forward {
    const T *q, *k, *v;
    T* y;
    Strides strides, of_y;  // of q, k and v; of y
    const int64_t* keys;  // [heads, positions, rows]
    const int* tiles;
    float* logarithms;  // [heads, rows, positions], to the base 2, of sums of exponentials
    Sizes sizes;
    float scale;  // of scores, times log2 e
    float kept;   // what weights that are not dropped are multiplied by
    uint32_t limit;
};

// Sums are relative to a score that is at most this far (in powers of 2) below the row's maximum so far.  So they are
// seldom scaled anew, and there is no maximum to find over the threads that share a row, only one to compare with.
constexpr float SLACK = 8.0f;

template <int D>
FARSPAN_HOST_DEVICE constexpr int blocks_of_rows() {  // of 16, that a warp has: each halves what it reads per product
    return D <= 64 ? 2 : 1;
}
template <int D>
FARSPAN_HOST_DEVICE constexpr int forward_threads() {
    return TILE / (16 * blocks_of_rows<D>()) * WARP;
}

// The scaled score that a warp's rows refer to, and the sums relative to it, of a thread's columns.
template <int M>
struct Softmax {
    float top[M][2], sum[M][2];

    // Scores become weights, relative to `top`; what was summed before is scaled where `top` is another.
    template <int N>
    FARSPAN_DEVICE void weigh(Sums<M, COLUMNS / 8>& scores, Sums<M, N>& y, float scale) {
        float highest[M][2];
        bool grows = false;
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                highest[m][half] = scores[m][0][2 * half];
#pragma unroll
                for (int j = 0; j < COLUMNS / 8; ++j) {
                    const float higher = fmaxf(scores[m][j][2 * half], scores[m][j][2 * half + 1]);
                    highest[m][half] = fmaxf(highest[m][half], higher);
                }
                highest[m][half] *= scale;
                grows |= highest[m][half] > top[m][half] + SLACK;
            }
        }
        if (ballot(grows)) {
#pragma unroll
            for (int m = 0; m < M; ++m) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float before = top[m][half];
                    top[m][half] = fmaxf(before, maximum_of_row(highest[m][half]));
                    const float factor = before == top[m][half] ? 1.0f : power_of_2(before - top[m][half]);
                    sum[m][half] *= factor;
#pragma unroll
                    for (int j = 0; j < N; ++j) {
                        y[m][j][2 * half] *= factor;
                        y[m][j][2 * half + 1] *= factor;
                    }
                }
            }
        }
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
                for (int j = 0; j < COLUMNS / 8; ++j) {
#pragma unroll
                    for (int i = 2 * half; i < 2 * half + 2; ++i) {
                        scores[m][j][i] = power_of_2(scores[m][j][i] * scale - top[m][half]);
                        sum[m][half] += scores[m][j][i];
                    }
                }
            }
        }
    }
};

template <class T, int D>
__global__ void __launch_bounds__(forward_threads<D>(), D <= 64 ? 3 : 1) attend(const Forward<T> p) {
    constexpr int M = blocks_of_rows<D>(), THREADS = forward_threads<D>(), MET = met_rows<D>();
    constexpr int MET_NUMBERS = MET * stride_of<D>();
    const Sizes& sizes = p.sizes;
    const Part part = Part::of(p.tiles, sizes, 1);
    const int first_row = part.own + 16 * M * warp_index(), g = lane_index() / 4, t = lane_index() % 4;
    T* const own = reinterpret_cast<T*>(shared_memory());
    T* const met = own + TILE * stride_of<D>();  // keys and values, twice

    const int base = part.offset(p.strides, 0);
    auto begin_to_meet = [&](int first) {
        T* to = met + first / MET % 2 * 2 * MET_NUMBERS;
        copy_rows<T, D, MET, THREADS>(to, {p.k, p.v}, p.strides, part, base, first, sizes.d);
    };
    copy_rows<T, D, TILE, THREADS>(own, {p.q}, p.strides, part, base, part.own, sizes.d);
    begin_to_meet(0);
    copies_commit();

    // Draws are read again for every tile: registers are what is short.
    uint32_t* const draws = reinterpret_cast<uint32_t*>(met + 4 * MET_NUMBERS);
    if (static_cast<int>(threadIdx.x) < TILE) {
        const int place = part.own + static_cast<int>(threadIdx.x);
        const int64_t token = static_cast<int64_t>(part.head) * sizes.positions + part.start + place;
        const Draw mine = Draw::of(part.has(place) ? static_cast<uint64_t>(p.keys[token * sizes.rows + part.row]) : 0);
        store<uint32_t, 2>(draws + 2 * threadIdx.x, {{mine.low, mine.mixed}});
    }
    const uint32_t own_summand = (part.pair + static_cast<uint32_t>(t)) * PAIR;
    Softmax<M> softmax;
    Sums<M, D / 8> y;
    clear<M, D / 8>(y);
#pragma unroll
    for (int m = 0; m < M; ++m) {
        softmax.top[m][0] = softmax.top[m][1] = __uint_as_float(0xff800000u);
        softmax.sum[m][0] = softmax.sum[m][1] = 0.0f;
    }
    copies_wait<0>();
    sync_block();
    Own<T, D, M, D == 64 ? 3 : D == 32 ? 2 : 0> queries;
    queries.keep(own + 16 * M * warp_index() * stride_of<D>());

    const int last = sizes.causal ? min(part.own + TILE, part.end) : part.end;
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
        if (first_row >= part.end || (sizes.causal && first >= first_row + 16 * M)) continue;
        Sums<M, COLUMNS / 8> scores;
        const T* keys = met + (first / MET % 2 * 2 * MET + first % MET) * stride_of<D>();
        products_of_rows(scores, queries, keys);
        if (first < part.begin || first + COLUMNS > part.end || (sizes.causal && first + COLUMNS > first_row + 1)) {
#pragma unroll
            for (int m = 0; m < M; ++m) {
#pragma unroll
                for (int j = 0; j < COLUMNS / 8; ++j) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int place = first + 8 * j + 2 * t + i % 2, row = first_row + 16 * m + i / 2 * 8 + g;
                        const bool seen = part.has(place) && (!sizes.causal || place <= row);
                        if (!seen) scores[m][j][i] = __uint_as_float(0xff800000u);
                    }
                }
            }
        }
        softmax.template weigh<D / 8>(scores, y, p.scale);
        const uint32_t summand = own_summand + static_cast<uint32_t>(first / 2) * PAIR;
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = 16 * (M * warp_index() + m) + 8 * half + g;
                const Vector<uint32_t, 2> of_row = load<uint32_t, 2>(draws + 2 * row);
#pragma unroll
                for (int j = 0; j < COLUMNS / 8; ++j) {
                    bool dropped[2];
                    draw(dropped, Draw{of_row[0], of_row[1]}, summand + 4 * j * PAIR, p.limit);
                    if (dropped[0]) scores[m][j][2 * half] = 0.0f;
                    if (dropped[1]) scores[m][j][2 * half + 1] = 0.0f;
                }
            }
        }
        add_products<T, D, M>(y, scores, keys + MET_NUMBERS);
    }

    const Part same = Part::of(p.tiles, sizes, 1);  // read again, not kept in registers
#pragma unroll
    for (int m = 0; m < M; ++m) {
        float factors[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float sum = sum_of_row(softmax.sum[m][half]);
            const int place = same.own + 16 * M * warp_index() + 16 * m + 8 * half + g;
            factors[half] = p.kept / sum;
            if (t == 0 && same.has(place)) {
                p.logarithms[same.number(sizes, place)] = softmax.top[m][half] + log2f(sum);
            }
        }
        const int row = 16 * (M * warp_index() + m);
        write_rows<T, D>(
            p.y, p.of_y, same, same.own + row, sizes.d, own + row * stride_of<D>(), y[m], factors[0], factors[1]
        );
    }
}

}  // namespace attention
}  // namespace farspan
