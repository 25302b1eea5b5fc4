"""What a checkpoint keeps of the optimizer: for every parameter, values of the tensors that are updated in its place.

The optimizer updates float32 tensors: parameters, their masters, or under ZeRO this rank's partitions, many
parameters end to end.  ``Held`` says which values of such a tensor are of which parameter; by it the state is taken
apart into ``Piece``s of logical tensors, and put together again from those of any layout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from .mesh import Axis
from .parts import Part, Piece
from .sharding import logical_name, logical_of


@dataclasses.dataclass(frozen=True)
class Held:
    """Values [start, stop) of an updated tensor, flattened, are those of one parameter on this rank from ``begin``."""

    parameter: nn.Parameter
    start: int
    stop: int
    begin: int = 0


Updated = Sequence[tuple[Tensor, Sequence[Held]]]  # each tensor that the optimizer updates, and what it is made of


class SavedState(Protocol):
    """A checkpoint, as an optimizer reads it."""

    def kinds(self, name: str) -> Collection[str]:
        """What it has of a logical tensor, as "weight" and "exp_avg"."""

    def step(self, name: str) -> float | None:
        """How often the optimizer had updated it; None: never."""

    def read(self, kind: str, name: str, part: Part, into: Tensor) -> None:
        """Fill ``into``, 1-D, with the values of that part.  ValueError where they are not there."""


@dataclasses.dataclass(frozen=True)
class Local:
    """This rank's parameters by their logical names."""

    names: Mapping[nn.Parameter, str]
    axis: Axis  # over which they are split

    @staticmethod
    def of(module: nn.Module, axis: Axis) -> Local:
        return Local({p: logical_name(name, p) for name, p in module.named_parameters()}, axis)

    def part(self, parameter: nn.Parameter, begin: int, values: int) -> Part:
        """Where ``values`` values of a parameter, from ``begin`` on, lie in its logical tensor; without those that are
        padding, which are always its last."""
        logical = logical_of(parameter)
        assert logical.padded is None or logical.dim == 0, "padding would lie between values"
        return Part.of_rank(logical, self.axis).run(begin, begin + values)

    def pieces(self, kind: str, parameter: nn.Parameter, begin: int, values: Tensor, copies: bool) -> Iterator[Piece]:
        """What this rank has to say of a parameter's values: nothing where they are padding or another rank says it
        (the first of the tensor axis of what all of them hold; the first stage of a tied tensor)."""
        logical, name = logical_of(parameter), self.names[parameter]
        elsewhere = logical.dim is None and not self.axis.first
        part = self.part(parameter, begin, values.numel())
        if part.values and not elsewhere and logical.tied_to is None:
            yield Piece(kind, name, part, values.view(-1)[: part.values], copies)


def optimizer_pieces(
    optimizer: torch.optim.Optimizer, updated: Updated, local: Local, *, masters: bool, copies: bool
) -> Iterator[Piece]:
    """The optimizer's tensors, and with ``masters`` the updated ones themselves."""
    for tensor, members in updated:
        state = {kind: value for kind, value in optimizer.state.get(tensor, {}).items() if kind != "step"}
        for kind, value in (({"master": tensor.detach()} if masters else {}) | state).items():
            for held in members:
                values = value.view(-1)[held.start : held.stop]
                yield from local.pieces(kind, held.parameter, held.begin, values, copies)


def share(pieces: Sequence[Piece], replicas: Axis) -> list[Piece]:
    """Those that this replica writes: its own, and a fair part, by bytes, of what all of them hold."""
    taken = [0] * replicas.size
    mine = [piece for piece in pieces if not piece.copies]
    # The same on all of them, and in a process that has put its optimizer's state together in another order.
    for piece in sorted((p for p in pieces if p.copies), key=lambda p: (-p.values.nbytes, p.kind, p.name)):
        rank = taken.index(min(taken))
        taken[rank] += piece.values.nbytes
        if rank == replicas.rank:
            mine.append(piece)
    return sorted(mine, key=lambda p: (p.kind, p.name))


def optimizer_steps(optimizer: torch.optim.Optimizer, updated: Updated, local: Local) -> dict[str, float]:
    """How often each logical tensor that this rank holds values of has been updated."""
    return {
        local.names[held.parameter]: float(optimizer.state[tensor]["step"])
        for tensor, members in updated
        for held in members
        if "step" in optimizer.state.get(tensor, {})
    }


@torch.no_grad()
def restore_optimizer(
    optimizer: torch.optim.Optimizer, updated: Updated, local: Local, saved: SavedState, *, masters: bool
) -> None:
    """Fill the optimizer's tensors, and with ``masters`` the updated ones themselves."""
    steps = [saved.step(name) or 0.0 for name in dict.fromkeys(local.names.values())]
    for tensor, members in updated:
        names = [local.names[held.parameter] for held in members]
        kinds = dict.fromkeys(kind for name in names for kind in saved.kinds(name))
        kept = [kind for kind in kinds if kind not in ("weight", "master")]
        # A partition of nothing but padding has state too.
        state = {kind: torch.zeros_like(tensor) for kind in (kept if members else ("exp_avg", "exp_avg_sq"))}
        for kind, values in (({"master": tensor.detach()} if masters else {}) | state).items():
            for held, name in zip(members, names, strict=True):
                part = local.part(held.parameter, held.begin, held.stop - held.start)
                if part.values and (kind in saved.kinds(name) or kind == "master"):
                    saved.read(kind, name, part, values.view(-1)[held.start : held.start + part.values])
        if state:
            step = max((saved.step(name) or 0.0 for name in names), default=max(steps, default=0.0))
            optimizer.state[tensor] = state | {"step": torch.tensor(step, device=tensor.device)}
