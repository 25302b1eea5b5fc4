"""The iterated pseudo-inverse against the formula in float64, and against the pseudo-inverse itself."""

from __future__ import annotations

import pytest
import torch
from comparison import assert_close, difference
from torch import Tensor

from farspan.kernels.pinv import column_maximum, iterative_pinv


def softmax_matrices(*shape: int, spread: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return (spread * torch.randn(*shape, dtype=torch.float64, generator=generator)).softmax(-1)


def by_hand(a: Tensor, start: Tensor, iterations: int) -> Tensor:
    """The formula as it is printed, for a [m, m] matrix."""
    i, z = torch.eye(len(a), dtype=a.dtype), a.T / start
    for _ in range(iterations):
        z = z @ (13 * i - a @ z @ (15 * i - a @ z @ (7 * i - a @ z))) / 4
    return z


@pytest.mark.parametrize("iterations", [0, 1, 6])
def test_the_formula(iterations: int) -> None:
    a = softmax_matrices(2, 3, 7, 7)
    for start in (column_maximum(a), torch.tensor(2.5, dtype=torch.float64)):
        of_each = start.expand(2, 3, 1, 1)
        expected = [[by_hand(a[i, j], of_each[i, j, 0, 0], iterations) for j in range(3)] for i in range(2)]
        z = iterative_pinv(a, start, iterations)
        assert difference(z, torch.stack([torch.stack(row) for row in expected])) < 1e-13
    assert difference(iterative_pinv(a[0, 0], a.new_tensor(2.5), iterations), by_hand(a[0, 0], 2.5, iterations)) < 1e-13


def test_comes_to_the_pseudo_inverse() -> None:
    """Six iterations are enough where tokens attend to themselves; any matrix takes a few more, singular ones too."""
    a = softmax_matrices(8, 16, 16, spread=2.0)
    peaked = (a + torch.eye(16, dtype=torch.float64)) / 2
    expected = torch.linalg.pinv(peaked)
    errors = [difference(iterative_pinv(peaked, column_maximum(peaked), n), expected) for n in (2, 4, 6)]
    assert errors == sorted(errors, reverse=True) and errors[2] < 1e-6
    assert difference(iterative_pinv(a, column_maximum(a), 20), torch.linalg.pinv(a)) < 1e-9
    low = softmax_matrices(4, 6, 3) @ softmax_matrices(4, 3, 6)  # rank 3, rows still sum to one
    assert difference(iterative_pinv(low, column_maximum(low), 20), torch.linalg.pinv(low, rtol=1e-9)) < 1e-6


def test_a_smaller_start_is_a_better_one() -> None:
    """Why each matrix starts from its own column sum, not from the largest of all."""
    a = softmax_matrices(6, 10, 10, spread=3.0)
    own, shared = column_maximum(a), column_maximum(a).amax()
    expected = torch.linalg.pinv(a)
    errors = [difference(iterative_pinv(a, start) @ a, expected @ a) for start in (own, shared, 4 * shared)]
    assert errors == sorted(errors)


def test_column_maximum() -> None:
    a = softmax_matrices(2, 3, 5, 5)
    expected = [
        [max(sum(a[i, j, row, column] for row in range(5)) for column in range(5)) for j in range(3)] for i in (0, 1)
    ]
    assert column_maximum(a).shape == (2, 3, 1, 1)
    assert difference(column_maximum(a)[..., 0, 0], torch.tensor(expected)) < 1e-15


def test_gradients() -> None:
    a = softmax_matrices(2, 4, 4).requires_grad_()
    start = (column_maximum(a) + 0.1).detach().requires_grad_()
    assert torch.autograd.gradcheck(iterative_pinv, (a, start))
    assert torch.autograd.gradcheck(lambda a: iterative_pinv(a, column_maximum(a)), (a,))
    assert torch.autograd.gradcheck(lambda a: iterative_pinv(a, a.new_tensor(3.0), 2), (a,))


def test_empty_landmarks_stay_empty() -> None:
    """Zero rows and columns: the rest is as if they were not there, and a matrix of zeros has zeros for an inverse."""
    there = torch.tensor([1, 0, 1, 1, 0, 0]).bool()
    part = softmax_matrices(3, 3)
    a = part.new_zeros(2, 6, 6)
    a[0] = a[0].masked_scatter(there[:, None] & there, part)
    a.requires_grad_()
    z = iterative_pinv(a, column_maximum(a))
    expected = iterative_pinv(part, column_maximum(part))
    assert difference(z[0][there][:, there], expected) < 1e-13
    assert not z[0][~there].any() and not z[0][:, ~there].any() and not z[1].any()
    (gradient,) = torch.autograd.grad(z.square().sum(), a)
    assert gradient.isfinite().all()


def test_narrow_numbers_are_computed_in_float32() -> None:
    a = softmax_matrices(3, 8, 8, spread=2.0)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        given = a.to(dtype).requires_grad_()
        z = iterative_pinv(given, column_maximum(given.float()))
        assert z.dtype == torch.float32
        exact = given.detach().double()
        assert_close(z, iterative_pinv(exact, column_maximum(given.float()).double()), f"{dtype}")
        (gradient,) = torch.autograd.grad(z.sum(), given)
        assert gradient.dtype == dtype


def test_only_two_matrices_are_kept() -> None:
    kept: list[Tensor] = []
    a = softmax_matrices(2, 4, 4).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        iterative_pinv(a, a.new_tensor(2.0))
    assert sum(x.numel() for x in kept if x.dim() == 3) <= 3 * a.numel()  # the division keeps one
