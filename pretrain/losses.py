"""The loss of a step: one global mean over all predicted tokens, never a mean of means.

Each microbatch contributes (sum of its weighted losses) / (predictions of the whole global batch), so that neither
microbatches, replicas nor uneven numbers of predictions change the loss or its gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ..parallel.mesh import Mesh
from .batch import Batch


@dataclasses.dataclass(frozen=True)
class Counts:
    """Over the whole global batch: predicted tokens, rows, and tokens that are not padding."""

    predictions: float
    rows: float
    tokens: float

    @staticmethod
    def of(batch: Batch, mesh: Mesh) -> Counts:
        """``batch``: this data rank's part of the global batch, on the CPU; collective over the data group."""
        local = [batch.label_weights.sum().item(), batch.rows, (batch.document_ids > 0).sum().item()]
        total = torch.tensor(local, dtype=torch.float64, device=mesh.device)
        return Counts(*mesh.data.all_reduce(total).tolist())


@dataclasses.dataclass(frozen=True)
class Losses:
    """Global means, in nats: what is minimised, and its parts; accuracies where they were counted."""

    loss: float
    parts: dict[str, float]
    lm_accuracy: float
    sentence_accuracy: float | None


class LossFunction:
    """From a stage's outputs to this microbatch's share of the loss and its statistics."""

    def __init__(self, heads: Sequence[str]) -> None:
        self.sentences = "nsp" in heads

    @property
    def statistics(self) -> int:
        """How many sums ``__call__`` reports, before what it says of each row."""
        return 4 if self.sentences else 2

    def __call__(self, outputs: dict[str, Tensor], batch: Batch, counts: Counts) -> tuple[Tensor, Tensor]:
        """(share of the global loss, scalar; sums over this microbatch [statistics], then each row's mean loss [b]);
        without rows that are repeated."""
        weights, own = batch.label_weights, batch.own_rows
        weighted = outputs["lm_losses"] * weights
        total = weighted.sum()
        loss = total / max(counts.predictions, 1.0)
        sums = [total.detach(), (outputs["lm_correct"] * weights).sum()]
        if self.sentences:
            sentences = outputs["sentence_losses"][:own].sum()
            loss = loss + sentences / counts.rows
            sums += [sentences.detach(), outputs["sentence_correct"][:own].sum()]
        row_of, rows = batch.label_rows.flatten(), weights.new_zeros(2, batch.rows, dtype=torch.float64)
        rows.index_add_(1, row_of, torch.stack((weighted.detach(), weights)).flatten(1).double())
        return loss, torch.cat((torch.stack([s.double() for s in sums]), (rows[0] / rows[1].clamp(min=1.0))[:own]))

    def means(self, sums: Sequence[float], counts: Counts) -> Losses:
        """``sums``: statistics added up over the global batch."""
        predictions = max(counts.predictions, 1.0)
        lm, accuracy = sums[0] / predictions, sums[1] / predictions
        if not self.sentences:
            return Losses(lm, {}, accuracy, None)
        sentence = sums[2] / counts.rows
        return Losses(lm + sentence, {"lm_loss": lm, "sentence_loss": sentence}, accuracy, sums[3] / counts.rows)
