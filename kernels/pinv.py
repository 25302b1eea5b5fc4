"""The pseudo-inverse of small matrices by iteration (Razavi et al. 2014; arXiv 2102.03902, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor


def column_maximum(a: Tensor) -> Tensor:
    """[..., m, m] → [..., 1, 1]: the largest column sum of each matrix, ‖A‖₁ where no entry is negative."""
    return a.sum(-2, keepdim=True).amax(-1, keepdim=True)


def iterative_pinv(a: Tensor, start: Tensor, iterations: int = 6) -> Tensor:
    """Z ← ¼ Z (13I − AZ (15I − AZ (7I − AZ))) from Z = Aᵀ / start, which comes to A's pseudo-inverse where start is at
    least ‖A‖₁ ‖A‖∞.

    a: [..., m, m], rows and columns may be zero and stay so; start: broadcasts with [..., 1, 1], 0 (a matrix of zeros
    has that ``column_maximum``) counts as 1 → [..., m, m], computed and given in float32 at least.
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    a, start = a.to(wide), start.to(wide)
    z = a.transpose(-1, -2) / start.masked_fill(start == 0, 1)
    m = a.shape[-1]
    return _iterate(a.reshape(-1, m, m), z.reshape(-1, m, m), iterations).view(a.shape)


def _iterate(a: Tensor, z: Tensor, iterations: int) -> Tensor:
    """a, z: [matrices, m, m] → the last Z.  Multiplied out, so that no identity matrix is needed."""
    for _ in range(iterations):
        az = torch.bmm(a, z)
        inner = torch.baddbmm(az, az, az, beta=7, alpha=-1)  # AZ (7I − AZ)
        outer = torch.baddbmm(az, az, inner, beta=15, alpha=-1)  # AZ (15I − AZ (7I − AZ))
        z = torch.baddbmm(z, z, outer, beta=13 / 4, alpha=-1 / 4)
    return z
