"""bias + GELU on a GPU: the cases of the emulated kernel, and larger ones."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from activation_cases import DTYPES, SHAPES, assert_accurate, inputs, run
from comparison import assert_identical

from farspan.kernels import forms
from farspan.kernels.activation import bias_gelu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: torch sees none"),
]
TWICE = (functools.partial(forms.mode, "require"),) * 2


@pytest.mark.parametrize("approximate", [False, True], ids=["erf", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_near_float64_twice_the_same(dtype: torch.dtype, approximate: bool) -> None:
    for shape in (*SHAPES, (8192, 3072), (50_000, 8), (3, 65_536)):
        assert_accurate(tuple(t.cuda() for t in inputs(shape, dtype)), approximate, *TWICE)
    assert_accurate(tuple(t.cuda() for t in inputs((64, 4096), dtype, torch.float32)), approximate, *TWICE)


@pytest.mark.parametrize("where", ["another stream", "another device"])
def test_elsewhere(where: str) -> None:
    if where == "another device" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    given = inputs((300, 1024), torch.bfloat16)
    function = functools.partial(bias_gelu, approximate=False)
    device = "cuda:1" if where == "another device" else "cuda:0"
    with forms.mode("require"):
        expected = run(function, *(t.to("cuda:0") for t in given))
        given = tuple(t.to(device) for t in given)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream() if where == "another stream" else None
        with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
            found = run(function, *given)
        torch.cuda.synchronize()
    assert_identical({k: v.cpu() for k, v in found.items()}, {k: v.cpu() for k, v in expected.items()})
