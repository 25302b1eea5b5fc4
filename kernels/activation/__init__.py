"""The pointwise functions between the two products of a feed-forward layer, by their Hugging Face names."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import forms
from . import kernel


def gelu(x: Tensor) -> Tensor:
    """x Φ(x) with the exact error function (arXiv 1606.08415)."""
    return F.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of GELU (arXiv 1606.08415, section 2): Hugging Face's ``gelu_new``."""
    return F.gelu(x, approximate="tanh")


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)² (arXiv 2109.08668)."""
    return F.relu(x).square()


def quick_gelu(x: Tensor) -> Tensor:
    """x σ(1.702 x) (arXiv 1606.08415, section 2)."""
    return x * torch.sigmoid(1.702 * x)


def bias_gelu(x: Tensor, bias: Tensor, approximate: bool) -> Tensor:
    """gelu(x + bias), or with ``approximate`` gelu_tanh.

    x: [..., features]; bias: [features].  Compiled, the sum is not rounded to x's dtype, and the gradients of both come
    of one reading; without the bias of ``gelu(linear(...))`` the latter takes another.
    """
    wide = torch.float64 in (x.dtype, bias.dtype)
    if not wide and bias.shape == x.shape[-1:] and forms.compiled("activation", x.device):
        if (reason := _no_kernel(x.dtype, bias.dtype, x.shape[-1])) is None:
            return kernel.bias_gelu_forward(x, bias, approximate)
        forms.declined("activation", reason)
    return F.gelu(x + bias, approximate="tanh" if approximate else "none")


def takes_bias(activation: Callable[[Tensor], Tensor], x: Tensor, features: int) -> bool:
    """Whether ``bias_gelu`` runs compiled in place of ``activation`` of [..., features] that a product of x gives: the
    product then needs no bias."""
    return (
        activation in (gelu, gelu_tanh)
        and x.dtype in kernel.DTYPES
        and features % kernel.WIDTH == 0
        and forms.compiled("activation", x.device)
    )


def _no_kernel(x: torch.dtype, bias: torch.dtype, features: int) -> str | None:
    if x not in kernel.DTYPES or bias not in kernel.DTYPES:
        return f"{x} and a bias of {bias}, it takes {', '.join(map(str, kernel.DTYPES))}"
    if features == 0 or features % kernel.WIDTH:
        return f"{features} features, it takes multiples of {kernel.WIDTH}"
    return None


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_python": gelu,
    "gelu_accurate": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "linear": lambda x: x,
    "mish": F.mish,
    "relu": F.relu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "relu2": relu_squared,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}
