"""MRA (multi resolution analysis attention, arXiv 2207.10284) for Hugging Face transformers.

This file, `modeling_encoder.py` and `configuration_mra.py` beside it travel with the weights and need only torch and
transformers (4.37 and later, 5 included). Tensor names are those of transformers' MRA classes. What differs from them:

- it runs on every device, with heads and rows of any size;
- rows of unequal padding do not exchange their masks;
- the number of blocks computed exactly follows from the row's length, not from `max_position_embeddings`;
- a block at the threshold of the choice is either computed exactly or approximated, never dropped.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration_mra import MraConfig
from .modeling_encoder import (
    EncoderForMaskedLM,
    EncoderForMultipleChoice,
    EncoderForQuestionAnswering,
    EncoderForSequenceClassification,
    EncoderForTokenClassification,
    EncoderModel,
    EncoderPreTrainedModel,
    EncoderSelfAttention,
    tied,
)

BLOCK = 32
SMALL = 1e-6  # added to what is divided by
PRIOR, EMPTY = 5e3, 1e4  # what blocks that come before others have more, and blocks without real tokens less


def take(x: Tensor, block: Tensor) -> Tensor:
    """Blocks of x: [M, n, …] by their numbers in all matrices, block: [M, s] → [M, s, …]."""
    # Unlike x[…], the sums in its gradient have one order on a CPU, as have the sums below.
    return x.flatten(0, 1).index_select(0, block.flatten()).unflatten(0, block.shape)


def add_up(x: Tensor, block: Tensor, n: int) -> Tensor:
    """x: [M, s, …] added up by their blocks' numbers in all matrices, block: [M, s] → [M, n, …]."""
    total = x.new_zeros(len(x) * n, *x.shape[2:])
    return total.index_add(0, block.flatten(), x.flatten(0, 1)).unflatten(0, (-1, n))


def finite(top: Tensor) -> Tensor:
    """A maximum to subtract: 0 where it is one of nothing."""
    return top.masked_fill(top == -torch.inf, 0.0)


class MraSelfAttention(EncoderSelfAttention):
    """The best blocks of the attention matrix exactly, the others by the means of their queries, keys and values."""

    def __init__(self, config: MraConfig) -> None:
        super().__init__(config)
        self.block_per_row = config.block_per_row
        self.sparse = config.approx_mode == "sparse"
        self.first = config.initial_prior_first_n_blocks
        self.diagonal = config.initial_prior_diagonal_n_blocks

    def attend(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        """Zeros at padding."""
        if self.padding_counts:
            return self._attend(q, k, v, real)
        # The real tokens of a row moved together are a row without padding: those of one length at a time.
        y = torch.zeros_like(v)
        lengths = real.sum(1)
        for length in lengths[lengths > 0].unique().tolist():
            rows = (lengths == length).nonzero()  # [rows, 1]
            tokens = real[rows[:, 0]].nonzero()[:, 1].view(-1, length)
            y[rows, tokens] = self._attend(q[rows, tokens], k[rows, tokens], v[rows, tokens], torch.ones_like(tokens))
        return y

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        """q, k, v: [B, L, H, d]; real: [B, L] → [B, L, H, d].

        Below, M = B·H matrices of attention, each of n·n blocks, s of them selected.
        """
        rows, length, heads, features = q.shape
        n = -(-length // BLOCK)
        scale = features**-0.5
        real = F.pad(real.to(q.dtype), (0, n * BLOCK - length)).repeat_interleave(heads, 0).unflatten(1, (n, BLOCK))
        q, k, v = (self._blocks(x, n) * real[..., None] for x in (q, k, v))  # [M, n, BLOCK, d]

        # Low resolution: means of blocks' real tokens. Like the choice they are in float64 where there is one: no
        # rounding decides between two close blocks.
        wide = torch.float32 if q.device.type == "mps" else torch.float64
        count = real.sum(2, dtype=wide)  # [M, n]
        q_mean, k_mean, v_mean = (x.sum(2, dtype=wide) / (count + SMALL)[..., None] for x in (q, k, v))
        low = scale * q_mean @ k_mean.mT  # [M, n, n]
        selected = self._select(low.detach(), count)  # [M, s]
        low, count, v_mean = low.to(q.dtype), count.to(q.dtype), v_mean.to(q.dtype)
        chosen = torch.zeros_like(low, dtype=torch.bool).flatten(1).scatter(1, selected, True).view_as(low)
        low = low.masked_fill(chosen | (count[:, None] == 0) | self.sparse, -torch.inf)
        low_top = low.detach().amax(2, keepdim=True)  # [M, n, 1]

        # High resolution: the selected blocks. From here they are numbered through all matrices.
        number = n * torch.arange(len(q), device=q.device)[:, None]
        block, other = number + selected // n, number + selected % n  # [M, s]: of the queries, of the keys
        scores = scale * take(q, block) @ take(k, other).mT  # [M, s, BLOCK, BLOCK]
        scores = scores.masked_fill(take(real, other)[:, :, None] == 0, -torch.inf)
        top = self._highest(scores.detach().amax(3), block, low_top)  # [M, n, BLOCK], where both parts start from
        powers = torch.exp(scores - take(top, block)[..., None])
        values = add_up(powers @ take(v, other), block, n)  # [M, n, BLOCK, d]
        weights = add_up(powers.sum(3), block, n)  # [M, n, BLOCK]

        # Low resolution again: a mean stands for as many tokens as it is of.
        powers = count[:, None] * torch.exp(low - finite(low_top))  # [M, n, n]
        factor = torch.exp(low_top - top)  # [M, n, BLOCK]
        values = values + factor[..., None] * (powers @ v_mean)[:, :, None]
        weights = weights + factor * powers.sum(2, keepdim=True)

        y = values / (weights + SMALL)[..., None] * real[..., None]
        return y.flatten(1, 2).unflatten(0, (rows, heads))[:, :, :length].transpose(1, 2)

    @staticmethod
    def _blocks(x: Tensor, n: int) -> Tensor:
        """[B, L, H, d] → [B·H, n, BLOCK, d], filled up with zeros."""
        x = x.transpose(1, 2).flatten(0, 1)
        return F.pad(x, (0, 0, 0, n * BLOCK - x.shape[1])).unflatten(1, (n, BLOCK))

    def _select(self, low: Tensor, count: Tensor) -> Tensor:
        """Numbers of each matrix's blocks with the highest scores, of equal ones the first: [M, s]."""
        n = low.shape[1]
        at = torch.arange(n, device=low.device)
        scores = low - low.amax(2, keepdim=True)
        scores = scores - EMPTY * ((count[:, :, None] == 0) | (count[:, None] == 0))
        if self.diagonal:
            scores = scores + PRIOR * ((at[:, None] - at).abs() <= self.diagonal // 2)
        scores = scores + PRIOR * (at < self.first)[:, None] + PRIOR * (at < self.first)
        order = scores.flatten(1).sort(dim=1, descending=True, stable=True).indices
        return order[:, : min(n * self.block_per_row, n * n)]

    @staticmethod
    def _highest(scores: Tensor, block: Tensor, lowest: Tensor) -> Tensor:
        """The highest of each query's scores [M, s, BLOCK] in its blocks [M, s], and not below `lowest` [M, n, 1]."""
        start = lowest.flatten(0, 1).repeat(1, BLOCK)
        index = block.flatten()[:, None].expand(-1, BLOCK)
        return finite(start.scatter_reduce(0, index, scores.flatten(0, 1), "amax")).unflatten(0, lowest.shape[:2])


class MraPreTrainedModel(EncoderPreTrainedModel):
    """Loading, saving and initial values."""

    config_class = MraConfig
    base_model_prefix = "mra"
    attention_class = MraSelfAttention


class MraModel(MraPreTrainedModel, EncoderModel):
    """MRA without a head."""


class MraForMaskedLM(MraPreTrainedModel, EncoderForMaskedLM):
    """MRA with a masked language modelling head."""

    body_class = MraModel
    _tied_weights_keys = tied("mra")


class MraForSequenceClassification(MraPreTrainedModel, EncoderForSequenceClassification):
    """MRA with a classification or regression head on the first token."""

    body_class = MraModel


class MraForTokenClassification(MraPreTrainedModel, EncoderForTokenClassification):
    """MRA with a classification head on each token."""

    body_class = MraModel


class MraForMultipleChoice(MraPreTrainedModel, EncoderForMultipleChoice):
    """MRA with a score for each of several rows, the choices."""

    body_class = MraModel


class MraForQuestionAnswering(MraPreTrainedModel, EncoderForQuestionAnswering):
    """MRA with a head for the start and the end of an answer in the row."""

    body_class = MraModel
