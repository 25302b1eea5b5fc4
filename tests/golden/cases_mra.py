"""The reference cases of MRA (arXiv 2207.10284), its three CUDA operations replaced by plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from golden_case import HOLES, LEFT, NONE, RIGHT, Case, PaddedCase, Padding, Part
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.mra import modeling_mra

BLOCK = 32
# Attention far from uniform, within blocks and between them.
MATRIX_NOISE = 0.12
TABLE_NOISE = 0.4
VECTOR_NOISE = 0.2
# The positions of a block have an offset in common, so that the block means differ: without one they are nearly alike,
# and which blocks are attended exactly would hang on the last digits.
BLOCK_NOISE = 0.5
# The score of the last block chosen is at least this far from the next; float32 keeps 5e-4 of one with a prior (5e3).
SMALLEST_GAP = 5e-3

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 1,
    "num_hidden_layers": 1,
    "intermediate_size": 24,
    "vocab_size": 97,
    "block_per_row": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


class Operations:
    """What the release has CUDA kernels for. Blocks are transposed: [..., head size, 32], and products [key, query].

    ``indices``, [heads of all rows, chosen blocks], number the blocks of the score matrix row by row. None of the
    three is differentiated: the release has its own backward, made of the same three.
    """

    NOTHING_CHOSEN = -1e5  # the maximum in a row of blocks without a chosen one

    @classmethod
    def index_max(cls, values: Tensor, indices: Tensor, query_blocks: int, key_blocks: int) -> tuple[Tensor, Tensor]:
        """The maximum of each query over the chosen blocks of its row, and that of each chosen block's queries.

        From each block's own maxima [n, 32, chosen]: [n, positions] and [n, 32, chosen]. The kernel cuts them to
        thousandths, which cancels out but for the 1e-6 in the denominator; this does not.
        """
        row = (indices.long() // key_blocks)[:, :, None].expand(-1, -1, BLOCK)
        maxima = values.new_full((len(values), query_blocks, BLOCK), cls.NOTHING_CHOSEN)
        maxima = maxima.scatter_reduce(1, row, values.transpose(1, 2), "amax")
        return maxima.flatten(1).detach(), maxima.gather(1, row).transpose(1, 2).detach()

    @staticmethod
    def mm_to_sparse(queries: Tensor, keys: Tensor, indices: Tensor) -> Tensor:
        """The chosen blocks of queries times keys: [n, chosen, 32 keys, 32 queries]."""
        at, index = torch.arange(len(queries))[:, None], indices.long()
        return keys[at, index % keys.size(1)].transpose(-1, -2) @ queries[at, index // keys.size(1)]

    @staticmethod
    def sparse_dense_mm(products: Tensor, indices: Tensor, values: Tensor, query_blocks: int) -> Tensor:
        """Chosen blocks times blocks of values, added up by row: [n, query blocks, head size, 32]."""
        at, index = torch.arange(len(values))[:, None], indices.long()
        parts = values[at, index % values.size(1)] @ products
        sums = values.new_zeros(len(values), query_blocks, *values.shape[2:])
        return sums.index_put((at.expand_as(index), index // values.size(1)), parts, accumulate=True)


def _selection_gap(
    query: Tensor, key: Tensor, mask: Tensor, budget: int, first_blocks: int = 0, diagonal_blocks: int = 0
) -> float:
    """How far the score of the last chosen block is from that of the next, where exchanging them would matter.

    In float64, from the queries and keys [n, positions, head size] and the mask [n, positions].
    """
    query, key, mask = (tensor.detach().double() for tensor in (query, key, mask))
    sums = [(tensor * mask[..., None]).unflatten(1, (-1, BLOCK)).sum(dim=2) for tensor in (query, key)]
    count = mask.unflatten(1, (-1, BLOCK)).sum(dim=-1)
    query_mean, key_mean = (total / (count + 1e-6)[..., None] for total in sums)
    logits = query_mean @ key_mean.transpose(1, 2) / math.sqrt(query.size(-1))
    empty = count[:, :, None] * count[:, None, :] == 0
    score = logits - logits.amax(dim=-1, keepdim=True) - 1e4 * empty
    if diagonal_blocks:
        place = torch.arange(score.size(-1))
        score += 5e3 * ((place[:, None] - place).abs() <= diagonal_blocks // 2)
    score[:, :first_blocks] += 5e3
    score[:, :, :first_blocks] += 5e3
    score, order = score.flatten(1).sort(dim=-1, descending=True)
    if budget == score.size(1):
        return math.inf
    # Blocks without a real query or key add nothing, chosen or not: only exchanging two of them does not matter.
    empty = empty.flatten(1).gather(1, order)
    last_chosen = score[:, :budget].masked_fill(empty[:, :budget], math.inf).amin(dim=1) - score[:, budget]
    best_left = score[:, budget - 1] - score[:, budget:].masked_fill(empty[:, budget:], -math.inf).amax(dim=1)
    return torch.minimum(last_chosen, best_left).min().item()


_attention = modeling_mra.mra2_attention
_gaps: list[float] = []  # of the layers of the last call


def _attention_in_order(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, budget: int, **options: Any) -> Tensor:
    """The release's attention, with the mask's rows in the order of the queries' (the release has the batch inside)."""
    batch, heads = query.shape[:2]
    mask = mask.unflatten(0, (heads, batch)).transpose(0, 1).flatten(0, 1)
    priors = [options[f"initial_prior_{kind}_n_blocks"] for kind in ("first", "diagonal")]
    _gaps.append(_selection_gap(query.flatten(0, 1), key.flatten(0, 1), mask, budget, *priors))
    return _attention(query, key, value, mask, budget, **options)


modeling_mra.mra_cuda_kernel = Operations
modeling_mra.mra2_attention = _attention_in_order


@dataclass(frozen=True)
class MraCase(PaddedCase):
    """A case of MRA. Rows have all the blocks of the table of positions, from which the release takes its budget."""

    def make_model(self, seed: int) -> PreTrainedModel:
        config = self.make_config({**SMALL, "max_position_embeddings": self.length})
        torch.manual_seed(seed)
        model = getattr(transformers, self.model_class)(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = MATRIX_NOISE if parameter.dim() > 1 else VECTOR_NOISE
                if "embeddings.weight" in name:
                    noise = TABLE_NOISE
                parameter.add_(noise * torch.randn(parameter.shape))
            positions = model.mra.embeddings.position_embeddings.weight
            offsets = BLOCK_NOISE * torch.randn(self.length // BLOCK, config.hidden_size)
            positions[2 : 2 + self.length].add_(offsets.repeat_interleave(BLOCK, dim=0))
            if not config.tie_word_embeddings:
                # Two parameters in this release, of which it reads the other; one in older ones.
                model.cls.predictions.bias.copy_(model.cls.predictions.decoder.bias)
        return model.eval()

    def parts(self, model: PreTrainedModel) -> Iterator[Part]:
        config = model.config
        # Exact attention does not see what is the same for all keys, but the means of blocks do: a query's score with
        # a mean is that of its own block's mean.
        exact = config.approx_mode == "sparse" or config.block_per_row >= self.length // BLOCK
        for name, parameter in model.named_parameters():
            unread = not config.tie_word_embeddings and name == "cls.predictions.bias"
            yield Part(name, parameter.data, shows=not (unread or (exact and name.endswith("key.bias"))))

    @contextmanager
    def exactly(self) -> Iterator[None]:
        """The release casts to float32 on the way."""
        kept = Tensor.float
        Tensor.float = Tensor.double  # type: ignore[method-assign]
        try:
            yield
        finally:
            Tensor.float = kept  # type: ignore[method-assign]

    def forget(self, model: PreTrainedModel) -> None:
        _gaps.clear()

    def remark(self) -> str:
        gap = min(_gaps)
        if gap < SMALLEST_GAP:
            raise AssertionError(f"the choice of blocks hangs on a difference of {gap:.1e}: change the draw")
        return f", selection gap {gap:.1e}"

    def notes(self) -> dict[str, str]:
        order = "" if self.config.get("num_attention_heads", 1) == 1 else "; mask rows in the order of the queries'"
        return {"patched": f"index_max, mm_to_sparse and sparse_dense_mm in plain PyTorch{order}"}


def _mlm(
    length: int, padding: Padding = NONE, batch: int = 2, types: bool = False, draw: int = 0, **config: Any
) -> Case:
    return MraCase("MraForMaskedLM", config, length, padding, batch, types, draw=draw)


def _heads(number: int, size: int = 32) -> dict[str, Any]:
    return {"num_attention_heads": number, "hidden_size": number * size}


def _priors(first: int = 0, diagonal: int = 0) -> dict[str, Any]:
    return {"initial_prior_first_n_blocks": first, "initial_prior_diagonal_n_blocks": diagonal}


SPARSE = {"approx_mode": "sparse"}
UNTIED = {"tie_word_embeddings": False}

CASES: dict[str, Case] = {
    "mra-mlm-one-block-per-row": _mlm(128, draw=1, block_per_row=1, hidden_act="relu"),
    "mra-mlm-four-blocks-per-row": _mlm(192, RIGHT, draw=1, block_per_row=4, type_vocab_size=2),
    "mra-mlm-every-block": _mlm(96, HOLES, 3, block_per_row=4, hidden_act="gelu_new"),
    "mra-mlm-one-block": _mlm(32, RIGHT, 3, block_per_row=4),
    "mra-mlm-256": _mlm(256, ((0, 0.77, 1),), 1, draw=4, block_per_row=3),
    "mra-mlm-512": _mlm(512, batch=1, draw=20, block_per_row=4, layer_norm_eps=1e-12),
    "mra-mlm-right": _mlm(96, RIGHT, block_per_row=1, **_heads(2)),
    "mra-mlm-left": _mlm(
        96, LEFT, 3, True, draw=1, type_vocab_size=2, num_hidden_layers=2, max_position_embeddings=100
    ),
    "mra-mlm-holes": _mlm(96, HOLES, 3, block_per_row=1, **_heads(2)),
    "mra-mlm-untied": _mlm(64, RIGHT, 3, True, draw=1, block_per_row=1, pad_token_id=5, type_vocab_size=2, **UNTIED),
    "mra-mlm-three-heads": _mlm(96, RIGHT, hidden_act="silu", **_heads(3)),
    "mra-mlm-head-64": _mlm(96, LEFT, draw=1, block_per_row=1, pad_token_id=0, **_heads(1, 64)),
    "mra-mlm-head-40": _mlm(96, HOLES, 3, hidden_act="gelu_new", **_heads(1, 40)),
    "mra-mlm-three-layers": _mlm(96, HOLES, num_hidden_layers=3, layer_norm_eps=1e-12, vocab_size=129),
    # Blocks that are attended exactly whatever their scores, and others with what is left.
    "mra-mlm-diagonal": _mlm(160, draw=2, block_per_row=3, **_priors(diagonal=3)),
    "mra-mlm-first": _mlm(128, RIGHT, 3, draw=3, **_priors(first=1)),
    "mra-mlm-first-and-diagonal": _mlm(160, HOLES, 3, draw=1, block_per_row=3, **_priors(first=1, diagonal=1)),
    # More such blocks than the budget has: the best of them, those with two priors before those with one.
    "mra-mlm-first-over-budget": _mlm(128, **_priors(first=2)),
    # The high-resolution part alone.
    "mra-mlm-sparse": _mlm(128, draw=2, **SPARSE),
    "mra-mlm-sparse-padded": _mlm(96, RIGHT, **SPARSE, **_heads(2), hidden_act="relu"),
    "mra-mlm-sparse-one-block-per-row": _mlm(96, HOLES, 3, draw=2, **SPARSE, block_per_row=1, num_hidden_layers=2),
    # Left padding of whole blocks: two or three priors (5e3 each) make up for the 1e4 that emptiness costs, and such
    # blocks take places of the budget.
    "mra-mlm-sparse-first-and-diagonal": _mlm(160, LEFT, 3, True, draw=4, **SPARSE, **_priors(first=1, diagonal=2)),
}
