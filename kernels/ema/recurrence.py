"""The moving average as it is defined, a step after another in plain PyTorch: what the other forms are held against."""

from __future__ import annotations

import torch
from torch import Tensor

from ..documents import Documents
from .coefficients import Coefficients


def recurrence(
    x: Tensor,
    damping: Tensor,
    decay: Tensor,
    expansion: Tensor,
    projection: Tensor,
    *,
    documents: Documents | None,
    start: Tensor | None,
    truncation: int | None,
) -> tuple[Tensor, Tensor]:
    """
    x: [s, b, d]; the parameters: [directions, d, n]; documents: where it starts anew (None: at rows); start: [b, d, n].
    Returns y [s, b, d] in x's dtype and the last hidden state of the first direction [b, d, n] (of no use where
    truncated).  In float64 whatever x is: as many float32 sums would lose more than the other forms do.  Autograd
    keeps every step.
    """
    dtype, x = x.dtype, x.double()
    c = Coefficients.of(torch.float64, damping, decay, expansion, projection)
    ids = None
    if documents is not None:
        ids = documents.document_ids.T
        x = x.masked_fill((ids == 0).unsqueeze(-1), 0)
    step = _recur if truncation is None else _convolve
    y, last = step(x, Coefficients(*(p[0] for p in c)), ids, start, truncation or 0)
    if len(damping) == 2:
        flipped = None if ids is None else ids.flip(0)
        backwards, _ = step(x.flip(0), Coefficients(*(p[1] for p in c)), flipped, None, truncation or 0)
        y = y + backwards.flip(0)
    if ids is not None:
        y = y.masked_fill((ids == 0).unsqueeze(-1), 0)
    return y.to(dtype), last.to(torch.promote_types(dtype, torch.float32))


def _recur(x: Tensor, c: Coefficients, ids: Tensor | None, start: Tensor | None, _: int) -> tuple[Tensor, Tensor]:
    h = x.new_zeros(*x.shape[1:], c.loss.shape[-1]) if start is None else start.to(x.dtype)
    y = []
    for t, x_t in enumerate(x.unbind()):
        if ids is not None and t:
            h = h.masked_fill((ids[t] != ids[t - 1])[:, None, None], 0)
        # Not q h: q close to 1 would round, and the error grow with every step.
        h = h + (c.inject * x_t.unsqueeze(-1) - c.loss * h)
        y.append((c.project * h).sum(-1))
    return torch.stack(y), h


def _convolve(
    x: Tensor, c: Coefficients, ids: Tensor | None, start: Tensor | None, truncation: int
) -> tuple[Tensor, Tensor]:
    """A lag after another: a difference of two moving averages would cancel where q is close to 1."""
    y, s = torch.zeros_like(x), len(x)
    for lag in range(min(truncation, s)):
        k = (c.project * c.inject * (c.log_q * lag).exp()).sum(-1)
        part = k * x[: s - lag]
        if ids is not None:
            part = part.masked_fill((ids[: s - lag] != ids[lag:]).unsqueeze(-1), 0)
        y = y + torch.cat((y.new_zeros(lag, *y.shape[1:]), part))
    return y, x.new_zeros(*x.shape[1:], c.loss.shape[-1])
