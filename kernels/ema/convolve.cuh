// y from x: a block has a segment of F features in shared memory, a warp one feature at a time in registers.
//
// Of a feature, X [64 positions, m chunks] as columns: states U = A X, a scan over chunks in each direction, Y = T X + B S.
//
// What bounds it (bf16; b 8, s 4096, d 1024, 16 hidden dimensions, two directions, one H200): 134 MB of x and y take 31 µs
// of 4.3 TB/s; 160 multiplications an element (T 64, A twice 32, B 32) take 19 µs of the 600 TFLOP/s that mma.sync
// reaches.  A block is all that a multiprocessor's shared memory holds (128 KiB of x, 16 features: whole sectors of 32
// bytes a position), so loads, products and stores overlap between multiprocessors alone, in 3.9 waves of 132 blocks:
// 45 to 55 µs are expected, and not measured yet.  Blocks of 8 features and 4 warps (Form<bf16>) would be two to a
// multiprocessor, at twice the sectors.  y replaces x in place; nothing else of x's size is made.
#pragma once

#include "states.cuh"

namespace farspan {
namespace ema {

struct Problem {
    Parameters parameters;
    const Chunk* chunks;
    const int* segments;  // [segments + 1] their first chunks
    int64_t b;
    int groups, tiles;  // groups: of features, that blocks of a segment have
    bool adjoint;       // gradients of y to those of x, times ...
    bool normalised;    // states are those of the definition, else without its injection (the adjoint's: projection)
    bool vectors;
};

template <int FEATURES>
FARSPAN_DEVICE Segment segment_of_block(const Problem& problem, char* memory, int64_t& index) {
    Chunk* chunks = reinterpret_cast<Chunk*>(memory);
    index = blockIdx.x / static_cast<unsigned>(problem.groups);
    const int first = problem.segments[index], count = problem.segments[index + 1] - first;
    for (int c = static_cast<int>(threadIdx.x); c < count; c += static_cast<int>(blockDim.x)) {
        chunks[c] = problem.chunks[first + c];
    }
    sync_block();
    const int64_t feature = static_cast<int64_t>(blockIdx.x % static_cast<unsigned>(problem.groups)) * FEATURES;
    return {chunks, count, problem.tiles, problem.b, problem.parameters.d, feature, problem.vectors};
}

// u += chunks · powers of a direction, of what the slab has.  Powers have two pieces at least: see Outgoing.
template <int TILES, int PIECES, int F>
FARSPAN_DEVICE void add_states(States<TILES>& u, const Slab<PIECES, F>& slab, int f, const ToStates& powers) {
#pragma unroll
    for (int k = 0; k < POSITIONS / 16; ++k) {
        uint32_t b[2][PIECES == 1 ? 2 : PIECES][2];
        powers.fragment(k, 0, false, b[0]);
        powers.fragment(k, 1, false, b[1]);
#pragma unroll
        for (int j = 0; j < TILES; ++j) {
            if (j >= slab.tiles) break;
            uint32_t a[PIECES][4];
            slab.chunks_by_positions(f, j, k, a);
            multiply(u[j][0], a, b[0]);
            multiply(u[j][1], a, b[1]);
        }
    }
}

template <int TILES>
FARSPAN_DEVICE void clear(States<TILES>& u) {
#pragma unroll
    for (int j = 0; j < TILES; ++j) {
#pragma unroll
        for (int i = 0; i < 8; ++i) u[j][i / 4][i % 4] = 0.0f;
    }
}

// States times what takes them to positions.
template <int TILES>
FARSPAN_DEVICE void weigh_outgoing(const Problem& problem, bool adjoint, States<TILES>& u, Table table, int direction) {
    weigh<TILES>(u, table, direction, adjoint ? Table::INJECT : Table::PROJECT);
    if (!problem.normalised) weigh<TILES>(u, table, direction, adjoint ? Table::PROJECT : Table::INJECT);
}

// What goes out of the states of both directions to a feature's positions, and what the chunks themselves give: in
// place of what the slab has; AT_ONCE tiles at a time, whose x is in registers.
template <int AT_ONCE, int TILES, int PIECES, int F>
FARSPAN_DEVICE void replace(
    const Problem& problem, bool adjoint, const Slab<PIECES, F>& slab, int f, Table table, const float* line,
    const Outgoing<TILES, PIECES>& states
) {
    Lags<PIECES> lags;
    lags.make(line, adjoint);
    const int directions = problem.parameters.directions;
    const FromStates<PIECES> powers[2] = {{table, 0, adjoint, !adjoint}, {table, 1, !adjoint, !adjoint}};
#pragma unroll
    for (int from = 0; from < TILES; from += AT_ONCE) {
        if (from >= slab.tiles) break;
        uint32_t x[AT_ONCE][POSITIONS / 16][PIECES][4];
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            if (from + j >= slab.tiles) break;
#pragma unroll
            for (int k = 0; k < POSITIONS / 16; ++k) slab.chunks_by_positions(f, from + j, k, x[j][k]);
        }
        sync_warp();  // read, before any is written
#pragma unroll
        for (int unit = 0; unit < UNITS; ++unit) {
            float y[AT_ONCE][4] = {};
#pragma unroll
            for (int k = 0; k < POSITIONS / 16; ++k) {
                // Zeros on one side of the diagonal where there is one direction.
                if (directions == 1 && (adjoint ? unit - 2 * k >= 2 : unit - 2 * k <= -1)) continue;
                uint32_t b[PIECES][2];
                lags.fragment(unit, k, b);
#pragma unroll
                for (int j = 0; j < AT_ONCE; ++j) {
                    if (from + j < slab.tiles) multiply(y[j], x[j][k], b);
                }
            }
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                if (k >= directions) break;
                uint32_t b[PIECES][2];
                powers[k].fragment(unit, b);
#pragma unroll
                for (int j = 0; j < AT_ONCE; ++j) {
                    if (from + j < slab.tiles) states.add(y[j], k, from + j, b);
                }
            }
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j) {
                if (from + j < slab.tiles) slab.put(f, from + j, unit, y[j]);
            }
        }
    }
}

constexpr int LINE = 128;

template <class T>
int convolve_bytes(int tiles) {
    constexpr int F = Form<T>::FEATURES;
    return Slab<Form<T>::PIECES, F>::bytes(tiles) + 16 * tiles * static_cast<int>(sizeof(Chunk)) +
           Form<T>::WARPS * (Table::SIZE + LINE) * 4;
}

// y may be null: then only what leaves the segments is wanted.  entering, leaving: [segments, directions, d, n] states
// before and after each segment in its direction, null where not given or wanted.
template <class T>
__global__ __launch_bounds__(Form<T>::WARPS * WARP) void convolve(
    Problem problem, const T* x, T* y, const float* entering, float* leaving
) {
    constexpr int F = Form<T>::FEATURES, PIECES = Form<T>::PIECES, TILES = Form<T>::TILES;
    char* memory = shared_memory();
    const Slab<PIECES, F> slab{memory, problem.tiles};
    memory += slab.bytes(problem.tiles);
    int64_t index;
    const Segment segment = segment_of_block<F>(problem, memory, index);
    memory += 16 * problem.tiles * sizeof(Chunk);
    float* numbers = reinterpret_cast<float*>(memory) + warp_index() * (Table::SIZE + LINE);
    const Table table{numbers};
    float* line = numbers + Table::SIZE;

    slab.fill(segment, x);
    sync_block();
    const LaneChunks lane(segment);
    for (int f = warp_index(); f < F && segment.feature + f < segment.d; f += Form<T>::WARPS) {
        const int64_t feature = segment.feature + f;
        sync_warp();
        table.fill(problem.parameters, feature, problem.tiles);
        table.kernel(line);
        Outgoing<TILES, PIECES> states;
        states.clear();
#pragma unroll 1
        for (int k = 0; k < problem.parameters.directions; ++k) {
            const bool backwards = (k == 1) != problem.adjoint;
            States<TILES> u;
            clear<TILES>(u);
            add_states<TILES>(u, slab, f, ToStates(table, k, !backwards, problem.adjoint));
            if (problem.normalised) weigh<TILES>(u, table, k, problem.adjoint ? Table::PROJECT : Table::INJECT);
            float before[2][2], after[2][2];
            read_states(entering, problem.parameters, index, k, feature, before);
            if (backwards) {
                scan<TILES, true>(u, lane, table, k, before, after);
            } else {
                scan<TILES, false>(u, lane, table, k, before, after);
            }
            write_states(leaving, problem.parameters, index, k, feature, after);
            weigh_outgoing<TILES>(problem, problem.adjoint, u, table, k);
            states.keep(u, k);
        }
        if (y != nullptr) replace<TILES>(problem, problem.adjoint, slab, f, table, line, states);
    }
    if (y == nullptr) return;
    sync_block();
    slab.empty(segment, y);
}

// What leaves each segment → what enters it, for documents of several segments; a thread a state.  start: [b, d, n] before
// each row, last: after it; null where not given or wanted.
__global__ __launch_bounds__(128) void join(
    Problem problem, int segments, const float* leaving, const float* start, float* entering, float* last
) {
    const Parameters& of = problem.parameters;
    const int64_t states = of.directions * of.d * of.n, at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= states) return;
    const bool backwards = (at >= of.d * of.n) != problem.adjoint;
    const float log_q = coefficients(of, at).log_q;
    float state = 0.0f;
    for (int i = 0; i < segments; ++i) {
        const int segment = backwards ? segments - 1 - i : i;
        const int first = problem.segments[segment], end = problem.segments[segment + 1];
        const Chunk left = problem.chunks[first], right = problem.chunks[end - 1];
        const int64_t of_row = left.row * of.d * of.n + at % (of.d * of.n);
        if (backwards ? right.flags & ENDS : left.flags & BEGINS) state = start != nullptr ? start[of_row] : 0.0f;
        entering[segment * states + at] = state;
        const float change = expm1f(log_q * static_cast<float>(POSITIONS * (end - first)));
        state = fmaf(change, state, state) + leaving[segment * states + at];
        if (last != nullptr && (backwards ? left.flags & BEGINS : right.flags & ENDS)) last[of_row] = state;
    }
}

}  // namespace ema
}  // namespace farspan
