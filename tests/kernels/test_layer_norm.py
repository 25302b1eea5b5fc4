from __future__ import annotations

import pytest
import torch
from torch import Tensor

from farspan.kernels.dropout import DropoutKey, keep_mask, threshold
from farspan.kernels.layer_norm import dropout_add_layer_norm, layer_norm

EPS = 1e-5
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def tensors(dtype: torch.dtype, features: int, *, offset: float = 0.0) -> list[Tensor]:
    """x, residual [7, 3, features], weight, bias [features]"""
    generator = torch.Generator().manual_seed(features)
    shapes = ((7, 3, features), (7, 3, features), (features,), (features,))
    return [(torch.randn(shape, generator=generator) + offset).to(dtype).requires_grad_() for shape in shapes]


def normalised(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The definition (arXiv 1607.06450, equation 4), variance with 1/n."""
    centred = x - x.sum(-1, keepdim=True) / x.shape[-1]
    variance = (centred * centred).sum(-1, keepdim=True) / x.shape[-1]
    return centred / (variance + EPS).sqrt() * weight + bias


def assert_near(value: Tensor | None, expected: Tensor | None, dtype: torch.dtype) -> None:
    assert value is not None
    assert expected is not None
    assert value.dtype == dtype
    error = (value.double() - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCE[dtype], f"off by {error:.1e} of the largest"


@pytest.mark.parametrize("features", [5, 64, 1000])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_layer_norm(dtype: torch.dtype, features: int) -> None:
    x, _, weight, bias = tensors(dtype, features)
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    y, expected = layer_norm(x, weight, bias, EPS), normalised(*exact)
    assert_near(y, expected, dtype)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    y.backward(upstream)
    expected.backward(upstream.double())
    for ours, theirs in zip((x, weight, bias), exact, strict=True):
        assert_near(ours.grad, theirs.grad, dtype)


def test_statistics_of_bfloat16_are_float32() -> None:
    """With a mean of 16 a bfloat16 sum of squares would have lost the variance."""
    x, _, weight, bias = tensors(torch.bfloat16, 1000, offset=16.0)
    expected = normalised(*(t.detach().double() for t in (x, torch.ones(1000), torch.zeros(1000))))
    y = layer_norm(x, torch.ones_like(weight), torch.zeros_like(bias), EPS)
    assert_near(y, expected, torch.bfloat16)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dropout_add_layer_norm(dtype: torch.dtype, p: float) -> None:
    x, residual, weight, bias = tensors(dtype, 33)
    keys = DropoutKey(1, 2, torch.arange(3)).rows(4, torch.arange(7).unsqueeze(1))
    exact = [t.detach().double().requires_grad_() for t in (x, residual, weight, bias)]
    factor = keep_mask(keys, 33, p).double() / (1 - threshold(p) / 65536)
    total, y = dropout_add_layer_norm(x, residual, weight, bias, EPS, p, keys)
    expected_total = exact[1] + exact[0] * factor
    expected = normalised(expected_total, exact[2], exact[3])
    assert_near(total, expected_total, dtype)
    assert_near(y, expected, dtype)
    # Both results are used further on: the gradient of the sum has two parts.
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randn(y.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    ((total * first.to(dtype)).sum() + (y * second.to(dtype)).sum()).backward()
    ((expected_total * first).sum() + (expected * second).sum()).backward()
    for ours, theirs in zip((x, residual, weight, bias), exact, strict=True):
        assert_near(ours.grad, theirs.grad, dtype)


def test_without_keys_nothing_is_dropped() -> None:
    x, residual, weight, bias = tensors(torch.float32, 16)
    total, y = dropout_add_layer_norm(x, residual, weight, bias, EPS, 0.5, None)
    assert torch.equal(total, residual + x)
    assert torch.equal(y, layer_norm(residual + x, weight, bias, EPS))
