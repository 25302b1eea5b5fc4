"""Tables of Hugging Face names: which public tensors each logical tensor is."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Source:
    """A Hugging Face tensor, or some rows of one whose others are other logical tensors'.

    ``rows``: [start, stop) of its first dimension; together the logical tensors of a table have all of them.
    ``shape``: its own shape (of these rows), where that is another than the logical tensor's, in the same order.
    """

    tensor: str
    rows: tuple[int, int] | None = None
    shape: tuple[int, ...] | None = None


# Logical name → the Hugging Face tensors that it is (several: stacked along a new first dimension).
HuggingFaceKeys = dict[str, tuple[str | Source, ...]]


def sources(keys: tuple[str | Source, ...]) -> tuple[Source, ...]:
    return tuple(key if isinstance(key, Source) else Source(key) for key in keys)


def tensor_names(keys: HuggingFaceKeys) -> set[str]:
    """The Hugging Face tensors of a table."""
    return {source.tensor for of_one in keys.values() for source in sources(of_one)}


def layer_keys(logical: str, *huggingface: str) -> HuggingFaceKeys:
    """The weight and the bias of one layer (several: stacked along a new first dimension)."""
    return {f"{logical}.{kind}": tuple(f"{name}.{kind}" for name in huggingface) for kind in ("weight", "bias")}
