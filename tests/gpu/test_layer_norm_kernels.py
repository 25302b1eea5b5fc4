"""Layer normalisation's kernels on a GPU: the cases of the emulated ones, and what only a GPU shows."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from comparison import assert_identical
from layer_norm_cases import CASES, DTYPES, EPS, NAMES, Case, assert_accurate

from farspan.kernels import forms
from farspan.kernels.dropout import dropout_add, keep_mask
from farspan.kernels.layer_norm import dropout_add_layer_norm, layer_norm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: torch sees none"),
]
COMPILED = functools.partial(forms.mode, "require")
LARGE = {
    "more rows than run at once": Case(4099, 1024, p=0.1),
    "base": Case(8192, 768, p=0.1),
    "long rows": Case(517, 5120, p=0.1),
    "short rows": Case(20011, 64, p=0.1),
    "one vector a lane": Case(9001, 256, p=0.1),
    "the norm alone": Case(8192, 1024, p=None),
    "no dropout": Case(3000, 2048, p=0.0),
}


def fits(case: Case, dtype: torch.dtype) -> bool:
    memory = torch.cuda.get_device_properties("cuda").shared_memory_per_block_optin
    return case.features <= 8192 or dtype != torch.float32 or memory > 200 * 1024


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES | LARGE)
def test_near_float64_twice_the_same(case: str, dtype: torch.dtype) -> None:
    of = (CASES | LARGE)[case]
    if not fits(of, dtype):
        pytest.skip("needs 200 KiB of shared memory in a block")
    assert_accurate(of, dtype, COMPILED, COMPILED, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mask_and_the_sum_are_the_references_bit_for_bit(dtype: torch.dtype) -> None:
    case = Case(3001, 1000)
    given = {name: t.to(dtype) for name, t in case.tensors().items()}
    with forms.mode("reference"):
        expected = dropout_add(given["x"], given["residual"], 0.3, case.keys())
    with COMPILED():
        x, residual, keys = given["x"].cuda(), given["residual"].cuda(), case.keys("cuda")
        total, _ = dropout_add_layer_norm(x, residual, None, None, EPS, 0.3, keys)
        (ones,) = dropout_add_layer_norm(torch.ones_like(x), torch.zeros_like(x), None, None, EPS, 0.3, keys)[:1]
    assert torch.equal(total.cpu(), expected)
    assert torch.equal(ones.cpu() != 0, keep_mask(case.keys(), 1000, 0.3))


def test_a_row_does_not_depend_on_the_others() -> None:
    case = Case(500, 1536)
    given, keys = case.tensors("cuda"), case.keys("cuda")
    weights = given["weight"], given["bias"]
    with COMPILED():
        whole = dropout_add_layer_norm(given["x"], given["residual"], *weights, EPS, 0.3, keys)
        part = dropout_add_layer_norm(given["x"][17:20], given["residual"][17:20], *weights, EPS, 0.3, keys[17:20])
    for all_rows, some in zip(whole, part, strict=True):
        assert torch.equal(all_rows[17:20], some)


@pytest.mark.parametrize("where", ["another stream", "another device", "a graph"])
def test_elsewhere(where: str) -> None:
    if where == "another device" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    case = Case(700, 768)
    with COMPILED():
        expected = case.run(torch.bfloat16, "cuda")
        if where == "a graph":
            given, keys = case.tensors("cuda"), case.keys("cuda")
            inputs = [given[name] for name in NAMES]
            dropout_add_layer_norm(*inputs, EPS, 0.3, keys)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                total, y = dropout_add_layer_norm(*inputs, EPS, 0.3, keys)
            graph.replay()
            torch.cuda.synchronize()
            again = dropout_add_layer_norm(*inputs, EPS, 0.3, keys)
            assert torch.equal(total, again[0]) and torch.equal(y, again[1])
            return
        stream = torch.cuda.Stream() if where == "another stream" else None
        with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
            found = case.run(torch.bfloat16, "cuda:1" if where == "another device" else "cuda")
        torch.cuda.synchronize()
    same = {name: t.cpu() for name, t in found.items()}, {name: t.cpu() for name, t in expected.items()}
    if (
        where == "another device"
        and len({p.multi_processor_count for p in map(torch.cuda.get_device_properties, (0, 1))}) > 1
    ):
        same = tuple({k: t for k, t in d.items() if k not in ("of weight", "of bias")} for d in same)
    assert_identical(*same)


def test_compiled_by_torch() -> None:
    case = Case(64, 256)
    given, keys = case.tensors("cuda"), case.keys("cuda")
    inputs = [given[name].requires_grad_() for name in NAMES]

    def block(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        total, y = dropout_add_layer_norm(x, residual, weight, bias, EPS, 0.3, keys)
        return layer_norm(y + total, weight, bias, EPS)

    with COMPILED():
        expected = torch.autograd.grad(block(*inputs).square().sum(), inputs)
        found = torch.autograd.grad(torch.compile(block, fullgraph=True)(*inputs).square().sum(), inputs)
    for value, true in zip(found, expected, strict=True):
        torch.testing.assert_close(value, true, rtol=1e-4, atol=1e-4)
