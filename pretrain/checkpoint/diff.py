"""What two checkpoints have in common and where they differ: by logical tensors, whatever layouts they have.

Both are read in step, a portion of a tensor at a time, so that comparing takes no more memory than two portions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ...parallel.parts import Part

PORTION = 2**22  # values of a tensor that are compared at once


class Source(Protocol):
    """What is compared: a ``Reader``, or what answers like one."""

    def names(self) -> list[str]: ...

    def kinds(self, name: str) -> Collection[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str, kind: str = "weight") -> torch.dtype: ...

    def read(self, kind: str, name: str, part: Part, into: Tensor) -> None: ...


@dataclasses.dataclass(frozen=True)
class Difference:
    """Between two tensors of one kind and name.

    ``unequal``: how many values do not have the same bits (of two dtypes: are not the same numbers).  ``absolute``: the
    largest difference between two values, infinite where one of them alone is nan or infinite.  ``scale``: the largest
    magnitude in either tensor.
    """

    kind: str
    name: str
    values: int
    unequal: int
    absolute: float
    scale: float
    dtypes: tuple[torch.dtype, torch.dtype]

    @property
    def bit_equal(self) -> bool:
        return not self.unequal and self.dtypes[0] == self.dtypes[1]

    @property
    def relative(self) -> float:
        """The largest difference over the largest magnitude: of single values it would say most of those that are
        nearly 0."""
        if not math.isfinite(self.absolute):
            return math.inf
        return self.absolute / self.scale if self.scale else 0.0

    def within(self, tolerance: float | None) -> bool:
        """Whether they are the same up to a relative difference; None: to the bit."""
        return self.bit_equal if tolerance is None else self.relative <= tolerance


@dataclasses.dataclass(frozen=True)
class Pairs:
    """The (kind, name) that two checkpoints both have, in the same shape; those that one alone has; and of which
    shapes those are that differ in it."""

    common: list[tuple[str, str]]
    first_only: list[tuple[str, str]]
    second_only: list[tuple[str, str]]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]


def pairs(first: Source, second: Source, *, weights_only: bool = False) -> Pairs:
    """What there is to compare."""

    def of(source: Source) -> dict[tuple[str, str], None]:
        found = [(kind, name) for name in source.names() for kind in source.kinds(name)]
        return {pair: None for pair in sorted(found, key=_order) if pair[0] == "weight" or not weights_only}

    a, b = of(first), of(second)
    names = dict.fromkeys(name for kind, name in a if (kind, name) in b)
    shapes = {name: (first.shape(name), second.shape(name)) for name in names}
    shapes = {name: both for name, both in shapes.items() if both[0] != both[1]}
    common = [pair for pair in a if pair in b and pair[1] not in shapes]
    return Pairs(common, [pair for pair in a if pair not in b], [pair for pair in b if pair not in a], shapes)


def _order(pair: tuple[str, str]) -> tuple[bool, bool, str]:
    """Weights, masters, what the optimizer keeps; names in the order of the checkpoint."""
    return pair[0] != "weight", pair[0] != "master", pair[0]


def difference(first: Source, second: Source, kind: str, name: str) -> Difference:
    """Between the tensors of one kind and name, which both have in the same shape.  ValueError in one line where a
    checkpoint is damaged."""
    whole = Part.whole(first.shape(name))
    sources = (first, second)
    dtypes = (first.dtype(name, kind), second.dtype(name, kind))
    unequal, absolute, scale = 0, 0.0, 0.0
    for begin in range(0, whole.values, PORTION):
        part = whole.run(begin, begin + PORTION)
        a, b = (torch.empty(part.values, dtype=dtype) for dtype in dtypes)
        for source, values in zip(sources, (a, b), strict=True):
            source.read(kind, name, part, values)
        same = dtypes[0] == dtypes[1] and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        scale = max(scale, _largest(a), scale if same else _largest(b))
        if not same:
            count, largest = _compare(a, b)
            unequal, absolute = unequal + count, max(absolute, largest)
    return Difference(kind, name, whole.values, unequal, absolute, scale, dtypes)


def _largest(values: Tensor) -> float:
    """The largest magnitude among the finite ones."""
    return float(torch.nan_to_num(values, 0.0, 0.0, 0.0).abs().max())


def _compare(first: Tensor, second: Tensor) -> tuple[int, float]:
    """How many values differ in their bits, and the largest difference."""
    if first.dtype == second.dtype:
        width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[first.dtype.itemsize]
        equal = first.view(width) == second.view(width)
    else:
        equal = first.double().view(torch.int64) == second.double().view(torch.int64)
    apart = ~equal
    a, b = first[apart].double(), second[apart].double()
    if not a.numel():
        return 0, 0.0
    # Infinity less itself is nan; so is what has nan on one side, or nan of other bits on both.
    distance = torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(math.inf, math.inf)
    return int(apart.sum()), float(distance.max())


def changed_values(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{dotted key: (value, value)} of two nested mappings where they differ; a key that one lacks has None there."""
    a, b = dict(_flat(first)), dict(_flat(second))
    keys = dict.fromkeys([*a, *b])
    return {key: (a.get(key), b.get(key)) for key in keys if a.get(key) != b.get(key)}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
