"""Documents of unequal length in the rows of a microbatch: which tokens see one another, and in which form.

Shapes: b rows of s positions, h heads of d features.  Tokens are numbered position · b + row, as [s, b, ...] lies in
memory.  A group is n documents padded to the longest of them, l; a slot is the place of a token in a group.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

AttentionKind = Literal["full", "padding", "document"]
Form = Literal["dense", "grouped", "varlen"]

# The rule, in what it costs one query to meet one key.  A query costs QUERY beside the keys that it meets (reading,
# normalising, writing), and GATHER more where it is gathered.  On a CPU fitted to benchmarks/attention_cpu.md.
QUERY, GATHER = 25, 25
# What launching the kernels of a group costs, times the features of all heads: a CPU's (a thread) is measured, a GPU's
# estimated (150 µs at 50 TFLOP/s).
LAUNCH = {"cpu": 7e5, "cuda": 5e8}
TILE = 128  # queries of an entry of ``Documents.tiles``, as kernels/attention/tiles.cuh


@dataclasses.dataclass(frozen=True, eq=False)
class Documents:
    """Which tokens of a microbatch see one another: made once per microbatch, used by every layer."""

    document_ids: Tensor  # [b, s]
    indices: Tensor  # [b, s]
    kind: AttentionKind
    causal: bool
    stretches: Stretches | None  # None: every token sees every token of its row
    wanted: Form | None
    chunk: int | None = None  # rows are cut into chunks of so many positions, seen only from inside
    _costs: dict[int, tuple[float, float]] = dataclasses.field(default_factory=dict, init=False)
    _grouped: dict[int, tuple[Slots, list[Group]]] = dataclasses.field(default_factory=dict, init=False)
    _pieces: dict[int, Pieces] = dataclasses.field(default_factory=dict, init=False)

    @staticmethod
    def of(
        document_ids: Tensor, indices: Tensor, kind: AttentionKind, *, causal: bool, form: Form | None = None
    ) -> Documents:
        """
        document_ids: [b, s] int64; 0 is padding, other numbers are the documents of a row, each in one stretch of it.
        indices: [b, s] int64, every token's index in its own row of the run; consecutive in a document.  They restart
        where several rows of the run were joined to one.
        kind: "full": every token sees every token of its row (the ids are not read, indices are 0 to s - 1);
        "padding": real tokens of a row see one another; "document": those of one document do.
        causal: a query sees its own and earlier tokens only.  form: overrides the choice of ``Documents.form``.

        Both tensors are copied to the host, where the lengths are needed, except for "full".
        ValueError: a document in pieces in a row whose indices restart.
        """
        stretches = None if kind == "full" else Stretches.of(document_ids, indices, whole_rows=kind == "padding")
        return Documents(document_ids, indices, kind, causal, stretches, form)

    def chunks(self, size: int, positions: Tensor) -> Documents:
        """The same tokens, each seeing only those of its own chunk of ``size`` positions, counted from the start of its
        document (in rows that are not packed: of its row).

        positions: [b, s] int64, every token's place in its document.
        """
        if self.kind != "document" or self.stretches is None or not self.stretches.compact:
            return dataclasses.replace(self, chunk=min(size, self.shape[0]))
        ids = self.document_ids
        longest = positions.max() // size + 1
        ids = torch.where(ids > 0, ids * longest + positions // size, 0)
        return Documents.of(ids, self.indices, "document", causal=self.causal, form="grouped")

    @property
    def shape(self) -> tuple[int, int]:
        """(positions, rows)"""
        b, s = self.document_ids.shape
        return s, b

    def rows(self, x: Tensor) -> Tensor:
        """[s, b, h, ...] → [n, h, l, ...]: rows, or their chunks, with zeros after the last token."""
        s, _ = self.shape
        l = self.chunk or s
        x = F.pad(x, (0, 0) * (x.dim() - 1) + (0, -s % l)) if s % l else x
        x = x.unflatten(0, (-1, l)).movedim(2, 0).flatten(0, 1)  # [b · chunks, l, h, ...]
        return x.transpose(1, 2)

    def from_rows(self, y: Tensor) -> Tensor:
        """The reverse, [n, h, l, ...] → [s, b, h, ...]."""
        s, b = self.shape
        y = y.transpose(1, 2).unflatten(0, (b, -1))  # [b, chunks, l, h, ...]
        return y.movedim(0, 2).flatten(0, 1)[:s]

    def form(self, x: Tensor, *, explicit: bool) -> Form:
        """How attention is computed for queries like x [..., h, d]; ``explicit``: with dropout or relative positions.

        "dense": rows as they are, under a mask where one is needed; "grouped": documents of similar length together;
        "varlen": torch's kernel for variable lengths.
        """
        if self.chunk is not None:
            return "dense"
        if self.wanted is not None:
            return self.wanted
        if self.stretches is None or self.stretches.fill_rows or not self.stretches.compact:
            return "dense"
        if not explicit and has_varlen_kernel(x):
            return "varlen"
        dense, grouped = self.costs(x.shape[-2] * x.shape[-1])
        return "grouped" if grouped < dense or self.stretches.restart else "dense"

    def costs(self, width: int) -> tuple[float, float]:
        """Of the dense and the grouped form, in pairs of a query and a key; ``width``: features of all heads."""
        if width not in self._costs:
            b, s = self.document_ids.shape
            padded, launch = self._padded(width).double(), self._launch(width)
            pairs = (padded * (QUERY + GATHER + padded)).sum().item()
            self._costs[width] = b * s * (QUERY + s) + launch, pairs + launch * padded.unique().numel()
        return self._costs[width]

    def _launch(self, width: int) -> float:
        if self.document_ids.device.type == "cpu":
            return LAUNCH["cpu"] * torch.get_num_threads() / width  # launching is not shared among threads
        return LAUNCH["cuda"] / width

    def _padded(self, width: int) -> Tensor:
        """[documents] the longest length in the group of each.  From the longest down, a length joins the group before
        it until the padding in that one costs what another launch does."""
        assert self.stretches is not None
        values, which, counts = self.stretches.lengths.unique(return_inverse=True, return_counts=True)
        padded, waste, longest = values.tolist(), 0, 0
        for i, n in reversed(list(enumerate(counts.tolist()))):
            waste += n * (longest - padded[i]) * (QUERY + GATHER + longest + padded[i])
            if not longest or waste > self._launch(width):
                waste, longest = 0, padded[i]
            padded[i] = longest
        return torch.tensor(padded)[which]

    @functools.cached_property
    def dense(self) -> Group:
        """All rows, or their chunks, as they are."""
        s, b = self.shape
        l = self.chunk or s
        n = b * -(-s // l)
        first = self._first_of_rows()
        if s % l == 0 and (self.stretches is None or self.stretches.fill_rows):
            return Group(n, l, None, first)
        ids = F.pad(self.document_ids if self.stretches is not None else self.document_ids.new_ones(b, s), (0, -s % l))
        ids = ids.view(n, l)
        if self.kind == "document":
            mask = (ids.unsqueeze(2) == ids.unsqueeze(1)).unsqueeze(1)
        else:
            real = ids > 0
            mask = (real | ~real.any(1, keepdim=True))[:, None, None, :]  # a row without tokens must not divide by 0
        if not self.causal:
            return Group(n, l, mask, first)
        # A padded query before the first token sees itself, so that no row of the softmax is empty.
        index = torch.arange(l, device=ids.device)
        mask = (mask & (index.unsqueeze(1) > index)) | (index.unsqueeze(1) == index)
        return Group(n, l, mask, first, mask.sum(-1, keepdim=True) if self.kind == "document" else None)

    def _first_of_rows(self) -> Tensor | None:
        """[n] the index of the first token of each row, or chunk of one; None: all are 0."""
        first = None if self.stretches is None else self.stretches.first_of_rows
        if self.chunk is not None:
            s, b = self.shape
            starts = torch.arange(0, s, self.chunk)
            first = (starts.new_zeros(b, 1) if first is None else first.unsqueeze(1)).add(starts).flatten()
        return None if first is None else self._moved(first)

    def _moved(self, first: Tensor) -> Tensor | None:
        """To the device, or None where all are 0."""
        return first.to(self.document_ids.device) if first.any() else None

    def grouped(self, width: int) -> tuple[Slots, list[Group]]:
        """Documents of similar length together, the longest first; ``width``: features of all heads."""
        if width not in self._grouped:
            self._grouped[width] = self._group(self._padded(width))
        return self._grouped[width]

    def _group(self, padded: Tensor) -> tuple[Slots, list[Group]]:
        assert self.stretches is not None
        order = self.stretches.lengths.argsort(descending=True, stable=True)
        lengths, padded = self.stretches.lengths[order], padded[order]
        slots, real = self._slots(self._tokens(self.stretches.starts[order], lengths), lengths, padded)
        first = self._moved(self.stretches.first[order])
        # In rows that are not packed a causal query's number counts the padding before it, as in the dense form.
        counted = self.causal and self.kind == "padding"
        before = self._moved(self.stretches.starts[order] % self.shape[0]) if counted else None
        groups, slot, document = [], 0, 0
        for l, n in zip(*(x.tolist() for x in padded.unique_consecutive(return_counts=True)), strict=True):
            of_group = slice(document, document + n)
            # Empty slots come last in a stretch: a causal query meets none.
            seen = None if self.causal or bool((lengths[of_group] == l).all()) else real[slot : slot + n * l]
            mask = None if seen is None else seen.view(n, 1, 1, l)
            number = torch.arange(1, l + 1, device=self.document_ids.device).unsqueeze(1)
            places = None if before is None else before[of_group].view(n, 1, 1, 1) + number
            groups.append(Group(n, l, mask, None if first is None else first[of_group], places))
            slot, document = slot + n * l, document + n
        return slots, groups

    @functools.cached_property
    def packed(self) -> tuple[Slots, Tensor, int]:
        """Documents one after another without gaps: slots, bounds ([documents + 1] int32), the longest length."""
        assert self.stretches is not None
        lengths = self.stretches.lengths
        slots, _ = self._slots(self._tokens(self.stretches.starts, lengths), lengths, lengths)
        bounds = F.pad(lengths.cumsum(0), (1, 0)).to(self.document_ids.device, torch.int32)
        return slots, bounds, int(lengths.max())

    @property
    def apart(self) -> bool:
        """Whether every token sees those of its document, all in one stretch with consecutive indices, in rows as they
        are: what ``tiles`` can say."""
        stretches = self.stretches is None or self.stretches.compact
        return stretches and self.chunk is None and self.wanted is None

    @functools.cached_property
    def tiles(self) -> tuple[Tensor, bool]:
        """The queries of each document in TILEs, the longest documents first, and whether every token is in one.

        [tiles, 5] int32: row, position and index of the document's first token, its length, the number of the tile; the
        first tile of a document whose first index is odd has one query less.
        """
        s, b = self.shape
        if self.stretches is None:
            starts, lengths = torch.arange(b) * s, torch.full((b,), s)
            first = torch.zeros(b, dtype=torch.int64)
        else:
            order = self.stretches.lengths.argsort(descending=True, stable=True)
            starts, lengths = self.stretches.starts[order], self.stretches.lengths[order]
            first = self.stretches.first[order]
        counts = (lengths + first % 2 + TILE - 1) // TILE
        numbers = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        documents = torch.stack((starts // s, starts % s, first, lengths), 1).repeat_interleave(counts, 0)
        if self.causal:  # the last queries see most
            numbers = (counts - 1).repeat_interleave(counts) - numbers
        tiles, device = torch.cat((documents, numbers.unsqueeze(1)), 1).to(torch.int32), self.document_ids.device
        if device.type == "cuda":
            tiles = tiles.pin_memory()  # so that copying waits for nothing
        return tiles.to(device, non_blocking=True), int(lengths.sum()) == s * b

    def pieces(self, multiple: int, *, keep_padding: bool = False) -> Pieces:
        """Every document by itself, as long as the next multiple of ``multiple``; its tokens are moved together where
        padding lies between them.  ``keep_padding``: rows that are not packed stay as they are."""
        key = 0 if keep_padding and self.kind == "padding" else multiple
        if key not in self._pieces:
            self._pieces[key] = self._cut(key)
        return self._pieces[key]

    def _cut(self, multiple: int) -> Pieces:
        s, b = self.shape
        if self.stretches is None or (self.stretches.fill_rows and self.stretches.compact):
            return Pieces(self, None, [(b, s)], [None])
        ids = self.document_ids.cpu()
        names = torch.arange(b).unsqueeze(1) * (ids.max() + 1) + (ids if self.kind == "document" else (ids > 0).long())
        order = names.where(ids > 0, -1).flatten().argsort(stable=True)[int((ids == 0).sum()) :]
        if multiple == 0 or not len(order):
            return Pieces(self, None, [(b, s)], [self.document_ids > 0])
        _, lengths = names.flatten()[order].unique_consecutive(return_counts=True)
        padded = -(-lengths // multiple) * multiple
        longest_first = padded.argsort(descending=True, stable=True)
        firsts = (lengths.cumsum(0) - lengths)[longest_first]
        lengths, padded = lengths[longest_first], padded[longest_first]
        places = torch.arange(len(order)) + (firsts - lengths.cumsum(0) + lengths).repeat_interleave(lengths)
        order = order[places]
        slots, real = self._slots(order % s * b + order // s, lengths, padded)
        sizes: list[tuple[int, int]] = []
        masks: list[Tensor | None] = []
        slot, document = 0, 0
        for l, n in zip(*(x.tolist() for x in padded.unique_consecutive(return_counts=True)), strict=True):
            full = bool((lengths[document : document + n] == l).all())
            sizes.append((n, l))
            masks.append(None if full else real[slot : slot + n * l].view(n, l))
            slot, document = slot + n * l, document + n
        return Pieces(self, slots, sizes, masks)

    def _tokens(self, starts: Tensor, lengths: Tensor) -> Tensor:
        """The numbers of the tokens of these stretches, one stretch after another."""
        b, s = self.document_ids.shape
        place = torch.arange(int(lengths.sum())) + (starts - lengths.cumsum(0) + lengths).repeat_interleave(lengths)
        return place % s * b + place // s

    def _slots(self, order: Tensor, lengths: Tensor, padded: Tensor) -> tuple[Slots, Tensor]:
        """Slots for documents of these lengths, whose tokens are given one document after another, each padded to so
        many; and which of the slots have a token: [slots] bool."""
        b, s = self.document_ids.shape
        document = torch.arange(len(lengths)).repeat_interleave(padded)
        real = torch.arange(len(document)) - (padded.cumsum(0) - padded)[document] < lengths[document]
        tokens = torch.zeros(len(document), dtype=torch.int64).masked_scatter(real, order)
        slots = torch.full((s * b,), -1)
        slots[order] = real.nonzero().squeeze(1)
        empty, padding = (~real).nonzero().squeeze(1), (slots < 0).nonzero().squeeze(1)
        device = self.document_ids.device
        tokens, empty, slots, padding, real = (x.to(device) for x in (tokens, empty, slots.clamp(0), padding, real))
        return Slots(tokens, empty, slots, padding), real


@dataclasses.dataclass(frozen=True, eq=False)
class Stretches:
    """The documents of a microbatch in order of its rows, on the host."""

    starts: Tensor  # [documents] row · s + position of the first token
    lengths: Tensor  # [documents]
    first: Tensor  # [documents] index of the first token
    first_of_rows: Tensor  # [b] index of each row's first token
    compact: bool  # there is one, and every one lies in one stretch with consecutive indices
    restart: bool  # somewhere in a row the indices are not consecutive
    fill_rows: bool  # every row is one document

    @staticmethod
    def of(document_ids: Tensor, indices: Tensor, *, whole_rows: bool) -> Stretches:
        ids, index = torch.stack((document_ids, indices)).cpu()
        b, s = ids.shape
        if whole_rows:
            ids = (ids > 0).long()
        same, step = ids[:, 1:] == ids[:, :-1], index.diff(dim=1) == 1
        starts = F.pad(~same, (1, 0), value=True).flatten().nonzero().squeeze(1)
        lengths = starts.diff(append=starts.new_tensor([b * s]))
        number = ids.flatten()[starts]
        names = (starts // s * (ids.max() + 1) + number)[number > 0]
        starts, lengths = starts[number > 0], lengths[number > 0]
        pieces = names.unique().numel() < names.numel() or not bool((step | ~same | (ids[:, 1:] == 0)).all())
        restart = not bool(step.all())
        if pieces and restart:
            raise ValueError(
                "a document lies in pieces in a row whose indices restart: give every document of a row a number of "
                "its own and consecutive indices"
            )
        return Stretches(
            starts, lengths, index.flatten()[starts], index[:, 0],
            compact=len(starts) > 0 and not pieces, restart=restart,
            fill_rows=len(starts) == b and bool((lengths == s).all()),
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """n stretches of l tokens, each attending within itself.

    ``mask``: bool, broadcasts with [n, h, l, l], True where a query sees a key; None: everywhere, or where attention is
    causal everywhere before.  ``first``: [n], the index of each stretch's first token; None: 0.  ``places``: [n, 1, l,
    1], the number of each query, from 1, by which causal attention divides; None: its number in the stretch.
    """

    n: int
    l: int
    mask: Tensor | None
    first: Tensor | None
    places: Tensor | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Pieces:
    """Documents, each by itself, those padded to the same length together: for attention whose result depends on where
    a document begins and on how long it is."""

    documents: Documents
    slots: Slots | None  # None: rows as they are
    sizes: list[tuple[int, int]]  # (n documents, l tokens)
    masks: list[Tensor | None]  # [n, l] bool, True where there is a token; None: everywhere

    def split(self, x: Tensor) -> list[Tensor]:
        """[s, b, h, d] → [n, h, l, d] of each size, zeros where there is no token (rows as they are: as given)."""
        if self.slots is None:
            return [self.documents.rows(x)]
        parts = self.slots.gather(x.flatten(0, 1)).split([n * l for n, l in self.sizes])
        return [part.unflatten(0, size).transpose(1, 2) for part, size in zip(parts, self.sizes, strict=True)]

    def join(self, parts: list[Tensor]) -> Tensor:
        """The reverse, [s, b, h, d], zeros for padding (rows as they are: as given)."""
        if self.slots is None:
            return self.documents.from_rows(parts[0])
        y = self.slots.scatter(torch.cat([part.transpose(1, 2).flatten(0, 1) for part in parts]))
        return y.view(*self.documents.shape, *y.shape[1:])


@dataclasses.dataclass(frozen=True, eq=False)
class Slots:
    """Where tokens go and come back from: a partial permutation and its adjoint."""

    tokens: Tensor  # [slots] the token in each slot, any in an empty one
    empty: Tensor  # the slots without a token
    slots: Tensor  # [s · b] the slot of each token, any for padding
    padding: Tensor  # the tokens without a slot

    def gather(self, x: Tensor) -> Tensor:
        """[s · b, ...] → [slots, ...], zero in empty ones."""
        return _Rearrange.apply(x, self.tokens, self.empty, self.slots, self.padding)  # type: ignore[no-any-return]

    def scatter(self, y: Tensor) -> Tensor:
        """[slots, ...] → [s · b, ...], zero for padding."""
        return _Rearrange.apply(y, self.slots, self.padding, self.tokens, self.empty)  # type: ignore[no-any-return]


class _Rearrange(torch.autograd.Function):
    """x[source], zero at ``nothing``.  The gradient is a gather too: nothing is added up, in any order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, nothing: Tensor, back: Tensor, back_nothing: Tensor) -> Tensor:
        ctx.save_for_backward(source, nothing, back, back_nothing)
        y = x.index_select(0, source)
        return y.index_fill_(0, nothing, 0) if len(nothing) else y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        source, nothing, back, back_nothing = ctx.saved_tensors
        return _Rearrange.apply(gradient, back, back_nothing, source, nothing), None, None, None, None


def has_varlen_kernel(x: Tensor) -> bool:
    """Whether torch has a variable-length kernel for queries like x [..., d]: flash attention (arXiv 2307.08691), which
    takes 16 bit numbers, d a multiple of 8 up to 256, and NVIDIA GPUs from compute capability 8.0 on."""
    if not x.is_cuda or x.dtype not in (torch.float16, torch.bfloat16) or x.shape[-1] % 8 or x.shape[-1] > 256:
        return False
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(x.device) >= (8, 0)
