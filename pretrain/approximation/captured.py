"""Queries, keys and values of a trained model, as its layers compute them on real text."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .. import checkpoint as ckpt
from ..data.sources import Reading, find_sources, plan_shards, read_documents
from ..data.tokenizer import Encoder, Vocabulary
from ..load import LoadedModel, load
from ..models.transformer import MultiHeadAttention, TransformerConfig

Inputs = tuple[Tensor, Tensor, Tensor]


class TrainedModel:
    """A model with heads that attend in both directions, and its tokenizer."""

    def __init__(self, path: str | Path) -> None:
        """path: a checkpoint, a run folder or a Hugging Face folder; ValueError where it cannot be measured."""
        self.model: LoadedModel = load(path)
        config = self.model.config
        self.attentions = [m for m in self.model.modules() if isinstance(m, MultiHeadAttention)]
        if not self.attentions or not isinstance(config, TransformerConfig):
            raise ValueError(
                f"{path} is a {config.model_type} model, whose attention is no softmax in heads: give one of "
                "megatron-bert, mra, nystromformer, roberta-prelayernorm"
            )
        if config.is_decoder:
            raise ValueError(f"{path} is a decoder, and the approximations have no causal form: give an encoder")
        folder = Path(path)
        self.tokenizer = folder if (folder / "config.json").is_file() else ckpt.find(folder) / "tokenizer"
        self.longest: int = config.longest_sequence
        self.shape = config.num_hidden_layers, config.num_attention_heads
        self.name = f"{config.model_type} of {self.shape[0]} layers with {self.shape[1]} heads"

    def rows(self, inputs: Sequence[str], length: int, rows: int) -> Tensor:
        """Token ids [up to ``rows``, length] of the text in files, globs or data sets: documents, a separator after
        each, cut into rows that begin with the special token for it.  ValueError where not one row can be filled."""
        vocabulary, encoder, reading = Vocabulary.from_folder(self.tokenizer), Encoder(self.tokenizer), Reading()
        pieces = itertools.chain.from_iterable(plan_shards(find_sources(inputs, reading), reading))
        ids: list[int] = []
        for document in itertools.chain.from_iterable(read_documents(piece, reading) for piece in pieces):
            ids += [*encoder.encode([document])[0].tolist(), vocabulary.sep_id]
            if len(ids) >= rows * (length - 1):
                break
        filled = min(rows, len(ids) // (length - 1))
        if not filled:
            raise ValueError(f"the input has {len(ids)} tokens, too few for a row of {length}: give more, or --lengths")
        body = torch.from_numpy(np.array(ids[: filled * (length - 1)])).view(filled, length - 1)
        return torch.cat((torch.full((filled, 1), vocabulary.cls_id), body), 1)

    def layers(self, ids: Tensor) -> list[Inputs]:
        """q, k, v [1, heads, length, d] float32 of every layer for a row of token ids [length]."""
        with torch.no_grad(), contextlib.ExitStack() as stack:
            found = [stack.enter_context(_projected(attention)) for attention in self.attentions]
            self.model(ids.unsqueeze(0))
        return [_in_heads(attention, x) for attention, (x,) in zip(self.attentions, found, strict=True)]


@contextlib.contextmanager
def _projected(attention: MultiHeadAttention) -> Iterator[list[Tensor]]:
    """What the projection to queries, keys and values gives, for as long as the block lasts."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, arguments: object, output: Tensor) -> None:
        kept.append(output)

    hook = attention.qkv.register_forward_hook(keep)
    try:
        yield kept
    finally:
        hook.remove()


def _in_heads(attention: MultiHeadAttention, qkv: Tensor) -> Inputs:
    """[s, 1, 3 · heads · d] → q, k, v [1, heads, s, d]"""
    q, k, v = qkv.view(*qkv.shape[:2], 3, attention.heads, attention.head_size).permute(2, 1, 3, 0, 4).contiguous()
    return q, k, v
