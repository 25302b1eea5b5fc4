"""The form in CUDA (pinv.cu) as operations that torch knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import forms
from ..constants import constant_when_compiled

ROWS, ITERATIONS = 64, 12  # at most: of a matrix in shared memory, and with scales that are fixed (pinv.cu)
# Bytes of shared memory that a block takes, by the rows that matrices are padded to: see pinv.cu.
SHARED = {rows: 9 * 4 * rows * (rows + 8) + 64 for rows in (32, 64)}


def why_not(a: Tensor, start: Tensor, iterations: int) -> str | None:
    """None: ``pinv`` can be used."""
    if not 1 <= a.shape[-1] <= ROWS:
        return f"matrices of {a.shape[-1]} rows, it takes 1 to {ROWS}"
    if not 0 <= iterations <= ITERATIONS:
        return f"{iterations} iterations, it takes 0 to {ITERATIONS}"
    if start.numel() > 1 and start.shape[-2:] != (1, 1):
        return f"a start of shape {list(start.shape)}, it takes one number a matrix, [..., 1, 1]"
    if a.is_cuda and _shared_memory(a.device) < SHARED[_padded(a.shape[-1])]:
        return "a block of this GPU has too little shared memory"
    return None


def pinv(a: Tensor, start: Tensor, iterations: int) -> Tensor:
    """As ``iterative_pinv``, float32."""
    m = a.shape[-1]
    of_each = start.expand(*a.shape[:-2], 1, 1)
    inverse: Tensor = pinv_forward(a.reshape(-1, m, m), of_each.reshape(-1), iterations)
    return inverse.view(a.shape)


@torch.library.custom_op("farspan::pinv_forward", mutates_args=())
def pinv_forward(a: Tensor, start: Tensor, iterations: int) -> Tensor:
    """a: [matrices, m, m]; start: [matrices]; float32 → [matrices, m, m]."""
    a, start = a.contiguous(), start.contiguous()
    z = torch.empty_like(a)
    if a.numel():
        forms.library("pinv", a.device).call("pinv_forward", a, start, z, len(a), a.shape[-1], iterations)
    return z


@pinv_forward.register_fake
def _(a: Tensor, start: Tensor, iterations: int) -> Tensor:
    return a.new_empty(a.shape)


@torch.library.custom_op("farspan::pinv_backward", mutates_args=())
def pinv_backward(gradient: Tensor, a: Tensor, start: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """gradient: of the result [matrices, m, m] → those of a and start."""
    gradient, a, start = gradient.contiguous(), a.contiguous(), start.contiguous()
    of_a, of_start = torch.empty_like(a), torch.empty_like(start)
    if a.numel():
        m = a.shape[-1]
        scratch = a.new_empty(len(a), max(iterations - 1, 0), _padded(m), _padded(m))
        call = forms.library("pinv", a.device).call
        call("pinv_backward", gradient, a, start, of_a, of_start, scratch, len(a), m, iterations)
    return of_a, of_start


@pinv_backward.register_fake
def _(gradient: Tensor, a: Tensor, start: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape), start.new_empty(start.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    a, start, ctx.iterations = inputs
    ctx.save_for_backward(a, start)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    of_a, of_start = pinv_backward(gradient, *ctx.saved_tensors, ctx.iterations)
    return of_a if ctx.needs_input_grad[0] else None, of_start if ctx.needs_input_grad[1] else None, None


pinv_forward.register_autograd(_differentiate, setup_context=_keep)


def _padded(m: int) -> int:
    """The rows that the kernel computes with."""
    return 32 if m <= 32 else 64


@constant_when_compiled
def _shared_memory(device: torch.device) -> int:
    """The bytes that a block can have."""
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)  # type: ignore[attr-defined]
