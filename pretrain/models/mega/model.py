"""MEGA: moving average equipped gated attention (arXiv 2209.10655).

Shapes: b rows, s positions, h hidden; /t: split over the tensor group.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ....kernels.dropout import dropout_add
from ....parallel.layers import Embedding, Linear
from ....parallel.mesh import Mesh
from ....parallel.normalization import norm_of
from ...batch import Batch
from ..base import Context, Embeddings, LanguageModel
from ..config import ModelConfig
from ..feed_forward import FeedForward
from ..heads import LanguageModelHead
from ..huggingface_keys import HuggingFaceKeys
from ..own_code import OwnCode
from .attention import (
    FEED_FORWARD_INNER,
    FEED_FORWARD_OUTPUT,
    NORM_EPS,
    GatedAttention,
    GatedCrossAttention,
    normalise,
)
from .config import MegaConfig
from .huggingface import mega_aliases, mega_constants, mega_keys


class NormalizedFeedForward(nn.Module):
    """x + feed-forward(norm(x)), or norm(x + feed-forward(x))."""

    def __init__(self, config: MegaConfig, mesh: Mesh, index: int) -> None:
        super().__init__()
        self.config, self.index = config, index
        h = config.hidden_size
        self.norm = norm_of(config.normalization_type, mesh, h, NORM_EPS, affine=config.norm_affine)
        self.feed_forward = FeedForward(
            mesh, h, config.nffn_hidden_size, activation=config.activation, std=config.initializer_range,
            p=config.nffn_activation_dropout_prob,
        )  # fmt: skip

    def forward(self, x: Tensor, context: Context) -> Tensor:
        before, by_feature = self.config.normalize_before_ffn, self.config.use_feature_dropout
        inner_keys = context.keys(self.index, FEED_FORWARD_INNER, whole=True, by_feature=by_feature)
        y = self.feed_forward(normalise(self.norm, x, context) if before else x, inner_keys)
        keys = context.keys(self.index, FEED_FORWARD_OUTPUT, by_feature=by_feature)
        x = dropout_add(y, x, self.config.dropout_prob, keys)
        return x if before else normalise(self.norm, x, context)


class MegaLayer(nn.Module):
    """Attention, attention to an encoder where there is one, feed-forward."""

    def __init__(self, config: MegaConfig, mesh: Mesh, index: int) -> None:
        super().__init__()
        self.attention = GatedAttention(config, mesh, index)
        self.cross_attention = GatedCrossAttention(config, mesh, index) if config.add_cross_attention else None
        self.feed_forward = NormalizedFeedForward(config, mesh, index) if config.use_normalized_ffn else None

    def forward(self, hidden: Tensor, context: Context) -> Tensor:
        for part in (self.attention, self.cross_attention, self.feed_forward):
            hidden = hidden if part is None else part(hidden, context)
        return hidden


class MegaEmbeddings(Embeddings):
    """Words, and token types where the model has them; no positions, no dropout."""

    def __init__(self, config: MegaConfig, mesh: Mesh) -> None:
        super().__init__(config, mesh)
        self.types: Embedding | None = None
        if config.add_token_type_embeddings:
            self.types = Embedding(mesh, config.type_vocab_size, config.hidden_size, std=config.initializer_range)

    def forward(self, batch: Batch, context: Context) -> Tensor:
        """→ [s, b, h], under sequence parallelism [s/t, b, h]"""
        x = self.words(batch.input_ids.t())
        return x if self.types is None else x + self.types(batch.token_type_ids.t()[context.part])


class MegaHead(LanguageModelHead):
    """Dense and tanh (where the model has them), then the word embedding as output weight."""

    def __init__(self, config: MegaConfig, mesh: Mesh, *, holds_embedding: bool) -> None:
        super().__init__(config, mesh, holds_embedding=holds_embedding)
        self.dense: Linear | None = None
        if config.add_lm_hidden_dense_layer:
            self.dense = Linear(None, config.hidden_size, config.hidden_size, std=config.initializer_range)

    def transform(self, hidden: Tensor) -> Tensor:
        return hidden if self.dense is None else torch.tanh(self.dense(hidden))


class Mega(LanguageModel):
    name = "mega"
    config_class = MegaConfig
    has_cache = True
    operations = (*LanguageModel.operations, "ema")
    own_code = OwnCode(
        tuple(f"mega/{file}_mega.py" for file in ("configuration", "layers", "modeling")),
        "farspan_mega",
        {
            "AutoConfig": "configuration_mega.MegaConfig",
            "AutoModel": "modeling_mega.MegaModel",
            **{
                f"AutoModelFor{task}": f"modeling_mega.MegaFor{task}"
                for task in (
                    "MaskedLM", "CausalLM", "SequenceClassification", "TokenClassification", "MultipleChoice",
                    "QuestionAnswering",
                )
            },
        },
    )  # fmt: skip
    config: MegaConfig

    def make_layer(self, index: int) -> MegaLayer:
        return MegaLayer(self.config, self.mesh, index)

    def make_embeddings(self) -> MegaEmbeddings:
        return MegaEmbeddings(self.config, self.mesh)

    def make_head(self) -> MegaHead:
        return MegaHead(self.config, self.mesh, holds_embedding=self.stage.first)

    @classmethod
    def huggingface_keys(cls, config: ModelConfig, heads: tuple[str, ...]) -> HuggingFaceKeys:
        assert isinstance(config, MegaConfig)
        return mega_keys(config, heads)

    @classmethod
    def huggingface_aliases(cls, config: ModelConfig, heads: tuple[str, ...]) -> dict[str, str]:
        return mega_aliases(config, heads)

    @classmethod
    def huggingface_constants(cls, config: ModelConfig, heads: tuple[str, ...]) -> dict[str, Tensor]:
        assert isinstance(config, MegaConfig)
        return mega_constants(config, heads)

    @classmethod
    def huggingface_class(cls, heads: tuple[str, ...], config: ModelConfig) -> str:
        if not heads:
            return "MegaModel"
        return "MegaForCausalLM" if config.is_decoder else "MegaForMaskedLM"

    @classmethod
    def stock_difference(cls, config: ModelConfig) -> str | None:
        assert isinstance(config, MegaConfig)
        if config.normalization_type == "rmsnorm":
            return "their normalization_type rmsnorm computes the normalised value and throws it away"
        if config.is_decoder and config.truncation is not None:
            return "their decoder forgets truncation as soon as it keeps a cache, as it does unless labels are given"
        return None

    @classmethod
    def flops_per_row(cls, config: ModelConfig, length: float, predictions: float) -> float:
        """Three times the products of the forward pass; the moving average as a recurrence, which has none."""
        assert isinstance(config, MegaConfig)
        h, z, v = config.hidden_size, config.shared_representation_size, config.intermediate_size
        chunk = min(config.attention_chunk or length, length)
        pairs = length // chunk * chunk**2 + (length % chunk) ** 2  # of a query and a key
        layer = 2 * length * h * (z + 3 * v + 2 * h) + 2 * pairs * (z + v)
        if config.use_normalized_ffn:
            layer += 4 * length * h * config.nffn_hidden_size
        head = 2 * predictions * h * (config.vocab_size + (h if config.add_lm_hidden_dense_layer else 0))
        return 3.0 * (config.num_hidden_layers * layer + head)
