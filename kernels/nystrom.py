"""Nyström attention (arXiv 2102.03902, section 3.2): softmax attention through landmarks, linear in the length.

Shapes: n rows, h heads, l tokens, d features of queries and keys; s tokens a segment, m segments, each with a landmark.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from .pinv import column_maximum, iterative_pinv


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

    A row's result depends on l, from which the segments follow, but on nothing else about its padding.
    Softmaxes and the pseudo-inverse are computed in float32 at least, products in the dtype of the inputs.
    ValueError: landmarks is less than 1, or the mask no [n, l] bool.
    """
    _check(q, mask)
    answered = mask
    if mask is not None and padding_counts:
        answered = mask.any(1, keepdim=True)
    if exact or q.shape[2] <= landmarks:
        segment(q.shape[2], landmarks)
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
    _check(q, mask)
    if q.shape[2] <= landmarks:
        return torch.zeros((), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    return column_maximum(Landmarks.of(q, k, landmarks, None if padding_counts else mask).kernel()).amax()


def position_convolution(v: Tensor, weight: Tensor, mask: Tensor | None = None) -> Tensor:
    """y[i] = Σⱼ weight[j] v[i + j − c // 2], every head with weights of its own, zeros beyond the ends.

    v: [n, h, l, d]; weight: [h, c], c odd; mask: [n, l] bool, True real: padding counts as zeros → [n, h, l, d].
    ValueError: c is even.
    """
    h, c = weight.shape
    if c % 2 == 0:
        raise ValueError(f"a convolution over {c} positions has no middle: set an odd size")
    _check(v, mask)
    if mask is not None:
        v = v.masked_fill(~mask[:, None, :, None], 0)
    return F.conv2d(v, weight[:, None, :, None], padding=(c // 2, 0), groups=h)


@dataclasses.dataclass(frozen=True, eq=False)
class Landmarks:
    """Means of segments, in float32 at least."""

    q: Tensor  # [n, h, m, d]
    k: Tensor  # [n, h, m, d]
    present: Tensor | None  # [n, m] bool: the segments with a token; None: all

    @staticmethod
    def of(q: Tensor, k: Tensor, landmarks: int, mask: Tensor | None) -> Landmarks:
        s = segment(q.shape[2], landmarks)
        if mask is None:
            counts = _segment_sums(torch.ones_like(q[:1, :1, :, :1]), s)
            return Landmarks(_segment_sums(q, s) / counts, _segment_sums(k, s) / counts, None)
        real = mask[:, None, :, None]
        counts = _segment_sums(real, s)
        q, k = (_segment_sums(x.masked_fill(~real, 0), s) / counts.clamp(min=1) for x in (q, k))
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
    wide = torch.promote_types(x.dtype, torch.float32)
    whole = x.shape[2] // s * s
    sums = x[:, :, :whole].unflatten(2, (-1, s)).sum(3, dtype=wide)
    if whole == x.shape[2]:
        return sums
    return torch.cat((sums, x[:, :, whole:].sum(2, keepdim=True, dtype=wide)), 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None) -> Tensor:
    """softmax(q kᵀ / √d) v over the keys [n, t] that are True; finite, but meaningless, where a row has none."""
    if keys is not None:
        keys = (keys | ~keys.any(1, keepdim=True))[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keys)


def _check(x: Tensor, mask: Tensor | None) -> None:
    expected = [x.shape[0], x.shape[2]]
    if mask is not None and (mask.dtype != torch.bool or list(mask.shape) != expected):
        raise ValueError(f"the mask is {mask.dtype} {list(mask.shape)}, must be torch.bool {expected} (rows, tokens)")
