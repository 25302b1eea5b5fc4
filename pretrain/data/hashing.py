"""Randomness without state: 64-bit hashes of counters, and permutations that are computed, not stored.

Every random choice of the data side is a hash of (seed, purpose, index, ...), so any row can be made at any time, in
any batch, on any rank, without replaying what came before.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_WORD = (1 << 64) - 1


def hash64(*parts: Any) -> UInt64:
    """Hash integers, or arrays of them that broadcast together, to 64 uniform bits an element (at least 1-D).

    Each part is added to the state, which then passes through the finaliser of SplitMix64 (Steele, Lea, Flood: Fast
    Splittable Pseudorandom Number Generators, OOPSLA 2014): for all other parts fixed, different values never collide.
    """
    state = np.zeros(1, np.uint64)
    for part in parts:
        if isinstance(part, int | np.integer):
            state = state + np.uint64((int(part) + _GOLDEN) & _WORD)
        else:
            state = state + (part.astype(np.uint64) + np.uint64(_GOLDEN))
        state ^= state >> np.uint64(30)
        state *= _FIRST
        state ^= state >> np.uint64(27)
        state *= _SECOND
        state ^= state >> np.uint64(31)
    return state


def uniform(words: UInt64) -> npt.NDArray[np.float64]:
    """Turn 64 random bits into a float64 in [0, 1) by their upper 53."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def below(words: UInt64, limit: Any) -> Int64:
    """Turn 64 random bits into an integer in [0, limit), limit >= 1 (an int or an array).

    The bias of the modulus is below limit / 2**64.
    """
    return (words % np.asarray(limit).astype(np.uint64)).astype(np.int64)


def permute(values: Int64, size: int, *key: Any, rounds: int = 6) -> Int64:
    """Map each value in [0, size) to its place in a random permutation of [0, size) chosen by the key.

    A Feistel network over the next power of two, walked until the value falls below ``size`` (Black and Rogaway:
    Ciphers with Arbitrary Finite Domains, CT-RSA 2002); fewer than two passes are expected.  The key's parts are
    integers or arrays of the values' shape.
    """
    bits = max(size - 1, 1).bit_length()
    low_bits = np.uint64((bits + 1) // 2)
    low_mask = np.uint64((1 << int(low_bits)) - 1)
    high_mask = np.uint64((1 << (bits - int(low_bits))) - 1)
    keys = np.broadcast_to(hash64(*key), values.shape)
    result = values.astype(np.uint64)
    pending = np.arange(result.size)
    while pending.size:
        word, word_key = result[pending], keys[pending]
        high, low = word >> low_bits, word & low_mask
        for turn in range(rounds):
            # The two halves may differ by one bit: each is changed in place by a hash of the other.
            if turn % 2:
                low = low ^ (hash64(word_key, turn, high) & low_mask)
            else:
                high = high ^ (hash64(word_key, turn, low) & high_mask)
        result[pending] = (high << low_bits) | low
        pending = pending[result[pending] >= np.uint64(size)]
    return result.astype(np.int64)
