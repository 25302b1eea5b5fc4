"""A layer on the ranks of a mesh, and what it is compared with: whole weights in float64, whole gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from comparison import merge
from ranks import Ranks
from torch import Tensor, nn

from farspan.parallel.mesh import Mesh
from farspan.parallel.sharding import logical_of

Described = dict[str, tuple[Any, Tensor]]  # by name: (Logical, a rank's part)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def state(module: nn.Module) -> tuple[Described, Described]:
    """Values and gradients of the parameters that are trained."""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    values = {name: (logical_of(p), p.detach()) for name, p in trained.items()}
    return values, {name: (logical_of(p), p.grad) for name, p in trained.items() if p.grad is not None}


def merged(parts: list[Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Whole values and gradients of what starts with every tensor rank's ``state``; the values in float64, leaves ready
    for a reference computation."""
    values, gradients = ([part[i] for part in parts] for i in range(2))
    whole = {name: merge([part[name] for part in values]).double().requires_grad_() for name in values[0]}
    return whole, {name: merge([part[name] for part in gradients]) for name in gradients[0]}


def run(ranks: Ranks, function: Callable[..., Any], *args: Any, tensor: int) -> list[Any]:
    """``function(mesh, *args)`` on every tensor rank, or here on one."""
    return [function(Mesh.solo(), *args)] if tensor == 1 else ranks.on_mesh(function, *args, tensor=tensor)


def with_sequence(mesh: Mesh, sequence: bool) -> Mesh:
    """The same ranks with sequence parallelism, or without."""
    return dataclasses.replace(mesh, sequence_parallel=sequence)
