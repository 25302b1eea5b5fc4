"""Cross-entropy of a linear layer over a shard of the vocabulary, a tile of logits at a time.

Forward, every tile is folded into four numbers a row (the online softmax of arXiv 1805.02867).  Backward, its logits
are computed again, unless they were kept, and turned into their gradient, from which the three gradients are products.
No step waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pointwise import Statistics, turn_into_gradient, update_statistics
from .tiles import Tile, Tiling, kept_numbers, start_of


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, first: int, entries: int, *, keep: bool
) -> tuple[Statistics, Tensor]:
    """x: [n, h]; weight: [v, h], its first ``entries`` rows entry ``first``, ... of the vocabulary, the others padding;
    bias: [v]; labels: [n] int64 of the whole vocabulary.  Returns statistics and the logits that were kept (or [0])."""
    statistics = Statistics.of_nothing(len(x), x.dtype, x.device)
    kept = x.new_empty(kept_numbers(len(x), entries, x.dtype, x.device) if keep else 0)
    tiling = Tiling.of(len(x), entries, len(weight), x.dtype, x.device)
    buffer = None if len(kept) else tiling.buffer(x)
    for tiles in tiling.column_tiles():
        for tile in tiles:
            logits = tiling.part_of(kept, tile) if buffer is None else start_of(buffer, tile)
            _multiply(x, weight, bias, tile, logits)
            column = first + tile.first_column
            update_statistics(logits, tile.real, column, labels[tile.rows], statistics.rows(tile.rows))
    return statistics, kept


def backward(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, first: int, entries: int,
    statistics: Statistics, upstream: Tensor, kept: Tensor, needed: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``statistics``: over the whole vocabulary; ``upstream``: [n] of its dtype; ``needed``: which of the gradients of
    x, weight and bias (over this shard) are; for the others [0] is returned."""
    need_x, need_weight, need_bias = needed
    tiling = Tiling.of(len(x), entries, len(weight), x.dtype, x.device)
    wide = statistics.maximum.dtype
    of_x = torch.empty_like(x, dtype=wide) if need_x else x.new_empty(0)
    of_weight = torch.empty_like(weight) if need_weight else x.new_empty(0)
    of_bias = x.new_zeros(len(weight), dtype=wide) if need_bias else x.new_empty(0)
    if not len(x) or not entries:
        of_x.zero_()
    of_weight[entries if len(x) else 0 :] = 0
    buffer = tiling.buffer(x)
    for tiles in tiling.column_tiles():
        # The gradient of the weight is a sum over tiles of rows; of one there is nothing to add.
        wide_sum = need_weight and len(tiles) > 1 and weight.dtype != wide
        for tile in tiles:
            gradient = start_of(buffer, tile)
            if len(kept):
                logits = tiling.part_of(kept, tile)
            else:
                logits = gradient
                _multiply(x, weight, bias, tile, logits)
            rows, column = tile.rows, first + tile.first_column
            sums = turn_into_gradient(
                logits, tile.real, column, labels[rows], statistics.rows(rows), upstream[rows], gradient
            )
            gradient = gradient[:, : tile.width]
            if need_bias:
                of_bias[tile.first_column : tile.first_column + tile.real] += sums
            if need_x:
                _add_product(of_x[rows], gradient, weight[tile.columns], to_nothing=tile.first_column == 0)
            if need_weight:
                if tile.first_row == 0:
                    total = of_weight[tile.columns]
                    total = torch.empty_like(total, dtype=wide) if wide_sum else total
                _add_product(total, gradient.t(), x[rows], to_nothing=tile.first_row == 0)
        if wide_sum:
            of_weight[tiles[0].columns] = total
    return of_x.to(x.dtype), of_weight, of_bias if bias is None else of_bias.to(bias.dtype)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, tile: Tile, out: Tensor) -> None:
    x, weight, out = x[tile.rows], weight[tile.columns], out[:, : tile.width]
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias[tile.columns], x, weight.t(), out=out)


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, to_nothing: bool) -> None:
    """total += a b, in total's dtype, which may be wider; ``to_nothing``: whatever total was, it becomes a b."""
    if total.dtype == a.dtype:
        torch.mm(a, b, out=total) if to_nothing else total.addmm_(a, b)
    elif total.is_cuda:
        if to_nothing:
            torch.mm(a, b, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        product = torch.mm(a, b)
        total.copy_(product) if to_nothing else total.add_(product)
