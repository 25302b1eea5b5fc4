"""Norms of large tensors, exact enough to be compared across layouts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sum_of_squares(x: Tensor, block: int = 4096) -> Tensor:
    """In float64, scalar.  Blocks are added up in float32, their sums in float64: on a CPU torch's own norm of a large
    float32 tensor is one running sum (relative error 7e-4 at 16 million values), and a copy in float64 is slow."""
    flat = x.reshape(-1)
    whole = flat.numel() // block * block
    blocks = torch.linalg.vector_norm(flat[:whole].view(-1, block), dim=1).double().square().sum()
    return blocks + torch.linalg.vector_norm(flat[whole:]).double().square()


def sums_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """``sum_of_squares`` of each of one or more tensors on one device, float64 [n]."""
    if tensors[0].is_cuda:  # a few kernels for all of them, adding up in float64
        return torch.stack(torch._foreach_norm(list(tensors), 2, torch.float64)).square()
    return torch.stack([sum_of_squares(tensor) for tensor in tensors])
