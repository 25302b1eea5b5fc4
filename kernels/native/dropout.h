// The masks of counter-based dropout, as kernels/dropout/reference.py defines them.  Included after device.h or cpu.h.
#pragma once

#include <cstdint>

namespace farspan {

constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15u;

FARSPAN_HOST_DEVICE uint64_t dropout_mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

// The key of a row, from what a use of dropout has in common.
FARSPAN_HOST_DEVICE uint64_t dropout_key(uint64_t base, uint64_t sample, uint64_t position) {
    return dropout_mix(dropout_mix(sample * GOLDEN + base) + position * GOLDEN);
}

// How samples and positions of up to three dimensions lie, 0 the stride of what is repeated.
struct KeyLayout {
    int64_t sizes[3], of_samples[3], of_positions[3];

    FARSPAN_HOST_DEVICE uint64_t key(uint64_t base, const int64_t* samples, const int64_t* positions, int64_t i) const {
        const int64_t c = i % sizes[2], b = i / sizes[2] % sizes[1], a = i / sizes[2] / sizes[1];
        return dropout_key(base, static_cast<uint64_t>(samples[a * of_samples[0] + b * of_samples[1] + c * of_samples[2]]),
                           static_cast<uint64_t>(positions[a * of_positions[0] + b * of_positions[1] + c * of_positions[2]]));
    }
};

// 32 bits for features 2 · pair (the low half) and 2 · pair + 1 (the high half) of the row with this key.  Word: uint32_t
// or a vector of them.
template <class Word>
FARSPAN_HOST_DEVICE Word dropout_pair(uint64_t key, Word pair) {
    Word h = pair * 0x9E3779B9u + static_cast<uint32_t>(key);
    h ^= h >> 16;
    h *= 0x7FEB352Du;
    h ^= static_cast<uint32_t>(key >> 32);
    h ^= h >> 15;
    h *= 0x846CA68Bu;
    return h ^ (h >> 16);
}

// The 16 bits of feature `first + i`, of `pairs` that begin with the even feature `first`: dropped below the threshold.
template <int N>
FARSPAN_HOST_DEVICE uint32_t dropout_number(const uint32_t (&pairs)[N], int i) {
    return i % 2 ? pairs[i / 2] >> 16 : pairs[i / 2] & 0xffffu;
}

// What kept values are multiplied by.
FARSPAN_HOST_DEVICE float dropout_scale(int threshold) {
    return static_cast<float>(65536.0 / (65536 - threshold));
}

}  // namespace farspan
