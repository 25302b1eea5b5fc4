"""Attention with dropout by kernels against its reference in float64: what is tried on a CPU, emulated, and a GPU."""

from __future__ import annotations

import dataclasses
import random
from typing import Any, Literal

import torch
from torch import Tensor

from farspan.kernels import forms
from farspan.kernels.attention import attention
from farspan.kernels.documents import Documents
from farspan.kernels.dropout import DropoutKey, keep_mask, stream

DTYPES = (torch.bfloat16, torch.float16)
# Weights, results and gradients of scores are each rounded to 16 bits once, by half an eps at most.
TOLERANCE = {torch.bfloat16: 1.25 * 2**-8, torch.float16: 1.25 * 2**-11}


@dataclasses.dataclass(frozen=True)
class Case:
    """``rows``: documents' lengths, in rows as long as the longest; negative: so much padding."""

    rows: tuple[tuple[int, ...], ...]
    d: int = 64
    h: int = 2
    p: float = 0.1
    causal: bool = False
    kind: Literal["document", "padding", "full"] = "document"
    shift: int = 0  # index of the first token of every row
    size: float = 1.0
    layout: Literal["parts", "dense", "unlike", "shifted"] = "parts"
    seed: int = 0

    def __str__(self) -> str:
        given = [f"{f.name}={value}" for f in dataclasses.fields(self) if (value := getattr(self, f.name)) != f.default]
        return " ".join(given)

    @property
    def ids(self) -> Tensor:
        """[b, s]"""
        rows = [
            torch.cat([torch.full((abs(n),), i * (n > 0)) for i, n in enumerate(row, 1)])
            for row in self.rows
        ]  # fmt: skip
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    @property
    def real(self) -> Tensor:
        """[s, b]"""
        return (self.ids > 0).t() if self.kind != "full" else torch.ones_like(self.ids, dtype=torch.bool).t()

    def documents(self, device: str | torch.device = "cpu", form: Any = None) -> Documents:
        ids = self.ids.to(device)
        indices = torch.arange(ids.shape[1], device=device).expand(ids.shape) + self.shift
        return Documents.of(ids, indices, self.kind, causal=self.causal, form=form)

    def keys(self, device: str | torch.device = "cpu") -> Tensor:
        """[h, s, b]"""
        b, s = self.ids.shape
        positions = torch.arange(self.h).view(-1, 1, 1) * (1 << 32) + torch.arange(s).unsqueeze(1) + self.shift
        return DropoutKey(self.seed, 2, torch.arange(40, 40 + b)).rows(stream(1, 2), positions).to(device)

    def make(self, dtype: torch.dtype) -> list[Tensor]:
        """q, k, v and a gradient of the result, zero for padding, in float64 with numbers of ``dtype``."""
        b, s = self.ids.shape
        generator = torch.Generator().manual_seed(self.seed)
        tensors = [torch.randn(s, b, self.h, self.d, generator=generator) for _ in range(4)]
        tensors[0] *= self.size
        tensors[3] *= self.real[..., None, None]
        return [x.to(dtype).double() for x in tensors]

    def laid_out(self, dtype: torch.dtype, device: str | torch.device) -> list[Tensor]:
        """The same in ``dtype``, as they lie in a model."""
        q, k, v, of_y = (x.to(device, dtype) for x in self.make(dtype))
        if self.layout == "parts":
            q, k, v = torch.stack((q, k, v), 2).unbind(2)
        if self.layout == "unlike":
            k = k.transpose(0, 1).contiguous().transpose(0, 1)
        if self.layout == "shifted":  # not at a multiple of 16 bytes
            v = torch.cat((v.flatten()[:1], v.flatten()))[1:].view(v.shape)
        return [q, k, v, of_y]


CASES = [
    Case(((1,),), 16),
    Case(((1, 2, 5, 33), (-3, 30, 31)), 40),
    Case(((150, 1, 49), (-3, 30, 37, 130)), 64),
    Case(((150, 1, 49), (-3, 30, 37, 130)), 64, causal=True, p=0.5, shift=1, layout="dense"),
    Case(((64, 65, 62), (63, 1, 127)), 128, h=1, p=0.5),
    Case(((129, 17), (20, -7, 119)), 128, h=1, causal=True, layout="shifted"),
    Case(((200,), (190, -10), (-60, 140)), 64, h=1, kind="padding", shift=2),
    Case(((100,), (100,)), 32, h=3, kind="full", causal=True),
    Case(((5, 6), (7, 100)), 64, kind="full", p=0.5),
    Case(((128,), (128,)), 16, causal=True, shift=3),
    Case(((65, 40, 95), (1, 1, 198)), 40, h=1, size=6.0),
    Case(((100, 20), (31, 89)), 72, h=1, causal=True, layout="unlike"),
]


def random_cases(number: int, longest: int, sizes: tuple[int, ...], seed: int) -> list[Case]:
    r = random.Random(seed)
    return [
        Case(
            tuple(
                (*(r.choice((1, 1, 1, -1)) * round(longest ** r.random()) for _ in range(r.randint(1, 4))), 1)
                for _ in range(r.randint(1, 3))
            ),
            r.choice(sizes), r.randint(1, 2), r.choice((0.1, 0.3, 0.5, 0.9)), r.random() < 0.5, shift=r.randint(0, 5),
            size=r.choice((0.3, 1.0, 3.0)), layout=r.choice(("parts", "dense", "unlike", "shifted")), seed=i,
        )
        for i in range(number)
    ]  # fmt: skip


def run(case: Case, tensors: list[Tensor], documents: Documents | None = None) -> list[Tensor]:
    """The result and the gradients of q, k, v."""
    *leaves, of_y = (x.detach() for x in tensors)
    for x in leaves:
        x.requires_grad_()
    documents = documents or case.documents(of_y.device)
    y = attention(*leaves, documents, p=case.p, keys=case.keys(of_y.device))
    return [y.detach(), *torch.autograd.grad(y, leaves, of_y)]


def assert_right(found: list[Tensor], case: Case, dtype: torch.dtype) -> None:
    with forms.mode("reference"):
        target = run(case, case.make(dtype))
    # Where a query has one key, its gradient is the difference of two equal numbers, one of them of a rounded result.
    least = 0.5 * max(1, case.size) * max(t.norm().item() for t in target[1:])
    for name, x, t in zip(("y", "q", "k", "v"), found, target, strict=True):
        assert x.dtype == dtype and x.shape == t.shape, name
        x = x.cpu()
        assert x.isfinite().all(), f"{case}: {name}"
        assert not x[~case.real].any(), f"{case}: {name} at padding"
        error = ((x.double() - t) * case.real[..., None, None]).norm().item()
        norm = max(t.norm().item(), least)
        assert error <= TOLERANCE[dtype] * norm, f"{case}: {name} off by {error / norm:.1e}"


def assert_masks(device: str | torch.device, length: int, shift: int, p: float) -> None:
    """Which weights are dropped, bit for bit: of equal weights, seen through one-hot values, and through the gradients
    of values for one-hot gradients of results, a window of 64 places at a time."""
    case = Case(((5, length), (length, 5)), 64, p=p, shift=shift)
    s, b = case.real.shape
    q = torch.zeros(s, b, case.h, 64, dtype=torch.bfloat16, device=device)
    index = torch.arange(s) + shift
    for row, start in enumerate((5, 0)):
        inside = slice(start, start + length)
        kept = keep_mask(case.keys()[:, inside, row], int(index[-1]) + 1, p)[:, :, index[inside]]  # [h, query, key]
        for window in range(0, length, 64):
            hot = torch.eye(length + 64, dtype=torch.bfloat16, device=device)[:length, window : window + 64]
            n = min(64, length - window)
            some = torch.zeros_like(q)
            some[inside, row] = hot.unsqueeze(1)
            y, _, _, of_v = run(case, [q, q, some, some])
            found = y[inside, row].permute(1, 0, 2).cpu() != 0
            assert torch.equal(found[..., :n], kept[:, :, window : window + n]), "forward"
            found = of_v[inside, row].permute(1, 2, 0).cpu() != 0
            assert torch.equal(found[:, :n], kept[:, window : window + n]), "backward"
