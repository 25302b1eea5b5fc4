"""The pre-norm transformer layer: self-attention and feed-forward, split over the tensor group."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.activation import ACTIVATIONS
from ...kernels.dropout import dropout, dropout_add, stream
from ...parallel.layers import (
    ColumnParallelLinear,
    Embedding,
    LayerNorm,
    RowParallelLinear,
    copy_to_tensor_region,
    require_divisible,
)
from ...parallel.mesh import Mesh
from .base import Context, HuggingFaceKeys, layer_keys
from .config import ModelConfig

PositionEmbeddingType = Literal["absolute", "relative_key", "relative_key_query"]
# Places of dropout within a layer (see kernels.dropout.stream).
ATTENTION_OUTPUT, FEED_FORWARD_OUTPUT, ATTENTION_WEIGHTS = 0, 1, 2


class TransformerConfig(ModelConfig):
    """What the architectures with ordinary attention add."""

    position_embedding_type: PositionEmbeddingType = "absolute"

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
        self.total_heads = config.num_attention_heads
        self.head_size = h // config.num_attention_heads
        self.p = config.attention_probs_dropout_prob
        self.kind = config.position_embedding_type
        self.longest = config.max_position_embeddings
        self.qkv = ColumnParallelLinear(mesh, h, 3 * h, std=std, parts=3)
        self.output = RowParallelLinear(mesh, h, h, std=std)
        self.distances: Embedding | None = None
        if self.kind != "absolute":
            self.distances = Embedding(2 * self.longest - 1, self.head_size, std=std)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x: [s, b, h] → [s, b, h]"""
        s, b, _ = x.shape
        qkv = self.qkv(x).view(s, b, 3, self.heads, self.head_size).permute(2, 1, 3, 0, 4)
        q, k, v = qkv.unbind(0)  # [b, heads, s, d]
        dropping = context.dropout is not None and self.p > 0
        if self.distances is None and not dropping:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=context.mask, is_causal=context.causal and context.mask is None
            )
        else:
            y = self._explicit(q, k, v, context)
        return self.output(y.permute(2, 0, 1, 3).reshape(s, b, self.heads * self.head_size))

    def _explicit(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        scores = q @ k.transpose(-1, -2)
        s = q.shape[2]
        if self.distances is not None:
            scores = scores + self._relative_scores(q, k)
        scores = scores / math.sqrt(self.head_size)
        mask = context.mask
        if mask is None and context.causal:
            mask = torch.ones(s, s, dtype=torch.bool, device=q.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
        if context.dropout is not None and self.p > 0:
            weights = dropout(weights, self.p, self._weight_keys(s, context))
        return weights @ v

    def _relative_scores(self, q: Tensor, k: Tensor) -> Tensor:
        assert self.distances is not None
        s = q.shape[2]
        # Every tensor rank uses the table for its own heads only, so its gradient is a sum over the group.
        table = copy_to_tensor_region(self.distances.weight, self.axis)
        index = torch.arange(s, device=q.device)
        e_lrd = F.embedding(index.unsqueeze(1) - index + self.longest - 1, table)
        scores = torch.einsum("bhld,lrd->bhlr", q, e_lrd)
        if self.kind == "relative_key_query":
            scores = scores + torch.einsum("bhrd,lrd->bhlr", k, e_lrd)
        return scores

    def _weight_keys(self, s: int, context: Context) -> Tensor:
        """Keys [b, heads, s] for the weights [b, heads, s, s]: a row of weights is a (head, query position)."""
        assert context.dropout is not None
        first = self.axis.rank * self.heads
        heads = torch.arange(first, first + self.heads, device=context.positions.device).view(-1, 1, 1)
        positions = heads * (1 << 32) + context.positions  # [heads, s, 1]
        return context.dropout.rows(stream(self.index, ATTENTION_WEIGHTS), positions).permute(2, 0, 1)


class FeedForward(nn.Module):
    """Two products with an activation between, the inner features split over the tensor group."""

    def __init__(self, config: ModelConfig, mesh: Mesh) -> None:
        super().__init__()
        h, i, std = config.hidden_size, config.intermediate_size, config.initializer_range
        require_divisible("intermediate_size", i, mesh.tensor.size)
        self.up = ColumnParallelLinear(mesh, h, i, std=std)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.down = RowParallelLinear(mesh, i, h, std=std)

    def forward(self, x: Tensor) -> Tensor:
        """x: [s, b, h] → [s, b, h]"""
        return self.down(self.activation(self.up(x)))


class PreNormLayer(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)) (arXiv 2002.04745, figure 1b).

    The mixing of positions is ``self.attention``; an architecture with another one subclasses and replaces it.
    """

    def __init__(self, config: TransformerConfig, mesh: Mesh, index: int) -> None:
        super().__init__()
        self.index, self.p = index, config.hidden_dropout_prob
        self.attention_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = SelfAttention(config, mesh, index)
        self.feed_forward_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.feed_forward = FeedForward(config, mesh)

    def forward(self, hidden: Tensor, context: Context) -> Tensor:
        attended = self.attention(self.attention_norm(hidden), context)
        hidden, x = self.feed_forward_norm.after_dropout_add(
            attended, hidden, self.p, context.keys(self.index, ATTENTION_OUTPUT)
        )
        return dropout_add(self.feed_forward(x), hidden, self.p, context.keys(self.index, FEED_FORWARD_OUTPUT))


def transformer_flops_per_row(config: TransformerConfig, length: int, predictions: int) -> float:
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


def embedding_keys(prefix: str) -> HuggingFaceKeys:
    """The three tables under Hugging Face's BERT names."""
    tables = {"words": "word", "types": "token_type", "positions": "position"}
    return {f"embeddings.{ours}.weight": (f"{prefix}embeddings.{hf}_embeddings.weight",) for ours, hf in tables.items()}
