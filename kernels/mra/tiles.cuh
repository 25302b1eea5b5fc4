// What a warp does with tiles: products on tensor cores, and copies of blocks of 32 positions to shared memory.
//
// A product's unit is A [16, 16] times B [16, 16].  Of 16-bit numbers it is two mma_16x8x16; of float32 each number is
// a sum of two of TF32 (21 bits, of which the product of the two low parts is left out), three mma_16x8x8_tf32 for each
// of 2 × 2 parts.  Where both sides of a float32 product are summed over, the order of what is summed is free: columns
// 2t and 2t + 1 take the places of t and t + 4, so that sums can be the next product's A without moving.
#pragma once

#include "../native/mma.h"

namespace farspan {
namespace mra {

constexpr int BLOCK = 32;  // positions of a block, as selection.py
constexpr int CHUNK = 64;  // columns of a result that a warp has
constexpr float EPSILON = 1e-6f;

FARSPAN_DEVICE float minus_infinity() { return __uint_as_float(0xff800000u); }

// exp(x), x ≤ 0: as precise as what is made of it.
template <class T>
FARSPAN_DEVICE float exponential(float x) {
    return __expf(x);
}
template <>
FARSPAN_DEVICE float exponential<float>(float x) {
    return expf(x);
}

// ---- operands in registers ------------------------------------------------------------------------------------------

template <class T>
struct Left {  // A [16, 16]
    uint32_t a[4];
};
template <>
struct Left<float> {
    float a[2][4];  // columns 0 to 7, 8 to 15
};
template <class T>
struct Right {  // B [16, 16]
    uint32_t b[2][2];  // columns 0 to 7, 8 to 15
};
template <>
struct Right<float> {
    float b[2][2][2];  // the same, then rows 0 to 7, 8 to 15
};

// A = tile[0:16][0:16].
template <class T>
FARSPAN_DEVICE Left<T> left_of_rows(const T* tile, int stride) {
    Left<T> x;
    load_matrices(x.a, tile + (lane_index() % 16) * stride + lane_index() / 16 * 8);
    return x;
}
template <>
FARSPAN_DEVICE Left<float> left_of_rows(const float* tile, int stride) {
    const int g = lane_index() / 4, t = lane_index() % 4;
    Left<float> x;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const Vector<float, 2> pair = load<float, 2>(tile + (g + 8 * half) * stride + 8 * part + 2 * t);
            x.a[part][half] = pair[0];
            x.a[part][2 + half] = pair[1];
        }
    }
    return x;
}

// B[k][n] = tile[n][k].
template <class T>
FARSPAN_DEVICE Right<T> right_of_rows(const T* tile, int stride) {
    const int lane = lane_index();
    uint32_t r[4];
    load_matrices(r, tile + (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8);
    return Right<T>{{{r[0], r[1]}, {r[2], r[3]}}};
}
template <>
FARSPAN_DEVICE Right<float> right_of_rows(const float* tile, int stride) {
    const int g = lane_index() / 4, t = lane_index() % 4;
    Right<float> x;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            const Vector<float, 2> pair = load<float, 2>(tile + (8 * j + g) * stride + 8 * part + 2 * t);
            x.b[j][part][0] = pair[0];
            x.b[j][part][1] = pair[1];
        }
    }
    return x;
}

// B[k][n] = tile[k][n].
template <class T>
FARSPAN_DEVICE Right<T> right_of_columns(const T* tile, int stride) {
    uint32_t r[4];
    load_matrices_transposed(r, tile + (lane_index() % 16) * stride + lane_index() / 16 * 8);
    return Right<T>{{{r[0], r[1]}, {r[2], r[3]}}};
}
template <>
FARSPAN_DEVICE Right<float> right_of_columns(const float* tile, int stride) {
    const int g = lane_index() / 4, t = lane_index() % 4;
    Right<float> x;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int part = 0; part < 2; ++part) {
#pragma unroll
            for (int i = 0; i < 2; ++i) x.b[j][part][i] = tile[(8 * part + 2 * t + i) * stride + 8 * j + g];
        }
    }
    return x;
}

// A of two neighbouring 16 × 8 sums.
template <class T>
FARSPAN_DEVICE Left<T> left_of_sums(const float (&x)[4], const float (&y)[4]) {
    return Left<T>{{pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(y[0], y[1]), pack<T>(y[2], y[3])}};
}
template <>
FARSPAN_DEVICE Left<float> left_of_sums(const float (&x)[4], const float (&y)[4]) {
    return Left<float>{{{x[0], x[2], x[1], x[3]}, {y[0], y[2], y[1], y[3]}}};
}

// Two neighbouring 16 × 8 sums x, y += A B.
template <class T>
FARSPAN_DEVICE void multiply(float (&x)[4], float (&y)[4], const Left<T>& left, const Right<T>& right) {
    mma_16x8x16<T>(x, left.a, right.b[0]);
    mma_16x8x16<T>(y, left.a, right.b[1]);
}
template <>
FARSPAN_DEVICE void multiply(float (&x)[4], float (&y)[4], const Left<float>& left, const Right<float>& right) {
#pragma unroll
    for (int part = 0; part < 2; ++part) {
        uint32_t a[2][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            a[0][i] = to_tf32(left.a[part][i]);
            a[1][i] = to_tf32(left.a[part][i] - __uint_as_float(a[0][i]));
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            uint32_t b[2][2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                b[0][i] = to_tf32(right.b[j][part][i]);
                b[1][i] = to_tf32(right.b[j][part][i] - __uint_as_float(b[0][i]));
            }
            mma_16x8x8_tf32(j ? y : x, a[1], b[0]);
            mma_16x8x8_tf32(j ? y : x, a[0], b[1]);
            mma_16x8x8_tf32(j ? y : x, a[0], b[0]);
        }
    }
}

// ---- a warp's products ----------------------------------------------------------------------------------------------

// Rows of a tile that a warp multiplies again and again; KEPT of their columns stay in registers: as many as leave room
// for the rest.
template <class T, int KEPT>
struct Own {
    const T* rows;
    int stride;
    Left<T> kept[KEPT ? KEPT / 16 : 1];

    FARSPAN_DEVICE void keep() {
#pragma unroll
        for (int k = 0; k < KEPT / 16; ++k) kept[k] = left_of_rows(rows + 16 * k, stride);
    }
    FARSPAN_DEVICE Left<T> at(int k) const {
        return k < KEPT / 16 ? kept[k] : left_of_rows(rows + 16 * k, stride);
    }
};

// sums [16, 32] = own [16, width] · tile [32, width]ᵀ.
template <class T, int D, int KEPT>
FARSPAN_DEVICE void products_of_rows(
    float (&sums)[4][4], const Own<T, KEPT>& own, const T* tile, int stride, int width
) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[j][i] = 0.0f;
    }
    auto add = [&](int k) {
        const Left<T> left = own.at(k);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            multiply(sums[2 * j], sums[2 * j + 1], left, right_of_rows(tile + 16 * j * stride + 16 * k, stride));
        }
    };
    if constexpr (D != 0) {
#pragma unroll
        for (int k = 0; k < D / 16; ++k) add(k);
    } else {
        for (int k = 0; k < width / 16; ++k) add(k);
    }
}

// sums [16, CHUNK] += weights [16, 32] · tile [32, columns from 0 on], of which `width` exist.
template <class T, int D>
FARSPAN_DEVICE void add_products(
    float (&sums)[CHUNK / 8][4], const float (&weights)[4][4], const T* tile, int stride, int width
) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
        const Left<T> left = left_of_sums<T>(weights[2 * k], weights[2 * k + 1]);
#pragma unroll
        for (int j = 0; j < CHUNK / 16; ++j) {
            if (D == 0 && 16 * j >= width) break;
            multiply(sums[2 * j], sums[2 * j + 1], left, right_of_columns(tile + 16 * k * stride + 16 * j, stride));
        }
    }
}

FARSPAN_DEVICE void clear(float (&sums)[CHUNK / 8][4]) {
#pragma unroll
    for (int j = 0; j < CHUNK / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[j][i] = 0.0f;
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

// ---- where things lie -----------------------------------------------------------------------------------------------

struct Strides {  // in numbers
    int64_t batch, head, token;
};

// A tensor [n, h, l, d] whose last dimension is dense, every row from a multiple of 16 bytes.
template <class T>
struct Rows {
    T* data;
    Strides strides;
    FARSPAN_HOST_DEVICE T* at(int64_t batch, int64_t head, int64_t token) const {
        return data + batch * strides.batch + head * strides.head + token * strides.token;
    }
};

// Numbers between the rows of a tile: 16-byte pieces of 8 rows below one another are in different banks.
template <class T>
FARSPAN_HOST_DEVICE int tile_stride(int width) {
    return width + 16 / static_cast<int>(sizeof(T));
}
template <class T>
FARSPAN_HOST_DEVICE int tile_bytes(int width) {
    return BLOCK * tile_stride<T>(width) * static_cast<int>(sizeof(T));
}

// Begins to copy 32 rows of d numbers, as many as `width` with zeros; zeros in rows that are not in `real`.
template <class T>
FARSPAN_DEVICE void copy_tile(
    T* tile, const T* from, int64_t token_stride, uint32_t real, int d, int width, int thread, int threads
) {
    constexpr int EACH = 16 / sizeof(T);
    const int pieces = width / EACH;
    int row = thread / pieces, column = thread % pieces;
    const int rows = threads / pieces, columns = threads % pieces;
#pragma unroll 1  // addresses ahead would cost more registers than they save time
    while (row < BLOCK) {
        const bool valid = column * EACH < d && (real >> row & 1u);
        const T* at = from + row * token_stride + column * EACH;
        copy_16(tile + row * tile_stride<T>(width) + column * EACH, valid ? at : from, valid);
        row += rows;
        column += columns;
        if (columns != 0 && column >= pieces) {
            column -= pieces;
            ++row;
        }
    }
}

}  // namespace mra
}  // namespace farspan
