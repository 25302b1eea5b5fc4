from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2FN

from farspan.kernels.activation import ACTIVATIONS


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_same_as_in_transformers(name: str) -> None:
    x = torch.cat((torch.linspace(-12, 12, 4001, dtype=torch.float64), torch.tensor([-100.0, 0.0, 100.0])))
    x, y = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours, theirs = ACTIVATIONS[name](x), ACT2FN[name](y)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)  # gelu_fast rounds sqrt(2/pi) to 10 digits
    ours.sum().backward()
    theirs.sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-6, atol=1e-8)


def test_the_exact_gelu_is_not_the_tanh_one() -> None:
    """A negative control: the comparison above tells them apart."""
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)
    assert (ACTIVATIONS["gelu"](x) - ACTIVATIONS["gelu_new"](x)).abs().max() > 1e-4
