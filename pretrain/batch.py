"""What a model is fed: one microbatch, the same on every stage of a pipeline."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

AttentionKind = Literal["full", "padding", "document"]


@dataclasses.dataclass(frozen=True)
class Batch:
    """One microbatch of b rows of s tokens.  It is a pure function of (seed, sample index).

    ``document_ids`` numbers the documents of a row from 1; 0 is padding.  ``positions`` count from 0 inside each
    document.  ``attention`` says, without looking at the tensors, how much of a mask is needed: ``full`` (every token
    sees every token), ``padding`` (one document a row, then padding) or ``document`` (several documents a row, each
    seen only from inside).

    ``label_positions`` are the p positions of each row whose token is to be predicted (ascending, padded with 0);
    None means every position (p = s, causal models).  ``label_weights`` is 1 where a prediction counts, else 0.
    """

    input_ids: Tensor  # [b, s] int64
    document_ids: Tensor  # [b, s] int64
    positions: Tensor  # [b, s] int64
    token_type_ids: Tensor  # [b, s] int64
    sample_ids: Tensor  # [b] int64, index of the row in the whole run: keys the dropout masks
    attention: AttentionKind
    labels: Tensor  # [b, p] int64; any valid token where the weight is 0
    label_weights: Tensor  # [b, p] float32
    label_positions: Tensor | None = None  # [b, p] int64
    sentence_labels: Tensor | None = None  # [b] int64: 0 the second segment follows the first, 1 it does not

    @property
    def rows(self) -> int:
        return self.input_ids.shape[0]

    def split(self, size: int) -> list[Batch]:
        """Cut into microbatches of ``size`` rows (views, in order)."""
        if self.rows % size:
            raise ValueError(f"{self.rows} rows do not split into microbatches of {size}")
        return [self._map(lambda t, i=i: t[i : i + size]) for i in range(0, self.rows, size)]  # type: ignore[misc]

    def to(self, device: torch.device) -> Batch:
        return self._map(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._map(lambda t: t.pin_memory())

    def _map(self, function) -> Batch:  # type: ignore[no-untyped-def]
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Batch(**{k: function(v) if isinstance(v, Tensor) else v for k, v in values.items()})
