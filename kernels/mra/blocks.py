"""MRA-2 attention by lists of selected blocks, in plain PyTorch: nothing of length × length is made.

Rows (of blocks) with the same number of selected blocks are worked on together: the blocks' keys are gathered, and all
is batched matrix products.  The backward pass computes the weights again from the log-sum-exp.  What blocks give to
their keys and values is summed column by column in the order of the lists, so that every run gives the same bits.

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

from .selection import BLOCK, EPSILON, Options, Selection, block_means, by_column, low_resolution_logits

# Numbers that selected blocks give to keys and values, of the matrices worked on at once: memory is bounded whatever
# the number of heads.  And numbers in the tensors of a piece of rows, which should stay in the cache.
GIVEN, PIECE = 1 << 23, 1 << 20


def blocks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Options) -> Tensor:
    """As ``mra_attention``; keeps q, k, v, the result, its log-sum-exp and the lists for the backward pass."""
    return _Blocks.apply(q, k, v, mask, options)  # type: ignore[no-any-return]


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Options) -> Tensor:
        n, h, l, _ = q.shape
        dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), torch.promote_types(v.dtype, torch.float32))
        y = torch.empty(v.shape, dtype=q.dtype, device=q.device)
        keep = any(ctx.needs_input_grad)
        lse = y.new_empty(n, h, -(-l // BLOCK) * BLOCK, dtype=dtype) if keep else None
        lists = []
        for part in _parts(q, v, options):
            matrices = _Matrices.of(q[part], k[part], v[part], None if mask is None else mask[part[0]], dtype)
            means = matrices.means()
            selection = Selection.of(low_resolution_logits(means[0], means[1]), matrices.counts, options)
            coarse = None if options.sparse else _Coarse.of(matrices, selection, means)
            of_part, lse_of_part = _attend(matrices, selection, coarse)
            matrices.put(of_part, y[part])
            if lse is not None:
                lse[part] = lse_of_part.view_as(lse[part])
                lists += [selection.pointers.int(), selection.columns.int()]
        if keep:
            ctx.save_for_backward(q, k, v, mask, y, lse, *lists)
            ctx.options = options
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, mask, y, lse, *lists = ctx.saved_tensors
        gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
        given = None
        for i, part in enumerate(_parts(q, v, ctx.options)):
            matrices = _Matrices.of(q[part], k[part], v[part], None if mask is None else mask[part[0]], lse.dtype)
            selection = Selection(lists[2 * i].long(), lists[2 * i + 1].long())
            coarse = None if ctx.options.sparse else _Coarse.of(matrices, selection, matrices.means())
            given = given or _Given.of(matrices, selection)
            of_part, y_of_part = matrices.take(of_y[part]), matrices.take(y[part])
            results = _differentiate(matrices, selection, coarse, given, y_of_part, of_part, lse[part])
            for whole, result in zip(gradients, results, strict=True):
                matrices.put(result, whole[part])
        return *gradients, None, None


def _parts(q: Tensor, v: Tensor, options: Options) -> list[tuple[slice, slice]]:
    """What is worked on at once: some rows of the batch with all heads, or some heads of a row."""
    n, h, _, d = q.shape
    together = max(1, GIVEN // (options.budget * BLOCK * (d + v.shape[3])))
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
    """r rows with c selected blocks each, c > 0."""

    rows: slice  # of ``_Rows.order``
    columns: Tensor  # [r · c] through all matrices
    number: int  # c

    def keys(self, x: Tensor) -> Tensor:
        """[m · nb, BLOCK, ...] → those of the selected blocks, [r, c · BLOCK, ...]"""
        return x.index_select(0, self.columns).view(-1, self.number * BLOCK, *x.shape[2:])

    def scores(self, q: Tensor, k: Tensor, padding: Tensor | None) -> Tensor:
        """q: [r, BLOCK, d]; k: [r, c · BLOCK, d] → [r, BLOCK, c · BLOCK], −inf at padding."""
        scores = q @ k.mT
        if padding is not None:
            scores.masked_fill_(self.keys(padding).unsqueeze(1), -torch.inf)
        return scores


class _Rows(NamedTuple):
    """The rows of blocks of m matrices, those with most selected blocks first."""

    order: Tensor  # [m · nb]
    pieces: list[_Piece]

    @staticmethod
    def of(selection: Selection, features: int) -> _Rows:
        """features: of a key and its value."""
        counts, starts = selection.counts, selection.pointers[:, :-1]
        m, nb = counts.shape
        matrix = torch.arange(m, device=counts.device).unsqueeze(1)
        starts = (starts + matrix * selection.columns.shape[1]).flatten()
        columns = (selection.columns + matrix * nb).flatten()
        counts, order = counts.flatten().sort(descending=True, stable=True)
        pieces, at = [], 0
        for c, r in zip(*(x.tolist() for x in counts.unique_consecutive(return_counts=True)), strict=True):
            within = torch.arange(c, device=counts.device)
            for some in order[at : at + r].split(max(1, PIECE // (c * BLOCK * (features + 2 * BLOCK)))) if c else ():
                rows = slice(at, at + len(some))
                pieces.append(_Piece(rows, columns[(starts[some].unsqueeze(1) + within).flatten()], c))
                at = rows.stop
        return _Rows(order, pieces)

    def gather(self, *tensors: Tensor) -> list[Tensor]:
        """[m · nb, ...] in the order of the rows."""
        return [x.index_select(0, self.order) for x in tensors]

    def scatter(self, x: Tensor) -> Tensor:
        return torch.empty_like(x).index_copy_(0, self.order, x)


def _attend(matrices: _Matrices, selection: Selection, coarse: _Coarse | None) -> tuple[Tensor, Tensor]:
    """Returns y [m · nb, BLOCK, e] and its log-sum-exp [m · nb, BLOCK]."""
    v, e = matrices.v, matrices.v.shape[2]
    rows = _Rows.of(selection, matrices.q.shape[2] + e)
    if coarse is None:
        (q,) = rows.gather(matrices.q)
        highest, rest, rest_values = (
            q.new_full((len(q), 1), -torch.inf),
            q.new_zeros(len(q), 1),
            v.new_zeros(len(q), 1, e),
        )
    else:
        q, highest, rest, rest_values = rows.gather(matrices.q, coarse.maximum, coarse.sums, coarse.values)
    y, maximum, sums = torch.zeros_like(v), highest.repeat(1, BLOCK), torch.zeros_like(q[..., 0])
    for at, piece in ((piece.rows, piece) for piece in rows.pieces):
        weights = piece.scores(q[at], piece.keys(matrices.k), matrices.padding)
        torch.maximum(weights.amax(2), highest[at], out=maximum[at])
        c = maximum[at].masked_fill(maximum[at] == -torch.inf, 0)  # neither a real key nor a block
        torch.sum(weights.sub_(c.unsqueeze(2)).exp_(), 2, out=sums[at])
        torch.bmm(weights, piece.keys(v), out=y[at])
    maximum.masked_fill_(maximum == -torch.inf, 0)
    share = (highest - maximum).exp_()
    sums.addcmul_(share, rest).add_(EPSILON)
    y.addcmul_(share.unsqueeze(2), rest_values).div_(sums.unsqueeze(2))
    return rows.scatter(y), rows.scatter(maximum.add_(sums.log_()))


def _differentiate(
    matrices: _Matrices,
    selection: Selection,
    coarse: _Coarse | None,
    given: _Given,
    y: Tensor,
    of_y: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, of_y: [m · nb, BLOCK, e]; lse: m · nb · BLOCK → gradients of q, k, v [m · nb, BLOCK, d or e]."""
    k, v, d = matrices.k, matrices.v, matrices.q.shape[2]
    lse, delta = lse.reshape(-1, BLOCK, 1), (of_y * y).sum(2, keepdim=True)
    rows = _Rows.of(selection, d + v.shape[2])
    q, of_rows, lse_rows, delta_rows = rows.gather(matrices.q, of_y, lse, delta)
    of_q, of_k, of_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for at, piece in ((piece.rows, piece) for piece in rows.pieces):
        keys = piece.keys(k)
        weights = piece.scores(q[at], keys, matrices.padding).sub_(lse_rows[at]).exp_()
        of_scores = (of_rows[at] @ piece.keys(v).mT).sub_(delta_rows[at]).mul_(weights)
        torch.bmm(of_scores, keys, out=of_q[at])
        if not given.fits(piece):
            given.empty_to(of_k, of_v)
        given.add(piece, (of_scores, q[at]), (weights, of_rows[at]))
    given.empty_to(of_k, of_v)
    gradients = rows.scatter(of_q), of_k, of_v
    if coarse is not None:
        size = (matrices.counts.double() + EPSILON).to(q.dtype).unsqueeze(2)
        for gradient, of_mean in zip(gradients, _differentiate_coarse(coarse, of_y, delta, lse), strict=True):
            gradient += (of_mean / size).flatten(0, 1).unsqueeze(1)
    gradients[0].mul_(d**-0.5)
    return gradients


def _differentiate_coarse(coarse: _Coarse, of_y: Tensor, delta: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """of_y: [m · nb, BLOCK, e]; delta (of_y · y), lse: [m · nb, BLOCK, 1] → gradients of q̂, k̂ and v̂."""
    (q, k, v), weights = coarse.means, coarse.weights
    share = (coarse.maximum.unsqueeze(2) - lse).exp_()
    of_values = (share.mT @ of_y).view(v.shape)  # of A v̂
    of_sums = -(share * delta).sum(1).view(*v.shape[:2], 1)
    of_logits = (of_values @ v.mT).add_(of_sums).mul_(weights)
    return of_logits @ k, of_logits.mT @ q, weights.mT @ of_values


@dataclasses.dataclass(eq=False)
class _Given:
    """What selected blocks give to their keys and values, as long as there is room."""

    to_keys: Tensor  # [room, BLOCK, d]
    to_values: Tensor  # [room, BLOCK, e]
    columns: Tensor  # [room]
    used: int = 0

    @staticmethod
    def of(matrices: _Matrices, selection: Selection) -> _Given:
        k, v = matrices.k, matrices.v
        pieces = max(GIVEN, PIECE) // (BLOCK * (k.shape[2] + v.shape[2]))
        room = min(selection.columns.numel(), max(pieces, selection.counts.shape[1]))
        columns = selection.columns.new_empty(room)
        return _Given(k.new_empty(room, *k.shape[1:]), v.new_empty(room, *v.shape[1:]), columns)

    def fits(self, piece: _Piece) -> bool:
        return self.used + len(piece.columns) <= len(self.columns)

    def add(self, piece: _Piece, to_keys: tuple[Tensor, Tensor], to_values: tuple[Tensor, Tensor]) -> None:
        """Products of [r, BLOCK, c · BLOCK], transposed, with [r, BLOCK, d or e]."""
        at = slice(self.used, self.used + len(piece.columns))
        self.columns[at] = piece.columns
        for room, (left, right) in ((self.to_keys, to_keys), (self.to_values, to_values)):
            torch.bmm(left.mT, right, out=room[at].view(len(right), piece.number * BLOCK, -1))
        self.used = at.stop

    def empty_to(self, of_k: Tensor, of_v: Tensor) -> None:
        """Adds it all to [m · nb, BLOCK, d] and [m · nb, BLOCK, e]."""
        order, starts = by_column(self.columns[: self.used], len(of_k))
        for total, room in ((of_k, self.to_keys), (of_v, self.to_values)):
            # Column by column in the order of the list, where index_add would add in any order on a GPU.
            total += F.embedding_bag(order, room.flatten(1), starts, mode="sum").view_as(total)
        self.used = 0
