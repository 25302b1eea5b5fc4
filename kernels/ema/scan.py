"""Sums over the chunks of each lane.  Tensors are [m, ...], chunks in the order that lanes.py sets."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

Counts = tuple[int, ...]


def scan(u: Tensor, change: Tensor, counts: Counts, *, backwards: bool) -> Tensor:
    """S_0 = 0, S_{c+1} = S_c + change · S_c + u_c over the chunks c of each lane; ``backwards``: from the last one.

    u: [m, ...]; change: [...], the decay over a chunk less 1 (which alone is accurate where the decay is close to 1).
    Linear in m; deterministic.
    """
    return _Scan.apply(u, change, counts, backwards)  # type: ignore[no-any-return]


def shift(x: Tensor, steps: int, counts: Counts, dim: int = 0) -> Tensor:
    """y_c = x_{c - steps} in each lane, 0 where there is none; ``steps`` may be negative.  ``dim``: that of chunks."""
    return _Shift.apply(x, steps, counts, dim)  # type: ignore[no-any-return]


def window(u: Tensor, log_decay: Tensor, length: int, counts: Counts, *, backwards: bool) -> Tensor:
    """As ``scan``, of the last ``length`` chunks only: S_c = Σ_{j=1..length} exp((j − 1) log_decay) u_{c-j}.

    By doubling the length: sums only, where the difference of two scans would cancel.
    """
    sign = -1 if backwards else 1
    power, power_length = shift(u, sign, counts), 1
    total, total_length = torch.zeros_like(u), 0
    while True:
        if length & power_length:
            total = total + (log_decay * total_length).exp() * shift(power, sign * total_length, counts)
            total_length += power_length
        if total_length == length:
            return total
        power = power + (log_decay * power_length).exp() * shift(power, sign * power_length, counts)
        power_length *= 2


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, change: Tensor, counts: Counts, backwards: bool) -> Tensor:
        total = _scan(u, change, counts, backwards)
        ctx.save_for_backward(total, change)
        ctx.counts, ctx.backwards = counts, backwards
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        total, change = ctx.saved_tensors
        of_u = _scan(gradient, change, ctx.counts, not ctx.backwards)  # the adjoint runs the other way
        return of_u, (of_u * total).sum(0), None, None


def _scan(u: Tensor, change: Tensor, counts: Counts, backwards: bool) -> Tensor:
    total = torch.zeros_like(u, memory_format=torch.contiguous_format)
    terms, sums = u.split(counts), total.split(counts)
    order = range(len(counts))
    for before, after in itertools.pairwise(reversed(order) if backwards else order):
        n = counts[max(before, after)]
        known = sums[before][:n]
        torch.add(known, terms[before][:n], out=sums[after][:n]).addcmul_(known, change)
    return total


class _Shift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, steps: int, counts: Counts, dim: int) -> Tensor:
        ctx.steps, ctx.counts, ctx.dim = steps, counts, dim
        return _shift(x, steps, counts, dim)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _shift(gradient, -ctx.steps, ctx.counts, ctx.dim), None, None, None


def _shift(x: Tensor, steps: int, counts: Counts, dim: int) -> Tensor:
    y, by = torch.zeros_like(x), abs(steps)
    if by >= len(counts):
        return y
    # Chunk c of a lane and the one ``by`` steps after it: as many as there are of the later one.
    if counts[0] == counts[-1]:
        n = x.shape[dim] - by * counts[0]
        pieces = [((0, n), (by * counts[0], n))]
    else:
        first = [0, *itertools.accumulate(counts)]
        pieces = [((first[c], counts[c + by]), (first[c + by], counts[c + by])) for c in range(len(counts) - by)]
    for early, late in pieces:
        source, target = (early, late) if steps > 0 else (late, early)
        y.narrow(dim, *target).copy_(x.narrow(dim, *source))
    return y
