// The coefficients of a feature, and the operands of products that are made of them.
//
// Of a chunk x [64] and a hidden dimension with decay q: what it adds to the state after it is Σ_i q^(63−i) x_i, and of a
// state before it position i gets q^(i+1).  All powers are products of q^(0..7) and q^(0, 8, ..., 56).  Backwards they are
// mirrored; the adjoint (gradients of y run through the same matrices, transposed) swaps the two.
#pragma once

#include "slab.cuh"

namespace farspan {
namespace ema {

constexpr int HIDDEN = 16, STATES = 2 * HIDDEN;  // hidden dimensions, of both directions

struct Parameters {
    const float *damping, *decay, *expansion, *projection;  // [directions, d, n]
    int64_t d;
    int n, directions;
    float scale;  // of the projection
};

struct Coefficients {
    float p, loss, log_q, inject, project;
    bool saturated;  // the loss was as much as 1
};

FARSPAN_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// As coefficients.py.
FARSPAN_DEVICE Coefficients coefficients(const Parameters& from, int64_t at) {
    constexpr float LARGEST = 1.0f - 1.1920929e-7f;
    Coefficients c;
    c.p = sigmoid(from.damping[at]);
    const float loss = c.p * sigmoid(from.decay[at]);
    c.saturated = loss > LARGEST;
    c.loss = c.saturated ? LARGEST : loss;
    c.log_q = log1pf(-c.loss);
    c.inject = c.p * from.expansion[at];
    c.project = from.projection[at] * from.scale;
    return c;
}

// Of a warp's feature, in shared memory: a row for each state, of an odd stride against bank conflicts.
struct Table {
    enum Column : int { POWER = 0, POWER_OF_8 = 8, CHANGE = 16, INJECT = 20, PROJECT = 21, STRIDE = 25 };
    static constexpr int SIZE = STATES * STRIDE;
    float* numbers;

    FARSPAN_DEVICE float get(int direction, int n, int column) const {
        return numbers[(direction * HIDDEN + n) * STRIDE + column];
    }

    // Lane l makes row l.  CHANGE + 0..3: the decay less 1 (which alone is accurate near 1) over 1, 2 tiles, 4 tiles and
    // 8 tiles chunks.
    FARSPAN_DEVICE void fill(const Parameters& from, int64_t feature, int tiles) const {
        const int direction = lane_index() / HIDDEN, n = lane_index() % HIDDEN;
        Coefficients c{0.0f, 0.5f, -0.6931472f, 0.0f, 0.0f, false};
        if (direction < from.directions && n < from.n) c = coefficients(from, (direction * from.d + feature) * from.n + n);
        float* row = numbers + lane_index() * STRIDE;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            row[POWER + i] = expf(c.log_q * static_cast<float>(i));
            row[POWER_OF_8 + i] = expf(c.log_q * static_cast<float>(8 * i));
        }
        row[CHANGE] = expm1f(c.log_q * POSITIONS);
#pragma unroll
        for (int i = 1; i < 4; ++i) row[CHANGE + i] = expm1f(c.log_q * static_cast<float>(POSITIONS * tiles << i));
        row[INJECT] = c.inject, row[PROJECT] = c.project;
        sync_warp();
    }

    // line[lag + 63] = the kernel's value, lags −63 to 63, where a negative lag is the second direction's.
    FARSPAN_DEVICE void kernel(float* line) const {
        const int direction = lane_index() / 16, r = lane_index() % 8, first = lane_index() / 8 % 2 * 4;
        float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        for (int n = 0; n < HIDDEN; ++n) {
            const float weight = get(direction, n, INJECT) * get(direction, n, PROJECT) * get(direction, n, POWER + r);
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[i] += weight * get(direction, n, POWER_OF_8 + first + i);
        }
        const float other = shuffle(sums[0], 16);  // lag 0 of the second direction
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int lag = 8 * (first + i) + r;
            if (direction == 0) line[lag + 63] = lag == 0 ? sums[i] + other : sums[i];
            if (direction == 1 && lag > 0) line[63 - lag] = sums[i];
        }
        sync_warp();
    }
};

// B [positions, states] of products that take chunks to states: exponents 63 − i (reversed) or i, and 1 more.
struct ToStates {
    Table table;
    int direction;
    bool reversed;
    float low[2][2], sign, first;  // the exponent of position i is first + sign · i

    FARSPAN_DEVICE ToStates(Table table, int direction, bool reversed, bool one_more)
        : table(table), direction(direction), reversed(reversed) {
        const int g = lane_index() / 4, t = lane_index() % 4;
        sign = reversed ? -1.0f : 1.0f;
        first = (reversed ? 63.0f : 0.0f) + (one_more ? 1.0f : 0.0f);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int r = reversed ? 7 - 2 * t - i : 2 * t + i, n = 8 * half + g;
                low[half][i] = table.get(direction, n, Table::POWER + r);
                if (one_more) low[half][i] *= table.get(direction, n, Table::POWER + 1);
            }
        }
    }

    // Positions from 16 k, states from 8 half.  `derived`: times the exponent, the derivative by log q.
    template <int PIECES>
    FARSPAN_DEVICE void fragment(int k, int half, bool derived, uint32_t (&b)[PIECES][2]) const {
        const int g = lane_index() / 4, t = lane_index() % 4;
        const float start = fmaf(sign, static_cast<float>(2 * t), first);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int unit = 2 * k + h;
            const float high = table.get(direction, 8 * half + g, Table::POWER_OF_8 + (reversed ? 7 - unit : unit));
            float values[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                values[i] = low[half][i] * high * (derived ? fmaf(sign, static_cast<float>(8 * unit + i), start) : 1.0f);
            }
            uint32_t pieces[PIECES];
            split(values[0], values[1], pieces);
#pragma unroll
            for (int p = 0; p < PIECES; ++p) b[p][h] = pieces[p];
        }
    }
};

// B [states, 8 positions] of products that take states to chunks, without their coefficients: exponents as above.
template <int PIECES>
struct FromStates {
    Table table;
    int direction;
    bool reversed;
    float low[2][2];

    FARSPAN_DEVICE FromStates(Table table, int direction, bool reversed, bool one_more)
        : table(table), direction(direction), reversed(reversed) {
        const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int n = 8 * half + 2 * t + i;
                low[half][i] = table.get(direction, n, Table::POWER + (reversed ? 7 - g : g));
                if (one_more) low[half][i] *= table.get(direction, n, Table::POWER + 1);
            }
        }
    }

    FARSPAN_DEVICE void fragment(int unit, uint32_t (&b)[PIECES][2]) const {
        const int t = lane_index() % 4, column = Table::POWER_OF_8 + (reversed ? 7 - unit : unit);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int n = 8 * half + 2 * t;
            const float first = low[half][0] * table.get(direction, n, column);
            const float second = low[half][1] * table.get(direction, n + 1, column);
            if constexpr (PIECES == 1) {
                b[0][half] = pack<fp16>(first, second);  // at most 1: see Outgoing
            } else {
                uint32_t pieces[PIECES];
                split(first, second, pieces);
#pragma unroll
                for (int p = 0; p < PIECES; ++p) b[p][half] = pieces[p];
            }
        }
    }
};

// The Toeplitz matrix T of a chunk by blocks of 8×8, which are 15: block δ has the lags 8 δ + row − column.
template <int PIECES>
struct Lags {
    uint32_t blocks[15][PIECES];

    FARSPAN_DEVICE void make(const float* line, bool transposed) {
        const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
        for (int block = 0; block < 15; ++block) {
            const int lag = 8 * (block - 7) + g - 2 * t;  // -63 is the least of lag - 1, 63 the largest of lag
            split(line[transposed ? 63 - lag : 63 + lag], line[transposed ? 64 - lag : 62 + lag], blocks[block]);
        }
    }

    // B [positions from 16 k, positions of the unit] of Xᵀ Tᵀ.
    FARSPAN_DEVICE void fragment(int unit, int k, uint32_t (&b)[PIECES][2]) const {
#pragma unroll
        for (int p = 0; p < PIECES; ++p) b[p][0] = blocks[unit - 2 * k + 7][p], b[p][1] = blocks[unit - 2 * k + 6][p];
    }
};

}  // namespace ema
}  // namespace farspan
