"""The CUDA kernels of attention with dropout on a GPU: as tests/kernels/test_attention_kernels.py, and what only a GPU
has."""

from __future__ import annotations

import pytest
import torch
from attention_kernel_cases import CASES, DTYPES, Case, assert_masks, assert_right, random_cases, run
from torch import Tensor

from farspan.kernels import forms

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: torch sees none"),
]
LONG = [
    Case(((512,),) * 4, 64, h=4),
    Case(((512,),) * 2, 64, h=2, causal=True, p=0.5),
    Case(((1500, 7, 541), (3, 2045)), 64, shift=1),
    Case(((1500, 7, 541), (3, 2045)), 128, causal=True),
    Case((tuple([1, 30, 64, 5] * 40),), 96, h=3),
    Case(((4096,),), 40, h=1, kind="full"),
]


def assert_twice(case: Case, dtype: torch.dtype, device: str = "cuda") -> list[Tensor]:
    """And twice the same bits."""
    with forms.mode("require"):
        found, again = (run(case, case.laid_out(dtype, device)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES + LONG, ids=str)
def test_the_reference(case: Case, dtype: torch.dtype) -> None:
    assert_right(assert_twice(case, dtype), case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any(dtype: torch.dtype) -> None:
    for case in random_cases(60, 700, (16, 24, 32, 40, 64, 72, 96, 128), 11):
        assert_right(assert_twice(case, dtype), case, dtype)


@pytest.mark.parametrize(("length", "shift", "p"), [(600, 0, 0.1), (571, 3, 0.5), (64, 1, 0.97), (333, 6, 1e-4)])
def test_masks_bit_for_bit(length: int, shift: int, p: float) -> None:
    with forms.mode("require"):
        assert_masks("cuda", length, shift, p)


def test_another_stream() -> None:
    case = LONG[2]
    first = assert_twice(case, torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        second = assert_twice(case, torch.bfloat16)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device() -> None:
    case = CASES[3]
    assert_right(assert_twice(case, torch.bfloat16, "cuda:1"), case, torch.bfloat16)


def test_memory_does_not_grow_with_the_square() -> None:
    case = Case(((4096,),), 64, h=16)
    tensors = case.laid_out(torch.bfloat16, "cuda")
    with forms.mode("require"):
        run(case, tensors)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(case, tensors)
    assert torch.cuda.max_memory_allocated() - before < 16 * tensors[3].numel() * 2  # the weights: 64 times
