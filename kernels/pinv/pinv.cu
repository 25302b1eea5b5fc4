// The iteration Z ← ¼ Z (13I − AZ (15I − AZ (7I − AZ))) from Z = Aᵀ / start, and its adjoint: a block a matrix of up to
// 64 rows, all iterations in one launch.
//
// Bounded by products: 24 of 64³, each three on tensor cores (split.h), are 19 million multiply-adds a matrix, 8 µs on
// an H200's multiprocessor by mma.sync; loads of operands from shared memory, 16 KiB a warp's product, take about as
// long beside them.  96 matrices are one wave of 132.  The bytes, A in and Z out, are 3 MB: 1 µs.
//
// Scales.  With the power of two u² ≤ 1 / start, the block computes with A' = u A and Z' = Z / u.  The iteration takes an
// eigenvalue x of AZ to x (13 − x (15 − x (7 − x))) / 4, which from 0 to 4.13 stays below 3.2, and does not come back
// from beyond.  So where it converges, |A'| < 4.1, |AZ| and the two polynomials of it that are products' operands are
// below 13, and |Z'| below max(4, (13/4)^(iterations/2)): scales of operands follow, fixed.  Where it does not (start
// far below ‖A‖²), the result is not finite.  Of gradients nothing is known: their scales are taken from their maxima.
#include "split.h"

namespace farspan {

constexpr float SCALE_OF_A = 4096, SCALE_OF_POLYNOMIALS = 2048;

// The two factors of a matrix: A' = u A, Z' = Z / u.
struct Unit {
    float start, of_a, of_z;

    FARSPAN_DEVICE explicit Unit(float given) : start(given == 0 ? 1 : given) {
        const int half = exponent_of(start) >> 1;
        of_a = power_of_two(-half);
        of_z = power_of_two(half);
    }
};

template <int M>
constexpr int THREADS = M * 4;

// A' into shared memory, with zeros around it.
template <int M>
FARSPAN_DEVICE void read_matrix(Split<M> to, const float* a, int m, const Unit& unit) {
#pragma unroll
    for (int first = 0; first < M * M; first += THREADS<M> * 2) {
        const int index = first + static_cast<int>(threadIdx.x) * 2, row = index / M, column = index % M;
        float values[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) values[i] = row < m && column + i < m ? a[row * m + column + i] : 0;
        const float scale = unit.of_a;
        Vector<uint32_t, 1> high, low;
        split(values[0] * scale * SCALE_OF_A, values[1] * scale * SCALE_OF_A, high[0], low[0]);
        store(reinterpret_cast<uint32_t*>(to.high + row * Split<M>::PITCH + column), high);
        store(reinterpret_cast<uint32_t*>(to.low() + row * Split<M>::PITCH + column), low);
    }
}

// The first Z' = Aᵀ / start / u.
template <int M>
FARSPAN_DEVICE void first_iterate(Tile<M>& z, const float* a, int m, const Unit& unit) {
    z.each([&](float& value, int row, int column) {
        value = row < m && column < m ? a[column * m + row] / unit.start * unit.of_z : 0;
    });
}

// AZ, AZ (7I − AZ) and AZ (15I − AZ (7I − AZ)) into shared memory, the first as `products` too.  Z is there; the caller's
// next barrier ends the writing of the last.
template <int M, class Left>
FARSPAN_DEVICE void polynomials(const Left& of_a, Split<M> z, Split<M> az, Split<M> inner, Split<M> outer, float z_scale) {
    constexpr float SQUARE = 1 / (SCALE_OF_POLYNOMIALS * SCALE_OF_POLYNOMIALS);
    const float unscale = 1 / (SCALE_OF_A * z_scale);
    Tile<M> x, product;
    multiply<false>(x, of_a, z);
    x.from(x, [&](float own, float) { return own * unscale; });
    write(x, az, SCALE_OF_POLYNOMIALS);
    sync_block();

    HeldRows<M> left;
    left.read(az);
    multiply<false>(product, left, az);
    product.from(x, [](float own, float of_x) { return 7 * of_x - SQUARE * own; });
    write(product, inner, SCALE_OF_POLYNOMIALS);
    sync_block();

    multiply<false>(product, left, inner);
    product.from(x, [](float own, float of_x) { return 15 * of_x - SQUARE * own; });
    write(product, outer, SCALE_OF_POLYNOMIALS);
}

// Z' ← 13/4 Z' − 1/4 Z' outer, its left operand read before the barrier at which `outer` and the last use of Z' end.
template <int M>
FARSPAN_DEVICE void next_iterate(Tile<M>& z, const HeldRows<M>& left, Split<M> outer, float z_scale) {
    const float unscale = 0.25f / (z_scale * SCALE_OF_POLYNOMIALS);
    Tile<M> product;
    multiply<false>(product, left, outer);
    z.from(product, [&](float own, float of_product) { return 3.25f * own - unscale * of_product; });
}

template <int M>
__global__ void __launch_bounds__(M * 4, 1) pinv_forward_kernel(
    const float* __restrict__ a, const float* __restrict__ start, float* __restrict__ result, int m, int iterations,
    float z_scale
) {
    const int64_t offset = static_cast<int64_t>(blockIdx.x) * m * m;
    const Unit unit(start[blockIdx.x]);
    const Split<M> of_a = Split<M>::at(0), of_z = Split<M>::at(1), az = Split<M>::at(2), inner = Split<M>::at(3),
                   outer = Split<M>::at(4);
    Tile<M> z;
    HeldRows<M> rows, rows_z;
    first_iterate(z, a + offset, m, unit);
    read_matrix(of_a, a + offset, m, unit);
    write(z, of_z, z_scale);
    sync_block();
    rows.read(of_a);
    for (int i = 0; i < iterations; ++i) {
        polynomials(rows, of_z, az, inner, outer, z_scale);
        rows_z.read(of_z);
        sync_block();
        next_iterate(z, rows_z, outer, z_scale);
        if (i + 1 < iterations) {
            write(z, of_z, z_scale);
            sync_block();
        }
    }
    z.each([&](float value, int row, int column) {
        if (row < m && column < m) result[offset + row * m + column] = value * unit.of_a;
    });
}

// ---- the adjoint ---------------------------------------------------------------------------------------------------

constexpr size_t MAXIMA = 64;  // bytes

// A matrix of gradients into shared memory, scaled by its own maximum; returns what undoes that.  The barriers within
// come after all reading of what was there, and after the writing.
template <int M>
FARSPAN_DEVICE float publish(const Tile<M>& tile, Split<M> to, float* maxima) {
    constexpr int WARPS = THREADS<M> / WARP;
    const float own = tile.largest();
    if (lane_index() == 0) maxima[warp_index()] = own;
    sync_block();
    float largest = 0;
#pragma unroll
    for (int i = 0; i < WARPS; ++i) largest = fmaxf(largest, maxima[i]);
    const int exponent = min(max(HIGHEST - exponent_of(largest), -126), 126);
    write(tile, to, power_of_two(exponent));
    sync_block();
    return power_of_two(-exponent);
}

// A split matrix to global memory and back, without the gaps between rows; every thread reads what it wrote.
template <int M, class F>
FARSPAN_DEVICE void each_piece(Split<M> matrix, uint16_t* scratch, F f) {
#pragma unroll
    for (int piece = static_cast<int>(threadIdx.x); piece < 2 * M * M / 8; piece += THREADS<M>) {
        const int row = piece / (M / 8), column = piece % (M / 8) * 8;  // rows of `low` follow those of `high`
        f(matrix.high + row * Split<M>::PITCH + column, scratch + piece * 8);
    }
}

// Of a step with the gradient G of its result:
//     of outer = −¼ Zᵀ G,    of inner = −(AZ)ᵀ of outer,
//     of AZ = 15 of outer − of outer innerᵀ + 7 of inner − of inner (AZ)ᵀ − (AZ)ᵀ of inner,
//     of A += of AZ Zᵀ,    G ← 13/4 G − ¼ G outerᵀ + Aᵀ of AZ.
// The iterates are computed again and kept in `scratch`, [matrices, iterations − 1, 2, M, M] of float16; the rest of a
// step is computed again within it: 14 products an iteration in all, 86 with six.
template <int M>
__global__ void __launch_bounds__(M * 4, 1) pinv_backward_kernel(
    const float* __restrict__ gradient, const float* __restrict__ a, const float* __restrict__ start,
    float* __restrict__ a_gradient, float* __restrict__ start_gradient, uint16_t* scratch, int m,
    int iterations, float z_scale
) {
    const int64_t offset = static_cast<int64_t>(blockIdx.x) * m * m;
    scratch += static_cast<int64_t>(blockIdx.x) * max(iterations - 1, 0) * 2 * M * M;
    const float given = start[blockIdx.x];
    const Unit unit(given);
    const Split<M> matrix = Split<M>::at(0), az = Split<M>::at(1), inner = Split<M>::at(2), outer = Split<M>::at(3),
                   of_outer = Split<M>::at(4), of_inner = Split<M>::at(5), of_az = of_inner,
                   of_next = Split<M>::at(6);
    float* maxima = reinterpret_cast<float*>(shared_memory() + 9 * Split<M>::BYTES);
    const float z_unscale = 1 / z_scale;
    Split<M> before = Split<M>::at(8), z = Split<M>::at(7);
    Tile<M> of_z, of_a = {};

    {
        Tile<M> iterate;
        HeldRows<M> rows;
        first_iterate(iterate, a + offset, m, unit);
        read_matrix(matrix, a + offset, m, unit);
        write(iterate, z, z_scale);
        sync_block();
        for (int i = 0; i < iterations; ++i) {
            polynomials(Rows<false, M>(matrix), z, az, inner, outer, z_scale);
            if (i + 1 == iterations) break;
            each_piece(z, scratch + i * 2 * M * M, [](const uint16_t* shared, uint16_t* global) {
                store(global, load<uint16_t, 8>(shared));
            });
            rows.read(z);
            sync_block();
            next_iterate(iterate, rows, outer, z_scale);
            write(iterate, z, z_scale);
            sync_block();
        }
    }

    of_z.each([&](float& value, int row, int column) {
        value = row < m && column < m ? gradient[offset + row * m + column] * unit.of_a : 0;
    });
    float next_unscale = publish(of_z, of_next, maxima);
    for (int i = iterations - 1; i >= 0; --i) {
        if (i > 0) {
            each_piece(before, scratch + (i - 1) * 2 * M * M, [](uint16_t* shared, const uint16_t* global) {
                copy_16(shared, global);
            });
        }
        copies_commit();
        if (i + 1 < iterations) {
            polynomials(Rows<false, M>(matrix), z, az, inner, outer, z_scale);  // published below is `of_outer`: with barriers
        }

        Tile<M> at_outer, at_inner, sum, product;
        multiply<false>(at_outer, Rows<true, M>(z), of_next);
        float factor = -0.25f * z_unscale * next_unscale;
        at_outer.from(at_outer, [&](float own, float) { return own * factor; });
        const float outer_unscale = publish(at_outer, of_outer, maxima);

        multiply<false>(at_inner, Rows<true, M>(az), of_outer);
        factor = -outer_unscale / SCALE_OF_POLYNOMIALS;
        at_inner.from(at_inner, [&](float own, float) { return own * factor; });
        const float inner_unscale = publish(at_inner, of_inner, maxima);

        multiply<false>(sum, Rows<true, M>(az), of_inner);
        const float of_outers = -outer_unscale / SCALE_OF_POLYNOMIALS, of_inners = -inner_unscale / SCALE_OF_POLYNOMIALS;
        sum.from(at_outer, at_inner, [&](float own, float outers, float inners) {
            return 15 * outers + 7 * inners + of_inners * own;
        });
        multiply<true>(product, Rows<false, M>(of_inner), az);
        sum.from(product, [&](float own, float other) { return own + of_inners * other; });
        multiply<true>(product, Rows<false, M>(of_outer), inner);
        sum.from(product, [&](float own, float other) { return own + of_outers * other; });
        const float az_unscale = publish(sum, of_az, maxima);

        multiply<true>(product, Rows<false, M>(of_az), z);
        factor = az_unscale * z_unscale;
        of_a.from(product, [&](float own, float other) { return own + factor * other; });

        multiply<true>(product, Rows<false, M>(of_next), outer);
        factor = -0.25f * next_unscale / SCALE_OF_POLYNOMIALS;
        of_z.from(product, [&](float own, float other) { return 3.25f * own + factor * other; });
        multiply<false>(product, Rows<true, M>(matrix), of_az);
        factor = az_unscale / SCALE_OF_A;
        of_z.from(product, [&](float own, float other) { return own + factor * other; });
        copies_wait<0>();
        next_unscale = publish(of_z, of_next, maxima);

        const Split<M> used = z;
        z = before;
        before = used;
    }

    // Through Z = Aᵀ / start: the gradient's transpose joins A's, and start gets −Σ gradient ∘ Z / start.
    constexpr int PITCH = M + 4;
    float* turned = reinterpret_cast<float*>(of_outer.high);  // [M, M + 4] fit into a split matrix
    float sum = 0;
    of_z.each([&](float value, int row, int column) {
        const float of_quotient = value * unit.of_z;
        turned[column * PITCH + row] = of_quotient / unit.start;
        if (row < m && column < m) sum += of_quotient * (a[offset + column * m + row] / unit.start);
    });
    sum = warp_sum(sum);
    if (lane_index() == 0) maxima[warp_index()] = sum;
    sync_block();
    of_a.each([&](float value, int row, int column) {
        if (row < m && column < m) {
            a_gradient[offset + row * m + column] = value * unit.of_a + turned[row * PITCH + column];
        }
    });
    if (threadIdx.x == 0) {
        sum = 0;
        for (int i = 0; i < THREADS<M> / WARP; ++i) sum += maxima[i];
        start_gradient[blockIdx.x] = given == 0 ? 0 : -sum / unit.start;
    }
}

// Of Z': see above.
inline float scale_of_z(int iterations) {
    float bound = 4, power = 1;
    for (int i = 0; i < iterations; ++i) power *= 1.8028f;  // (13/4)^½
    bound = power > bound ? power : bound;
    float scale = 2 << HIGHEST;
    while (bound > 1) {
        bound /= 2;
        scale /= 2;
    }
    return scale;
}

// Calls `function` with the size that m rows are padded to, as a type; 1 (CUDA's "invalid value") for too many.
template <int M>
struct Size {
    static constexpr int value = M;
};
template <class F>
int with_size(int m, F function) {
    if (m <= 32) return function(Size<32>{});
    if (m <= 64) return function(Size<64>{});
    return 1;
}

}  // namespace farspan

using namespace farspan;

// a, z: [matrices, m, m]; start: [matrices], 0 counts as 1.
FARSPAN_EXPORT int pinv_forward(const void* a, const void* start, void* z, int64_t matrices, int m, int iterations, void* stream) {
    return with_size(m, [&](auto size) {
        constexpr int M = decltype(size)::value;
        return launch(
            pinv_forward_kernel<M>, dim3(static_cast<unsigned>(matrices)), dim3(THREADS<M>), 5 * Split<M>::BYTES, stream,
            static_cast<const float*>(a), static_cast<const float*>(start), static_cast<float*>(z), m, iterations,
            scale_of_z(iterations)
        );
    });
}

// gradient: of z; scratch: [matrices, iterations − 1, 2, M, M] of 16 bits, M = 32 for up to 32 rows, else 64.
FARSPAN_EXPORT int pinv_backward(const void* gradient, const void* a, const void* start, void* a_gradient, void* start_gradient, void* scratch, int64_t matrices, int m, int iterations, void* stream) {
    return with_size(m, [&](auto size) {
        constexpr int M = decltype(size)::value;
        return launch(
            pinv_backward_kernel<M>, dim3(static_cast<unsigned>(matrices)), dim3(THREADS<M>), 9 * Split<M>::BYTES + MAXIMA,
            stream, static_cast<const float*>(gradient), static_cast<const float*>(a), static_cast<const float*>(start),
            static_cast<float*>(a_gradient), static_cast<float*>(start_gradient), static_cast<uint16_t*>(scratch), m,
            iterations, scale_of_z(iterations)
        );
    });
}
