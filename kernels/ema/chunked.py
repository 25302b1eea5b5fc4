"""The moving average by chunks of C positions, in plain PyTorch, linear in length.

A chunk X [C] of a feature gives y = T X + B S, where T [C, C] has the kernel at the lags within the chunk (T_ij =
k[i − j]) and S [n] is the hidden state before it, a sum over the chunks before: S ← q^C S + A X.  With two directions T
has both triangles, and a second S comes from the chunks after it.  All are batched matrix products over features.
Neither an FFT nor a kernel as long as the input is made.

Letters: d features, n hidden dimensions, m chunks (of all lanes, see lanes.py), C positions a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..documents import Documents
from .coefficients import Coefficients
from .lanes import Lanes, Rows
from .scan import scan, shift, window

# Inputs that are worked on at once: features are independent, and a slab of them at a time stays in the cache and
# keeps peak memory low.  Not fewer features than the second, for the loops over chunks.
SLAB, FEATURES = 2**20, 64


def chunked(
    x: Tensor,
    damping: Tensor,
    decay: Tensor,
    expansion: Tensor,
    projection: Tensor,
    *,
    documents: Documents | None,
    start: Tensor | None,
    truncation: int | None,
) -> tuple[Tensor, Tensor | None]:
    """
    x: [s, b, d]; the parameters: [directions, d, n]; documents: each a lane (None: each row is one); start: [b, d, n].
    Returns y [s, b, d] in x's dtype and, where rows are lanes and nothing is truncated, the last hidden state of the
    first direction [b, d, n].  Keeps its inputs for the backward pass, which computes the rest again.
    """
    lanes = Lanes.of(x, documents)
    if truncation is not None and truncation >= lanes.chunk * len(lanes.counts):
        truncation = None
    tensors = (x, damping, decay, expansion, projection)
    y, last = _Chunked.apply(lanes, truncation, *tensors, *(() if start is None else (start,)))
    return y, last


class _Chunked(torch.autograd.Function):
    """Of x, the four parameters and, where there is one, the first state."""

    @staticmethod
    def forward(
        ctx: Any, lanes: Lanes, truncation: int | None, x: Tensor, *others: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        ctx.lanes, ctx.truncation = lanes, truncation
        ctx.save_for_backward(x, *others)
        ctx.set_materialize_grads(False)
        y, states = torch.empty_like(x, memory_format=torch.contiguous_format), []
        for slab in _slabs(x):
            of_slab, last = _convolve(lanes, truncation, *_parts(lanes, slab, x, *others))
            lanes.put(of_slab, y[..., slab])
            if last is not None:
                states.append(last)
        return y, torch.cat(states, 1) if states else None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_y: Tensor | None, of_last: Tensor | None) -> tuple[Tensor | None, ...]:
        lanes, (x, *others) = ctx.lanes, ctx.saved_tensors
        of_x, *of_others = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, *others))
        for slab in _slabs(x):
            leaves = [t.detach().requires_grad_() for t in _parts(lanes, slab, x, *others)]
            with torch.enable_grad():
                y, last = _convolve(lanes, ctx.truncation, *leaves)
            outputs, upstream = [], []
            if of_y is not None:
                outputs.append(y)
                upstream.append(lanes.chunks(of_y[..., slab], y.dtype))
            if of_last is not None and last is not None:
                outputs.append(last)
                upstream.append(of_last[:, slab])
            of_chunks, *parts = torch.autograd.grad(
                outputs, leaves, upstream, allow_unused=True, materialize_grads=True
            )
            lanes.put(of_chunks, of_x[..., slab])
            for whole, part in zip(of_others, parts, strict=True):
                whole[:, slab] = part
        return None, None, of_x, *of_others


def _slabs(x: Tensor) -> list[slice]:
    s, b, d = x.shape
    features = max(SLAB // (s * b), FEATURES)
    return [slice(at, at + features) for at in range(0, d, features)]


def _parts(lanes: Lanes, slab: slice, x: Tensor, *others: Tensor) -> list[Tensor]:
    """Of some features: x [s, b, d] in chunks, and the others, whose second dimension is features."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return [lanes.chunks(x[..., slab], dtype), *(t[:, slab] for t in others)]


def _convolve(
    lanes: Lanes,
    truncation: int | None,
    x: Tensor,
    damping: Tensor,
    decay: Tensor,
    expansion: Tensor,
    projection: Tensor,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """x: [d, m, C] → y [d, m, C] and the last hidden state; autograd keeps what it makes."""
    c = Coefficients.of(x.dtype, damping, decay, expansion, projection)
    size, steps, directions = lanes.chunk, len(lanes.counts), len(c.log_q)

    lines = [_kernel(c, k, 0, size, truncation) for k in range(directions)]
    line = F.pad(lines[0], (size - 1, 0))
    if directions == 2:
        line = line + F.pad(lines[1].flip(-1), (0, size - 1))  # both have lag 0
    y, last = x @ _toeplitz(line), None

    # Chunks before that are within the truncation for every position, and the two at most that are so for some.
    whole = None if truncation is None else max(truncation // size - 1, 0)
    for k in range(directions):
        if whole != 0:
            y, last_of_k = _carry(lanes, c, k, whole, x, y, start)
            last = last_of_k if directions == 1 else None
        if whole is None or truncation is None:
            continue
        for by in range(whole + 1, min(whole + 3, steps)):
            line = _kernel(c, k, (by - 1) * size + 1, 2 * size - 1, truncation)
            line, by = (line.flip(-1), -by) if k else (line, by)
            y = y.baddbmm_(shift(x, by, lanes.counts, dim=1), _toeplitz(line))
    return y, last


def _carry(
    lanes: Lanes, c: Coefficients, k: int, length: int | None, x: Tensor, y: Tensor, start: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """y with what comes from the ``length`` (None: all) chunks before, or for k = 1 after; and the last state."""
    size, counts = lanes.chunk, lanes.counts
    powers = _powers(c.log_q[k], 0, size + 1)
    to_state = c.inject[k].unsqueeze(-1) * powers[..., :-1].flip(-1)  # [d, n, C]
    from_state = c.project[k].unsqueeze(-1) * powers[..., 1:]
    if k:
        to_state, from_state = to_state.flip(-1), from_state.flip(-1)
    u = (x @ to_state.mT).transpose(0, 1)
    log_decay = c.log_q[k] * size
    if length is not None:
        state = window(u, log_decay, length, counts, backwards=bool(k))
    elif start is not None:
        u, steps = torch.cat((start.to(u.dtype), u)), (len(start), *counts)  # one chunk more before each lane
        state = scan(u, log_decay.expm1(), steps, backwards=False)[len(start) :]
    else:
        state = scan(u, log_decay.expm1(), counts, backwards=bool(k))
    y = y.baddbmm_(state.transpose(0, 1), from_state)
    if length is not None or k or not isinstance(lanes, Rows):
        return y, None
    rest, b = lanes.rest, counts[-1]
    of_rest = x[:, -b:, :rest] @ to_state[..., size - rest :].mT
    return y, powers[..., rest] * state[-b:] + of_rest.transpose(0, 1)


def _powers(log_q: Tensor, first: int, number: int) -> Tensor:
    """[d, n] → q^l [d, n, number] for l from ``first`` on."""
    lags = torch.arange(first, first + number, device=log_q.device, dtype=log_q.dtype)
    return (log_q.unsqueeze(-1) * lags).exp()


def _kernel(c: Coefficients, k: int, first: int, number: int, truncation: int | None) -> Tensor:
    """[d, number] at lags from ``first`` on."""
    weight = (c.project[k] * c.inject[k]).unsqueeze(-2)
    line = (weight @ _powers(c.log_q[k], first, number)).squeeze(-2)
    if truncation is None or truncation >= first + number:
        return line
    within = max(truncation - first, 0)
    return F.pad(line[..., :within], (0, number - within))


def _toeplitz(line: Tensor) -> Tensor:
    """[d, 2 C − 1] at lags 1 − C to C − 1 → [d, C, C], to be multiplied from the right: input position, output's."""
    return line.unfold(-1, (line.shape[-1] + 1) // 2, 1).flip(1)
