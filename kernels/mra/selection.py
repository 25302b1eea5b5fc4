"""Which blocks are attended exactly: block means, low-resolution logits, and the highest of the whole matrix.

Shapes: m matrices (a row of the batch and a head each), nb blocks of ``BLOCK`` positions, k selected blocks.
Here everything is float64, and no gradient goes through it: then neither the dtype of the inputs, nor what else is in
the batch, nor the +5000 of a prior (which would leave float32 a resolution of 5e-4) decides between two close blocks.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 32
# Of the released code, and so of models that were trained with it: what real tokens of a block are counted with before
# a division, what an empty block's logits lose, and what blocks under a prior gain.
EPSILON, EMPTY, PRIOR = 1e-6, 1e4, 5e3


class Options(NamedTuple):
    """Those of ``mra_attention``."""

    budget: int  # at most nb²
    sparse: bool
    first_blocks: int
    diagonal_blocks: int


@dataclasses.dataclass(frozen=True, eq=False)
class Selection:
    """The selected blocks of m matrices as lists: compressed rows (CSR), and on demand columns (CSC)."""

    pointers: Tensor  # [m, nb + 1] int64; row i of a matrix has the columns from pointers[i] to pointers[i + 1]
    columns: Tensor  # [m, k] int64, ascending in each row

    @property
    def counts(self) -> Tensor:
        """[m, nb] selected blocks in each row."""
        return self.pointers.diff(dim=1)

    @property
    def indices(self) -> Tensor:
        """[m, k] row · nb + column, ascending."""
        m, nb = self.counts.shape
        rows = torch.arange(nb, device=self.columns.device).repeat(m).repeat_interleave(self.counts.flatten())
        return rows.view(self.columns.shape) * nb + self.columns

    @staticmethod
    def of(logits: Tensor, counts: Tensor, options: Options) -> Selection:
        """The highest scores of each matrix; of equal ones those with the lower row, then the lower column.

        logits: [m, nb, nb] float64 of ``low_resolution_logits``, overwritten; counts: [m, nb] real tokens.
        """
        nb, budget, first = logits.shape[-1], options.budget, options.first_blocks
        scores = logits.sub_(logits.amax(-1, keepdim=True))
        scores.sub_(((counts.unsqueeze(2) == 0) | (counts.unsqueeze(1) == 0)) * EMPTY)
        if options.diagonal_blocks:
            block = torch.arange(nb, device=scores.device)
            scores.add_(((block.unsqueeze(1) - block).abs() <= options.diagonal_blocks // 2) * PRIOR)
        scores[:, :first] += PRIOR
        scores[:, :, :first] += PRIOR
        scores = scores.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).flatten(1)
        if budget >= nb * nb:
            chosen = torch.ones_like(scores, dtype=torch.bool)
        else:
            # Not the indices of topk, which are any of equal ones.
            lowest = scores.topk(budget, sorted=False).values.amin(1, keepdim=True)
            chosen = scores > lowest
            missing = budget - chosen.sum(1, keepdim=True)
            equal = scores == lowest
            chosen |= equal & (equal.cumsum(1, dtype=torch.int32) <= missing)
        chosen = chosen.unflatten(1, (nb, nb))
        ends = chosen.sum(2).cumsum(1)
        pointers = torch.cat((torch.zeros_like(ends[:, :1]), ends), 1)
        return Selection(pointers, chosen.nonzero()[:, 2].view(-1, budget))


def by_column(columns: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Compressed columns of blocks in any order, of ``number`` columns: the place of each block in that order, column
    by column ([blocks] int64), and where each column starts ([number] int64)."""
    order = columns.argsort(stable=True)
    ends = torch.bincount(columns, minlength=number).cumsum(0)
    return order, torch.cat((ends.new_zeros(1), ends[:-1]))


def block_means(x: Tensor, counts: Tensor) -> Tensor:
    """x: [m, nb, BLOCK, d], zero at padding; counts: [m, nb] real tokens → [m, nb, d] float64."""
    return x.sum(2, dtype=torch.float64) / (counts.double() + EPSILON).unsqueeze(2)


def low_resolution_logits(q_mean: Tensor, k_mean: Tensor) -> Tensor:
    """[m, nb, nb]; q_mean includes the factor 1 / √d."""
    return q_mean @ k_mean.mT
