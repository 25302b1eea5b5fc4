"""MRA-2 attention by CUDA kernels (mra.cu), as a registered operation.

q, k and v are read where they are, as parts of a larger tensor or turned, if all three lie alike with their last
dimension dense and rows at multiples of 16 bytes; else they are copied.  The result and the gradients lie as q does.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import forms
from ..constants import constant_when_compiled
from .reference import reference
from .selection import BLOCK, Options

HEAD_SIZES = range(16, 257, 8)
# Keys of blocks that matrices are selected by at a time; of one matrix, so many and more are shared by thread blocks,
# each of which has PART.
KEYS, ALONE, PART = 1 << 25, 1 << 16, 1 << 15
_DIGITS, _DIGIT_VALUES = 6, 1 << 11  # as selection.cuh


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Options) -> Tensor:
    """As ``mra_attention``; keeps q, k, v, the result, the maximum and sum of each query, the lists and the means of
    blocks.  What the kernels do not compute is the reference's."""
    if why := declined(q, k, v):
        if q.dtype != torch.float64:
            forms.declined("mra", why)
        return reference(q, k, v, mask, options)
    y: Tensor = _forward(q, k, v, mask, *options)[0]
    return y


def declined(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why there is no kernel for these; None: there is."""
    d, e = q.shape[3], v.shape[3]
    if len({x.dtype for x in (q, k, v)}) > 1 or q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"q, k, v of {q.dtype}, {k.dtype}, {v.dtype}: all must be float32, bfloat16 or float16"
    if d not in HEAD_SIZES or e != d:
        return f"head sizes {d} and {e}: must be one multiple of 8 from {HEAD_SIZES[0]} to {HEAD_SIZES[-1]}"
    if (need := _least_shared(d)) > _shared(q.device):
        return f"head size {d} needs {need >> 10} KiB of shared memory, which {q.device} does not have"
    return None


def _least_shared(d: int) -> int:
    """Bytes of a block of differentiate_columns (backward.cuh) with one group and one stage, of means in float32."""
    return 4 * BLOCK * (-(-d // 16) * 16 * 4 + 16) + 3 * BLOCK * 4


@constant_when_compiled
def _shared(device: torch.device) -> int:
    return _shared_of_gpu(device) if device.type == "cuda" else 160 << 10


@functools.cache
def _shared_of_gpu(device: torch.device) -> int:
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", 99 << 10))


def _like(q: Tensor) -> Tensor:
    """A tensor that lies as q does, rows dense."""
    y = torch.empty_like(q)
    return y if y.stride(3) == 1 else torch.empty_like(q, memory_format=torch.contiguous_format)


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Of the first three dimensions, 0 where they have one entry."""
    a, b, c = (stride if n > 1 else 0 for n, stride in zip(x.shape[:3], x.stride()[:3], strict=True))
    return a, b, c


def _inputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As the kernels read them."""
    alike = len({_strides(x) for x in (q, k, v)}) == 1
    if alike and all(
        x.stride(3) == 1 and not x.data_ptr() % 16 and not any(s * x.element_size() % 16 for s in _strides(x))
        for x in (q, k, v)
    ):
        return q, k, v
    q, k, v = (x.clone(memory_format=torch.contiguous_format) for x in (q, k, v))
    return q, k, v


def _kept(q: Tensor, budget: int, sparse: bool) -> list[Tensor]:
    """Beside y: norms, tokens, bits, pointers, columns, means, rest (mra.cu)."""
    n, h, l, d = q.shape
    nb, words = -(-l // BLOCK), -(-l // BLOCK**2)
    integers = [(n, nb), (n, h, nb, words), (n, h, nb + 1), (n, h, budget)]
    return [
        q.new_empty(2, n, h, nb * BLOCK, dtype=torch.float32),
        *(q.new_empty(shape, dtype=torch.int32) for shape in integers),
        q.new_empty(0 if sparse else 3, n, h, nb, d, dtype=torch.float32),
        q.new_empty(0 if sparse else 2, n, h, words * BLOCK, dtype=torch.float32),
    ]


@torch.library.custom_op("farspan::mra_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    budget: int,
    sparse: bool,
    first_blocks: int,
    diagonal_blocks: int,
) -> list[Tensor]:
    y, kept = _like(q), _kept(q, budget, sparse)
    n, h, l, d = q.shape
    nb = -(-l // BLOCK)
    if not n * h:
        return [y, *kept]
    q, k, v = _inputs(q, k, v)
    rest = kept[-1] if not sparse else None
    together = max(1, min(n * h, KEYS // nb**2))
    parts = 1 if nb**2 <= ALONE else -(-(nb**2) // PART)

    def scratch(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return q.new_empty(shape, dtype=dtype)

    forms.library("mra", q.device).call(
        "mra_forward",
        *(q, k, v, None if mask is None else mask.contiguous(), y, *kept[:5]),
        *(kept[5] if not sparse else None, rest, scratch(2, n * h, nb, d, dtype=torch.float64)),
        None if sparse else scratch(n * h, nb, d, dtype=torch.float32),
        scratch(together, nb, nb, dtype=torch.int64),
        scratch(2, together, nb),
        scratch(_DIGITS, together, 2, dtype=torch.int64),
        None if parts == 1 else scratch(_DIGITS, together, _DIGIT_VALUES),
        *(n, h, l, d, budget, min(first_blocks, nb), diagonal_blocks // 2 if diagonal_blocks else -1),
        *(*_strides(q), *_strides(y), d**-0.5, together, parts, _shared(q.device), forms.dtype_code(q.dtype)),
    )
    return [y, *kept]


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
) -> list[Tensor]:
    return [_like(q), *_kept(q, budget, sparse)]


@torch.library.custom_op("farspan::mra_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    of_y: Tensor,
    kept: list[Tensor],
    budget: int,
    sparse: bool,
    masked: bool,
) -> list[Tensor]:
    gradients = [torch.empty_like(y) for _ in range(3)]
    n, h, l, d = q.shape
    nb, words = -(-l // BLOCK), -(-l // BLOCK**2)
    if not n * h:
        return gradients
    q, k, v = _inputs(q, k, v)
    if _strides(of_y) != _strides(y) or of_y.stride(3) != 1 or of_y.data_ptr() % 16:
        of_y = torch.empty_like(y).copy_(of_y)

    def scratch(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return q.new_empty(shape, dtype=dtype)

    forms.library("mra", q.device).call(
        "mra_backward",
        *(q, k, v, y, of_y, *kept[:5], *([None] * 2 if sparse else kept[5:]), *gradients),
        *(scratch(n * h, nb, words), scratch(n * h, nb + 1), scratch(n * h, budget), scratch(n * h, nb)),
        scratch(3, n * h, nb * BLOCK, dtype=torch.float32),
        None if sparse else scratch(3, n * h, words * BLOCK, dtype=torch.float32),
        None if sparse else scratch(4, n * h, nb, d, dtype=torch.float32),
        *(n, h, l, d, budget, int(masked), *_strides(q), *_strides(y), d**-0.5),
        *(_shared(q.device), forms.dtype_code(q.dtype)),
    )
    return gradients


@_backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    of_y: Tensor,
    kept: list[Tensor],
    budget: int,
    sparse: bool,
    masked: bool,
) -> list[Tensor]:
    return [torch.empty_like(y) for _ in range(3)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    q, k, v, mask, budget, sparse, _, _ = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.options = budget, sparse, mask is not None
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, of_results: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    q, k, v, y, *kept = ctx.saved_tensors
    of_y = of_results[0]
    gradients = [None] * 3 if of_y is None else _backward(q, k, v, y, of_y, kept, *ctx.options)
    return *gradients, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)
