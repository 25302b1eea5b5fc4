"""MRA-2 attention by lists of selected blocks, in plain PyTorch: nothing of length × length is made.

Rows (of blocks) with the same number of selected blocks are worked on together: the blocks' keys are gathered, and all
is batched matrix products.  The backward pass computes the weights again from their maximum and sum.  What blocks give
to their keys and values is summed column by column in the order of the lists, so that every run gives the same bits.

The low-resolution part: of block row i with logits l_ij, A_ij = n_j exp(l_ij − r_i) over blocks j that are not
selected, r_i the highest of these l_ij; A v̂ and the sums of A count exp(r_i − c_t) in query t, c_t the common maximum.

Letters: m matrices (of the batch's rows and heads) worked on at a time, nb blocks of BLOCK positions, d features of
queries and keys, e of values; r rows of blocks, c selected blocks in each.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..threads import for_each
from .selection import BLOCK, EPSILON, Options, Selection, block_means, by_column, low_resolution_logits

# Numbers that selected blocks give to keys and values, of the matrices worked on at once: memory is bounded whatever
# the number of heads.  And numbers in the tensors of a piece of rows, which should stay in the cache.
GIVEN, PIECE = 1 << 23, 1 << 20


def blocks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Options) -> Tensor:
    """As ``mra_attention``; keeps q, k, v, the result, the maximum and sum of each query and the lists."""
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return _Blocks.apply(q, k, v, mask, options, keep)  # type: ignore[no-any-return]


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Options, keep: bool) -> Tensor:
        n, h, l, _ = q.shape
        dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), torch.promote_types(v.dtype, torch.float32))
        y = torch.empty(v.shape, dtype=q.dtype, device=q.device)
        # Not the logarithm of the sum added to the maximum: beside a large one it would lose its digits.
        norms = y.new_empty(2, n, h, -(-l // BLOCK) * BLOCK, dtype=dtype) if keep else None
        parts = _parts(q, v, options)
        lists: list[tuple[Tensor, Tensor]] = [(y, y)] * len(parts)

        def attend(number: int) -> None:
            part = parts[number]
            matrices = _Matrices.of(q[part], k[part], v[part], None if mask is None else mask[part[0]], dtype)
            means = matrices.means()
            selection = Selection.of(low_resolution_logits(means[0], means[1]), matrices.counts, options)
            coarse = None if options.sparse else _Coarse.of(matrices, selection, means)
            of_part, *norms_of_part = _attend(matrices, selection, coarse)
            matrices.put(of_part, y[part])
            if norms is not None:
                for whole, norm in zip(norms, norms_of_part, strict=True):
                    whole[part] = norm.view_as(whole[part])
                lists[number] = selection.pointers.int(), selection.columns.int()

        for_each(attend, range(len(parts)), q.device)
        if keep:
            ctx.save_for_backward(q, k, v, mask, y, norms, *(x for pair in lists for x in pair))
            ctx.options, ctx.parts = options, parts  # by the lists: the number of threads may change meanwhile
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, mask, y, norms, *lists = ctx.saved_tensors
        gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
        parts = ctx.parts

        def differentiate(i: int) -> None:
            part = parts[i]
            matrices = _Matrices.of(q[part], k[part], v[part], None if mask is None else mask[part[0]], norms.dtype)
            selection = Selection(lists[2 * i].long(), lists[2 * i + 1].long())
            coarse = None if ctx.options.sparse else _Coarse.of(matrices, selection, matrices.means())
            rows = _Rows.of(selection, q.shape[3] + v.shape[3])
            totals = (torch.zeros_like(matrices.k), torch.zeros_like(matrices.v))
            given = _Given(_Given.make_room(matrices, selection), totals, rows.columns)
            maximum, sums = (x[part].reshape(-1, BLOCK, 1) for x in norms)
            of_part = matrices.take(of_y[part]).div_(sums)
            delta = (of_part * matrices.take(y[part])).sum(2, keepdim=True)
            results = _differentiate(matrices, rows, coarse, given, maximum, of_part, delta)
            for whole, result in zip(gradients, results, strict=True):
                matrices.put(result, whole[part])

        for_each(differentiate, range(len(parts)), q.device)
        return *gradients, None, None, None


def _parts(q: Tensor, v: Tensor, options: Options) -> list[tuple[slice, slice]]:
    """What is worked on at once: some rows of the batch with all heads, or some heads of a row."""
    n, h, _, d = q.shape
    together = max(1, GIVEN // (options.budget * BLOCK * (d + v.shape[3])))
    if q.device.type == "cpu":  # each thread should have some
        together = min(together, max(1, n * h // torch.get_num_threads()))
    if together >= h:
        step = together // max(h, 1)
        return [(slice(at, at + step), slice(None)) for at in range(0, n, step)]
    return [(slice(i, i + 1), slice(at, at + together)) for i in range(n) for at in range(0, h, together)]


@dataclasses.dataclass(frozen=True, eq=False)
class _Matrices:
    """Queries (with the factor 1 / √d), keys and values of m matrices in blocks, zero at padding."""

    q: Tensor  # [m · nb, BLOCK, d]
    k: Tensor
    v: Tensor  # [m · nb, BLOCK, e]
    counts: Tensor  # [m, nb] real tokens
    padding: Tensor | None  # [m · nb, BLOCK] bool; None: all tokens are real
    mask: Tensor | None  # as ``mra_attention``'s

    @staticmethod
    def of(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dtype: torch.dtype) -> _Matrices:
        n, h, l, d = q.shape
        nb = -(-l // BLOCK)
        counts, padding = torch.full((n * h, nb), BLOCK, device=q.device), None
        if mask is not None or l % BLOCK:
            real = torch.ones(n, l, dtype=torch.bool, device=q.device) if mask is None else mask
            padding = ~F.pad(real, (0, nb * BLOCK - l)).unsqueeze(1).expand(-1, h, -1).reshape(-1, BLOCK)
            counts -= padding.sum(1).view_as(counts)
        q_in_blocks = _in_blocks(q, mask, dtype).mul_(d**-0.5)
        return _Matrices(q_in_blocks, _in_blocks(k, mask, dtype), _in_blocks(v, mask, dtype), counts, padding, mask)

    def means(self) -> tuple[Tensor, Tensor, Tensor]:
        """q̂, k̂ [m, nb, d] and v̂ [m, nb, e], float64"""
        q, k, v = (block_means(x.unflatten(0, self.counts.shape), self.counts) for x in (self.q, self.k, self.v))
        return q, k, v

    def take(self, x: Tensor) -> Tensor:
        """[n, h, l, d] → [m · nb, BLOCK, d], zero at padding."""
        return _in_blocks(x, self.mask, self.q.dtype)

    def put(self, x: Tensor, out: Tensor) -> None:
        """[m · nb, BLOCK, d] → out [n, h, l, d], zero at padding."""
        out.copy_(x.view(*out.shape[:2], -1, x.shape[2])[:, :, : out.shape[2]])
        if self.mask is not None:
            out.masked_fill_(~self.mask[:, None, :, None], 0)


def _in_blocks(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    n, h, l, d = x.shape
    nb = -(-l // BLOCK)
    y = torch.empty(n, h, nb * BLOCK, d, dtype=dtype, device=x.device)
    y[:, :, :l], y[:, :, l:] = x, 0
    if mask is not None:
        y[:, :, :l].masked_fill_(~mask[:, None, :, None], 0)
    return y.view(n * h * nb, BLOCK, d)


class _Coarse(NamedTuple):
    """The low-resolution part of m matrices."""

    means: tuple[Tensor, Tensor, Tensor]  # q̂, k̂ [m, nb, d], v̂ [m, nb, e]
    weights: Tensor  # A [m, nb, nb]
    maximum: Tensor  # r [m · nb, 1], −inf where a row has no such block
    sums: Tensor  # of A, [m · nb, 1]
    values: Tensor  # A v̂ [m · nb, 1, e]

    @staticmethod
    def of(matrices: _Matrices, selection: Selection, means: tuple[Tensor, Tensor, Tensor]) -> _Coarse:
        logits = low_resolution_logits(means[0], means[1]).to(matrices.q.dtype)
        logits.flatten(1).scatter_(1, selection.indices, -torch.inf)
        logits.masked_fill_((matrices.counts == 0).unsqueeze(1), -torch.inf)
        maximum = logits.amax(2, keepdim=True)
        weights = logits.sub_(maximum.masked_fill(maximum == -torch.inf, 0)).exp_().mul_(matrices.counts.unsqueeze(1))
        q, k, v = (x.to(weights.dtype) for x in means)
        values = (weights @ v).flatten(0, 1).unsqueeze(1)
        return _Coarse((q, k, v), weights, maximum.flatten(0, 1), weights.sum(2).view(-1, 1), values)


class _Piece(NamedTuple):
    """r rows with c selected blocks each, c > 0; see ``_Rows``."""

    rows: slice  # of its order
    listed: slice  # of its columns
    columns: Tensor  # [r · c]

    def keys(self, x: Tensor) -> Tensor:
        """[m · nb, BLOCK, ...] → those of the selected blocks, [r, c · BLOCK, ...]"""
        return x.index_select(0, self.columns).view(self.rows.stop - self.rows.start, -1, *x.shape[2:])

    def scores(self, q: Tensor, k: Tensor, padding: Tensor | None) -> Tensor:
        """q: [r, BLOCK, d]; k: [r, c · BLOCK, d] → [r, BLOCK, c · BLOCK], −inf at padding."""
        scores = q @ k.mT
        if padding is not None:
            scores.masked_fill_(self.keys(padding).unsqueeze(1), -torch.inf)
        return scores


class _Rows(NamedTuple):
    """The rows of blocks of m matrices, those with most selected blocks first."""

    order: Tensor  # [m · nb]
    columns: Tensor  # [m · k] of the selected blocks of one row after another, numbered through all matrices
    pieces: list[_Piece]

    @staticmethod
    def of(selection: Selection, features: int) -> _Rows:
        """features: of a key and its value."""
        m, nb = selection.counts.shape
        matrix = torch.arange(m, device=selection.columns.device).unsqueeze(1)
        columns = (selection.columns + matrix * nb).flatten()
        starts = (selection.pointers[:, :-1] + matrix * selection.columns.shape[1]).flatten()
        counts, order = selection.counts.flatten().sort(descending=True, stable=True)
        moved = (starts[order] - counts.cumsum(0) + counts).repeat_interleave(counts)
        columns = columns[moved + torch.arange(len(moved), device=moved.device)]
        pieces, row, block = [], 0, 0
        for c, r in zip(*(x.tolist() for x in counts.unique_consecutive(return_counts=True)), strict=True):
            step, end = max(1, PIECE // max(1, c * BLOCK * (features + 2 * BLOCK))), row + r
            while c and row < end:
                rows = slice(row, min(row + step, end))
                listed = slice(block, block + (rows.stop - row) * c)
                pieces.append(_Piece(rows, listed, columns[listed]))
                row, block = rows.stop, listed.stop
        return _Rows(order, columns, pieces)

    def gather(self, *tensors: Tensor) -> list[Tensor]:
        """[m · nb, ...] in the order of the rows."""
        return [x.index_select(0, self.order) for x in tensors]

    def scatter(self, x: Tensor) -> Tensor:
        return torch.empty_like(x).index_copy_(0, self.order, x)


def _attend(matrices: _Matrices, selection: Selection, coarse: _Coarse | None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y [m · nb, BLOCK, e], and each query's maximum and sum of weights [m · nb, BLOCK]."""
    k, v, e = matrices.k, matrices.v, matrices.v.shape[2]
    rows = _Rows.of(selection, k.shape[2] + e)
    (q,) = rows.gather(matrices.q)
    if coarse is None:
        rest = (q.new_full((len(q), 1), -torch.inf), q.new_zeros(len(q), 1), v.new_zeros(len(q), 1, e))
    else:
        rest = (coarse.maximum, coarse.sums, coarse.values)
    highest, rest_sums, rest_values = rows.gather(*rest)
    maximum = highest.masked_fill(highest == -torch.inf, 0).repeat(1, BLOCK)
    y, sums = torch.zeros_like(v), torch.zeros_like(maximum)
    for piece in rows.pieces:
        at = piece.rows
        weights = piece.scores(q[at], piece.keys(k), matrices.padding)
        torch.maximum(weights.amax(2), highest[at], out=maximum[at])
        maximum[at].masked_fill_(maximum[at] == -torch.inf, 0)  # neither a real key nor a block
        torch.sum(weights.sub_(maximum[at].unsqueeze(2)).exp_(), 2, out=sums[at])
        torch.bmm(weights, piece.keys(v), out=y[at])
    share = (highest - maximum).exp_()
    sums.addcmul_(share, rest_sums).add_(EPSILON)
    y.addcmul_(share.unsqueeze(2), rest_values).div_(sums.unsqueeze(2))
    return rows.scatter(y), rows.scatter(maximum), rows.scatter(sums)


def _differentiate(
    matrices: _Matrices,
    rows: _Rows,
    coarse: _Coarse | None,
    given: _Given,
    maximum: Tensor,
    of_y: Tensor,
    delta: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """of_y: [m · nb, BLOCK, e] divided by the sums; maximum, delta (of_y · y): [m · nb, BLOCK, 1].

    Returns the gradients of q, k, v [m · nb, BLOCK, d or e].
    """
    k, v, d = matrices.k, matrices.v, matrices.k.shape[2]
    q, of_rows, maximum_rows, delta_rows = rows.gather(matrices.q, of_y, maximum, delta)
    of_q = torch.zeros_like(q)
    for piece in rows.pieces:
        at, keys = piece.rows, piece.keys(k)
        weights = piece.scores(q[at], keys, matrices.padding).sub_(maximum_rows[at]).exp_()
        of_scores = (of_rows[at] @ piece.keys(v).mT).sub_(delta_rows[at]).mul_(weights)
        torch.bmm(of_scores, keys, out=of_q[at])
        given.add(piece, (of_scores, q[at]), (weights, of_rows[at]))
    given.sum()
    gradients = rows.scatter(of_q), *given.totals
    if coarse is not None:
        size = (matrices.counts.double() + EPSILON).to(q.dtype).unsqueeze(2)
        for gradient, of_mean in zip(gradients, _differentiate_coarse(coarse, maximum, of_y, delta), strict=True):
            gradient += (of_mean / size).flatten(0, 1).unsqueeze(1)
    gradients[0].mul_(d**-0.5)
    return gradients


def _differentiate_coarse(
    coarse: _Coarse, maximum: Tensor, of_y: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``_differentiate``, the gradients of q̂, k̂ and v̂."""
    (q, k, v), weights = coarse.means, coarse.weights
    share = (coarse.maximum.unsqueeze(2) - maximum).exp_()
    of_values = (share.mT @ of_y).view(v.shape)  # of A v̂
    of_logits = (of_values @ v.mT).sub_((share.mT @ delta).view(*v.shape[:2], 1)).mul_(weights)
    return of_logits @ k, of_logits.mT @ q, weights.mT @ of_values


@dataclasses.dataclass(eq=False)
class _Given:
    """What selected blocks give to their keys and values: of a stretch of the list, as long as there is room."""

    room: tuple[Tensor, Tensor]  # [room, BLOCK, d], [room, BLOCK, e]
    totals: tuple[Tensor, Tensor]  # [m · nb, BLOCK, d], [m · nb, BLOCK, e]
    columns: Tensor  # of ``_Rows``
    start: int = 0
    stop: int = 0

    @staticmethod
    def make_room(matrices: _Matrices, selection: Selection) -> tuple[Tensor, Tensor]:
        """For the blocks of a piece at least."""
        k, v = matrices.k, matrices.v
        pieces = max(GIVEN, PIECE) // (BLOCK * (k.shape[2] + v.shape[2]))
        room = min(selection.columns.numel(), max(pieces, selection.counts.shape[1]))
        return k.new_empty(room, *k.shape[1:]), v.new_empty(room, *v.shape[1:])

    def add(self, piece: _Piece, to_keys: tuple[Tensor, Tensor], to_values: tuple[Tensor, Tensor]) -> None:
        """Products of [r, BLOCK, c · BLOCK], transposed, with [r, BLOCK, d or e]."""
        if piece.listed.stop - self.start > len(self.room[0]):
            self.sum()
        at = slice(piece.listed.start - self.start, piece.listed.stop - self.start)
        for room, (left, right) in zip(self.room, (to_keys, to_values), strict=True):
            torch.bmm(left.mT, right, out=room[at].view(len(right), left.shape[2], right.shape[2]))
        self.stop = piece.listed.stop

    def sum(self) -> None:
        """Adds it all to the totals."""
        order, starts = by_column(self.columns[self.start : self.stop], len(self.totals[0]))
        for total, room in zip(self.totals, self.room, strict=True):
            # Column by column in the order of the list, where index_add would add in any order on a GPU.
            total += F.embedding_bag(order, room.flatten(1), starts, mode="sum").view_as(total)
        self.start = self.stop
