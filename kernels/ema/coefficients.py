"""From the parameters as they are stored to those of the recurrence (arXiv 2209.10655, equations 5 and 6)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Coefficients(NamedTuple):
    """Of h_t = q h_{t-1} + inject x_t, y_t = Σ_n project h_t; each [directions, d, n]."""

    loss: Tensor  # 1 − q, accurate where q is close to 1, and so is log q
    log_q: Tensor
    inject: Tensor
    project: Tensor

    @staticmethod
    def of(dtype: torch.dtype, damping: Tensor, decay: Tensor, expansion: Tensor, projection: Tensor) -> Coefficients:
        """The parameters as stored, [directions, d, n]: δ and α before their sigmoids, β, γ."""
        damping, decay, expansion, projection = (x.to(dtype) for x in (damping, decay, expansion, projection))
        p = damping.sigmoid()
        # A q that rounds to 0 would have no logarithm.
        loss = (p * decay.sigmoid()).clamp(max=1 - torch.finfo(dtype).eps)
        return Coefficients(loss, torch.log1p(-loss), p * expansion, projection * projection.shape[-1] ** -0.5)
