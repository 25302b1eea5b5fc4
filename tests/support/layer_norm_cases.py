"""Rows to normalise, alone and after dropout and addition, and how near float64 it must come: on any device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from comparison import assert_identical, difference
from torch import Tensor

from farspan.kernels import forms
from farspan.kernels.dropout import DropoutKey
from farspan.kernels.layer_norm import dropout_add_layer_norm, layer_norm, reference

EPS = 1e-5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of the reference's own error in the dtype; and what is no error even where that one happens to be nothing.
TIMES = 2.0
LEAST = {torch.float32: 4e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}
NAMES = ("x", "residual", "weight", "bias")

Order = Callable[[], AbstractContextManager[None]]


@dataclasses.dataclass(frozen=True)
class Case:
    """Tensors of float32; ``run`` casts them."""

    rows: int
    features: int
    p: float | None = 0.3  # None: layer_norm alone
    affine: tuple[bool, bool] = (True, True)
    wide: bool = False  # the weights are float32 whatever x is
    used: str = "both"  # which outputs go on: "both", "total", "y"
    wanted: tuple[str, ...] = NAMES  # which inputs have a gradient
    offset: float = 0.0

    def tensors(self, device: str = "cpu") -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.rows * 31 + self.features)
        x, residual, of_total, of_y = torch.randn(4, self.rows, self.features, generator=generator)
        weight, bias = torch.randn(2, self.features, generator=generator)
        made = {"x": x + self.offset, "of_total": of_total, "of_y": of_y}
        if self.p is not None:
            made["residual"] = residual
        made |= {name: t for name, t, there in zip(NAMES[2:], (weight, bias), self.affine, strict=True) if there}
        return {name: t.to(device) for name, t in made.items()}

    def keys(self, device: torch.device | str = "cpu") -> Tensor:
        return DropoutKey(5, 2, torch.zeros(1, dtype=torch.int64)).rows(3, torch.arange(self.rows)).to(device)

    def run(self, dtype: torch.dtype, device: str = "cpu", *, exact: bool = False) -> dict[str, Tensor]:
        """Outputs and gradients; ``exact``: by the reference, in float64, from the numbers that ``dtype`` holds."""
        given = {}
        for name, t in self.tensors(device).items():
            t = t.to(torch.float32 if self.wide and name in ("weight", "bias") else dtype)
            given[name] = (t.double() if exact else t).requires_grad_(name in self.wanted)
        weight, bias = given.get("weight"), given.get("bias")
        if self.p is None:
            normalise = reference.layer_norm if exact else layer_norm
            outputs = {"y": normalise(given["x"], weight, bias, EPS)}
        else:
            both = reference.dropout_add_layer_norm if exact else dropout_add_layer_norm
            total, y = both(given["x"], given["residual"], weight, bias, EPS, self.p, self.keys(device))
            outputs = {"total": total, "y": y}
        ends = [name for name in outputs if self.used in ("both", name) and outputs[name].requires_grad]
        inputs = {name: given[name] for name in self.wanted if name in given}
        gradients: Sequence[Tensor | None] = [None] * len(inputs)
        if ends and inputs:
            gradients = torch.autograd.grad(
                [outputs[name] for name in ends], list(inputs.values()), [given[f"of_{name}"] for name in ends],
                allow_unused=True,
            )  # fmt: skip
        found = {name: t.detach() for name, t in outputs.items()}
        return found | {f"of {name}": g for name, g in zip(inputs, gradients, strict=True) if g is not None}


def assert_accurate(case: Case, dtype: torch.dtype, *orders: Order, device: str = "cpu") -> None:
    """The form that runs within any of ``orders`` gives the same bits, near float64."""
    found = []
    for order in orders:
        with order():
            found.append(case.run(dtype, device))
        assert_identical(found[-1], found[0])
    exact = case.run(dtype, exact=True)
    with forms.mode("reference"):
        plain = {} if case.wide else case.run(dtype)  # torch's backward does not take float32 weights everywhere
    for name, true in exact.items():
        # Without a use of y the gradients of weight and bias are none, or zeros.
        value = found[0].get(name, torch.zeros_like(true)).cpu()
        mine, theirs = difference(value, true), difference(plain[name], true) if name in plain else LEAST[dtype]
        assert mine <= TIMES * theirs + LEAST[dtype], f"{name}: error {mine:.1e}, of the reference {theirs:.1e}"


CASES = {
    "8 features": Case(5, 8),
    "one row": Case(1, 64),
    "more rows than a block has": Case(37, 64),
    "24 features": Case(9, 24),
    "two vectors a lane": Case(6, 264),
    "three vectors a lane": Case(6, 768),
    "a full warp": Case(35, 1024),
    "a warp more": Case(5, 1032),
    "a warp more, many rows": Case(53, 1032),
    "two warps, the second nearly empty": Case(3, 1040),
    "five eighths of four warps": Case(4, 2560),
    "sixteen warps": Case(3, 8200),
    "the most features": Case(2, 16384),
    "no dropout": Case(9, 48, p=0.0),
    "the norm alone": Case(20, 136, p=None),
    "the norm alone, many warps": Case(3, 4096, p=None),
    "no weights": Case(7, 40, affine=(False, False)),
    "no bias": Case(7, 40, affine=(True, False)),
    "no weight": Case(7, 40, affine=(False, True)),
    "float32 weights": Case(7, 72, wide=True),
    "float32 weights, three vectors": Case(5, 592, wide=True),
    "only the sum goes on": Case(7, 72, used="total"),
    "only the norm goes on": Case(7, 72, used="y"),
    "no dropout, only the norm goes on": Case(7, 72, p=0.0, used="y"),
    "far from zero": Case(6, 512, p=0.0, offset=30.0),
    "far from zero, two warps": Case(3, 1536, p=None, offset=30.0),
    "of x alone": Case(5, 56, wanted=("x",)),
    "of the residual alone": Case(5, 56, wanted=("residual",)),
    "of the residual alone, no dropout": Case(5, 56, p=0.0, wanted=("residual",)),
    "of the weight alone": Case(5, 56, wanted=("weight",)),
    "of the bias alone": Case(5, 56, wanted=("bias",)),
    "of x and the bias": Case(5, 56, wanted=("x", "bias")),
    "of nothing": Case(5, 56, wanted=()),
}
