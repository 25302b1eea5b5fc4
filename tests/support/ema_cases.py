"""Inputs of the moving average for its compiled form, and how near to float64 its results must be."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from farspan.kernels.documents import Documents
from farspan.kernels.ema import ema

# Norms of errors relative to those of results, which are rounded to dtypes of 11 and 8 bits; float32 carries on.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 2**-8}
# Of gradients of parameters: float16 is computed from pieces with 16 bits, bfloat16 with decays of 8.
OF_PARAMETERS = {torch.float32: 5e-6, torch.float16: 1e-4, torch.bfloat16: 1e-2}
NAMES = ("y", "x", "damping", "decay", "expansion", "projection")
CLOSE_TO_1 = math.log(0.01 / 0.99)  # log odds of the sigmoids for a decay of about 1 − 1e-4


@dataclasses.dataclass(frozen=True)
class Case:
    s: int
    b: int = 2
    d: int = 3
    n: int = 4
    directions: int = 2
    log_odds: float = 0.0
    lengths: tuple[tuple[int, ...], ...] = ()  # of each row's documents, a negative one is padding
    only: torch.dtype | None = None  # what x and the gradients of y are rounded to, None: their dtype

    def tensors(self) -> list[Tensor]:
        """x and the parameters, float32."""
        generator = torch.Generator().manual_seed(self.s)
        x = torch.randn(self.s, self.b, self.d, generator=generator)
        parameters = torch.randn(4, self.directions, self.d, self.n, generator=generator)
        parameters[:2] = parameters[:2] * (0.1 if self.log_odds else 1.0) + self.log_odds
        return [x, *parameters]

    def documents(self, device: str = "cpu") -> Documents | None:
        if not self.lengths:
            return None
        ids = torch.zeros(self.b, self.s, dtype=torch.long)
        for row, lengths in enumerate(self.lengths):
            at = 0
            for i, length in enumerate(lengths):
                ids[row, at : at + abs(length)] = i + 1 if length > 0 else 0
                at += abs(length)
        indices = torch.arange(self.s).expand_as(ids)
        return Documents.of(ids.to(device), indices.to(device), "document", causal=False)


CASES = {
    "a position": Case(1, n=1),
    "a chunk, one direction": Case(64, 1, 2, directions=1),
    "odd sizes": Case(67, 3, 5, 3),
    "odd sizes, one direction": Case(67, 3, 5, 3, directions=1),
    "several rows in a segment": Case(100, 9, 2, 16),
    "features of several blocks": Case(40, 2, 24, 16),
    "close to 1": Case(1100, 1, 4, 16, log_odds=CLOSE_TO_1),
    "close to 1, one direction": Case(1100, 1, 4, 16, directions=1, log_odds=CLOSE_TO_1),
    "several segments": Case(4500, 1, 3, 3, log_odds=CLOSE_TO_1),
    "several segments, one direction": Case(4500, 2, 1, 3, directions=1, log_odds=CLOSE_TO_1),
    "hidden dimensions for two": Case(70, 2, 2, 20),
    "32 hidden dimensions": Case(70, 1, 2, 32, directions=1),
    "decay to 0": Case(70, log_odds=30.0),
    "decay of 1": Case(70, log_odds=-30.0),
    "documents": Case(300, 3, 3, 16, lengths=((64, 1, 100, -5, 130), (-300,), (-30, 40, 230))),
    "documents, one direction": Case(200, 2, 8, 5, 1, lengths=((3,) * 60 + (20,), (150, 50))),
    "a document of several segments": Case(
        4700, 2, 2, 3, log_odds=CLOSE_TO_1, lengths=((100, 4400, 150, -50), (60, -20, 4600))
    ),
}


def results(
    case: Case, dtype: torch.dtype, device: str = "cpu", run: Callable[..., Any] = ema, **options: Any
) -> list[Tensor]:
    """y and all gradients of a product with fixed numbers, which x's dtype and, for float64, ``case.only`` can hold."""
    x, *parameters = case.tensors()
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
    narrow = case.only or _narrow(case, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, upstream = (t.to(narrow).to(dtype).to(device) for t in (x, upstream))
    leaves = [x.requires_grad_(), *(p.to(wide).to(device).requires_grad_() for p in parameters)]
    y = run(*leaves, documents=case.documents(device), **options)[0]
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


def _narrow(case: Case, dtype: torch.dtype) -> torch.dtype:
    """Of the numbers given: both of 16 bits share the truth of a long case, which takes seconds."""
    return torch.bfloat16 if dtype == torch.float16 and case.s > 1000 else dtype


def truth(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """By the definition, in float64 from the same numbers."""
    return _truth(case, _narrow(case, dtype))


@functools.lru_cache(maxsize=4)
def _truth(case: Case, narrow: torch.dtype) -> list[Tensor]:
    return results(dataclasses.replace(case, only=narrow), torch.float64, form="recurrence")


def assert_near(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype, factor: float = 1) -> None:
    for name, f, e in zip(NAMES, found, expected, strict=True):
        assert f.shape == e.shape, name
        error, size = (f.cpu().double() - e).norm().item(), e.norm().item()
        tolerance = TOLERANCE[dtype] * factor
        if name not in NAMES[:2]:  # a sum over positions may nearly cancel: the other gradients say what is small
            size = max(size, 0.05 * max(other.norm().item() for other in expected[2:]))
            tolerance = OF_PARAMETERS[dtype] * factor
        least = (
            torch.finfo(torch.float16).smallest_normal * 2**-10 * math.sqrt(e.numel())
            if f.dtype == torch.float16
            else 0
        )
        assert error <= tolerance * size + least, f"{name}: off by {error:.2e} of {size:.2e}"


def assert_accurate(
    case: Case,
    dtype: torch.dtype,
    *contexts: Callable[[], contextlib.AbstractContextManager[None]],
    device: str = "cpu",
) -> None:
    """In each of them near the truth, and the same bit by bit."""
    expected, first = truth(case, dtype), None
    for context in contexts:
        with context():
            found = results(case, dtype, device)
        assert found[0].dtype == dtype
        if first is None:
            first = found
            # A decay that float32 rounds to 0 or 1 has a gradient of its own: torch's clamp gives 0 for it.
            compared = found if abs(case.log_odds) != 30 else found[:2] + expected[2:]
            assert_near(compared, expected, dtype)
            assert all(t.isfinite().all() for t in found)
        for again, before in zip(found, first, strict=True):
            assert torch.equal(again, before)
