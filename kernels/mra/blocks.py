"""MRA-2 attention by lists of selected blocks, in plain PyTorch: nothing of length × length is made.

Rows (of blocks) that have the same number of selected blocks are worked on together: their keys are gathered and all is
batched matrix products.  The backward pass computes the weights again from the log-sum-exp.  What a selected block
gives to its keys and values is summed in the order of the lists, column by column, so every run gives the same bits.

The low-resolution part: of block row i with logits l_ij, A_ij = n_j exp(l_ij − r_i) over blocks j that are not selected,
r_i the highest of these l_ij; then A v̂ and the sums of A count exp(r_i − c_t) in query t, c_t the common maximum.

Letters: m matrices (of the batch's rows and heads) worked on at a time, nb blocks of BLOCK positions, d features of
queries and keys, e of values; r rows of blocks, c selected blocks in each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .selection import BLOCK, EPSILON, Selection, block_means, by_column, low_resolution_logits

# Numbers in the tensors of matrices worked on at once, in those of a piece of rows (which should stay in the cache),
# and in what blocks give to keys and values before it is summed.
MATRICES, PIECE, GIVEN = 1 << 21, 1 << 19, 1 << 22


class Options(NamedTuple):
    """Those of ``mra_attention``."""

    budget: int
    sparse: bool
    first_blocks: int
    diagonal_blocks: int


def blocks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    """As ``mra_attention``; keeps q, k, v, the result, its log-sum-exp and the lists for the backward pass."""
    return _Blocks.apply(q, k, v, mask, Options(**options))  # type: ignore[no-any-return]


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Options) -> Tensor:
        n, h, l, _ = q.shape
        keep = any(ctx.needs_input_grad)
        y = torch.empty(*v.shape, dtype=q.dtype, device=q.device)
        nb = -(-l // BLOCK)
        dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), torch.promote_types(v.dtype, torch.float32))
        lse = torch.empty(n, h, nb * BLOCK, dtype=dtype, device=q.device) if keep else None
        pointers, columns = [], []
        for part in _parts(n, h, nb * BLOCK * (2 * q.shape[3] + v.shape[3]) + nb * nb):
            matrices = _Matrices.of(q[part], k[part], v[part], None if mask is None else mask[part[0]], dtype)
            selection = matrices.select(options)
            _attend(matrices, selection, options.sparse, y[part], None if lse is None else lse[part])
            if keep:
                pointers.append(selection.pointers.int())
                columns.append(selection.columns.int())
        if keep:
            ctx.save_for_backward(q, k, v, mask, y, lse, *pointers, *columns)
            ctx.sparse = options.sparse
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, mask, y, lse, *lists = ctx.saved_tensors
        n, h, l, _ = q.shape
        nb = -(-l // BLOCK)
        gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
        parts = _parts(n, h, nb * BLOCK * (2 * q.shape[3] + v.shape[3]) + nb * nb)
        for part, pointers, columns in zip(parts, lists[: len(parts)], lists[len(parts) :], strict=True):
            part_mask = None if mask is None else mask[part[0]]
            matrices = _Matrices.of(q[part], k[part], v[part], part_mask, lse.dtype)
            selection = Selection(pointers.long(), columns.long())
            results = _differentiate(matrices, selection, ctx.sparse, y[part], of_y[part], lse[part])
            for whole, result in zip(gradients, results, strict=True):
                matrices.put(result, whole[part])
        return *gradients, None, None


def _parts(n: int, h: int, size: int) -> list[tuple[slice, slice]]:
    """Some rows of the batch with all heads, or some heads of a row; ``size``: numbers in the tensors of one matrix."""
    together = max(1, MATRICES // size)
    if together >= h:
        step = together // h if h else 1
        return [(slice(at, at + step), slice(None)) for at in range(0, n, step)]
    return [(slice(i, i + 1), slice(at, at + together)) for i in range(n) for at in range(0, h, together)]


@dataclasses.dataclass(frozen=True, eq=False)
class _Matrices:
    """Queries (with the factor 1 / √d), keys and values of m matrices, blocks of all one after another, zero at padding."""

    q: Tensor  # [m · nb, BLOCK, d]
    k: Tensor
    v: Tensor  # [m · nb, BLOCK, e]
    counts: Tensor  # [m, nb] real tokens
    padding: Tensor | None  # [m · nb, BLOCK] bool; None: all tokens are real
    mask: Tensor | None

    @staticmethod
    def of(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dtype: torch.dtype) -> _Matrices:
        n, h, l, d = q.shape
        nb = -(-l // BLOCK)
        real = None
        if mask is not None or l % BLOCK:
            real = mask if mask is not None else torch.ones(n, l, dtype=torch.bool, device=q.device)
            real = F.pad(real, (0, nb * BLOCK - l)).unsqueeze(1).expand(-1, h, -1).reshape(n * h * nb, BLOCK)
        if real is None:
            counts = torch.full((n * h, nb), BLOCK, device=q.device)
        else:
            counts = real.sum(1).view(n * h, nb)
        parts = [_in_blocks(x, mask, dtype) for x in (q, k, v)]
        parts[0].mul_(d**-0.5)
        return _Matrices(*parts, counts, None if real is None else ~real, mask)

    def select(self, options: Options) -> Selection:
        return Selection.of(
            low_resolution_logits(self.mean(self.q), self.mean(self.k)), self.counts, options.budget,
            first_blocks=options.first_blocks, diagonal_blocks=options.diagonal_blocks,
        )  # fmt: skip

    def mean(self, x: Tensor) -> Tensor:
        """[m · nb, BLOCK, d] → [m, nb, d] float64"""
        return block_means(x.unflatten(0, self.counts.shape), self.counts)

    def spread(self, gradient: Tensor) -> Tensor:
        """Of block means, [m, nb, d] → of every token of the blocks, [m · nb, 1, d]."""
        return (gradient / (self.counts + EPSILON).unsqueeze(2)).flatten(0, 1).unsqueeze(1)

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
    maximum: Tensor  # r [m · nb, 1], −inf where a row has none
    sums: Tensor  # of A, [m · nb, 1]
    values: Tensor  # A v̂ [m · nb, 1, e]

    @staticmethod
    def of(matrices: _Matrices, selection: Selection) -> _Coarse:
        q, k, v = (matrices.mean(x) for x in (matrices.q, matrices.k, matrices.v))
        logits = low_resolution_logits(q, k).to(matrices.q.dtype)
        logits.flatten(1).scatter_(1, selection.indices, -torch.inf)
        logits.masked_fill_((matrices.counts == 0).unsqueeze(1), -torch.inf)
        maximum = logits.amax(2, keepdim=True)
        weights = logits.sub_(maximum.masked_fill(maximum == -torch.inf, 0)).exp_().mul_(matrices.counts.unsqueeze(1))
        q, k, v = (x.to(weights.dtype) for x in (q, k, v))
        values = (weights @ v).flatten(0, 1).unsqueeze(1)
        return _Coarse((q, k, v), weights, maximum.flatten(0, 1), weights.sum(2).view(-1, 1), values)


class _Piece(NamedTuple):
    """r rows with c selected blocks each; rows and columns are numbered through all matrices."""

    rows: Tensor  # [r]
    columns: Tensor  # [r · c]
    number: int  # c

    def keys(self, x: Tensor) -> Tensor:
        """[m · nb, BLOCK, ...] → those of the selected blocks, [r, c · BLOCK, ...]"""
        return x.index_select(0, self.columns).view(len(self.rows), self.number * BLOCK, *x.shape[2:])

    def scores(self, matrices: _Matrices, q: Tensor, k: Tensor) -> Tensor:
        """q: [r, BLOCK, d]; k: [r, c · BLOCK, d] → [r, BLOCK, c · BLOCK], −inf at padding."""
        scores = q @ k.mT
        if matrices.padding is not None:
            scores.masked_fill_(self.keys(matrices.padding).unsqueeze(1), -torch.inf)
        return scores


def _pieces(selection: Selection, features: int) -> Iterator[_Piece]:
    """All rows that have selected blocks; ``features``: of a key and its value."""
    counts, (m, nb) = selection.counts.flatten(), selection.counts.shape
    starts = (
        selection.pointers[:, :-1] + torch.arange(m, device=counts.device).unsqueeze(1) * selection.columns.shape[1]
    )
    first = torch.arange(m, device=counts.device).unsqueeze(1) * nb
    starts, columns = starts.flatten(), (selection.columns + first).flatten()
    counts, order = counts.sort(descending=True, stable=True)
    numbers, sizes = (x.tolist() for x in counts.unique_consecutive(return_counts=True))
    for c, rows in zip(numbers, order.split(sizes), strict=True):
        if not c:
            continue
        within = torch.arange(c, device=rows.device)
        for some in rows.split(max(1, PIECE // (c * BLOCK * (features + 2 * BLOCK)))):
            yield _Piece(some, columns[(starts[some].unsqueeze(1) + within).flatten()], c)


def _attend(matrices: _Matrices, selection: Selection, sparse: bool, out: Tensor, lse: Tensor | None) -> None:
    """To out [n, h, l, e] and lse [n, h, nb · BLOCK]."""
    q, k, v = matrices.q, matrices.k, matrices.v
    y, log_sum = torch.zeros_like(v), q.new_zeros(q.shape[:2])
    coarse = None if sparse else _Coarse.of(matrices, selection)
    if coarse is not None:  # right for rows without selected blocks; the others are overwritten
        y.copy_(coarse.values / (coarse.sums + EPSILON).unsqueeze(2))
        log_sum.copy_(coarse.maximum.masked_fill(coarse.maximum == -torch.inf, 0) + (coarse.sums + EPSILON).log())
    for piece in _pieces(selection, q.shape[2] + v.shape[2]):
        weights = piece.scores(matrices, q[piece.rows], piece.keys(k))
        maximum = weights.amax(2)
        if coarse is not None:
            maximum = torch.maximum(maximum, coarse.maximum[piece.rows])
        maximum.masked_fill_(maximum == -torch.inf, 0)  # neither a real key nor a block
        sums = weights.sub_(maximum.unsqueeze(2)).exp_().sum(2)
        values = weights @ piece.keys(v)
        if coarse is not None:
            share = (coarse.maximum[piece.rows] - maximum).exp_()
            sums += share * coarse.sums[piece.rows]
            values += share.unsqueeze(2) * coarse.values[piece.rows]
        sums += EPSILON
        y[piece.rows] = values.div_(sums.unsqueeze(2))
        if lse is not None:
            log_sum[piece.rows] = sums.log_().add_(maximum)
    matrices.put(y, out)
    if lse is not None:
        lse.copy_(log_sum.view(lse.shape))


def _differentiate(
    matrices: _Matrices, selection: Selection, sparse: bool, y: Tensor, of_y: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """y, of_y: [n, h, l, e]; lse: [n, h, nb · BLOCK] → gradients of q, k, v [m · nb, BLOCK, d or e]."""
    q, k, v = matrices.q, matrices.k, matrices.v
    of_y, lse = matrices.take(of_y), lse.reshape(-1, BLOCK)
    delta = (of_y * matrices.take(y)).sum(2)  # [m · nb, BLOCK]
    of_q, given = torch.zeros_like(q), _Given.of(k, v, selection)
    for piece in _pieces(selection, q.shape[2] + v.shape[2]):
        of_rows, rows, keys = of_y[piece.rows], q[piece.rows], piece.keys(k)
        weights = piece.scores(matrices, rows, keys).sub_(lse[piece.rows].unsqueeze(2)).exp_()
        of_scores = (of_rows @ piece.keys(v).mT).sub_(delta[piece.rows].unsqueeze(2)).mul_(weights)
        of_q[piece.rows] = of_scores @ keys
        given.add(piece, of_scores, rows, weights, of_rows)
    given.flush()
    gradients = (of_q, *given.totals)
    if not sparse:
        of_means = _differentiate_coarse(_Coarse.of(matrices, selection), of_y, delta, lse)
        for gradient, of_mean in zip(gradients, of_means, strict=True):
            gradient += matrices.spread(of_mean)
    of_q.mul_(q.shape[2] ** -0.5)
    return gradients


def _differentiate_coarse(coarse: _Coarse, of_y: Tensor, delta: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """of_y: [m · nb, BLOCK, e]; delta (of_y · y), lse: [m · nb, BLOCK] → gradients of q̂, k̂ and v̂."""
    (q, k, v), weights = coarse.means, coarse.weights
    share = (coarse.maximum - lse).exp_()
    of_values = (share.unsqueeze(1) @ of_y).view(v.shape)  # of A v̂
    of_sums = (share * delta).sum(1).view(*v.shape[:2], 1)
    of_logits = (of_values @ v.mT).sub_(of_sums).mul_(weights)
    return of_logits @ k, of_logits.mT @ q, weights.mT @ of_values


@dataclasses.dataclass(eq=False)
class _Given:
    """Sums over rows of what selected blocks give to their keys and values, as many blocks at a time as there is room."""

    totals: tuple[Tensor, Tensor]  # [m · nb, BLOCK, d], [m · nb, BLOCK, e]
    room: tuple[Tensor, Tensor]  # [room, BLOCK, d], [room, BLOCK, e]
    columns: Tensor  # [room]
    used: int = 0

    @staticmethod
    def of(k: Tensor, v: Tensor, selection: Selection) -> _Given:
        nb = selection.counts.shape[1]
        room = min(selection.columns.numel(), max(GIVEN // (BLOCK * (k.shape[2] + v.shape[2])), nb))
        return _Given(
            (torch.zeros_like(k), torch.zeros_like(v)),
            (k.new_empty(room, *k.shape[1:]), v.new_empty(room, *v.shape[1:])),
            selection.columns.new_empty(room),
        )

    def add(self, piece: _Piece, of_scores: Tensor, rows: Tensor, weights: Tensor, of_rows: Tensor) -> None:
        if self.used + len(piece.columns) > len(self.columns):
            self.flush()
        at, shape = slice(self.used, self.used + len(piece.columns)), (len(piece.rows), piece.number * BLOCK, -1)
        self.columns[at] = piece.columns
        torch.bmm(of_scores.mT, rows, out=self.room[0][at].view(shape))
        torch.bmm(weights.mT, of_rows, out=self.room[1][at].view(shape))
        self.used = at.stop

    def flush(self) -> None:
        order, starts = by_column(self.columns[: self.used], len(self.totals[0]))
        for total, given in zip(self.totals, self.room, strict=True):
            # A sum for each column in the order of the list, unlike index_add on a GPU.
            total += F.embedding_bag(order, given.flatten(1), starts, mode="sum").view_as(total)
        self.used = 0
