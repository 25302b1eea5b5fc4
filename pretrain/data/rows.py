"""Rows of token ids as pure functions of (seed, index): no order is stored, and starting anywhere costs nothing.

An index counts rows over the whole run.  Each epoch is a permutation of its own over the same ``rows_per_epoch`` rows.
Legend: b rows, s tokens a row, n documents.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np

from .hashing import Int64, below, hash64, permute
from .store import TokenStore
from .tokenizer import Vocabulary

# Purposes of random words: streams with different numbers are independent.
_ORDER, _ROTATION, _CUT, _LABEL, _OTHER, _START = range(6)

# Ranges of the stored stream, one a row: where they start, and their lengths.
Segments = tuple[Int64, Int64]


@dataclasses.dataclass(frozen=True)
class RowArrays:
    """b rows of s tokens: the fields of ``Batch`` of the same names, int64 arrays."""

    input_ids: Int64  # [b, s]
    document_ids: Int64  # [b, s]
    positions: Int64  # [b, s]
    token_type_ids: Int64  # [b, s]
    sentence_labels: Int64 | None = None  # [b]


class Rows(abc.ABC):
    """What the ways of making rows share.

    Args:
        store: the tokens.
        vocabulary: the special tokens that frame documents.
        sequence_length: tokens a row, s.
        seed: chooses the order, the cuts and the pairs.
    """

    attention: ClassVar[Literal["document", "padding"]]
    # Special tokens that a row has at least.
    frame: ClassVar[int] = 2
    rows_per_epoch: int

    def __init__(self, store: TokenStore, vocabulary: Vocabulary, sequence_length: int, seed: int) -> None:
        if sequence_length <= self.frame:
            raise ValueError(
                f"sequence_length {sequence_length} leaves no room for text beside {self.frame} special tokens: "
                f"set it to {self.frame + 1} or more"
            )
        self.store = store
        self.vocabulary = vocabulary
        self.sequence_length = sequence_length
        self.seed = seed

    def rows(self, indices: Int64) -> RowArrays:
        """The rows with these indices (int64 [b], from 0, no upper end)."""
        epochs, places = np.divmod(np.asarray(indices, np.int64), self.rows_per_epoch)
        return self._cut(permute(places, self.rows_per_epoch, self.seed, _ORDER, epochs), epochs)

    @abc.abstractmethod
    def _cut(self, places: Int64, epochs: Int64) -> RowArrays:
        """Make the rows at ``places`` of the split in its own order, in [0, rows_per_epoch)."""

    def _random(self, purpose: int, places: Int64, epochs: Int64, limit: Int64) -> Int64:
        return below(hash64(self.seed, purpose, epochs, places), limit)


class PackedRows(Rows):
    """Every row full: cut from the stream of all documents, each framed as cls, tokens, sep.

    Document i starts at ``offsets[i] + 2 i`` of the framed stream, so the stream is never built.  Each epoch turns it,
    as a ring, by a random amount: its cuts fall elsewhere, and what does not fill a last row is dropped elsewhere.
    Positions count from 0 in each piece of a document.
    """

    attention = "document"

    def __init__(self, store: TokenStore, vocabulary: Vocabulary, sequence_length: int, seed: int) -> None:
        super().__init__(store, vocabulary, sequence_length, seed)
        self.framed_tokens = store.tokens + 2 * store.documents
        self.rows_per_epoch = self.framed_tokens // sequence_length
        if not self.rows_per_epoch:
            raise ValueError(
                f"split {store.split!r} of {store.folder} has {self.framed_tokens} tokens, fewer than one row of "
                f"sequence_length {sequence_length}: shorten the rows, or prepare more text"
            )

    def rotation(self, epochs: Int64) -> Int64:
        """Where in the framed stream the first row of each epoch starts."""
        return below(hash64(self.seed, _ROTATION, epochs), self.framed_tokens)

    def _cut(self, places: Int64, epochs: Int64) -> RowArrays:
        b, s, n = len(places), self.sequence_length, self.store.documents
        starts = (self.rotation(epochs) + places * s) % self.framed_tokens
        stops = starts + s
        wraps = stops > self.framed_tokens
        first, last = self._documents_at(np.concatenate([starts, (stops - 1) % self.framed_tokens])).reshape(2, b)
        last = last + n * wraps  # documents of a second turn of the ring are numbered from n

        # One piece for each document that a row touches.
        counts = last - first + 1
        piece_rows = np.repeat(np.arange(b), counts)
        numbers = np.arange(len(piece_rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        documents = first[piece_rows] + numbers
        document_begins, document_ends = self._framed_start(documents), self._framed_start(documents + 1)
        begins = np.maximum(document_begins, starts[piece_rows])
        ends = np.minimum(document_ends, stops[piece_rows])
        lengths = ends - begins

        # The pieces' tokens laid end to end are the rows laid end to end.
        flat_ends = np.cumsum(lengths)
        flat_begins = flat_ends - lengths
        cls_at = flat_begins[begins == document_begins]
        sep_at = flat_ends[ends == document_ends] - 1
        ordinary = np.ones(b * s, bool)
        ordinary[cls_at] = False
        ordinary[sep_at] = False
        input_ids = np.empty(b * s, np.int64)
        input_ids[cls_at] = self.vocabulary.cls_id
        input_ids[sep_at] = self.vocabulary.sep_id
        # The tokens of a row are one range of the stored stream: it starts at the row's first that is no frame.
        stored = self.store.offsets[first]
        inside = np.clip(starts - (stored + 2 * first) - 1, 0, self.store.offsets[first + 1] - stored)
        input_ids[ordinary] = self.store.read(stored + inside, ordinary.reshape(b, s).sum(axis=1))
        return RowArrays(
            input_ids=input_ids.reshape(b, s),
            document_ids=np.repeat(numbers + 1, lengths).reshape(b, s),
            positions=(np.arange(b * s) - np.repeat(flat_begins, lengths)).reshape(b, s),
            token_type_ids=np.zeros((b, s), np.int64),
        )

    def _framed_start(self, documents: Int64) -> Int64:
        turns, documents = np.divmod(documents, self.store.documents)
        return self.store.offsets[documents] + 2 * documents + turns * self.framed_tokens

    def _documents_at(self, framed: Int64) -> Int64:
        """The document of each position of the framed stream, by bisection (the framed starts are not stored)."""
        low, high = np.zeros_like(framed), np.full_like(framed, self.store.documents)
        for _ in range(self.store.documents.bit_length()):
            middle = (low + high) >> 1
            right = self.store.offsets[middle] + 2 * middle <= framed
            low, high = np.where(right, middle, low), np.where(right, high, middle)
        return low


# Documents between two stored sums of PaddedRows: the memory is 8 bytes for so many documents.
_BLOCK = 64


class PaddedRows(Rows):
    """One document a row, framed as cls, tokens, sep, then padding; what does not fit goes on in further rows."""

    attention = "padding"

    def __init__(self, store: TokenStore, vocabulary: Vocabulary, sequence_length: int, seed: int) -> None:
        super().__init__(store, vocabulary, sequence_length, seed)
        self.room = sequence_length - self.frame
        blocks = -(-store.documents // _BLOCK)
        self._rows_before = np.zeros(blocks + 1, np.int64)
        step = _BLOCK << 14
        for begin in range(0, store.documents, step):
            pieces = self._pieces_of(np.diff(store.offsets[begin : begin + step + 1]))
            sums = np.add.reduceat(pieces, np.arange(0, len(pieces), _BLOCK))
            self._rows_before[begin // _BLOCK + 1 :][: len(sums)] = sums
        np.cumsum(self._rows_before, out=self._rows_before)
        self.rows_per_epoch = int(self._rows_before[-1])

    def _pieces_of(self, lengths: Int64) -> Int64:
        return np.maximum(-(-lengths // self.room), 1)

    def _piece(self, places: Int64) -> tuple[Int64, Int64, Int64]:
        """The documents that the rows at these places are cut from, where they start in the stream, their lengths."""
        block = np.searchsorted(self._rows_before, places, side="right") - 1
        documents = np.minimum(block[:, None] * _BLOCK + np.arange(_BLOCK + 1), self.store.documents)
        offsets = self.store.offsets[documents]
        lengths = np.diff(offsets, axis=1)
        sums = np.cumsum(np.where(np.diff(documents, axis=1) > 0, self._pieces_of(lengths), 0), axis=1)
        within = places - self._rows_before[block]
        column = (sums <= within[:, None]).sum(axis=1)
        row = np.arange(len(places))
        # The row's number among its document's rows, counted from the last: the sum includes them all.
        number = self._pieces_of(lengths[row, column]) - (sums[row, column] - within)
        starts = offsets[row, column] + number * self.room
        return documents[row, column], starts, np.minimum(offsets[row, column + 1] - starts, self.room)

    def _cut(self, places: Int64, epochs: Int64) -> RowArrays:
        _, starts, lengths = self._piece(places)
        return self._frame([(starts, lengths)])

    def _frame(self, segments: Sequence[Segments], sentence_labels: Int64 | None = None) -> RowArrays:
        """Lay out cls, then each segment (starts, lengths) with a sep after it, then padding."""
        vocabulary = self.vocabulary
        b, s = len(segments[0][0]), self.sequence_length
        column = np.arange(s)
        input_ids = np.full((b, s), vocabulary.pad_id, np.int64)
        input_ids[:, 0] = vocabulary.cls_id
        token_type_ids = np.zeros((b, s), np.int64)
        begin = np.ones(b, np.int64)
        for number, (starts, lengths) in enumerate(segments):
            end = begin + lengths
            inside = (column >= begin[:, None]) & (column < end[:, None])
            input_ids[inside] = self.store.read(starts, lengths)
            input_ids[np.arange(b), end] = vocabulary.sep_id
            token_type_ids += number * (inside | (column == end[:, None]))
            begin = end + 1
        real = column < begin[:, None]
        return RowArrays(input_ids, real.astype(np.int64), np.where(real, column, 0), token_type_ids, sentence_labels)


class PairRows(PaddedRows):
    """Two segments a row, cls A sep B sep, from a piece of a document that is cut in two at a random place.

    In half of the rows A and B are the two parts as they stand (label 0), in the other half they are what the kind of
    pair makes of them (label 1).  A piece of one token has no second part and gives no row: documents of one token are
    left out, and so is the last token of a document that would be alone in a row.
    """

    frame = 3

    def __init__(self, store: TokenStore, vocabulary: Vocabulary, sequence_length: int, seed: int) -> None:
        if sequence_length < 5:
            raise ValueError(f"sequence_length {sequence_length} cannot hold cls A sep B sep: set it to 5 or more")
        super().__init__(store, vocabulary, sequence_length, seed)
        if not self.rows_per_epoch:
            raise ValueError(
                f"split {store.split!r} of {store.folder} has no document of two or more tokens to cut in two: "
                "prepare longer documents"
            )

    def _pieces_of(self, lengths: Int64) -> Int64:
        return -(-(lengths - 1) // self.room)

    def _cut(self, places: Int64, epochs: Int64) -> RowArrays:
        documents, starts, lengths = self._piece(places)
        first = 1 + self._random(_CUT, places, epochs, lengths - 1)
        labels = self._random(_LABEL, places, epochs, np.full_like(lengths, 2))
        a, b = (starts, first), (starts + first, lengths - first)
        pairs = zip(self._change(a, b, documents, places, epochs), (a, b), strict=True)
        segments = [(np.where(labels, new[0], old[0]), np.where(labels, new[1], old[1])) for new, old in pairs]
        return self._frame(segments, labels)

    @abc.abstractmethod
    def _change(
        self, a: Segments, b: Segments, documents: Int64, places: Int64, epochs: Int64
    ) -> tuple[Segments, Segments]:
        """What stands in place of A and B, two parts of ``documents``, in the rows of label 1."""


class NextSentenceRows(PairRows):
    """Label 1: B is a random piece of another document, no longer than the part that it replaces (Devlin et al., BERT,
    NAACL 2019, section 3.1)."""

    def __init__(self, store: TokenStore, vocabulary: Vocabulary, sequence_length: int, seed: int) -> None:
        if store.documents < 2:
            raise ValueError(
                f"split {store.split!r} of {store.folder} has one document, next-sentence pairs need two or more: "
                "prepare more text, or cut it into documents with --document-separator"
            )
        super().__init__(store, vocabulary, sequence_length, seed)

    def _change(
        self, a: Segments, b: Segments, documents: Int64, places: Int64, epochs: Int64
    ) -> tuple[Segments, Segments]:
        # Any document but the row's own, and any place in it where the segment fits.
        n, offsets = self.store.documents, self.store.offsets
        others = (documents + 1 + self._random(_OTHER, places, epochs, np.full_like(documents, n - 1))) % n
        available = offsets[others + 1] - offsets[others]
        lengths = np.minimum(b[1], available)
        return a, (offsets[others] + self._random(_START, places, epochs, available - lengths + 1), lengths)


class SentenceOrderRows(PairRows):
    """Label 1: the two parts are swapped (Lan et al., ALBERT, arXiv 1909.11942, section 3.1)."""

    def _change(
        self, a: Segments, b: Segments, documents: Int64, places: Int64, epochs: Int64
    ) -> tuple[Segments, Segments]:
        return b, a
