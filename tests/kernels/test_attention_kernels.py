"""The CUDA kernels of attention with dropout, emulated on a CPU: against the reference in float64, with its masks."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from attention_kernel_cases import CASES, DTYPES, Case, assert_masks, assert_right, random_cases, run
from guarded import in_child
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from farspan.kernels import forms
from farspan.kernels.attention import attention
from farspan.kernels.documents import Documents
from farspan.kernels.dropout import threshold
from farspan.kernels.library import Library

fused = importlib.import_module("farspan.kernels.attention.fused")
SMALL = Case(((40, 20, -4), (-1, 33, 30)), 16)


@pytest.fixture
def emulated() -> Iterator[None]:
    with forms.emulated():
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The functions that are called in the compiled library."""
    names: list[str] = []
    call = Library.call

    def counted(self: Library, function: str, *arguments: Any) -> None:
        if function.startswith("attention"):
            names.append(function)
        call(self, function, *arguments)

    monkeypatch.setattr(Library, "call", counted)
    return names


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_in_any_order(case: Case, dtype: torch.dtype, calls: list[str]) -> None:
    if dtype == torch.float16 and case.d not in (16, 40):
        pytest.skip("as bfloat16")
    found = []
    for order in (0, 1, 3):
        with forms.emulated(order):
            found.append(run(case, case.laid_out(dtype, "cpu")))
        assert_same(found[-1], found[0])
    assert calls == ["attention_forward", "attention_backward"] * 3
    assert_right(found[0], case, dtype)


@pytest.mark.parametrize("seed", range(3))
def test_any(seed: int) -> None:
    for i, case in enumerate(random_cases(8, 150, (16, 32, 40, 64, 80), seed)):
        dtype = DTYPES[i % 2]
        with forms.emulated(i):
            assert_right(run(case, case.laid_out(dtype, "cpu")), case, dtype)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("length", "shift", "p"), [(150, 0, 0.1), (71, 3, 0.5), (64, 1, 0.97), (33, 6, 1e-4)])
def test_masks_bit_for_bit(length: int, shift: int, p: float) -> None:
    assert_masks("cpu", length, shift, p)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("causal", [False, True])
def test_rows_joined_to_one_keep_every_bit(causal: bool) -> None:
    case = dataclasses.replace(CASES[2], causal=causal)
    *qkv, of_y = case.laid_out(torch.bfloat16, "cpu")
    before = run(case, [*qkv, of_y])
    row, position = (case.ids > 0).nonzero().unbind(1)
    ids = (case.ids + 100 * torch.arange(len(case.ids)).unsqueeze(1))[row, position].unsqueeze(0)
    documents = Documents.of(ids, position.unsqueeze(0), "document", causal=causal)
    q, k, v = (x[position, row].unsqueeze(1).detach().requires_grad_() for x in qkv)
    y = attention(q, k, v, documents, p=case.p, keys=case.keys()[:, position, row].unsqueeze(2))
    after = [y.detach(), *torch.autograd.grad(y, (q, k, v), of_y[position, row].unsqueeze(1))]
    assert_same([x.squeeze(1) for x in after], [x[position, row] for x in before])


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("causal", [False, True])
def test_numbers_at_padding_do_not_matter(causal: bool) -> None:
    case = dataclasses.replace(CASES[2], causal=causal, shift=1, h=1)
    tensors = case.laid_out(torch.bfloat16, "cpu")
    spoiled = [torch.where(case.real[..., None, None], x, torch.nan) for x in tensors]
    assert_same(run(case, spoiled), run(case, tensors))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("causal", [False, True])
def test_scores_that_rise_and_fall(causal: bool) -> None:
    """The reference of the sums changes often, seldom, and by more than an exponential holds."""
    case = Case(((150, 47),), 16, h=1, causal=causal)
    for slope in (0.0, 0.2, 3.0, -0.5, -3.0):
        for offset in (0.0, -1000.0):
            tensors = case.make(torch.bfloat16)
            tensors[0][:], tensors[1][:] = 1.0, 0.0
            tensors[1][..., 0] = (slope * torch.arange(197) + offset).bfloat16().double().view(-1, 1, 1)
            found = run(case, [x.bfloat16() for x in tensors])
            target = run(case, tensors)
            largest = (
                tensors[1].abs().max().item()
            )  # gradients of scores, which sum to 0, are rounded before they meet it
            for x, t, scale in zip(found, target, (1.0, largest, 1.0, 1.0), strict=True):
                assert (x.double() - t).norm() <= 0.03 * max(1.0, scale, t.norm())


@pytest.mark.usefixtures("emulated")
def test_what_takes_the_kernels(calls: list[str]) -> None:
    def called(case: Case, dtype: torch.dtype, documents: Documents, **options: Any) -> bool:
        calls.clear()
        options = {"p": case.p, "keys": case.keys()} | options
        attention(*case.laid_out(dtype, "cpu")[:3], documents, **options)
        return "attention_forward" in calls

    documents = SMALL.documents()
    assert called(SMALL, torch.bfloat16, documents)
    assert called(SMALL, torch.float16, documents)
    assert not called(SMALL, torch.float32, documents)
    assert not called(SMALL, torch.float64, documents)
    assert not called(SMALL, torch.bfloat16, documents, p=0.0)
    assert not called(SMALL, torch.bfloat16, documents, keys=None)
    assert not called(SMALL, torch.bfloat16, documents, weights="laplace")
    assert not called(SMALL, torch.bfloat16, documents, bias=torch.zeros(2 * 64 - 1))
    assert not called(SMALL, torch.bfloat16, documents, distances=torch.zeros(2 * 64 - 1, 16, dtype=torch.bfloat16))
    assert not called(SMALL, torch.bfloat16, SMALL.documents(form="grouped"))
    positions = torch.arange(64).expand(2, 64)
    for kind in ("document", "padding"):
        chunks = dataclasses.replace(SMALL, kind=kind).documents().chunks(8, positions)
        assert not called(SMALL, torch.bfloat16, chunks), kind
    for d, found in ((8, False), (16, True), (20, False), (24, True), (128, True), (136, False)):
        case = Case(((3,),), d)
        assert called(case, torch.bfloat16, case.documents()) == found, d
    ids = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]])
    holes = Documents.of(ids, torch.arange(4).expand(2, 4), "padding", causal=False)
    assert not called(Case(((4,), (4,))), torch.bfloat16, holes)
    nothing = Case(((-4,), (-2,)))
    assert not called(nothing, torch.bfloat16, nothing.documents())
    with forms.mode("reference"):
        assert not called(SMALL, torch.bfloat16, documents)


@pytest.mark.usefixtures("emulated")
def test_gradients_that_are_asked_for() -> None:
    whole = run(SMALL, SMALL.laid_out(torch.bfloat16, "cpu"))
    options: dict[str, Any] = {"p": SMALL.p, "keys": SMALL.keys()}
    for wanted in range(3):
        *leaves, of_y = (x.detach() for x in SMALL.laid_out(torch.bfloat16, "cpu"))
        leaves[wanted].requires_grad_()
        y = attention(*leaves, SMALL.documents(), **options)
        (found,) = torch.autograd.grad(y, leaves[wanted], of_y)
        assert_same([y.detach(), found], [whole[0], whole[1 + wanted]])
    assert not attention(*(x.detach() for x in leaves), SMALL.documents(), **options).requires_grad
    q = leaves[0].detach().requires_grad_()
    gradients = [  # of a sum it is one number, expanded
        torch.autograd.grad(attention(q, *leaves[1:], SMALL.documents(), **options), q, upstream)[0]
        for upstream in (torch.ones(()).bfloat16().expand(q.shape), torch.ones(q.shape).bfloat16())
    ]
    assert_same(gradients[:1], gradients[1:])


@pytest.mark.usefixtures("emulated")
def test_a_registered_operation() -> None:
    for case in (SMALL, dataclasses.replace(SMALL, kind="full", causal=True)):
        q, k, v, of_y = case.laid_out(torch.bfloat16, "cpu")
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        documents, keys = case.documents(), case.keys()
        tiles, everywhere = documents.tiles
        torch.library.opcheck(
            torch.ops.farspan.attention_forward.default,
            (*leaves, keys, tiles, threshold(case.p), case.causal, everywhere),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )
        y, logarithms = torch.ops.farspan.attention_forward(q, k, v, keys, tiles, 6554, case.causal, everywhere)
        torch.library.opcheck(
            torch.ops.farspan.attention_backward.default,
            (q, k, v, keys, tiles, y, logarithms, of_y, 6554, case.causal, everywhere),
            test_utils=("test_schema", "test_faketensor"),
        )

        def attend(
            q: Tensor, k: Tensor, v: Tensor, keys: Tensor = keys, documents: Documents = documents, p: float = case.p
        ) -> Tensor:
            return attention(q * 1.0, k, v, documents, p=p, keys=keys)

        def gradients(y: Tensor, leaves: list[Tensor] = leaves) -> list[Tensor]:
            return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

        target = gradients(attend(*leaves))
        options: dict[str, Any] = {"fullgraph": True, "backend": "aot_eager"}
        assert_same(gradients(torch.compile(attend, **options)(*leaves)), target)
        assert_same(gradients(checkpoint(attend, *leaves, use_reentrant=False)), target)  # type: ignore[arg-type]


def test_memory_beyond_tensors_is_left_alone() -> None:
    def some() -> None:
        with forms.emulated():
            for case in (
                Case(((33, 2), (1, 31)), 40, causal=True), Case(((-1, 69),), 64, h=1, shift=1, layout="dense"),
                Case(((35,), (35,)), 128, kind="full"),
            ):  # fmt: skip
                run(case, case.laid_out(torch.bfloat16, "cpu"))

    with forms.emulated():
        forms.compiled("attention", torch.device("cpu"))
    in_child(some)
