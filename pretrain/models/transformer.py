"""The pre-norm transformer layer; self-attention, split over the tensor group."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ...kernels.attention import attention
from ...kernels.dropout import dropout_add, stream
from ...parallel.layers import ColumnParallelLinear, Embedding, RowParallelLinear, require_divisible
from ...parallel.mappings import copy_to_tensor_region
from ...parallel.mesh import Mesh
from ...parallel.normalization import LayerNorm
from .base import Context
from .bert import BertConfig
from .feed_forward import FeedForward
from .huggingface_keys import HuggingFaceKeys, layer_keys

PositionEmbeddingType = Literal["absolute", "relative_key", "relative_key_query"]
# Places of dropout within a layer (see kernels.dropout.stream).
ATTENTION_OUTPUT, FEED_FORWARD_OUTPUT, ATTENTION_WEIGHTS = 0, 1, 2


class TransformerConfig(BertConfig):
    """What the architectures with ordinary attention add."""

    split_over_tensor = ("num_attention_heads", "intermediate_size")

    num_attention_heads: int = Field(12, gt=0, description="attention heads of a layer; a divisor of hidden_size")
    attention_probs_dropout_prob: float = Field(0.1, ge=0.0, lt=1.0, description="dropout of the attention weights")
    position_embedding_type: PositionEmbeddingType = Field(
        "absolute",
        description="a table added to the embeddings; or a table of distances in every layer, met by the query, or by "
        "the query and the key",
    )

    @model_validator(mode="after")
    def _check_heads(self) -> TransformerConfig:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} does not divide by num_attention_heads {self.num_attention_heads}: "
                "set one to fit the other"
            )
        return self

    @property
    def export_note(self) -> str | None:
        if self.position_embedding_type == "absolute":
            return None
        return (
            f"transformers 5 ignores position_embedding_type {self.position_embedding_type}: load it in transformers 4"
        )


class SelfAttention(nn.Module):
    """Multi-head attention (arXiv 1706.03762, section 3.2), heads split over the tensor group.

    ``relative_key`` adds q·E[i−j] to the scores (arXiv 1803.02155, equation 5); ``relative_key_query`` adds k·E[i−j]
    too (arXiv 2009.13658, method 4); E has 2·max_position_embeddings − 1 rows, shared by the heads of a layer.
    """

    def __init__(self, config: TransformerConfig, mesh: Mesh, index: int) -> None:
        super().__init__()
        require_divisible("num_attention_heads", config.num_attention_heads, mesh.tensor.size)
        h, std = config.hidden_size, config.initializer_range
        self.index, self.axis = index, mesh.tensor
        self.heads = config.num_attention_heads // mesh.tensor.size
        self.head_size = h // config.num_attention_heads
        self.p = config.attention_probs_dropout_prob
        self.kind = config.position_embedding_type
        self.qkv = ColumnParallelLinear(mesh, h, 3 * h, std=std, parts=3)
        self.output = RowParallelLinear(mesh, h, h, std=std)
        self.distances: Embedding | None = None
        if self.kind != "absolute":
            self.distances = Embedding(mesh, 2 * config.max_position_embeddings - 1, self.head_size, std=std)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x: [s, b, h] → [s, b, h], under sequence parallelism [s/tensor, b, h] → the same."""
        qkv = self.qkv(x)
        s, b, _ = qkv.shape  # all positions, also under sequence parallelism
        q, k, v = qkv.view(s, b, 3, self.heads, self.head_size).unbind(2)
        return self.output(context.run("selective", self._core, q, k, v, context).flatten(2))

    def _core(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """q, k, v: [s, b, heads, d] → [s, b, heads, d]"""
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


class PreNormLayer(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)) (arXiv 2002.04745, figure 1b).

    The mixing of positions is ``self.attention``; an architecture with another one subclasses and replaces it.
    """

    def __init__(self, config: TransformerConfig, mesh: Mesh, index: int) -> None:
        super().__init__()
        self.index, self.p = index, config.hidden_dropout_prob
        self.attention_norm = LayerNorm(mesh, config.hidden_size, config.layer_norm_eps)
        self.attention = SelfAttention(config, mesh, index)
        self.feed_forward_norm = LayerNorm(mesh, config.hidden_size, config.layer_norm_eps)
        h, inner = config.hidden_size, config.intermediate_size
        self.feed_forward = FeedForward(mesh, h, inner, activation=config.hidden_act, std=config.initializer_range)

    def forward(self, hidden: Tensor, context: Context) -> Tensor:
        attended = self.attention(self.attention_norm(hidden), context)
        hidden, x = self.feed_forward_norm.after_dropout_add(
            attended, hidden, self.p, context.keys(self.index, ATTENTION_OUTPUT)
        )
        return dropout_add(self.feed_forward(x), hidden, self.p, context.keys(self.index, FEED_FORWARD_OUTPUT))


def transformer_flops_per_row(config: TransformerConfig, length: float, predictions: float) -> float:
    """Training FLOPs of one row of an encoder with dense attention: three times the products of the forward pass
    (a backward pass has two for each), element-wise work not counted (arXiv 2104.04473, appendix)."""
    h, i, v = config.hidden_size, config.intermediate_size, config.vocab_size
    projections = 2 * length * (4 * h * h + 2 * h * i)
    relative_products = {"absolute": 0, "relative_key": 1, "relative_key_query": 2}[config.position_embedding_type]
    attention = 2 * length * length * h * (2 + relative_products)
    head = 2 * predictions * (h * h + h * v)
    return 3.0 * (config.num_hidden_layers * (projections + attention) + head)


def transformer_keys(config: TransformerConfig, index: int, layer: str, *, norms: tuple[str, str]) -> HuggingFaceKeys:
    """The tensors of one layer under Hugging Face's BERT names; ``norms``: the two norms' names below ``layer``."""
    ours, attention = f"layers.{index}", f"{layer}.attention"
    keys = {
        **layer_keys(f"{ours}.attention_norm", f"{layer}.{norms[0]}"),
        **layer_keys(f"{ours}.attention.qkv", *(f"{attention}.self.{part}" for part in ("query", "key", "value"))),
        **layer_keys(f"{ours}.attention.output", f"{attention}.output.dense"),
        **layer_keys(f"{ours}.feed_forward_norm", f"{layer}.{norms[1]}"),
        **layer_keys(f"{ours}.feed_forward.up", f"{layer}.intermediate.dense"),
        **layer_keys(f"{ours}.feed_forward.down", f"{layer}.output.dense"),
    }
    if config.position_embedding_type != "absolute":
        keys[f"{ours}.attention.distances.weight"] = (f"{attention}.self.distance_embedding.weight",)
    return keys
