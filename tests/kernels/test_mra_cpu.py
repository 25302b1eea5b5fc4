"""MRA-2 attention in C++: against the definition in float64, and the same bits whatever the number of threads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from guarded import in_child
from mra_cases import CASES, Case, assert_lists, assert_right, random_cases, spoiled
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from farspan.kernels import forms, toolchain
from farspan.kernels.mra.blocks import blocks
from farspan.kernels.mra.compiled_cpu import compiled_cpu
from farspan.kernels.mra.reference import reference
from farspan.kernels.mra.selection import BLOCK, Options, Selection

CPU = torch.device("cpu")
SIZES = (1, 3, 8, 16, 20, 33, 64, 72)
MORE_CASES = [
    Case(1, 1, 1),
    Case(1000, 8, 400, "holes", diagonal=1),  # rows of more blocks than are held at once
    Case(2100, 4, 130, "blocks", h=2),  # more than two groups of means
    Case(70, 7, 9),
    Case(333, 33, 40, "left", first=2, n=2, h=3, layout="parts"),
]


def missing() -> str:
    try:
        toolchain.compiler(toolchain.Target.host("cpu"))
    except toolchain.BuildError as error:
        return str(error)
    return ""


pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


def options_of(case: Case) -> Options:
    nb = -(-case.l // BLOCK)
    return Options(min(case.budget, nb * nb), case.sparse, case.first, case.diagonal)


def run(
    case: Case, tensors: list[Tensor], form: Callable[..., Tensor] = compiled_cpu, mask: Tensor | None = None
) -> list[Tensor]:
    """The result and the gradients of q, k, v."""
    *leaves, of_y = (x.detach() for x in tensors)
    for x in leaves:
        x.requires_grad_()
    y = form(*leaves, case.make_mask() if mask is None else mask, options_of(case))
    return [y.detach(), *torch.autograd.grad(y, leaves, of_y)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for name, a, b in zip(("y", "q", "k", "v"), found, expected, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES + MORE_CASES, ids=str)
def test_the_definition(case: Case, dtype: torch.dtype) -> None:
    assert_right(run(case, case.laid_out(dtype, "cpu")), case, dtype)


@pytest.mark.parametrize("seed", range(4))
def test_any(seed: int) -> None:
    for i, case in enumerate(random_cases(25, 300, SIZES, seed)):
        # The gradients of a query of few features nearly cancel: what 16 bits leave of them says nothing.
        dtype = torch.bfloat16 if i % 4 == 3 and case.d >= 16 else torch.float32
        assert_right(run(case, case.laid_out(dtype, "cpu")), case, dtype)


@pytest.mark.parametrize(("d", "e"), [(5, 40), (40, 5), (64, 16), (1, 33)])
def test_values_of_another_size(d: int, e: int) -> None:
    case = Case(150, max(d, e), 9, "holes", h=2)
    q, k, v, of_y = case.make(torch.float32)
    tensors = [q[..., :d], k[..., :d], v[..., :e], of_y[..., :e]]
    expected = run(case, tensors, reference)
    for x, t in zip(run(case, [x.float() for x in tensors]), expected, strict=True):
        assert (x - t).norm() <= 2e-6 * max(t.norm(), 0.2 * expected[3].norm())


def test_no_less_accurate_than_tensors() -> None:
    """The errors of float32, all cases together, beside those of the form in PyTorch."""
    errors = {form: torch.zeros(4) for form in (compiled_cpu, blocks)}
    for case in random_cases(20, 400, (16, 64), 7):
        target = run(case, case.make(torch.float32), reference)
        for form, total in errors.items():
            found = run(case, case.laid_out(torch.float32, "cpu"), form)
            total += torch.tensor(
                [(x - t).norm() ** 2 / (t.norm() ** 2 + 1) for x, t in zip(found, target, strict=True)]
            )
    assert (errors[compiled_cpu].sqrt() <= 1.3 * errors[blocks].sqrt()).all(), errors


@pytest.mark.parametrize("case", random_cases(12, 600, (8, 24), 3), ids=str)
def test_selection(case: Case) -> None:
    q, k, v, _ = case.laid_out(torch.float32, "cpu")
    options = options_of(case)
    found = torch.ops.farspan.mra_cpu_forward(q, k, v, case.make_mask(), *options, True)
    selection = Selection(found[3].long(), found[4].long())
    nb = selection.counts.shape[1]
    chosen = torch.zeros(len(found[3]), nb * nb, dtype=torch.bool).scatter_(1, selection.indices, True)
    assert_lists((selection.pointers, selection.columns, chosen), case, q, k)


def test_ties_go_to_the_lower_index_and_lose_no_block() -> None:
    q, k, v, _ = Case(320, 8, 1, h=2).laid_out(torch.float32, "cpu")
    q[:], k[:] = q[:, :, :1], k[:, :, :1]
    for budget in (1, 7, 10, 50, 99, 100):
        y, _, _, pointers, columns = torch.ops.farspan.mra_cpu_forward(q, k, v, None, budget, False, 0, 0, True)
        torch.testing.assert_close(y, v.mean(2, keepdim=True).expand_as(v), rtol=1e-6, atol=1e-6)
        assert torch.equal(Selection(pointers.long(), columns.long()).indices, torch.arange(budget).expand(2, -1))


@pytest.mark.parametrize("asked", ["q", "k", "v", "qk", "qv", "kv", "qkv"])
def test_the_same_bits_for_any_number_of_threads(asked: str) -> None:
    """And whatever gradients are asked for; with a matrix for each thread, and with less."""
    for case in (
        Case(420, 20, 40, "holes", h=6, diagonal=1),
        Case(1200, 16, 150),
        Case(200, 24, 20, "left", sparse=True, h=2),
    ):
        *tensors, of_y = case.laid_out(torch.float32, "cpu")
        expected = dict(zip("yqkv", run(case, [*tensors, of_y]), strict=True))
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = [x.detach().requires_grad_(name in asked) for name, x in zip("qkv", tensors, strict=True)]
            y = compiled_cpu(*leaves, case.make_mask(), options_of(case))
            assert torch.equal(y, expected["y"])
            y.backward(of_y)
            for name, x in zip("qkv", leaves, strict=True):
                assert (x.grad is not None) == (name in asked)
                assert x.grad is None or torch.equal(x.grad, expected[name]), (threads, name)


def test_tensors_as_they_lie_in_a_model() -> None:
    case = Case(150, 24, 9, "holes", n=2, h=3)
    tensors = case.laid_out(torch.float32, "cpu")
    expected = run(case, tensors)
    for layout in ("turned", "parts"):
        assert_same(run(case, dataclasses.replace(case, layout=layout).laid_out(torch.float32, "cpu")), expected)
    apart = [torch.stack((x, x), 4)[..., 0] for x in tensors]
    assert_same(run(case, apart), expected)
    one = torch.ones(()).expand_as(tensors[3])
    assert_same(run(case, [*tensors[:3], one]), run(case, [*tensors[:3], one.contiguous()]))
    mask = case.make_mask()
    assert mask is not None
    assert_same(run(case, tensors, mask=torch.stack((mask, ~mask), 2)[..., 0]), expected)


def test_numbers_at_padding_do_not_matter() -> None:
    for case in (Case(100, 8, 5, "holes", n=2), Case(100, 20, 16, "blocks", n=2, sparse=True)):
        mask, tensors = case.make_mask(), case.laid_out(torch.float32, "cpu")
        assert mask is not None
        assert_same(run(case, spoiled(tensors, mask)), run(case, tensors))


@pytest.mark.parametrize("size", [1e2, 1e5, 1e15])
def test_logits_of_any_size_give_finite_numbers(size: float) -> None:
    for sparse in (False, True):
        case = Case(200, 8, 9, "holes", sparse=sparse, size=size)
        y, *gradients = run(case, case.laid_out(torch.float32, "cpu"))
        assert all(x.isfinite().all() for x in (y, gradients[2]))
        assert y.abs().max() <= case.make(torch.float32)[2].abs().max() * 1.001


@pytest.mark.parametrize("offset", [-1000.0, 1000.0])
def test_all_logits_far_from_zero(offset: float) -> None:
    """Padding, whose logits would be 0, must not be the highest of any sum; logits that float32 holds exactly, but for
    those of means."""
    for case in (Case(100, 4, 16, "holes"), Case(100, 4, 5, "holes"), Case(128, 4, 5)):
        tensors = case.make(torch.float32)
        tensors[0][:], tensors[1][:] = 2.0, torch.tensor([offset, offset, 2 * offset, -offset])
        found, expected = run(case, [x.float() for x in tensors]), run(case, tensors, reference)
        for x, t in zip(found[::3], expected[::3], strict=True):
            assert (x - t).norm() <= (1e-6 if case.budget == 16 else 2e-4) * t.norm()


def test_a_number_that_is_none_is_not_hidden() -> None:
    for name in range(3):
        *tensors, _ = Case(100, 8, 16).laid_out(torch.float32, "cpu")
        tensors[name][0, 0, 40] = torch.nan
        y = compiled_cpu(*tensors, None, Options(16, False, 0, 0))
        assert y[0, 0, 40].isnan().all()
        assert y.isfinite().any() == (name == 0)


def test_nothing_outside_the_tensors_is_touched() -> None:
    def calls() -> None:
        for case in (
            Case(100, 20, 7, "holes", h=2, diagonal=1),
            Case(65, 7, 9, layout="parts", n=2),
            Case(64, 64, 2, sparse=True),
        ):
            for dtype in (torch.float32, torch.bfloat16):
                run(case, case.laid_out(dtype, "cpu"))

    calls()  # built
    in_child(calls)


def test_nothing_to_attend_to() -> None:
    for shape in ((0, 2, 100, 4), (1, 0, 100, 4), (1, 2, 100, 0)):
        q, k = (torch.ones(*shape[:3], 4, requires_grad=True) for _ in range(2))
        y = compiled_cpu(q, k, torch.ones(shape, requires_grad=True), None, Options(3, False, 0, 0))
        assert y.shape == shape
        y.sum().backward()
        assert q.grad is not None and not q.grad.any()


def test_nothing_is_kept_without_gradients() -> None:
    q, k, v, _ = Case(100, 4, 1).laid_out(torch.float32, "cpu")
    assert [x.numel() for x in torch.ops.farspan.mra_cpu_forward(q, k, v, None, 5, False, 0, 0, False)[1:]] == [0] * 4
    leaf = q.clone().requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        with torch.no_grad():
            assert not compiled_cpu(leaf, k, v, None, Options(5, False, 0, 0)).requires_grad
        assert not compiled_cpu(q, k, v, None, Options(5, False, 0, 0)).requires_grad
        assert not saved
        assert compiled_cpu(leaf, k, v, None, Options(5, False, 0, 0)).requires_grad
    assert sum(t.numel() for t in saved) == 4 * q.numel() + 2 * 128 + 5 + 5


def test_other_dtypes() -> None:
    """float64 is left to PyTorch; unlike ones meet in float32."""
    case = Case(100, 8, 5, "holes")
    tensors = case.make(torch.float32)
    assert_same(run(case, tensors), run(case, tensors, blocks))
    mixed = [
        x.to(dtype) for x, dtype in zip(tensors, (torch.bfloat16, *[torch.float32] * 2, torch.bfloat16), strict=True)
    ]
    found = run(case, mixed)
    assert [x.dtype for x in found] == [torch.bfloat16] * 2 + [torch.float32] * 2


def test_as_a_registered_operation() -> None:
    case = Case(70, 8, 4, "holes", h=2)
    *tensors, of_y = case.laid_out(torch.float32, "cpu")
    leaves = [x.clone().requires_grad_() for x in tensors]
    operation: Any = torch.ops.farspan.mra_cpu_forward.default
    torch.library.opcheck(operation, (*leaves, case.make_mask(), *options_of(case), True))
    expected = run(case, [*tensors, of_y])

    mask, options = case.make_mask(), options_of(case)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return compiled_cpu(q, k, v, mask, options)

    for call in (
        torch.compile(attend, fullgraph=True, backend="aot_eager"),
        lambda *x: checkpoint(attend, *x, use_reentrant=False),
    ):
        y = call(*leaves)
        assert_same([y.detach(), *torch.autograd.grad(y, leaves, of_y)], expected)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        (first,) = torch.autograd.grad(attend(*leaves).sum(), leaves[:1], create_graph=True)
        torch.autograd.grad(first.sum(), leaves)


def test_mode() -> None:
    with forms.mode("require"):
        assert forms.compiled("mra", CPU)
    assert forms.library("mra", CPU).threads
