// The masks of counter-based dropout, as kernels/dropout/reference.py defines them.  Included after device.h or cpu.h.
#pragma once

#include <cstdint>

namespace farspan {

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
