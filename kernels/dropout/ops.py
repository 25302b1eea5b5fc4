"""Dropout, with or without the addition after it, as one kernel: the masks of ``reference``, bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import forms
from ..constants import constant_when_compiled
from . import reference


@torch.library.custom_op("farspan::dropout", mutates_args=())
def masked(x: Tensor, residual: Tensor | None, keys: Tensor, firsts: Tensor | None, first: int, cut: int) -> Tensor:
    """residual + dropout(x), [..., features].

    keys, firsts: int64 that broadcast to x.shape[:-1]; firsts None: ``first`` for all; cut: ``reference.threshold``.
    """
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel():
        shape, features = x.shape[:-1], x.shape[-1]
        forms.library("dropout", x.device).call(
            "dropout_apply",
            dense(x),
            None if residual is None else dense(residual),
            y,
            keys.expand(shape).contiguous(),
            None if firsts is None else firsts.expand(shape).contiguous(),
            y.numel() // features,
            features,
            first,
            cut,
            forms.dtype_code(x.dtype),
        )
    return y


@masked.register_fake
def _(x: Tensor, residual: Tensor | None, keys: Tensor, firsts: Tensor | None, first: int, cut: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, keys, firsts, *ctx.numbers = inputs
    ctx.save_for_backward(keys, firsts)


def _backward(ctx: Any, of_y: Tensor) -> tuple[Tensor | None, ...]:
    of_x, of_residual, *_ = ctx.needs_input_grad
    keys, firsts = ctx.saved_tensors
    return (
        masked(of_y, None, keys, firsts, *ctx.numbers) if of_x else None,
        of_y if of_residual else None,
        *(None,) * 4,
    )


masked.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("farspan::dropout_keys", mutates_args=())
def row_keys(seed: int, step: int, stream: int, samples: Tensor, positions: Tensor) -> Tensor:
    """``DropoutKey.rows``, of at most three dimensions by one small kernel instead of a dozen.

    An operation of torch with the step in it, so that a graph's compiler does not go through numbers of more than 64
    bits, and not again for every step.
    """
    base, shape = reference.base_key(seed, step, stream), torch.broadcast_shapes(samples.shape, positions.shape)
    small = len(shape) <= 3 and samples.dtype == positions.dtype == torch.int64 and samples.device == positions.device
    if not small or not forms.compiled("dropout", samples.device):
        return reference.row_keys(base, samples, positions)
    keys = samples.new_empty(shape)
    if keys.numel():
        # Strides of 0 where numbers are repeated; dimensions of 1 before the others.
        spread = [t.expand(shape)[(None,) * (3 - len(shape))] for t in (samples, positions)]
        strides = [stride for t in spread for stride in t.stride()]
        library = forms.library("dropout", keys.device)
        library.call("dropout_keys", samples, positions, keys, base, *spread[0].shape, *strides)
    return keys


@row_keys.register_fake
def _(seed: int, step: int, stream: int, samples: Tensor, positions: Tensor) -> Tensor:
    return samples.new_empty(torch.broadcast_shapes(samples.shape, positions.shape))


@constant_when_compiled
def is_processors(operation: str, device: torch.device) -> bool:
    """Whether the compiled form, where there is one, is the CPU's own, not a device's or its emulation."""
    return forms.library(operation, device).threads


def computes(operation: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the compiled form computes in ``dtype``; said where not."""
    known = (torch.float32, torch.bfloat16, torch.float16)[: 2 if is_processors(operation, device) else 3]
    if dtype not in known:
        forms.declined(operation, f"{dtype} on {device.type}, not one of {', '.join(map(str, known))}")
    return dtype in known


def dense(x: Tensor) -> Tensor:
    """Contiguous and where 16 bytes can be read at once: a part of another tensor may begin anywhere."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x
