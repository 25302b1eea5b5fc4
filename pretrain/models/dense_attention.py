"""Attention of every token to every other of its document, with absolute or relative positions."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ...kernels.attention import attention
from ...kernels.dropout import stream
from ...parallel.layers import Embedding
from ...parallel.mappings import copy_to_tensor_region
from ...parallel.mesh import Mesh
from .base import Context
from .huggingface_keys import HuggingFaceKeys
from .transformer import (
    ATTENTION_WEIGHTS,
    MultiHeadAttention,
    TransformerConfig,
    transformer_flops_per_row,
    transformer_keys,
)

PositionEmbeddingType = Literal["absolute", "relative_key", "relative_key_query"]


class DenseAttentionConfig(TransformerConfig):
    """What the architectures with such attention add."""

    attention_probs_dropout_prob: float = Field(0.1, ge=0.0, lt=1.0, description="dropout of the attention weights")
    position_embedding_type: PositionEmbeddingType = Field(
        "absolute",
        description="a table added to the embeddings; or a table of distances in every layer, met by the query, or by "
        "the query and the key",
    )

    @property
    def export_note(self) -> str | None:
        if self.position_embedding_type == "absolute":
            return None
        return (
            f"transformers 5 ignores position_embedding_type {self.position_embedding_type}: load it in transformers 4"
        )


class DenseAttention(MultiHeadAttention):
    """softmax(q kᵀ / √d) v (arXiv 1706.03762, section 3.2).

    ``relative_key`` adds q·E[i−j] to the scores (arXiv 1803.02155, equation 5); ``relative_key_query`` adds k·E[i−j]
    too (arXiv 2009.13658, method 4); E has 2·max_position_embeddings − 1 rows, shared by the heads of a layer.
    """

    def __init__(self, config: DenseAttentionConfig, mesh: Mesh, index: int) -> None:
        super().__init__(config, mesh, index)
        self.p = config.attention_probs_dropout_prob
        self.kind = config.position_embedding_type
        self.distances: Embedding | None = None
        if self.kind != "absolute":
            rows = 2 * config.max_position_embeddings - 1
            self.distances = Embedding(mesh, rows, self.head_size, std=config.initializer_range)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        table: Tensor | None = None
        if self.distances is not None:
            # Every tensor rank uses the table for its own heads only, so its gradient is a sum over the group.
            table = copy_to_tensor_region(self.distances.weight, self.axis)
        return attention(
            q, k, v, context.documents, p=self.p, keys=self._weight_keys(context), distances=table,
            distance_keys=self.kind == "relative_key_query",
        )  # fmt: skip

    def _weight_keys(self, context: Context) -> Tensor | None:
        """Keys [heads, s, b] of the weights' dropout: a row of weights is a head and a query."""
        if context.dropout is None or self.p == 0:
            return None
        first = self.axis.rank * self.heads
        heads = torch.arange(first, first + self.heads, device=context.positions.device).view(-1, 1, 1)
        return context.dropout.rows(stream(self.index, ATTENTION_WEIGHTS), heads * (1 << 32) + context.positions)


def dense_flops_per_row(config: DenseAttentionConfig, length: float, predictions: float) -> float:
    """Training FLOPs of one row."""
    relative_products = {"absolute": 0, "relative_key": 1, "relative_key_query": 2}[config.position_embedding_type]
    attention = 2 * length * length * config.hidden_size * (2 + relative_products)
    return transformer_flops_per_row(config, length, predictions, attention=attention)


def dense_keys(config: DenseAttentionConfig, index: int, layer: str, *, norms: tuple[str, str]) -> HuggingFaceKeys:
    """The tensors of one layer (see ``transformer_keys``)."""
    keys = transformer_keys(index, layer, norms=norms)
    if config.position_embedding_type != "absolute":
        distances = f"{layer}.attention.self.distance_embedding.weight"
        keys[f"layers.{index}.attention.distances.weight"] = (distances,)
    return keys
