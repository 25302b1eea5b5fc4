"""bias + GELU in CUDA (activation.cu) as operations that torch knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import forms

WIDTH = 8  # features come in so many
PARTS = 1056  # of 32 rows or more and 256 features, whose gradients of the bias are summed apart: see activation.cu
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.library.custom_op("farspan::bias_gelu_forward", mutates_args=())
def bias_gelu_forward(x: Tensor, bias: Tensor, approximate: bool) -> Tensor:
    """x: [..., features]; bias: [features] → gelu(x + bias) in x's dtype."""
    x, bias = _plain(x), bias.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        call, (rows, features, *codes) = forms.library("activation", x.device).call, _sizes(x, bias, approximate)
        call("bias_gelu_forward", x, bias, y, rows, features, *codes)
    return y


@bias_gelu_forward.register_fake
def _(x: Tensor, bias: Tensor, approximate: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("farspan::bias_gelu_backward", mutates_args=())
def bias_gelu_backward(gradient: Tensor, x: Tensor, bias: Tensor, approximate: bool) -> tuple[Tensor, Tensor]:
    """gradient: of the result → those of x and of the bias."""
    gradient, x, bias = _plain(gradient), _plain(x), bias.contiguous()
    of_x, of_bias = torch.empty_like(x), torch.empty_like(bias)
    if not x.numel():
        of_bias.zero_()
    else:
        call, (rows, features, *codes) = forms.library("activation", x.device).call, _sizes(x, bias, approximate)
        parts = min(PARTS, -(-rows // 32), -(-256 * PARTS // features))
        sums = x.new_empty(parts, features, dtype=torch.float32)
        call("bias_gelu_backward", gradient, x, bias, of_x, of_bias, sums, rows, features, parts, *codes)
    return of_x, of_bias


@bias_gelu_backward.register_fake
def _(gradient: Tensor, x: Tensor, bias: Tensor, approximate: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), bias.new_empty(bias.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
    x, bias, ctx.approximate = inputs
    ctx.save_for_backward(x, bias)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    of_x, of_bias = bias_gelu_backward(gradient, *ctx.saved_tensors, ctx.approximate)
    return of_x if ctx.needs_input_grad[0] else None, of_bias if ctx.needs_input_grad[1] else None, None


bias_gelu_forward.register_autograd(_differentiate, setup_context=_keep)


def _sizes(x: Tensor, bias: Tensor, approximate: bool) -> tuple[int, ...]:
    """Rows, features, and the codes of what is computed."""
    features = x.shape[-1]
    return (
        x.numel() // features, features, int(approximate), forms.dtype_code(x.dtype), forms.dtype_code(bias.dtype),
    )  # fmt: skip


def _plain(x: Tensor) -> Tensor:
    """Contiguous, from an address that is a multiple of 16 bytes."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()
