"""Uses of dropout that a kernel must mask bit for bit as the reference does: on any device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from comparison import assert_identical
from torch import Tensor

from farspan.kernels import forms
from farspan.kernels.dropout import DropoutKey, dropout, dropout_add

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Order = Callable[[], AbstractContextManager[None]]


@dataclasses.dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    p: float = 0.3
    first: int | tuple[int, ...] = 0  # a tuple: a tensor of this shape
    of_keys: tuple[int, ...] | None = None  # the shape of the keys; None: one a row
    add: bool = False

    def run(self, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(sum(self.shape))
        x, residual, upstream = torch.randn(3, *self.shape, generator=generator).to(device, dtype)
        shape = self.shape[:-1] if self.of_keys is None else self.of_keys
        places = torch.arange(torch.Size(shape).numel()).view(shape)
        keys = DropoutKey(5, 2, torch.tensor(3)).rows(3, places).to(device)
        first: int | Tensor = self.first if isinstance(self.first, int) else torch.randint(
            0, 99, self.first, generator=generator
        ).to(device)  # fmt: skip
        x.requires_grad_()
        residual.requires_grad_(self.add)
        y = dropout_add(x, residual, self.p, keys) if self.add else dropout(x, self.p, keys, first)
        gradients = torch.autograd.grad(y, (x, residual) if self.add else (x,), upstream)
        return {"y": y.detach()} | {f"gradient {i}": g for i, g in enumerate(gradients)}


def assert_as_the_reference(case: Case, dtype: torch.dtype, *orders: Order, device: str = "cpu") -> None:
    """The form that runs within any of ``orders`` gives the reference's bits."""
    with forms.mode("reference"):
        expected = case.run(dtype)
    for order in orders:
        with order():
            found = case.run(dtype, device)
        assert_identical({name: t.cpu() for name, t in found.items()}, expected)


CASES = {
    "whole vectors": Case((3, 5, 64)),
    "more than a block has": Case((70, 136)),
    "rows of odd length": Case((7, 5, 33)),
    "rows shorter than a vector": Case((4, 9, 3)),
    "one feature": Case((5, 7, 1)),
    "one number": Case((1, 1)),
    "long odd rows": Case((5, 4099)),
    "an even feature first": Case((3, 4, 40), first=6),
    "an odd feature first": Case((3, 4, 40), first=7),
    "odd rows, an odd feature first": Case((9, 21), first=1),
    "a first feature a row": Case((6, 5, 19), first=(6, 5)),
    "one for several rows": Case((6, 5, 4, 16), first=(6, 1, 1)),
    "one for all, in a tensor": Case((6, 5, 16), first=()),
    "weights of attention": Case((3, 2, 11, 11), first=(3, 1, 1)),
    "keys for several rows": Case((6, 4, 3, 24), of_keys=(6, 4, 1)),
    "keys by the last dimension": Case((6, 4, 24), of_keys=(4,)),
    "one key": Case((6, 4, 24), of_keys=()),
    "nearly all dropped": Case((9, 48), p=0.99998),
    "hardly any": Case((9, 48), p=1e-5),
    "none": Case((9, 48), p=1e-6),
    "and added": Case((5, 7, 40), add=True),
    "odd rows and added": Case((5, 7, 13), add=True),
    "the probability of the models": Case((64, 96), p=0.1, add=True),
}
