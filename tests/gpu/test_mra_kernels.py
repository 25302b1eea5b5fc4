"""The CUDA kernels of MRA-2 attention on a GPU: as tests/kernels/test_mra_kernels.py, and what only a GPU has."""

from __future__ import annotations

import importlib

import pytest
import torch
from mra_cases import CASES, DTYPES, Case, assert_lists, assert_right, lists_of_kernels, random_cases, run
from torch import Tensor

from farspan.kernels import forms
from farspan.kernels.mra import mra_attention

fused = importlib.import_module("farspan.kernels.mra.fused")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: torch sees none"),
]
LONG = [
    Case(4096, 64, 8 * 128, h=2, layout="turned"),
    Case(2049, 64, 65 * 20, "holes", diagonal=3, n=2),
    Case(1500, 256, 400, "left", first=1),
    Case(1500, 32, 400, sparse=True, h=2),
]


def assert_twice(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """And twice the same bits."""
    with forms.mode("require"):
        found, again = (run(case, case.laid_out(dtype, "cuda"), "compiled") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES + LONG, ids=str)
def test_the_definition(case: Case, dtype: torch.dtype) -> None:
    assert_right(assert_twice(case, dtype), case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any(dtype: torch.dtype) -> None:
    for case in random_cases(60, 700, (16, 24, 32, 40, 64, 72, 96, 128, 256), 11):
        assert_right(assert_twice(case, dtype), case, dtype)


@pytest.mark.parametrize("shared", [False, True])
def test_selection(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if shared:
        monkeypatch.setattr(fused, "ALONE", 0)
        monkeypatch.setattr(fused, "PART", 100)
        monkeypatch.setattr(fused, "KEYS", 1)
    for case in [*random_cases(30, 3000, (16, 64), 5), Case(32_768, 16, 8192), Case(9000, 64, 282**2, "right")]:
        q, k, v, _ = case.laid_out(torch.bfloat16, "cuda")
        assert_lists(lists_of_kernels(case, q, k, v), case, q, k)


def test_the_longest_rows() -> None:
    """Without a float64 reference: against the form by lists in PyTorch."""
    case = Case(32_768, 64, 8192, "holes", diagonal=1, h=2)
    found = assert_twice(case, torch.float32)
    expected = run(case, case.laid_out(torch.float32, "cuda"), "blocks")
    for x, t in zip(found, expected, strict=True):
        assert (x - t).norm() <= 1e-3 * t.norm()  # products of the other may go through TF32


def test_the_stream_and_the_device_of_the_tensors() -> None:
    case = Case(700, 64, 100, "holes")
    expected = run(case, case.laid_out(torch.bfloat16, "cuda"), "compiled")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        tensors = case.laid_out(torch.bfloat16, "cuda")
        found = run(case, tensors, "compiled")
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    if torch.cuda.device_count() > 1:
        other = run(case, case.laid_out(torch.bfloat16, "cuda:1"), "compiled")
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(other, expected, strict=True))


def test_nothing_waits_for_the_device() -> None:
    case = Case(700, 64, 100, "holes")
    tensors, mask = case.laid_out(torch.bfloat16, "cuda"), case.make_mask()
    assert mask is not None
    mask = mask.cuda()
    leaves = [x.requires_grad_() for x in tensors[:3]]
    mra_attention(*leaves, budget=100, mask=mask, form="compiled").backward(tensors[3])
    torch.cuda.set_sync_debug_mode("error")
    try:
        mra_attention(*leaves, budget=100, mask=mask, form="compiled").backward(tensors[3])
    finally:
        torch.cuda.set_sync_debug_mode("default")
