"""What a reference case is: the base class that the other files here fill in, and how all of them draw ids."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

IGNORED = -100  # the label that cross-entropy skips
MASKED_FRACTION = 0.25


@dataclass(frozen=True)
class Part:
    """A slice of a model's tensors that can be left out (set to ``neutral``), and whether the outputs show that."""

    name: str
    values: torch.Tensor
    shows: bool = True
    neutral: float = 0.0


@dataclass(frozen=True)
class Case:
    """One case: a model class of transformers, and what its config changes."""

    model_class: str
    config: dict[str, Any] = field(default_factory=dict)
    draw: int = field(default=0, kw_only=True)  # added to the seed, where the first values lose digits in float32

    def make_model(self, seed: int) -> PreTrainedModel:
        """The model in evaluation mode, with generic values everywhere: no parameter is zero, one or a twin."""
        raise NotImplementedError

    def make_inputs(self, config: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """The keyword arguments of the model class, labels among them."""
        raise NotImplementedError

    def parts(self, model: PreTrainedModel) -> Iterator[Part]:
        """Every tensor of the model, in the pieces whose effect is looked at one by one."""
        raise NotImplementedError

    def forget(self, model: PreTrainedModel) -> None:
        """Drop what the model keeps from one call to the next; called before every call."""

    def exactly(self) -> AbstractContextManager[Any]:
        """Within it a model of float64 computes in float64 throughout."""
        return nullcontext()

    def remark(self) -> str:
        """What to print about a case that has run; refuses one that float32 rounding could upset."""
        return ""

    def notes(self) -> dict[str, str]:
        """What case.json says beside the versions."""
        return {}

    @property
    def causal(self) -> bool:
        return self.model_class.endswith("CausalLM")

    def make_config(self, small: dict[str, Any]) -> Any:
        """The Hugging Face config: ``small`` with the case's own changes."""
        config_class = getattr(transformers, self.model_class).config_class
        decoder = {"is_decoder": True} if self.causal else {}
        return config_class(**{**small, **decoder, **self.config})


def uniform(high: int, shape: torch.Size | tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, high, tuple(shape), generator=generator)


def make_ids(config: Any, real: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Ids like ``real``: the padding id where it is false, and only there."""
    ids = uniform(config.vocab_size, real.shape, generator)
    ids[ids == config.pad_token_id] += 1
    ids[~real] = config.pad_token_id
    return ids


def make_labels(config: Any, ids: torch.Tensor, real: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Labels like ``ids``: themselves in a decoder, some random ones otherwise, none at or from a padded position."""
    if getattr(config, "is_decoder", False):
        labels = ids.clone()
        # A label is predicted from the position before it, which must not be padding.
        predicted = real.clone()
        predicted[:, 1:] &= real[:, :-1]
    else:
        labels = uniform(config.vocab_size, ids.shape, generator)
        predicted = real & (torch.rand(ids.shape, generator=generator) < MASKED_FRACTION)
        predicted[:, 0] = False
    labels[~predicted] = IGNORED
    return labels


# Where rows are padded, as (row, first position, position after the last), in parts of the row's length.
Padding = tuple[tuple[int, float, float], ...]
NONE: Padding = ()
RIGHT: Padding = ((1, 0.7, 1), (2, 0.3, 1))
LEFT: Padding = ((1, 0, 0.2), (2, 0, 0.55))
HOLES: Padding = ((1, 0.25, 0.4), (1, 0.6, 0.63), (2, 0.1, 0.15), (2, 0.3, 0.7), (2, 0.9, 1))


@dataclass(frozen=True)
class PaddedCase(Case):
    """A case of an encoder: the length of its rows, how many there are, where they are padded, and token types."""

    length: int = 64
    padding: Padding = NONE
    batch: int = 2
    token_types: bool = False

    def make_inputs(self, config: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
        attention_mask = torch.ones(self.batch, self.length, dtype=torch.int64)
        for row, start, stop in self.padding:
            if row < self.batch:
                attention_mask[row, round(start * self.length) : round(stop * self.length)] = 0
        real = attention_mask.bool()
        ids = make_ids(config, real, generator)
        labels = make_labels(config, ids, real, generator)
        inputs = {"input_ids": ids, "attention_mask": attention_mask, "labels": labels}
        if self.token_types:
            inputs["token_type_ids"] = uniform(config.type_vocab_size, ids.shape, generator)
        return inputs
