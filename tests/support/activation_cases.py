"""bias + GELU in CUDA against PyTorch in float64, on any device that runs it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from comparison import assert_identical, difference
from torch import Tensor

from farspan.kernels.activation import bias_gelu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 8), (3, 40), (65, 264), (2, 37, 136))  # of x: rows and features that no block divides

# Of results with so many bits, and what a sum of float32 in another order may add; of float32 the exponentials' too.
ALLOWED = {torch.float32: 2e-6, torch.bfloat16: 1.01 * 2.0**-8, torch.float16: 1.01 * 2.0**-11}


def inputs(shape: tuple[int, ...], dtype: torch.dtype, bias_dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """x from -6 to 6 and a few far beyond, the bias, the gradient of the result."""
    generator = torch.Generator().manual_seed(shape[-1])
    x = 2 * torch.randn(shape, generator=generator)
    x.view(-1)[::97] *= 20
    bias = torch.randn(shape[-1], generator=generator).to(bias_dtype or dtype)
    return x.to(dtype), bias, torch.randn(shape, generator=generator).to(dtype)


def run(function: Callable[..., Tensor], x: Tensor, bias: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    x, bias = x.detach().requires_grad_(), bias.detach().requires_grad_()
    y = function(x, bias)
    of_x, of_bias = torch.autograd.grad(y, (x, bias), gradient)
    return {"y": y.detach(), "gradient of x": of_x, "gradient of the bias": of_bias}


def assert_accurate(
    given: tuple[Tensor, ...], approximate: bool, *settings: Callable[[], AbstractContextManager[None]]
) -> None:
    """The form that runs within any of ``settings`` gives the same bits, near float64."""
    found = []
    for setting in settings:
        with setting():
            found.append(run(lambda x, bias: bias_gelu(x, bias, approximate), *given))
        assert_identical(found[-1], found[0])
    kind = "tanh" if approximate else "none"
    exact = run(lambda x, bias: F.gelu(x + bias, approximate=kind), *(t.cpu().double() for t in given))
    for name, value in found[0].items():
        assert value.dtype == (given[1] if name == "gradient of the bias" else given[0]).dtype
        if name == "gradient of the bias":
            error = difference(value.cpu(), exact[name])
        else:  # the few that are large must not hide others
            error = ((value.cpu().double() - exact[name]).abs() / exact[name].abs().clamp(min=1)).max().item()
        assert error <= ALLOWED[value.dtype], f"{name}: {error:.1e}, allowed {ALLOWED[value.dtype]:.1e}"
