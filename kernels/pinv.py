"""The pseudo-inverse of small matrices by iteration (Razavi et al. 2014; arXiv 2102.03902, section 3.2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def column_maximum(a: Tensor) -> Tensor:
    """[..., m, m] → [..., 1, 1]: the largest column sum of each matrix, ‖A‖₁ where no entry is negative."""
    return a.sum(-2, keepdim=True).amax(-1, keepdim=True)


def iterative_pinv(a: Tensor, start: Tensor, iterations: int = 6) -> Tensor:
    """Z ← ¼ Z (13I − AZ (15I − AZ (7I − AZ))) from Z = Aᵀ / start, which comes to A's pseudo-inverse where start is at
    least ‖A‖₁ ‖A‖∞ (how near six iterations are depends on A's condition: 1e-7 at 7, nowhere at 500).

    a: [..., m, m]; rows and columns that are zero are zero in the result too, transposed.  start: broadcasts with [...,
    1, 1]; 0, the ``column_maximum`` of a matrix of zeros, counts as 1 → [..., m, m], computed and given in float32 at
    least.
    """
    wide, m = torch.promote_types(a.dtype, torch.float32), a.shape[-1]
    a, start = a.to(wide), start.to(wide)
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
