// States between the chunks of a segment, in the fragments that products left them in: a lane has, of four hidden
// dimensions, 2 tiles chunks that follow one another.
#pragma once

#include "powers.cuh"

namespace farspan {
namespace ema {

// u[tile][half][...] as D [16 chunks, hidden dimensions from 8 half].
template <int TILES>
using States = float[TILES][2][4];

// Which of a lane's chunks there are, and which let nothing in from either side: bit m for its m-th.
struct LaneChunks {
    uint32_t present, left, right;
    int last;  // the lane group of the segment's last chunk

    FARSPAN_DEVICE LaneChunks(const Segment& segment) : present(0), left(0), right(0) {
        const int each = 2 * segment.tiles;
        for (int m = 0; m < each; ++m) {
            const int c = lane_index() / 4 * each + m;
            if (c >= segment.count) break;
            const int flags = segment.chunks[c].flags;
            present |= 1u << m;
            if (flags & FRESH_LEFT) left |= 1u << m;
            if (flags & FRESH_RIGHT) right |= 1u << m;
        }
        last = (segment.count - 1) / each;
    }
};

template <int TILES>
FARSPAN_DEVICE float& of_chunk(States<TILES>& u, int m, int half, int i) {
    return u[m / 2][half][m % 2 * 2 + i];
}

// Over a lane's chunks: the state that comes out where `state` goes in; `write`: and u becomes the one before each.
template <int TILES, bool BACKWARDS>
FARSPAN_DEVICE float walk(States<TILES>& u, const LaneChunks& lane, int half, int i, float change, float state, bool write) {
#pragma unroll
    for (int step = 0; step < 2 * TILES; ++step) {
        const int m = BACKWARDS ? 2 * TILES - 1 - step : step;
        const bool present = lane.present >> m & 1;
        if ((BACKWARDS ? lane.right : lane.left) >> m & 1) state = 0.0f;
        float& here = of_chunk<TILES>(u, m, half, i);
        const float more = here;
        if (write) here = present ? state : 0.0f;
        if (present) state = fmaf(change, state, state) + more;
    }
    return state;
}

// What each chunk adds → the state before it in its direction.  entering: before the segment; leaving: after it.
// Within a lane one after another, among the 8 lanes with the same dimensions in 3 steps; selects rather than factors of
// 0 where a document ends, so that what is not finite stays in its own.
template <int TILES, bool BACKWARDS>
FARSPAN_DEVICE void scan(
    States<TILES>& u, const LaneChunks& lane, Table table, int direction, const float (&entering)[2][2], float (&leaving)[2][2]
) {
    const int g = lane_index() / 4, t = lane_index() % 4, first = BACKWARDS ? lane.last : 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int n = 8 * half + 2 * t + i;
            const float change = table.get(direction, n, Table::CHANGE);
            float sum = walk<TILES, BACKWARDS>(u, lane, half, i, change, g == first ? entering[half][i] : 0.0f, false);
            int open = (BACKWARDS ? lane.right : lane.left) == 0;
#pragma unroll
            for (int step = 0; step < 3; ++step) {
                const int by = 1 << step;
                const float before = BACKWARDS ? shuffle_down(sum, 4 * by) : shuffle_up(sum, 4 * by);
                const int before_open = BACKWARDS ? shuffle_down(open, 4 * by) : shuffle_up(open, 4 * by);
                const float through = fmaf(table.get(direction, n, Table::CHANGE + 1 + step), before, before);
                if ((BACKWARDS ? g + by < 8 : g >= by) && open) {
                    sum += through;
                    open = before_open;
                }
            }
            const float of_neighbour = BACKWARDS ? shuffle_down(sum, 4) : shuffle_up(sum, 4);
            const float carry = g == first ? entering[half][i] : of_neighbour;
            const float end = walk<TILES, BACKWARDS>(u, lane, half, i, change, carry, true);
            leaving[half][i] = shuffle(end, 4 * (BACKWARDS ? 0 : lane.last) + t);
        }
    }
}

// [segments, directions, d, n], nothing where null.
FARSPAN_DEVICE void read_states(
    const float* from, const Parameters& of, int64_t segment, int direction, int64_t feature, float (&to)[2][2]
) {
    const int64_t at = ((segment * of.directions + direction) * of.d + feature) * of.n;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int n = 8 * half + 2 * (lane_index() % 4) + i;
            to[half][i] = from != nullptr && n < of.n ? from[at + n] : 0.0f;
        }
    }
}

FARSPAN_DEVICE void write_states(
    float* to, const Parameters& of, int64_t segment, int direction, int64_t feature, const float (&from)[2][2]
) {
    const int64_t at = ((segment * of.directions + direction) * of.d + feature) * of.n;
    if (to == nullptr || lane_index() >= 4) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int n = 8 * half + 2 * lane_index() + i;
            if (n < of.n) to[at + n] = from[half][i];
        }
    }
}

// Each state times its coefficient.
template <int TILES>
FARSPAN_DEVICE void weigh(States<TILES>& u, Table table, int direction, int column) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float weight = table.get(direction, 8 * half + 2 * (lane_index() % 4) + i % 2, column);
#pragma unroll
            for (int j = 0; j < TILES; ++j) u[j][half][i] *= weight;
        }
    }
}

// States on their way to the positions of their chunks, as A [16 chunks, 16 hidden dimensions] of each tile.
//
// Those of hidden dimensions with like decays may nearly cancel, by coefficients of either sign, so they need more than
// the 8 bits of bfloat16: where x is of one piece they are float16 times a power of 2 for each chunk.
template <int TILES, int PIECES>
struct Outgoing {
    uint32_t a[2][TILES][PIECES][4];
    float scales[2][TILES][2];

    FARSPAN_DEVICE void clear() {
#pragma unroll
        for (int i = 0; i < 2 * TILES * PIECES * 4; ++i) {
            a[i / (TILES * PIECES * 4)][i / (PIECES * 4) % TILES][i / 4 % PIECES][i % 4] = 0;
        }
    }

    // No index but constants, so that all stays in registers; the second direction comes last.
    FARSPAN_DEVICE void keep(const States<TILES>& u, int direction) {
#pragma unroll
        for (int j = 0; j < TILES; ++j) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float scale = 1.0f, inverse = 1.0f;
                if (PIECES == 1) {
                    const float ours = fmaxf(fmaxf(fabsf(u[j][0][2 * h]), fabsf(u[j][0][2 * h + 1])),
                                             fmaxf(fabsf(u[j][1][2 * h]), fabsf(u[j][1][2 * h + 1])));
                    const float most = fmaxf(ours, shuffle_xor(ours, 1)), of_all = fmaxf(most, shuffle_xor(most, 2));
                    const uint32_t exponent = min(max(__float_as_uint(of_all) >> 23, 27u), 227u);
                    scale = __uint_as_float(exponent << 23), inverse = __uint_as_float((254u - exponent) << 23);
                }
                scales[0][j][h] = direction == 0 ? scale : scales[0][j][h];
                scales[1][j][h] = scale;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    uint32_t pieces[PIECES];
                    const float first = u[j][half][2 * h], second = u[j][half][2 * h + 1];
                    if constexpr (PIECES == 1) {
                        pieces[0] = pack<fp16>(first * inverse, second * inverse);
                    } else {
                        split(first, second, pieces);
                    }
#pragma unroll
                    for (int p = 0; p < PIECES; ++p) {
                        a[0][j][p][2 * half + h] = direction == 0 ? pieces[p] : a[0][j][p][2 * half + h];
                        a[1][j][p][2 * half + h] = pieces[p];
                    }
                }
            }
        }
    }

    // y [16 chunks, 8 positions] of tile j += states · powers.
    FARSPAN_DEVICE void add(float (&y)[4], int direction, int j, const uint32_t (&powers)[PIECES][2]) const {
        if constexpr (PIECES == 1) {
            float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            mma_16x8x16<fp16>(sums, a[direction][j][0], powers[0]);
#pragma unroll
            for (int i = 0; i < 4; ++i) y[i] = fmaf(scales[direction][j][i / 2], sums[i], y[i]);
        } else {
            multiply(y, a[direction][j], powers);
        }
    }
};

}  // namespace ema
}  // namespace farspan
