"""What is learned: how a batch is made from tokens.

Every batch is a pure function of (seed, sample indices): a row is the same in whatever batch, on whatever rank, and
after whatever restart it is made.  Legend: b rows, s tokens a row, p predictions a row.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch

from .batch import Batch
from .data.hashing import Int64, below, hash64, uniform
from .data.rows import NextSentenceRows, PackedRows, PaddedRows, RowArrays, Rows, SentenceOrderRows
from .data.store import TokenStore
from .data.tokenizer import Vocabulary

# Purposes of random words, apart from those of data/rows.py.
_CHOICE, _ACTION, _REPLACEMENT = range(100, 103)

# Rows for objectives that know no sentences.
_ONE_SEGMENT: Mapping[str, type[Rows]] = {"packed": PackedRows, "padded": PaddedRows}


class Objective(abc.ABC):
    """Makes batches from rows, and says what a model must have to learn from them."""

    name: ClassVar[str]
    heads: ClassVar[tuple[str, ...]]  # "lm", "nsp"
    causal: ClassVar[bool]
    row_modes: ClassVar[Mapping[str, type[Rows]]]  # the rows that it can learn from; the first are the default

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.vocabulary = rows.vocabulary
        self.sequence_length = rows.sequence_length

    @property
    @abc.abstractmethod
    def predictions_per_row(self) -> int:
        """p, the same for every row, so that shapes are static."""

    @abc.abstractmethod
    def batch(self, sample_indices: Int64) -> Batch:
        """The rows with these indices of the run (int64 [b], from 0), as CPU tensors."""

    def _batch(self, indices: Int64, rows: RowArrays, input_ids: Int64, labels: Int64, weights: Int64) -> Batch:
        return Batch(
            input_ids=torch.from_numpy(input_ids),
            document_ids=torch.from_numpy(rows.document_ids),
            positions=torch.from_numpy(rows.positions),
            token_type_ids=torch.from_numpy(rows.token_type_ids),
            sample_ids=torch.from_numpy(indices.copy()),
            attention=self.rows.attention,
            labels=torch.from_numpy(labels),
            label_weights=torch.from_numpy(weights.astype(np.float32)),
            sentence_labels=None if rows.sentence_labels is None else torch.from_numpy(rows.sentence_labels),
        )


class MaskedLanguageModel(Objective):
    """Predict chosen tokens from both sides (Devlin et al., BERT, NAACL 2019, section 3.1).

    Of the n tokens of a row that are not special, round(probability n) are chosen, at least one if there is any.  A
    chosen token becomes the mask token with probability ``mask_fraction``, a random ordinary token with probability
    ``random_fraction``, and else stays.

    Args:
        rows: where the tokens come from.
        probability: share of tokens that are predicted, in (0, 1].
        mask_fraction, random_fraction: shares of the predicted tokens that are masked, and replaced.
    """

    name = "mlm"
    heads: ClassVar[tuple[str, ...]] = ("lm",)
    causal = False
    row_modes = _ONE_SEGMENT

    def __init__(
        self, rows: Rows, *, probability: float = 0.15, mask_fraction: float = 0.8, random_fraction: float = 0.1
    ) -> None:
        super().__init__(rows)
        if not 0 < probability <= 1:
            raise ValueError(f"the share of predicted tokens is {probability}: it must be above 0 and at most 1")
        if min(mask_fraction, random_fraction) < 0 or mask_fraction + random_fraction > 1 + 1e-9:
            raise ValueError(
                f"mask_fraction {mask_fraction} and random_fraction {random_fraction} must not be negative, "
                "and their sum must not exceed 1"
            )
        if self.vocabulary.mask_id is None:
            raise ValueError(
                f"objective {self.name} needs a mask token and the tokenizer of {rows.store.folder} has none: name "
                "one in its tokenizer_config.json, or use the objective clm"
            )
        self.mask_id = self.vocabulary.mask_id
        self.probability = probability
        self.mask_fraction = mask_fraction
        self.random_fraction = random_fraction
        self._ordinary_ids = self.vocabulary.ordinary_ids()
        self._is_ordinary = np.zeros(self.vocabulary.size, bool)
        self._is_ordinary[self._ordinary_ids] = True

    @property
    def predictions_per_row(self) -> int:
        return max(round(self.probability * self.sequence_length), 1)

    def batch(self, sample_indices: Int64) -> Batch:
        indices = np.asarray(sample_indices, np.int64)
        rows = self.rows.rows(indices)
        chosen, used = self._choose(rows, indices[:, None])
        labels = np.take_along_axis(rows.input_ids, chosen, axis=1)
        input_ids = rows.input_ids
        row, _ = np.nonzero(used)
        input_ids[row, chosen[used]] = self._replace(labels, chosen, indices[:, None])[used]
        batch = self._batch(indices, rows, input_ids, labels, used)
        return dataclasses.replace(batch, label_positions=torch.from_numpy(chosen))

    def _choose(self, rows: RowArrays, indices: Int64) -> tuple[Int64, Int64]:
        """Positions [b, p] to predict, ascending and padded with 0, and which of them are used."""
        s, p = self.sequence_length, self.predictions_per_row
        candidates = self._is_ordinary[rows.input_ids] & (rows.document_ids > 0)
        available = candidates.sum(axis=1)
        counts = np.clip(np.rint(self.probability * available).astype(np.int64), np.minimum(available, 1), p)
        # The positions with the lowest random keys are chosen.  A key ends in its position, so none are equal.
        low = np.uint64((1 << s.bit_length()) - 1)
        keys = (hash64(self.rows.seed, _CHOICE, indices, np.arange(s)) & ~low) | np.arange(s, dtype=np.uint64)
        keys[~candidates] = np.iinfo(np.uint64).max
        keys = np.sort(np.partition(keys, p - 1, axis=1)[:, :p], axis=1)
        used = np.arange(p) < counts[:, None]
        positions = np.sort(np.where(used, (keys & low).astype(np.int64), s), axis=1)
        return np.where(used, positions, 0), used

    def _replace(self, tokens: Int64, positions: Int64, indices: Int64) -> Int64:
        """What stands in the input in place of the predicted tokens, [b, p]."""
        key = (indices, positions)
        action = uniform(hash64(self.rows.seed, _ACTION, *key))
        drawn = self._ordinary_ids[below(hash64(self.rows.seed, _REPLACEMENT, *key), len(self._ordinary_ids))]
        changed = np.where(action < self.mask_fraction + self.random_fraction, drawn, tokens)
        return np.where(action < self.mask_fraction, self.mask_id, changed)


class MaskedLanguageModelWithNextSentence(MaskedLanguageModel):
    """Masked tokens, and whether the second segment follows the first or is of another document (Devlin et al., BERT,
    NAACL 2019, section 3.1)."""

    name = "mlm+nsp"
    heads = ("lm", "nsp")
    row_modes: ClassVar[Mapping[str, type[Rows]]] = {"pairs": NextSentenceRows}


class MaskedLanguageModelWithSentenceOrder(MaskedLanguageModel):
    """Masked tokens, and whether two neighbouring segments stand in order or swapped (Lan et al., ALBERT, arXiv
    1909.11942, section 3.1).  The head of two classes is the same as for next sentences."""

    name = "mlm+sop"
    heads = ("lm", "nsp")
    row_modes: ClassVar[Mapping[str, type[Rows]]] = {"pairs": SentenceOrderRows}


class CausalLanguageModel(Objective):
    """Predict each next token of the same document; the last one of a row has none within reach."""

    name = "clm"
    heads = ("lm",)
    causal = True
    row_modes = _ONE_SEGMENT

    @property
    def predictions_per_row(self) -> int:
        return self.sequence_length

    def batch(self, sample_indices: Int64) -> Batch:
        indices = np.asarray(sample_indices, np.int64)
        rows = self.rows.rows(indices)
        labels = rows.input_ids.copy()
        labels[:, :-1] = rows.input_ids[:, 1:]
        weights = np.zeros_like(labels)
        document_ids = rows.document_ids
        weights[:, :-1] = (document_ids[:, 1:] == document_ids[:, :-1]) & (document_ids[:, 1:] > 0)
        return self._batch(indices, rows, rows.input_ids, labels, weights)


OBJECTIVES: dict[str, type[Objective]] = {
    kind.name: kind
    for kind in (
        MaskedLanguageModel,
        CausalLanguageModel,
        MaskedLanguageModelWithNextSentence,
        MaskedLanguageModelWithSentenceOrder,
    )
}


def make_objective(
    name: str,
    *,
    store: TokenStore,
    vocabulary: Vocabulary,
    sequence_length: int,
    row_mode: str | None = None,
    seed: int = 0,
    probability: float = 0.15,
    mask_fraction: float = 0.8,
    random_fraction: float = 0.1,
) -> Objective:
    """Build an objective on a split of a dataset.

    Args:
        name: a key of ``OBJECTIVES``.
        store: the split.  For validation, give the same seed at every evaluation: it then sees the same masks.
        vocabulary: of the tokenizer that made the split.
        sequence_length: tokens a row.
        row_mode: one of the objective's ``row_modes``; None takes the first.
        seed: of order, cuts and masks.
        probability, mask_fraction, random_fraction: see ``MaskedLanguageModel``; causal models have none.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}: choose one of {', '.join(OBJECTIVES)}")
    kind = OBJECTIVES[name]
    mode = next(iter(kind.row_modes)) if row_mode is None else row_mode
    if mode not in kind.row_modes:
        raise ValueError(f"objective {name} does not work on {mode!r} rows: choose {' or '.join(kind.row_modes)}")
    rows = kind.row_modes[mode](store, vocabulary, sequence_length, seed)
    if issubclass(kind, MaskedLanguageModel):
        return kind(rows, probability=probability, mask_fraction=mask_fraction, random_fraction=random_fraction)
    return kind(rows)
