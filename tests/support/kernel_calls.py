"""Every operation once, forward and backward, at small odd sizes: what checkers that slow a program down are run over.

python tests/support/kernel_calls.py OPERATION DEVICE
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from farspan.kernels import forms
from farspan.kernels.documents import Documents


def _numbers(*shape: int, device: str, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(device, dtype).requires_grad_()


def _backward(*outputs: Tensor) -> None:
    torch.stack([y.float().square().sum() for y in outputs]).sum().backward()


def _documents(ids: Tensor, *, causal: bool) -> Documents:
    index = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return Documents.of(ids, index, "document", causal=causal)


def dropout(device: str, dtype: torch.dtype) -> None:
    from farspan.kernels.dropout import dropout

    keys = torch.randint(-(2**62), 2**62, (5, 3), device=device)
    _backward(dropout(_numbers(5, 3, 77, device=device, dtype=dtype), 0.2, keys))


def layer_norm(device: str, dtype: torch.dtype) -> None:
    from farspan.kernels.layer_norm import dropout_add_layer_norm, layer_norm

    for features in (24, 1032):
        x, residual = (_numbers(7, 3, features, device=device, dtype=dtype) for _ in range(2))
        weight, bias = (_numbers(features, device=device, dtype=dtype) for _ in range(2))
        keys = torch.randint(-(2**62), 2**62, (7, 3), device=device)
        _backward(*dropout_add_layer_norm(x, residual, weight, bias, 1e-5, 0.1, keys))
        _backward(layer_norm(x, weight, bias, 1e-5))


def activation(device: str, dtype: torch.dtype) -> None:
    from farspan.kernels.activation import bias_gelu

    _backward(bias_gelu(_numbers(37, 40, device=device, dtype=dtype), _numbers(40, device=device, dtype=dtype), False))


def ema(device: str, dtype: torch.dtype) -> None:
    from farspan.kernels.ema import ema

    ids = torch.ones(2, 75, dtype=torch.int64, device=device)
    ids[0, 31:] = 2
    ids[1, 60:] = 0
    x = _numbers(75, 2, 11, device=device, dtype=dtype)
    parameters = [_numbers(2, 11, 16, device=device, dtype=torch.float32) for _ in range(4)]
    _backward(ema(x, *parameters)[0])
    _backward(ema(x, *parameters, documents=_documents(ids, causal=False))[0])
    one = [p[:1].detach().requires_grad_() for p in parameters]
    y, state = ema(x, *one, carry=True)
    _backward(y, ema(x, *one, state=state)[0])


def mra(device: str, dtype: torch.dtype) -> None:
    from farspan.kernels.mra import mra_attention

    q, k, v = (_numbers(2, 2, 131, 24, device=device, dtype=dtype, scale=2) for _ in range(3))
    mask = torch.rand(2, 131, device=device) < 0.8
    for sparse in (False, True):
        _backward(mra_attention(q, k, v, budget=9, mask=mask, sparse=sparse, first_blocks=1, diagonal_blocks=2))


def attention(device: str, dtype: torch.dtype) -> None:
    from farspan.kernels.attention import attention

    ids = torch.ones(2, 70, dtype=torch.int64, device=device)
    ids[:, 33:] = 2
    for causal in (False, True):
        q, k, v = (_numbers(70, 2, 2, 24, device=device, dtype=dtype) for _ in range(3))
        keys = torch.randint(-(2**62), 2**62, (2, 70, 2), device=device)
        _backward(attention(q, k, v, _documents(ids, causal=causal), p=0.1, keys=keys))


def pinv(device: str, dtype: torch.dtype) -> None:
    from farspan.kernels.pinv import column_maximum, iterative_pinv

    for m in (17, 64):
        a = torch.softmax(2 * torch.randn(3, m, m), -1).to(device).requires_grad_()
        _backward(iterative_pinv(a, column_maximum(a)))


def lm_head(device: str, dtype: torch.dtype) -> None:
    from farspan.kernels.lm_head import lm_head_loss

    x, weight = _numbers(19, 24, device=device, dtype=dtype), _numbers(131, 24, device=device, dtype=dtype)
    bias, labels = _numbers(131, device=device, dtype=dtype), torch.randint(0, 129, (19,), device=device)
    losses, _ = lm_head_loss(x, weight, bias, labels, size=129)
    _backward(losses)


CALLS: dict[str, Callable[[str, torch.dtype], None]] = {
    call.__name__: call for call in (activation, attention, dropout, ema, layer_norm, lm_head, mra, pinv)
}
ONLY_16_BITS = {"attention"}


def run(operation: str, device: str) -> None:
    """In every dtype that it takes.  ValueError: a kernel does not run."""
    torch.manual_seed(0)
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16)
    for dtype in dtypes[1:] if operation in ONLY_16_BITS else dtypes:
        CALLS[operation](device, dtype)
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    forms.configure("require")
    run(*sys.argv[1:])
