"""Layer normalisation (arXiv 1607.06450), alone and fused with the dropout and residual addition before it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..dropout.reference import dropout_add


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Normalise over the last dimension, statistics in float32 at least.

    x: [..., features]; weight, bias: [features], or None for 1 and 0.
    """
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def dropout_add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, p: float, keys: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns (sum, normalised sum) with sum = residual + dropout(x).

    x, residual: [..., features]; weight, bias: [features]; keys: int64 of x.shape[:-1] or None (no dropout).
    A pre-norm block carries the first on and feeds the second to its next branch; a post-norm block uses the second.
    """
    total = dropout_add(x, residual, p, keys)
    return total, layer_norm(total, weight, bias, eps)
