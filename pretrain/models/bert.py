"""What the BERT family shares (arXiv 1810.04805): embeddings of words, token types and positions, the head, the
Hugging Face names."""

from __future__ import annotations

from pydantic import Field, model_validator
from torch import Tensor, nn

from ...kernels.activation import ACTIVATIONS
from ...kernels.dropout import dropout
from ...parallel.layers import Embedding, Linear
from ...parallel.mesh import Mesh
from ...parallel.normalization import LayerNorm
from ..batch import Batch
from .base import Context, Embeddings, LanguageModel
from .config import ModelConfig
from .heads import LanguageModelHead
from .huggingface_keys import HuggingFaceKeys, layer_keys

EMBEDDING_DROPOUT = 0  # the only place of dropout of layer -1


class BertConfig(ModelConfig):
    """What the family adds."""

    hidden_act: str = Field("gelu", description="activation of the feed-forward; `gelu` is the exact one")
    max_position_embeddings: int = Field(512, gt=0, description="rows of the position table")
    layer_norm_eps: float = Field(1e-12, gt=0.0, description="added to the variance in every norm")

    @model_validator(mode="after")
    def _check_activation(self) -> BertConfig:
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {self.hidden_act!r} is unknown: choose one of {', '.join(ACTIVATIONS)}")
        return self

    @property
    def position_rows(self) -> int:
        """Rows of the position table."""
        return self.max_position_embeddings

    @property
    def position_padding_index(self) -> int | None:
        """The row of the position table that padding has, if it has one of its own."""
        return None

    @property
    def longest_sequence(self) -> int:
        return self.max_position_embeddings


class BertEmbeddings(Embeddings):
    """Words + token types + positions, then (in some architectures) a norm, then dropout.

    An architecture that does more before the dropout subclasses and adds to ``embed``.

    → [s, b, h], under sequence parallelism [s/tensor, b, h].
    """

    def __init__(self, config: BertConfig, mesh: Mesh, *, norm: bool, positions: bool) -> None:
        super().__init__(config, mesh)
        h, std = config.hidden_size, config.initializer_range
        self.p = config.hidden_dropout_prob
        self.types = Embedding(mesh, config.type_vocab_size, h, std=std)
        # Hugging Face keeps the table in its files for relative positions too, where nothing reads it.
        rows, padding = config.position_rows, config.position_padding_index
        self.positions = Embedding(mesh, rows, h, std=std, padding_index=padding)
        self.positions.weight.requires_grad_(positions)
        self.norm = LayerNorm(mesh, h, config.layer_norm_eps) if norm else None

    def forward(self, batch: Batch, position_ids: Tensor, context: Context) -> Tensor:
        return dropout(self.embed(batch, position_ids, context), self.p, context.keys(-1, EMBEDDING_DROPOUT))

    def embed(self, batch: Batch, position_ids: Tensor, context: Context) -> Tensor:
        """Of this rank's positions, before dropout."""
        x = self.words(batch.input_ids.t()) + self.types(batch.token_type_ids.t()[context.part])
        if self.positions.weight.requires_grad:
            x = x + self.positions(position_ids.t()[context.part])
        return x if self.norm is None else self.norm(x)


class BertHead(LanguageModelHead):
    """Dense, activation, norm, then the word embedding as output weight (as released)."""

    def __init__(self, config: BertConfig, mesh: Mesh, activation: str, *, holds_embedding: bool) -> None:
        super().__init__(config, mesh, holds_embedding=holds_embedding)
        self.dense = Linear(None, config.hidden_size, config.hidden_size, std=config.initializer_range)
        self.activation = ACTIVATIONS[activation]
        self.norm = LayerNorm(None, config.hidden_size, config.layer_norm_eps)

    def transform(self, hidden: Tensor) -> Tensor:
        return self.norm(self.activation(self.dense(hidden)))


class BertModel(LanguageModel):
    """A stack of layers between these embeddings and this head, a last norm before the head."""

    embedding_norm = False
    embeddings: BertEmbeddings
    config: BertConfig

    def make_embeddings(self) -> BertEmbeddings:
        return BertEmbeddings(self.config, self.mesh, norm=self.embedding_norm, positions=self.uses_position_table())

    def uses_position_table(self) -> bool:
        return True

    def position_ids(self, batch: Batch) -> Tensor:
        """Rows of the position table, [b, s]."""
        return batch.positions

    def embed(self, batch: Batch, context: Context) -> Tensor:
        return self.embeddings(batch, self.position_ids(batch), context)

    def make_final_norm(self) -> nn.Module | None:
        """What follows the last layer: a norm, in a pre-norm stack; None, in a post-norm one."""
        return LayerNorm(self.mesh, self.config.hidden_size, self.config.layer_norm_eps)

    def make_head(self) -> BertHead:
        return BertHead(self.config, self.mesh, self.head_activation(), holds_embedding=self.stage.first)

    def head_activation(self) -> str:
        return self.config.hidden_act


def embedding_keys(prefix: str) -> HuggingFaceKeys:
    """The three tables."""
    tables = {"words": "word", "types": "token_type", "positions": "position"}
    return {f"embeddings.{ours}.weight": (f"{prefix}embeddings.{hf}_embeddings.weight",) for ours, hf in tables.items()}


def head_keys(config: ModelConfig, heads: tuple[str, ...], prefix: str) -> HuggingFaceKeys:
    """The heads; ``prefix``: what stands before the model's own tensors."""
    keys: HuggingFaceKeys = {}
    if "lm" in heads:
        keys |= layer_keys("lm_head.dense", "cls.predictions.transform.dense")
        keys |= layer_keys("lm_head.norm", "cls.predictions.transform.LayerNorm")
        keys["lm_head.decoder.bias"] = ("cls.predictions.bias",)
        if not config.tie_word_embeddings:
            keys["lm_head.decoder.weight"] = ("cls.predictions.decoder.weight",)
    if "nsp" in heads:
        keys |= layer_keys("sentence_head.pooler", f"{prefix}pooler.dense")
        keys |= layer_keys("sentence_head.classifier", "cls.seq_relationship")
    return keys


def head_aliases(config: ModelConfig, heads: tuple[str, ...], prefix: str) -> dict[str, str]:
    """The second names of the tensors of ``head_keys``."""
    if "lm" not in heads:
        return {}
    aliases = {"cls.predictions.decoder.bias": "cls.predictions.bias"}
    if config.tie_word_embeddings:
        aliases["cls.predictions.decoder.weight"] = f"{prefix}embeddings.word_embeddings.weight"
    return aliases
