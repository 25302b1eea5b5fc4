"""The pseudo-inverse's CUDA source, emulated: against the reference in float64, and as an operation of torch."""

from __future__ import annotations

import functools
import random

import pytest
import torch
from comparison import difference
from guarded import in_child
from pinv_cases import CASES, assert_accurate, outputs_and_gradients, softmax_matrices
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from farspan.kernels import forms
from farspan.kernels.nystrom import nystrom_attention
from farspan.kernels.pinv import column_maximum, iterative_pinv, kernel, reference

ORDERS = tuple(functools.partial(forms.emulated, order) for order in (0, 1, 7))


@pytest.mark.parametrize("case", CASES)
def test_near_float64_in_any_order(case: str) -> None:
    assert_accurate(CASES[case](), 6, *ORDERS)


def test_any_size_and_number_of_iterations() -> None:
    choose = random.Random(3)
    for iterations in (0, 1, 2, 3, 5, 8, 12):
        a = softmax_matrices(choose.randint(1, 3), choose.randint(1, 31), choose.uniform(0.5, 4), seed=iterations)
        a = a * choose.uniform(0.2, 5)
        assert_accurate((a, column_maximum(a) * a.sum(-1).amax(-1)[:, None, None]), iterations, ORDERS[2])
    a = softmax_matrices(1, 47, 2.0)
    assert_accurate((a, column_maximum(a)), 2, ORDERS[2])


def test_as_part_of_attention() -> None:
    """Leading dimensions, narrow numbers, a mask, one start for all."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 24, 8, generator=generator) for _ in range(3))
    mask = torch.arange(24) < torch.tensor([[24], [15]])

    def run(dtype: torch.dtype, start: Tensor | None) -> list[Tensor]:
        given = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        y = nystrom_attention(*given, landmarks=6, mask=mask, start=start)
        return [y, *torch.autograd.grad(y.float().square().sum(), given)]

    for dtype, start in ((torch.float32, None), (torch.float32, torch.tensor(1.5)), (torch.bfloat16, None)):
        expected = run(dtype, start)
        with forms.emulated():
            found = run(dtype, start)
        for mine, theirs in zip(found, expected, strict=True):
            assert mine.dtype == theirs.dtype
            assert difference(mine, theirs) < (1e-5 if dtype == torch.float32 else 2e-2)


def test_strides_and_dimensions() -> None:
    a = softmax_matrices(6, 7, 2.0).view(2, 3, 7, 7)
    start = column_maximum(a[:, :1])
    turned = a.mT.contiguous().mT.expand(2, 3, 7, 7)
    expected = reference.pinv(a.double(), start.double(), 6)
    with forms.emulated():
        for given, its_start in ((turned, start), (a[0, 0], start[0, 0, 0, 0]), (a[:, 1], start[:, 0])):
            z = iterative_pinv(given, its_start)
            true = expected if given is turned else expected[0, 0] if given.dim() == 2 else expected[:, 1]
            assert z.shape == given.shape and difference(z, true) < 1e-5


def test_gradients_of_what_asks_for_them() -> None:
    a = softmax_matrices(2, 6, 2.0)
    start = column_maximum(a)
    with forms.emulated():
        both = outputs_and_gradients(iterative_pinv, (a, start), 3)
        for which, name in ((0, "gradient of a"), (1, "gradient of start")):
            given = [a.clone(), start.clone()]
            given[which].requires_grad_()
            z = iterative_pinv(*given, 3)
            weights = torch.linspace(-1, 2, z.numel(), dtype=torch.float64).sin().view(z.shape).to(z)
            (found,) = torch.autograd.grad((z * weights).sum(), given[which])
            assert torch.equal(found, both[name])
        assert not iterative_pinv(a, start).requires_grad


def test_absent_landmarks_are_absent_exactly() -> None:
    a, start = CASES["absent landmarks"]()
    there = a.sum(-1) > 0
    with forms.emulated():
        found = outputs_and_gradients(iterative_pinv, (a, start), 6)
    z = found["z"]
    assert not z[~there].any() and not z.mT[~there].any() and z[there].any()
    assert all(x.isfinite().all() for x in found.values())
    assert found["gradient of start"][0] == 0


def test_what_is_not_finite_stays_with_its_matrix() -> None:
    a = softmax_matrices(3, 6, 2.0)
    start = column_maximum(a)
    with forms.emulated():
        alone = iterative_pinv(a, start)
        a[1, 2, 3] = float("nan")
        z = iterative_pinv(a, start)
        assert torch.equal(z[::2], alone[::2]) and z[1].isnan().all()
        assert not iterative_pinv(a[:1], start[:1] / 1000).isfinite().all()  # it diverges


def test_nothing_to_do() -> None:
    a = torch.zeros(0, 8, 8, requires_grad=True)
    with forms.emulated():
        z = iterative_pinv(a, column_maximum(a))
        assert z.shape == a.shape
        z.sum().backward()
        assert a.grad is not None and a.grad.shape == a.shape


def test_an_operation_of_torch() -> None:
    a = softmax_matrices(2, 6, 2.0).requires_grad_()
    start = column_maximum(a).view(2).detach().requires_grad_()
    with forms.emulated():
        torch.library.opcheck(kernel.pinv_forward, (a, start, 2))
        torch.library.opcheck(kernel.pinv_backward, (a.detach(), a.detach(), start.detach(), 2))


def test_compiled_and_computed_again() -> None:
    case = softmax_matrices(2, 6, 2.0), torch.tensor([[[1.5]], [[2.0]]])
    with forms.emulated():
        expected = outputs_and_gradients(iterative_pinv, case, 3)
        whole = torch.compile(iterative_pinv, fullgraph=True, backend="aot_eager")
        again = functools.partial(checkpoint, iterative_pinv, use_reentrant=False)
        for run in (whole, again):
            found = outputs_and_gradients(run, case, 3)
            assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_what_it_does_not_take() -> None:
    a = softmax_matrices(1, 66, 2.0)
    start = column_maximum(a)
    with forms.emulated():
        for given, its_start, iterations, named in (
            (a, start, 6, "66 rows"),
            (a[:, :8, :8], start, 13, "13 iterations"),
            (a[:, :8, :8], start.expand(1, 8, 8), 6, r"\[1, 8, 8\]"),
        ):
            with pytest.raises(ValueError, match=named):
                iterative_pinv(given, its_start, iterations)
        double = a[:, :8, :8].double()
        assert torch.equal(iterative_pinv(double, start.double()), reference.pinv(double, start.double(), 6))


def test_no_memory_but_its_own_is_touched() -> None:
    def run() -> None:
        with forms.emulated():
            for m in (5, 16, 33):
                a = softmax_matrices(1, m, 2.0)
                outputs_and_gradients(iterative_pinv, (a, column_maximum(a)), 2)

    in_child(run)
