"""What is compared: exact softmax attention, and its approximations with a budget each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from ...kernels.mra import BLOCK, block_budget, mra_attention
from ...kernels.nystrom import nystrom_attention

Kind = Literal["exact", "MRA-2", "MRA-2-s", "Nyström"]
# The released profile of arXiv 2207.10284: relative error at 512 tokens by budget.
AUTHORS: dict[tuple[Kind, int, int], float] = {
    ("MRA-2", 512, 1): 0.506, ("MRA-2", 512, 2): 0.404, ("MRA-2", 512, 4): 0.284, ("MRA-2", 512, 8): 0.153,
    ("Nyström", 512, 32): 0.695, ("Nyström", 512, 64): 0.625, ("Nyström", 512, 128): 0.548,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Method:
    kind: Kind
    budget: int = 0  # blocks a row of blocks on average, or landmarks

    @property
    def amount(self) -> str:
        """The budget in words."""
        if self.kind == "exact":
            return ""
        one, many = ("landmark", "landmarks") if self.kind == "Nyström" else ("block a row", "blocks a row")
        return f"{self.budget} {one if self.budget == 1 else many}"

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.amount}" if self.amount else self.kind

    def share(self, length: int) -> float:
        """The selected share of all blocks, or landmarks of tokens."""
        if self.kind == "exact":
            return 1.0
        if self.kind == "Nyström":
            return min(1.0, self.budget / length)
        return block_budget(length, self.budget) / number_of_blocks(length) ** 2

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [n, h, l, d] → [n, h, l, d]: attention alone, without Nyströmformer's convolution."""
        if self.kind == "exact":
            return F.scaled_dot_product_attention(q, k, v)
        if self.kind == "Nyström":
            return nystrom_attention(q, k, v, landmarks=self.budget)
        return mra_attention(q, k, v, budget=block_budget(q.shape[2], self.budget), sparse=self.kind == "MRA-2-s")


def number_of_blocks(length: int) -> int:
    """Of a row of blocks."""
    return -(-length // BLOCK)


def fixed_share(length: int, share: float) -> int:
    """The blocks a row that are nearest to this share of all blocks."""
    return max(1, round(number_of_blocks(length) * share))


def methods(length: int, blocks: Sequence[int], landmarks: Sequence[int], share: float) -> list[Method]:
    """Exact attention first; of the budgets those that are less than everything, or just that."""
    per_row = sorted({*blocks, fixed_share(length, share)})
    found = [Method("exact")]
    for kind in ("MRA-2", "MRA-2-s"):
        found += [Method(kind, b) for b in per_row if b <= number_of_blocks(length)]  # type: ignore[arg-type]
    return found + [Method("Nyström", m) for m in sorted(set(landmarks)) if m <= length]


def relative_errors(y: Tensor, exact: Tensor) -> Tensor:
    """‖y − exact‖ / ‖exact‖ (Frobenius) of every row and head: [n, h, l, d] → [n, h] float64."""
    exact = exact.double()
    return (y.double() - exact).flatten(2).norm(dim=2) / exact.flatten(2).norm(dim=2)
