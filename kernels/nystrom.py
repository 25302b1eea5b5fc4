"""Nyström attention (arXiv 2102.03902, section 3.2): softmax attention through landmarks, linear in the length.

Shapes: n rows, h heads, l tokens, d features of queries and keys; s tokens a segment, m segments, each with a landmark.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .pinv import column_maximum, iterative_pinv

# Positions that the convolution computes at once.  Measured on a CPU with 65 weights: 16 to 64 take the same time.
BLOCK = 32


def segment(length: int, landmarks: int) -> int:
    """The tokens that a landmark stands for."""
    if landmarks < 1:
        raise ValueError(f"landmarks is {landmarks}, must be at least 1")
    return -(-length // landmarks)


def nystrom_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    landmarks: int,
    mask: Tensor | None = None,
    padding_counts: bool = False,
    exact: bool = False,
    start: Tensor | None = None,
) -> Tensor:
    """softmax(q k̃ᵀ / √d) · pinv(softmax(q̃ k̃ᵀ / √d)) · softmax(q̃ kᵀ / √d) v (arXiv 2102.03902, equation 13).

    q, k: [n, h, l, d]; v: [n, h, l, e] → [n, h, l, e], all finite.
    landmarks: q̃ and k̃ are at most so many, each the mean of ``segment(l, landmarks)`` consecutive tokens; where l is
    not more, and with ``exact``, this is softmax(q kᵀ / √d) v (with ``exact`` at a cost quadratic in l).
    mask: [n, l] bool, True real: the only tokens that are averaged and attended to.  A segment without any has no
    landmark.  Padding gets zeros.
    padding_counts: as the released code has it, the mask only keeps padding from being a key (of the last softmax);
    padding is averaged like other tokens and gets values too.  A row without real tokens gets zeros.
    start: what the transpose is divided by at the start of the pseudo-inverse's iteration, broadcasts with [n, h, 1,
    1].  None: each matrix's largest column sum, so that no row or head depends on another; the released code takes
    ``largest_column_sum``.

    Of its padding at the end a row's result depends only on the segments' length that follows from l.
    Softmaxes and the pseudo-inverse are computed in float32 at least, products in the dtype of the inputs.
    ValueError: landmarks is less than 1, shapes that do not fit, or the mask no [n, l] bool.
    """
    _check(q, mask, k, v)
    answered = mask
    if mask is not None and padding_counts:
        answered = mask.any(1, keepdim=True)
    elif mask is not None:  # what is not finite there must not meet a weight of zero
        q, k, v = (_real(x, mask) for x in (q, k, v))
    if exact or q.shape[2] <= landmarks:
        y = _attend(q, k, v, mask)
    else:
        means = Landmarks.of(q, k, landmarks, None if padding_counts else mask)
        # From right to left: nothing is larger than [l, m].
        values = _attend(means.q.to(q.dtype), k, v, mask)  # [n, h, m, e]
        a = means.kernel()
        inverse = iterative_pinv(a, column_maximum(a) if start is None else start)
        # Rows and columns without a landmark are zero in the inverse: what their queries found is dropped here.
        values = (inverse @ values.to(inverse.dtype)).to(v.dtype)
        y = _attend(q, means.k.to(k.dtype), values, means.present)
    return y if answered is None else y.masked_fill(~answered[:, None, :, None], 0)


def largest_column_sum(
    q: Tensor, k: Tensor, *, landmarks: int, mask: Tensor | None = None, padding_counts: bool = False
) -> Tensor:
    """The largest column sum of softmax(q̃ k̃ᵀ / √d) over all rows and heads, from which the released code starts.

    Arguments as of ``nystrom_attention`` → scalar in float32 at least, 0 where there are no landmarks (l is not more).
    """
    _check(q, mask, k)
    if q.shape[2] <= landmarks:
        return torch.zeros((), dtype=_wide(q), device=q.device)
    if mask is None or padding_counts:
        return column_maximum(Landmarks.of(q, k, landmarks, None).kernel()).amax()
    return column_maximum(Landmarks.of(_real(q, mask), _real(k, mask), landmarks, mask).kernel()).amax()


def position_convolution(v: Tensor, weight: Tensor, mask: Tensor | None = None) -> Tensor:
    """y[i] = Σⱼ weight[j] v[i + j − c // 2], every head with weights of its own, zeros beyond the ends.

    v: [n, h, l, d]; weight: [h, c], c odd; mask: [n, l] bool, True real: padding counts as zeros → [n, h, l, d].
    ValueError: c is even, or the mask no [n, l] bool.
    """
    if weight.shape[1] % 2 == 0:
        raise ValueError(f"a convolution over {weight.shape[1]} positions has no middle: set an odd number")
    _check(v, mask)
    return _Convolution.apply(v, weight, mask)  # type: ignore[no-any-return]


@dataclasses.dataclass(frozen=True, eq=False)
class Landmarks:
    """Means of segments, in float32 at least."""

    q: Tensor  # [n, h, m, d]
    k: Tensor  # [n, h, m, d]
    present: Tensor | None  # [n, m] bool: the segments with a token; None: all

    @staticmethod
    def of(q: Tensor, k: Tensor, landmarks: int, mask: Tensor | None) -> Landmarks:
        """q, k: [n, h, l, d], zero where the mask [n, l] is false."""
        s = segment(q.shape[2], landmarks)
        if mask is None:
            counts = _segment_sums(torch.ones_like(q[:1, :1, :, :1]), s)
            return Landmarks(_segment_sums(q, s) / counts, _segment_sums(k, s) / counts, None)
        counts = _segment_sums(mask[:, None, :, None], s)
        q, k = (_segment_sums(x, s) / counts.clamp(min=1) for x in (q, k))
        return Landmarks(q, k, counts[:, 0, :, 0] > 0)

    def kernel(self) -> Tensor:
        """[n, h, m, m]: softmax(q̃ k̃ᵀ / √d), with zeros where there is no landmark."""
        scores = (self.q * self.q.shape[-1] ** -0.5) @ self.k.transpose(-1, -2)
        if self.present is None:
            return scores.softmax(-1)
        both = self.present[:, None, :, None] & self.present[:, None, None, :]
        return scores.masked_fill(~both, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~both, 0)


def _segment_sums(x: Tensor, s: int) -> Tensor:
    """[n, h, l, d] → [n, h, m, d] in float32 at least; the last segment may be shorter."""
    wide = _wide(x)
    whole = x.shape[2] // s * s
    sums = x[:, :, :whole].unflatten(2, (-1, s)).sum(3, dtype=wide)
    if whole == x.shape[2]:
        return sums
    return torch.cat((sums, x[:, :, whole:].sum(2, keepdim=True, dtype=wide)), 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None) -> Tensor:
    """softmax(q kᵀ / √d) v over the keys [n, t] that are True; finite, but meaningless, where a row has none."""
    if keys is not None:  # what no key at all gives differs among torch's kernels
        keys = (keys | ~keys.any(1, keepdim=True))[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keys)


def _check(x: Tensor, mask: Tensor | None, *others: Tensor) -> None:
    expected = [x.shape[0], x.shape[2]]
    if mask is not None and (mask.dtype != torch.bool or list(mask.shape) != expected):
        raise ValueError(f"the mask is {mask.dtype} {list(mask.shape)}, must be torch.bool {expected} (rows, tokens)")
    if any(y.shape[:3] != x.shape[:3] for y in others) or (others and others[0].shape[3] != x.shape[3]):
        shapes = ", ".join(str(list(y.shape)) for y in (x, *others))
        raise ValueError(f"queries, keys and values are {shapes}: must agree in rows, heads, tokens (and features)")


class _Convolution(torch.autograd.Function):
    """Blocks of positions times Toeplitz matrices of the weights.

    On a CPU faster than torch's grouped convolution, whose gradient of weights is also wrong there (torch 2.13 with
    AVX-512, float32: from c = 35 on, by a tenth at c = 65).
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, weight: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(v, weight, mask)
        return _convolve(v, weight, mask)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        v, weight, mask = ctx.saved_tensors
        of_v = of_weight = None
        if ctx.needs_input_grad[0]:
            of_v = _convolve(gradient, weight.flip(1), None)
            of_v = of_v if mask is None else _real(of_v, mask)
        if ctx.needs_input_grad[1]:
            (y,) = _windows(gradient, 1, None)
            matrix = torch.cat([y @ x.transpose(1, 2) for x in _windows(v, weight.shape[1], mask)], 2)
            h, rows, columns = matrix.shape
            diagonals = matrix.as_strided((h, rows, weight.shape[1]), (rows * columns, columns + 1, 1))
            of_weight = diagonals.sum(1, dtype=_wide(v)).to(weight.dtype)
        return of_v, of_weight, None


def _convolve(v: Tensor, weight: Tensor, mask: Tensor | None) -> Tensor:
    n, h, l, d = v.shape
    first, *others = _windows(v, weight.shape[1], mask)
    width = (1 + len(others)) * BLOCK
    line = F.pad(weight.to(v.dtype), (BLOCK - 1, width - weight.shape[1]))
    matrix = line.unfold(1, width, 1).flip(1)  # [h, BLOCK, width]: weight[column - row]
    of_first, *of_others = matrix.split(BLOCK, 2)
    y = of_first @ first
    for part, window in zip(of_others, others, strict=True):
        y.baddbmm_(part, window)
    return y.view(h, BLOCK, -1, n, d).permute(3, 0, 2, 1, 4).flatten(2, 3)[:, :, :l]


def _windows(v: Tensor, c: int, mask: Tensor | None) -> list[Tensor]:
    """What a block of the result is made from: v's block that begins c // 2 earlier, the one after it, ..., each for
    all blocks, [h, BLOCK, blocks · n · d]."""
    if mask is not None:
        v = _real(v, mask)
    n, _, l, d = v.shape
    blocks, more = -(-l // BLOCK), -(-(c - 1) // BLOCK)
    v = F.pad(v, (0, 0, c // 2, (blocks + more) * BLOCK - l - c // 2)).unflatten(2, (-1, BLOCK))
    x = v.permute(1, 3, 2, 0, 4).flatten(2)
    return [x.narrow(2, first * n * d, blocks * n * d) for first in range(1 + more)]


def _real(x: Tensor, mask: Tensor) -> Tensor:
    """x [n, h, l, d] with zeros where the mask [n, l] is false."""
    return x.masked_fill(~mask[:, None, :, None], 0)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
