"""Multiresolution attention with two resolutions, MRA-2 (arXiv 2207.10284, section 4).

Positions are cut into blocks of 32.  Of the nb × nb blocks of a head's scores the most promising are computed exactly;
of the others each is one logit, that of the means of its queries and keys, which counts as often as it has keys.  With
l_ij = q̂_i · k̂_j / √d of means over the n_i and n_j real tokens of two blocks:

    selected: the budget's highest l_ij − max_j l_ij of the whole matrix, blocks under a prior first,
    y_t = (Σ_selected exp(q_t · k_u / √d) v_u + Σ_others n_j exp(l_ij) v̂_j) / (Σ_selected exp(…) + Σ_others n_j exp(…)).

"sparse" leaves the others out.  No gradient goes through the selection.  Sums are relative to the highest exponent of a
query, over real keys alone, and 1e-6 is added to the one below; means divide by n + 1e-6 (both as the released code).

Forms: "reference" is the definition with all scores, the truth for tests; "blocks" works by lists of selected blocks,
memory linear in them; "compiled" does so in CUDA kernels (``fused``) or, on a CPU, in C++ (``compiled_cpu``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import forms
from ..constants import constant_when_compiled
from .blocks import blocks
from .fused import fused
from .reference import reference
from .selection import BLOCK, Options

__all__ = ["BLOCK", "DEFAULT", "Form", "block_budget", "mra_attention"]

Form = Literal["reference", "blocks", "compiled"]
# Of calls that name none; None: the best for the device.
DEFAULT: Form | None = None


def block_budget(length: int, blocks_per_row: int) -> int:
    """Selected blocks of a matrix of length × length: so many for each row of blocks on average, at most all."""
    nb = -(-length // BLOCK)
    return min(nb * blocks_per_row, nb * nb)


def mra_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    budget: int,
    mask: Tensor | None = None,
    sparse: bool = False,
    first_blocks: int = 0,
    diagonal_blocks: int = 0,
    form: Form | None = None,
) -> Tensor:
    """MRA-2 attention of every row and head by itself.  Differentiable in q, k and v, once.

    q, k: [n, h, l, d]; v: [n, h, l, e]; any length and sizes.  mask: [n, l] bool, True for real tokens, in any pattern.
    budget: selected blocks of each of the n · h matrices of blocks (``block_budget``).  With all of them, or more, the
    result is softmax(q kᵀ / √d) v over real keys, and on a CPU computed as such.
    sparse: selected blocks only.  first_blocks: as many first rows and columns of blocks are selected before others,
    diagonal_blocks: and blocks up to half as many (rounded down) from the diagonal; 0: no such prior.
    Returns [n, h, l, e] in q's dtype, computed in float32 at least, zeros at padding.  The same bits in every run.

    ValueError: shapes that do not fit, a mask that is not bool, a budget below 1, a negative number of blocks; form
    "compiled" where the device or the mode (``forms``) has none.
    """
    _check(q, k, v, mask, budget, first_blocks, diagonal_blocks)
    nb = -(-q.shape[2] // BLOCK)
    chosen = form or DEFAULT
    if chosen is None and budget >= nb * nb and q.shape[3] == v.shape[3] and q.device.type == "cpu":
        return _softmax(q, k, v, mask)
    options = Options(min(budget, nb * nb), sparse, first_blocks, diagonal_blocks)
    return _function(chosen, q)(q, k, v, mask, options)


def _function(form: Form | None, q: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor | None, Options], Tensor]:
    if form in ("reference", "blocks"):
        return reference if form == "reference" else blocks
    if q.dtype == torch.float64 and form is None:
        return blocks
    if forms.compiled("mra", q.device):
        return _compiled_cpu() if _in_cpp(q.device) else fused
    if form is not None:
        raise ValueError(f"form compiled: mra has none on {q.device} in mode {forms.current_mode()}: use blocks")
    return blocks


@constant_when_compiled
def _in_cpp(device: torch.device) -> bool:
    """Of a device with a compiled form: whether it takes threads, not a stream."""
    return forms.library("mra", device).threads


def _compiled_cpu() -> Callable[[Tensor, Tensor, Tensor, Tensor | None, Options], Tensor]:
    from .compiled_cpu import compiled_cpu

    return compiled_cpu


def _softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Everything selected.  On a CPU only: a GPU's backward pass would not give the same bits in every run."""
    dtype = q.dtype
    q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v).to(dtype)
    padding = ~mask[:, None, :, None]
    q, k, v = (x.masked_fill(padding, 0) for x in (q, k, v))  # a weight of 0 times a number that is none
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :]).masked_fill(padding, 0).to(dtype)


def _check(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, budget: int, first_blocks: int, diagonal_blocks: int
) -> None:
    if q.dim() != 4 or q.shape != k.shape or q.shape[:3] != v.shape[:-1] or not q.shape[2]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: give q and k [n, h, l, d] and v [n, h, l, e] "
            "with l > 0"
        )
    if mask is not None and (mask.shape != (q.shape[0], q.shape[2]) or mask.dtype != torch.bool):
        raise ValueError(
            f"mask {tuple(mask.shape)} of {mask.dtype} for q {tuple(q.shape)}: give [n, l] of torch.bool, True where a "
            "token is real"
        )
    if budget < 1:
        raise ValueError(f"budget {budget}: select 1 block or more of each matrix, or use block_budget(length, 1)")
    if first_blocks < 0 or diagonal_blocks < 0:
        raise ValueError(
            f"first_blocks {first_blocks}, diagonal_blocks {diagonal_blocks}: both must be 0 (no prior) or more"
        )
