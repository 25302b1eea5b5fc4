"""Heads: what turns the last hidden states into predictions.

Every tensor rank has all of these but the words' scores, so layers here get no mesh (see
``parallel.normalization.LayerNorm``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...parallel.layers import Linear, VocabParallelHead, word_table
from ...parallel.mesh import Mesh
from ...parallel.sharding import Logical
from .config import ModelConfig


class LanguageModelHead(nn.Module):
    """The (usually tied) word embedding as output weight, plus a bias a token.

    An architecture with layers before that subclasses and adds a ``transform``.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh, *, holds_embedding: bool) -> None:
        """``holds_embedding``: the stage has the word embedding, so a tied head needs no copy of it."""
        super().__init__()
        h, v, std = config.hidden_size, config.vocab_size, config.initializer_range
        weight: Logical | None = None
        if not config.tie_word_embeddings:
            weight = word_table(mesh, v, h, std=std, padding_index=None)
        elif not holds_embedding:
            padding = config.pad_token_id
            weight = word_table(mesh, v, h, std=std, padding_index=padding, tied_to="embeddings.words.weight")
        self.decoder = VocabParallelHead(mesh, v, h, weight=weight)

    def transform(self, hidden: Tensor) -> Tensor:
        """[..., h] → [..., h]"""
        return hidden

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """hidden: [..., h] → [..., v]."""
        return self.decoder.logits(self.transform(hidden), weight)

    def loss(self, hidden: Tensor, weight: Tensor, labels: Tensor, *, count_correct: bool) -> tuple[Tensor, Tensor]:
        """hidden: [n, h], labels: [n] → cross-entropy in nats and 1 where the label is the best guess, each [n]."""
        return self.decoder.loss(self.transform(hidden), weight, labels, count_correct=count_correct)


class SentenceHead(nn.Module):
    """Pooler (dense and tanh on the first token) and a two-way classifier (arXiv 1810.04805, section 3.1, task 2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        h, std = config.hidden_size, config.initializer_range
        self.pooler = Linear(None, h, h, std=std)
        self.classifier = Linear(None, h, 2, std=std)

    def forward(self, first: Tensor) -> Tensor:
        """first: [b, h], the hidden state of the first token → [b, 2]."""
        return self.classifier(torch.tanh(self.pooler(first)))

    def loss(self, first: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self(first).float()
        return {
            "sentence_losses": F.cross_entropy(logits, labels, reduction="none"),
            "sentence_correct": (logits.detach().argmax(-1) == labels).float(),
        }
