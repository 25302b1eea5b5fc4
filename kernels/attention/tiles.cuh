// What a block and a warp of attention work on: a document's tiles in shared memory, and products of them.
//
// Places.  A document's tokens are at the places begin, begin + 1, ... where begin is 1 if the index of its first token
// is odd, else 0.  So the pairs of keys that dropout draws bits for are places 2n and 2n + 1, and tiles begin with one.
//
// Tiles have rows of D numbers, D at least d (zeros beyond), and 16 bytes between them: eight rows below one another,
// as load_matrices reads them, are in different banks.  This does what a swizzle would, and offsets within a tile stay
// constants.
#pragma once

#include "../native/mma.h"
#include "../native/dropout.h"

namespace farspan {
namespace attention {

constexpr int TILE = 128;      // queries of an entry of the list of tiles, as fused.py
constexpr int HALF_TILE = 64;  // rows of a block of the backward kernels
constexpr int COLUMNS = 32;    // scores of a row at a time

template <int D>
FARSPAN_HOST_DEVICE constexpr int stride_of() {
    return D + 8;
}
// Rows that are copied at a time, while those before are worked on.
template <int D>
FARSPAN_HOST_DEVICE constexpr int met_rows() {
    return D <= 64 ? 64 : 32;
}

struct Sizes {
    int positions, rows, heads, d, causal;
};

// Of a tensor [positions, rows, heads, d] whose last dimension is dense, every token from a multiple of 16 bytes.
struct Strides {  // in pieces of 8 numbers
    int position, row, head;
};

// What a block has: `own` is the place of its first row.
struct Part {
    int row, head, start, begin, end, own;  // start: position of place 0, perhaps -1
    uint32_t pair;                          // of features, at places 0 and 1

    // Entries of the list: row, position and index of a document's first token, its length, the number of the tile.
    // Blocks are ordered by tile, then by part of it, then by head, whose tokens are neighbours in memory.
    FARSPAN_DEVICE static Part of(const int* tiles, const Sizes& sizes, int parts) {
        const int index = static_cast<int>(blockIdx.x) / sizes.heads;
        const int* entry = tiles + static_cast<int64_t>(index / parts) * 5;
        Part p;
        p.head = static_cast<int>(blockIdx.x) % sizes.heads;
        p.row = entry[0];
        p.begin = entry[2] & 1;
        p.start = entry[1] - p.begin;
        p.end = p.begin + entry[3];
        p.own = TILE * entry[4] + index % parts * (TILE / parts);
        p.pair = static_cast<uint32_t>(entry[2] >> 1);
        return p;
    }
    FARSPAN_DEVICE bool has(int place) const { return place >= begin && place < end; }
    // Of a token in a tensor [heads, rows, positions].
    FARSPAN_DEVICE int64_t number(const Sizes& sizes, int place) const {
        return (static_cast<int64_t>(head) * sizes.rows + row) * sizes.positions + start + place;
    }
    // In pieces.
    FARSPAN_DEVICE int offset(const Strides& strides, int place) const {
        return row * strides.row + head * strides.head + (start + place) * strides.position;
    }
};

// Where a row of 16 lies in a tile.  PAIRED: rows 2n and 2n + 1 are 8 apart, so that a thread's sums, which are of rows
// 8 apart, are of a pair.
template <bool PAIRED>
FARSPAN_DEVICE int place_in_tile(int row) {
    return PAIRED ? (row & ~15) | (row & 1) << 3 | (row & 15) >> 1 : row;
}

// Begins to copy ROWS tokens from place `first` on, of N tensors to N tiles; zeros for those that the document does not
// have.  base: Part::offset of place 0.
template <class T, int D, int ROWS, int THREADS, bool PAIRED = false, int N>
FARSPAN_DEVICE void copy_rows(
    T* tile, const T* const (&from)[N], const Strides& strides, const Part& part, int base, int first, int d
) {
    constexpr int PIECES = D / 8;
    static_assert(THREADS % PIECES == 0 && ROWS * PIECES % THREADS == 0, "threads share the pieces evenly");
    const int column = static_cast<int>(threadIdx.x) % PIECES * 8;
#pragma unroll
    for (int i = 0; i < ROWS * PIECES / THREADS; ++i) {
        const int row = static_cast<int>(threadIdx.x) / PIECES + i * (THREADS / PIECES);
        const bool valid = column < d && part.has(first + row);
        const int piece = valid ? base + (first + row) * strides.position + column / 8 : 0;
        T* to = tile + place_in_tile<PAIRED>(row) * stride_of<D>() + column;
#pragma unroll
        for (int n = 0; n < N; ++n) {
            copy_16(to + n * ROWS * stride_of<D>(), from[n] + static_cast<int64_t>(piece) * 8, valid);
        }
    }
}

// ---- a warp's products ----------------------------------------------------------------------------------------------

// 16 · M rows of a tile that a warp multiplies again and again: the first 16 · KEPT columns in registers, as there is
// room.
template <class T, int D, int M, int KEPT>
struct Own {
    const T* rows;
    uint32_t kept[M][KEPT ? KEPT : 1][4];

    FARSPAN_DEVICE void read(uint32_t (&a)[4], int m, int k) const {
        load_matrices(a, rows + (16 * m + lane_index() % 16) * stride_of<D>() + 16 * k + lane_index() / 16 * 8);
    }
    FARSPAN_DEVICE void keep(const T* from) {
        rows = from;
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int k = 0; k < KEPT; ++k) read(kept[m][k], m, k);
        }
    }
    FARSPAN_DEVICE void at(uint32_t (&a)[4], int m, int k) const {
        if (k >= KEPT) return read(a, m, k);
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = kept[m][KEPT ? k : 0][i];
    }
};

// Sums of a warp: M · 16 rows, 8 · N columns.
template <int M, int N>
using Sums = float[M][N][4];

template <int M, int N>
FARSPAN_DEVICE void clear(Sums<M, N>& sums) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int j = 0; j < N; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[m][j][i] = 0.0f;
        }
    }
}

// scores = own [16 M, D] · tile [COLUMNS, D]ᵀ.
template <class T, int D, int M, int KEPT>
FARSPAN_DEVICE void products_of_rows(Sums<M, COLUMNS / 8>& scores, const Own<T, D, M, KEPT>& own, const T* tile) {
    const int lane = lane_index();
    const T* from = tile + (lane / 16 * 8 + lane % 8) * stride_of<D>() + lane / 8 % 2 * 8;
    clear<M, COLUMNS / 8>(scores);
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
        uint32_t a[M][4];
#pragma unroll
        for (int m = 0; m < M; ++m) own.at(a[m], m, k);
#pragma unroll
        for (int j = 0; j < COLUMNS / 16; ++j) {
            uint32_t r[4];
            load_matrices(r, from + 16 * j * stride_of<D>() + 16 * k);
            const uint32_t left[2] = {r[0], r[1]}, right[2] = {r[2], r[3]};
#pragma unroll
            for (int m = 0; m < M; ++m) {
                mma_16x8x16<T>(scores[m][2 * j], a[m], left);
                mma_16x8x16<T>(scores[m][2 * j + 1], a[m], right);
            }
        }
    }
}

// sums [16 M, D] += weights [16 M, COLUMNS] · tile [COLUMNS, D].
template <class T, int D, int M>
FARSPAN_DEVICE void add_products(Sums<M, D / 8>& sums, const Sums<M, COLUMNS / 8>& weights, const T* tile) {
    const T* from = tile + lane_index() % 16 * stride_of<D>() + lane_index() / 16 * 8;
#pragma unroll
    for (int k = 0; k < COLUMNS / 16; ++k) {
        uint32_t a[M][4];
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float(&x)[4] = weights[m][2 * k + i / 2];
                a[m][i] = pack<T>(x[i % 2 * 2], x[i % 2 * 2 + 1]);
            }
        }
#pragma unroll
        for (int j = 0; j < D / 16; ++j) {
            uint32_t r[4];
            load_matrices_transposed(r, from + 16 * k * stride_of<D>() + 16 * j);
            const uint32_t left[2] = {r[0], r[1]}, right[2] = {r[2], r[3]};
#pragma unroll
            for (int m = 0; m < M; ++m) {
                mma_16x8x16<T>(sums[m][2 * j], a[m], left);
                mma_16x8x16<T>(sums[m][2 * j + 1], a[m], right);
            }
        }
    }
}

// Of the four lanes that have the columns of a row of sums.
FARSPAN_DEVICE float sum_of_row(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}
FARSPAN_DEVICE float maximum_of_row(float x) {
    x = fmaxf(x, shuffle_xor(x, 1));
    return fmaxf(x, shuffle_xor(x, 2));
}

// Writes 16 rows of sums, times a factor for the upper and the lower 8, from place `first` on, by way of 16 rows of
// shared memory that are the warp's own: 16 bytes at a time.
template <class T, int D, bool PAIRED = false>
FARSPAN_DEVICE void write_rows(
    T* to, const Strides& strides, const Part& part, int first, int d, T* tile, const float (&sums)[D / 8][4],
    float upper, float lower
) {
    const int lane = lane_index();
    T* at = tile + lane / 4 * stride_of<D>() + lane % 4 * 2;
    sync_warp();
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float factor = half ? lower : upper;
            const uint32_t bits = pack<T>(sums[j][2 * half] * factor, sums[j][2 * half + 1] * factor);
            Vector<T, 2> pair;
            memcpy(&pair, &bits, 4);
            store<T, 2>(at + 8 * half * stride_of<D>() + 8 * j, pair);
        }
    }
    sync_warp();
#pragma unroll
    for (int i = lane; i < 16 * (D / 8); i += WARP) {
        const int row = i / (D / 8), column = i % (D / 8) * 8;
        if (column >= d || !part.has(first + row)) continue;
        const T* from = tile + place_in_tile<PAIRED>(row) * stride_of<D>() + column;
        const int64_t piece = part.offset(strides, first + row) + column / 8;
        store<T, 8>(to + piece * 8, load<T, 8>(from));
    }
}

// ---- dropout --------------------------------------------------------------------------------------------------------

// What the bits of a query's weights come from: dropout_pair (native/dropout.h), of which the parts that do not depend
// on the pair are done once.  A pair then takes an addition, two multiplications and six shifts and logical operations,
// two comparisons and two selections: five a weight on the pipe that also has the maxima and conversions, as much time
// as a weight's products of d = 64 take on the tensor cores.
struct Draw {
    uint32_t low, mixed;

    FARSPAN_HOST_DEVICE static Draw of(uint64_t key) {
        const uint32_t high = static_cast<uint32_t>(key >> 32);
        return {static_cast<uint32_t>(key), high ^ high >> 15};
    }
};
constexpr uint32_t PAIR = 0x9E3779B9u;  // what a pair's number is multiplied by

// Whether the weights of an even and an odd feature are dropped; summand: PAIR · pair, limit: the threshold · 2^16.
FARSPAN_DEVICE void draw(bool (&dropped)[2], const Draw& of, uint32_t summand, uint32_t limit) {
    uint32_t h = of.low + summand;
    h ^= h >> 16;
    h *= 0x7FEB352Du;
    h ^= h >> 15 ^ of.mixed;
    h *= 0x846CA68Bu;
    // h ^ h >> 16 is what dropout_pair returns; its halves are compared in the upper 16 bits.
    dropped[0] = (h ^ h << 16) < limit;
    dropped[1] = h < limit;
}

}  // namespace attention
}  // namespace farspan
