"""Softmax attention within documents with dropout of its weights, by CUDA kernels (attention.cu), as a registered
operation.  The masks are those of ``kernels.dropout``, bit for bit; the weights are never in memory.

q, k and v are read where they are, as parts of a larger tensor, if all three lie alike with their last dimension dense
and tokens at multiples of 16 bytes; else they are copied.  Results and gradients are dense.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import forms
from ..documents import Documents
from ..dropout import threshold

HEAD_SIZES = range(16, 129, 8)
DTYPES = (torch.bfloat16, torch.float16)


def computes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether there is a kernel for these: 16 bit numbers and heads of 16 to 128 features, a multiple of 8.  Float32 is
    not among them, as tensor cores have no products of it; nor are tensors of 16 GiB, where places would overflow."""
    alike = q.shape == k.shape == v.shape and q.dtype == k.dtype == v.dtype
    known = alike and q.dtype in DTYPES and q.shape[-1] in HEAD_SIZES and q.numel() < 1 << 32
    return known and forms.compiled("attention", q.device)


def fused(q: Tensor, k: Tensor, v: Tensor, documents: Documents, p: float, keys: Tensor) -> Tensor:
    """As ``attention`` with dropout alone, [s, b, h, d] each; zeros for padding.  Keeps q, k, v, the result and the
    logarithm of the sum of exponentials of each query."""
    tiles, everywhere = documents.tiles
    y, _ = _forward(q, k, v, keys, tiles, threshold(p), documents.causal, everywhere)
    return y


def _inputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As the kernels read them."""
    alike = q.stride() == k.stride() == v.stride()
    if alike and all(
        x.stride(3) == 1 and not x.data_ptr() % 16 and not any(stride % 8 for stride in x.stride()[:3])
        for x in (q, k, v)
    ):
        return q, k, v
    q, k, v = (x.clone(memory_format=torch.contiguous_format) for x in (q, k, v))
    return q, k, v


def _dense(x: Tensor) -> Tensor:
    """Contiguous and where 16 bytes can be read at once."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def _results(q: Tensor, everywhere: bool, count: int) -> list[Tensor]:
    """Like q, but dense; zeros where there may be padding."""
    make = torch.empty_like if everywhere else torch.zeros_like
    return [make(q, memory_format=torch.contiguous_format) for _ in range(count)]


def _logarithms(q: Tensor, everywhere: bool) -> Tensor:
    s, b, h, _ = q.shape
    return (torch.empty if everywhere else torch.zeros)(h, b, s, dtype=torch.float32, device=q.device)


def _numbers(q: Tensor, tiles: Tensor, cut: int, causal: bool) -> tuple[int | float, ...]:
    return (
        len(tiles),
        *q.shape,
        *(stride // 8 for stride in q.stride()[:3]),
        q.shape[3] ** -0.5,
        cut,
        causal,
        forms.dtype_code(q.dtype),
    )


@torch.library.custom_op("farspan::attention_forward", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, tiles: Tensor, cut: int, causal: bool, everywhere: bool
) -> tuple[Tensor, Tensor]:
    """q, k, v: [s, b, h, d]; keys: [h, s, b] int64; tiles, everywhere: ``Documents.tiles``; cut: ``threshold(p)`` →
    the result, the logarithms [h, b, s]."""
    (y,), logarithms = _results(q, everywhere, 1), _logarithms(q, everywhere)
    if len(tiles) and y.numel():
        q, k, v = _inputs(q, k, v)
        forms.library("attention", q.device).call(
            "attention_forward",
            *(q, k, v, keys.contiguous(), tiles, y, logarithms),
            *_numbers(q, tiles, cut, causal),
        )
    return y, logarithms


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, tiles: Tensor, cut: int, causal: bool, everywhere: bool
) -> tuple[Tensor, Tensor]:
    return _results(q, everywhere, 1)[0], _logarithms(q, everywhere)


@torch.library.custom_op("farspan::attention_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    tiles: Tensor,
    y: Tensor,
    logarithms: Tensor,
    of_y: Tensor,
    cut: int,
    causal: bool,
    everywhere: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    of_q, of_k, of_v = _results(q, everywhere, 3)
    if len(tiles) and y.numel():
        q, k, v = _inputs(q, k, v)
        s, b, h, _ = q.shape
        forms.library("attention", q.device).call(
            "attention_backward",
            *(q, k, v, y, _dense(of_y), logarithms, keys.contiguous(), tiles),
            torch.empty(h, b, s, 4, dtype=torch.int32, device=q.device),
            *(of_q, of_k, of_v),
            *_numbers(q, tiles, cut, causal),
        )
    return of_q, of_k, of_v


@_backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    tiles: Tensor,
    y: Tensor,
    logarithms: Tensor,
    of_y: Tensor,
    cut: int,
    causal: bool,
    everywhere: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    of_q, of_k, of_v = _results(q, everywhere, 3)
    return of_q, of_k, of_v


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, keys, tiles, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, keys, tiles, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, of_y: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = (None,) * 3 if of_y is None else _backward(*ctx.saved_tensors, of_y, *ctx.numbers)
    return *gradients, *(None,) * 5


_forward.register_autograd(_differentiate, setup_context=_keep)
