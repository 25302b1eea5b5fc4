// Eight numbers at once for the compiled forms for a CPU, stored as they are, computed in float32.  Included after cpu.h.
//
// Vectors of the compiler's own (GCC's and Clang's vector_size), which it maps to whatever the processor has.
#pragma once

#include <cstdint>
#include <cstring>

// How vectors would be passed to other libraries, which none is.
#pragma GCC diagnostic ignored "-Wpsabi"

#include "dropout.h"

namespace farspan {

constexpr int LANES = 8;

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

// The same bits (such a cast of a vector converts nothing).
template <class To, class From>
inline To bits_as(From x) {
    static_assert(sizeof(To) == sizeof(From), "bits_as takes as many bits as it gives");
    return (To)x;
}

struct bf16 {
    uint16_t bits;
};

inline Floats load(const float* from) {
    Floats x;
    std::memcpy(&x, from, sizeof x);
    return x;
}
inline Floats load(const bf16* from) {
    Halves x;
    std::memcpy(&x, from, sizeof x);
    return bits_as<Floats>(__builtin_convertvector(x, Words) << 16);
}

// What is left of x in T.
template <class T>
inline Floats rounded(Floats x) {
    return x;
}
template <>
inline Floats rounded<bf16>(Floats x) {  // to nearest, ties to even
    const Words bits = bits_as<Words>(x), nan = bits_as<Words>(x != x);
    const Words nearest = (bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u;
    return bits_as<Floats>((nearest & ~nan) | (nan & 0x7fc00000u));
}

inline void store(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }
inline void store(bf16* to, Floats x) {
    const Halves bits = __builtin_convertvector(bits_as<Words>(rounded<bf16>(x)) >> 16, Halves);
    std::memcpy(to, &bits, sizeof bits);
}

inline float sum(Floats x) {
    float all[LANES];
    store(all, x);
    return ((all[0] + all[4]) + (all[2] + all[6])) + ((all[1] + all[5]) + (all[3] + all[7]));
}

// Eight values dropped or scaled, rounded as T is: of `first` + i, i + 1 ... of the row with this key.  Two features that
// share a hash compute it twice: so nothing is shuffled, wherever a row begins.
template <class T>
inline Floats dropped(Floats x, uint64_t key, int64_t first, int64_t i, uint32_t threshold, float scale) {
    const Words features = Words{0, 1, 2, 3, 4, 5, 6, 7} + static_cast<uint32_t>(first & 1);
    const Words pairs = (features >> 1) + static_cast<uint32_t>((first >> 1) + i / 2);
    const Words numbers = dropout_pair(key, pairs) >> ((features & 1u) << 4) & 0xffffu;
    return bits_as<Floats>(bits_as<Words>(rounded<T>(x * scale)) & bits_as<Words>(numbers >= threshold));
}

// Calls `function` with a value of the type that the code stands for.
template <class F>
inline int with_dtype(int dtype, F function) {
    if (dtype == FLOAT32) return function(float{});
    return dtype == BFLOAT16 ? function(bf16{}) : INVALID;
}

}  // namespace farspan
