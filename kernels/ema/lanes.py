"""Where the tokens of a microbatch go in chunks of C positions, and come back from.

A lane is a row, or a document of a packed row; its chunks follow one another in time.  Chunks are numbered step by
step: first the first chunk of every lane, then the second of every lane that has one, and so on, longest lanes first.
So the chunks that follow those of step c are the first ``counts[c + 1]`` of the next step, in the same order.
"""

from __future__ import annotations

import abc
import dataclasses
import weakref

import torch
from torch import Tensor

from ..documents import Documents, Stretches

CHUNK = 64
# What a position costs beside the products with the C others of its chunk, in such products (measured on a CPU).
POSITION = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Lanes(abc.ABC):
    """m chunks of C positions; ``counts``: chunks in each step, never increasing."""

    chunk: int
    counts: tuple[int, ...]

    @abc.abstractmethod
    def chunks(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[s, b, d] → [d, m, C], zero where a chunk has no token."""

    @abc.abstractmethod
    def put(self, y: Tensor, out: Tensor) -> None:
        """[d, m, C] → out [s, b, d], zero at tokens that are in no chunk."""

    @staticmethod
    def of(x: Tensor, documents: Documents | None) -> Lanes:
        """For x [s, b, d]: each row a lane (None), or each document."""
        if documents is None:
            return _rows(x)
        if documents not in _packed:
            _packed[documents] = Packed.of_documents(documents)
        return _packed[documents]


@dataclasses.dataclass(frozen=True, eq=False)
class Rows(Lanes):
    """Every row is a lane."""

    length: int

    @property
    def rest(self) -> int:
        """Positions in the last step."""
        return self.length - (len(self.counts) - 1) * self.chunk

    # A copy beside each other and then one that turns a whole matrix: quicker than one that does both.

    def chunks(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        s, b, d = x.shape
        padded = torch.empty(len(self.counts) * self.chunk, b, d, dtype=dtype, device=x.device)
        padded[:s], padded[s:] = x, 0
        y = padded.flatten(1).T.contiguous().view(b, d, -1, self.chunk)
        return y.permute(1, 2, 0, 3).flatten(1, 2)

    def put(self, y: Tensor, out: Tensor) -> None:
        s, b, d = out.shape
        y = y.unflatten(1, (-1, b)).permute(2, 0, 1, 3).reshape(b * d, -1)
        out.copy_(y.T.contiguous()[:s].view(s, b, d))


def _rows(x: Tensor) -> Rows:
    chunk = min(CHUNK, 1 << (len(x) - 1).bit_length())
    return Rows(chunk, (x.shape[1],) * -(-len(x) // chunk), len(x))


@dataclasses.dataclass(frozen=True, eq=False)
class Packed(Lanes):
    """Every document is a lane."""

    tokens: Tensor  # [m · C] the token (position · b + row) at each place of a chunk, any in an empty one
    empty: Tensor  # the places without a token
    places: Tensor  # [s · b] the place of each token, any for padding
    padding: Tensor  # the tokens without a place

    @staticmethod
    def of_documents(documents: Documents) -> Packed:
        """Each document is padded to whole chunks: their length is what costs least."""
        assert documents.stretches is not None
        stretches, (b, s) = documents.stretches, documents.document_ids.shape

        def cost(chunk: int) -> int:
            return int((-(-stretches.lengths // chunk)).sum()) * chunk * (POSITION + chunk)

        chunk = min((CHUNK // 4, CHUNK // 2, CHUNK), key=cost)
        return _pack(stretches, b, s, chunk, documents.document_ids.device)

    def chunks(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        y = x.reshape(-1, x.shape[-1]).index_select(0, self.tokens).index_fill_(0, self.empty, 0)
        return y.to(dtype).T.contiguous().unflatten(1, (-1, self.chunk))

    def put(self, y: Tensor, out: Tensor) -> None:
        y = y.flatten(1).T.contiguous()
        out.copy_(y.index_select(0, self.places).index_fill_(0, self.padding, 0).view(out.shape))


# Made once per microbatch, used by every layer.
_packed: weakref.WeakKeyDictionary[Documents, Packed] = weakref.WeakKeyDictionary()


def _pack(stretches: Stretches, b: int, s: int, chunk: int, device: torch.device) -> Packed:
    chunks_of = -(-stretches.lengths // chunk)
    order = chunks_of.argsort(descending=True, stable=True)
    starts, lengths, chunks_of = stretches.starts[order], stretches.lengths[order], chunks_of[order]
    # Lanes that have more chunks than there are steps before this one.
    counts = (len(order) - torch.bincount(chunks_of).cumsum(0))[:-1]
    if not len(order):
        counts = torch.ones(1, dtype=torch.int64)  # an empty chunk, rather than tensors of no elements everywhere
    first = counts.cumsum(0) - counts

    lane = torch.arange(len(order)).repeat_interleave(lengths)
    offset = torch.arange(len(lane)) - (lengths.cumsum(0) - lengths)[lane]
    place = (first[offset // chunk] + lane) * chunk + offset % chunk
    at = starts[lane] + offset
    token = at % s * b + at // s

    tokens, places = torch.full((int(counts.sum()) * chunk,), -1), torch.full((s * b,), -1)
    tokens[place], places[token] = token, place
    empty, padding = (x.lt(0).nonzero().squeeze(1) for x in (tokens, places))
    tokens, empty, places, padding = (x.to(device) for x in (tokens.clamp(0), empty, places.clamp(0), padding))
    return Packed(chunk, tuple(counts.tolist()), tokens, empty, places, padding)
