"""The optimizer that a configuration asks for."""

from __future__ import annotations

from typing import Any

import torch

from ..parallel.lamb import Lamb
from ..parallel.replicated import MakeOptimizer
from ..parallel.zero import cpu_adam
from .config import Config


def optimizer_factory(config: Config) -> MakeOptimizer:
    """From parameter groups [with weight decay, without] to the optimizer of this run."""
    settings = config.optimizer

    def make(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        groups = [{**group, "weight_decay": settings.weight_decay if group["decayed"] else 0.0} for group in groups]
        common: dict[str, Any] = {"lr": settings.lr, "betas": (settings.beta1, settings.beta2), "eps": settings.eps}
        if config.parallel.offload_optimizer:
            return cpu_adam(groups, **common)
        if settings.name == "lamb":
            return Lamb(groups, **common)
        return torch.optim.AdamW(groups, **common, fused=True)

    return make
