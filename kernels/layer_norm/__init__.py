"""Layer normalisation (arXiv 1607.06450), alone and fused with the dropout and residual addition before it.

Compiled where there is a kernel, else as in ``reference``.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from .. import forms
from ..dropout import dropout_add, threshold
from ..dropout.ops import computes, is_processors
from . import ops, reference

__all__ = ["dropout_add_layer_norm", "layer_norm"]


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Normalise over the last dimension, statistics in float32 at least.

    x: [..., features]; weight, bias: [features], or None for 1 and 0.
    """
    if _compiled(x, weight, bias, drops=False):
        return ops.normalised(x, None, weight, bias, None, 0, eps)[1]
    if x.is_cuda and weight is not None and bias is not None and x.dtype == weight.dtype == bias.dtype:
        apex = _apex() if forms.current_mode() == "auto" else None
        if apex is not None:
            return apex(x, weight, bias, x.shape[-1:], eps)
    return reference.layer_norm(x, weight, bias, eps)


def dropout_add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, p: float, keys: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns (sum, normalised sum) with sum = residual + dropout(x).

    x, residual: [..., features]; weight, bias: [features]; keys: int64 that broadcasts to x.shape[:-1], or None (no
    dropout).  The sum is rounded to x's dtype before it is normalised.
    A pre-norm block carries the first on and feeds the second to its next branch; a post-norm block uses the second.
    """
    keys, cut = (None, 0) if keys is None or p == 0.0 else (keys, threshold(p))
    same = residual.shape == x.shape and residual.dtype == x.dtype
    if same and _compiled(x, weight, bias, drops=keys is not None):
        total, y, _, _ = ops.normalised(x, residual, weight, bias, keys, cut, eps)
        return total, y
    total = dropout_add(x, residual, p, keys)
    return total, layer_norm(total, weight, bias, eps)


def _compiled(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, drops: bool) -> bool:
    if x.dtype == torch.float64 or not forms.compiled(ops.NAME, x.device):
        return False
    if any(t is not None and t.shape != x.shape[-1:] for t in (weight, bias)):
        return False  # torch says what is wrong
    if not drops and is_processors(ops.NAME, x.device):
        return False  # without dropout torch's own operations are as quick there
    if not computes(ops.NAME, x.dtype, x.device):
        return False
    features, dtypes = x.shape[-1], {t.dtype for t in (weight, bias) if t is not None}
    reason = None
    if not 0 < features <= ops.MOST_FEATURES or features % 8:
        reason = f"{features} features, not a multiple of 8 up to {ops.MOST_FEATURES}"
    elif len(dtypes) > 1 or not dtypes <= {x.dtype, torch.float32}:
        reason = f"weights of {', '.join(map(str, sorted(dtypes, key=str)))} for {x.dtype}"
    elif x.is_cuda and x.dtype == torch.float32 and features > 8192 and _shared_memory(x.device) < 200 * 1024:
        reason = f"{features} features of {x.dtype} do not fit into the device's shared memory"
    if reason is not None:
        forms.declined(ops.NAME, reason)
    return reason is None


def _shared_memory(device: torch.device) -> int:
    """Bytes that a block may have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]


@functools.cache
def _apex() -> Callable[..., Tensor] | None:
    """NVIDIA apex's kernel, where it is installed: for where ours cannot be built."""
    try:
        from apex.normalization.fused_layer_norm import fused_layer_norm_affine

        importlib.import_module("fused_layer_norm_cuda")
    except ImportError:
        return None
    return fused_layer_norm_affine
