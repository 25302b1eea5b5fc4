"""MRA-2 attention by compiled C++ (mra_cpu.cpp), as a registered operation: on a CPU, in float32 and bfloat16.

float16 is computed of a float32 copy, float64 by ``blocks``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import forms
from .blocks import blocks
from .selection import BLOCK, Options

_NATIVE = (torch.float32, torch.bfloat16)


def compiled_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Options) -> Tensor:
    """As ``mra_attention``; keeps q, k, v, the result, the maximum and sum of each query and the lists."""
    kinds = {x.dtype for x in (q, k, v)}
    if torch.float64 in kinds:
        return blocks(q, k, v, mask, options)
    if len(kinds) > 1 or q.dtype not in _NATIVE:
        return compiled_cpu(q.float(), k.float(), v.float(), mask, options).to(q.dtype)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    y: Tensor = _forward(q, k, v, mask, *options, keep)[0]
    return y


@torch.library.custom_op("farspan::mra_cpu_forward", mutates_args=(), device_types="cpu")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    budget: int,
    sparse: bool,
    first_blocks: int,
    diagonal_blocks: int,
    keep: bool,
) -> list[Tensor]:
    """The result, each query's maximum and sum of weights, and the lists (int32 ``Selection``), the last four empty
    where they are not to be kept."""
    y, kept = v.new_empty(v.shape), _room(v, budget)
    if y.numel():
        q, k, v = _rows(q, k, v)
        real = None if mask is None else mask.contiguous()
        last = budget, int(sparse), first_blocks, diagonal_blocks, forms.dtype_code(q.dtype)
        call = forms.library("mra", q.device).call
        call("mra_forward", q, k, v, real, *_layout(q, k, v), y, *kept, *last)
    return [y, *(kept if keep else _room(v, budget, keep))]


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    budget: int,
    sparse: bool,
    first_blocks: int,
    diagonal_blocks: int,
    keep: bool,
) -> list[Tensor]:
    return [v.new_empty(v.shape), *_room(v, budget, keep)]


def _room(v: Tensor, budget: int, keep: bool = True) -> list[Tensor]:
    """For what is kept besides the result."""
    m, nb = v.shape[0] * v.shape[1], -(-v.shape[2] // BLOCK)
    shapes = [(m, nb * BLOCK)] * 2 + [(m, nb + 1), (m, budget)] if keep else [(0, 0)] * 4
    return [v.new_empty(shape, dtype=torch.float32 if i < 2 else torch.int32) for i, shape in enumerate(shapes)]


@torch.library.custom_op("farspan::mra_cpu_backward", mutates_args=(), device_types="cpu")
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    y: Tensor,
    kept: list[Tensor],
    of_y: Tensor,
    sparse: bool,
    asked: list[bool],
) -> list[Tensor]:
    """The gradients of q, k and v, those that are asked for."""
    gradients = [x.new_empty(x.shape) if y.numel() else x.new_zeros(x.shape) for x in (q, k, v)]
    if y.numel():
        q, k, v, of_y = _rows(q, k, v, of_y)
        real = None if mask is None else mask.contiguous()
        results = [x if wanted else None for x, wanted in zip(gradients, asked, strict=True)]
        last = kept[3].shape[1], int(sparse), forms.dtype_code(q.dtype)
        call = forms.library("mra", q.device).call
        call("mra_backward", q, k, v, real, *_layout(q, k, v, of_y), y.contiguous(), *kept, of_y, *results, *last)
    return gradients


@_backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    y: Tensor,
    kept: list[Tensor],
    of_y: Tensor,
    sparse: bool,
    asked: list[bool],
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (q, k, v)]


def _rows(*tensors: Tensor) -> list[Tensor]:
    """Features side by side; what else is strided may be so."""
    return [x if x.stride(3) == 1 else x.contiguous() for x in tensors]


def _layout(q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> tuple[Tensor, Tensor]:
    """n, h, l, d, e, and how far apart these tensors' rows of the batch, heads and tokens are."""
    sizes = torch.tensor([*q.shape, v.shape[3]])
    return sizes, torch.tensor([x.stride(i) for x in (q, k, v, *more) for i in range(3)])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    q, k, v, mask, _, sparse, *_ = inputs
    y, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.save_for_backward(q, k, v, mask, y, *kept)
    ctx.sparse = sparse


def _differentiate(ctx: Any, of_results: list[Tensor]) -> tuple[Tensor | None, ...]:
    q, k, v, mask, y, *kept = ctx.saved_tensors
    asked = list(ctx.needs_input_grad[:3])
    gradients = _backward(q, k, v, mask, y, kept, of_results[0], ctx.sparse, asked)
    return *(x if wanted else None for x, wanted in zip(gradients, asked, strict=True)), *[None] * 6


_forward.register_autograd(_differentiate, setup_context=_setup_context)
