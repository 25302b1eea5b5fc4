"""Logical tensors under Hugging Face's names, and back.

They are the same numbers under other names, or several Hugging Face tensors stacked (query, key, value), so nothing is
computed and nothing rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..models.huggingface_keys import HuggingFaceKeys, Source, sources


def logical_tensors(
    read: Callable[[str], Tensor], keys: HuggingFaceKeys, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """The logical tensors of a model, of these shapes, from their Hugging Face tensors."""

    def piece(source: Source) -> Tensor:
        whole = read(source.tensor)
        return whole if source.rows is None else whole[slice(*source.rows)]

    def logical(name: str) -> Tensor:
        pieces = [piece(source) for source in sources(keys[name])]
        return (pieces[0] if len(pieces) == 1 else torch.stack(pieces)).reshape(shapes[name])

    return {name: logical(name) for name in keys}


def rename(tensors: Mapping[str, Tensor], keys: HuggingFaceKeys) -> dict[str, Tensor]:
    """{logical name: tensor} under Hugging Face's names (weights or gradients)."""
    renamed: dict[str, Tensor] = {}
    rows: dict[str, dict[int, Tensor]] = {}  # of tensors that are several logical ones: first row → piece
    for name, value in tensors.items():
        of_one = sources(keys[name])
        for source, piece in zip(of_one, [value] if len(of_one) == 1 else value.unbind(0), strict=True):
            if source.shape is not None:
                piece = piece.reshape(source.shape)
            if source.rows is None:
                renamed[source.tensor] = piece
            else:
                rows.setdefault(source.tensor, {})[source.rows[0]] = piece
    return renamed | {name: torch.cat([pieces[first] for first in sorted(pieces)]) for name, pieces in rows.items()}
