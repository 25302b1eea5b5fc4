// Products of small matrices by a warp on tensor cores (sm_80): PTX ISA, "Matrix multiply-accumulate operation using
// mma instruction" and "ldmatrix".  Of lane l, with g = l / 4 and t = l % 4:
//
//   16-bit, 16×8×16:  a[0] = A[g][2t, 2t+1]   a[1] = A[g+8][2t, 2t+1]   a[2] = A[g][2t+8, +9]   a[3] = A[g+8][2t+8, +9]
//                     b[0] = B[2t, 2t+1][g]   b[1] = B[2t+8, +9][g]
//   tf32, 16×8×8:     a[0] = A[g][t]          a[1] = A[g+8][t]          a[2] = A[g][t+4]        a[3] = A[g+8][t+4]
//                     b[0] = B[t][g]          b[1] = B[t+4][g]
//   both:             d[0], d[1] = D[g][2t, 2t+1]                       d[2], d[3] = D[g+8][2t, 2t+1]
#pragma once

#include <type_traits>

#include "device.h"

namespace farspan {

// D += A B, A [16, 16] and B [16, 8] of bf16 or fp16, D [16, 8] float32.
template <class T>
FARSPAN_DEVICE void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDACC__)
    if constexpr (std::is_same<T, bf16>::value) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
#else
    struct Fragments {
        uint32_t a[4], b[2];
    } mine;
    for (int i = 0; i < 4; ++i) mine.a[i] = a[i];
    for (int i = 0; i < 2; ++i) mine.b[i] = b[i];
    const Fragments* all = emulator::gather(mine, emulator::MMA);
    auto number = [](uint32_t packed, int half) { return to_float(T{static_cast<uint16_t>(packed >> (16 * half))}); };
    const int g = lane_index() / 4, t = lane_index() % 4;
    for (int i = 0; i < 4; ++i) {
        const int row = g + (i >= 2 ? 8 : 0), column = 2 * t + i % 2;
        float sum = d[i];
        for (int k = 0; k < 16; ++k) {
            const Fragments& of_a = all[(row % 8) * 4 + (k % 8) / 2];
            const Fragments& of_b = all[column * 4 + (k % 8) / 2];
            sum += number(of_a.a[(k / 8) * 2 + row / 8], k % 2) * number(of_b.b[k / 8], k % 2);
        }
        d[i] = sum;
    }
#endif
}

// float32 to tf32, kept in a float's bits: 10 bits after the point, rounded to nearest.
FARSPAN_DEVICE uint32_t to_tf32(float x) {
#if defined(__CUDACC__)
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(x));
    return bits;
#else
    uint32_t bits = __float_as_uint(x);
    if ((bits & 0x7f800000u) == 0x7f800000u) return bits;
    return (bits + 0x1000u) & 0xffffe000u;
#endif
}

// D += A B, A [16, 8] and B [8, 8] of tf32, D [16, 8] float32.
FARSPAN_DEVICE void mma_16x8x8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDACC__)
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    struct Fragments {
        uint32_t a[4], b[2];
    } mine;
    for (int i = 0; i < 4; ++i) mine.a[i] = a[i];
    for (int i = 0; i < 2; ++i) mine.b[i] = b[i];
    const Fragments* all = emulator::gather(mine, emulator::MMA_TF32);
    auto number = [](uint32_t bits) { return __uint_as_float(bits & 0xffffe000u); };  // what the hardware reads
    const int g = lane_index() / 4, t = lane_index() % 4;
    for (int i = 0; i < 4; ++i) {
        const int row = g + (i >= 2 ? 8 : 0), column = 2 * t + i % 2;
        float sum = d[i];
        for (int k = 0; k < 8; ++k) {
            const Fragments& of_a = all[(row % 8) * 4 + k % 4];
            const Fragments& of_b = all[column * 4 + k % 4];
            sum += number(of_a.a[(k / 4) * 2 + row / 8]) * number(of_b.b[k / 4]);
        }
        d[i] = sum;
    }
#endif
}

// Four 8×8 matrices of 16-bit numbers from shared memory.  Lane l gives the address of row l % 8 of matrix l / 8 (16
// bytes, aligned).  r[j] = matrix j's [g][2t, 2t+1]; transposed: its [2t, 2t+1][g].
FARSPAN_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
#if defined(__CUDACC__)
    uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from) : "memory");
#else
    emulator::require_aligned(row, 16, "load_matrices");
    const void* const* rows = emulator::gather(row, emulator::LOAD_MATRICES);
    const int g = lane_index() / 4, t = lane_index() % 4;
    for (int j = 0; j < 4; ++j) {
        const uint16_t* of_row = static_cast<const uint16_t*>(rows[8 * j + g]);
        r[j] = static_cast<uint32_t>(of_row[2 * t]) | static_cast<uint32_t>(of_row[2 * t + 1]) << 16;
    }
#endif
}
FARSPAN_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
#if defined(__CUDACC__)
    uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from) : "memory");
#else
    emulator::require_aligned(row, 16, "load_matrices_transposed");
    const void* const* rows = emulator::gather(row, emulator::LOAD_MATRICES_TRANSPOSED);
    const int g = lane_index() / 4, t = lane_index() % 4;
    for (int j = 0; j < 4; ++j) {
        auto number = [&](int k) { return static_cast<uint32_t>(static_cast<const uint16_t*>(rows[8 * j + k])[g]); };
        r[j] = number(2 * t) | number(2 * t + 1) << 16;
    }
#endif
}

}  // namespace farspan
