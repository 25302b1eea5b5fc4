"""What happens to a tile of logits but for the products: the definition in PyTorch, and the choice of a compiled form.

A tile is [rows, stride]; its first ``real`` columns are entries ``first``, first + 1, ... of the vocabulary, and the
others take no part.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .. import forms

ROWS = 64  # that a compiled form sums over at a time, for the gradient of the bias


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Of rows of logits, over the part of the vocabulary that was seen.  All [n], float32 at least but ``best``."""

    maximum: Tensor  # the dtype's lowest number where nothing was seen
    total: Tensor  # the sum of exp(logit - maximum)
    label_logit: Tensor  # -inf where the label was not seen
    best: Tensor  # int64: the first entry of the vocabulary that has the maximum; -1: nothing was seen

    @staticmethod
    def of_nothing(rows: int, dtype: torch.dtype, device: torch.device) -> Statistics:
        dtype = torch.promote_types(dtype, torch.float32)
        return Statistics(
            torch.full((rows,), torch.finfo(dtype).min, dtype=dtype, device=device),
            torch.zeros(rows, dtype=dtype, device=device),
            torch.full((rows,), -torch.inf, dtype=dtype, device=device),
            torch.full((rows,), -1, dtype=torch.int64, device=device),
        )

    def rows(self, rows: slice) -> Statistics:
        return Statistics(self.maximum[rows], self.total[rows], self.label_logit[rows], self.best[rows])


def uses_compiled(logits: Tensor) -> bool:
    return logits.dtype != torch.float64 and forms.compiled("lm_head", logits.device)


def update_statistics(logits: Tensor, real: int, first: int, labels: Tensor, statistics: Statistics) -> None:
    """Merge a tile into the statistics of its rows, in place.  Tiles come in the vocabulary's order."""
    s = statistics
    if uses_compiled(logits):
        forms.library("lm_head", logits.device).call(
            "lm_head_statistics", logits, labels, s.maximum, s.total, s.label_logit, s.best,
            len(logits), real, logits.shape[1], first, forms.dtype_code(logits.dtype),
        )  # fmt: skip
        return
    numbers = logits[:, :real].to(s.maximum.dtype)
    largest, index = numbers.max(-1)
    maximum = torch.maximum(s.maximum, largest)
    s.best.copy_(torch.where(largest > s.maximum, index + first, s.best))
    total = (numbers - maximum.unsqueeze(-1)).exp_().sum(-1)
    s.total.mul_((s.maximum - maximum).exp_()).add_(total)
    s.maximum.copy_(maximum)
    place, here = _label_places(labels, real, first)
    s.label_logit.copy_(torch.where(here, numbers.gather(1, place).squeeze(1), s.label_logit))


def turn_into_gradient(
    logits: Tensor, real: int, first: int, labels: Tensor, statistics: Statistics, upstream: Tensor, out: Tensor
) -> Tensor:
    """out = (softmax - one-hot label) · upstream, in place where it is ``logits``; returns its sum over rows [real].

    ``statistics``: maximum and total over the whole vocabulary; ``upstream``: [rows], of their dtype.
    """
    s = statistics
    if uses_compiled(logits):
        sums = upstream.new_empty((len(logits) + ROWS - 1) // ROWS, real)
        forms.library("lm_head", logits.device).call(
            "lm_head_gradient", logits, out, labels, s.maximum, s.total, upstream, sums,
            len(logits), real, logits.shape[1], first, forms.dtype_code(logits.dtype),
        )  # fmt: skip
        return sums.sum(0)
    gradient = (logits[:, :real].to(s.maximum.dtype) - s.maximum.unsqueeze(-1)).exp_()
    gradient *= (upstream / s.total).unsqueeze(-1)
    place, here = _label_places(labels, real, first)
    gradient.scatter_add_(1, place, torch.where(here, -upstream, 0).unsqueeze(1))
    out[:, :real] = gradient
    out[:, real:] = 0
    return gradient.sum(0)


def _label_places(labels: Tensor, real: int, first: int) -> tuple[Tensor, Tensor]:
    """The labels' columns in a tile [rows, 1], 0 where they are not in it; whether they are [rows]."""
    place = labels - first
    here = (place >= 0) & (place < real)
    return torch.where(here, place, 0).unsqueeze(1), here
