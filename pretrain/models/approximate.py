"""What MRA and Nyströmformer share: BERT's encoder with norms after the branches (arXiv 1810.04805), positions from the
table's third row on, and attention that is approximated document by document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator
from torch import Tensor

from ...parallel.mesh import Mesh
from ..batch import Batch
from .base import Context
from .bert import BertConfig, BertModel, embedding_keys, head_aliases, head_keys
from .config import ModelConfig
from .huggingface_keys import HuggingFaceKeys, layer_keys
from .own_code import OwnCode
from .transformer import MultiHeadAttention, PostNormLayer, TransformerConfig, transformer_keys

FIRST_POSITION = 2  # as released: the table's first rows serve no token


class ApproximateConfig(TransformerConfig):
    """Fields and defaults that Hugging Face's MraConfig and NystromformerConfig share, and ``padding_counts``."""

    pad_token_id: int | None = ModelConfig.with_default("pad_token_id", 1)
    bos_token_id: int | None = ModelConfig.with_default("bos_token_id", 0)
    eos_token_id: int | None = ModelConfig.with_default("eos_token_id", 2)
    layer_norm_eps: float = BertConfig.with_default("layer_norm_eps", 1e-5)
    attention_probs_dropout_prob: float = Field(
        0.0, ge=0.0, lt=1.0, description="dropout of the attention weights (mra and nystromformer: 0)"
    )
    padding_counts: bool = Field(
        False,
        description="compute a padded row as the released code does, where padding fills blocks and segments: set in "
        "imported models; false: a row's result does not depend on its padding (training has none)",
    )

    @model_validator(mode="after")
    def _check_use(self) -> ApproximateConfig:
        if self.is_decoder:
            raise ValueError(
                f"is_decoder true does not go with {self.model_type}, whose blocks and segments mix later positions "
                "into earlier ones: set it to false"
            )
        if self.attention_probs_dropout_prob:
            raise ValueError(
                f"attention_probs_dropout_prob {self.attention_probs_dropout_prob} does not go with {self.model_type}, "
                "where a weight can stand for many tokens (the released code never applies it): set it to 0"
            )
        return self

    @property
    def position_rows(self) -> int:
        return self.max_position_embeddings + FIRST_POSITION


class ApproximateAttention(MultiHeadAttention):
    """Attention of each document by itself, or of padded rows as they are where padding counts.

    A subclass says to what multiple of tokens documents are filled up, and what is computed.
    """

    multiple: int

    def __init__(self, config: ApproximateConfig, mesh: Mesh, index: int) -> None:
        super().__init__(config, mesh, index)
        self.padding_counts = config.padding_counts

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        pieces = context.documents.pieces(self.multiple, keep_padding=self.padding_counts)
        parts = list(zip(*map(pieces.split, (q, k, v)), pieces.masks, strict=True))
        return pieces.join(self.attend_parts(parts))

    def attend_parts(self, parts: list[tuple[Tensor, Tensor, Tensor, Tensor | None]]) -> list[Tensor]:
        """(q, k, v [n, h, l, d], mask [n, l] bool or None) of documents of different lengths → [n, h, l, d] of each."""
        raise NotImplementedError


class ApproximateModel(BertModel):
    embedding_norm = True
    unapplied_fields = ("attention_probs_dropout_prob",)
    config: ApproximateConfig

    def make_attention(self, index: int) -> ApproximateAttention:
        raise NotImplementedError

    def make_layer(self, index: int) -> PostNormLayer:
        return PostNormLayer(self.config, self.mesh, index, self.make_attention(index))

    def make_final_norm(self) -> None:
        return None  # every layer ends in one

    def position_ids(self, batch: Batch) -> Tensor:
        return batch.positions + FIRST_POSITION

    @classmethod
    def stock_fields(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        return {"padding_counts": fields.get("padding_counts", True)}

    @classmethod
    def huggingface_keys(cls, config: ModelConfig, heads: tuple[str, ...]) -> HuggingFaceKeys:
        prefix = f"{cls.name}." if heads else ""
        keys = embedding_keys(prefix) | layer_keys("embeddings.norm", f"{prefix}embeddings.LayerNorm")
        for i in range(config.num_hidden_layers):
            layer, norms = f"{prefix}encoder.layer.{i}", ("attention.output.LayerNorm", "output.LayerNorm")
            keys |= transformer_keys(i, layer, norms=norms)
        return keys | head_keys(config, heads, prefix)

    @classmethod
    def huggingface_aliases(cls, config: ModelConfig, heads: tuple[str, ...]) -> dict[str, str]:
        return head_aliases(config, heads, f"{cls.name}.")

    @classmethod
    def huggingface_class(cls, heads: tuple[str, ...], config: ModelConfig) -> str:
        return f"{cls.name.capitalize()}{'ForMaskedLM' if heads else 'Model'}"


def encoder_code(name: str, *, needed: bool = False) -> OwnCode:
    """The modelling files of one of the two (see ``OwnCode``)."""
    prefix = name.capitalize()
    tasks = ("MaskedLM", "SequenceClassification", "TokenClassification", "MultipleChoice", "QuestionAnswering")
    files = ("modeling_encoder.py", f"configuration_{name}.py", f"modeling_{name}.py")
    auto_map = {
        "AutoConfig": f"configuration_{name}.{prefix}Config",
        "AutoModel": f"modeling_{name}.{prefix}Model",
        **{f"AutoModelFor{task}": f"modeling_{name}.{prefix}For{task}" for task in tasks},
    }
    return OwnCode(tuple(f"encoders/{file}" for file in files), f"farspan_{name}", auto_map, needed=needed)
