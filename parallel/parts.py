"""Where values lie in a logical tensor, whatever the layout, and what two layouts have in common.

A rank holds a slice of one dimension of a logical tensor (tensor parallelism), or under ZeRO a run of the values of
such a slice, flattened.  A ``Part`` says which; ``overlap`` says how one part's values are copied out of another's, so
that what was written under one layout is read under any other.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

from .mesh import Axis
from .sharding import Logical


@dataclasses.dataclass(frozen=True)
class Part:
    """Values [begin, end) of the slice [start, stop) of dimension ``dim`` of a tensor of this shape, flattened with the
    last dimension innermost."""

    shape: tuple[int, ...]
    dim: int
    start: int
    stop: int
    begin: int
    end: int

    @staticmethod
    def whole(shape: tuple[int, ...]) -> Part:
        return Part(shape, 0, 0, shape[0] if shape else 1, 0, math.prod(shape))

    @staticmethod
    def of_slice(shape: tuple[int, ...], dim: int, start: int, stop: int) -> Part:
        size = math.prod(shape[:dim]) * (stop - start) * math.prod(shape[dim + 1 :])
        return Part(shape, dim, start, stop, 0, size)

    @staticmethod
    def of_rank(logical: Logical, axis: Axis) -> Part:
        """What a rank of the tensor axis holds, without padding."""
        if logical.dim is None:
            return Part.whole(logical.shape)
        return Part.of_slice(logical.shape, logical.dim, *logical.bounds(axis))

    def run(self, begin: int, end: int) -> Part:
        """Of the same slice, these values (as far as there are so many)."""
        size = self.slice_values
        return dataclasses.replace(self, begin=min(begin, size), end=min(end, size))

    @property
    def values(self) -> int:
        """How many there are."""
        return self.end - self.begin

    @property
    def slice_shape(self) -> tuple[int, ...]:
        if not self.shape:
            return ()
        return (*self.shape[: self.dim], self.stop - self.start, *self.shape[self.dim + 1 :])

    @property
    def slice_values(self) -> int:
        return math.prod(self.slice_shape)

    @property
    def is_slice(self) -> bool:
        """Whether it is all of its slice."""
        return (self.begin, self.end) == (0, self.slice_values)

    def along(self, dim: int) -> Part:
        """The same values as a part of a slice of another dimension; ValueError where they are not of the whole tensor,
        flattened."""
        if dim == self.dim or not self.shape:
            return self
        if (self.start, self.stop) != (0, self.shape[self.dim]):
            raise ValueError(f"a tensor of shape {self.shape} is cut along dimension {self.dim}, not {dim}")
        return dataclasses.replace(self, dim=dim, start=0, stop=self.shape[dim])


@dataclasses.dataclass(frozen=True)
class Runs:
    """``count`` runs of ``length`` values that two parts share: at ``source`` and every ``source_step`` values of the
    one, at ``target`` and every ``target_step`` of the other (counted from where each part begins)."""

    source: int
    target: int
    length: int
    count: int = 1
    source_step: int = 0
    target_step: int = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.source + i * self.source_step, self.target + i * self.target_step) for i in range(self.count))

    @property
    def source_end(self) -> int:
        return self.source + (self.count - 1) * self.source_step + self.length

    def some(self, first: int, count: int) -> Runs:
        """``count`` of them, from number ``first`` on."""
        source, target = self.source + first * self.source_step, self.target + first * self.target_step
        return dataclasses.replace(self, source=source, target=target, count=count)

    def from_start(self) -> Runs:
        """The same, where the source begins with the first of them."""
        return dataclasses.replace(self, source=0)

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Between the parts' values, 1-D."""
        size = (self.count, self.length)
        into = target.as_strided(size, (self.target_step, 1), target.storage_offset() + self.target)
        into.copy_(source.as_strided(size, (self.source_step, 1), source.storage_offset() + self.source))


def overlap(source: Part, target: Part) -> list[Runs]:
    """What the parts of one logical tensor have in common, in order; at most three groups of runs."""
    if source.dim != target.dim:
        whole = source if (source.start, source.stop) == (0, (source.shape or (1,))[source.dim]) else target
        source, target = (source.along(target.dim), target) if whole is source else (source, target.along(source.dim))
    if (source.start, source.stop) == (target.start, target.stop):
        begin, end = max(source.begin, target.begin), min(source.end, target.end)
        return [Runs(begin - source.begin, begin - target.begin, end - begin)] if begin < end else []
    inner = math.prod(source.shape[source.dim + 1 :])
    source_width, target_width = ((part.stop - part.start) * inner for part in (source, target))
    first, last = max(source.start, target.start) * inner, min(source.stop, target.stop) * inner
    if first >= last or not source.values or not target.values:
        return []

    def row(index: int) -> Runs | None:
        """What is common in one row of all dimensions before ``dim``."""
        s = index * source_width + first - source.start * inner - source.begin
        t = index * target_width + first - target.start * inner - target.begin
        skipped = max(0, -s, -t)
        length = min(last - first, source.values - s, target.values - t) - skipped
        return Runs(s + skipped, t + skipped, length) if length > 0 else None

    rows = range(
        max(source.begin // source_width, target.begin // target_width),
        min((source.end - 1) // source_width, (target.end - 1) // target_width) + 1,
    )
    groups: list[Runs] = []
    if len(rows) > 2:  # all but the first and the last are there from end to end
        middle = row(rows[1])
        assert middle is not None and middle.length == last - first
        steps = dataclasses.replace(middle, count=len(rows) - 2, source_step=source_width, target_step=target_width)
        groups = [steps]
    edges = [row(index) for index in dict.fromkeys((rows[0], rows[-1]))] if rows else []
    return [runs for runs in (*edges[:1], *groups, *edges[1:]) if runs is not None]


def cover(parts: Iterable[Part], shape: tuple[int, ...]) -> bool:
    """Whether every value of a tensor of this shape is in exactly one of these parts: runs of slices of one dimension,
    the slices end to end and the runs of each."""
    runs: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    for part in parts:
        if part.values:
            runs.setdefault((part.dim, part.start, part.stop), []).append((part.begin, part.end))
    if not math.prod(shape):
        return True
    slices = sorted(runs)
    if not slices or any(dim != slices[0][0] for dim, _, _ in slices):
        return False
    dim = slices[0][0]
    inner = math.prod(shape) // (shape or (1,))[dim]
    return end_to_end([(start, stop) for _, start, stop in slices], (shape or (1,))[dim]) and all(
        end_to_end(sorted(runs[dim, start, stop]), (stop - start) * inner) for _, start, stop in slices
    )


def end_to_end(ranges: Sequence[tuple[int, int]], size: int) -> bool:
    """Whether these ranges, in order, are [0, ``size``) without a gap or an overlap."""
    return [0, *(stop for _, stop in ranges)] == [*(start for start, _ in ranges), size]


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a rank holds of a logical tensor: its weight, or a tensor that the optimizer keeps for it.

    ``kind``: "weight", "master" (float32, where weights are of lower precision) or the optimizer's own name, as
    "exp_avg".  ``values``: those of the part, 1-D, without padding.  ``copies``: every replica has the same.
    """

    kind: str
    name: str
    part: Part
    values: Tensor
    copies: bool
