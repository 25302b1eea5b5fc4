"""What every rank has to say once a step, known to all one step later: nobody waits for it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .mesh import Mesh

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13


class RollCall:
    """Every rank asks with a few numbers of its own; the answer is what all ranks said.

    The numbers travel while the ranks go on, so that all ranks must ask, and take the answer, at the same places of
    what they do: collective.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._asked: tuple[Any, Tensor] | None = None

    def ask(self, *values: float) -> None:
        """Begin to tell all ranks these numbers (as float64); the answer to what was asked before must be taken."""
        assert self._asked is None, "the answer to the last question was not taken"
        mine = torch.tensor(values, dtype=torch.float64, device=self._mesh.device)
        everyone = mine.new_empty(self._mesh.size, len(values))
        if self._mesh.size == 1:
            self._asked = None, mine.unsqueeze(0)
            return
        # One tensor for all: a list of a thousand is a thousand copies.
        request = _all_gather(everyone.view(-1), mine, async_op=True)
        self._asked = request, everyone

    def answer(self) -> list[list[float]] | None:
        """What every rank said when it was last asked, by rank; None where nothing is outstanding."""
        if self._asked is None:
            return None
        (request, everyone), self._asked = self._asked, None
        if request is not None:
            request.wait()
        return everyone.tolist()
