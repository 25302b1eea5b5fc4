"""The iteration and its adjoint in PyTorch, in the dtype of what is given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def pinv(a: Tensor, start: Tensor, iterations: int) -> Tensor:
    """As ``iterative_pinv``."""
    m = a.shape[-1]
    z = a.transpose(-1, -2) / start.masked_fill(start == 0, 1)
    inverse: Tensor = _Iteration.apply(a.reshape(-1, m, m), z.reshape(-1, m, m), iterations)
    return inverse.view(a.shape)


class _Iteration(torch.autograd.Function):
    """a, z: [matrices, m, m] → the last Z.  Only both are kept: what lies between would take 4 matrices an iteration,
    at 512 tokens and 64 landmarks three quarters of what queries, keys, values and results take in float32."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, z: Tensor, iterations: int) -> Tensor:
        ctx.save_for_backward(a, z)
        ctx.iterations = iterations
        for _ in range(iterations):
            *_, z = _step(a, z)
        return z

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        a, z = ctx.saved_tensors
        steps = []
        for _ in range(ctx.iterations):
            *products, after = _step(a, z)
            steps.append((z, *products))
            z = after
        of_z, of_a = gradient, torch.zeros_like(a)
        for z, az, inner, outer in reversed(steps):
            of_outer = torch.bmm(z.mT, of_z) / -4
            of_inner = torch.bmm(az.mT, of_outer).neg_()
            of_az = torch.baddbmm(of_outer, of_outer, inner.mT, beta=15, alpha=-1)
            of_az.add_(of_inner, alpha=7).baddbmm_(of_inner, az.mT, alpha=-1).baddbmm_(az.mT, of_inner, alpha=-1)
            of_z = torch.baddbmm(of_z, of_z, outer.mT, beta=13 / 4, alpha=-1 / 4).baddbmm_(a.mT, of_az)
            of_a.baddbmm_(of_az, z.mT)
        return of_a, of_z, None


def _step(a: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """AZ, AZ (7I − AZ), AZ (15I − AZ (7I − AZ)) and the next Z, multiplied out: no identity matrix is needed."""
    az = torch.bmm(a, z)
    inner = torch.baddbmm(az, az, az, beta=7, alpha=-1)
    outer = torch.baddbmm(az, az, inner, beta=15, alpha=-1)
    return az, inner, outer, torch.baddbmm(z, z, outer, beta=13 / 4, alpha=-1 / 4)
