"""What a model is fed: one microbatch, the same on every stage of a pipeline."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels.documents import AttentionKind
from ..parallel.mesh import even_share


@dataclasses.dataclass(frozen=True)
class Batch:
    """One microbatch of b rows of s tokens.  It is a pure function of (seed, sample index).

    ``document_ids`` numbers the documents of a row from 1; 0 is padding.  ``positions`` count from 0 inside each
    document.  ``attention`` says, without looking at the tensors, how much of a mask is needed: ``full`` (every token
    sees every token), ``padding`` (one document a row, then padding) or ``document`` (several documents a row, each
    seen only from inside).

    ``label_positions`` are the p positions of each row whose token is to be predicted (ascending, padded with 0);
    None means every position (p = s, causal models).  ``label_weights`` is 1 where a prediction counts, else 0.

    An unpadded microbatch (``unpadded``) has the tokens of all b rows in one row of t tokens: where a shape below says
    [b, s] it is then [1, t], and ``joined`` says where every token comes from.  ``label_positions`` (still [b, p]) are
    places in that row; without them labels and weights are [1, t].

    ``repeats``: so many of the last rows say another row again, where a microbatch must have more rows than there are.
    Their weights are 0, and they count for nothing.
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
    sentence_labels: Tensor | None = None  # [b] int64: 0 the second segment follows the first, else 1
    joined: Joined | None = None
    repeats: int = 0

    @property
    def rows(self) -> int:
        return self.sample_ids.shape[0]

    @property
    def own_rows(self) -> int:
        """Without those that are repeated: they come first."""
        return self.rows - self.repeats

    @property
    def indices(self) -> Tensor:
        """[b, s] int64: every token's index in its own row of the run (keys dropout, with the row's sample)."""
        if self.joined is not None:
            return self.joined.indices
        return torch.arange(self.input_ids.shape[1], device=self.input_ids.device).expand_as(self.input_ids)

    @property
    def token_samples(self) -> Tensor:
        """The sample of every token: [b, 1], or [1, t] where rows were joined."""
        return self.sample_ids.unsqueeze(1) if self.joined is None else self.sample_ids[self.joined.rows]

    @property
    def label_rows(self) -> Tensor:
        """Which of the b rows a prediction is of, in a shape that broadcasts with the labels."""
        if self.joined is not None and self.label_positions is None:
            return self.joined.rows
        return torch.arange(self.rows, device=self.labels.device).unsqueeze(1).expand_as(self.labels)

    def at(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """hidden [s, b, h] at positions [b, p] of each row → [p, b, h]."""
        row = torch.arange(self.rows, device=hidden.device) if self.joined is None else 0
        return hidden[positions.t(), row]

    @property
    def first_positions(self) -> Tensor:
        """[b, 1] int64: where each row begins."""
        return (
            torch.zeros_like(self.sample_ids).unsqueeze(1) if self.joined is None else self.joined.starts.unsqueeze(1)
        )

    def split(self, count: int) -> list[Batch]:
        """Cut into ``count`` microbatches of consecutive rows (views, in order): where they do not divide the first
        have one more; where there are fewer rows, the last have none."""
        return [self.part(even_share(self.rows, i, count)) for i in range(count)]

    def part(self, rows: range, at_least: int = 0) -> Batch:
        """These rows (views); the one before their end is repeated until there are ``at_least`` so many."""
        repeats = max(at_least - len(rows), 0)
        if not repeats:
            return self._map(lambda t: t[rows.start : rows.stop])
        part = self._map(lambda t: t[[*rows, *[rows.stop - 1] * repeats]])
        part.label_weights[len(rows) :] = 0
        return dataclasses.replace(part, repeats=repeats)

    def unpadded(self, length: int) -> Batch:
        """The same predictions from the same tokens without the padding: all rows in one of ``length`` tokens, the
        documents of each kept apart.  Only what is left of ``length`` is filled up."""
        real = self.document_ids > 0
        places = real.flatten().cumsum(0).view_as(real) - 1  # of real tokens, in the joined row

        def join(values: Tensor) -> Tensor:
            out = values.new_zeros(1, length)
            out[0, : int(real.sum())] = values[real]
            return out

        counts = real.sum(1)
        starts = (counts.cumsum(0) - counts).clamp(max=length - 1)  # a row without tokens may come last
        tokens: dict[str, Any] = {f: join(getattr(self, f)) for f in ("input_ids", "positions", "token_type_ids")}
        if self.label_positions is None:
            tokens |= {f: join(getattr(self, f)) for f in ("labels", "label_weights")}
        else:
            tokens["label_positions"] = places.gather(1, self.label_positions).clamp(min=0)
        columns = torch.arange(real.shape[1]).expand_as(real)
        rows = torch.arange(len(real)).unsqueeze(1).expand_as(real)
        return dataclasses.replace(
            self,
            **tokens,
            document_ids=join(self.document_ids + rows * (self.document_ids.max() + 1)),
            attention="document",
            joined=Joined(join(rows), join(columns), starts),
        )

    def to(self, device: torch.device) -> Batch:
        return self._map(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._map(lambda t: t.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = function(value)
            elif isinstance(value, Joined):
                changed[field.name] = Joined(function(value.rows), function(value.indices), function(value.starts))
        return dataclasses.replace(self, **changed)


@dataclasses.dataclass(frozen=True)
class Joined:
    """Where the tokens of an unpadded microbatch come from."""

    rows: Tensor  # [1, t] int64: which of the b rows
    indices: Tensor  # [1, t] int64: which position of it
    starts: Tensor  # [b] int64: the place of each row's first token


def microbatch_count(rows: int, size: int, *, replicas: int, multiple: int) -> int:
    """Into how many microbatches every replica cuts its share of a step's ``rows``: the fewest of at most ``size`` rows
    each, and a ``multiple``."""
    largest = len(even_share(rows, 0, replicas))
    return -(-largest // (size * multiple)) * multiple


def microbatches(batch: Batch, count: int, *, multiple: int, equal: bool) -> tuple[list[Batch], tuple[int, int]]:
    """A replica's rows of a step in ``count`` microbatches, without padding; and the largest's shape (rows, tokens a
    row).

    ``multiple``: what the number of tokens of an unpadded microbatch is rounded up to; ``equal``: whether all must have
    the same shape (between pipeline stages flow tensors of one).  Rows are repeated where this, or a microbatch that
    would be empty, asks for more than there are.
    """
    shares = [even_share(batch.rows, i, count) for i in range(count)]
    at_least = len(shares[0]) if equal and batch.attention != "padding" else 1
    parts = [batch.part(share, at_least) for share in shares]
    if batch.attention != "padding":
        return parts, tuple(parts[0].input_ids.shape)  # type: ignore[return-value]
    tokens = [int((part.document_ids > 0).sum()) for part in parts]
    lengths = [max(-(-n // multiple), 1) * multiple for n in tokens]
    if equal:
        lengths = [max(lengths)] * len(parts)
    return [part.unpadded(n) for part, n in zip(parts, lengths, strict=True)], (1, max(lengths))
