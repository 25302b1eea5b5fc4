"""Counter-based dropout (see ``reference``), compiled where there is a kernel."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .. import forms
from . import ops, reference
from .reference import keep_mask, stream, threshold

__all__ = ["DropoutKey", "dropout", "dropout_add", "keep_mask", "stream", "threshold"]


@dataclasses.dataclass(frozen=True)
class DropoutKey:
    """What the masks of one microbatch are keyed by.

    ``samples``: int64, indices of the rows in the whole run: [b], or [s, b] where every position has its own.
    """

    seed: int
    step: int
    samples: Tensor

    def rows(self, stream: int, positions: Tensor) -> Tensor:
        """Row keys of one use of dropout.

        ``stream`` names the use (which layer, which place); ``positions`` int64, of any shape that broadcasts with
        ``samples``.  Returns int64 keys of the broadcast shape.
        """
        keys: Tensor = ops.row_keys(self.seed, self.step, stream, self.samples, positions)
        return keys


def dropout(x: Tensor, p: float, keys: Tensor | None, first: Tensor | int = 0) -> Tensor:
    """Zero a fraction p of x and scale the rest so that the expectation stays.

    x: [..., features]; keys: int64 that broadcasts to x.shape[:-1], or None for no dropout (evaluation); first: see
    ``keep_mask``.
    """
    if keys is None or p == 0.0:
        return x
    if not _compiled(x):
        return reference.dropout(x, p, keys, first)
    firsts, first = (first, 0) if isinstance(first, Tensor) else (None, first)
    return ops.masked(x, None, keys, firsts, first, threshold(p))


def dropout_add(x: Tensor, residual: Tensor, p: float, keys: Tensor | None) -> Tensor:
    """residual + dropout(x), all [..., features]."""
    same = residual.shape == x.shape and residual.dtype == x.dtype
    if keys is None or p == 0.0 or not same or not _compiled(x):
        return residual + dropout(x, p, keys)
    return ops.masked(x, residual, keys, None, 0, threshold(p))


def _compiled(x: Tensor) -> bool:
    if x.dtype == torch.float64 or not forms.compiled("dropout", x.device):
        return False
    return ops.computes("dropout", x.dtype, x.device)
