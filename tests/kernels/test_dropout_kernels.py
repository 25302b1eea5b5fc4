"""Dropout's compiled forms on a CPU: the CUDA source, emulated, and C++, against the reference, bit for bit."""

from __future__ import annotations

import functools
import random
import shutil

import pytest
import torch
from comparison import assert_identical
from dropout_cases import CASES, DTYPES, Case, assert_as_the_reference
from guarded import in_child
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from farspan.kernels import forms
from farspan.kernels.dropout import DropoutKey, dropout, dropout_add, ops, reference

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler: there is no c++")
ORDERS = tuple(functools.partial(forms.emulated, order) for order in (0, 1, 7))
COMPILED = functools.partial(forms.mode, "require")  # the C++ form
FORMS = pytest.mark.parametrize("form", [ORDERS[0], COMPILED], ids=["emulated", "c++"])
KEYS = DropoutKey(1, 2, torch.arange(3)).rows(4, torch.arange(5).unsqueeze(1))  # [5, 3]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_as_the_reference_in_any_order(case: str, dtype: torch.dtype) -> None:
    assert_as_the_reference(CASES[case], dtype, *ORDERS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_for_the_cpu_with_any_number_of_threads(case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    call = forms.Library.call

    def watched(self: forms.Library, function: str, *arguments: object) -> None:
        called.append(function)
        call(self, function, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(forms.Library, "call", watched)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)  # as they were again after the test: see conftest
        assert_as_the_reference(CASES[case], dtype, COMPILED)
    assert called == ["dropout_keys", "dropout_apply", "dropout_apply"] * 3


def test_any_shape() -> None:
    choose = random.Random(5)
    for _ in range(40):
        rows = tuple(choose.randint(1, 9) for _ in range(choose.randint(1, 3)))
        features = choose.choice((choose.randint(1, 30), choose.randint(30, 700)))
        first: int | tuple[int, ...] = choose.randint(0, 50)
        if choose.random() < 0.5:
            first = tuple(choose.choice((1, size)) for size in rows)
        of_keys = tuple(choose.choice((1, size)) for size in rows)
        case = Case((*rows, features), choose.random(), first, of_keys)
        dtype = choose.choice(DTYPES)
        forms_of = [functools.partial(forms.emulated, choose.randint(2, 99))]
        assert_as_the_reference(case, dtype, *forms_of, *([COMPILED] if dtype != torch.float16 else []))


@FORMS
def test_keys_are_the_references(form: functools.partial) -> None:
    generator = torch.Generator().manual_seed(1)
    wide = torch.randint(-(1 << 63), (1 << 63) - 1, (4, 5, 6, 2), generator=generator)
    base = reference.base_key(2**63 - 5, 123_456, 77)
    for samples in (wide[0, 0, :, 0], wide[0, :, :, 1], wide[0, 0, 0, 0], wide[..., 0], wide[0, :, :1, 0]):
        for positions in (wide[:, :, :, 1], wide[1, :, :, 0], wide[1, :, :1, 0], wide[2, 0, 0, 1]):
            with form():
                keys = DropoutKey(2**63 - 5, 123_456, samples).rows(77, positions)
            assert torch.equal(keys, reference.row_keys(base, samples, positions))
    with form():
        assert DropoutKey(1, 2, wide[:0, 0, 0, 0]).rows(3, wide[:2, :1, 0, 0]).shape == (2, 0)
        torch.library.opcheck(ops.row_keys, (1, 2, 3, wide[0, 0, :, 0], wide[:, :, :1, 0]))


@FORMS
def test_keys_of_many_steps_in_one_graph(form: functools.partial) -> None:
    samples, counter = torch.arange(4), CompileCounterWithBackend("aot_eager")
    whole = torch.compile(lambda key: key.rows(3, samples), fullgraph=True, backend=counter)
    torch.compiler.reset()
    with form():
        for step in range(5):
            assert torch.equal(whole(DropoutKey(5, step, samples)), DropoutKey(5, step, samples).rows(3, samples))
    assert counter.frame_count <= 2  # the second knows that steps differ


@FORMS
def test_strides(form: functools.partial) -> None:
    """Parts of tensors, transposed ones, and such as begin at any address."""
    base = torch.randn(5 * 3 * 18 + 1, generator=torch.Generator().manual_seed(0))
    for x in (base[1:].view(5, 3, 18), base[1:].view(3, 5, 18).transpose(0, 1), base[:-1].view(5, 3, 18)[..., 1:]):
        for keys in (KEYS, KEYS.t().contiguous().t()):
            with form():
                found = dropout(x, 0.3, keys), dropout_add(x, x.flip(0), 0.3, keys)
            expected = reference.dropout(x, 0.3, keys), reference.dropout_add(x, x.flip(0), 0.3, keys)
            for value, true in zip(found, expected, strict=True):
                assert torch.equal(value, true)


@FORMS
def test_what_is_not_finite_is_dropped_too(form: functools.partial) -> None:
    for value in (torch.inf, torch.nan):
        with form():
            y = dropout(torch.full((5, 3, 16), value), 0.5, KEYS)
        assert torch.equal(y == 0, ~reference.keep_mask(KEYS, 16, 0.5))


@FORMS
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_nothing_to_do(form: functools.partial, shape: tuple[int, int]) -> None:
    x = torch.zeros(shape, requires_grad=True)
    with form():
        y = dropout(x, 0.5, torch.zeros(shape[0], dtype=torch.int64))
        y.sum().backward()
    assert y.shape == shape and x.grad is not None and x.grad.shape == shape


def test_an_operation_of_torch() -> None:
    x, residual = (t.requires_grad_() for t in torch.randn(2, 5, 3, 12))
    first = torch.arange(5).unsqueeze(1)
    with ORDERS[0]():
        torch.library.opcheck(ops.masked, (x, residual, KEYS, None, 0, 20000))
        torch.library.opcheck(ops.masked, (x.transpose(0, 1), None, KEYS.t(), first.t(), 0, 20000))
        torch.library.opcheck(ops.masked, (x, None, KEYS, None, 3, 20000))


@FORMS
def test_compiled_computed_again_and_differentiated_again(form: functools.partial) -> None:
    given = torch.randn(2, 5, 3, 12)
    first = torch.arange(5).unsqueeze(1)

    def block(x: Tensor, residual: Tensor) -> Tensor:
        y = dropout_add(x.sin(), residual, 0.3, KEYS)
        return dropout(y * x, 0.2, KEYS, first) + dropout(y, 0.2, KEYS, 5)

    def run(function: object) -> dict[str, Tensor]:
        inputs = [t.clone().requires_grad_() for t in given]
        y = function(*inputs)  # type: ignore[operator]
        return {"y": y.detach()} | {str(i): g for i, g in enumerate(torch.autograd.grad(y.square().sum(), inputs))}

    with forms.mode("reference"):
        expected = run(block)
    with form():
        assert_identical(run(block), expected)
        assert_identical(run(functools.partial(checkpoint, block, use_reentrant=False)), expected)
        torch.compiler.reset()
        for dynamic in (False, True):
            whole = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=dynamic)
            found = run(whole)
            for name, true in expected.items():
                torch.testing.assert_close(found[name], true)
        x, residual = (t.double().float().requires_grad_() for t in given)
        (once,) = torch.autograd.grad(block(x, residual).square().sum(), x, create_graph=True)
        (twice,) = torch.autograd.grad(once.sum(), x)
    with forms.mode("reference"):
        (once,) = torch.autograd.grad(block(x, residual).square().sum(), x, create_graph=True)
        torch.testing.assert_close(twice, torch.autograd.grad(once.sum(), x)[0])


def test_the_reference_takes_the_rest() -> None:
    double = torch.randn(5, 3, 12, dtype=torch.float64)
    half = double.half()
    with COMPILED():
        assert torch.equal(dropout(double, 0.3, KEYS), reference.dropout(double, 0.3, KEYS))
        with pytest.raises(ValueError, match=r"dropout has no compiled form for this: torch\.float16 on cpu"):
            dropout(half, 0.3, KEYS)
    assert torch.equal(dropout(half, 0.3, KEYS), reference.dropout(half, 0.3, KEYS))
    with COMPILED():  # another shape or dtype of the residual
        wide = torch.randn(3, 12)
        expected = wide + reference.dropout(double.float(), 0.3, KEYS)
        assert torch.equal(dropout_add(double.float(), wide, 0.3, KEYS), expected)


def test_no_memory_but_its_own_is_touched() -> None:
    cases = [Case((3, 5, 7)), Case((2, 64)), Case((3, 13), add=True), Case((5, 33), first=(5,)), Case((3, 2, 5, 5))]

    def run() -> None:
        for case in cases:
            for dtype in (torch.float32, torch.bfloat16):
                with ORDERS[2]():
                    case.run(dtype)
                with COMPILED():
                    case.run(dtype)

    in_child(run)
