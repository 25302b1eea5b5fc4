"""The pseudo-inverse of small matrices by iteration (Razavi et al. 2014; arXiv 2102.03902, section 3.2).

Forms: ``reference`` in PyTorch; ``kernel``, CUDA, all iterations in one launch (pinv.cu).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import forms
from . import kernel, reference


def column_maximum(a: Tensor) -> Tensor:
    """[..., m, m] → [..., 1, 1]: the largest column sum of each matrix, ‖A‖₁ where no entry is negative."""
    return a.sum(-2, keepdim=True).amax(-1, keepdim=True)


def iterative_pinv(a: Tensor, start: Tensor, iterations: int = 6) -> Tensor:
    """Z ← ¼ Z (13I − AZ (15I − AZ (7I − AZ))) from Z = Aᵀ / start, which comes to A's pseudo-inverse where start is at
    least ‖A‖₁ ‖A‖∞ (how near six iterations are depends on A's condition: 1e-7 at 7, nowhere at 500).  From below a
    quarter of ‖A‖₂² it diverges, and the result need not be finite.

    a: [..., m, m]; rows and columns that are zero are zero in the result too, transposed.  start: broadcasts with [...,
    1, 1]; 0, the ``column_maximum`` of a matrix of zeros, counts as 1 → [..., m, m], computed and given in float32 at
    least.
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    a, start = a.to(wide), start.to(wide)
    if wide == torch.float32 and forms.compiled("pinv", a.device):
        if (reason := kernel.why_not(a, start, iterations)) is None:
            return kernel.pinv(a, start, iterations)
        forms.declined("pinv", reason)
    return reference.pinv(a, start, iterations)
