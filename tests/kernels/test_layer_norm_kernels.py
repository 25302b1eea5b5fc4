"""Layer normalisation's compiled forms on a CPU: the CUDA source, emulated, and C++, against float64."""

from __future__ import annotations

import functools
import random
import shutil
import types

import pytest
import torch
from comparison import assert_identical
from guarded import in_child
from layer_norm_cases import CASES, DTYPES, EPS, Case, assert_accurate
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from farspan.kernels import forms
from farspan.kernels import layer_norm as package
from farspan.kernels.dropout import DropoutKey
from farspan.kernels.dropout import reference as dropout_reference
from farspan.kernels.layer_norm import dropout_add_layer_norm, layer_norm, ops, reference

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler: there is no c++")
ORDERS = tuple(functools.partial(forms.emulated, order) for order in (0, 1, 7))
COMPILED = functools.partial(forms.mode, "require")  # the C++ form


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_near_float64_in_any_order(case: str, dtype: torch.dtype) -> None:
    orders = ORDERS if CASES[case].features < 2000 else ORDERS[1:]
    assert_accurate(CASES[case], dtype, *orders)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case.p])
def test_for_the_cpu_with_any_number_of_threads(case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    called = watch(monkeypatch)
    assert_accurate(CASES[case], dtype, COMPILED)
    assert called[:2] == ["dropout_keys", "layer_norm_forward"]
    with COMPILED():
        expected = CASES[case].run(dtype)
        for threads in (2, 3):
            torch.set_num_threads(threads)  # as they were again after the test: see conftest
            assert_identical(CASES[case].run(dtype), expected)


def watch(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The functions that are called from now on."""
    called: list[str] = []
    call = forms.Library.call

    def watched(self: forms.Library, function: str, *arguments: object) -> None:
        called.append(function)
        call(self, function, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(forms.Library, "call", watched)
    return called


def test_any_shape() -> None:
    choose = random.Random(5)
    for _ in range(24):
        rows, features = choose.randint(1, 40), 8 * choose.randint(1, choose.choice((4, 40, 200)))
        p = choose.choice((None, 0.0, 0.1, 0.7))
        case = Case(rows, features, p, (choose.random() < 0.8, choose.random() < 0.8), choose.random() < 0.3)
        dtype = choose.choice(DTYPES)
        assert_accurate(case, dtype, functools.partial(forms.emulated, choose.randint(2, 99)))
        if p and dtype != torch.float16:
            assert_accurate(case, dtype, COMPILED)


@pytest.mark.parametrize("form", [ORDERS[0], COMPILED], ids=["emulated", "c++"])
def test_the_sum_is_the_references_bit_for_bit(form: functools.partial) -> None:
    """And so is the mask."""
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(13, 120)
        given = {name: t.to(dtype) for name, t in case.tensors().items()}
        with form():
            total, _ = dropout_add_layer_norm(given["x"], given["residual"], None, None, EPS, 0.3, case.keys())
        expected = dropout_reference.dropout_add(given["x"], given["residual"], 0.3, case.keys())
        assert torch.equal(total, expected)


@pytest.mark.parametrize("form", [ORDERS[2], COMPILED], ids=["emulated", "c++"])
def test_a_row_does_not_depend_on_the_others(form: functools.partial) -> None:
    case = Case(40, 96)
    given, keys = case.tensors(), case.keys()
    names = ("x", "residual", "weight", "bias")
    with form():
        whole = dropout_add_layer_norm(*(given[name] for name in names), EPS, 0.3, keys)
        part = dropout_add_layer_norm(
            *(given[name][17:20] for name in names[:2]), *(given[name] for name in names[2:]), EPS, 0.3, keys[17:20]
        )
    for all_rows, some in zip(whole, part, strict=True):
        assert torch.equal(all_rows[17:20], some)


def strided(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(*shape[:-1], shape[-1] + 1, generator=torch.Generator().manual_seed(3))[..., 1:]


@pytest.mark.parametrize("form", [ORDERS[0], COMPILED], ids=["emulated", "c++"])
def test_strides_and_dimensions(form: functools.partial) -> None:
    """Parts of tensors, transposed ones, rows of several dimensions, keys that are the same for some, no dimension."""
    keys = DropoutKey(1, 2, torch.arange(3)).rows(4, torch.arange(5).unsqueeze(1))  # [5, 3]
    weight, bias = strided((2, 16))
    for x in (strided((5, 3, 16)), strided((3, 5, 16)).transpose(0, 1), torch.randn(15 * 16 + 1)[1:].view(5, 3, 16)):
        for of_rows in (keys, keys[:1], keys[:, :1], keys[0, 0]):
            arguments = (x, x.flip(0), weight, bias, EPS, 0.25, of_rows)
            exact = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in arguments]
            with form():
                found = dropout_add_layer_norm(*arguments)
            for value, expected in zip(found, reference.dropout_add_layer_norm(*exact), strict=True):
                torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    with ORDERS[0]():
        y = layer_norm(weight, weight, bias, EPS)
    torch.testing.assert_close(y, reference.layer_norm(weight, weight, bias, EPS))


@pytest.mark.parametrize("shape", [(0, 16), (0, 3, 8), (2, 0, 8)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    given = [torch.zeros(shape), torch.zeros(shape), torch.ones(shape[-1]), torch.ones(shape[-1])]
    for form in (ORDERS[0], COMPILED):
        inputs = [t.clone().requires_grad_() for t in given]
        with form():
            total, y = dropout_add_layer_norm(*inputs, EPS, 0.5, torch.zeros(shape[:-1], dtype=torch.int64))
            gradients = torch.autograd.grad(total.sum() + y.sum(), inputs)
        assert total.shape == y.shape == shape
        assert all(torch.equal(g, torch.zeros_like(t)) for g, t in zip(gradients, given, strict=True))


def test_what_is_not_finite_stays_in_its_row() -> None:
    x = torch.randn(3, 24)
    x[1, 4] = torch.inf
    with ORDERS[0]():
        y = layer_norm(x, None, None, EPS)
    assert y[::2].isfinite().all() and y[1].isnan().all()


def test_an_operation_of_torch() -> None:
    case = Case(4, 16)
    given = [case.tensors()[name].requires_grad_() for name in ("x", "residual", "weight", "bias")]
    with ORDERS[0]():
        torch.library.opcheck(ops.normalised, (*given, case.keys(), 19661, EPS))
        torch.library.opcheck(ops.normalised, (given[0], None, given[2], None, None, 0, EPS))
        total, y, mean, rstd = (t.detach() for t in ops.normalised(*given, case.keys(), 19661, EPS))
        saved = (total, mean, rstd, given[2].detach(), case.keys(), 19661, torch.float32)
        for wanted in ([True] * 4, [False, True, False, True]):
            torch.library.opcheck(ops.gradients, (y, y, *saved, wanted))
        torch.library.opcheck(ops.gradients, (None, y, *saved, [True] * 4))


@pytest.mark.parametrize("form", [ORDERS[0], COMPILED], ids=["emulated", "c++"])
@pytest.mark.parametrize("features", [16, 20])
def test_compiled_and_computed_again(form: functools.partial, features: int) -> None:
    """20 features are for the reference."""
    case = Case(6, features)
    given, keys = case.tensors(), case.keys()

    def block(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        total, y = dropout_add_layer_norm(x, residual, weight, bias, EPS, 0.3, keys)
        _, z = dropout_add_layer_norm(y, total, weight, bias, EPS, 0.2, keys)  # the weights are used twice
        return layer_norm(z + total, weight, None, EPS)

    def run(function: object) -> dict[str, Tensor]:
        inputs = [given[name].clone().requires_grad_() for name in ("x", "residual", "weight", "bias")]
        y = function(*inputs)  # type: ignore[operator]
        gradients = torch.autograd.grad(y, inputs, given["of_y"])
        return {"y": y.detach()} | {str(i): g for i, g in enumerate(gradients)}

    with form() if features == 16 else forms.mode("auto"):
        expected = run(block)
        assert_identical(run(functools.partial(checkpoint, block, use_reentrant=False)), expected)
        torch.compiler.reset()
        assert_identical(run(torch.compile(block, fullgraph=True, backend="aot_eager")), expected)
        dynamic = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
        assert_identical(run(dynamic), expected)


def test_what_it_does_not_take() -> None:
    for form in ORDERS[:1], (COMPILED,):
        x, keys = torch.randn(3, 12), torch.arange(3)
        with form[0]():
            with pytest.raises(ValueError, match="layer_norm has no compiled form for this: 12 features"):
                dropout_add_layer_norm(x, x, None, None, EPS, 0.5, keys)
            with pytest.raises(ValueError, match=r"weights of torch\.bfloat16 for torch\.float32"):
                weight = torch.ones(16, dtype=torch.bfloat16)
                dropout_add_layer_norm(torch.randn(3, 16), torch.randn(3, 16), weight, None, EPS, 0.5, keys)
            with pytest.raises(RuntimeError, match=r"weight of shape \[1\]"):
                dropout_add_layer_norm(torch.randn(3, 16), torch.randn(3, 16), torch.ones(1), None, EPS, 0.5, keys)
            double = x.double()
            assert torch.equal(layer_norm(double, None, None, EPS), reference.layer_norm(double, None, None, EPS))
    with forms.mode("auto"):
        total, y = dropout_add_layer_norm(x, x, None, None, EPS, 0.5, keys)
    expected = reference.dropout_add_layer_norm(x, x, None, None, EPS, 0.5, keys)
    assert torch.equal(total, expected[0]) and torch.equal(y, expected[1])
    with COMPILED(), pytest.raises(ValueError, match=r"torch\.float16 on cpu, not one of torch\.float32"):
        half = torch.zeros(3, 16, dtype=torch.float16)
        dropout_add_layer_norm(half, half, None, None, EPS, 0.5, keys)


def test_without_dropout_a_cpu_has_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    called = watch(monkeypatch)
    x, weight = torch.randn(3, 16), torch.randn(16)
    with COMPILED():
        y = layer_norm(x, weight, None, EPS)
        total, z = dropout_add_layer_norm(x, x, weight, None, EPS, 0.5, None)
    assert torch.equal(y, reference.layer_norm(x, weight, None, EPS))
    assert torch.equal(total, x + x) and torch.equal(z, reference.layer_norm(x + x, weight, None, EPS))
    assert called == []


def test_no_memory_but_its_own_is_touched() -> None:
    cases = [Case(3, 8), Case(5, 264), Case(2, 1032), Case(3, 24, p=None), Case(3, 40, wide=True), Case(3, 48, p=0.0)]

    def run() -> None:
        for case in cases:
            for dtype in (torch.float32, torch.bfloat16):
                with ORDERS[2]():
                    case.run(dtype)
                with COMPILED():
                    case.run(dtype)

    in_child(run)


@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_apex_stands_in(mode: forms.Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is installed and no kernel could be built, unless the mode says otherwise."""

    def fused(x: Tensor, weight: Tensor, bias: Tensor, shape: tuple[int, ...], eps: float) -> Tensor:
        return torch.nn.functional.layer_norm(x, shape, weight, bias, eps) + 1

    x = types.SimpleNamespace(is_cuda=True, dtype=torch.float32, device=torch.device("cpu"), shape=torch.Size((3, 16)))
    inner = torch.randn(3, 16)
    monkeypatch.setattr(package, "_compiled", lambda *_, **__: False)
    monkeypatch.setattr(package, "_apex", lambda: lambda _, *rest: fused(inner, *rest))
    monkeypatch.setattr(reference, "layer_norm", lambda _, *rest: "reference")
    weight, bias = torch.randn(2, 16)
    with forms.mode(mode):
        y = layer_norm(x, weight, bias, EPS)  # type: ignore[arg-type]
        assert layer_norm(x, weight, None, EPS) == "reference"  # type: ignore[arg-type]
    if mode == "reference":
        assert y == "reference"
    else:
        assert torch.equal(y, fused(inner, weight, bias, (16,), EPS))
