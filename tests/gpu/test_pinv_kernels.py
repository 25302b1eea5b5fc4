"""The pseudo-inverse's kernel on a GPU: the cases of the emulated one, and what only a GPU shows."""

from __future__ import annotations

import contextlib

import pytest
import torch
from comparison import assert_identical
from pinv_cases import CASES, assert_accurate, outputs_and_gradients, softmax_matrices

from farspan.kernels import forms
from farspan.kernels.pinv import column_maximum, iterative_pinv

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: torch sees none"),
]


def twice() -> tuple[object, object]:
    return (lambda: forms.mode("require"),) * 2


@pytest.mark.parametrize("case", CASES)
def test_near_float64_twice_the_same(case: str) -> None:
    a, start = CASES[case]()
    assert_accurate((a.cuda(), start.cuda()), 6, *twice())


@pytest.mark.parametrize("m", [1, 8, 31, 48, 63, 64])
@pytest.mark.parametrize("spread", [0.5, 2.0, 6.0])
def test_many_matrices(m: int, spread: float) -> None:
    for iterations in (0, 1, 6, 12):
        a = softmax_matrices(300, m, spread, seed=iterations)
        assert_accurate((a.cuda(), column_maximum(a).cuda()), iterations, *twice())


def test_many_matrices_are_each_as_alone() -> None:
    a = softmax_matrices(96, 64, 2.0).cuda()
    with forms.mode("require"):
        together = iterative_pinv(a, column_maximum(a))
        for i in (0, 17, 95):
            assert torch.equal(iterative_pinv(a[i : i + 1], column_maximum(a[i : i + 1]))[0], together[i])


@pytest.mark.parametrize("where", ["another stream", "another device", "a graph"])
def test_elsewhere(where: str) -> None:
    if where == "another device" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    a = softmax_matrices(12, 64, 2.0)
    case = a.cuda(), column_maximum(a).cuda()
    with forms.mode("require"):
        expected = outputs_and_gradients(iterative_pinv, case, 6)
        if where == "a graph":
            graph = torch.cuda.CUDAGraph()
            z = iterative_pinv(*case)
            with torch.cuda.graph(graph):
                z = iterative_pinv(*case)
            z.zero_()
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(z, expected["z"])
            return
        if where == "another device":
            case = case[0].to("cuda:1"), case[1].to("cuda:1")
        stream = torch.cuda.Stream() if where == "another stream" else None
        with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
            found = outputs_and_gradients(iterative_pinv, case, 6)
        torch.cuda.synchronize()
    assert_identical({k: v.cpu() for k, v in found.items()}, {k: v.cpu() for k, v in expected.items()})
