"""Matrices for the iterated pseudo-inverse in CUDA, and how near float64 it must come: on any device that runs it."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from comparison import assert_identical, difference
from torch import Tensor

from farspan.kernels.pinv import column_maximum, iterative_pinv, reference

# Of the reference's own error in float32, of the middle and of the worst of the matrices (those near singular ones
# multiply what is rounded); and what is no error even where the reference happens to have none.
MIDDLE, WORST, LEAST = 4.0, 10.0, 1e-6

Run = Callable[[Tensor, Tensor, int], Tensor]
Case = tuple[Tensor, Tensor]  # [matrices, m, m], a start [matrices, 1, 1]; float32


def softmax_matrices(matrices: int, m: int, spread: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(matrices, m, m, generator=generator)).softmax(-1)


def _softmax(matrices: int, m: int, spread: float) -> Case:
    a = softmax_matrices(matrices, m, spread)
    return a, column_maximum(a)


def _peaked(matrices: int, m: int) -> Case:
    a = (softmax_matrices(matrices, m, 2.0) + torch.eye(m)) / 2
    return a, column_maximum(a).amax().expand(matrices, 1, 1)


def _absent(matrices: int, m: int) -> Case:
    """Without some landmarks; the first without any.  The last one's start is said to be 0."""
    a = softmax_matrices(matrices, m, 2.0)
    there = torch.rand(matrices, m, generator=torch.Generator().manual_seed(1)) < 0.6
    there[0] = False
    a = a * (there[:, :, None] & there[:, None])
    start = column_maximum(a)
    start[-1] = 0
    return a, start


def _scaled(matrices: int, m: int) -> Case:
    """Sizes from 1e-9 to 1e9, and of both signs."""
    a = softmax_matrices(matrices, m, 2.0) * torch.randn(m, generator=torch.Generator().manual_seed(2)).sign()
    a = a * torch.logspace(-9, 9, matrices)[:, None, None]
    return a, a.abs().sum(-1).amax(-1)[:, None, None] * a.abs().sum(-2).amax(-1)[:, None, None]


def _started(matrices: int, m: int, times: float) -> Case:
    """From a start that is larger or smaller than it should be."""
    a, start = _softmax(matrices, m, 4.0)
    return a, start * times


CASES: dict[str, Callable[[], Case]] = {
    "one number": lambda: _softmax(3, 1, 1.0),
    "few rows": lambda: _softmax(3, 5, 1.0),
    "a full small one": lambda: _softmax(2, 32, 3.0),
    "one row more": lambda: _softmax(1, 33, 2.0),
    "64 rows": lambda: _softmax(1, 64, 1.0),
    "near the identity": lambda: _peaked(2, 24),
    "absent landmarks": lambda: _absent(3, 12),
    "other sizes": lambda: _scaled(5, 9),
    "a large start": lambda: _started(2, 16, 100.0),
    "a small start": lambda: _started(2, 16, 0.4),
}


def outputs_and_gradients(run: Run, case: Case, iterations: int, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    a, start = (x.detach().to(dtype or x.dtype).requires_grad_() for x in case)
    z = run(a, start, iterations)
    weights = torch.linspace(-1, 2, z.numel(), dtype=torch.float64).sin().view(z.shape).to(z)
    of_a, of_start = torch.autograd.grad((z * weights).sum(), (a, start))
    return {"z": z.detach(), "gradient of a": of_a, "gradient of start": of_start}


def assert_accurate(case: Case, iterations: int, *orders: Callable[[], object]) -> None:
    """The form that runs within any of ``orders`` gives the same bits, near the reference in float64."""
    found = []
    for order in orders:
        with order():  # type: ignore[attr-defined]
            found.append(outputs_and_gradients(iterative_pinv, case, iterations))
        assert_identical(found[-1], found[0])
    cpu = case[0].cpu(), case[1].cpu()
    exact = outputs_and_gradients(reference.pinv, cpu, iterations, torch.float64)
    plain = outputs_and_gradients(reference.pinv, cpu, iterations)
    # The gradient of a start is one number, whose terms may cancel: against their size.
    sizes = [(x.norm() * g.norm()).item() for x, g in zip(cpu[0].double(), exact["gradient of a"], strict=True)]
    for name, value in found[0].items():
        assert value.dtype == torch.float32
        mine, theirs = [], []
        for i, true in enumerate(exact[name]):
            scale = sizes[i] / (cpu[1][i].item() or 1) if name == "gradient of start" and sizes[i] else None
            mine.append(difference(value[i].cpu(), true, scale))
            theirs.append(difference(plain[name][i], true, scale))
        for of, times in ((statistics.median, MIDDLE), (max, WORST)):
            error, allowed = of(mine), times * of(theirs) + LEAST
            assert error <= allowed, f"{name}: error {error:.1e}, allowed {allowed:.1e}"
