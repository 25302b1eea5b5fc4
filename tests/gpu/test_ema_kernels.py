"""The moving average's kernel on a GPU: the cases of the emulated one, and what only a GPU shows."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import pytest
import torch
from ema_cases import CASES, CLOSE_TO_1, TOLERANCE, Case, assert_accurate, results

from farspan.kernels import forms
from farspan.kernels.ema import EmaState, ema

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: torch sees none"),
]
LARGE = {
    "rows": Case(1024, 4, 96, 16, 2, CLOSE_TO_1),
    "long rows": Case(4096, 2, 64, 16, 2, CLOSE_TO_1),
    "one direction": Case(3000, 3, 72, 16, 1, CLOSE_TO_1),
    "several segments": Case(10_000, 1, 40, 16, 2, CLOSE_TO_1),
    "many rows": Case(50, 200, 24, 16, 2),
    "many documents": Case(4096, 2, 40, 16, 2, lengths=((1, 2, 3, 64, 65) * 30 + (46,), (512,) * 7 + (-512,))),
}


def twice() -> tuple[Callable[[], contextlib.AbstractContextManager[None]], ...]:
    return (lambda: forms.mode("require"),) * 2


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
def test_near_float64_twice_the_same(case: str, dtype: torch.dtype) -> None:
    assert_accurate(CASES[case], dtype, *twice(), device="cuda")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", LARGE)
def test_large(case: str, dtype: torch.dtype) -> None:
    assert_accurate(LARGE[case], dtype, *twice(), device="cuda")


def test_states() -> None:
    x, *parameters = (t.cuda() for t in Case(4096 + 130, 2, 40, 16, 1, CLOSE_TO_1).tensors())
    with forms.mode("require"):
        whole, _ = ema(x, *parameters)
        state, parts = None, []
        for part in x.split((4096, 100, 30)):
            y, state = ema(part, *parameters, state=state, carry=True)
            parts.append(y)
    assert state is not None and state.hidden is not None
    assert (torch.cat(parts) - whole).norm() <= 2 * TOLERANCE[torch.float32] * whole.norm()


def test_neighbours_do_not_matter() -> None:
    case = Case(195, 1, 40, directions=2, lengths=((70, 30, -5, 90),))
    x, *parameters = (t.cuda() for t in case.tensors())
    documents = case.documents("cuda")
    with forms.mode("require"):
        y = ema(x, *parameters, documents=documents)[0]
        x[:70] = x[100:] = math.nan
        again = ema(x, *parameters, documents=documents)[0]
    assert torch.equal(again[70:100], y[70:100]) and not again[100:105].any()


@pytest.mark.parametrize("where", ["another stream", "another device", "a graph"])
def test_elsewhere(where: str) -> None:
    if where == "another device" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    case = LARGE["rows"]
    with forms.mode("require"):
        expected = results(case, torch.bfloat16, "cuda")
        if where == "a graph":
            x, *parameters = (t.cuda() for t in case.tensors())
            graph = torch.cuda.CUDAGraph()
            y = ema(x.bfloat16(), *parameters)[0]
            x = x.bfloat16()
            with torch.cuda.graph(graph):
                y = ema(x, *parameters)[0]
            y.zero_()
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(y, expected[0])
            return
        stream = torch.cuda.Stream() if where == "another stream" else None
        with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
            found = results(case, torch.bfloat16, "cuda:1" if where == "another device" else "cuda")
        torch.cuda.synchronize()
    assert all(torch.equal(f.cpu(), e.cpu()) for f, e in zip(found, expected, strict=True))


def test_no_more_memory_than_x() -> None:
    """Forward keeps its inputs; backward makes the gradient of x, and sums of states."""
    x, *parameters = (t.cuda() for t in Case(4096, 2, 256, 16, 2).tensors())
    leaves = [t.requires_grad_() for t in (x.bfloat16(), *parameters)]
    with forms.mode("require"):
        ema(*leaves)[0].sum().backward()  # tables are made
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ema(*leaves)
        torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 1.1 * leaves[0].numel() * 2


def test_the_last_state_of_one_call_is_the_first_of_the_next() -> None:
    x, *parameters = (t.cuda() for t in Case(128, 2, 16, 16, 1).tensors())
    with forms.mode("require"):
        _, state = ema(x, *parameters, carry=True)
        assert state is not None
        both = ema(x, *parameters, state=EmaState(state.hidden, None))[0]
        whole = ema(torch.cat((x, x)), *parameters)[0][128:]
    assert (both - whole).norm() <= 2 * TOLERANCE[torch.float32] * whole.norm()
