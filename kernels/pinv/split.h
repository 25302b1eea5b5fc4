// Products of small matrices on tensor cores to about float32's accuracy, by one block, operands in shared memory.
//
// A number is kept as two of float16, x ≈ (high + low) / scale with a scale per matrix that is a power of two: 22 bits.
// A product is then three: high high + high low + low high.  Tensor cores cut a sum's last bits off instead of rounding
// (arXiv 2203.03341, section 4), always towards zero, so the first of the three is summed by ordinary additions, 16
// products at a time; in the other two, 2^-11 of it, that does not matter.
//
// A block of 2 M / 16 warps makes an [M, M] result: a pair of warps 16 rows, each half of the columns.
#pragma once

#include "mma.h"

namespace farspan {

constexpr int HIGHEST = 13;  // the exponent of two that a scaled number's size may have: float16 ends at 2^16

FARSPAN_DEVICE int exponent_of(float x) { return static_cast<int>((__float_as_uint(x) >> 23) & 255u) - 127; }
FARSPAN_DEVICE float power_of_two(int exponent) { return __int_as_float((min(max(exponent, -126), 127) + 127) << 23); }

// An [M, M] matrix in shared memory, split.
template <int M>
struct Split {
    static constexpr int PITCH = M + 8;  // in numbers: eight rows of 16 bytes then lie in different banks
    static constexpr size_t BYTES = 2 * M * PITCH * sizeof(uint16_t);
    uint16_t* high;

    FARSPAN_DEVICE uint16_t* low() const { return high + M * PITCH; }
    FARSPAN_DEVICE static Split at(int index) {
        return {reinterpret_cast<uint16_t*>(shared_memory() + index * BYTES)};
    }
};

// A warp's part of an [M, M] matrix: 16 rows, M / 2 columns, in the layout of products' results.
template <int M>
struct Tile {
    static constexpr int COUNT = M / 16;  // 16×8 pieces
    float values[COUNT][4];

    FARSPAN_DEVICE static int row(int i) { return warp_index() / 2 * 16 + lane_index() / 4 + i / 2 * 8; }
    FARSPAN_DEVICE static int column(int piece, int i) {
        return warp_index() % 2 * (M / 2) + piece * 8 + lane_index() % 4 * 2 + i % 2;
    }
    // f(value, row, column) of all the thread's numbers.
    template <class F>
    FARSPAN_DEVICE void each(F f) {
#pragma unroll
        for (int piece = 0; piece < COUNT; ++piece) {
#pragma unroll
            for (int i = 0; i < 4; ++i) f(values[piece][i], row(i), column(piece, i));
        }
    }
    // value = f(its value, b's, c's)
    template <class F>
    FARSPAN_DEVICE void from(const Tile& b, const Tile& c, F f) {
#pragma unroll
        for (int piece = 0; piece < COUNT; ++piece) {
#pragma unroll
            for (int i = 0; i < 4; ++i) values[piece][i] = f(values[piece][i], b.values[piece][i], c.values[piece][i]);
        }
    }
    template <class F>
    FARSPAN_DEVICE void from(const Tile& b, F f) {
        from(b, b, [&](float own, float of_b, float) { return f(own, of_b); });
    }
    FARSPAN_DEVICE float largest() const {
        float found = 0;
#pragma unroll
        for (int piece = 0; piece < COUNT; ++piece) {
#pragma unroll
            for (int i = 0; i < 4; ++i) found = fmaxf(found, fabsf(values[piece][i]));
        }
        return warp_max(found);
    }
};

// Two neighbours of a row, split.
FARSPAN_DEVICE void split(float first, float second, uint32_t& high, uint32_t& low) {
    high = pack<fp16>(first, second);
    low = pack<fp16>(
        first - to_float(fp16{static_cast<uint16_t>(high)}), second - to_float(fp16{static_cast<uint16_t>(high >> 16)})
    );
}

template <int M>
FARSPAN_DEVICE void write(const Tile<M>& tile, Split<M> to, float scale) {
#pragma unroll
    for (int piece = 0; piece < Tile<M>::COUNT; ++piece) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            const int at = Tile<M>::row(i) * Split<M>::PITCH + Tile<M>::column(piece, i);
            Vector<uint32_t, 1> high, low;
            split(tile.values[piece][i] * scale, tile.values[piece][i + 1] * scale, high[0], low[0]);
            store(reinterpret_cast<uint32_t*>(to.high + at), high);
            store(reinterpret_cast<uint32_t*>(to.low() + at), low);
        }
    }
}

// 16 rows and columns of a product's left operand.
struct Fragment {
    uint32_t high[4], low[4];
};

// A warp's rows of a left operand, the matrix or its transpose, read from shared memory when they are used.
template <bool Transposed, int M>
struct Rows {
    static constexpr int STEPS = 2;  // of a product that are in flight together
    const uint16_t* from;

    FARSPAN_DEVICE explicit Rows(Split<M> matrix) {
        const int lane = lane_index(), first = warp_index() / 2 * 16, one = lane / 8 % 2 * 8, other = lane / 16 * 8;
        from = matrix.high + (Transposed ? (lane % 8 + other) * Split<M>::PITCH + first + one
                                         : (first + lane % 8 + one) * Split<M>::PITCH + other);
    }
    FARSPAN_DEVICE Fragment operator()(int step) const {
        Fragment found;
        if constexpr (Transposed) {
            load_matrices_transposed(found.high, from + step * 16 * Split<M>::PITCH);
            load_matrices_transposed(found.low, from + (M + step * 16) * Split<M>::PITCH);
        } else {
            load_matrices(found.high, from + step * 16);
            load_matrices(found.low, from + M * Split<M>::PITCH + step * 16);
        }
        return found;
    }
};

// The same in registers, for several products or over a barrier.
template <int M>
struct HeldRows {
    static constexpr int STEPS = M / 16;
    Fragment fragments[M / 16];

    FARSPAN_DEVICE void read(Split<M> from) {
        const Rows<false, M> rows(from);
#pragma unroll
        for (int step = 0; step < M / 16; ++step) fragments[step] = rows(step);
    }
    FARSPAN_DEVICE const Fragment& operator()(int step) const { return fragments[step]; }
};

// product = left · right, or left · rightᵀ, in the operands' scales.
template <bool Transposed, int M, class Left>
FARSPAN_DEVICE void multiply(Tile<M>& product, const Left& left, Split<M> right) {
    const int lane = lane_index(), first = warp_index() % 2 * (M / 2), one = lane / 8 % 2 * 8, other = lane / 16 * 8;
    const uint16_t* from = right.high + (Transposed ? (first + lane % 8 + other) * Split<M>::PITCH + one
                                                    : (lane % 8 + one) * Split<M>::PITCH + first + other);
    float rest[Tile<M>::COUNT][4];
#pragma unroll
    for (int piece = 0; piece < Tile<M>::COUNT; ++piece) {
#pragma unroll
        for (int i = 0; i < 4; ++i) product.values[piece][i] = rest[piece][i] = 0;
    }
#pragma unroll Left::STEPS
    for (int step = 0; step < M / 16; ++step) {
        const Fragment rows = left(step);
#pragma unroll
        for (int pair = 0; pair < Tile<M>::COUNT / 2; ++pair) {
            uint32_t high[4], low[4];  // two pieces' columns
            if constexpr (Transposed) {
                load_matrices(high, from + pair * 16 * Split<M>::PITCH + step * 16);
                load_matrices(low, from + (M + pair * 16) * Split<M>::PITCH + step * 16);
            } else {
                load_matrices_transposed(high, from + step * 16 * Split<M>::PITCH + pair * 16);
                load_matrices_transposed(low, from + (M + step * 16) * Split<M>::PITCH + pair * 16);
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int piece = pair * 2 + half;
                const uint32_t of_high[2] = {high[half * 2], high[half * 2 + 1]};
                const uint32_t of_low[2] = {low[half * 2], low[half * 2 + 1]};
                float sum[4] = {};
                mma_16x8x16<fp16>(sum, rows.high, of_high);
                mma_16x8x16<fp16>(rest[piece], rows.high, of_low);
                mma_16x8x16<fp16>(rest[piece], rows.low, of_high);
#pragma unroll
                for (int i = 0; i < 4; ++i) product.values[piece][i] += sum[i];
            }
        }
    }
#pragma unroll
    for (int piece = 0; piece < Tile<M>::COUNT; ++piece) {
#pragma unroll
        for (int i = 0; i < 4; ++i) product.values[piece][i] += rest[piece][i];
    }
}

}  // namespace farspan
