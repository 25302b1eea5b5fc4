"""Counter-based dropout: every mask is a pure function of (seed, step, sample, stream, position, feature).

Nothing is drawn from a generator with a state, so the masks do not depend on how rows, layers, heads or positions are
spread over ranks, and a resumed run sees the masks that the uninterrupted one saw.

The row key is 64 bits, mixed by the finalizer of SplitMix64 (Steele et al., "Fast splittable pseudorandom number
generators", OOPSLA 2014).  From it and the index of a pair of features, two rounds of the 32-bit finalizer of
MurmurHash3 (multipliers from H. Prospector's low-bias search) give 32 bits: the low 16 decide the even feature, the
high 16 the odd one.  A probability is therefore a multiple of 2^-16, and kept values are scaled by the exact inverse of
what is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX1, _MIX2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed64(value: int) -> int:
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value


def _mix_int(value: int) -> int:
    """SplitMix64's finalizer on a Python integer."""
    value &= _MASK64
    value = ((value ^ (value >> 30)) * _MIX1) & _MASK64
    value = ((value ^ (value >> 27)) * _MIX2) & _MASK64
    return value ^ (value >> 31)


def _mix_tensor(value: Tensor) -> Tensor:
    """The same on int64 tensors: products wrap, right shifts are made logical by a mask."""
    value = (value ^ ((value >> 30) & ((1 << 34) - 1))) * _signed64(_MIX1)
    value = (value ^ ((value >> 27) & ((1 << 37) - 1))) * _signed64(_MIX2)
    return value ^ ((value >> 31) & ((1 << 33) - 1))


def base_key(seed: int, step: int, stream: int) -> int:
    """What the row keys of one use of dropout have in common, a signed number of 64 bits."""
    return _signed64(_mix_int(_mix_int(_mix_int(seed) + step * _GOLDEN) + stream * _GOLDEN))


def row_keys(base: int, samples: Tensor, positions: Tensor) -> Tensor:
    """int64 of the shape that ``samples`` and ``positions`` broadcast to: see ``DropoutKey.rows``."""
    mixed = _mix_tensor(samples * _signed64(_GOLDEN) + base)
    return _mix_tensor(mixed + positions * _signed64(_GOLDEN))


def stream(layer: int, place: int) -> int:
    """The number of a use of dropout: ``layer`` counts from 0 over the whole model (-1: the embeddings)."""
    if not 0 <= place < 16:
        raise ValueError(f"dropout place {place} is outside 0..15")
    return (layer + 1) * 16 + place


def threshold(p: float) -> int:
    """The probability in units of 2^-16, at most 65535: something is kept."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout probability {p} is outside [0, 1)")
    return min(round(p * 65536), 65535)


def keep_mask(keys: Tensor, features: int, p: float, first: Tensor | int = 0) -> Tensor:
    """True where a value is kept: [*keys.shape, features] bool.

    The features are first, first + 1, ... of each row (a number, or int64 that broadcasts with ``keys``).
    """
    if isinstance(first, int):
        odd = first % 2
        pairs = _keep_pairs(keys, (features + odd + 1) // 2, p, first // 2)
        return pairs[..., odd : features + odd]
    kept = _keep_pairs(keys, features // 2 + 1, p, first // 2)
    return torch.where((first % 2 == 1).unsqueeze(-1), kept[..., 1 : features + 1], kept[..., :features])


def _keep_pairs(keys: Tensor, pairs: int, p: float, first: Tensor | int) -> Tensor:
    """The same for pairs of features: [*keys.shape, 2 · pairs]."""
    # Memory is little-endian: the low half comes first.  Halves are signed, so both sides of "<" move by 2^15.
    halves = _hash_pairs(keys, pairs, first).bitwise_xor_(-2147450880).view(torch.int16)  # 0x80008000
    return halves >= threshold(p) - 32768


def _hash_pairs(keys: Tensor, pairs: int, first: Tensor | int = 0) -> Tensor:
    """32 bits for every pair of features, from pair ``first`` on: [*keys.shape, pairs] int32."""
    low, high = keys.to(torch.int32).unsqueeze(-1), (keys >> 32).to(torch.int32).unsqueeze(-1)
    index = torch.arange(pairs, dtype=torch.int32, device=keys.device)
    if isinstance(first, Tensor):
        index = index + first.to(torch.int32).unsqueeze(-1)
    else:
        index += first
    h = index * -1640531527 + low  # 2^32 over the golden ratio
    h ^= (h >> 16) & 0xFFFF
    h *= 0x7FEB352D
    h ^= high
    h ^= (h >> 15) & 0x1FFFF
    h *= -2073254261  # 0x846CA68B
    return h.bitwise_xor_((h >> 16) & 0xFFFF)


def dropout(x: Tensor, p: float, keys: Tensor | None, first: Tensor | int = 0) -> Tensor:
    """Zero a fraction p of x and scale the rest so that the expectation stays.

    x: [..., features]; keys: int64 of x.shape[:-1], or None for no dropout (evaluation); first: see ``keep_mask``.
    """
    if keys is None or p == 0.0:
        return x
    scale = 65536 / (65536 - threshold(p))
    return torch.where(keep_mask(keys, x.shape[-1], p, first), x * scale, 0)


def dropout_add(x: Tensor, residual: Tensor, p: float, keys: Tensor | None) -> Tensor:
    """residual + dropout(x), all [..., features]."""
    return residual + dropout(x, p, keys)
