"""RoBERTa-PreLayerNorm: RoBERTa (arXiv 1907.11692), norms before the branches (arXiv 1806.00187, 2202.08005)."""

from __future__ import annotations

import dataclasses

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..batch import Batch
from .bert import BertModel, embedding_keys
from .config import ModelConfig
from .dense_attention import DenseAttention, DenseAttentionConfig, dense_flops_per_row, dense_keys
from .huggingface_keys import HuggingFaceKeys, layer_keys
from .transformer import PreNormLayer


class RobertaPreLayerNormConfig(DenseAttentionConfig):
    """Fields and defaults of Hugging Face's RobertaPreLayerNormConfig."""

    model_type: str = ModelConfig.with_default("model_type", "roberta-prelayernorm")
    pad_token_id: int = Field(1, ge=0, description="the padding token's; positions are counted from it")  # type: ignore[assignment]
    bos_token_id: int | None = ModelConfig.with_default("bos_token_id", 0)
    eos_token_id: int | None = ModelConfig.with_default("eos_token_id", 2)

    @model_validator(mode="after")
    def _check_positions(self) -> RobertaPreLayerNormConfig:
        if self.longest_sequence < 1:
            raise ValueError(
                f"max_position_embeddings {self.max_position_embeddings} leaves no position: they are counted from "
                f"pad_token_id {self.pad_token_id} + 1, raise it"
            )
        return self

    @property
    def position_padding_index(self) -> int | None:
        return self.pad_token_id

    @property
    def longest_sequence(self) -> int:
        """Absolute positions count from the padding index + 1, so that the table's first rows serve no token."""
        if self.position_embedding_type != "absolute":
            return self.max_position_embeddings
        return self.max_position_embeddings - self.pad_token_id - 1


class RobertaPreLayerNorm(BertModel):
    name = "roberta-prelayernorm"
    config_class = RobertaPreLayerNormConfig
    operations = (*BertModel.operations, "attention")
    embedding_norm = True
    config: RobertaPreLayerNormConfig

    def make_layer(self, index: int) -> PreNormLayer:
        return PreNormLayer(self.config, self.mesh, index, DenseAttention(self.config, self.mesh, index))

    def uses_position_table(self) -> bool:
        return self.config.position_embedding_type == "absolute"

    def position_ids(self, batch: Batch) -> Tensor:
        padding = self.config.pad_token_id
        return torch.where(batch.document_ids > 0, batch.positions + padding + 1, padding)

    def head_activation(self) -> str:
        return "gelu"  # whatever hidden_act is

    @classmethod
    def huggingface_batch(cls, config: ModelConfig, batch: Batch) -> Batch:
        """Positions count the tokens that are not the padding token, whatever the attention mask says."""
        assert isinstance(config, RobertaPreLayerNormConfig)
        real = (batch.input_ids != config.pad_token_id).long()
        # position_ids() adds padding + 1; a padding token has the table's padding row, that is position −1 here.
        return dataclasses.replace(batch, positions=real.cumsum(1) * real - 1)

    @classmethod
    def huggingface_keys(cls, config: RobertaPreLayerNormConfig, heads: tuple[str, ...]) -> HuggingFaceKeys:  # type: ignore[override]
        prefix = "roberta_prelayernorm." if heads else ""
        keys = embedding_keys(prefix) | layer_keys("embeddings.norm", f"{prefix}embeddings.LayerNorm")
        for i in range(config.num_hidden_layers):
            layer, norms = f"{prefix}encoder.layer.{i}", ("attention.LayerNorm", "intermediate.LayerNorm")
            keys |= dense_keys(config, i, layer, norms=norms)
        keys |= layer_keys("final_norm", f"{prefix}LayerNorm")
        if "lm" in heads:
            keys |= layer_keys("lm_head.dense", "lm_head.dense") | layer_keys("lm_head.norm", "lm_head.layer_norm")
            keys["lm_head.decoder.bias"] = ("lm_head.bias",)
            if not config.tie_word_embeddings:
                keys["lm_head.decoder.weight"] = ("lm_head.decoder.weight",)
        return keys

    @classmethod
    def huggingface_aliases(cls, config: ModelConfig, heads: tuple[str, ...]) -> dict[str, str]:
        if "lm" not in heads:
            return {}
        aliases = {"lm_head.decoder.bias": "lm_head.bias"}
        if config.tie_word_embeddings:
            aliases["lm_head.decoder.weight"] = "roberta_prelayernorm.embeddings.word_embeddings.weight"
        return aliases

    @classmethod
    def huggingface_class(cls, heads: tuple[str, ...], config: ModelConfig) -> str:
        if not heads:
            return "RobertaPreLayerNormModel"
        return "RobertaPreLayerNormForCausalLM" if config.is_decoder else "RobertaPreLayerNormForMaskedLM"

    @classmethod
    def flops_per_row(cls, config: ModelConfig, length: float, predictions: float) -> float:
        assert isinstance(config, DenseAttentionConfig)
        return dense_flops_per_row(config, length, predictions)
