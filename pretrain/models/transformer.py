"""The transformer's layer, its norms before or after the branches, and attention in heads split over the tensor group.

How queries, keys and values become an output is an architecture's own: it subclasses ``MultiHeadAttention``.
"""

from __future__ import annotations

from pydantic import Field, model_validator
from torch import Tensor, nn

from ...kernels.dropout import dropout_add
from ...parallel.layers import ColumnParallelLinear, RowParallelLinear, require_divisible
from ...parallel.mesh import Mesh
from ...parallel.normalization import LayerNorm
from .base import Context
from .bert import BertConfig
from .feed_forward import FeedForward
from .huggingface_keys import HuggingFaceKeys, layer_keys

# Places of dropout within a layer (see kernels.dropout.stream).
ATTENTION_OUTPUT, FEED_FORWARD_OUTPUT, ATTENTION_WEIGHTS = 0, 1, 2


class TransformerConfig(BertConfig):
    """What the architectures with attention heads add."""

    split_over_tensor = ("num_attention_heads", "intermediate_size")

    num_attention_heads: int = Field(12, gt=0, description="attention heads of a layer; a divisor of hidden_size")

    @model_validator(mode="after")
    def _check_heads(self) -> TransformerConfig:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} does not divide by num_attention_heads {self.num_attention_heads}: "
                "set one to fit the other"
            )
        return self


class MultiHeadAttention(nn.Module):
    """Projections to queries, keys and values, and of all heads together to the output (arXiv 1706.03762, section
    3.2.2), each tensor rank with its own heads."""

    def __init__(self, config: TransformerConfig, mesh: Mesh, index: int) -> None:
        super().__init__()
        require_divisible("num_attention_heads", config.num_attention_heads, mesh.tensor.size)
        h, std = config.hidden_size, config.initializer_range
        self.index, self.axis = index, mesh.tensor
        self.heads = config.num_attention_heads // mesh.tensor.size
        self.head_size = h // config.num_attention_heads
        self.qkv = ColumnParallelLinear(mesh, h, 3 * h, std=std, parts=3)
        self.output = RowParallelLinear(mesh, h, h, std=std)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x: [s, b, h] → [s, b, h], under sequence parallelism [s/tensor, b, h] → the same."""
        qkv = self.qkv(x)
        s, b, _ = qkv.shape  # all positions, also under sequence parallelism
        q, k, v = qkv.view(s, b, 3, self.heads, self.head_size).unbind(2)
        return self.output(context.run("selective", self.attend, q, k, v, context).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """q, k, v: [s, b, heads, d] → [s, b, heads, d]"""
        raise NotImplementedError


class TransformerLayer(nn.Module):
    """What both kinds have.  An architecture with other branches subclasses and replaces them."""

    def __init__(self, config: TransformerConfig, mesh: Mesh, index: int, attention: nn.Module) -> None:
        super().__init__()
        h, inner, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.index, self.p = index, config.hidden_dropout_prob
        self.attention_norm = LayerNorm(mesh, h, eps)
        self.attention = attention
        self.feed_forward_norm = LayerNorm(mesh, h, eps)
        self.feed_forward = FeedForward(mesh, h, inner, activation=config.hidden_act, std=config.initializer_range)


class PreNormLayer(TransformerLayer):
    """x + attention(norm(x)), then x + feed-forward(norm(x)) (arXiv 2002.04745, figure 1b)."""

    def forward(self, hidden: Tensor, context: Context) -> Tensor:
        attended = self.attention(self.attention_norm(hidden), context)
        hidden, x = self.feed_forward_norm.after_dropout_add(
            attended, hidden, self.p, context.keys(self.index, ATTENTION_OUTPUT)
        )
        return dropout_add(self.feed_forward(x), hidden, self.p, context.keys(self.index, FEED_FORWARD_OUTPUT))


class PostNormLayer(TransformerLayer):
    """norm(x + attention(x)), then norm(x + feed-forward(x)) (arXiv 1706.03762, section 3.1; 2002.04745, figure 1a)."""

    def forward(self, hidden: Tensor, context: Context) -> Tensor:
        attended, keys = self.attention(hidden, context), context.keys(self.index, ATTENTION_OUTPUT)
        _, x = self.attention_norm.after_dropout_add(attended, hidden, self.p, keys)
        keys = context.keys(self.index, FEED_FORWARD_OUTPUT)
        return self.feed_forward_norm.after_dropout_add(self.feed_forward(x), x, self.p, keys)[1]


def transformer_flops_per_row(
    config: TransformerConfig, length: float, predictions: float, *, attention: float
) -> float:
    """Training FLOPs of one row: three times the products of the forward pass (a backward pass has two for each),
    element-wise work not counted (arXiv 2104.04473, appendix).  ``attention``: of a layer's heads, forward."""
    h, i, v = config.hidden_size, config.intermediate_size, config.vocab_size
    projections = 2 * length * (4 * h * h + 2 * h * i)
    head = 2 * predictions * (h * h + h * v)
    return 3.0 * (config.num_hidden_layers * (projections + attention) + head)


def transformer_keys(index: int, layer: str, *, norms: tuple[str, str]) -> HuggingFaceKeys:
    """The tensors of one layer under Hugging Face's BERT names; ``norms``: the two norms' names below ``layer``."""
    ours, attention = f"layers.{index}", f"{layer}.attention"
    return {
        **layer_keys(f"{ours}.attention_norm", f"{layer}.{norms[0]}"),
        **layer_keys(f"{ours}.attention.qkv", *(f"{attention}.self.{part}" for part in ("query", "key", "value"))),
        **layer_keys(f"{ours}.attention.output", f"{attention}.output.dense"),
        **layer_keys(f"{ours}.feed_forward_norm", f"{layer}.{norms[1]}"),
        **layer_keys(f"{ours}.feed_forward.up", f"{layer}.intermediate.dense"),
        **layer_keys(f"{ours}.feed_forward.down", f"{layer}.output.dense"),
    }
