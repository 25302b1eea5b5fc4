"""Layer normalisation, with or without dropout and addition before it, as one kernel forward and one backward.

Kept for the backward pass: the sum, and a mean and a standard deviation's inverse a row.  The mask is computed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import forms
from ..dropout.ops import dense

NAME = "layer_norm"
MOST_FEATURES = 16384  # as in layer_norm.cu


@torch.library.custom_op("farspan::layer_norm", mutates_args=())
def normalised(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, keys: Tensor | None, cut: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The sum, its normalised form, means and inverse standard deviations (float32) of the rows.

    Without ``residual`` the sum is x and [0] is given instead, and there is no dropout.  keys: int64 that broadcasts to
    x.shape[:-1]; cut: ``dropout.threshold``.
    """
    total, y, mean, rstd = _results(x, residual)
    if y.numel():
        forms.library(NAME, x.device).call(
            "layer_norm_forward",
            dense(x),
            None if residual is None else dense(residual),
            None if weight is None else dense(weight),
            None if bias is None else dense(bias),
            None if keys is None else keys.expand(x.shape[:-1]).contiguous(),
            None if residual is None else total,
            y,
            mean,
            rstd,
            mean.numel(),
            x.shape[-1],
            cut,
            eps,
            forms.dtype_code(x.dtype),
            forms.dtype_code(_dtype_of_weights(x, weight, bias)),
        )
    return total, y, mean, rstd


def _results(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = x.new_empty(0) if residual is None else torch.empty_like(y)
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return total, y, mean, torch.empty_like(mean)


def _dtype_of_weights(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> torch.dtype:
    return next((t.dtype for t in (weight, bias) if t is not None), x.dtype)


@normalised.register_fake
def _(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, keys: Tensor | None, cut: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _results(x, residual)


@torch.library.custom_op("farspan::layer_norm_backward", mutates_args=())
def gradients(
    of_total: Tensor | None, of_y: Tensor, total: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None,
    keys: Tensor | None, cut: int, dtype: torch.dtype, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, residual, weight and bias from those of the sum (None: 0) and of its normalised form.

    dtype: the weights'; wanted: which of the four, [0] stands for the others.
    """
    results = _gradients(total, dtype, wanted)
    of_x, of_residual, of_weight, of_bias = (
        result if asked else None for result, asked in zip(results, wanted, strict=True)
    )
    features, rows = total.shape[-1], mean.numel()
    if not total.numel():
        for result in results:
            result.zero_()
        return results
    partial = None
    blocks = _blocks(rows, total.device)
    if of_weight is not None or of_bias is not None:
        partial = total.new_empty(2, blocks, features, dtype=torch.float32)
    forms.library(NAME, total.device).call(
        "layer_norm_backward",
        None if of_total is None else dense(of_total),
        dense(of_y),
        dense(total),
        mean,
        rstd,
        None if weight is None else dense(weight),
        None if keys is None else keys.expand(total.shape[:-1]).contiguous(),
        of_x,
        of_residual,
        of_weight,
        of_bias,
        partial,
        rows,
        features,
        blocks,
        cut,
        forms.dtype_code(total.dtype),
        forms.dtype_code(dtype),
    )
    return results


def _gradients(total: Tensor, dtype: torch.dtype, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_x, of_residual = (
        torch.empty_like(total, memory_format=torch.contiguous_format) if asked else total.new_empty(0)
        for asked in wanted[:2]
    )
    of_weight, of_bias = (total.new_empty(total.shape[-1] if asked else 0, dtype=dtype) for asked in wanted[2:])
    return of_x, of_residual, of_weight, of_bias


def _blocks(rows: int, device: torch.device) -> int:
    """Parts of the rows that sum the weights' gradients, each by itself: a function of the shape and the device alone,
    so that a sum is the same in every run, with any number of threads."""
    if device.type == "cuda":
        return min(rows, torch.cuda.get_device_properties(device).multi_processor_count)
    return min(32, (rows + 15) // 16)


@gradients.register_fake
def _(
    of_total: Tensor | None, of_y: Tensor, total: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None,
    keys: Tensor | None, cut: int, dtype: torch.dtype, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _gradients(total, dtype, wanted)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, keys, cut, _ = inputs
    total, _, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x if residual is None else total, mean, rstd, weight, keys)
    ctx.cut, ctx.dtype = cut, _dtype_of_weights(x, weight, bias)


def _backward(ctx: Any, of_total: Tensor | None, of_y: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    total, mean, rstd, weight, keys = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:4])
    if of_y is None:
        of_y = torch.zeros_like(total)
    shared = keys is None and wanted[0] and wanted[1]  # without dropout x and the residual have the same
    computed = gradients(
        of_total,
        of_y,
        total,
        mean,
        rstd,
        weight,
        keys,
        ctx.cut,
        ctx.dtype,
        [wanted[0], wanted[1] and not shared, *wanted[2:]],
    )
    found = [gradient if asked else None for gradient, asked in zip(computed, wanted, strict=True)]
    if shared:
        found[1] = found[0]
    return *found, None, None, None


normalised.register_autograd(_backward, setup_context=_save)
