"""MRA-2 attention by kernels against its definition in float64: what is tried on a CPU, emulated, and on a GPU."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any, Literal

import torch
from torch import Tensor

from farspan.kernels.mra import BLOCK, Form, mra_attention
from farspan.kernels.mra.selection import Options, Selection, block_means, low_resolution_logits

MaskKind = Literal["none", "holes", "left", "right", "blocks", "all"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of what is stored in 16 bits each number is off by half an eps at most, and so are weights as factors.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.25 * 2**-8, torch.float16: 1.25 * 2**-11}


@dataclasses.dataclass(frozen=True)
class Case:
    l: int
    d: int
    budget: int
    mask: MaskKind = "none"
    sparse: bool = False
    first: int = 0
    diagonal: int = 0
    n: int = 1
    h: int = 1
    size: float = 1.0
    seed: int = 0
    layout: Literal["dense", "turned", "parts"] = "dense"

    def __str__(self) -> str:
        given = [f"{f.name}={value}" for f in dataclasses.fields(self) if (value := getattr(self, f.name)) != f.default]
        return " ".join(given)

    @property
    def options(self) -> dict[str, Any]:
        return {
            "budget": self.budget, "mask": self.make_mask(), "sparse": self.sparse, "first_blocks": self.first,
            "diagonal_blocks": self.diagonal,
        }  # fmt: skip

    def make_mask(self) -> Tensor | None:
        n, l, generator = self.n, self.l, torch.Generator().manual_seed(self.seed)
        if self.mask == "none":
            return None
        if self.mask == "holes":
            return torch.rand(n, l, generator=generator) < 0.6
        if self.mask in ("left", "right"):
            real = torch.arange(l) >= torch.randint(l, (n, 1), generator=generator)
            return real if self.mask == "left" else real.flip(1)
        if self.mask == "blocks":
            return (torch.rand(n, -(-l // BLOCK), generator=generator) < 0.5).repeat_interleave(BLOCK, 1)[:, :l]
        return torch.zeros(n, l, dtype=torch.bool)

    def make(self, dtype: torch.dtype) -> list[Tensor]:
        """q, k, v and a gradient of y, in float64 with numbers of ``dtype``: neighbours alike, so that means of blocks
        say something."""
        n, h, l, d = self.n, self.h, self.l, self.d
        generator = torch.Generator().manual_seed(self.seed)
        common = torch.randn(n, h, -(-l // 16), d, generator=generator).repeat_interleave(16, 2)[:, :, :l]
        size = self.size * (8 / d) ** 0.25
        q, k = (size * (common + torch.randn(n, h, l, d, generator=generator)) for _ in range(2))
        v, of_y = (torch.randn(n, h, l, d, generator=generator) for _ in range(2))
        return [x.to(dtype).double() for x in (q, k, v, of_y)]

    def laid_out(self, dtype: torch.dtype, device: str | torch.device) -> list[Tensor]:
        """The same in ``dtype``, as they lie in a model."""
        tensors = [x.to(device, dtype) for x in self.make(dtype)]
        if self.layout == "turned":  # [l, n, h, d]
            return [x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for x in tensors]
        if self.layout == "parts":  # [l, n, h, 3, d]
            together = torch.stack([x.permute(2, 0, 1, 3) for x in tensors[:3]], 3)
            return [*(x.permute(1, 2, 0, 3) for x in together.unbind(3)), tensors[3]]
        return tensors


# Every head size's form; blocks that are short, rows of no and of all blocks, more than one tile of blocks.
CASES = [
    Case(1, 16, 1),
    Case(31, 24, 1, "holes"),
    Case(100, 64, 5, "holes", diagonal=1, n=2),
    Case(200, 64, 30, h=2, layout="turned"),
    Case(129, 64, 20, "left", sparse=True, first=1, layout="parts", h=2),
    Case(150, 32, 25, "right"),
    Case(97, 40, 3, "blocks", n=3),
    Case(70, 96, 6, "holes", diagonal=3),
    Case(65, 128, 7, h=2, layout="turned"),
    Case(64, 256, 3, "holes"),
    Case(90, 200, 9, sparse=True),
    Case(1100, 16, 60, "holes", diagonal=2),
    Case(64, 64, 4, "all"),
    Case(300, 64, 12, sparse=True, diagonal=1, size=3),
]


def random_cases(number: int, longest: int, sizes: tuple[int, ...], seed: int) -> list[Case]:
    r = random.Random(seed)
    cases = []
    for i in range(number):
        l = r.randint(1, longest)
        nb = -(-l // BLOCK)
        cases.append(
            Case(
                l, r.choice(sizes), max(1, round(r.random() ** 2 * nb * nb)),
                r.choice(["none", "holes", "left", "right", "blocks"]), r.random() < 0.3, r.choice([0, 0, 1, 2]),
                r.choice([0, 0, 1, 2, 5]), r.randint(1, 2), r.randint(1, 2), r.choice([0.3, 1.0, 2.0]), i,
                r.choice(["dense", "turned", "parts"]),
            )
        )  # fmt: skip
    return cases


def run(case: Case, tensors: list[Tensor], form: Form) -> list[Tensor]:
    """The result and the gradients of q, k, v."""
    *leaves, of_y = (x.detach() for x in tensors)
    for x in leaves:
        x.requires_grad_()
    options = case.options
    if options["mask"] is not None:
        options["mask"] = options["mask"].to(of_y.device)
    y = mra_attention(*leaves, form=form, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, of_y)]


def assert_right(found: list[Tensor], case: Case, dtype: torch.dtype) -> None:
    target = run(case, case.make(dtype), "reference")
    mask = case.make_mask()
    least = 0.2 * max(t.norm().item() for t in target[1:])  # gradients that vanish in theory, where a query has one key
    for name, x, t in zip(("y", "q", "k", "v"), found, target, strict=True):
        assert x.dtype == dtype and x.shape == t.shape, name
        x = x.cpu()
        assert x.isfinite().all(), f"{case}: {name}"
        error, norm = (x.double() - t).norm().item(), max(t.norm().item(), least)
        assert error <= TOLERANCE[dtype] * max(1, case.size**2) * norm, f"{case}: {name} off by {error / norm:.1e}"
        if mask is not None:
            assert not x.transpose(1, 2)[~mask].any(), f"{case}: {name} at padding"


def lists_of_kernels(case: Case, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[m, nb + 1] pointers, [m, budget] columns, [m, nb, nb] whether selected, on the CPU."""
    mask = case.make_mask()
    mask = None if mask is None else mask.to(q.device)
    options = Options(case.budget, case.sparse, case.first, case.diagonal)
    found = torch.ops.farspan.mra_forward(q, k, v, mask, *options)
    bits, pointers, columns = (x.flatten(0, 1).cpu() for x in found[3:6])
    nb = pointers.shape[1] - 1
    chosen = (bits.unsqueeze(3) >> torch.arange(32)) & 1
    return pointers.long(), columns.long(), chosen.flatten(2)[:, :, :nb].bool()


def assert_lists(found: tuple[Tensor, Tensor, Tensor], case: Case, q: Tensor, k: Tensor) -> None:
    """They are those of ``Selection``."""
    n, h, l, d = q.shape
    nb, mask = -(-l // BLOCK), case.make_mask()
    real = torch.zeros(n, nb * BLOCK, dtype=torch.bool)
    real[:, :l] = True if mask is None else mask
    means = []
    counts = real.view(n, 1, nb, BLOCK).sum(3).expand(n, h, nb).reshape(n * h, nb)
    for x, factor in ((q, d**-0.5), (k, 1.0)):
        in_blocks = torch.zeros(n, h, nb * BLOCK, d)
        in_blocks[:, :, :l] = x.cpu().float() * factor
        in_blocks.masked_fill_(~real[:, None, :, None], 0)
        means.append(block_means(in_blocks.view(n * h, nb, BLOCK, d), counts))
    options = Options(case.budget, case.sparse, case.first, case.diagonal)
    target = Selection.of(low_resolution_logits(*means), counts, options)
    pointers, columns, chosen = found
    assert torch.equal(pointers, target.pointers), str(case)
    assert torch.equal(columns, target.columns), str(case)
    expected = torch.zeros(n * h, nb * nb, dtype=torch.bool).scatter_(1, target.indices, True)
    assert torch.equal(chosen.flatten(1), expected), str(case)


def spoiled(tensors: list[Tensor], mask: Tensor) -> list[Tensor]:
    """NaN at padding."""
    return [x.transpose(1, 2).masked_fill(~mask[:, :, None, None], math.nan).transpose(1, 2) for x in tensors]
