"""The form in CUDA (ema.cu) as operations that torch knows.

Not in the kernel: truncation, for which ``_form`` takes "chunked", and the last hidden state after other than whole
chunks of 64 positions: the rest is then computed by ``chunked``.  Hidden dimensions over 16 are a second average, added
in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import forms
from ..constants import constant_when_compiled
from ..documents import Documents
from . import layout
from .chunked import chunked

HIDDEN = 16  # dimensions that a warp works on
# Of slab.cuh: pieces of a number, the most tiles in a segment, features of a block and its warps, of either kernel.
_FORMS = {
    torch.bfloat16: (1, 4, (16, 8), (8, 8)),
    torch.float16: (2, 2, (8, 8), (8, 8)),
    torch.float32: (3, 2, (8, 4), (8, 4)),
}
_SCRATCH = (928, 1296)  # float32 numbers of a warp
DTYPES = tuple(_FORMS)


def why_not(x: Tensor, damping: Tensor) -> str | None:
    """None: ``fused`` can be used."""
    if damping.shape[-1] > 2 * HIDDEN:
        return f"{damping.shape[-1]} hidden dimensions, it takes up to {2 * HIDDEN}"
    if not _tiles(x.dtype if damping.shape[-1] <= HIDDEN else torch.float32, x.device):
        return "a block of this GPU has too little shared memory"
    return None


def fused(
    x: Tensor,
    damping: Tensor,
    decay: Tensor,
    expansion: Tensor,
    projection: Tensor,
    *,
    documents: Documents | None,
    start: Tensor | None,
    truncation: int | None,
    carry: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As ``chunked``, x of float32, bfloat16 or float16 and without truncation; the last state only with ``carry``."""
    assert truncation is None
    parameters = [t.float() for t in (damping, decay, expansion, projection)]
    start = None if start is None else start.float()
    if not carry:
        return _average(x, parameters, documents, start, carry=False)[0], None
    whole = len(x) // layout.POSITIONS * layout.POSITIONS
    if not whole:
        return chunked(x, *parameters, documents=None, start=start, truncation=None)
    y, last = _average(x[:whole], parameters, None, start, carry=True)
    if whole == len(x):
        return y, last
    rest, last = chunked(x[whole:], *parameters, documents=None, start=last, truncation=None)
    return torch.cat((y, rest)), last


def _average(
    x: Tensor, parameters: list[Tensor], documents: Documents | None, start: Tensor | None, *, carry: bool
) -> tuple[Tensor, Tensor | None]:
    hidden, dtype = parameters[0].shape[-1], x.dtype
    if hidden > HIDDEN:
        x = x.float()
    chunks, segments, tiles, split = None, None, 0, False
    if documents is not None:
        groups = -(-x.shape[2] // _FORMS[x.dtype][2][0])
        made = layout.of_documents(documents, groups, _tiles(x.dtype, x.device))
        chunks, segments, tiles, split = made.chunks, made.segments, made.tiles, made.split
    y, last = [], []
    for i in range(0, hidden, HIDDEN):
        part = slice(i, i + HIDDEN)
        of_part = (*(p[..., part] for p in parameters), None if start is None else start[..., part])
        of_y, of_last = ema_forward(x, *of_part, chunks, segments, tiles, split, hidden, carry)
        y.append(of_y)
        last.append(of_last)
    if len(y) == 1:
        return y[0], last[0] if carry else None
    return (y[0] + y[1]).to(dtype), torch.cat(last, -1) if carry else None


@torch.library.custom_op("farspan::ema_forward", mutates_args=())
def ema_forward(
    x: Tensor,
    damping: Tensor,
    decay: Tensor,
    expansion: Tensor,
    projection: Tensor,
    start: Tensor | None,
    chunks: Tensor | None,
    segments: Tensor | None,
    tiles: int,
    split: bool,
    hidden: int,
    carry: bool,
) -> tuple[Tensor, Tensor]:
    """x: [s, b, d], with ``carry`` s a multiple of 64; parameters: [directions, d, n ≤ 16] float32; start: [b, d, n]
    float32, of one direction; chunks, segments, tiles, split: a ``Layout``, None: each row is a document; hidden: the
    dimensions of the whole average.  → y [s, b, d] and the last state [b, d, n], [0] without ``carry``."""
    x, (damping, decay, expansion, projection) = x.contiguous(), _contiguous(damping, decay, expansion, projection)
    start = None if start is None else start.contiguous()
    (_, b, d), (directions, _, n) = x.shape, damping.shape
    y, last = torch.empty_like(x), damping.new_empty((b, d, n) if carry else 0)
    if not x.numel():
        return y, last.zero_()
    made = _made(x, chunks, segments, tiles, split, start is not None or carry)
    count = len(made.segments) - 1
    work = damping.new_empty(2, count, directions, d, n) if made.split else None
    forms.library("ema", x.device).call(
        "ema_forward", x, y, damping, decay, expansion, projection, start, last if carry else None, made.chunks,
        made.segments, work, b, d, n, directions, hidden**-0.5, count, made.tiles, int(made.split),
        forms.dtype_code(x.dtype),
    )  # fmt: skip
    return y, last


@ema_forward.register_fake
def _(
    x: Tensor, damping: Tensor, decay: Tensor, expansion: Tensor, projection: Tensor, start: Tensor | None,
    chunks: Tensor | None, segments: Tensor | None, tiles: int, split: bool, hidden: int, carry: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _, b, d = x.shape
    return x.new_empty(x.shape), damping.new_empty((b, d, damping.shape[-1]) if carry else (0,))


@torch.library.custom_op("farspan::ema_backward", mutates_args=())
def ema_backward(
    of_y: Tensor,
    of_last: Tensor | None,
    x: Tensor,
    damping: Tensor,
    decay: Tensor,
    expansion: Tensor,
    projection: Tensor,
    start: Tensor | None,
    chunks: Tensor | None,
    segments: Tensor | None,
    tiles: int,
    split: bool,
    hidden: int,
    carry: bool,
    of_x_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of y and of the last state, and what ``ema_forward`` was given → those of x ([0] where not wanted),
    damping, decay, expansion, projection and start ([0] where there was none)."""
    x, of_y, (damping, decay, expansion, projection) = (
        x.contiguous(), of_y.contiguous(), _contiguous(damping, decay, expansion, projection)
    )  # fmt: skip
    start = None if start is None else start.contiguous()
    of_last = None if of_last is None else of_last.contiguous()
    (_, b, d), (directions, _, n) = x.shape, damping.shape
    of_x = torch.empty_like(x) if of_x_wanted else x.new_empty(0)
    of_start = damping.new_empty(0) if start is None else torch.empty_like(start)
    if not x.numel():
        zeros = [torch.zeros_like(p) for p in (damping, decay, expansion, projection)]
        return of_x, zeros[0], zeros[1], zeros[2], zeros[3], of_start.zero_()
    of = [torch.empty_like(p) for p in (damping, decay, expansion, projection)]
    states = start is not None or carry
    made = _made(x, chunks, segments, tiles, split, states)
    count = len(made.segments) - 1
    work = damping.new_empty(6 if made.split else 3, count, directions, d, n)
    forms.library("ema", x.device).call(
        "ema_backward", x, of_y, of_last, of_x if of_x_wanted else None, None if start is None else of_start, *of,
        damping, decay, expansion, projection, start, made.chunks, made.segments, work, b, d, n, directions,
        hidden**-0.5, count, made.tiles, int(made.split), int(states), forms.dtype_code(x.dtype),
    )  # fmt: skip
    return of_x, of[0], of[1], of[2], of[3], of_start


@ema_backward.register_fake
def _(
    of_y: Tensor, of_last: Tensor | None, x: Tensor, damping: Tensor, decay: Tensor, expansion: Tensor,
    projection: Tensor, start: Tensor | None, chunks: Tensor | None, segments: Tensor | None, tiles: int, split: bool,
    hidden: int, carry: bool, of_x_wanted: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    of = (p.new_empty(p.shape) for p in (damping, decay, expansion, projection))
    of_start = damping.new_empty((0,) if start is None else start.shape)
    return x.new_empty(x.shape if of_x_wanted else (0,)), *of, of_start


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.others = inputs[8:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, of_y: Tensor | None, of_last: Tensor | None) -> tuple[Tensor | None, ...]:
    kept, carry, wanted = ctx.saved_tensors, ctx.others[-1], ctx.needs_input_grad
    if of_y is None:
        of_y = torch.zeros_like(kept[0])
    of = ema_backward(of_y, of_last if carry else None, *kept, *ctx.others, wanted[0])
    given = [gradient if want else None for gradient, want in zip(of, wanted[:6], strict=True)]
    return *given[:5], None if kept[5] is None else given[5], *(None,) * 6


ema_forward.register_autograd(_differentiate, setup_context=_keep)


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    return [t.contiguous() for t in tensors]


def _made(
    x: Tensor, chunks: Tensor | None, segments: Tensor | None, tiles: int, split: bool, states: bool
) -> layout.Layout:
    if chunks is not None and segments is not None:
        return layout.Layout(chunks, segments, tiles, split)
    s, b, d = x.shape
    groups = -(-d // _FORMS[x.dtype][2][0])
    return layout.of_rows(s, b, groups, _tiles(x.dtype, x.device), states, x.device)


@constant_when_compiled
def _tiles(dtype: torch.dtype, device: torch.device) -> int:
    """The most that a segment can have on this device, 0: none."""
    available = 227 * 1024
    if device.type == "cuda":
        properties: Any = torch.cuda.get_device_properties(device)
        available = int(properties.shared_memory_per_block_optin)
    pieces, most, features, warps = _FORMS[dtype]
    for tiles in range(most, 0, -1):
        slab = tiles * layout.TILE * layout.POSITIONS * 2 * pieces
        rest = tiles * layout.TILE * 16
        forward = features[0] * slab + rest + 4 * warps[0] * _SCRATCH[0]
        backward = 2 * features[1] * slab + rest + 4 * warps[1] * _SCRATCH[1]
        if max(forward, backward) <= available:
            return tiles
    return 0
