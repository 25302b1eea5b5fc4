"""Logical tensors under Hugging Face's names: the same values, several end to end, or one of several that are stacked
(query, key, value), so that nothing is computed and nothing rounded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..models.huggingface_keys import HuggingFaceKeys, Source, sources


@dataclasses.dataclass(frozen=True)
class Public:
    """A Hugging Face tensor.  ``runs``: the values that it is, end to end: [begin, end) of a logical tensor, flattened,
    as (name, begin, end)."""

    shape: tuple[int, ...]
    runs: tuple[tuple[str, int, int], ...]


def public_tensors(keys: HuggingFaceKeys, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Public]:
    """The Hugging Face tensors of a table, from the shapes of the logical ones (of all, or those that are given)."""
    found: dict[str, Public] = {}
    by_rows: dict[str, dict[int, Public]] = {}  # of tensors that are several logical ones: first row → these rows
    for name, shape in shapes.items():
        of_one = sources(keys[name])
        one = shape if len(of_one) == 1 else shape[1:]
        size = math.prod(one)
        for index, source in enumerate(of_one):
            public = Public(source.shape or one, ((name, index * size, (index + 1) * size),))
            if source.rows is None:
                found[source.tensor] = public
            else:
                by_rows.setdefault(source.tensor, {})[source.rows[0]] = public
    return found | {name: _joined([rows[first] for first in sorted(rows)]) for name, rows in by_rows.items()}


def logical_tensors(
    read: Callable[[str], Tensor], keys: HuggingFaceKeys, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """The logical tensors of a table, of these shapes, from their Hugging Face tensors."""

    def piece(source: Source) -> Tensor:
        whole = read(source.tensor)
        return whole if source.rows is None else whole[slice(*source.rows)]

    def logical(name: str) -> Tensor:
        pieces = [piece(source) for source in sources(keys[name])]
        return (pieces[0] if len(pieces) == 1 else torch.stack(pieces)).reshape(shapes[name])

    return {name: logical(name) for name in keys}


def rename(tensors: Mapping[str, Tensor], keys: HuggingFaceKeys) -> dict[str, Tensor]:
    """{logical name: tensor} under Hugging Face's names (weights or gradients)."""

    def value(public: Public) -> Tensor:
        runs = [tensors[name].reshape(-1)[begin:end] for name, begin, end in public.runs]
        return (runs[0] if len(runs) == 1 else torch.cat(runs)).view(public.shape)

    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return {name: value(public) for name, public in public_tensors(keys, shapes).items()}


def _joined(parts: list[Public]) -> Public:
    """Rows of one tensor, in order."""
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return Public(shape, tuple(run for part in parts for run in part.runs))
